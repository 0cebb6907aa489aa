"""Where rows come from: files, directories, the Hugging Face hub. Each gives records with their line numbers.

Files inside a directory in the hub's layout are found by `datasets` (split names, patterns, the README's
configuration) but JSONL and Parquet among them are read here, so that a bad row keeps its line number.

    data.jsonl.gz  data.parquet  DIRECTORY  DIRECTORY:SPLIT
    owner/name  owner/name:SPLIT  owner/name:CONFIG/SPLIT  owner/name@REVISION:SPLIT
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgealign.data import jsonl
from edgealign.data.faults import RowFault
from edgealign.errors import InputError

BATCH_ROWS = 1000
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
PREFERRED_SPLITS = ("train", "train_prefs", "train_sft")


@dataclass(frozen=True, slots=True)
class Record:
    """One row as it was found: a dictionary, or the fault that kept it from being one."""

    file: str
    line: int
    value: dict[str, Any] | RowFault


@dataclass(frozen=True)
class Source:
    name: str
    records: Callable[[], Iterator[Record]]
    digest: Callable[[], str]
    path: Path | None = None

    def beside(self, stem: str) -> Source:
        """The file `stem` in the same directory, whatever readable suffix it has.

        Raises:
            InputError: there is none.
        """
        if self.path is not None:
            for suffix in (*jsonl.SUFFIXES, ".parquet"):
                candidate = self.path.with_name(stem + suffix)
                if candidate.is_file():
                    return open_source(candidate)
        raise InputError(self.name, f"refers to rows of {stem}, which is not beside it", f"put {stem}.jsonl.gz there")


def open_source(source: str | Path) -> Source:
    """A file, a directory or a hub id, with an optional `:split` behind the last two.

    Raises:
        InputError: nothing readable has this name.
    """
    name = str(source)
    path = Path(name)
    split = ""
    if not path.exists() and ":" in name:
        name, _, split = name.rpartition(":")
        path = Path(name)
    if path.is_dir():
        return _directory(path, split, str(source))
    if path.exists() and not split:
        return _file(path)
    if HUB_ID.fullmatch(name) and not name.endswith((*jsonl.SUFFIXES, ".parquet")) and not path.exists():
        return _hub(name, split, str(source))
    raise InputError(source, "no such file or directory", "give a JSONL or Parquet file, a directory, or owner/dataset")


def _file(path: Path) -> Source:
    if path.name.endswith(jsonl.SUFFIXES):
        return Source(str(path), lambda: _jsonl_records(path, ""), lambda: _sha256(path), path)
    if path.suffix == ".parquet":
        return Source(str(path), lambda: _parquet_records(path, ""), lambda: _sha256(path), path)
    raise InputError(
        path, "is neither JSONL (.jsonl, .json, .ndjson, each also .gz) nor Parquet", "convert it to JSON Lines"
    )


def _directory(path: Path, split: str, name: str) -> Source:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _rows_of(name, lambda: _saved_dataset(path, split, name), lambda: _sha256_of(_files_below(path), path))
    files = _layout_files(path, split, name)
    if all(file.name.endswith((*jsonl.SUFFIXES, ".parquet")) for file in files):

        def records() -> Iterator[Record]:
            for file in files:
                label = file.relative_to(path).as_posix() if len(files) > 1 else ""
                read = _parquet_records if file.suffix == ".parquet" else _jsonl_records
                yield from read(file, label)

        only = files[0] if len(files) == 1 else None
        return Source(name, records, lambda: _sha256_of(files, path), only)
    return _rows_of(name, lambda: _load_dataset(str(path), split, name), lambda: _sha256_of(files, path))


def _hub(repository: str, split: str, name: str) -> Source:
    loaded: list[Any] = []

    def dataset() -> Any:
        if not loaded:
            loaded.append(_load_dataset(repository, split, name))
        return loaded[0]

    return _rows_of(name, dataset, lambda: _sha256_of_rows(dataset()))


def _rows_of(name: str, dataset: Callable[[], Any], digest: Callable[[], str]) -> Source:
    def records() -> Iterator[Record]:
        line = 0
        for batch in dataset().iter(batch_size=BATCH_ROWS):
            for values in zip(*batch.values(), strict=True):
                line += 1
                yield Record("", line, dict(zip(batch, values, strict=True)))

    return Source(name, records, digest)


def _jsonl_records(path: Path, label: str) -> Iterator[Record]:
    for line, value in jsonl.read_lines(path):
        yield Record(label, line, value)


def _parquet_records(path: Path, label: str) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    line = 0
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=BATCH_ROWS):
                for row in batch.to_pylist():
                    line += 1
                    yield Record(label, line, row)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise InputError(path, f"is not a whole Parquet file ({reason})", "download or write it again") from error


def _saved_dataset(path: Path, split: str, name: str) -> Any:
    import datasets

    try:
        with _quiet():
            loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets raises whatever its file formats raise
        raise InputError(name, f"is not a whole saved dataset ({_first_line(error)})", "save it again") from error
    if isinstance(loaded, datasets.DatasetDict):
        return loaded[_pick_split(list(loaded), split, name)]
    if split:
        raise InputError(name, "is a single dataset without splits", f"leave out :{split}")
    return loaded


def _layout_files(path: Path, split: str, name: str) -> tuple[Path, ...]:
    """The files of one split, as `datasets` would find them."""
    import datasets

    try:
        with _quiet():
            found = datasets.load_dataset_builder(str(path)).config.data_files
    except Exception as error:
        raise InputError(
            name, f"has no data files in a known layout ({_first_line(error)})", "give the JSONL or Parquet file itself"
        ) from error
    splits = {str(key): [Path(str(file)) for file in files] for key, files in (found or {}).items()}
    if not splits:
        raise InputError(name, "has no data files", "give the JSONL or Parquet file itself")
    base = path.resolve()
    chosen = splits[_pick_split(list(splits), split, name)]
    return tuple(path / file.resolve().relative_to(base) for file in chosen)


def _load_dataset(repository: str, split: str, name: str) -> Any:
    import datasets

    config, _, wanted = split.rpartition("/")
    here = Path(repository).is_dir()
    owner_name, _, revision = (repository, "", "") if here else repository.partition("@")
    try:
        with _quiet():
            if not here:
                _reach_hub(owner_name, revision)
            loaded = datasets.load_dataset(owner_name, config or None, revision=revision or None)
    except Exception as error:  # the hub, its cache and every file format raise their own
        raise InputError(
            name, f"is neither here nor to be had from the hub ({_first_line(error)})",
            "check the spelling, or fetch it once with a network: later runs use the cache",
        ) from error
    return loaded[_pick_split(list(loaded), wanted, name)]


def _reach_hub(owner_name: str, revision: str) -> None:
    """Ask once, quickly: without a network `datasets` would try for half a minute before it looks into its cache."""
    import datasets
    from huggingface_hub import HfApi

    cached = Path(datasets.config.HF_DATASETS_CACHE) / owner_name.replace("/", "___")
    if not cached.is_dir():
        HfApi().dataset_info(owner_name, revision=revision or None, timeout=10)


def _pick_split(splits: Sequence[str], wanted: str, name: str) -> str:
    if wanted:
        if wanted not in splits:
            raise InputError(name, f"has no split {wanted}", f"its splits are {', '.join(splits)}")
        return wanted
    if len(splits) == 1:
        return splits[0]
    for preferred in PREFERRED_SPLITS:
        if preferred in splits:
            return preferred
    raise InputError(name, "has several splits", f"name one as {name}:{splits[0]} (of {', '.join(splits)})")


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bars and retries of `datasets`: our own message says what went wrong."""
    import logging

    import datasets

    loggers = [logging.getLogger(part) for part in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars = datasets.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def _first_line(error: Exception) -> str:
    return (str(error).strip().partition("\n")[0] or type(error).__name__).rstrip(".")[:200]


def _files_below(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sha256_of(files: Sequence[Path], base: Path) -> str:
    lines = sorted(f"{file.relative_to(base).as_posix()} {_sha256(file)}" for file in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _sha256_of_rows(dataset: Any) -> str:
    total = hashlib.sha256()
    for row in dataset:
        total.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return total.hexdigest()
