"""Artifacts appear whole or not at all, and every changed byte is noticed."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from edgealign.artifact import Check, Input, hash_json, open_artifact, open_model, publish, workdir
from edgealign.errors import ArtifactError, OutputError
from edgealign.lineage import lineage


def make(out: Path, *, text: str = "hello", inputs: tuple[Input, ...] = (), kind: str = "dataset") -> Path:
    with publish(out, kind=kind, format="jsonl", stage="test", recipe={"seed": 1}, inputs=inputs) as draft:
        (draft.dir / "train.jsonl").write_text(text, encoding="utf-8")
        (draft.dir / "more").mkdir()
        (draft.dir / "more" / "valid.jsonl").write_text("x", encoding="utf-8")
        draft.add_check(Check("rows", 1.0, None, True))
        draft.meta["rows"] = 1
    return out


def test_a_published_directory_opens_with_what_was_written(tmp_path: Path) -> None:
    artifact = open_artifact(make(tmp_path / "data"), kind="dataset")
    assert [entry.path for entry in artifact.manifest.files] == ["more/valid.jsonl", "train.jsonl"]
    assert artifact.manifest.checks[0].name == "rows"
    assert artifact.manifest.recipe == {"seed": 1}
    assert artifact.manifest.versions["edgealign"]


def test_the_digest_depends_on_the_files_alone(tmp_path: Path) -> None:
    first, second = open_artifact(make(tmp_path / "a")), open_artifact(make(tmp_path / "b"))
    assert first.digest == second.digest
    assert open_artifact(make(tmp_path / "c", text="other")).digest != first.digest


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def break_off() -> None:
        with publish(tmp_path / "out", kind="model", format="x", stage="test", recipe={}) as draft:
            (draft.dir / "half").write_text("half", encoding="utf-8")
            raise ValueError("broke")

    with pytest.raises(ValueError, match="broke"):
        break_off()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target_is_refused_before_any_work(tmp_path: Path) -> None:
    make(tmp_path / "data")
    before = open_artifact(tmp_path / "data").digest
    with pytest.raises(OutputError, match="exists already"):
        make(tmp_path / "data", text="new")
    assert open_artifact(tmp_path / "data").digest == before


@pytest.mark.parametrize("damage", ["flip", "truncate", "extra", "missing", "manifest", "schema"])
def test_every_kind_of_damage_is_noticed(tmp_path: Path, damage: str) -> None:
    out = make(tmp_path / "data")
    file = out / "train.jsonl"
    manifest = out / "manifest.json"
    if damage == "flip":
        file.write_bytes(b"hellp")
    elif damage == "truncate":
        file.write_bytes(b"hell")
    elif damage == "extra":
        (out / "intruder").write_text("x", encoding="utf-8")
    elif damage == "missing":
        file.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text(encoding="utf-8")[:100], encoding="utf-8")
    else:
        raw = json.loads(manifest.read_text(encoding="utf-8"))
        manifest.write_text(json.dumps(raw | {"schema": 99}), encoding="utf-8")
    with pytest.raises(ArtifactError) as caught:
        open_artifact(out)
    assert "\n" not in str(caught.value)


def test_a_thousand_flipped_bytes_are_all_noticed(tmp_path: Path) -> None:
    rng = random.Random(0)
    out = make(tmp_path / "data", text="".join(rng.choices("abcdef", k=500)))
    file = out / "train.jsonl"
    whole = file.read_bytes()
    for _ in range(1000):
        place = rng.randrange(len(whole))
        file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << rng.randrange(8))]) + whole[place + 1 :])
        with pytest.raises(ArtifactError):
            open_artifact(out)
    file.write_bytes(whole)
    open_artifact(out)


def test_a_manifest_that_points_outside_is_refused(tmp_path: Path) -> None:
    out = make(tmp_path / "data")
    manifest = out / "manifest.json"
    manifest.write_text(manifest.read_text(encoding="utf-8").replace("train.jsonl", "../train.jsonl"), encoding="utf-8")
    with pytest.raises(ArtifactError, match="outside"):
        open_artifact(out)


def test_lineage_follows_inputs_until_a_digest_changed(tmp_path: Path) -> None:
    grandparent = open_artifact(make(tmp_path / "a"))
    parent = open_artifact(make(tmp_path / "b", text="b", inputs=(grandparent.as_input("data"),)))
    child = make(tmp_path / "c", text="c", inputs=(parent.as_input("model"),))
    tree = lineage(child)
    assert tree.parents[0].entry.digest == parent.digest
    assert tree.parents[0].parents[0].manifest is not None
    assert str(tmp_path) not in (child / "manifest.json").read_text(encoding="utf-8")
    import shutil

    shutil.rmtree(tmp_path / "a")
    make(tmp_path / "a", text="another")
    assert lineage(child).parents[0].parents[0].manifest is None


def test_lineage_finds_what_comes_with_edgealign_from_anywhere(tmp_path: Path) -> None:
    starter = open_model("starter")
    far = tmp_path / "a" / "b" / "c" / "d"
    far.mkdir(parents=True)
    child = make(far / "child", inputs=(starter.as_input("model"),))
    (parent,) = lineage(child).parents
    assert (parent.entry.digest, parent.manifest and parent.manifest.digest) == (starter.digest, starter.digest)
    stranger = replace(starter.as_input("model"), digest="0" * 64, hint="starter")
    assert lineage(make(far / "other", inputs=(stranger,))).parents[0].manifest is None


def test_checkpoints_survive_until_the_key_changes_or_the_artifact_is_published(tmp_path: Path) -> None:
    out = tmp_path / "model"
    work = workdir(out, hash_json({"lr": 1}))
    (work / "step").write_text("3", encoding="utf-8")
    assert (workdir(out, hash_json({"lr": 1})) / "step").read_text(encoding="utf-8") == "3"
    assert not (workdir(out, hash_json({"lr": 2})) / "step").exists()
    make(out)
    assert not work.exists()


def test_a_kill_at_any_moment_leaves_a_whole_artifact_or_none(tmp_path: Path) -> None:
    outcomes = set()
    for trial in range(24):
        out = tmp_path / f"out{trial}"
        child = os.fork()
        if child == 0:
            try:
                make(out, text="x" * 2_000_000)
            finally:
                os._exit(0)
        time.sleep(0.0006 * trial)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if out.exists():
            open_artifact(out)
            outcomes.add("whole")
        else:
            outcomes.add("none")
            make(out)
        assert [path.name for path in tmp_path.glob(f".out{trial}.*")] == []
    assert "none" in outcomes
