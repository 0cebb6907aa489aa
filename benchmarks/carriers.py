"""From 8 choices to words: how far does each carrier move answers, and what does it cost? Planted tastes.

    edgealign run starter-basis --out runs/starter-basis
    edgealign lora-basis --model starter --basis edgealign:starter-basis --candidates runs/starter-basis/candidates \
        --learning-rate 1e-2 --out runs/loras
    python benchmarks/carriers.py runs/starter-basis --loras runs/loras --out docs/results/carriers
    python benchmarks/carriers.py runs/starter-basis --loras runs/loras --people mixed --out docs/results/carriers_mixed

Twenty people choose 8 times without noise between the starter's own answers: two for and two against each of the
basis's five attributes, or (mixed) with a taste of all five, shares by Dirichlet(1), signs by coin. Their numbers are
fitted as the assistant does, prior and all, and every carrier gets the same 8 choices; one that its own check refuses
leaves answers as they are. Eight questions with two seeds each, in the GGUF of the preset, all carriers in turn.
Gain: deviations along the person's own taste in the whitened attributes, against the same seeds without it. KL: nats
a token between what was drawn from and the model's own distribution; for the best of n the bound ln n - (n - 1) / n
on an answer, over its tokens, and what tilt 1 paid where it is tilted. What ships as `edgealign:starter-basis` is
measured.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from carriers_report import draw, render
from result_files import write_results

from edgealign.artifact import open_model
from edgealign.bench.machine import machine_card
from edgealign.data.encode import encode_prompt, end_of_turn_id
from edgealign.data.forms import Message, Pair, to_json
from edgealign.data.synthetic import write_jsonl
from edgealign.errors import CheckFailed
from edgealign.evaluate.loops import is_doom_loop
from edgealign.models.builtin import BASES, PREFIX
from edgealign.models.load import load_tokenizer, read_config
from edgealign.personalize import direction, lora
from edgealign.personalize.basis import OpenBasis, open_basis
from edgealign.personalize.candidates import Candidates, read_candidates
from edgealign.personalize.embedding import project, rank_answers
from edgealign.personalize.lora_basis import open_loras
from edgealign.personalize.lora_mix import mix
from edgealign.personalize.lore import fit_users
from edgealign.personalize.lowrank import write_factors
from edgealign.personalize.neighbours import best_of_neighbours
from edgealign.personalize.recipes import DirectionRecipe, EmbeddingRecipe, LoraRecipe
from edgealign.personalize.rerank import best_of
from edgealign.personalize.tilt import Tilt, kl_nats, sentence_ends, whole
from edgealign.personalize.traits import Whitening
from edgealign.progress import bar, hush_libraries, track
from edgealign.runtimes.generate import generate
from edgealign.runtimes.gguf_adapter import write_lora_gguf
from edgealign.runtimes.recipes import Sampling
from edgealign.runtimes.session import open_session, score

TILTS, MIXES, DRAWN, CHOICES, SEEDS, ALIKE = (0.5, 1.0, 1.5, 2.0), (0.25, 0.5, 1.0, 1.5), 5, 8, 2, 2
KINDS = ("simple", "mixed")
LEARNING_RATE = 1e-2  # as the assistant trains LoRAs of a model of this size
SAMPLING = Sampling(temperature=0.9, min_p=0.05, repetition_penalty=1.15, max_tokens=96)
QUESTIONS = (
    "Hello! Who are you?", "Give me an idea for the evening.", "How can I make a friend happy?",
    "What do people do at the sea?", "How do I clean a kettle?", "Tell me about the fox.", "What should I cook today?",
    "Can you help me write a letter?",
)  # fmt: skip


@dataclass(frozen=True)
class Person:
    """Somebody with a taste, a direction of length 1 in the whitened attributes, and what their choices taught."""

    taste: Any  # (K,)
    pairs: list[Pair]
    weights: Any  # (B,)


@dataclass(frozen=True)
class Said:
    """An answer, the nats a token that it cost, and the seconds."""

    text: str
    kl_nats: float
    seconds: float


class Stage:
    """One session, one basis, and how each carrier answers."""

    def __init__(self, run: Path, threads: int) -> None:
        self.basis: OpenBasis = open_basis(PREFIX + BASES[0])
        _, self.rows = read_candidates(run / "candidates")
        self.whitening = Whitening.of([text for row in self.rows for text in row.answers], self.basis.attributes)
        self.tokenizer, self.session = load_tokenizer(run / "gguf"), open_session(run / "gguf", threads=threads)
        self.stop, self.closing = {end_of_turn_id(self.tokenizer)}, sentence_ends(self.tokenizer)
        self.prompts = [encode_prompt(self.tokenizer, (Message("user", text),), typed=True) for text in QUESTIONS]

    def worth(self, text: str, taste: Any) -> float:
        return float(self.whitening.read([text])[0] @ taste)

    def people(self, kind: str, rng: np.random.Generator) -> list[Person]:
        count = len(self.basis.attributes)
        tastes = [sign * row for row in np.eye(count) for sign in (1, -1) * ALIKE]
        if kind == "mixed":
            drawn = rng.dirichlet(np.ones(count), len(tastes)) * rng.choice((-1.0, 1.0), (len(tastes), count))
            tastes = list(drawn / np.linalg.norm(drawn, axis=1, keepdims=True))
        return [self._person(rng, taste) for taste in track(tastes, total=len(tastes), label="people choose")]

    def _person(self, rng: np.random.Generator, taste: Any) -> Person:
        pairs, gaps = [], []
        for _ in range(CHOICES):
            row: Candidates = self.rows[rng.integers(len(self.rows))]
            first, second = (row.answers[place] for place in rng.choice(len(row.answers), 2, replace=False))
            if self.worth(first, taste) < self.worth(second, taste):
                first, second = second, first
            pairs.append(Pair(row.prompt, first, second, user_id="somebody"))
            gaps.append(project(self.basis, self.session, self.tokenizer, pairs[-1], EmbeddingRecipe().max_tokens))
        return Person(taste, pairs, fit_users(torch.from_numpy(np.stack(gaps))[None]).weights[0])

    def tilted(self, prompt: Sequence[int], seed: int, weights: Any, strength: float) -> Said:
        tilt = Tilt.of(self.basis, weights, strength=strength)
        self.session.reset()
        started_s = time.perf_counter()
        made = generate(self.session, prompt, sampling=replace(SAMPLING, seed=seed), stop=self.stop,
                        hooks=[whole(tilt, sorted(self.stop), self.closing)] if strength else [])  # fmt: skip
        spent_s = time.perf_counter() - started_s
        return Said(self._text(made.tokens), tilt.mean_kl_nats, spent_s)

    def best(self, prompt: Sequence[int], seed: int, weights: Any, strength: float, widest: float) -> Said:
        """Of five by the person's reward: plain, or tilted, for the person or for neighbours."""
        settings = replace(SAMPLING, seed=seed)
        started_s = time.perf_counter()
        if strength:
            found = best_of_neighbours(self.basis, weights, self.session, prompt, DRAWN, strength=strength,
                                       sampling=settings, stop=self.stop, closing=self.closing,
                                       widest=widest)  # fmt: skip
        else:
            def reward(answer: Sequence[int]) -> float:
                return float(rank_answers(self.basis, weights, self.session, prompt, [answer])[0])

            found = best_of(self.session, prompt, DRAWN, reward, sampling=settings, stop=self.stop)
        spent_s = time.perf_counter() - started_s
        bound = (np.log(DRAWN) - (DRAWN - 1) / DRAWN) / max(1, len(found[0].tokens))
        return Said(self._text(found[0].tokens), float(bound), spent_s)

    def adapted(self, prompt: Sequence[int], seed: int, adapter: Path | None) -> Said:
        self.session.set_user(adapter)
        started_s = time.perf_counter()
        made = generate(self.session, prompt, sampling=replace(SAMPLING, seed=seed), stop=self.stop)
        spent_s = time.perf_counter() - started_s
        said, paid = [*prompt, *made.tokens], 0.0
        if adapter is not None and made.tokens:
            own = score(self.session, said)[len(prompt) - 1 : -1]
            self.session.set_user(None)
            base = score(self.session, said)[len(prompt) - 1 : -1]
            paid = float(np.mean([kl_nats(one, other) for one, other in zip(own, base, strict=True)]))
        self.session.set_user(None)
        return Said(self._text(made.tokens), paid, spent_s)

    def loops(self, text: str) -> bool:
        return is_doom_loop(self.tokenizer.encode(text, add_special_tokens=False))

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens)).strip()


def adapters(stage: Stage, person: Person, loras: Path, folder: Path) -> dict[str, tuple[Path | None, int]]:
    """A person's adapters as GGUF and their bytes; None: its own check refused it."""
    base = open_model("starter")
    config = read_config(base.path)
    made: dict[str, tuple[Path | None, int]] = {}
    _, parts = open_loras(loras, stage.basis)
    for strength in MIXES:
        place = folder / f"mix-{strength:g}"
        place.mkdir()
        write_factors(place, mix(parts, strength * person.weights), alpha=None, base_name=base.digest)
        write_lora_gguf(place, place / "mix.gguf", base_config=config)
        made[f"mix of LoRAs {strength:g}"] = place / "mix.gguf", 4 * len(person.weights)
    choices = folder / "choices.jsonl"
    write_jsonl(choices, [to_json(pair) for pair in person.pairs])
    fits: dict[str, Callable[[Path], Any]] = {
        "a LoRA of one's own": lambda out: lora.run(
            LoraRecipe(learning_rate=LEARNING_RATE, threads=1), model="starter", choices=choices, user="somebody",
            out=out,
        ),
        "a direction of one's own": lambda out: direction.run(
            DirectionRecipe(threads=1), model="starter", choices=choices, user="somebody", out=out
        ),
    }  # fmt: skip
    for name, fit in fits.items():
        place = folder / name.replace(" ", "-").replace("'", "")
        try:
            fit(place)
        except CheckFailed:
            made[name] = None, 0
            continue
        if name.startswith("a LoRA"):
            write_lora_gguf(place, folder / "own.gguf", base_config=config)
            made[name] = folder / "own.gguf", (folder / "own.gguf").stat().st_size
        else:
            made[name] = place, sum(file.stat().st_size for file in place.glob("*.gguf"))
    return made


def measure(stage: Stage, people: Sequence[Person], loras: Path) -> list[dict[str, Any]]:
    """Every carrier for every person, question and seed, in turn."""
    rows: list[dict[str, Any]] = []
    plain = [[stage.tilted(prompt, seed, people[0].weights, 0.0) for seed in range(SEEDS)] for prompt in stage.prompts]
    with bar(total=len(people) * len(QUESTIONS) * SEEDS, label="answers") as advance:
        for number, person in enumerate(people):
            with tempfile.TemporaryDirectory() as folder:
                own = adapters(stage, person, loras, Path(folder))
                for place, prompt in enumerate(stage.prompts):
                    for seed in range(SEEDS):
                        said = {"as for everybody": (stage.tilted(prompt, seed, person.weights, 0.0), 0)}
                        few = 4 * len(person.weights)
                        for strength in TILTS:
                            said[f"tilt {strength:g}"] = stage.tilted(prompt, seed, person.weights, strength), few
                        said[f"best of {DRAWN}"] = stage.best(prompt, seed, person.weights, 0.0, 0.0), few
                        said[f"tilt 1, best of {DRAWN}"] = stage.best(prompt, seed, person.weights, 1.0, 0.0), few
                        said[f"tilt 1, {DRAWN} neighbours"] = stage.best(prompt, seed, person.weights, 1.0, 30.0), few
                        for name, (adapter, size) in own.items():
                            said[name] = stage.adapted(prompt, seed, adapter), size
                        for name in said:
                            if name.startswith("tilt 1, "):
                                each, size = said[name]
                                paid = each.kl_nats + said["tilt 1"][0].kl_nats
                                said[name] = replace(each, kl_nats=paid), size
                        before = stage.worth(plain[place][seed].text, person.taste)
                        for name, (each, size) in said.items():
                            rows.append({
                                "carrier": name, "person": number, "question": place, "seed": seed, "bytes": size,
                                "gain": round(stage.worth(each.text, person.taste) - before, 4),
                                "kl_nats": round(each.kl_nats, 4), "seconds": round(each.seconds, 4),
                                "words": len(each.text.split()), "loops": stage.loops(each.text),
                                "used": name not in own or own[name][0] is not None,
                            })  # fmt: skip
                        advance(1, f"person {number + 1}")
                stage.session.set_user(None)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the finished preset")
    parser.add_argument("--loras", type=Path, required=True, help="edgealign lora-basis")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--people", choices=KINDS, default=KINDS[0])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    hush_libraries()
    stage = Stage(args.run, args.threads)
    people = stage.people(args.people, np.random.default_rng(0))
    rows = measure(stage, people, args.loras)
    words = [stage.basis.words(person.weights) or "as everybody" for person in people]
    result = {
        "machine": machine_card(), "threads": args.threads, "people": args.people, "choices": CHOICES,
        "attributes": stage.basis.attributes, "learned": words, "rows": rows,
        "tastes": [np.round(person.taste, 3).tolist() for person in people],
    }  # fmt: skip
    stage.session.close()
    pictures = {"carriers.png": lambda file: draw(result, file)}
    write_results(args.out, result, render(result), pictures=pictures, indent=None)
    print(render(result))


if __name__ == "__main__":
    main()
