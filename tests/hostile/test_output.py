"""The place to write to is bad: existing, full, forbidden, a file. One line, exit 2, nothing half-written."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgealign.artifact import open_artifact, publish
from edgealign.data import synthetic
from edgealign.data.recipes import SynthRecipe
from edgealign.errors import OutputError

SMALL = SynthRecipe(conversations=400, pairs=4, choices=4)


def in_child(action: Callable[[], None]) -> str:
    """Run in a fork, so that a changed user or a full disk stays there; returns the error's line, or 'done'."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            action()
            message = "done"
        except OutputError as error:
            message = error.line()
        except BaseException:
            message = "UNEXPECTED " + traceback.format_exc()
        os.write(writer, message.encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as stream:
        return stream.read()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k,mode=777", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        if os.environ.get("CI") == "true":
            pytest.fail("CI must be able to mount a small disk")
        pytest.skip("mounting a small disk needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_one_line_and_leaves_nothing(small_disk: Path) -> None:
    message = in_child(lambda: void(synthetic.run(SMALL, out=small_disk / "data")))
    assert "the disk is full" in message
    assert "UNEXPECTED" not in message
    assert list(small_disk.iterdir()) == []


def test_the_command_line_says_the_same_with_exit_code_2(small_disk: Path) -> None:
    command = [sys.executable, "-m", "edgealign", "data", "synth", "--conversations", "400"]
    done = subprocess.run([*command, "--out", str(small_disk / "x")], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "the disk is full" in done.stderr
    assert list(small_disk.iterdir()) == []


def test_no_write_permission_is_one_line(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    tmp_path.chmod(0o755)

    def as_nobody() -> None:
        if os.geteuid() == 0:
            os.seteuid(65534)
        synthetic.run(SMALL, out=locked / "data")

    for folder in (*tmp_path.parents,):
        if os.geteuid() == 0 and folder != Path("/"):
            os.chmod(folder, os.stat(folder).st_mode | 0o055)
    message = in_child(as_nobody)
    assert "no permission" in message, message
    assert list(locked.iterdir()) == []


def test_a_file_where_a_folder_is_needed_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    message = in_child(lambda: void(synthetic.run(SMALL, out=tmp_path / "file" / "data")))
    assert "is a file, not a folder" in message or "exists already" in message, message


def test_an_output_that_exists_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").write_text("x", encoding="utf-8")
    assert "exists already" in in_child(lambda: void(synthetic.run(SMALL, out=tmp_path / "data")))
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["mine"]


def test_a_dangling_link_at_the_output_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="exists already"):
        synthetic.run(SMALL, out=tmp_path / "data")
    assert not (tmp_path / "elsewhere").exists()


def test_a_link_inside_an_artifact_that_leads_out_is_refused(tmp_path: Path) -> None:
    from edgealign.errors import ArtifactError

    with publish(tmp_path / "a", kind="dataset", format="x", stage="t", recipe={}) as draft:
        (draft.dir / "f").write_text("x", encoding="utf-8")
    (tmp_path / "secret").write_text("x", encoding="utf-8")
    (tmp_path / "a" / "f").unlink()
    (tmp_path / "a" / "f").symlink_to(tmp_path / "secret")
    with pytest.raises(ArtifactError, match="link"):
        open_artifact(tmp_path / "a")


def void(_: object) -> None:
    return None
