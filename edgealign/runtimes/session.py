"""One protocol over every runtime, and the function that opens a session on a directory.

A session holds one model and one state: the tokens fed so far, with one user's adapter on or off.
``prefill`` and ``step`` append to that state; ``set_user`` and ``reset`` empty it (the KV cache and the
convolution state), because a state computed under one adapter means nothing under another.

    session = open_session("bundle")
    logits = session.prefill(ids)            # (V,)
    session.set_user(bundle_adapter("bundle", "ana"))

Shape legend: V vocabulary, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast, runtime_checkable

from edgealign.artifact import open_artifact
from edgealign.errors import ArtifactError, InputError, UsageError
from edgealign.models.builtin import built_in
from edgealign.registry import Registry

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Logits: TypeAlias = npt.NDArray[np.float32]

RUNTIMES = Registry(
    "runtime",
    {
        "torch": "edgealign.runtimes.torch_session:TorchSession",
        "llama.cpp": "edgealign.runtimes.llamacpp:LlamaSession",
        "onnxruntime": "edgealign.runtimes.onnx_session:OnnxSession",
        "executorch": "edgealign.runtimes.executorch_session:ExecutorchSession",
        "scripted": "edgealign.runtimes.scripted:ScriptedSession",
    },
)

# What a bundle's manifest calls its target, and the runtime that opens it.
TARGET_RUNTIMES: Mapping[str, str] = {"gguf": "llama.cpp", "onnx": "onnxruntime", "executorch": "executorch"}
# A model file that is opened without a manifest beside it.
FILE_RUNTIMES: Mapping[str, str] = {".gguf": "llama.cpp", ".onnx": "onnxruntime", ".pte": "executorch"}


@runtime_checkable
class Session(Protocol):
    """What generation, parity, benchmarks and the app know about a runtime."""

    def prefill(self, tokens: Sequence[int]) -> Logits:
        """Append tokens to the state; logits (V,) after the last one."""

    def step(self, token: int) -> Logits:
        """Append one token; logits (V,)."""

    def set_user(self, adapter: Path | None) -> None:
        """Switch to one user's adapter, or to the base model for None. Empties the state."""

    def reset(self) -> None:
        """Empty the state; the adapter stays."""

    def close(self) -> None:
        """Free the model. A closed session is of no further use."""


@runtime_checkable
class Scorer(Session, Protocol):
    """A session that can return the logits after every token of one pass."""

    def score(self, tokens: Sequence[int]) -> Logits:
        """Logits (T, V) after each token, from an empty state; leaves the state empty."""


@runtime_checkable
class Snapshots(Session, Protocol):
    """A session whose state can be kept as bytes: torch, llama.cpp and onnxruntime, also in a child process."""

    def snapshot(self) -> bytes:
        """The state: of this model under this user, and of no other."""

    def restore(self, state: bytes) -> None:
        """Go on where `snapshot` was taken; refuses what is not this model's and this user's, and is then empty."""


@dataclass(frozen=True)
class Bundle:
    """The facts of a bundle directory that a runtime needs, with absolute paths."""

    path: Path
    target: str
    quant: str
    model_file: Path
    adapters: Mapping[str, Path]

    @property
    def model_bytes(self) -> int:
        """Size of the model: its file, and the weights that an ONNX graph keeps in a file beside it."""
        return sum(file.stat().st_size for file in self.model_file.parent.glob(f"{self.model_file.name}*"))


def read_bundle(path: str | Path, *, check_digests: bool = True) -> Bundle:
    """Open a bundle directory: its manifest is checked, its files are not loaded."""
    artifact = open_artifact(Path(path), kind="bundle", check_digests=check_digests)
    meta: Mapping[str, Any] = artifact.manifest.meta
    try:
        adapters = {str(user): artifact.path / entry["file"] for user, entry in meta.get("adapters", {}).items()}
        return Bundle(
            artifact.path, str(meta["target"]), str(meta["quant"]), artifact.path / meta["model_file"], adapters
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            str(path), f"its manifest lacks {error}", "export the bundle again: edgealign export"
        ) from error


def bundle_adapter(path: str | Path | Bundle, user: str) -> Path:
    """The file of one user's adapter inside a bundle."""
    bundle = path if isinstance(path, Bundle) else read_bundle(path, check_digests=False)
    if user not in bundle.adapters:
        known = ", ".join(sorted(bundle.adapters)) or "none"
        raise UsageError(user, f"is no user of {bundle.path.name} (users: {known})", "export that user's adapter too")
    return bundle.adapters[user]


def runtime_of(path: str | Path) -> str:
    """Which runtime opens this path: a bundle says so itself, a model file and a model directory are plain to see."""
    place = built_in(path) or Path(path)
    if place.suffix in FILE_RUNTIMES:
        return FILE_RUNTIMES[place.suffix]
    if not place.is_dir():
        raise InputError(str(path), "is neither a bundle, a model directory nor a model file", "check the path")
    if (place / "manifest.json").is_file():
        artifact = open_artifact(place, check_digests=False)
        if artifact.kind == "bundle":
            return _runtime_of_target(str(path), str(artifact.manifest.meta.get("target", "")))
        if artifact.kind != "model":
            reason = f"is an artifact of kind {artifact.kind}, not a model or a bundle"
            raise ArtifactError(str(path), reason, "give a model or a bundle")
    if (place / "config.json").is_file():
        return "torch"
    raise InputError(str(path), "holds no manifest.json and no config.json", "give a model directory or a bundle")


def open_session(path: str | Path, *, runtime: str | None = None, **options: Any) -> Session:
    """Open a session; ``options`` go to the runtime (threads, context, exact, ...)."""
    name = runtime or runtime_of(path)
    return cast("Session", RUNTIMES.load(name)(built_in(path) or Path(path), **options))


def score(session: Session, tokens: Sequence[int]) -> Logits:
    """Logits (T, V) after each token from an empty state, in one pass where the runtime can do that."""
    import numpy as np

    if isinstance(session, Scorer):
        return session.score(tokens)
    session.reset()
    rows = [session.prefill(tokens[:1]), *(session.step(token) for token in tokens[1:])]
    session.reset()
    return np.stack(rows)


def check_tokens(tokens: Sequence[int], *, vocab: int, filled: int, context: int, fix: str) -> None:
    """Refuse tokens that a session cannot take.

    Args:
        filled: tokens that are in the state already.
        fix: what helps where the context is too short.

    Raises:
        UsageError: none, one that is outside of the vocabulary, or more than the context has room for.
    """
    if not len(tokens):
        raise UsageError("prompt", "is empty", "give at least one token")
    for token in tokens:
        if not 0 <= token < vocab:
            raise UsageError(token, f"is outside the vocabulary of {vocab}", "encode with this tokenizer")
    if filled + len(tokens) > context:
        raise UsageError(f"{filled + len(tokens)} tokens", f"do not fit the context of {context}", fix)


def _runtime_of_target(path: str, target: str) -> str:
    if target not in TARGET_RUNTIMES:
        known = ", ".join(sorted(TARGET_RUNTIMES))
        raise ArtifactError(path, f"was exported for {target!r}, which no runtime here opens", f"targets: {known}")
    return TARGET_RUNTIMES[target]
