"""A model's held-out loss against training tokens, from the `history.jsonl` files of its pre-training."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from edgealign.artifact import Artifact, open_artifact
from edgealign.errors import ArtifactError, InputError
from edgealign.train.history import HISTORY_FILE, read_history


def learning_curve(model: Artifact, valid_digests: set[str]) -> dict[str, Any]:
    """The model's own held-out curve, and whether it was measured on this held-out text.

    Where the model it was pre-trained from still lies beside it, with a curve of the same held-out text, that one
    comes first: tokens count from random weights on.
    """
    curve = _own_curve(model)
    own = _held_out_digests(model)
    parent = _trained_from(model) if curve else None
    if parent is not None and _held_out_digests(parent) == own:
        before = learning_curve(parent, valid_digests)["curve"]
        seen = before[-1]["tokens"] if before else 0
        after = curve[1:] if before else curve  # its first point is the last one of before, on the same rows
        curve = before + [point | {"tokens": point["tokens"] + seen} for point in after]
    return {"curve": curve, "curve_on_this_text": bool(own) and own == valid_digests}


def _own_curve(model: Artifact) -> list[dict[str, Any]]:
    file = model.path / HISTORY_FILE
    try:
        rows = read_history(file)
        return [{"tokens": int(row["tokens"]), "nats_per_token": float(row["loss"])} for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(file, f"is damaged ({type(error).__name__})", "train the model again") from error


def _held_out_digests(model: Artifact) -> set[str]:
    return {entry.digest for entry in model.manifest.inputs if entry.role.startswith("valid")}


def _trained_from(model: Artifact) -> Artifact | None:
    """The model that this one's training started from, if it is still where it was and still the same."""
    for entry in model.manifest.inputs:
        if entry.role == "model":
            try:
                found = open_artifact(Path(os.path.normpath(model.path / entry.hint)), check_digests=False)
            except ArtifactError:
                return None
            return found if found.manifest.digest == entry.digest else None
    return None
