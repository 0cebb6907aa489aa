"""What do a few choices tell of people whom nobody made up? Voters on arguments, and opinions on statements.

    python benchmarks/real_people.py --data ../shared/data --out docs/results/real_people

Voters: UKPConvArg1, 147 people with at least 60 votes that are no tie: which of two arguments is more convincing? Seen
people's votes on half of the topics teach; a new person gives 0 to 32 votes on these topics and is asked about the
other half. Ceiling: what the other voters' majority on the same pair says.

Opinions: Anthropic's persona statements. A made-up person agrees or disagrees with 5 of 35 dimensions and has no
opinion on the others; they choose between a statement that agrees with a dimension and one that does not, with noise,
and are asked, without, about other statements of the dimensions on which they have an opinion. Who wants what is drawn,
the texts are real, and content, not style, tells people apart.

Both read the frozen states of the starter. Controls: another person's choices, and labels by coin. The reference's rule
for real voters (T15): the log loss is not worse than without choices, and another's choices tell less than one's own.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from real_people_report import draw, render
from result_files import write_results

from edgealign.artifact import open_model
from edgealign.bench.machine import machine_card
from edgealign.data.encode import encode_prompt
from edgealign.data.forms import Message
from edgealign.errors import EdgealignError, InputError
from edgealign.models.load import load_tokenizer
from edgealign.personalize.candidates import encode_answer
from edgealign.personalize.features import Cache, Features, main_components
from edgealign.personalize.heads import Choices
from edgealign.personalize.lore_head import Lore
from edgealign.personalize.planted import KS, Person, accuracy, exchanged, shuffled
from edgealign.progress import hush_libraries, track
from edgealign.runtimes.session import open_session

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

LEAST_VOTES, LEAST_ASKED, SEEN_SHARE = 60, 20, 0.6
DIMENSIONS_OF_A_PERSON, SHARPNESS, FLIPS = 5, 4.0, 0.1
SEEN_PEOPLE, NEW_PEOPLE, PAIRS, ASKED, STATEMENTS = 400, 100, 45, 60, 60
CONTROLS, MOST_TOKENS = 4, 512


def read_lines(file: Path) -> list[dict[str, Any]]:
    """A gzipped file of JSON lines.

    Raises:
        InputError: it is not there, or is none.
    """
    try:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]
    except (OSError, EOFError, ValueError) as error:
        raise InputError(file, f"cannot be read ({error})", "give --data the directory of the real data") from error


class Reader:
    """Texts as the starter's states, each read once."""

    def __init__(self, model: str, cache: Path | None, threads: int) -> None:
        base = open_model(model)
        self.tokenizer, self.features = load_tokenizer(base.path), Features.of_model(base.path)
        self.session, self.cache = open_session(base.path, threads=threads), Cache(cache, base.digest)

    def read(self, rows: Sequence[tuple[str, str]], label: str) -> Floats:
        """(N, F) of answers to questions."""
        found = []
        for question, answer in track(rows, total=len(rows), label=label):
            prompt = encode_prompt(self.tokenizer, (Message("user", question),), typed=True)[-MOST_TOKENS:]
            ids = encode_answer(self.tokenizer, answer)[:MOST_TOKENS]
            found.append(self.cache.of(self.features, self.session, prompt, ids))
        return np.stack(found)


def voters(reader: Reader, data: Path, components: int) -> dict[str, Any]:
    """Everything that a split needs: features of arguments, and each vote as (pair, chosen, rejected, topic)."""
    pairs = {row["pair_id"]: row for row in read_lines(data / "ukpconvarg1/pairs.jsonl.gz")}
    texts: dict[tuple[str, str], int] = {}
    for row in pairs.values():
        for side in ("a1", "a2"):
            texts.setdefault((f"{row['title']} Argue for this side: {row['stance']}", row[side]), len(texts))
    found = reader.read(list(texts), "reading arguments")
    by_person: dict[str, list[tuple[str, int, int, str]]] = {}
    counts: dict[str, dict[str, int]] = {}
    for vote in read_lines(data / "ukpconvarg1/votes.jsonl.gz"):
        if vote["choice"] not in ("a1", "a2") or vote["pair_id"] not in pairs:
            continue
        row = pairs[vote["pair_id"]]
        question = f"{row['title']} Argue for this side: {row['stance']}"
        chosen, rejected = (texts[question, row[side]] for side in
                            (("a1", "a2") if vote["choice"] == "a1" else ("a2", "a1")))  # fmt: skip
        by_person.setdefault(vote["user_id"], []).append((vote["pair_id"], chosen, rejected, row["topic"]))
        tally = counts.setdefault(vote["pair_id"], {})
        tally[str(chosen)] = tally.get(str(chosen), 0) + 1
    people = {name: votes for name, votes in by_person.items() if len(votes) >= LEAST_VOTES}
    lengths = np.array([len(answer) for _, answer in texts], dtype=np.float64)
    return {
        "features": found @ main_components(found, components), "people": people, "counts": counts,
        "lengths": lengths, "topics": sorted({row["topic"] for row in pairs.values()}), "texts": len(texts),
    }  # fmt: skip


def split_voters(known: Mapping[str, Any], seed: int) -> tuple[Choices, list[Person], dict[str, float]]:
    """Seen people's votes on seen topics, new people, and what predicts these without any choice."""
    rng = np.random.default_rng(seed)
    names = sorted(known["people"])
    order = rng.permutation(len(names))
    topics = set(rng.permutation(known["topics"])[: len(known["topics"]) // 2].tolist())
    seen = [names[number] for number in order[: round(SEEN_SHARE * len(names))]]
    new = [names[number] for number in order[len(seen) :]]
    features = known["features"]

    def choices(rows: Sequence[tuple[str, int, int, str]], who: int) -> Choices:
        sides = [np.array([row[place] for row in rows], dtype=np.int64) for place in (1, 2)]
        return Choices(features[sides[0]], features[sides[1]], np.full(len(rows), who))

    def on(name: str, inside: bool) -> list[tuple[str, int, int, str]]:
        return [row for row in known["people"][name] if (row[3] in topics) == inside]

    taught = join([choices(rows, who) for who, name in enumerate(seen) if (rows := on(name, True))])
    people, ceiling, longer = [], [], []
    for who, name in enumerate(new):
        own, asked = on(name, True), on(name, False)
        if len(own) < max(KS) or len(asked) < LEAST_ASKED:
            continue
        own = [own[number] for number in rng.permutation(len(own))[: max(KS)]]
        people.append(Person(choices(own, who), choices(asked, who)))
        ceiling.append(np.mean([_majority(known["counts"][row[0]], row[1], row[2]) for row in asked]))
        gaps = [known["lengths"][chosen] - known["lengths"][rejected] for _, chosen, rejected, _ in asked]
        longer.append(np.mean([(gap > 0) + 0.5 * (gap == 0) for gap in gaps]))
    return taught, people, {"the others' majority": float(np.mean(ceiling)), "the longer one": float(np.mean(longer))}


def _majority(tally: Mapping[str, int], chosen: int, rejected: int) -> float:
    """Whether the other voters on this pair chose as this one did; a tie counts half."""
    others, against = tally.get(str(chosen), 0) - 1, tally.get(str(rejected), 0)
    return float(others > against) + 0.5 * (others == against)


def join(parts: Sequence[Choices]) -> Choices:
    """Several people's choices as one."""
    names = ("chosen", "rejected", "users")
    return Choices(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def statements(reader: Reader, data: Path, components: int) -> dict[str, Any]:
    """Features of statements, and their numbers by dimension and side."""
    rows = read_lines(data / "anthropic_evals_persona/dev_benign.jsonl.gz")
    kept: dict[tuple[str, int], list[str]] = {}
    for row in rows:
        own = kept.setdefault((row["persona"], int(row["agree"])), [])
        if len(own) < STATEMENTS:
            own.append(row["statement"])
    texts = [text for own in kept.values() for text in own]
    found = reader.read([("Tell me something about yourself.", text) for text in texts], "reading statements")
    places, start = {}, 0
    for key, own in kept.items():
        places[key] = np.arange(start, start + len(own))
        start += len(own)
    return {"features": found @ main_components(found, components), "places": places, "texts": len(texts),
            "dimensions": sorted({dimension for dimension, _ in kept})}  # fmt: skip


def split_opinions(known: Mapping[str, Any], seed: int) -> tuple[Choices, list[Person], dict[str, float]]:
    """As `split_voters`, of people whose opinions are drawn; seen and asked statements are different ones."""
    rng = np.random.default_rng(seed)
    dimensions = known["dimensions"]
    halves = {key: np.array_split(rng.permutation(places), 2) for key, places in known["places"].items()}

    def person(who: int, count: int, asked: int) -> tuple[Choices, Choices]:
        taste = np.zeros(len(dimensions))
        opinions = rng.permutation(len(dimensions))[:DIMENSIONS_OF_A_PERSON]
        taste[opinions] = rng.choice((-1.0, 1.0), len(opinions))
        found = []
        for half, number, noise in ((0, count, True), (1, asked, False)):
            cared = rng.random(number) < 0.5 if noise else np.ones(number, dtype=bool)
            where = np.where(cared, rng.choice(opinions, number), rng.integers(len(dimensions), size=number))
            agrees = taste[where] > 0
            if noise:
                agrees = rng.random(number) < 1 / (1 + np.exp(-SHARPNESS * taste[where]))
                agrees ^= rng.random(number) < FLIPS
            sides = [[rng.choice(halves[dimensions[place], int(agree == first)][half])
                      for place, agree in zip(where, agrees, strict=True)] for first in (True, False)]  # fmt: skip
            found.append(Choices(known["features"][sides[0]], known["features"][sides[1]], np.full(number, who)))
        return found[0], found[1]

    taught = join([person(who, PAIRS, 0)[0] for who in range(SEEN_PEOPLE)])
    people = [Person(*person(who, max(KS), ASKED)) for who in range(NEW_PEOPLE)]
    return taught, people, {}


def study(taught: Choices, people: Sequence[Person], rank: int, seed: int) -> dict[str, Any]:
    """Accuracy and log loss of each new person by number of choices, own and of controls."""
    head = Lore.learn(taught, seed=seed, rank=rank)
    groups = {
        "own": [list(people)], "another's": [exchanged(people, step) for step in range(1, CONTROLS + 1)],
        "by coin": [shuffled(people, seed * CONTROLS + number) for number in range(CONTROLS)],
    }  # fmt: skip
    found: dict[str, Any] = {}
    for name, each in groups.items():
        found[name] = {}
        for k in KS:
            states = [[head.fit(person.own.take(slice(k))) for person in group] for group in each]
            right = [[accuracy(head, state, person.held_out) for state, person in zip(own, group, strict=True)]
                     for own, group in zip(states, each, strict=True)]  # fmt: skip
            loss = [[float(np.logaddexp(0, -head.margins(state, person.held_out)).mean())
                     for state, person in zip(own, group, strict=True)]
                    for own, group in zip(states, each, strict=True)]  # fmt: skip
            measures = {"accuracy": right, "log_loss": loss}
            found[name][k] = {word: np.mean(values, 0).round(5).tolist() for word, values in measures.items()}
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Both kinds of people over all splits; people of all splits one after another."""
    reader = Reader(args.model, args.cache, args.threads)
    with closing(reader.session):
        known = {"voters": voters(reader, args.data, args.components),
                 "opinions": statements(reader, args.data, args.components)}  # fmt: skip
    result: dict[str, Any] = {"machine": machine_card(), "splits": args.splits, "rank": args.rank, "kinds": {}}
    for kind, split in (("voters", split_voters), ("opinions", split_opinions)):
        found: dict[str, Any] = {}
        without: list[dict[str, float]] = []
        for seed in track(range(args.splits), total=args.splits, label=kind):
            taught, people, plain = split(known[kind], seed)
            without.append(plain)
            for group, by_k in study(taught, people, args.rank, seed).items():
                for k, measures in by_k.items():
                    for name, values in measures.items():
                        place = found.setdefault(group, {}).setdefault(str(k), {}).setdefault(name, [])
                        place.extend(values)
        result["kinds"][kind] = {
            "groups": found, "texts": known[kind]["texts"], "people": len(found["own"]["0"]["accuracy"]),
            "without": {name: float(np.mean([each[name] for each in without])) for name in without[0]},
        }  # fmt: skip
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory of the real data")
    parser.add_argument("--model", default="starter")
    parser.add_argument("--out", type=Path, required=True, help="table.md, result.json and real_people.png go here")
    parser.add_argument("--cache", type=Path, default=None, help="keep features here, so that texts are read once")
    parser.add_argument("--splits", type=int, default=6, help="of people and topics, or draws of opinions")
    parser.add_argument("--components", type=int, default=128)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    hush_libraries()
    try:
        result = run(args)
        pictures = {"real_people.png": lambda file: draw(result, file)}
        write_results(args.out, result, render(result), pictures=pictures, indent=None)
    except EdgealignError as error:
        print(error.line(), file=sys.stderr)
        return error.exit_code
    print(render(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
