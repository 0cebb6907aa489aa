"""Can the model hold a simple conversation? Forty fixed prompts, answered and measured by rule.

    edgealign eval chat --model runs/M --bundle runs/q8 --bundle runs/q4 --data text.jsonl --out R

- Every prompt is answered greedily and once sampled: does the answer end its turn, look like sentences, repeat itself,
  and is it, for a question about a story, nearer to that story than to the fifteen others (the control)?
- Styles: the same prompts after a system turn that asks for a style. Did the answer move the way it asks, against the
  answer without a system turn? The control counts the answers to the six other requests.
- Bundles: are the first greedy tokens torch's own? Where one is not, how near were the two in torch (a tie?).
- Words, with `--data`: which of the answers' words, and neighbouring pairs of words, occur in the training text.

Styles are asked of the widest bundle where one is given (a step of a small model is several times quicker there than
in torch, and that is what ships), else of torch. Everything runs over a `Session` and the one generation loop.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgealign.artifact import Artifact, Input, file_input, open_artifact, open_model, publish, refuse_existing
from edgealign.data.styles import STYLES
from edgealign.errors import InputError
from edgealign.evaluate.chat_checks import (
    PLAIN,
    checks,
    measure_answers,
    measure_styles,
    measure_topic,
    measure_words,
)
from edgealign.evaluate.chat_prompts import Prompt, all_prompts
from edgealign.evaluate.chat_talk import Answer, Compare, Talk
from edgealign.evaluate.recipes import ChatRecipe
from edgealign.progress import bar, say


def run(
    recipe: ChatRecipe,
    *,
    model: str | Path,
    out: Path,
    bundles: Sequence[Path] = (),
    data: Sequence[str | Path] = (),
) -> Artifact:
    """Talk, measure and publish: `result.json`, `table.md`, `answers.md`, `styles.png`.

    Args:
        bundles: exported bundles of this very model.
        data: training text, for the known words.

    Raises:
        InputError: a bundle is of another model, or the data cannot be read.
    """
    from edgealign.data.encode import end_of_turn_id
    from edgealign.evaluate.chat_report import write_report
    from edgealign.models.load import load_tokenizer
    from edgealign.runtimes.session import open_session

    refuse_existing(Path(out))
    base = open_model(model)
    shipped = shipped_bundles(bundles, base)
    tokenizer = load_tokenizer(base.path)
    end = end_of_turn_id(tokenizer)
    prompts = all_prompts()
    result: dict[str, Any] = {"prompts": [_describe(prompt) for prompt in prompts], "bundles": {}}

    torch_session = open_session(base.path, threads=recipe.threads or None)
    try:
        with bar(total=2 * len(prompts), label="torch answers") as advance:
            talk = Talk(torch_session, tokenizer, recipe, end, advance)
            plain = {how: talk.all([prompt.messages for prompt in prompts], how) for how in PLAIN}
        answers: Mapping[str, list[Answer]] = plain
        for place, (label, path) in enumerate(shipped.items()):
            session = open_session(path, threads=recipe.threads or None)
            try:
                with bar(total=(1 + (not place) * len(STYLES)) * len(prompts), label=f"{label} answers") as advance:
                    talk = Talk(session, tokenizer, recipe, end, advance)
                    theirs = talk.all([prompt.messages for prompt in prompts], "greedy")
                    if place == 0:
                        answers, styled = {"greedy": theirs}, talk.styles(prompts)
            finally:
                session.close()
            pairs = zip(prompts, plain["greedy"], theirs, strict=True)
            compare = Compare(torch_session, tokenizer, end, recipe.agree_tokens)
            result["bundles"][label] = compare.all(list(pairs)) | {"bits": _bits(path)}
        if not shipped:
            with bar(total=len(STYLES) * len(prompts), label="torch styles") as advance:
                styled = Talk(torch_session, tokenizer, recipe, end, advance).styles(prompts)
    finally:
        torch_session.close()

    result["answers"] = {how: [_plain_answer(answer) for answer in plain[how]] for how in PLAIN}
    result["measures"] = {how: measure_answers(prompts, plain[how]) for how in PLAIN}
    result["topic"] = measure_topic(prompts, plain, recipe)
    result["styles"] = measure_styles([answer.text for answer in answers["greedy"]], styled)
    result["styles_runtime"] = next(iter(shipped), "torch")
    result["styled_answers"] = styled
    inputs = [base.as_input("model")]
    inputs += [open_artifact(path, check_digests=False).as_input(label) for label, path in shipped.items()]
    if data:
        texts, files = _read(data, recipe)
        inputs += files
        result["words"] = measure_words(prompts, plain, texts)
    with publish(out, kind="report", format="eval", stage="eval_chat", recipe=recipe, inputs=inputs) as draft:
        for check in checks(result, recipe):
            draft.add_check(check)
        text = json.dumps(result, indent=1, ensure_ascii=False)
        (draft.dir / "result.json").write_text(text, encoding="utf-8")
        write_report(draft.dir, result, recipe, draft.checks)
    say(f"read {Path(out) / 'answers.md'}")
    return open_artifact(out)


def _describe(prompt: Prompt) -> dict[str, Any]:
    messages = [{"role": message.role, "content": message.content} for message in prompt.messages]
    return {"kind": prompt.kind, "messages": messages, "keywords": list(prompt.keywords)}


def _plain_answer(answer: Answer) -> dict[str, Any]:
    return {"text": answer.text, "tokens": list(answer.tokens), "ended": answer.ended}


def shipped_bundles(bundles: Sequence[Path], model: Artifact) -> dict[str, Path]:
    """Name -> bundle, the widest first; each must be of this model."""
    from edgealign.runtimes.session import read_bundle

    found: dict[str, Path] = {}
    for path in sorted(bundles, key=_bits, reverse=True):
        bundle = read_bundle(path)
        label = f"{bundle.target} {bundle.quant}"
        digest = str(open_artifact(path, check_digests=False).meta.get("model_digest", ""))
        if digest != model.digest:
            reason = f"was exported from the model {digest[:12] or '(unnamed)'}, this one is {model.digest[:12]}"
            raise InputError(path, reason, f"export it: edgealign export --target {bundle.target} --model {model.path}")
        if label in found:
            raise InputError(path, f"is a second bundle of the kind {label}", "give each quantisation once")
        found[label] = Path(path)
    return found


def _bits(path: str | Path) -> int:
    """Bits per weight as the quantisation's name says, the lowest of a mixture: 8 for q8_0, 4 for q4_k_m."""
    from edgealign.runtimes.session import read_bundle

    parts = read_bundle(path, check_digests=False).quant.split("+")
    found = [re.search(r"\d+", part.rpartition("=")[2]) for part in parts]
    return min((int(number.group()) for number in found if number), default=32)


def _read(data: Sequence[str | Path], recipe: ChatRecipe) -> tuple[Iterator[str], list[Input]]:
    """Every text of every row; bad rows have no words to know."""
    from edgealign.data.forms import texts
    from edgealign.data.mapping import parse_mapping
    from edgealign.data.read import scan

    loaded = [scan(source, mapping=parse_mapping(recipe.map)) for source in data]
    inputs = [file_input("data", part.source, part.digest) for part in loaded]
    return (text for part in loaded for row in part.rows for text in texts(row)), inputs
