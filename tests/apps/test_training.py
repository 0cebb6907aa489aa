"""A LoRA of a user's choices, trained beside the chat: used if it is better, told if not, stopped without a trace."""

from __future__ import annotations

import asyncio
import errno
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from assistant import training as trainings
from assistant.engine import Engine, open_engine
from assistant.faults import Fault
from assistant.preferences import Chosen
from assistant.store import Store
from assistant.tastes import Tastes, open_tastes
from assistant.training import Trainer, _lines, base_model

from edgealign.artifact import open_artifact, publish
from edgealign.data.forms import Message, Pair
from edgealign.errors import InputError
from edgealign.models.builtin import built_in
from edgealign.personalize.users import Users
from edgealign.runtimes.gguf_adapter import read_lora_gguf
from edgealign.runtimes.scripted import ScriptedSession

from .conftest import PATIENCE_S, EngineMaker, Served, serving, until
from .test_taste import LONG, QUESTIONS, SHORT, choose, say, starter_digest, taste, teach


def training(served: Served, user: str) -> dict[str, Any]:
    return dict(taste(served, user)["training"])


def refused(served: Served, user: str) -> str:
    found = served.http.post("/api/taste/training", params={"user": user})
    assert found.status_code == 409, found.text
    return str(found.json()["error"]["message"])


@pytest.mark.slow
def test_a_lora_that_beats_everybodys_model_is_used_and_undone(served: Served) -> None:
    teach(served, "tom")
    for row in zip(QUESTIONS, SHORT, LONG, strict=True):
        choose(served, "tom", f"Well then: {row[0]}", *row[1:])
    taste(served, "tom", "POST", "/active", version=0)  # the version in use is everybody's
    everybody, numbers = say(served, "tom"), len(taste(served, "tom")["versions"])
    begun = taste(served, "tom", "POST", "/training")["training"]
    assert begun["state"] == "running"
    assert "running already" in refused(served, "tom")
    until(lambda: training(served, "tom")["state"] != "running")
    ended = training(served, "tom")
    assert ended["state"] == "finished", ended
    assert "of 4 held-out choices" in ended["message"]
    found = taste(served, "tom")
    assert (found["versions"][-1]["method"], found["active"]) == ("lora", numbers + 1), ended
    assert found["decision"] == ended["message"]
    said = say(served, "tom")
    assert said["facts"]["taste"]["method"] == "lora"
    assert said["content"] != everybody["content"]
    again = choose(served, "tom", f"Once more: {QUESTIONS[0]}", SHORT[0], LONG[0])
    assert again["version"] is None  # one choice does not displace what was trained
    assert "stays in use" in again["reason"]
    taste(served, "tom", "POST", "/active", version=0)
    assert say(served, "tom")["content"] == everybody["content"]
    assert served.http.delete("/api/users/tom").json()["versions"] == numbers + 1
    assert training(served, "tom")["state"] == "none"


class Leaning(ScriptedSession):
    """The base takes all tokens as equally likely; an adapter likes those in its file."""

    liked: Sequence[int] = ()

    def set_user(self, adapter: Path | None) -> None:
        super().set_user(adapter)
        self.liked = json.loads((adapter / "liked.json").read_text()) if adapter else ()

    def _logits(self) -> np.ndarray[Any, Any]:
        logits = np.zeros(self.vocab, dtype=np.float32)
        logits[list(self.liked)] = 5.0
        return logits


@pytest.fixture
def leaning(scripted: EngineMaker) -> Engine:
    engine = scripted(Leaning(vocab=4096), base_digest=starter_digest(), context=1024)
    engine.facts.update(runtime="torch", folder=built_in("starter"))
    return engine


def lora_that_likes(texts: Sequence[str], engine: Engine, out: Path) -> Path:
    with publish(out, kind="adapter", format="peft", stage="test", recipe={}, inputs=[]) as draft:
        liked = sorted({token for text in texts for token in engine.encode_answer(text)})
        (draft.dir / "liked.json").write_text(json.dumps(liked))
        draft.meta.update(method="lora", base_digest=starter_digest())
    return out


LIKES = {"short": SHORT, "long": [text.replace(short, "") for text, short in zip(LONG, SHORT, strict=True)], "none": ()}


def some_choices(count: int) -> list[Chosen]:
    """The shorter answer to so many questions."""
    pairs = [
        Pair((Message("user", f"What is {n}?"),), SHORT[n % 4], LONG[n % 4], user_id="me") for n in range(count)
    ]
    return [Chosen(pair, "", "") for pair in pairs]


def outcome(tastes: Tastes, lora: Path, held_out: int) -> str:
    chosen = some_choices(4 + held_out)
    return asyncio.run(Trainer(tastes)._use_if_better("me", open_artifact(lora), chosen[held_out:], chosen[:held_out]))


@pytest.mark.parametrize("likes", ["long", "none"])
def test_what_ranks_no_more_than_everybodys_model_is_not_used(leaning: Engine, tmp_path: Path, likes: str) -> None:
    with closing(leaning), closing(Store(tmp_path / "home")) as store:
        tastes = open_tastes(leaning, store, tmp_path / "users")
        said = outcome(tastes, lora_that_likes(LIKES[likes], leaning, tmp_path / "lora"), held_out=4)
        pattern = r"Not used: it ranks (\d+)% of 4 held-out choices as you did, the version in use (\d+)%\."
        own, everybodys = map(int, re.fullmatch(pattern, said).groups())  # type: ignore[union-attr]
        assert own == 0 < everybodys if likes == "long" else own == everybodys  # a tie is not better
        assert tastes.versions.in_use("me") is None


def test_with_too_few_held_out_choices_it_is_kept_and_not_used(leaning: Engine, tmp_path: Path) -> None:
    with closing(leaning), closing(Store(tmp_path / "home")) as store:
        tastes = open_tastes(leaning, store, tmp_path / "users")
        said = outcome(tastes, lora_that_likes(SHORT, leaning, tmp_path / "lora"), held_out=3)
        assert said.startswith("Version 1 is kept and not in use: 3 of 7 choices were held out")
        known = tastes.versions.user("me")
        assert known is not None
        assert (known.active, [each.number for each in known.versions]) == (0, [1])


def test_a_new_lora_is_compared_with_the_one_in_use_on_the_same_choices(leaning: Engine, tmp_path: Path) -> None:
    with closing(leaning), closing(Store(tmp_path / "home")) as store:
        tastes = open_tastes(leaning, store, tmp_path / "users")
        first, second, third = (
            lora_that_likes(LIKES[likes], leaning, tmp_path / likes) for likes in ("none", "short", "long")
        )
        tastes.add_version("me", first)
        said = outcome(tastes, second, held_out=4)
        assert said.startswith("Version 2 is in use: it ranks 100% of 4 held-out choices as you did, the version in ")
        assert tastes.versions.decision("me") == said
        assert "the version in use 100%" in outcome(tastes, third, held_out=4)
        assert "Not used" in outcome(tastes, second, held_out=4)  # a tie keeps what is in use
        tastes.activate("me", 1)
        assert tastes.versions.decision("me") == ""  # the user's own


@pytest.mark.parametrize(("likes", "displaced"), [("long", True), ("short", False)])
def test_choices_after_a_lora_decide_whether_numbers_take_its_place(
    leaning: Engine, tmp_path: Path, likes: str, displaced: bool
) -> None:
    with serving(leaning, tmp_path / "home") as served:
        teach(served, "me", 4)
        lora = lora_that_likes(LIKES[likes], leaning, tmp_path / "lora")
        with Users(tmp_path / "home" / "users") as users:
            made = users.add_version("me", lora).number
        assert taste(served, "me")["active"] == made
        assert say(served, "me")["facts"]["taste"]["method"] == "lora"
        rows = list(zip((f"And {question}" for question in QUESTIONS), SHORT, LONG, strict=True))
        early = [choose(served, "me", *row) for row in rows[:3]]
        assert [each["version"] for each in early] == [None] * 3
        assert "there are 3" in early[-1]["reason"]
        assert "shorter" in early[-1]["words"]  # the numbers are fitted all the same
        last = choose(served, "me", *rows[3])
        found = taste(served, "me")
        assert found["decision"] == last["reason"]
        if displaced:
            assert "ranks 0% as you did, the numbers 100%" in last["reason"]
            assert found["active"] == last["version"] == made + 1
        else:
            assert "ranks 100% as you did" in last["reason"]
            assert (found["active"], last["version"]) == (made, None)


def test_a_lora_of_another_model_is_said_and_the_user_still_answered(leaning: Engine, tmp_path: Path) -> None:
    with serving(leaning, tmp_path / "home") as served:
        lora = lora_that_likes(SHORT, leaning, tmp_path / "lora")
        with Users(tmp_path / "home" / "users") as users:
            users.add_version("me", lora)
        leaning.facts["base_digest"] = "f" * 64
        assert "was fitted on the model" in taste(served, "me", "PUT", "/strength", strength=1.0)["fault"]
        assert "taste" not in say(served, "me")["facts"]


def test_a_model_without_a_basis_says_what_is_possible(tiny_model: Path, tmp_path: Path) -> None:
    with serving(open_engine(tiny_model), tmp_path / "home") as served:
        found = taste(served, "me")
        assert not found["ready"]
        assert "a LoRA can be trained, from 4 choices on" in found["why_not"]
        assert found["trainable"] == ""
        assert "takes 4 choices, there are 0" in refused(served, "me")


@pytest.mark.slow
def test_a_model_without_a_basis_learns_by_a_lora(tiny_model: Path, tmp_path: Path) -> None:
    with serving(open_engine(tiny_model), tmp_path / "home") as served:
        for number, row in enumerate(zip(QUESTIONS * 2, SHORT * 2, LONG * 2, strict=True)):
            assert choose(served, "me", f"{number}. {row[0]}", *row[1:]) == {}
        taste(served, "me", "POST", "/training")
        until(lambda: training(served, "me")["state"] != "running")
        ended = training(served, "me")
        assert ended["state"] == "finished", ended
        assert ended["message"].startswith("Version 1 is in use: it ranks"), ended
        assert "of 4 held-out choices" in ended["message"]
        assert say(served, "me")["facts"]["taste"]["method"] == "lora"
    with serving(open_engine(tiny_model), tmp_path / "home") as served:
        assert say(served, "me")["facts"]["taste"]["method"] == "lora"


def test_stopped_it_leaves_nothing(scripted: EngineMaker, tmp_path: Path) -> None:
    with serving(scripted(base_digest=starter_digest(), context=1024), tmp_path / "home") as served:
        assert "takes 4 choices" in refused(served, "me")
        teach(served, "me")
        taste(served, "me", "POST", "/training")
        assert taste(served, "me", "DELETE", "/training")["training"]["state"] == "cancelled"
        assert taste(served, "me")["active"] == 4
        assert [each.name for each in (tmp_path / "home" / "users").iterdir() if each.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "OSError: No space left on device"),
        (ValueError("canary-4471"), "The training failed (ValueError); everything is as it was."),
        (Fault(503, "the model cannot answer", code="runtime_failed"), "the model cannot answer"),
    ],
)
def test_whatever_goes_wrong_the_next_training_can_begin(
    scripted: EngineMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    async def breaks(*_: object) -> None:
        raise error

    with serving(scripted(base_digest=starter_digest(), context=1024), tmp_path / "home") as served:
        teach(served, "me")
        with monkeypatch.context() as broken:
            broken.setattr(Trainer, "_train", breaks)
            taste(served, "me", "POST", "/training")
            until(lambda: training(served, "me")["state"] != "running")
        ended = training(served, "me")
        assert ended["state"] == "failed"
        assert said in ended["message"]
        assert "canary" not in ended["message"]
        assert taste(served, "me", "POST", "/training")["training"]["state"] == "running"


def test_what_is_not_published_is_said_in_the_commands_own_words(
    scripted: EngineMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = "import sys; sys.exit('edgealign: user me: no better than the population, not published')"
    monkeypatch.setattr(trainings, "fit_command", lambda *_, **__: [sys.executable, "-c", program])
    with serving(scripted(base_digest=starter_digest(), context=1024), tmp_path / "home") as served:
        teach(served, "me")
        taste(served, "me", "POST", "/training")
        until(lambda: training(served, "me")["state"] != "running")
        ended = training(served, "me")
        said = "User me: no better than the population, not published."
        assert (ended["state"], ended["message"]) == ("failed", said)


def test_a_training_that_cannot_begin_keeps_nobody_from_theirs(
    scripted: EngineMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object) -> list[Chosen]:
        raise OSError

    with serving(scripted(base_digest=starter_digest(), context=1024), tmp_path / "home") as served:
        teach(served, "me")
        with monkeypatch.context() as broken:
            broken.setattr(Tastes, "choices", breaks)
            assert served.http.post("/api/taste/training", params={"user": "me"}).status_code == 500
        assert taste(served, "me", "POST", "/training")["training"]["state"] == "running"


def test_a_line_of_any_length_is_read() -> None:
    async def read() -> list[str]:
        stream = asyncio.StreamReader()
        stream.feed_data(b"first\n" + b"x" * 200_000 + b"\nlast")
        stream.feed_eof()
        return [line async for line in _lines(stream)]

    assert [line[:5] for line in asyncio.run(read())] == ["first", "xxxxx", "last"]


def test_without_the_model_in_torch_it_says_so(scripted: EngineMaker, tmp_path: Path) -> None:
    with serving(scripted(base_digest=starter_digest(), context=1024), tmp_path / "home") as served:
        assert base_model(served.engine) is not None
        served.engine.facts["base_digest"] = "0" * 64  # of a bundle whose model is gone
        assert "needs the model in torch" in refused(served, "me")


def test_forgetting_during_the_last_step_leaves_nothing(
    leaning: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that takes the version in cannot be stopped: it must not end after the user is gone."""
    begun, may_end, add = threading.Event(), threading.Event(), Tastes.add_version

    def slowly(self: Tastes, *arguments: Any) -> Any:
        begun.set()
        assert may_end.wait(PATIENCE_S)
        return add(self, *arguments)

    async def trained(self: Trainer, *_: Any) -> Any:
        return open_artifact(lora_that_likes(SHORT, leaning, tmp_path / "lora"))

    monkeypatch.setattr(Tastes, "add_version", slowly)
    monkeypatch.setattr(Trainer, "_train", trained)
    with serving(leaning, tmp_path / "home") as served:
        teach(served, "me")
        taste(served, "me", "POST", "/training")
        assert begun.wait(PATIENCE_S)
        threading.Timer(0.5, may_end.set).start()
        served.http.delete("/api/users/me").raise_for_status()
        time.sleep(1.0)
        found = taste(served, "me")
        assert (found["active"], found["versions"]) == (0, [])


@pytest.mark.runtime
def test_a_bundle_gets_it_in_its_own_format(
    leaning: Engine, tiny_bundle: Callable[[str], Path], tiny_lora: Callable[..., Path], tmp_path: Path
) -> None:
    adapter, converted = tiny_lora(seed=1, base=built_in("starter")), tmp_path / "converted"
    with closing(leaning), closing(Store(tmp_path / "home")) as store:
        tastes = open_tastes(leaning, store, tmp_path / "users")
        leaning.facts.update(runtime="llama.cpp", folder=tiny_bundle("f32"))
        assert read_lora_gguf(tastes.adapter_of(adapter, converted)).base_digest == starter_digest()
        leaning.facts["base_digest"] = "0" * 64
        with pytest.raises(InputError, match="was fitted on the model"):
            tastes.adapter_of(adapter, converted)
