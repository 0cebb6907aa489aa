"""The starter as the app runs it when no bundle is named: in llama.cpp, exported once into the home folder.

    home/bundles/<digest of model and recipe>/starter       whole, or not there
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

from edgealign.artifact import hash_json, read_manifest
from edgealign.models.builtin import NAMES, built_in
from edgealign.progress import say

QUANT = "q8_0"


def starter_in(home: Path) -> str | Path:
    """The bundle, or the model itself where llama.cpp is not installed or the export fails, which is said."""
    name = NAMES[0]
    model = built_in(name)
    if model is None:
        return name  # opening it says what to install
    if not all(importlib.util.find_spec(module) for module in ("llama_cpp", "gguf")):
        say(f"the {name} runs in torch: llama.cpp is not installed (pip install 'edgealign[gguf]')")
        return name
    bundle = home / "bundles" / hash_json([read_manifest(model).digest, QUANT])[:16] / name
    if bundle.is_dir():
        return bundle
    bundle.parent.parent.mkdir(mode=0o700, exist_ok=True)
    bundle.parent.mkdir(exist_ok=True)
    say(f"exporting the {name} to GGUF ({QUANT}), once; it takes some 20 s")
    command = [sys.executable, "-m", "edgealign", "export", "--model", name, "--target", "gguf", "--quant", QUANT]
    done = subprocess.run(
        [*command, "--out", str(bundle)], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
        check=False,
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        say(f"the {name} runs in torch: its export to GGUF failed ({last})")
        return name
    return bundle
