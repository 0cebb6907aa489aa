"""How far do answers move at each strength of a taste, and what does it cost? Planted tastes, 8 choices, one basis.

    edgealign run starter-basis --out runs/starter-basis
    python benchmarks/taste_strength.py runs/starter-basis --out docs/results/taste_strength

Ten people, for and against each of the basis's five attributes, choose 8 times without noise between the starter's own
answers; their numbers are fitted as the assistant does (prior and all), and tilt answers to eight questions with two
seeds each, in the GGUF of the preset. Gain: deviations of the person's own whitened attribute, against the same seeds
without a taste. What ships as `edgealign:starter-basis` is measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from edgealign.artifact import write_atomic
from edgealign.bench.machine import machine_card
from edgealign.data.encode import encode_prompt, end_of_turn_id
from edgealign.data.forms import Message, Pair
from edgealign.models.builtin import BASES, PREFIX
from edgealign.models.load import load_tokenizer
from edgealign.personalize.basis import open_basis
from edgealign.personalize.candidates import read_candidates
from edgealign.personalize.embedding import project
from edgealign.personalize.lore import fit_users
from edgealign.personalize.recipes import EmbeddingRecipe
from edgealign.personalize.tilt import Tilt, whole
from edgealign.personalize.traits import Whitening
from edgealign.progress import hush_libraries, track
from edgealign.runtimes.generate import generate
from edgealign.runtimes.recipes import Sampling
from edgealign.runtimes.session import open_session

STRENGTHS, CHOICES, SEEDS = (0.5, 1.0, 1.5, 2.0), 8, 2
QUESTIONS = (
    "Hello! Who are you?", "Give me an idea for the evening.", "How can I make a friend happy?",
    "What do people do at the sea?", "How do I clean a kettle?", "Tell me about the fox.", "What should I cook today?",
    "Can you help me write a letter?",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the finished preset")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    hush_libraries()
    basis, rng = open_basis(PREFIX + BASES[0]), np.random.default_rng(0)
    _, rows = read_candidates(args.run / "candidates")
    whitening = Whitening.of([text for row in rows for text in row.answers], basis.attributes)
    tokenizer, session = load_tokenizer(args.run / "gguf"), open_session(args.run / "gguf", threads=args.threads)
    stop = {end_of_turn_id(tokenizer)}
    prompts = [encode_prompt(tokenizer, (Message("user", text),), typed=True) for text in QUESTIONS]

    def worth(text: str, attribute: int) -> float:
        return float(whitening.read([text])[0, attribute])

    def say(prompt: Sequence[int], seed: int, tilt: Tilt | None = None) -> str:
        session.reset()
        sampling = Sampling(temperature=0.9, min_p=0.05, repetition_penalty=1.15, max_tokens=96, seed=seed)
        hooks = [whole(tilt, sorted(stop))] if tilt else []
        made = generate(session, prompt, sampling=sampling, stop=stop, hooks=hooks)
        return str(tokenizer.decode(made.tokens)).strip()

    people = []
    for attribute in range(len(basis.attributes)):
        for sign in (1, -1):
            gaps = []
            for _ in range(CHOICES):
                row = rows[rng.integers(len(rows))]
                first, second = (row.answers[place] for place in rng.choice(len(row.answers), 2, replace=False))
                if sign * (worth(first, attribute) - worth(second, attribute)) < 0:
                    first, second = second, first
                pair = Pair(row.prompt, first, second)
                gaps.append(project(basis, session, tokenizer, pair, EmbeddingRecipe().max_tokens))
            people.append((attribute, sign, fit_users(torch.from_numpy(np.stack(gaps))[None]).weights[0]))
    plain = [[say(prompt, seed) for seed in range(SEEDS)] for prompt in prompts]
    lines = ["| strength | nearer to the taste, sd | KL, nats a token | empty | one word |", "|---|---|---|---|---|"]
    for strength in track(STRENGTHS, total=len(STRENGTHS), label="strengths"):
        gains, paid, lengths = [], [], []
        for attribute, sign, weights in people:
            for place, prompt in enumerate(prompts):
                for seed in range(SEEDS):
                    tilt = Tilt.of(basis, weights, strength=strength)
                    text = say(prompt, seed, tilt)
                    paid.append(tilt.mean_kl_nats)
                    lengths.append(len(text.split()))
                    gains.append(sign * (worth(text, attribute) - worth(plain[place][seed], attribute)))
        error = np.std(gains) / len(gains) ** 0.5
        lines.append(
            f"| {strength:g} | {np.mean(gains):+.2f} ± {error:.2f} | {np.mean(paid):.2f} | "
            f"{np.mean(np.array(lengths) == 0):.1%} | {np.mean(np.array(lengths) == 1):.1%} |"
        )
    words = ", ".join(basis.words(weights) or "as everybody" for _, _, weights in people)
    session.close()
    card = machine_card()
    text = "\n".join([
        f"{len(people)} planted tastes of {CHOICES} choices, {len(QUESTIONS)} questions, {SEEDS} seeds each; ± is a "
        "standard error.", "",
        *lines, "", f"Learned of them, for and against each of {', '.join(basis.attributes)}: {words}.", "",
        f"`python benchmarks/taste_strength.py runs/starter-basis --out docs/results/taste_strength`; {card['cpu']}, "
        f"{args.threads} threads.", "",
    ])  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out / "table.md", text)
    print(text)


if __name__ == "__main__":
    main()
