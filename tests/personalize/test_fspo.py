"""A user as a prompt: a model that was trained on shots follows them, and what is published is checked and refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgealign.artifact import open_artifact
from edgealign.data.encode import encode_prompt
from edgealign.data.forms import Message, Pair, to_json
from edgealign.errors import ArtifactError, CheckFailed, InputError, OutputError
from edgealign.models.load import load_tokenizer
from edgealign.personalize import fspo, shot_data
from edgealign.personalize.fspo import enter, open_shots
from edgealign.personalize.fspo_recipes import FspoRecipe, ShotsRecipe
from edgealign.personalize.shots import digest_ids, with_shots
from edgealign.runtimes.generate import generate
from edgealign.runtimes.process import ProcessSession
from edgealign.runtimes.scripted import ScriptedSession
from edgealign.runtimes.session import Session
from edgealign.runtimes.torch_session import TorchSession
from edgealign.train import preference
from edgealign.train.recipes import PreferenceRecipe

ASKED = (Message("user", "what is number 99?"),)
WORDS = ("red", "blue", "green", "tea", "milk", "bread", "rain", "snow", "sun", "wind", "moon", "sea")


def likes(short: bool, count: int, user: str, rng: random.Random) -> list[Pair]:
    """Choices of somebody who takes the short answer, or the long one."""
    rows = []
    for _ in range(count):
        number, words = rng.randrange(1000), rng.sample(WORDS, 3)
        sides = (f"{words[0]}.", f"well, I would say {words[0]} and {words[1]}, then {words[2]}.")
        rows.append(Pair((Message("user", f"what is number {number}?"),), *(sides if short else sides[::-1]), user))
    return rows


def write(rows: Sequence[Pair], file: Path) -> str:
    file.write_text("".join(json.dumps(to_json(row)) + "\n" for row in rows), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model after FSPO's training on people who like short answers and people who like long ones."""
    folder = tmp_path_factory.mktemp("fspo")
    rng = random.Random(0)
    rows = [row for i in range(40) for row in likes(i % 2 == 0, 8, f"u{i}", rng)]
    recipe = ShotsRecipe(shots=(1, 2, 3), reshuffles=4, max_tokens=400)
    made = shot_data.run(recipe, model=tiny_model, data=[write(rows, folder / "pairs.jsonl")], out=folder / "shots")
    learn = PreferenceRecipe(
        objective="ln_dpo", beta=2.0, learning_rate=3e-3, epochs=2, batch_size=16, max_tokens=400, threads=1,
    )
    preference.run(
        learn, model=tiny_model, data=[str(made.path / "train.jsonl")], valid=[str(made.path / "valid.jsonl")],
        out=folder / "model",
    )
    return folder / "model"


@pytest.fixture
def publish(trained: Path, tmp_path: Path) -> Callable[..., Any]:
    def run(rows: Sequence[Pair], name: str = "ana", model: Path = trained, **values: Any) -> Any:
        file = write(rows, tmp_path / f"{name}.jsonl")
        recipe = FspoRecipe(**{"threads": 1, "shots": 3, **values})
        return fspo.run(recipe, model=model, choices=file, user="ana", out=tmp_path / name)

    return run


def test_the_trained_model_follows_new_peoples_shots_and_not_anothers(trained: Path) -> None:
    from edgealign.data.encode import encode_pair
    from edgealign.personalize.ranking import rank_choices

    tok: Any = load_tokenizer(trained)
    rng = random.Random(7)
    own, others = [], []
    for short in (True, False):
        shots, asked = likes(short, 3, "new", rng), likes(short, 8, "new", rng)
        strangers = likes(not short, 3, "other", rng)
        for row in asked:
            own.append(encode_pair(tok, replace(row, prompt=with_shots(row.prompt, shots))))
            others.append(encode_pair(tok, replace(row, prompt=with_shots(row.prompt, strangers))))
    with closing(TorchSession(trained, threads=1)) as session:
        mine, theirs = rank_choices(session, own), rank_choices(session, others)
    assert np.mean(mine.margins) > np.mean(theirs.margins) + 0.1
    assert mine.accuracy > 0.8
    assert theirs.accuracy < 0.2


@pytest.mark.parametrize("short", [True, False])
def test_a_user_is_published_as_their_choices_and_no_weights(
    publish: Callable[..., Any], trained: Path, short: bool
) -> None:
    made = publish(likes(short, 12, "ana", random.Random(1)))
    meta = made.meta
    assert (made.kind, made.manifest.format) == ("adapter", "shots")
    assert [entry.path for entry in made.manifest.files] == ["shots.jsonl"]
    assert meta["base_digest"] == open_artifact(trained).digest
    assert (meta["method"], meta["user"], meta["shots"]) == ("fspo", "ana", 3)
    assert meta["held_out_after"]["margin"] >= meta["held_out_before"]["margin"]
    assert all(check.passed for check in made.manifest.checks)
    text = (made.path / "manifest.json").read_text(encoding="utf-8")
    assert "what is number" not in text
    assert "ana" not in (made.path / "shots.jsonl").read_text(encoding="utf-8")
    shots = open_shots(made.path, trained)
    tok: Any = load_tokenizer(trained)
    assert len(shots.prefix(tok)) == meta["prefix_tokens"]
    assert digest_ids(shots.prefix(tok)) == meta["prefix_digest"]
    assert (*shots.prefix(tok), *shots.rest(tok, ASKED)) == encode_prompt(tok, with_shots(ASKED, shots.shots))


def test_the_newest_fitted_choices_are_published_and_none_held_out(publish: Callable[..., Any], trained: Path) -> None:
    from edgealign.personalize.choices import split

    rows = likes(True, 12, "ana", random.Random(1))
    fitted, _ = split(rows, share=0.25)
    made = publish(rows)
    assert list(open_shots(made.path, trained).shots) == [replace(row, user_id=None) for row in fitted[-3:]]


def test_shots_that_do_not_help_are_not_published(publish: Callable[..., Any], tmp_path: Path) -> None:
    rows = likes(True, 12, "ana", random.Random(1))
    from edgealign.personalize.choices import split

    fitted, held_out = split(rows, share=0.25)
    wrong = [Pair(row.prompt, row.rejected, row.chosen, row.user_id) for row in fitted]
    by_question = {row.prompt: row for row in [*wrong, *held_out]}
    with pytest.raises(CheckFailed, match="no better than without the shots, not published") as caught:
        publish([by_question[row.prompt] for row in rows])
    assert caught.value.exit_code == 1
    assert not (tmp_path / "ana").exists()


def test_a_prefix_that_is_too_long_loses_its_oldest_choices(publish: Callable[..., Any], trained: Path) -> None:
    rows = likes(True, 12, "ana", random.Random(1))
    whole = publish(rows)
    short = publish(rows, "less", prefix_tokens=whole.meta["prefix_tokens"] - 1)
    assert (short.meta["shots"], short.meta["shots_left_out"]) == (2, 1)
    assert open_shots(short.path, trained).shots == open_shots(whole.path, trained).shots[1:]
    with pytest.raises(InputError, match="not one choice fits a prefix of 33 tokens"):
        publish(rows, "none", prefix_tokens=33)


def test_few_choices_and_a_taken_place_are_one_line(publish: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a fit needs at least 4"):
        publish(likes(True, 3, "ana", random.Random(1)))
    (tmp_path / "ana").mkdir()
    with pytest.raises(OutputError):
        publish(likes(True, 12, "ana", random.Random(1)))


def test_shots_belong_to_one_model(
    publish: Callable[..., Any], trained: Path, tiny_model: Path, tiny_lora: Any
) -> None:
    made = publish(likes(True, 12, "ana", random.Random(1)))
    with pytest.raises(InputError, match=r"was checked on the model [0-9a-f]{12}, this is [0-9a-f]{12}"):
        open_shots(made.path, tiny_model)
    with pytest.raises(InputError, match="format peft, not of choices"):
        open_shots(tiny_lora(seed=1), tiny_model)


@pytest.mark.parametrize("change", ["cut", "empty", "foreign", "absent"])
def test_damaged_shots_are_refused_before_they_are_read(
    publish: Callable[..., Any], trained: Path, change: str
) -> None:
    made = publish(likes(True, 12, "ana", random.Random(1)))
    file = made.path / "shots.jsonl"
    text = file.read_text(encoding="utf-8")
    if change == "absent":
        file.unlink()
    else:
        file.write_text({"cut": text[:-20], "empty": "", "foreign": '{"text": "x"}\n'}[change], encoding="utf-8")
    with pytest.raises(ArtifactError) as caught:
        open_shots(made.path, trained)
    assert "\n" not in caught.value.line()


def test_another_template_is_noticed(publish: Callable[..., Any], trained: Path) -> None:
    made = publish(likes(True, 12, "ana", random.Random(1)))
    shots = open_shots(made.path, trained)
    tok: Any = load_tokenizer(trained)
    tok.chat_template = tok.chat_template.replace("turn.content", "turn.content | upper")
    with pytest.raises(InputError, match="become other tokens than when they were published"):
        shots.prefix(tok)


def test_a_system_turn_of_its_own_is_not_lost_but_refused(publish: Callable[..., Any], trained: Path) -> None:
    made = publish(likes(True, 12, "ana", random.Random(1)))
    shots = open_shots(made.path, trained)
    with pytest.raises(InputError, match="has a system turn of its own"):
        shots.rest(load_tokenizer(trained), (Message("system", "Be kind."), *ASKED))


def test_the_prefix_is_fed_once_and_restored_for_each_user_in_turn(
    publish: Callable[..., Any], trained: Path, tmp_path: Path
) -> None:
    tok: Any = load_tokenizer(trained)
    rng = random.Random(3)
    found = []
    for name, short in (("ana", True), ("ben", False)):
        found.append(open_shots(publish(likes(short, 12, "ana", rng), name).path, trained))
    states = tmp_path / "states"
    with closing(TorchSession(trained, threads=1)) as session:
        answers = [ask(session, shots, tok, states) for shots in (found[0], found[1], found[0], found[1])]
        whole = [whole_prompt(session, shots, tok) for shots in found]
    assert [how for how, _ in answers] == ["stored", "stored", "restored", "restored"]
    assert answers[0][1] == answers[2][1] == whole[0]
    assert answers[1][1] == answers[3][1] == whole[1]
    assert len(list(states.iterdir())) == 2


def test_a_damaged_state_is_made_again(
    publish: Callable[..., Any], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tok: Any = load_tokenizer(trained)
    shots = open_shots(publish(likes(True, 12, "ana", random.Random(1))).path, trained)
    states = tmp_path / "states"
    with closing(TorchSession(trained, threads=1)) as session:
        first = ask(session, shots, tok, states)
        file = next(states.iterdir())
        file.write_bytes(file.read_bytes()[:-5])
        again = ask(session, shots, tok, states)
        assert (again[0], again[1]) == ("stored", first[1])
        assert "damaged or cut off" in capsys.readouterr().err
        assert ask(session, shots, tok, states)[0] == "restored"


def test_a_runtime_without_states_feeds_the_prefix_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = ScriptedSession()
    for _ in range(2):
        assert enter(session, (1, 2, 3), states=tmp_path / "states") == "fed"
        assert session.tokens == [1, 2, 3]
    assert "ScriptedSession cannot keep a state: 3 tokens are fed again every time" in capsys.readouterr().err
    assert not (tmp_path / "states").exists()


def test_a_child_process_feeds_the_prefix_where_its_runtime_keeps_no_state_and_keeps_it_where_it_does(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ProcessSession(tmp_path, runtime="scripted") as child:
        assert enter(child, (1, 2, 3), states=tmp_path / "none") == "fed"
        assert np.array_equal(child.step(4), ScriptedSession().prefill((1, 2, 3, 4)))
    assert "ScriptedSession cannot keep a state: 3 tokens are fed again every time" in capsys.readouterr().err
    found = []
    for wanted in ("stored", "restored"):
        with ProcessSession(tiny_model, threads=1) as child:
            assert enter(child, tuple(range(5, 40)), states=tmp_path / "states") == wanted
            found.append(child.step(4))
    assert np.array_equal(*found)


@pytest.mark.runtime
def test_a_bundle_takes_a_users_shots_and_gives_torchs_answer(
    publish: Callable[..., Any], tiny_model: Path, tiny_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    from edgealign.runtimes.llamacpp import LlamaSession

    rows = likes(True, 12, "ana", random.Random(1))
    try:
        made = publish(rows, model=tiny_model)
    except CheckFailed:  # an untrained model: one of the two tastes is ranked no worse
        made = publish([Pair(row.prompt, row.rejected, row.chosen, row.user_id) for row in rows], model=tiny_model)
    tok: Any = load_tokenizer(tiny_model)
    bundle = tiny_bundle("f32")
    assert open_shots(made.path, bundle) == open_shots(made.path, tiny_model)
    shots = open_shots(made.path, bundle)
    states = tmp_path / "states"
    with closing(LlamaSession(bundle, threads=1, exact=True, extra_bufts=True)) as session:
        first, second = (ask(session, shots, tok, states) for _ in range(2))
    with closing(TorchSession(tiny_model, threads=1)) as session:
        assert [first[0], second[0]] == ["stored", "restored"]
        assert first[1] == second[1] == whole_prompt(session, shots, tok)
        # a state of another runtime is not taken
        assert ask(session, shots, tok, states)[0] == "stored"


def ask(session: Session, shots: Any, tok: Any, states: Path) -> tuple[str, tuple[int, ...]]:
    prefix = shots.prefix(tok)
    how = enter(session, prefix, states=states)
    return how, generate(session, shots.rest(tok, ASKED), sampling=_short(), before=prefix).tokens


def whole_prompt(session: Session, shots: Any, tok: Any) -> tuple[int, ...]:
    session.reset()
    return generate(session, encode_prompt(tok, with_shots(ASKED, shots.shots)), sampling=_short()).tokens


def _short() -> Any:
    from edgealign.runtimes.recipes import Sampling

    return Sampling(temperature=0.0, min_p=0.0, repetition_penalty=1.0, max_tokens=8)
