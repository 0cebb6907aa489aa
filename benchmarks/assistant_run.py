"""Does the assistant become its user's? Simulated people choose on its page, and are asked what they get for it.

    edgealign run starter-basis --out runs/starter-basis
    python benchmarks/assistant_run.py runs/starter-basis --out docs/results/assistant

The program of `edgealign app` runs over that preset's GGUF of the starter, and the page in the system's Chromium. Each
person has a hidden taste: a signed direction in whitened attributes of texts (edgealign/personalize/text_users.py), of
the population that the basis was learned from, but new people. They ask for two answers and press at once the one that
is worth more to them, 16 times; these questions are neither in the basis nor in the test. After 4, 8 and 16 choices the
server answers the test's questions as `base@person` and as the base, with the same seeds; a second one answers them
with LoRAs of the same choices, fitted by the command that the app trains with, whether the app would use them or not
(what it decided after 16 is kept too). `--parts latency` measures times alone and keeps the rest of an earlier result.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from assistant_people import NAMES, Person, Served, browsing, choose, draw_people, open_page, read_questions, serving
from assistant_report import draw, render
from result_files import write_results

from edgealign import apps
from edgealign.artifact import open_artifact, publish, write_atomic
from edgealign.bench.machine import busy, machine_card
from edgealign.bench.timing import timed
from edgealign.data.encode import encode_prompt
from edgealign.data.forms import Message
from edgealign.errors import EdgealignError, InputError, writing
from edgealign.models.builtin import built_in
from edgealign.models.load import load_model, load_tokenizer, read_config
from edgealign.progress import say
from edgealign.runtimes.generate import generate
from edgealign.runtimes.gguf_adapter import write_lora_gguf
from edgealign.runtimes.recipes import Sampling
from edgealign.runtimes.session import open_session

PARTS = ("choices", "latency")
AFTER, CHOICES = (4, 8, 16), 16
WARM_UP, SWAPS = 8, 400


def live(
    browser: Any, served: Served, person: Person, asked: Sequence[str], tested: Sequence[str]
) -> tuple[dict[str, Any], dict[int, list[str]], list[str]]:
    """One person's choices, the test's answers after some of them, and the choices as JSON lines, earliest first."""
    questions, ties = iter(asked), 0
    made: list[dict[str, Any]] = []
    texts: dict[int, list[str]] = {}
    with closing(open_page(browser, served, person.name)) as page:
        while len(made) < CHOICES:
            found = choose(page, served, person, next(questions))
            made += [found] if found else []
            ties += found is None
            if found and len(made) in AFTER:
                texts[len(made)] = served.answers(f"{served.model}@{person.name}", tested)
    known = served.taste(person.name)
    facts = {
        "name": person.name, "likes": person.words(), "taste": person.taste.round(3).tolist(), "ties": ties,
        "learned": known["words"], "versions": len(known["versions"]), "choices": made,
    }  # fmt: skip
    rows = served.http.get("/api/choices", params={"user": person.name, "form": "pair"}).raise_for_status().text
    return facts, texts, rows.splitlines()


def train(served: Served, person: Person) -> dict[str, Any]:
    """Let the app train a LoRA, and say what it did with it."""
    begun = time.perf_counter()
    served.http.post("/api/taste/training", params={"user": person.name}).raise_for_status()
    while (state := served.taste(person.name)["training"])["state"] == "running":
        time.sleep(0.5)
    active = [each["method"] for each in served.taste(person.name)["versions"] if each["active"]]
    seconds = time.perf_counter() - begun
    return {"state": state["state"], "message": state["message"], "seconds": seconds, "used": active == ["lora"]}


def fit_loras(person: Person, rows: Sequence[str], folder: Path) -> dict[int, dict[str, Any]]:
    """A LoRA of the first 4, 8 and 16 choices, with the app's command: seconds, and `file`, or why there is `none`."""
    base, training = built_in("starter"), apps.load("assistant.training")
    assert base is not None
    found: dict[int, dict[str, Any]] = {}
    for k in AFTER:
        choices, out = folder / f"{k}.jsonl", folder / str(k)
        choices.write_text("\n".join(rows[:k]) + "\n", encoding="utf-8")
        command = training.fit_command(base, choices, person.name, out, held_out=training.held_out_share(k))
        begun = time.perf_counter()
        ended = subprocess.run(command, capture_output=True, text=True)
        found[k] = {"seconds": round(time.perf_counter() - begun, 1)}
        if ended.returncode:
            found[k]["none"] = ended.stderr.strip().splitlines()[-1]
        else:
            write_lora_gguf(out, folder / f"{k}.gguf", base_config=read_config(base))
            found[k]["file"] = folder / f"{k}.gguf"
    return found


def decide(served: Served, person: Person) -> dict[str, Any]:
    """What the app does with a LoRA of all choices: against the numbers, or else everybody's model, an easier bar."""
    tries = {"the numbers": train(served, person)}
    if not tries["the numbers"]["used"]:
        served.http.post("/api/taste/active", params={"user": person.name}, json={"version": 0}).raise_for_status()
        tries["everybody's model"] = train(served, person)
    return tries


def measure_person(args: argparse.Namespace, bundle: Path, folder: Path, person: Person, number: int) -> dict[str, Any]:
    """One person's choices, and what they get: from the numbers, and from LoRAs of the same choices."""
    asked, tested = read_questions(args.run)
    tested, order = tested[: args.prompts], np.random.default_rng([args.seed, number]).permutation(asked).tolist()
    card = machine_card()
    with serving(bundle, folder / "home", {}, args.threads) as served, browsing() as browser:
        base = served.answers(served.model, tested)
        facts, texts, rows = live(browser, served, person, order, tested)
        loras = fit_loras(person, rows, folder)
        tries = decide(served, person)
    files = {f"lora{k}": made.pop("file") for k, made in loras.items() if "file" in made}
    with serving(bundle, folder / "again", files, args.threads) as served:
        for k, made in loras.items():
            made["worth"] = _worth(person, served.answers(f"{served.model}@lora{k}", tested))
    worth = {0: _worth(person, base), **{k: _worth(person, answers) for k, answers in texts.items()}}
    gain = np.mean(worth[CHOICES]) - np.mean(worth[0])
    say(f"{person.name} ({facts['likes']}): learned {facts['learned']}, gain {gain:+.2f} sd")
    empty = sum(not text.strip() for text in texts[CHOICES])
    return {
        **facts, "worth": worth, "loras": loras, "tries": tries, "empty": empty, "base": base,
        "answers": texts[CHOICES], "prompts": tested, "machine": card, "quiet": not busy(card), "threads": args.threads,
    }  # fmt: skip


def measure_choices(args: argparse.Namespace) -> None:
    """Everybody who is named, each with a server of their own; and the control, over all who are known by then."""
    people = draw_people(args.run, args.people, args.seed)
    for number, person in enumerate(people):
        if args.names and person.name not in args.names:
            continue
        with tempfile.TemporaryDirectory() as home:
            found = measure_person(args, args.run / "gguf", Path(home), person, number)
        with keeping(args.out) as result:
            known = result.setdefault("choices", {})
            known[person.name] = found
            here = [each for each in people if each.name in known]
            result["choices"] = {each.name: known[each.name] for each in here}
            for place, each in enumerate(here):
                others = known[here[(place + 1) % len(here)].name]["answers"]
                known[each.name]["another's"] = _worth(each, others)


@contextmanager
def keeping(out: Path) -> Iterator[dict[str, Any]]:
    """The result so far, to be changed, and written when the block ends: parts may be measured apart."""
    file = out / "result.json"
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    yield result
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(result, indent=1) + "\n")


def measure_latency(args: argparse.Namespace, bundle: Path, home: Path) -> dict[str, Any]:
    """Milliseconds: choices of a further person, first tokens beside a bare session's, users that alternate."""
    person, (asked, tested) = draw_people(args.run, 1, args.seed + 1)[0], read_questions(args.run)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        adapters = {f"user{seed}": make_lora(Path(folder), seed) for seed in (1, 2)}
        served = stack.enter_context(serving(bundle, home, adapters, args.threads))
        with browsing() as browser:
            made, *_ = live(browser, served, person, asked, [])
        session = stack.enter_context(closing(open_session(bundle, threads=args.threads or None)))
        tokenizer, pairs, swaps = load_tokenizer(bundle), [], []
        sampling = Sampling(temperature=0, repetition_penalty=1.15, max_tokens=1)
        for place, prompt in enumerate([*tested[:WARM_UP], *tested * args.rounds]):
            tokens = encode_prompt(tokenizer, [Message("user", prompt)], typed=True)

            def bare(tokens: Sequence[int] = tokens) -> None:
                session.reset()
                generate(session, tokens, sampling=sampling)

            own = timed(bare)[1] if place % 2 else 0
            through = served.first_event_ns(served.model, prompt, 8)
            pairs.append((through, own or timed(bare)[1]))
        for number in range(SWAPS + 4):  # 1 1 2 2: every other request changes the user
            swaps.append(served.first_event_ns(f"{served.model}@user{1 + number // 2 % 2}", tested[0], 1))
    through, own = (np.array(pairs[WARM_UP:]) / 1e6).T
    return {
        "choice_ms": [1000 * each["seconds"] for each in made["choices"]],
        "through_ms": through.round(3).tolist(), "bare_ms": own.round(3).tolist(),
        "changing_ms": (np.array(swaps[4::2]) / 1e6).round(3).tolist(),
        "staying_ms": (np.array(swaps[5::2]) / 1e6).round(3).tolist(),
    }  # fmt: skip


def make_lora(folder: Path, seed: int) -> Path:
    """A LoRA of random weights for the starter, as GGUF."""
    import torch
    from peft import LoraConfig, get_peft_model

    from edgealign.models.lint import default_targets

    source = built_in("starter")
    assert source is not None
    base, model = open_artifact(source), load_model(source)
    torch.manual_seed(seed)
    targets = list(default_targets(model.config.model_type))
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules=targets, init_lora_weights=False))
    with publish(
        folder / str(seed), kind="adapter", format="peft", stage="random", recipe={"seed": seed},
        inputs=[base.as_input("base")],
    ) as draft:  # fmt: skip
        adapted.save_pretrained(draft.dir)
        draft.meta["base_digest"] = base.digest
    write_lora_gguf(folder / str(seed), folder / f"{seed}.gguf", base_config=read_config(source))
    return folder / f"{seed}.gguf"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="what `edgealign run starter-basis` made")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--people", type=int, default=6, choices=range(1, len(NAMES) + 1))
    parser.add_argument("--names", nargs="+", choices=NAMES, help="measure only these of them; the others are kept")
    parser.add_argument("--prompts", type=int, default=24, help="questions of the test, 48 at most")
    parser.add_argument("--rounds", type=int, default=5, help="over the test's questions, for the first token")
    parser.add_argument("--threads", type=int, default=0, help="of the server; 0: the app's own default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    try:
        result = measure(args)
    except EdgealignError as error:
        print(error.line(), file=sys.stderr)
        return error.exit_code
    print(render(result))
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The parts that were asked for, beside those that lie in `--out` already; all of it, as it is kept."""
    open_artifact(args.run / "candidates")
    file = args.out / "result.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if any("loras" not in each for each in known.get("choices", {}).values()):
        raise InputError(args.out, "was recorded by an earlier program", "give another --out")
    if "choices" in args.parts:
        measure_choices(args)
    if "latency" in args.parts:
        card = machine_card()
        with tempfile.TemporaryDirectory() as home:
            found = measure_latency(args, args.run / "gguf", Path(home))
        with keeping(args.out) as result:
            result["latency"] = {**found, "machine": card, "quiet": not busy(card), "threads": args.threads}
    result = json.loads((args.out / "result.json").read_text(encoding="utf-8"))  # JSON's keys are text
    pictures = {"assistant.png": lambda file: draw(result, file)} if "choices" in result else {}
    write_results(args.out, result, render(result), pictures=pictures)
    return dict(result)


def _worth(person: Person, texts: Sequence[str]) -> list[float]:
    return [round(float(value), 4) for value in person.worth(texts)]


if __name__ == "__main__":
    raise SystemExit(main())
