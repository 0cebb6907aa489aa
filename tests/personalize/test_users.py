"""The registry of people: what was acknowledged stays, what is forgotten is gone to the last byte."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from edgealign.artifact import Check, publish
from edgealign.data.forms import Message, Pair
from edgealign.errors import ArtifactError, InputError, OutputError, UsageError
from edgealign.personalize.users import Users, users_folder

SECRET = "a7c-marzipan-submarine"
ADDER = """
import sys
from edgealign.data.forms import Message, Pair
from edgealign.personalize.users import Users
from pathlib import Path
with Users(Path(sys.argv[1])) as users:
    number = int(sys.argv[3]) if len(sys.argv) > 3 else 10**9
    for i in range(number):
        users.add_choice(sys.argv[2], Pair((Message("user", f"q{i}"),), f"a{i}", f"b{i}"))
        print(i, flush=True)
"""


def choice(text: str) -> Pair:
    return Pair((Message("user", f"what of {text}?"),), f"yes {text}", f"no {text}")


def adapter(folder: Path, number: int = 1, words: str = "shorter") -> Path:
    """A published adapter, whatever is in it."""
    out = folder / f"adapter-{number}"
    with publish(out, kind="adapter", format="preference", stage="personalize_embedding", recipe={}) as draft:
        (draft.dir / "preference.safetensors").write_bytes(f"{SECRET} {number} weights".encode() * 20)
        draft.meta.update(method="lore", words=words, fitted=number, user="ana")
        draft.add_check(Check("choices predicted", 0.5, 0.6, True))
    return out


@pytest.fixture
def users(tmp_path: Path):
    with Users(tmp_path / "registry") as opened:
        yield opened


def test_choices_come_back_in_order_with_their_users_name(users: Users) -> None:
    for text in ("tea", "rain", "tea"):
        users.add_choice("ana", choice(text))
    users.add_choice("ben", choice("snow"))
    assert [pair.chosen for pair in users.choices("ana")] == ["yes tea", "yes rain", "yes tea"]
    assert {pair.user_id for pair in users.choices("ana")} == {"ana"}
    assert users.names() == ["ana", "ben"]


def test_versions_follow_each_other_and_a_rollback_changes_which_one_is_used(users: Users, tmp_path: Path) -> None:
    for number in (1, 2):
        users.add_version("ana", adapter(tmp_path, number))
    found = users.user("ana")
    assert [version.number for version in found.versions] == [1, 2]
    assert found.active == 2
    assert (found.versions[0].score, found.versions[0].population, found.versions[0].words) == (0.5, 0.6, "shorter")
    assert found.adapter == found.versions[1].folder
    users.rollback("ana", 1)
    assert users.user("ana").adapter == found.versions[0].folder
    users.rollback("ana", 0)
    assert users.user("ana").adapter is None
    with pytest.raises(UsageError, match=r"version 3.*none of ana's"):
        users.rollback("ana", 3)


def test_what_is_no_adapter_is_not_taken_in(users: Users, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        users.add_version("ana", tmp_path)
    assert users.names() == []
    assert not list((users.folder / "adapters").glob("*")) if (users.folder / "adapters").is_dir() else True


def test_nothing_of_a_forgotten_user_is_left_in_any_file(users: Users, tmp_path: Path) -> None:
    users.add_choice("ben", choice("snow"))
    for _ in range(50):
        users.add_choice("ana-" + SECRET, choice(SECRET))
    users.add_version("ana-" + SECRET, adapter(tmp_path, 1, words=SECRET))
    (users.private("ana-" + SECRET) / "prefix.state").write_text(SECRET * 20)
    held = [os.open(next(users.folder.rglob(name)), os.O_RDONLY) for name in ("preference.safetensors", "*.state")]
    assert any(SECRET.encode() in file.read_bytes() for file in users.folder.rglob("*") if file.is_file())
    users.forget("ana-" + SECRET)
    for file in users.folder.rglob("*"):
        assert SECRET.encode() not in (file.read_bytes() if file.is_file() else b""), file
    for opened in held:
        assert os.read(opened, 10_000).strip(b"\0") == b""  # the removed file's own blocks
        os.close(opened)
    assert users.names() == ["ben"]
    assert len(users.choices("ben")) == 1
    with pytest.raises(UsageError, match="nobody here"):
        users.user("ana-" + SECRET)


def test_scratch_is_private_and_gone_afterwards_whatever_happens(users: Users) -> None:
    users.add_choice("ana", choice("tea"))
    with contextlib.suppress(KeyError), users.scratch("ana") as folder:
        (folder / "choices.jsonl").write_text(SECRET)
        opened = os.open(folder / "choices.jsonl", os.O_RDONLY)
        assert users.private("ana") in folder.parents
        raise KeyError
    assert os.read(opened, 100).strip(b"\0") == b""
    os.close(opened)
    assert not list(users.private("ana").iterdir())
    with pytest.raises(UsageError, match="nobody here"):
        users.private("ben")


def test_a_name_that_is_close_is_suggested(users: Users) -> None:
    users.add_choice("marianne", choice("tea"))
    with pytest.raises(UsageError, match="did you mean marianne"):
        users.choices("mariane")


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "x" * 201])
def test_what_is_no_name_is_refused(users: Users, name: str) -> None:
    with pytest.raises(UsageError, match="is no name"):
        users.add_choice(name, choice("tea"))
    assert users.names() == []


def test_a_file_that_is_no_registry_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "users.sqlite").write_bytes(b"something else, and long enough to be read as a page" * 100)
    with pytest.raises(InputError, match="is no registry"):
        Users(tmp_path)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OutputError, match="cannot hold a registry"):
        Users(blocked)


def test_a_registry_of_a_later_version_is_left_alone(tmp_path: Path) -> None:
    Users(tmp_path).close()
    with sqlite3.connect(tmp_path / "users.sqlite") as opened:
        opened.execute("PRAGMA user_version=99")
    with pytest.raises(InputError, match="later version"):
        Users(tmp_path)


def test_choices_that_another_program_keeps_are_mirrored(users: Users) -> None:
    users.add_choice("ana", choice("tea"))
    users.mirror("ana", "page", [(1.0, choice("rain")), (2.0, choice(SECRET))])
    users.mirror("ana", "page", [(1.0, choice("rain")), (2.0, choice(SECRET))])
    users.mirror("ana", "other", [(3.0, choice("snow"))])
    assert [pair.chosen for pair in users.choices("ana")] == ["yes rain", f"yes {SECRET}", "yes snow", "yes tea"]
    assert [pair.chosen for _, pair in users.dated_choices("ana", but="page")] == ["yes snow", "yes tea"]
    users.mirror("ana", "page", [(1.0, choice("rain"))])
    assert [pair.chosen for pair in users.choices("ana")] == ["yes rain", "yes snow", "yes tea"]
    for file in users.folder.rglob("*"):
        assert SECRET.encode() not in (file.read_bytes() if file.is_file() else b""), file
    users.mirror("nobody", "page", [])
    assert users.names() == ["ana"]


def test_a_registry_of_the_first_version_is_taken_along(tmp_path: Path) -> None:
    with Users(tmp_path) as users:
        users.add_choice("ana", choice("tea"))
    with contextlib.closing(sqlite3.connect(tmp_path / "users.sqlite", isolation_level=None)) as opened:
        opened.execute("ALTER TABLE choices DROP COLUMN source")
        opened.execute("PRAGMA user_version=1")
        opened.execute("PRAGMA journal_mode=WAL")
    with Users(tmp_path) as users:
        assert [pair.chosen for pair in users.choices("ana")] == ["yes tea"]
        users.mirror("ana", "page", [(1.0, choice("rain"))])
        assert len(users.choices("ana")) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["users.sqlite"]


def test_it_has_no_write_ahead_log_which_several_connections_can_corrupt(users: Users) -> None:
    with contextlib.closing(sqlite3.connect(users.folder / "users.sqlite")) as opened:
        assert opened.execute("PRAGMA journal_mode").fetchone()[0] == "delete"


@pytest.mark.parametrize(
    ("given", "environment", "found"),
    [
        (None, {}, "home/.local/share/edgealign/users"),
        (None, {"XDG_DATA_HOME": "data"}, "data/edgealign/users"),
        (None, {"XDG_DATA_HOME": "data", "EDGEALIGN_HOME": "mine"}, "mine/users"),
        (None, {"EDGEALIGN_HOME": "mine", "EDGEALIGN_USERS": "people"}, "people"),
        ("given", {"EDGEALIGN_HOME": "mine", "EDGEALIGN_USERS": "people"}, "given/users"),
    ],
)
def test_the_registry_has_one_place(
    monkeypatch: pytest.MonkeyPatch, given: str | None, environment: dict[str, str], found: str
) -> None:
    for name in ("XDG_DATA_HOME", "EDGEALIGN_HOME", "EDGEALIGN_USERS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "home", **environment}.items():
        monkeypatch.setenv(name, value)
    assert users_folder(Path(given) if given else None) == Path(found)


def test_acknowledged_choices_survive_a_kill(tmp_path: Path) -> None:
    for _ in range(5):
        Users(tmp_path).close()
        before = count(tmp_path)
        command = [sys.executable, "-c", ADDER, str(tmp_path), "ana"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
            assert running.stdout is not None
            said = [running.stdout.readline() for _ in range(7)]
            running.send_signal(signal.SIGKILL)
            said += [line for line in running.stdout if line.endswith("\n")]
        assert len(said) >= 7
        assert count(tmp_path) >= before + len(said)


def test_several_writers_lose_nothing(tmp_path: Path) -> None:
    Users(tmp_path).close()
    running = [
        subprocess.Popen([sys.executable, "-c", ADDER, str(tmp_path), f"user{number}", "50"], stdout=subprocess.DEVNULL)
        for number in range(4)
    ]
    assert [each.wait() for each in running] == [0] * 4
    with Users(tmp_path) as users:
        assert {name: len(users.choices(name)) for name in users.names()} == {f"user{n}": 50 for n in range(4)}


def count(folder: Path) -> int:
    with Users(folder) as users:
        return sum(len(users.choices(name)) for name in users.names())
