"""Shipped equals trained: a bundle in its own runtime against torch in fp32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edgealign.artifact import Artifact, Check
from edgealign.parity_recipes import VerifyRecipe


def verify(bundle: Path, *, model: str | Path, adapters: Mapping[str, Path], recipe: VerifyRecipe) -> list[Check]:
    raise NotImplementedError


def run(
    recipe: VerifyRecipe, *, bundle: Path, model: str | Path, adapters: Mapping[str, Path], out: Path | None
) -> Artifact | None:
    raise NotImplementedError
