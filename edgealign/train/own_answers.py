"""A model's own answers to the prompts of conversations, the best of a few that pass the rules: rejection sampling.

    edgealign data answers --model M questions.jsonl --out DIR

Fine-tuning on them makes a model surer of what it already says well (rejection-sampling fine-tuning, arXiv 2308.01825):
greedy answers get a wider lead over the next best, which is what survives a quantised runtime, and answers that
ignored the style they were asked for, or looked up the wrong thing, are not among the examples.

Per prompt: one greedy answer and `samples` drawn ones. An answer passes if it ended its turn, repeats no run of four
words, reads like sentences, has half of the words that the data's own answer took from a passage in the prompt, and,
where the system turn asks for a style, has more of it than the plain greedy answer to the same prompt. Of those that
pass, the one that shares most words with what the user said and with the data's own answer is kept (under a request
for short answers the shortest); a prompt without any is left out and counted. Some conversations go on with another
prompt under the same system turn, so that a style lasts. Works on any session: torch, or a bundle that is faster.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgealign.artifact import Artifact, file_input, open_artifact, open_model, publish, refuse_existing
from edgealign.data.encode import encode_prompt
from edgealign.data.forms import Conversation, Message, to_json
from edgealign.data.read import read_all
from edgealign.data.styles import STYLES, follows
from edgealign.data.synthetic import write_jsonl
from edgealign.data.template import end_of_turn_id, facts_of
from edgealign.errors import InputError
from edgealign.models.load import load_tokenizer
from edgealign.personalize.attributes import words
from edgealign.progress import track
from edgealign.runtimes.generate import GREEDY, generate
from edgealign.runtimes.recipes import Sampling
from edgealign.runtimes.session import Session, open_session
from edgealign.train.recipes import OwnAnswersRecipe

REQUESTS = {request: name for name, style in STYLES.items() for request in style.requests}
RUN = 4  # words; the same run twice in an answer is a loop
FULL = 6  # words that a plain answer has if one of those that pass has them: something for `short` to leave out


def run(
    recipe: OwnAnswersRecipe, *, model: str | Path, sources: Sequence[str | Path], out: Path, bundle: Path | None = None
) -> Artifact:
    """Publish the data set.

    Args:
        bundle: an export of `model` to generate with, in place of torch.

    Raises:
        InputError: a source holds no conversations, or no answer passed.
    """
    refuse_existing(Path(out))
    source = open_model(model)
    tokenizer = load_tokenizer(source.path)
    prompts: list[tuple[tuple[Message, ...], str]] = []
    inputs = [source.as_input("model")]
    for loaded in read_all(sources, form="conversation", mapping={}, skip_bad=None):
        inputs.append(file_input("data", loaded.source, loaded.digest))
        prompts += [found for row in loaded.rows if isinstance(row, Conversation) and (found := _prompt(row))]
    rng = random.Random(recipe.seed)
    rng.shuffle(prompts)
    kept: list[Conversation] = []
    left_out: Counter[str] = Counter()
    session = open_session(bundle or source.path, threads=recipe.threads or None)
    asker = _Asker(session, tokenizer, recipe)
    try:
        for number, (messages, answer) in enumerate(track(prompts[: recipe.limit], total=recipe.limit, label="asking")):
            text, reason = asker.best(messages, answer, seed=recipe.seed + number)
            if text is None:
                left_out[reason] += 1
                continue
            said = (*messages, Message("assistant", text))
            if rng.random() < recipe.second_turns:
                follow, wanted = prompts[rng.randrange(len(prompts))]
                asked = (*said, follow[-1])
                text, _ = asker.best(asked, wanted, seed=recipe.seed + number)
                said = said if text is None else (*asked, Message("assistant", text))
            kept.append(Conversation(said))
    finally:
        session.close()
    if not kept:
        names = ", ".join(map(str, sources))
        raise InputError(names, "has no prompt with an answer that passes", "train the model more")
    with publish(out, kind="dataset", format="jsonl", stage="own_answers", recipe=recipe, inputs=inputs) as draft:
        write_jsonl(draft.dir / "train.jsonl", [to_json(row) for row in kept])
        draft.meta.update({"rows": {"train.jsonl": len(kept)}, "left_out": dict(left_out)})
    return open_artifact(out)


def loops(text: str) -> bool:
    """Whether a run of four words comes twice."""
    found = words(text)
    runs = [tuple(found[i : i + RUN]) for i in range(len(found) - RUN + 1)]
    return len(set(runs)) < len(runs)


@dataclasses.dataclass(frozen=True)
class _Asker:
    session: Session
    tokenizer: Any
    recipe: OwnAnswersRecipe

    def best(self, messages: tuple[Message, ...], answer: str, *, seed: int) -> tuple[str | None, str]:
        """The answer to keep, or None and why there is none."""
        style = REQUESTS.get(messages[0].content) if messages[0].role == "system" else None
        plain = self._say(messages[1:], GREEDY) if style else None
        if style and plain is None:
            return None, "the plain answer does not end"
        greedy = dataclasses.replace(GREEDY, max_tokens=self.recipe.max_new_tokens)
        drawn = dataclasses.replace(greedy, temperature=self.recipe.temperature, min_p=0.1)
        asked = {word for message in messages if message.role == "user" for word in words(message.content)}
        wanted = set(words(answer))
        looked_up = taken_from_passage(answer, messages[-1].content)
        passed: list[str] = []
        for i in range(self.recipe.samples + 1):
            text = self._say(messages, dataclasses.replace(drawn, seed=seed * 97 + i) if i else greedy)
            if not text or loops(text) or text[-1] not in ".!?" or (style and not follows(style, text, plain or "")):
                continue
            if 2 * len(looked_up.intersection(words(text))) >= len(looked_up):
                passed.append(text)
        if not passed:
            return None, f"no answer passes ({style or 'plain'})"
        if style == "short":
            return min(passed, key=lambda text: len(words(text))), ""
        room = 0 if style else FULL
        passed = [text for text in passed if len(words(text)) >= room] or passed
        return max(passed, key=lambda text: _shared(text, asked) + _shared(text, wanted)), ""

    def _say(self, messages: Sequence[Message], sampling: Sampling) -> str | None:
        """The answer from an empty state, None if it did not end its turn, or holds a control token."""
        self.session.reset()
        end = end_of_turn_id(self.tokenizer)
        limited = dataclasses.replace(sampling, max_tokens=self.recipe.max_new_tokens)
        said = generate(self.session, encode_prompt(self.tokenizer, messages), sampling=limited, stop={end})
        text = str(self.tokenizer.decode(said.tokens)).strip()
        broken = facts_of(self.tokenizer).control.search(text)  # a turn begun inside an answer
        return text if said.finish == "stop" and not broken else None


def _prompt(row: Conversation) -> tuple[tuple[Message, ...], str] | None:
    """Everything up to the first answer, and that answer."""
    for place, message in enumerate(row.messages):
        if message.role == "assistant":
            return (row.messages[:place], message.content) if place else None
    return None


def taken_from_passage(answer: str, prompt: str) -> set[str]:
    """The longer words that an answer took from the passage of a prompt, the question's own words left out."""
    passage, _, question = prompt.rpartition("\n\n")
    return {word for word in words(answer) if len(word) > 3}.intersection(words(passage)).difference(words(question))


def _shared(text: str, others: set[str]) -> float:
    """Share of the longer words of a text that are among others."""
    own = [word for word in words(text) if len(word) > 3]
    return sum(word in others for word in own) / len(own) if own else 0.0
