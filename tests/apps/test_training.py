"""A LoRA of a user's choices, trained beside the chat: used if it is better, told if not, stopped without a trace."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from assistant.faults import Fault
from assistant.preferences import Chosen
from assistant.store import Store
from assistant.tastes import Tastes, open_tastes
from assistant.training import Trainer, _lines, as_runtime_reads, base_model

from edgealign.artifact import Check, open_artifact, publish
from edgealign.data.forms import Message, Pair
from edgealign.errors import InputError
from edgealign.models.builtin import built_in
from edgealign.runtimes.gguf_adapter import read_lora_gguf

from .conftest import EngineMaker, Served, serving, until
from .test_taste import say, starter_digest, taste, teach


def training(served: Served, user: str) -> dict[str, Any]:
    return dict(taste(served, user)["training"])


def refused(served: Served, user: str) -> str:
    found = served.http.post("/api/taste/training", params={"user": user})
    assert found.status_code == 409, found.text
    return str(found.json()["error"]["message"])


@pytest.mark.slow
def test_a_lora_that_beats_everybodys_model_is_used_and_undone(served: Served) -> None:
    teach(served, "tom")
    taste(served, "tom", "POST", "/active", version=0)  # the version in use is everybody's
    everybody = say(served, "tom")
    begun = taste(served, "tom", "POST", "/training")["training"]
    assert begun["state"] == "running"
    assert "running already" in refused(served, "tom")
    until(lambda: training(served, "tom")["state"] != "running")
    ended = training(served, "tom")
    assert ended["state"] == "finished", ended
    assert "held-out choices" in ended["message"]
    found = taste(served, "tom")
    assert (found["versions"][-1]["method"], found["active"]) == ("lora", 5)
    said = say(served, "tom")
    assert said["facts"]["taste"]["method"] == "lora"
    assert said["content"] != everybody["content"]
    assert teach(served, "tom", 1)[0]["version"] is None  # numbers do not displace what was trained
    taste(served, "tom", "POST", "/active", version=0)
    assert say(served, "tom")["content"] == everybody["content"]
    assert served.http.delete("/api/users/tom").json()["versions"] == 5
    assert training(served, "tom")["state"] == "none"


@pytest.mark.parametrize("score", [0.25, 0.5])
def test_a_tie_with_everybodys_model_is_not_better(scripted: EngineMaker, tmp_path: Path, score: float) -> None:
    with publish(tmp_path / "lora", kind="adapter", format="peft", stage="test", recipe={}, inputs=[]) as draft:
        draft.add_check(Check("held-out ranking accuracy", score, 0.5, True))
        draft.meta["method"] = "lora"
    made = open_artifact(tmp_path / "lora")
    pairs = [Pair((Message("user", f"What is {n}?"),), "A number.", "It follows another number.") for n in range(4)]
    chosen = [Chosen(pair, f"left {n}", f"right {n}") for n, pair in enumerate(pairs)]
    engine = scripted(base_digest=starter_digest(), context=1024)
    with closing(engine), closing(Store(tmp_path / "home")) as store:
        tastes = open_tastes(engine, store, tmp_path / "users")
        said = asyncio.run(Trainer(tastes)._use_if_better("me", chosen, made))
        assert said.startswith(f"Not used: it ranks {score:.0%} ")
        assert tastes.versions.in_use("me") is None


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


@pytest.mark.runtime
def test_a_bundle_gets_it_in_its_own_format(
    scripted: EngineMaker, tiny_bundle: Callable[[str], Path], tiny_lora: Callable[..., Path], tmp_path: Path
) -> None:
    engine, adapter = scripted(base_digest=starter_digest()), tiny_lora(seed=1, base=built_in("starter"))
    engine.facts.update(runtime="llama.cpp", folder=tiny_bundle("f32"))
    made = as_runtime_reads(engine, adapter, tmp_path / "converted")
    assert read_lora_gguf(made).base_digest == starter_digest()
    before = made.stat().st_mtime_ns
    assert as_runtime_reads(engine, adapter, tmp_path / "converted") == made
    assert made.stat().st_mtime_ns == before
    engine.facts["base_digest"] = "0" * 64  # a bundle whose model is gone takes what was converted, and nothing new
    assert as_runtime_reads(engine, adapter, tmp_path / "converted") == made
    with pytest.raises(InputError, match="lacks the model"):
        as_runtime_reads(engine, adapter, tmp_path / "new")
    engine.close()
