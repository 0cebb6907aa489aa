"""`export --kit android`: what it writes into a bundle, and what it refuses."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgealign import targets
from edgealign.artifact import open_artifact
from edgealign.errors import InputError, RecipeError
from edgealign.export_recipes import ExportRecipe

SCRIPTS = Path(__file__).resolve().parents[2] / "export" / "kits" / "android"
TinyLora = Callable[..., Path]


def test_a_kit_for_another_target_or_of_another_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^android: is a kit for the target gguf, not for onnx; export with"):
        targets.run(ExportRecipe(), target="onnx", model="m", out=tmp_path / "out", kit="android")
    with pytest.raises(RecipeError, match=r"^andriod: is no kit \(did you mean android\?\)"):
        targets.run(ExportRecipe(), target="gguf", model="m", out=tmp_path / "out", kit="andriod")
    given = ["--target", "onnx", "--kit", "android", "--model", "starter", "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "edgealign", "export", *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def kit(tiny_model: Path, tiny_lora: TinyLora, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's bundle with a kit, exported by the program itself."""
    out = tmp_path_factory.mktemp("kit") / "bundle"
    export(tiny_model, out, users={"ana": tiny_lora(seed=1, strength=0.3)}, quant="q8_0")
    return out


def export(model: Path, out: Path, *, users: dict[str, Path], quant: str, context: int | None = None) -> None:
    from to_gguf import export as run

    quick = ("prompt_lengths=1,2,9", "steps=2", "windows=1", "window_tokens=16", "threads=1")
    recipe = ExportRecipe(quant=quant, context=context, threads=1, verify=quick)
    run(recipe, model=model, adapters=users, out=out, calibration=None, kit="android")


@pytest.mark.runtime
def test_a_bundle_with_a_kit_is_a_bundle_like_any_other(kit: Path) -> None:
    from edgealign.runtimes.session import read_bundle

    bundle = open_artifact(kit, kind="bundle")
    names = {entry.path for entry in bundle.manifest.files}
    assert {f"kit/{name}" for name in (*os.listdir(SCRIPTS), "expected.tsv", "speed.txt", "prompt-6.txt")} <= names
    assert set(read_bundle(kit).adapters) == {"ana"}
    assert bundle.meta["kit"]["answers_changed"] == {"ana": 6}
    assert all((kit / "kit" / name).stat().st_mode & stat.S_IXUSR for name in ("check.sh", "bench.sh"))


@pytest.mark.runtime
def test_the_expected_tokens_are_what_our_session_draws(kit: Path, tiny_model: Path) -> None:
    import numpy as np

    from edgealign.models.load import load_tokenizer
    from edgealign.runtimes.llamacpp import LlamaSession

    tokenizer = load_tokenizer(tiny_model)
    lines = [line.split("\t") for line in (kit / "kit/expected.tsv").read_text().splitlines() if line[0] != "#"]
    assert [(line[0], line[1]) for line in lines] == [(user, str(n)) for user in ("-", "ana") for n in range(1, 7)]
    session = LlamaSession(kit / "model.gguf", exact=True, threads=1)
    for user, number, limit, ids, new, leads in lines:
        prompt, tokens = ([int(word) for word in words.split()] for words in (ids, new))
        text = (kit / f"kit/prompt-{number}.txt").read_bytes().decode()
        assert list(tokenizer(text).input_ids) == prompt, "as llama.cpp sees it, with its start token"
        session.set_user(None if user == "-" else kit / f"adapters/{user}.gguf")
        logits = session.prefill(prompt)
        for token, lead in zip(tokens, leads.split(), strict=True):
            assert token == int(np.argmax(logits))
            assert float(lead) == pytest.approx(float(np.diff(np.sort(logits)[-2:])[0]), abs=0.05)
            logits = session.step(token)
        assert len(tokens) == int(limit) or tokens[-1] == tokenizer.eos_token_id
    session.close()


@pytest.mark.runtime
def test_a_context_too_short_for_the_kit_publishes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"its context of 32 tokens is too short for the kit's prompts; export with a"):
        export(tiny_model, tmp_path / "bundle", users={}, quant="f32", context=32)
    assert list(tmp_path.iterdir()) == []
