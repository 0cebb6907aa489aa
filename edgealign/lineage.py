"""An artifact's family tree, from manifests alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from edgealign.artifact import Input, Manifest, open_artifact, read_manifest
from edgealign.errors import ArtifactError
from edgealign.models.builtin import BASES, NAMES, home


@dataclass(frozen=True)
class Ancestor:
    """A node of the family tree: the manifest is None where the input is not at its hint any more."""

    entry: Input
    manifest: Manifest | None
    parents: tuple[Ancestor, ...]


def lineage(path: Path | str) -> Ancestor:
    """Follow the inputs' hints; an ancestor counts only if its digest is still the recorded one."""
    artifact = open_artifact(path, check_digests=False)
    return _ancestor(artifact.as_input("self"), Path(path), seen=frozenset())


def _ancestor(entry: Input, path: Path, *, seen: frozenset[str]) -> Ancestor:
    try:
        manifest = read_manifest(path)
    except ArtifactError:
        return Ancestor(entry, None, ())
    if manifest.digest != entry.digest or entry.digest in seen:
        return Ancestor(entry, None, ())
    seen = seen | {entry.digest}
    parents = tuple(_ancestor(parent, _place(parent, path), seen=seen) for parent in manifest.inputs)
    return Ancestor(entry, manifest, parents)


def _place(parent: Input, child: Path) -> Path:
    """Where an input lies: beside its child, or inside the package."""
    if parent.hint in (*NAMES, *BASES):
        return home() / parent.hint
    return Path(os.path.normpath(child / parent.hint))
