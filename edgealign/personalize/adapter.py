"""Which model an adapter belongs to, and the refusal of every other.

An adapter is a small difference to the weights of one model. On other weights it is noise, so its manifest holds
the digest of the model it was fitted on (`meta["base_digest"]`) and everything that attaches an adapter asks here.
"""

from __future__ import annotations

import json
from pathlib import Path

from edgealign.artifact import Artifact, open_artifact, open_model
from edgealign.errors import ArtifactError, InputError

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
METHODS = ("lora", "lora-mix", "lore", "direction", "fspo", "linear")  # of `edgealign personalize`


def open_adapter(adapter: Path | str) -> Artifact:
    """The published adapter at `adapter`, its files checked.

    Raises:
        ArtifactError: no adapter, a damaged one, or one that does not say which model it belongs to.
    """
    artifact = open_artifact(adapter, kind="adapter")
    if not isinstance(artifact.meta.get("base_digest"), str):
        raise ArtifactError(
            adapter, "does not say which model it was fitted on", "make it again with: edgealign personalize"
        )
    return artifact


def open_user(adapter: Path | str) -> Artifact:
    """A published adapter that is one user's, of any method.

    Raises:
        ArtifactError: no adapter, or one that nobody in particular was fitted to (a start, a basis's LoRAs).
    """
    artifact = open_adapter(adapter)
    if artifact.meta.get("method") not in METHODS:
        reason = f"was made by {artifact.manifest.stage}, and is no one user's"
        raise ArtifactError(adapter, reason, "give what edgealign personalize has published")
    return artifact


def check_adapter_base(adapter: Path | str | Artifact, model: Path | str | Artifact) -> Artifact:
    """Refuse an adapter on a model it was not fitted on.

    Raises:
        InputError: the digests differ; the message has both, and the command that fits the adapter again.
    """
    adapter = adapter if isinstance(adapter, Artifact) else open_adapter(adapter)
    model = model if isinstance(model, Artifact) else open_model(model)
    wanted = adapter.meta.get("base_digest")
    if wanted != model.digest:
        raise InputError(
            adapter.path,
            f"was fitted on the model {_short(wanted)}, this model is {_short(model.digest)}",
            f"fit it again with: edgealign personalize --model {model.path} --user {adapter.meta.get('user', 'USER')}",
        )
    return adapter


def check_adapter_place(adapter: Artifact, place: Path | str) -> None:
    """The same for a place that may be a bundle of the model.

    Raises:
        InputError: it belongs to another model, or the bundle does not say which one it was made from.
    """
    wanted, there = adapter.meta.get("base_digest"), model_digest(place)
    if wanted != there:
        reason = f"was fitted on the model {_short(wanted)}, {place} is of {_short(there)}"
        user = adapter.meta.get("user", "USER")
        raise InputError(adapter.path, reason, f"fit it on that one: edgealign personalize --user {user}")


def model_digest(place: Path | str) -> str:
    """The digest of the model at a place: its own, or the one that a bundle was made from; "" where nobody knows.

    Raises:
        ArtifactError, InputError: there is no model and no bundle.
    """
    from edgealign.runtimes.session import runtime_of

    if runtime_of(place) == "torch":
        return open_model(place).digest
    return str(open_artifact(Path(place), kind="bundle", check_digests=False).meta.get("model_digest", ""))


def read_config(adapter: Path | str) -> dict[str, object]:
    """`adapter_config.json` as a mapping.

    Raises:
        InputError: it is missing or damaged.
    """
    file = Path(adapter) / ADAPTER_FILES[0]
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(file, "is missing or is not JSON", "give a LoRA in PEFT layout") from error
    if not isinstance(config, dict):
        raise InputError(file, "is not a JSON object", "give a LoRA in PEFT layout")
    return config


def _short(digest: object) -> str:
    return str(digest)[:12] if digest else "unknown"
