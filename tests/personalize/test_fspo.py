"""A user as a prompt: published only where it helps, refused where it does not belong, its state kept and restored."""

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
from edgealign.personalize import fspo, lora
from edgealign.personalize.fspo import enter, open_shots
from edgealign.personalize.fspo_recipes import FspoRecipe
from edgealign.personalize.shots import digest_ids, with_shots
from edgealign.personalize.users import Users
from edgealign.runtimes.generate import generate
from edgealign.runtimes.process import ProcessSession
from edgealign.runtimes.scripted import ScriptedSession
from edgealign.runtimes.session import Session
from edgealign.runtimes.torch_session import TorchSession

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
def follows(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> bool:
    """Whether shots happen to help a taste for short answers in this untrained model, or one for long answers.

    It has learned from nobody, so shots move it one way whatever they say: the gate must let one taste through only.
    """
    folder = tmp_path_factory.mktemp("which")
    passed = []
    for short in (True, False):
        file = write(likes(short, 12, "ana", random.Random(1)), folder / f"{short}.jsonl")
        try:
            recipe = FspoRecipe(threads=1, shots=3)
            fspo.run(recipe, model=tiny_model, choices=file, user="ana", out=folder / f"{short}")
            passed.append(short)
        except CheckFailed:
            assert not (folder / f"{short}").exists()
    assert len(passed) == 1
    return passed[0]


@pytest.fixture
def publish(tiny_model: Path, tmp_path: Path) -> Callable[..., Any]:
    def run(rows: Sequence[Pair], name: str = "ana", **values: Any) -> Any:
        file = write(rows, tmp_path / f"{name}.jsonl")
        recipe = FspoRecipe(**{"threads": 1, "shots": 3, **values})
        return fspo.run(recipe, model=tiny_model, choices=file, user="ana", out=tmp_path / name)

    return run


@pytest.fixture
def ungated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the shots do is published: for what does not depend on it."""
    monkeypatch.setattr(lora, "gate", lambda *_: [])


def test_a_user_is_published_as_their_choices_and_no_weights(
    publish: Callable[..., Any], tiny_model: Path, follows: bool
) -> None:
    made = publish(likes(follows, 12, "ana", random.Random(1)))
    meta = made.meta
    assert (made.kind, made.manifest.format) == ("adapter", "shots")
    assert [entry.path for entry in made.manifest.files] == ["shots.jsonl"]
    assert meta["base_digest"] == open_artifact(tiny_model).digest
    assert (meta["method"], meta["user"], meta["shots"]) == ("fspo", "ana", 3)
    before, after = meta["held_out_before"], meta["held_out_after"]
    assert (after["accuracy"], after["margin"]) > (before["accuracy"], before["margin"])
    assert all(check.passed for check in made.manifest.checks)
    text = (made.path / "manifest.json").read_text(encoding="utf-8")
    assert "what is number" not in text
    assert "ana" not in (made.path / "shots.jsonl").read_text(encoding="utf-8")
    shots = open_shots(made.path, tiny_model)
    tok: Any = load_tokenizer(tiny_model)
    assert len(shots.prefix(tok)) == meta["prefix_tokens"]
    assert digest_ids(shots.prefix(tok)) == meta["prefix_digest"]
    assert (*shots.prefix(tok), *shots.rest(tok, ASKED)) == encode_prompt(tok, with_shots(ASKED, shots.shots))


def test_the_newest_fitted_choices_are_published_and_none_held_out(
    publish: Callable[..., Any], tiny_model: Path, follows: bool
) -> None:
    from edgealign.personalize.choices import split

    rows = likes(follows, 12, "ana", random.Random(1))
    fitted, _ = split(rows, share=0.25)
    made = publish(rows)
    assert list(open_shots(made.path, tiny_model).shots) == [replace(row, user_id=None) for row in fitted[-3:]]


def test_shots_that_do_not_help_are_not_published(
    publish: Callable[..., Any], tmp_path: Path, follows: bool
) -> None:
    with pytest.raises(CheckFailed, match="no better than without the shots, not published") as caught:
        publish(likes(not follows, 12, "ana", random.Random(1)))
    assert caught.value.exit_code == 1
    assert "\n" not in caught.value.line()
    assert not (tmp_path / "ana").exists()


def test_a_prefix_that_is_too_long_loses_its_oldest_choices(
    publish: Callable[..., Any], tiny_model: Path, ungated: None
) -> None:
    rows = likes(True, 12, "ana", random.Random(1))
    whole = publish(rows)
    short = publish(rows, "less", prefix_tokens=whole.meta["prefix_tokens"] - 1)
    assert (short.meta["shots"], short.meta["shots_left_out"]) == (2, 1)
    assert open_shots(short.path, tiny_model).shots == open_shots(whole.path, tiny_model).shots[1:]
    with pytest.raises(InputError, match="not one choice fits a prefix of 33 tokens"):
        publish(rows, "none", prefix_tokens=33)


def test_few_choices_and_a_taken_place_are_one_line(publish: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a fit needs at least 4"):
        publish(likes(True, 3, "ana", random.Random(1)))
    (tmp_path / "ana").mkdir()
    with pytest.raises(OutputError):
        publish(likes(True, 12, "ana", random.Random(1)))


def test_shots_belong_to_one_model(
    publish: Callable[..., Any], follows: bool, tiny_model: Path, short_model: Path, tiny_lora: Any
) -> None:
    made = publish(likes(follows, 12, "ana", random.Random(1)))
    with pytest.raises(InputError, match=r"was checked on the model [0-9a-f]{12}, this is [0-9a-f]{12}"):
        open_shots(made.path, short_model)
    with pytest.raises(InputError, match="format peft, not of choices"):
        open_shots(tiny_lora(seed=1), tiny_model)


@pytest.mark.parametrize("change", ["cut", "empty", "foreign", "absent"])
def test_damaged_shots_are_refused_before_they_are_read(
    publish: Callable[..., Any], tiny_model: Path, follows: bool, change: str
) -> None:
    made = publish(likes(follows, 12, "ana", random.Random(1)))
    file = made.path / "shots.jsonl"
    text = file.read_text(encoding="utf-8")
    if change == "absent":
        file.unlink()
    else:
        file.write_text({"cut": text[:-20], "empty": "", "foreign": '{"text": "x"}\n'}[change], encoding="utf-8")
    with pytest.raises(ArtifactError) as caught:
        open_shots(made.path, tiny_model)
    assert "\n" not in caught.value.line()


def test_another_template_is_noticed(publish: Callable[..., Any], tiny_model: Path, follows: bool) -> None:
    made = publish(likes(follows, 12, "ana", random.Random(1)))
    shots = open_shots(made.path, tiny_model)
    tok: Any = load_tokenizer(tiny_model)
    changed = tok.chat_template.replace(r"turn.role ~ '\n'", r"turn.role ~ '\n\n'")
    assert changed != tok.chat_template
    tok.chat_template = changed
    with pytest.raises(InputError, match="become other tokens than when they were published"):
        shots.prefix(tok)


def test_a_system_turn_of_its_own_is_not_lost_but_refused(
    publish: Callable[..., Any], tiny_model: Path, follows: bool
) -> None:
    made = publish(likes(follows, 12, "ana", random.Random(1)))
    shots = open_shots(made.path, tiny_model)
    with pytest.raises(InputError, match="has a system turn of its own"):
        shots.rest(load_tokenizer(tiny_model), (Message("system", "Be kind."), *ASKED))


def test_the_prefix_is_fed_once_and_restored_for_each_user_in_turn(
    publish: Callable[..., Any], tiny_model: Path, ungated: None, tmp_path: Path
) -> None:
    tok: Any = load_tokenizer(tiny_model)
    rng = random.Random(3)
    found = [
        open_shots(publish(likes(short, 12, "ana", rng), name).path, tiny_model)
        for name, short in (("ana", True), ("ben", False))
    ]
    states = tmp_path / "states"
    with closing(TorchSession(tiny_model, threads=1)) as session:
        answers = [ask(session, shots, tok, states) for shots in (found[0], found[1], found[0], found[1])]
        whole = [whole_prompt(session, shots, tok) for shots in found]
    assert [how for how, _ in answers] == ["stored", "stored", "restored", "restored"]
    assert answers[0][1] == answers[2][1] == whole[0]
    assert answers[1][1] == answers[3][1] == whole[1]
    assert len(list(states.iterdir())) == 2


def test_a_damaged_state_is_made_again(
    publish: Callable[..., Any], tiny_model: Path, follows: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tok: Any = load_tokenizer(tiny_model)
    shots = open_shots(publish(likes(follows, 12, "ana", random.Random(1))).path, tiny_model)
    states = tmp_path / "states"
    with closing(TorchSession(tiny_model, threads=1)) as session:
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
    for wanted, opened in (("stored", ProcessSession), ("restored", TorchSession)):
        with closing(opened(tiny_model, threads=1)) as session:
            assert enter(session, tuple(range(5, 40)), states=tmp_path / "states") == wanted
            found.append(session.step(4))
    assert np.array_equal(*found)


def test_a_forgotten_users_shots_and_what_a_model_remembers_of_them_are_gone_from_the_disk(
    publish: Callable[..., Any], tiny_model: Path, follows: bool, tmp_path: Path
) -> None:
    tok: Any = load_tokenizer(tiny_model)
    made = publish(likes(follows, 12, "ana", random.Random(1)))
    with Users(tmp_path / "registry") as users, closing(TorchSession(tiny_model, threads=1)) as session:
        users.add_version("ana", made.path)
        adapter = users.user("ana").adapter
        assert adapter is not None
        shots = open_shots(adapter, tiny_model)
        assert [ask(session, shots, tok, users.private("ana"))[0] for _ in range(2)] == ["stored", "restored"]
        (state,) = (file.read_bytes() for file in users.folder.rglob("*.state"))
        parts = [state[at : at + 64] for at in range(0, len(state), 64)]
        known = {part for part in parts if part.strip(b"\0")} | {shots.shots[0].chosen.encode()}
        assert len(known) > 100
        users.forget("ana")
        left = b"".join(file.read_bytes() for file in users.folder.rglob("*") if file.is_file())
        assert not [part for part in known if part in left]


@pytest.mark.runtime
def test_a_bundle_takes_a_users_shots_and_gives_torchs_answer(
    publish: Callable[..., Any], follows: bool, tiny_model: Path, tiny_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    from edgealign.runtimes.llamacpp import LlamaSession

    made = publish(likes(follows, 12, "ana", random.Random(1)))
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
