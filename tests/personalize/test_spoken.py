"""What `edgealign personalize` publishes is added to the registry, spoken with in every runtime, and forgotten."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgealign.artifact import open_artifact
from edgealign.chat.conversation import Conversation, open_conversation
from edgealign.chat.recipes import ChatRecipe
from edgealign.chat.speakers import PERSONAL, Speakers
from edgealign.chat.stream import TextStream
from edgealign.data.encode import encode_prompt, end_of_turn_id
from edgealign.data.forms import Message
from edgealign.errors import ArtifactError, InputError, UsageError
from edgealign.models.load import load_tokenizer
from edgealign.personalize import basis as bases
from edgealign.personalize import direction, embedding, fspo, lora, stated
from edgealign.personalize.basis import open_basis
from edgealign.personalize.embedding import read_preference
from edgealign.personalize.fspo import open_shots
from edgealign.personalize.fspo_recipes import FspoRecipe
from edgealign.personalize.linear import MixedSession, Mixing, find_lead
from edgealign.personalize.recipes import MAX_TASTE, BasisRecipe, DirectionRecipe, EmbeddingRecipe
from edgealign.personalize.shots import with_shots
from edgealign.personalize.steering_recipe import LinearRecipe
from edgealign.personalize.tilt import Tilt, sentence_ends, whole
from edgealign.personalize.users import PLACE, Users
from edgealign.runtimes.convert import as_runtime_reads
from edgealign.runtimes.generate import generate
from edgealign.runtimes.session import open_session
from edgealign.runtimes.streams import open_streams

ASKED = ("what is number 7?", "red and blue", "the sun")
WISH = "Answer with bullet points."
# A random model's likeliest token is often the end. What is drawn tells more, and rounding decides no draw.
DRAW: dict[str, Any] = {"temperature": 0.4, "min_p": 0.0, "repetition_penalty": 1.0, "max_tokens": 8, "seed": 3}
TALK = ChatRecipe(threads=1, taste=MAX_TASTE, **DRAW)
METHODS = ("lora", "direction", "lore", "fspo", "linear")


@pytest.fixture
def publish(
    planted: Any, quick: Any, people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, Path], Path]:
    """`publish(method, model)`: a user who takes the long answer. Held-out choices of a random model decide nothing
    here, so a check that fails does not stop it."""
    monkeypatch.setattr(lora, "gate", lambda *_: [])
    monkeypatch.setenv(PLACE, str(tmp_path / "registry"))

    def run(method: str, model: Path) -> Path:
        choices = planted.write(planted.flipped(planted.likes_short(12)), tmp_path / "choices.jsonl")
        out = tmp_path / method
        given: dict[str, Any] = {"model": model, "choices": choices, "user": "ana", "out": out}
        if method == "lora":
            lora.run(quick(), **given)
        elif method == "direction":
            direction.run(DirectionRecipe(threads=1, strength=8.0), **given)
        elif method == "fspo":
            fspo.run(FspoRecipe(threads=1, shots=1), **given)
        elif method == "lore":
            shared = tmp_path / "basis"
            bases.run(BasisRecipe(rank=2, components=12, threads=1), model=model, choices=[str(people)], out=shared)
            embedding.run(EmbeddingRecipe(threads=1), basis=shared, **given)
        else:
            stated.run(LinearRecipe(strength=3.0), model=model, preference=WISH, user="ana", out=out)
        return out

    return run


def said(conversation: Conversation) -> list[str]:
    """An answer to each question, in a conversation of its own."""
    found = []
    for asked in ASKED:
        conversation.reset()
        found.append(conversation.ask(asked, lambda _: None).text)
    return found


def wanted(method: str, model: Path, place: Path, made: Path) -> list[str]:
    """The answers that the method's own parts give in this place, without a registry and a conversation."""
    tok: Any = load_tokenizer(model)
    end = end_of_turn_id(tok)
    lead: tuple[Message, ...] = ()
    hooks: list[Any] = []
    session: Any = None
    if method == "linear":
        lead = (Message("system", WISH),)
        session = MixedSession(open_streams(place, threads=1), find_lead(tok, WISH), Mixing(3.0))
    else:
        session = open_session(place, threads=1)
    found = []
    with closing(session):
        if method in ("lora", "direction"):
            session.set_user(as_runtime_reads(made, place, kept=made.parent / "converted"))
        if method == "lore":
            shared = open_basis(made.parent / "basis")
            known = read_preference(made, shared)
            tilt = Tilt.of(shared, known.weights, strength=MAX_TASTE * known.scale)
            hooks = [whole(tilt, [end], sentence_ends(tok))]
        for asked in ASKED:
            messages: tuple[Message, ...] = (*lead, Message("user", asked))
            if method == "fspo":
                messages = with_shots(messages, open_shots(made, model).shots)
            if hooks:
                hooks = [whole(tilt, [end], sentence_ends(tok))]  # it counts from the prompt's end
            session.reset()
            drawn = generate(session, encode_prompt(tok, messages), sampling=TALK, stop={end}, hooks=hooks)
            text = TextStream(tok)  # half a character at the end is not said
            for token in drawn.tokens:
                text.push(token)
            found.append(text.text.rstrip())
    return found


@pytest.mark.parametrize("method", METHODS)
def test_a_published_user_is_added_spoken_with_rolled_back_and_forgotten(
    method: str, publish: Callable[..., Path], tiny_model: Path, tmp_path: Path, command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = publish(method, tiny_model)
    talk = ["chat", "--model", tiny_model, "--threads=1", "--json", f"--taste={MAX_TASTE}"]
    talk += [f"--{name.replace('_', '-')}={value}" for name, value in DRAW.items()]
    basis = ["--basis", tmp_path / "basis"] if method == "lore" else []

    def said(*options: object) -> list[str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(ASKED).encode())))
        assert command(*talk, *options) == 0
        return [json.loads(line)["answer"] for line in capsys.readouterr().out.splitlines()]

    plain = said()
    assert command("users", "add", "ana", made, "--model", tiny_model) == 0
    shown = capsys.readouterr().out
    assert f"* 1  {shown.split('* 1  ')[1][:16]}, {method}" in shown
    assert open_artifact(tiny_model).digest[:12] in shown
    for check in open_artifact(made).manifest.checks:
        assert check.name in shown
    own = said("--user", "ana", *basis)
    assert own == wanted(method, tiny_model, tiny_model, made) != plain
    assert said("--user", "ana", *basis) == own  # from a kept state, where there is one
    assert said("--adapter", made, *basis) == own
    assert command("users", "rollback", "ana", 0) == 0
    assert said("--user", "ana", *basis) == plain
    assert command("users", "rollback", "ana", 1) == 0
    assert said("--user", "ana", *basis) == own
    with Users() as users:
        files = [file for file in made.rglob("*") if file.is_file()]
        secrets = [file.read_bytes() for file in files if file.name != "manifest.json"]
        parts = {text[at : at + 48] for text in secrets for at in range(0, len(text) - 48, 48)}
        parts = {part for part in parts if len(set(part)) > 12} or {text for text in secrets}
        places = [file for file in users.folder.rglob("*") if file.is_file()]
        assert any(part in file.read_bytes() for part in parts for file in places)
        if method == "fspo":
            (state,) = users.private("ana").rglob("*.state")
            parts |= {state.read_bytes()[1000:1064]}
    shutil.rmtree(made)
    assert command("users", "forget", "ana", "--yes") == 0
    with Users() as users:
        left = b"".join(file.read_bytes() for file in users.folder.rglob("*") if file.is_file())
        assert not [part for part in parts if part in left]
        assert not [file for file in users.folder.rglob("*") if file.is_file() and "sqlite" not in file.name]


@pytest.mark.runtime
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target", ["gguf", "onnx", "executorch"])
def test_a_bundle_that_was_there_before_its_user_speaks_as_they_do_or_says_why_not(
    target: str, method: str, publish: Callable[..., Path], request: pytest.FixtureRequest, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Path = request.getfixturevalue("short_model" if target == "executorch" else "tiny_model")
    bundle: Path = request.getfixturevalue("tiny_bundle" if target == "gguf" else f"{target}_bundle")(
        "f32" if target == "gguf" else "fp32"
    )
    made = publish(method, model)
    basis = str(tmp_path / "basis") if method == "lore" else None
    with Users() as users:
        users.add_version("ana", made)
    with (
        closing(open_conversation(replace(TALK, context=256), bundle=bundle)) as conversation,
        Speakers(conversation, basis) as speakers,
    ):
        plain = said(conversation)
        if method == "direction" and target != "gguf":
            with pytest.raises(UsageError, match=r"has no place behind a layer.*--method lora"):
                speakers.switch("ana")
            assert said(conversation) == plain
            return
        own = wanted(method, model, bundle, made)
        assert own != plain
        for _ in range(2):
            speakers.switch("ana")
            assert said(conversation) == own
            speakers.switch("ben") if basis else conversation.plain()
            assert said(conversation) == plain
        with Users() as users:
            converted = [file.suffix for file in users.private("ana").iterdir()]
            assert len(converted) == (method in ("lora", "fspo") and (method, target) != ("fspo", "executorch"))
            users.forget("ana")
            assert not list((users.folder / "private").glob("*/*"))


def test_who_does_not_belong_here_is_one_line(
    publish: Callable[..., Path], tiny_model: Path, short_model: Path, tiny_lora: Any, tmp_path: Path,
    command: Callable[..., int], capsys: pytest.CaptureFixture[str],
) -> None:
    made = publish("linear", tiny_model)

    def refused(words: str, *arguments: object) -> None:
        assert command(*arguments) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("edgealign: ")]
        assert words in line

    refused("was fitted on the model", "users", "add", "ana", made, "--model", short_model)
    refused("is no one user's", "users", "add", "ana", tiny_lora(seed=1))
    refused("no such directory", "users", "add", "ana", tmp_path / "nowhere")
    refused("is a model, a adapter is needed", "users", "add", "ana", tiny_model)
    with Users() as users:
        assert users.names() == []
    assert command("users", "add", "ana", made) == 0
    refused("was fitted on the model", "chat", "Hi", "--model", short_model, "--user", "ana")
    refused("give one of the two", "chat", "Hi", "--model", tiny_model, "--user", "ana", "--adapter", made)
    refused("leave one of the two out", "chat", "Hi", "--model", tiny_model, "--user", "ana", "--preference", "Hm.",
            "--strength", 0)  # fmt: skip
    refused("has no basis for users yet", "chat", "Hi", "--model", tiny_model, "--user", "ben")


def test_a_preference_is_published_in_words_that_are_not_in_the_manifest(
    tiny_model: Path, tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["personalize", "--method", "linear", "--model", tiny_model, "--user", "ana", "--out", tmp_path / "ana"]
    assert command(*given, "--preference", WISH, "--strength", 1.5) == 0
    assert stated.read_stated(tmp_path / "ana") == stated.Stated(WISH, 1.5)
    assert WISH not in (tmp_path / "ana" / "manifest.json").read_text(encoding="utf-8")
    capsys.readouterr()
    for options, words in (
        ([], "--preference: is missing; say what answers should be like"),
        (["--preference", " "], "preference: is empty"),
        (["--preference", "x" * 2001], "has 2,001 characters, more than 2,000"),
        (["--preference", WISH, "--choices", "c"], "--choices: is not for --method linear"),
        (["--preference", WISH, "--strength", "21"], "must be at most 20"),
        (["--preference", WISH, "--rank", "4"], "--rank: is not for --method linear"),
    ):
        assert command(*given[:-1], tmp_path / "other", *options) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "other").exists()
    file = tmp_path / "ana" / stated.FILE
    file.write_text("{}", encoding="utf-8")
    with pytest.raises(ArtifactError, match="SHA-256 differs"):
        stated.read_stated(tmp_path / "ana")
    with pytest.raises(ArtifactError, match="is a peft adapter, no stated preference"):
        stated.read_stated(_peft(tmp_path))
    with pytest.raises(InputError, match="preference: is empty"):
        stated.run(LinearRecipe(), model=tiny_model, preference="", user="ana", out=tmp_path / "none")


def test_a_version_of_another_method_stays_in_use_and_choices_are_kept(
    publish: Callable[..., Path], tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Users() as users:
        users.add_version("ana", publish("fspo", tiny_model))
    with closing(open_conversation(TALK, model=str(tiny_model))) as conversation, Speakers(conversation, None) as known:
        known.switch("ana")
        taste = known.current()
        assert taste.why() == ["ana: by the fspo of version 1; 0 choices so far"]
        assert len(taste.compare(ASKED[0])) == 2
        learned = taste.choose(ASKED[0], "red.", "well, I would say red.")
        assert (learned.choices, learned.version) == (1, None)
        assert "version 1, a fspo, stays in use" in learned.reason
        assert "Preferred" not in taste.users.choices("ana")[0].prompt[0].content
        PERSONAL["/undo"](known, "")
        assert "as for everybody" in capsys.readouterr().err
        with pytest.raises(InputError, match="no basis for users yet"):
            taste.compare(ASKED[0])


def _peft(folder: Path) -> Path:
    from edgealign.artifact import publish as publishing

    with publishing(folder / "peft", kind="adapter", format="peft", stage="test", recipe={}) as draft:
        (draft.dir / "x").write_text("x", encoding="utf-8")
    return folder / "peft"
