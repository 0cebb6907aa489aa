"""Planted users on the starter's own answers: what the evaluation promises, and that it would catch us cheating.

The tests' numbers (T1 ...) are those of the protocol that the evaluation follows; T8 is in test_lore.py, T11 is a line
of the report, T12 is in test_budget.py, T14 in tests/apps (taste_runtimes), T15 in tests/bench (real people).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgealign import targets
from edgealign.artifact import open_artifact, open_model
from edgealign.data.synthetic import write_jsonl
from edgealign.errors import InputError, RecipeError, UsageError
from edgealign.export_recipes import ExportRecipe
from edgealign.models.load import load_tokenizer
from edgealign.personalize import baselines, best_of, candidates, few_shot
from edgealign.personalize.heads import HEADS
from edgealign.personalize.planted import accuracy, curve
from edgealign.personalize.recipes import CandidatesRecipe, FewShotRecipe
from edgealign.personalize.shots import with_shots
from edgealign.personalize.text_users import Pool, TextUsers, format_facts, format_probe, mean_of_worst, paired_gain
from edgealign.personalize.traits import TRAITS, Whitening, in_words

SMALL = FewShotRecipe(
    populations=("signed-0.1", "positive-10"), heads=("lore",), traits=("length", "exclamations", "questions", "me"),
    users=300, pairs=30, new_users=80, asked=80, components=48, rank=4, prompted=6, seeds=1, threads=1, bootstrap=500,
    drawn=4, drawn_prompts=6, max_new_tokens=48, strengths=(2.0,),
)  # fmt: skip


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The starter's answers to 60 questions."""
    from edgealign.data.grammar import split_questions

    folder = tmp_path_factory.mktemp("candidates")
    import random

    rng = random.Random(0)
    seen, unseen = split_questions(0.2, rng)
    questions = list(dict.fromkeys(question.text(rng) for question in [*seen, *unseen]))[:60]
    said = {"role": "assistant", "content": "Yes."}
    rows = [{"messages": [{"role": "user", "content": text}, said]} for text in questions]
    write_jsonl(folder / "questions.jsonl", rows)
    recipe = CandidatesRecipe(prompts=60, answers=5, max_new_tokens=48, threads=1)
    candidates.run(recipe, model="starter", sources=[folder / "questions.jsonl"], out=folder / "pool")
    return folder / "pool"


@pytest.fixture(scope="module")
def material(drawn: Path):
    source = open_model("starter")
    _, rows = candidates.read_candidates(drawn)
    return few_shot.read_material(SMALL, source, rows, load_tokenizer(source.path), None)


@pytest.fixture(scope="module")
def distinct(material):
    return few_shot.study(SMALL, material, "signed-0.1")


@pytest.fixture(scope="module")
def alike(material):
    return few_shot.study(SMALL, material, "positive-10")


def test_candidates_are_several_answers_that_differ_in_style(drawn: Path) -> None:
    artifact, rows = candidates.read_candidates(drawn)
    assert artifact.meta["rows"]["candidates.jsonl"] == len(rows) >= 50
    assert all(len(set(row.answers)) == len(row.answers) >= 2 for row in rows)
    texts = [text for row in rows for text in row.answers]
    assert sum("\n-" in text for text in texts) > 5
    assert sum(text.count("!") > 0 for text in texts) > 5


@pytest.mark.slow
def test_eight_choices_beat_none_for_distinct_users_and_more_choices_beat_eight(distinct) -> None:
    """T1, T2."""
    row = distinct["heads"]["lore"]
    assert row["gain"][8]["low"] > 0
    right = row["accuracy"]
    assert right[32] > right[8] > right[1]
    assert right[16] > right[4] > right[1]


@pytest.mark.slow
def test_users_who_are_alike_lose_at_most_a_point_at_any_number_of_choices(alike) -> None:
    """T3."""
    assert min(gain["mean"] for gain in alike["heads"]["lore"]["gain"].values()) >= -0.01


@pytest.mark.slow
@pytest.mark.parametrize("control", ["another user's", "shuffled"])
def test_choices_that_are_not_the_users_do_not_help(control: str, distinct, alike) -> None:
    """T4, T5: a gain of more than a point is not shown."""
    for found in (distinct, alike):
        assert max(gain["low"] for gain in found["heads"]["lore"][control].values()) <= 0.01


@pytest.mark.slow
@pytest.mark.parametrize("kind", SMALL.populations)
def test_ours_is_never_worse_than_the_released_few_shot_step(kind: str, material) -> None:
    """Within two standard errors of 24 users. Where users are alike the released step does harm."""
    seen, unseen = material.pool.split(0.6, 0)
    taught, _ = TextUsers.draw(material.pool, kind, 200, seed=0, part=0).choose(seen, 30, seed=0, flips=0.1)
    people = TextUsers.draw(material.pool, kind, 24, seed=0, part=1).people(seen, unseen, asked=60, flips=0.1, seed=0)
    found = {}
    for name in ("lore", "lore-released"):
        found[name] = curve(few_shot.learn(HEADS.load(name), taught, SMALL, 0), people, (0, 1, 4, 16))
    for k in (1, 4, 16):
        gaps = found["lore"][k] - found["lore-released"][k]
        assert gaps.mean() >= -2 * gaps.std() / len(gaps) ** 0.5
    if kind == "positive-10":
        assert (found["lore-released"][1] - found["lore-released"][0]).mean() < -0.01


@pytest.mark.slow
def test_format_tells_nothing_and_unseen_is_not_easier_than_seen(distinct) -> None:
    """T6, T9."""
    assert distinct["probe"] <= few_shot.PROBE_LIMIT
    row = distinct["heads"]["lore"]
    unseen = row["accuracy"][32]
    assert unseen <= row["cells"]["seen users, seen prompts"] + 0.01


@pytest.mark.slow
def test_a_leak_of_format_is_caught(material) -> None:
    """A pool whose chosen answers were serialised otherwise is told from format alone."""
    shown = np.array([[place, place + 1] for place in range(0, 100, 2)])
    texts = [f"[{text}]" if place % 2 == 0 else text for place, text in enumerate(material.texts)]
    assert format_probe(texts, shown) > 0.95
    assert format_facts("[a]").sum() > format_facts("a").sum()


@pytest.mark.slow
def test_what_is_learned_points_to_the_planted_taste_and_further_with_more_choices(material) -> None:
    """T7: correlation of the fitted reward with the true one over unseen answers."""
    seen, unseen = material.pool.split(0.6, 0)
    teachers = TextUsers.draw(material.pool, "signed-0.1", 120, seed=0, part=0)
    users = TextUsers.draw(material.pool, "signed-0.1", 40, seed=0, part=1)
    head = few_shot.learn(HEADS.load("lore"), teachers.choose(seen, 30, seed=0)[0], SMALL, 0)
    people = users.people(seen, unseen, asked=80, flips=0.0, seed=0)
    _, shown = users.choose(unseen, 80, seed=1, noiseless=True)
    found = {}
    for k in (0, 4, 16):
        values = []
        for number, person in enumerate(people):
            mine = shown[number * 80 : (number + 1) * 80]
            truth = users.rewards(material.pool.traits)[number]
            margins = head.margins(head.fit(person.own.take(slice(k))), person.held_out)
            values.append(np.corrcoef(np.r_[margins, -margins], _both(truth[mine[:, 0]] - truth[mine[:, 1]]))[0, 1])
        found[k] = float(np.mean(values))
    assert found[0] < found[4] < found[16]
    right = {k: [accuracy(head, head.fit(p.own.take(slice(k))), p.held_out) for p in people] for k in (0, 16)}
    start, end = np.mean(right[0]), np.mean(right[16])
    assert (end - start) / (1 - start) >= 0.3


@pytest.mark.slow
@pytest.mark.runtime
def test_choices_move_what_is_said_and_a_bundle_ranks_as_torch_does(material, tmp_path: Path) -> None:
    """T10, T13: best of four answers that each runtime draws and reads itself."""
    source = open_model("starter")
    made = {
        target: targets.run(ExportRecipe(quant=quant), target=target, model="starter", out=tmp_path / target).path
        for target, quant in (("gguf", "q8_0"), ("onnx", "int8"))
    }
    recipe = dataclasses.replace(SMALL, users=120, strengths=(), drawn_prompts=12)
    places = {"torch": source.path, **made}
    said = best_of.best_of_report(recipe, material, places, load_tokenizer(source.path))
    for row in said["runtimes"].values():
        assert row["lore"]["gain"][8]["low"] > 0
        assert row["lore"]["gain"][8]["mean"] > row["lore"]["wrong"][8]
    for target in made:
        assert abs(said["runtimes"][target]["accuracy"] - said["runtimes"]["torch"]["accuracy"]) <= few_shot.SAME


def _both(gaps: np.ndarray) -> np.ndarray:
    return np.r_[gaps, -gaps]


@pytest.mark.slow
def test_a_report_has_its_tables_pictures_and_checks(drawn: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    recipe = dataclasses.replace(
        SMALL, populations=("signed-0.1",), users=60, new_users=16, asked=30, bootstrap=100, drawn=3, drawn_prompts=3
    )
    few_shot.run(recipe, model="starter", candidates=drawn, out=out, cache=tmp_path / "cache")
    artifact = open_artifact(out, kind="report")
    files = {entry.path for entry in artifact.manifest.files}
    assert {"report.md", "table.md", "curves.png", "said.png", "kl.png", "result.json"} <= files
    result = json.loads((out / "result.json").read_text())
    names = [check.name for check in artifact.manifest.checks]
    assert "signed-0.1: 8 choices beat 0" in names
    assert "torch: 8 choices move what is said" in names
    assert list((tmp_path / "cache").rglob("*.npy"))
    said = result["said"]["runtimes"]["torch"]["lore"]
    assert said["oracle"] >= max(gain["mean"] for gain in said["gain"].values())


def test_attributes_of_a_pool_are_uncorrelated_after_whitening() -> None:
    rng = np.random.default_rng(0)
    pieces = ("Yes!", "I think so.", "- one\n- two", "You should see it, my friend.", "Certainly. It is 42.", "Fun?")
    texts = [" ".join(rng.choice(pieces, rng.integers(1, 6))) for _ in range(300)]
    whitening = Whitening.of(texts, ("length", "exclamations", "questions", "digits", "formality"))
    found = whitening.read(texts)
    assert set(Whitening.of(texts).names) <= set(TRAITS)
    np.testing.assert_allclose(np.cov(found.T), np.eye(found.shape[1]), atol=0.05)
    length = list(whitening.names).index("length")
    raw = np.array([TRAITS["length"](text) for text in texts])
    assert np.corrcoef(found[:, length], raw)[0, 1] > 0.5  # still what its name says
    with pytest.raises(InputError, match="too much alike"):
        Whitening.of(["the same"] * 20)


def test_words_for_an_attribute() -> None:
    assert in_words("length", False) == "shorter"
    assert in_words("cheer", True) == "more cheer"


def test_choices_follow_the_planted_taste_and_flips_turn_them() -> None:
    rng = np.random.default_rng(0)
    pool = Pool(rng.normal(size=(200, 5)), rng.normal(size=(200, 3)), np.repeat(np.arange(50), 4))
    users = TextUsers.draw(pool, "signed-0.1", 30, seed=0, part=1)
    for flips, wanted in ((0.0, 1.0), (0.25, 0.75)):
        rng_free = dict(noiseless=True, flips=flips)
        _, shown = users.choose(np.arange(50), 100, seed=0, **rng_free)
        worth = users.rewards(pool.traits)
        who = np.repeat(np.arange(30), 100)
        right = worth[who, shown[:, 0]] > worth[who, shown[:, 1]]
        assert right.mean() == pytest.approx(wanted, abs=0.03)
        assert (pool.prompts[shown[:, 0]] == pool.prompts[shown[:, 1]]).all()


def test_the_same_part_is_the_same_people_and_another_part_is_not() -> None:
    pool = Pool(np.zeros((20, 2)), np.random.default_rng(0).normal(size=(20, 4)), np.repeat(np.arange(5), 4))
    first, again, other = (TextUsers.draw(pool, "signed-0.1", 6, seed=3, part=part) for part in (0, 0, 1))
    np.testing.assert_array_equal(first.rewards(pool.traits), again.rewards(pool.traits))
    assert np.abs(first.rewards(pool.traits) - other.rewards(pool.traits)).max() > 0.1


def test_gains_and_worst_deciles_are_what_they_say() -> None:
    values, base = np.linspace(0.5, 1.0, 100), np.full(100, 0.5)
    gain = paired_gain(values, base, resamples=500)
    assert gain["mean"] == pytest.approx(0.25)
    assert gain["low"] < gain["mean"] < gain["high"]
    assert paired_gain(base, base, resamples=100) == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert mean_of_worst(values) == pytest.approx(values[:10].mean())


def test_what_is_no_population_no_head_and_no_candidates_is_one_line(tmp_path: Path, tiny_model: Path) -> None:
    recipe = dataclasses.replace(SMALL, populations=("nobody",))
    with pytest.raises(UsageError, match="nobody: is no population"):
        few_shot.run(recipe, model=tiny_model, candidates=tmp_path, out=tmp_path / "r")
    unknown = dataclasses.replace(SMALL, heads=("magic",))
    with pytest.raises(RecipeError, match="is not a known reward head"):
        few_shot.run(unknown, model=tiny_model, candidates=tmp_path, out=tmp_path / "r")
    pool = Pool(np.zeros((4, 2)), np.zeros((4, 2)), np.zeros(4, dtype=np.int64))
    with pytest.raises(InputError, match="cannot be split"):
        pool.split(0.6, 0)
    file = tmp_path / "none.jsonl"
    file.write_text(json.dumps({"text": "only text"}) + "\n")
    with pytest.raises(InputError):
        candidates.run(CandidatesRecipe(threads=1), model=tiny_model, sources=[file], out=tmp_path / "c")


@pytest.mark.slow
def test_choices_in_the_prompt_are_those_that_heads_are_given_and_rank_as_a_plain_reading_does(
    material, distinct, alike
) -> None:
    """The mean log-probability of each answer behind choices and question, one whole sequence after another."""
    import torch

    from edgealign.data.encode import encode_pair
    from edgealign.models.load import load_model

    assert list(distinct["prompted"]) == list(baselines.PROMPTED)
    new = TextUsers.draw(material.pool, "signed-0.1", SMALL.new_users, seed=0, part=few_shot.NEW)
    seen_prompts, new_prompts = material.pool.split(SMALL.seen_prompts, 0)
    _, asked = new.choose(new_prompts, SMALL.asked, seed=1, noiseless=True)
    tok, network = load_tokenizer(material.model), load_model(material.model)

    def nats(prompt, answer) -> float:
        with torch.inference_mode():
            logits = network(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        return float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).mean())

    own = new.choose(seen_prompts, 32, seed=0, flips=SMALL.flips)[1].reshape(new.count, -1, 2)
    found = baselines.prompted(material, new, seen_prompts, new_prompts, SMALL, 0)
    for k in (0, 2):
        wanted = []
        rows = zip(own, asked.reshape(new.count, -1, 2)[: SMALL.prompted, : baselines.PROMPTED_PAIRS], strict=False)
        for choices, shown in rows:
            shots, right = [material.pair(*places) for places in choices[:k]], []
            for places in shown:
                row = material.pair(*places)
                prompt, chosen, rejected = encode_pair(tok, replace(row, prompt=with_shots(row.prompt, shots)))
                right.append(nats(prompt, chosen) > nats(prompt, rejected))
            wanted.append(sum(right) / len(right))
        assert found[k] == pytest.approx(wanted, abs=1e-6)
        assert distinct["prompted"][k] == pytest.approx(sum(wanted) / len(wanted), abs=1e-6)
    people = new.people(seen_prompts, new_prompts, asked=SMALL.asked, flips=SMALL.flips, seed=0)
    place = material.pool.features
    assert np.allclose(people[3].own.gaps, place[own[3, :, 0]] - place[own[3, :, 1]])
