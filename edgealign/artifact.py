"""Artifacts: directories with a manifest, published all at once or not at all.

A stage writes into a hidden directory beside its target. When it is done every file is flushed to the disk,
`manifest.json` is written last, the directory is renamed into place and its parent is flushed. A directory
without a valid manifest does not exist for edgealign; a killed stage leaves none.

The manifest holds facts, never a user's text: schema, kind, stage, the resolved recipe, inputs by digest,
every file with SHA-256 and size, checks with tolerances and verdicts, licences, the chat template's hash,
versions. The artifact's digest is SHA-256 over the sorted "path sha256 bytes" lines of its files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgealign.errors import ArtifactError, OutputError, writing

SCHEMA = 1
MANIFEST = "manifest.json"
KINDS = ("dataset", "model", "adapter", "basis", "bundle", "report")
VERSIONED = (
    "edgealign", "torch", "transformers", "peft", "gguf", "llama-cpp-python", "onnxruntime", "onnxruntime-genai",
    "mergekit",
)  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One measured verdict. `value` and `tolerance` share their unit; `note` says which way is good."""

    name: str
    value: float | None
    tolerance: float | None
    passed: bool
    note: str = ""


@dataclass(frozen=True)
class Input:
    """An artifact that a stage read: `digest` identifies it, `hint` is where it was, relative if near."""

    role: str
    kind: str
    digest: str
    hint: str


@dataclass(frozen=True)
class FileEntry:
    """A file of an artifact: relative POSIX path, SHA-256 in hex, size in bytes."""

    path: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` holds."""

    schema: int
    kind: str
    format: str
    stage: str
    recipe: dict[str, Any]
    inputs: tuple[Input, ...]
    files: tuple[FileEntry, ...]
    checks: tuple[Check, ...]
    licences: dict[str, str]
    template_hash: str | None
    versions: dict[str, str]
    meta: dict[str, Any]
    digest: str


@dataclass(frozen=True)
class Artifact:
    """A directory whose manifest was read (and, unless asked otherwise, whose digests were checked)."""

    path: Path
    manifest: Manifest

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def kind(self) -> str:
        return self.manifest.kind

    @property
    def meta(self) -> dict[str, Any]:
        return self.manifest.meta

    def as_input(self, role: str) -> Input:
        """This artifact as an input of another one."""
        return Input(role, self.kind, self.digest, str(self.path.resolve()))


@dataclass
class Draft:
    """An artifact in the making: write files into `dir`, facts into `meta`, verdicts with `add_check`."""

    dir: Path
    meta: dict[str, Any] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    licences: dict[str, str] = field(default_factory=dict)
    template_hash: str | None = None

    def add_check(self, check: Check) -> None:
        self.checks.append(check)


@contextmanager
def publish(
    out: Path,
    *,
    kind: str,
    format: str,
    stage: str,
    recipe: object,
    inputs: Sequence[Input] = (),
    template_hash: str | None = None,
    licences: Mapping[str, str] | None = None,
) -> Iterator[Draft]:
    """Publish one artifact at `out`, atomically.

    Args:
        out: the directory to make; it must not exist.
        recipe: a recipe dataclass or a mapping; stored as resolved.
        inputs: what was read, from `Artifact.as_input`.

    Raises:
        OutputError: `out` exists, or cannot be written; nothing is left behind.
    """
    assert kind in KINDS, kind
    out = Path(out)
    refuse_existing(out)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        draft = Draft(out.parent / f".{out.name}.tmp-{os.getpid()}", template_hash=template_hash)
        draft.licences.update(licences or {})
        draft.dir.mkdir()
    try:
        with writing(out):
            yield draft
            files = tuple(list_files(draft.dir))
            manifest = Manifest(
                schema=SCHEMA,
                kind=kind,
                format=format,
                stage=stage,
                recipe=_plain(recipe),
                inputs=tuple(_near(entry, out) for entry in inputs),
                files=files,
                checks=tuple(draft.checks),
                licences=draft.licences,
                template_hash=draft.template_hash,
                versions=versions(),
                meta=draft.meta,
                digest=digest_files(files),
            )
            for entry in files:
                _fsync(draft.dir / entry.path)
            for folder in sorted(path for path in draft.dir.rglob("*") if path.is_dir()):
                _fsync(folder)
            text = json.dumps(dataclasses.asdict(manifest), indent=2, sort_keys=True, allow_nan=False)
            (draft.dir / MANIFEST).write_text(text + "\n", encoding="utf-8")
            _fsync(draft.dir / MANIFEST)
            _fsync(draft.dir)
            refuse_existing(out)
            os.rename(draft.dir, out)
            _fsync(out.parent)
    except BaseException:
        shutil.rmtree(draft.dir, ignore_errors=True)
        raise
    shutil.rmtree(_work_path(out), ignore_errors=True)


def file_input(role: str, file: Path | str, digest: str) -> Input:
    """A data file as an input: by the data set it belongs to, if it lies in a published one, else by itself."""
    file = Path(file)
    if (file.parent / MANIFEST).is_file():
        home = open_artifact(file.parent, check_digests=False)
        if home.kind == "dataset":
            return home.as_input(f"{role} {file.name}")
    return Input(role, "file", digest, str(file.absolute()) if file.exists() else str(file))


def refuse_existing(out: Path) -> None:
    """Raise unless `out` is free: call it before hours of work, not after."""
    if out.exists() or out.is_symlink():
        raise OutputError(out, "exists already", "choose another --out or remove it first")


def workdir(out: Path, key: str) -> Path:
    """The place beside `out` for checkpoints that survive a kill.

    It is emptied when `key` (the digest of recipe and inputs) is another one than before, and removed when
    the artifact is published.
    """
    work = _work_path(Path(out))
    with writing(out):
        work.mkdir(parents=True, exist_ok=True)
        stamp = work / "key"
        if not stamp.is_file() or stamp.read_text(encoding="utf-8") != key:
            shutil.rmtree(work)
            work.mkdir()
            write_atomic(stamp, key)
    return work


def write_atomic(path: Path, text: str) -> None:
    """Replace a small file so that a reader sees the old or the new one, also after a power cut."""
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    _fsync(part)
    os.replace(part, path)
    _fsync(path.parent)


def open_artifact(path: Path | str, *, kind: str | None = None, check_digests: bool = True) -> Artifact:
    """Read a published directory and prove that it is what was published.

    Raises:
        ArtifactError: no manifest, a foreign or damaged one, another kind, a file that is missing, changed
            or not listed.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if kind is not None and manifest.kind != kind:
        raise ArtifactError(
            path, f"is a {manifest.kind}, a {kind} is needed", f"look at it with: edgealign show {path}"
        )
    if check_digests:
        _check_files(path, manifest)
    return Artifact(path, manifest)


def open_model(source: Path | str) -> Artifact:
    """A model by built-in name, path or hub id; a foreign Hugging Face directory gets a manifest made on the way in.

    `open_model("starter")` is the model that comes with edgealign; see `models.builtin`.

    Raises:
        ArtifactError: the directory is damaged or is another kind of artifact.
        InputError: nothing usable is there.
        ToolMissing: the built-in model is not part of this installation.
    """
    from edgealign.models.load import resolve_model

    path = resolve_model(source)
    if (path / MANIFEST).is_file():
        return open_artifact(path, kind="model")
    files = tuple(entry for entry in list_files(path, links=True) if not entry.path.startswith("."))
    manifest = Manifest(
        schema=SCHEMA,
        kind="model",
        format="huggingface",
        stage="foreign",
        recipe={},
        inputs=(),
        files=files,
        checks=(),
        licences={},
        template_hash=None,
        versions={},
        meta={},
        digest=digest_files(files),
    )
    return Artifact(path, manifest)


def read_manifest(path: Path) -> Manifest:
    """The manifest of a directory, unchecked against its files.

    Raises:
        ArtifactError: none there, damaged, or of another schema.
    """
    file = path / MANIFEST
    if not path.is_dir():
        raise ArtifactError(path, "no such directory", "look at what there is with: ls")
    if not file.is_file():
        raise ArtifactError(path, f"has no {MANIFEST}: it was never published", "run its stage again")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        if raw["schema"] != SCHEMA:
            raise ArtifactError(
                path, f"manifest schema {raw['schema']}, this version reads {SCHEMA}", "update edgealign"
            )
        raw["inputs"] = tuple(Input(**entry) for entry in raw["inputs"])
        raw["files"] = tuple(FileEntry(**entry) for entry in raw["files"])
        raw["checks"] = tuple(Check(**entry) for entry in raw["checks"])
        return Manifest(**raw)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(file, f"is damaged ({type(error).__name__})", "run its stage again") from error


def list_files(root: Path, *, links: bool = False) -> Iterator[FileEntry]:
    """Every regular file below `root` but the manifest, sorted by path.

    Raises:
        ArtifactError: a link, unless `links` (the hub's cache is made of links) allows them.
    """
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_symlink() and not links:
            raise ArtifactError(path, "is a link, and an artifact holds none", "copy the file itself")
        if path.is_file() and name != MANIFEST:
            yield FileEntry(name, sha256_file(path), path.stat().st_size)


def digest_files(files: Sequence[FileEntry]) -> str:
    """SHA-256 over the sorted "path sha256 bytes" lines."""
    lines = sorted(f"{entry.path} {entry.sha256} {entry.bytes}\n" for entry in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(value: object) -> str:
    """SHA-256 of the canonical JSON of a recipe, mapping or list."""
    return hashlib.sha256(json.dumps(_plain(value), sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Installed versions of the parts that shape a result, without importing them."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _plain(value: object) -> Any:
    """Dataclasses and tuples as JSON has them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    return json.loads(json.dumps(value))


def _work_path(out: Path) -> Path:
    return out.parent / f".{out.name}.work"


def _sweep(out: Path) -> None:
    """Remove what killed runs of this stage left behind; a living process keeps its own."""
    for stale in out.parent.glob(f".{out.name}.tmp-*"):
        pid = stale.name.rsplit("-", 1)[-1]
        if not pid.isdigit() or pid == str(os.getpid()) or not Path("/proc", pid).exists():
            shutil.rmtree(stale, ignore_errors=True)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _near(entry: Input, out: Path) -> Input:
    """Keep a relative hint for a neighbour and only the name of anything farther: no private paths."""
    path = Path(entry.hint)
    if path.is_absolute():
        relative = os.path.relpath(path, out.resolve().parent / out.name)
        hint = relative if relative.count("..") <= 3 else path.name
        entry = dataclasses.replace(entry, hint=hint)
    return entry


def _check_files(path: Path, manifest: Manifest) -> None:
    listed = {entry.path: entry for entry in manifest.files}
    for name in listed:
        if name.startswith("/") or ".." in Path(name).parts:
            raise ArtifactError(path, f"lists {name!r}, which is outside of it", "do not use it")
    present = {entry.path: entry for entry in list_files(path)}
    fix = "copy or make it again"
    for name in sorted(listed.keys() | present.keys()):
        if name not in present:
            raise ArtifactError(path, f"{name} is listed but missing", fix)
        if name not in listed:
            raise ArtifactError(path, f"{name} is there but not listed", f"remove it, or {fix}")
        if present[name] != listed[name]:
            raise ArtifactError(path, f"{name} is not the file that was published (SHA-256 differs)", fix)
    if digest_files(manifest.files) != manifest.digest:
        raise ArtifactError(path, "the manifest's digest does not match its file list", fix)
