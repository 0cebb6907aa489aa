"""Load a model directory safely: safetensors and JSON only, every tensor accounted for.

Three refusals come before transformers sees the directory: code that wants to run (`auto_map`), pickled weights
(`.bin`, `.pt`, ...), and safetensors files whose header and size disagree (a truncated download). Each is one line
with the file's name. Nothing here executes or unpickles anything.
"""

from __future__ import annotations

import json
import logging as stdlogging
import re
import struct
from logging import LogRecord, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgealign.errors import InputError
from edgealign.models.builtin import built_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONFIG = "config.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "LICENSE*")
HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors format itself
DTYPES = ("float32", "bfloat16", "float16")
ITEM_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8,
}
# Models that list a causal head but read both ways, or that need more than text.
NOT_CAUSAL = ("bert", "roberta", "electra", "xlm", "camembert", "megatron", "rembert", "data2vec", "big_bird")


def load_model(source: str | Path, *, dtype: str = "float32") -> PreTrainedModel:
    """The model in evaluation mode with PyTorch's own attention.

    Raises:
        InputError: no model there, pickled weights, code of its own, a damaged file, an architecture that is not a
            causal language model, tensors missing or left over.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    assert dtype in DTYPES, dtype
    folder = resolve_model(source)
    check_model(folder)
    if not torch.cuda.is_available():
        getLogger("transformers.integrations.hub_kernels").addFilter(_is_no_cuda_advice)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    # It advises a CUDA package for the short convolution; there is none for a CPU.
    stdlogging.getLogger("transformers.integrations.hub_kernels").setLevel(stdlogging.ERROR)
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # its load report repeats what is checked below
    logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=getattr(torch, dtype), attn_implementation="sdpa", use_safetensors=True,
            local_files_only=True, trust_remote_code=False, output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported in `info`, refused below by name
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(folder, f"cannot be loaded ({_first_line(error)})", "get the model again") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    _check_complete(folder, info)
    model.eval()
    return model


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, with its chat template.

    Raises:
        InputError: none there, code of its own, or files that transformers cannot read.
    """
    from transformers import AutoTokenizer

    folder = resolve_model(source)
    _refuse_code(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise InputError(folder, "has no tokenizer (tokenizer.json)", "copy the tokenizer files of its base model")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for a file it cannot parse
        raise InputError(
            folder / "tokenizer.json", f"cannot be read ({_first_line(error)})", "get the tokenizer again"
        ) from error


def resolve_model(source: str | Path) -> Path:
    """A directory for a built-in name (`models.builtin`: a `str` wins over a folder of that name; a `Path` is a path),
    a path, or a hub id (`owner/name` or `owner/name@revision`, from the cache when offline).

    Raises:
        InputError: no such directory, and no such model in reach.
        ToolMissing: the built-in model is not part of this installation.
    """
    path = built_in(source) or Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(path, "is a file, a model is a directory", "give the directory that holds config.json")
    if not HUB_ID.fullmatch(str(source)):
        raise InputError(source, "no such model directory", "make one with: edgealign init --out DIR")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = str(source).partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(HUB_FILES)))
    except LocalEntryNotFoundError as error:
        raise InputError(
            source, "is no directory, and the hub is out of reach with no copy in the cache",
            f"connect once and run: hf download {repository}",
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(source, f"cannot be had from the hub ({_first_line(error)})", "check its name") from error


def check_model(folder: Path) -> dict[str, Any]:
    """Everything that can be refused without loading; returns the parsed `config.json`.

    Raises:
        InputError: with the file and the reason.
    """
    config = read_config(folder)
    _refuse_code(folder)
    _check_architecture(folder, config)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED)
        if pickled:
            raise InputError(
                folder / pickled[0], "is a pickle, which can run code when it is opened; only safetensors are read",
                "ask its author for safetensors, or convert it in a sandbox",
            )
        raise InputError(folder, "holds no weights (*.safetensors)", "get the model again")
    names = {name for file in files for name in check_safetensors(file)}
    _check_index(folder, names)
    return config


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json`, parsed.

    Raises:
        InputError: it is missing or is not a JSON object.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise InputError(folder, f"has no {CONFIG}: not a model directory", "make one with: edgealign init --out DIR")
    return _read_json(file)


def check_safetensors(file: Path) -> dict[str, Any]:
    """Read and prove a safetensors header: size, shapes and offsets fit the file without holes or overlaps.

    Returns:
        name -> {"dtype", "shape", "data_offsets"}, without "__metadata__".

    Raises:
        InputError: one line with the file's name.
    """
    size = file.stat().st_size
    damaged = "get or make the file again"
    with file.open("rb") as handle:
        head = handle.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(HEADER_LIMIT, size - 8):
            raise InputError(file, "is truncated or not safetensors (its header does not fit)", damaged)
        try:
            header = json.loads(handle.read(length))
            header.pop("__metadata__", None)
            spans = sorted(_span(name, entry) for name, entry in header.items())
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InputError(file, f"has a damaged safetensors header ({_first_line(error)})", damaged) from error
    position = 0
    for start, end, name in spans:
        if start != position:
            raise InputError(file, f"tensor {name} does not follow the one before it", damaged)
        position = end
    if position != size - 8 - length:
        there = size - 8 - length
        raise InputError(
            file, f"is truncated or damaged: the tensors need {position:,} bytes, {there:,} are there", damaged
        )
    return header  # type: ignore[no-any-return]


def _span(name: str, entry: dict[str, Any]) -> tuple[int, int, str]:
    start, end = entry["data_offsets"]
    count = 1
    for length in entry["shape"]:
        if not isinstance(length, int) or length < 0:
            raise ValueError(f"tensor {name} has the shape {entry['shape']}")
        count *= length
    bits = ITEM_BITS.get(entry["dtype"])
    if bits is None:
        raise ValueError(f"tensor {name} has the unknown type {entry['dtype']}")
    if end - start != count * bits // 8 or start < 0:
        raise ValueError(f"tensor {name} does not have the size of its shape")
    return start, end, name


def _check_index(folder: Path, names: set[str]) -> None:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    listed = _read_json(index).get("weight_map", {})
    for name, file in listed.items():
        if name not in names:
            raise InputError(
                folder / str(file), f"lacks tensor {name}, which {index.name} lists", "get the model again"
            )


def _check_architecture(folder: Path, config: dict[str, Any]) -> None:
    kind = str(config.get("model_type", ""))
    heads = [str(name) for name in config.get("architectures") or []]
    known = _causal_types()
    supported = "lfm2, lfm2_moe, lfm3, llama, qwen3, gemma3_text and other decoder-only text models"
    if kind not in known or kind.startswith(NOT_CAUSAL) or config.get("is_encoder_decoder"):
        raise InputError(folder, f"architecture {kind or 'unknown'} is no causal language model", f"use: {supported}")
    if heads and not any(name in known[kind] for name in heads):
        raise InputError(folder, f"{heads[0]} has no language-model head to generate with", f"use: {supported}")


def _causal_types() -> dict[str, tuple[str, ...]]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return {
        kind: tuple(names) if isinstance(names, (list, tuple)) else (names,)
        for kind, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    }


def _refuse_code(folder: Path) -> None:
    for name in (CONFIG, "tokenizer_config.json", "generation_config.json", "processor_config.json"):
        file = folder / name
        if file.is_file() and ("auto_map" in (parsed := _read_json(file)) or "custom_generate" in parsed):
            raise InputError(
                file, "asks to run code that comes with the model (auto_map); edgealign never does",
                "use a model that transformers supports itself, or remove auto_map if it does",
            )


def _is_no_cuda_advice(record: LogRecord) -> bool:
    """Drop the advice to install `causal_conv1d`, which runs on CUDA only."""
    return "falling back to its reference" not in record.getMessage()


def _check_complete(folder: Path, info: dict[str, Any]) -> None:
    """transformers fills a missing tensor with random numbers and drops a foreign one; both are errors here."""
    for key, reason in (
        ("missing_keys", "lacks {} tensors of its architecture, first {}"),
        ("unexpected_keys", "holds {} tensors that its architecture does not have, first {}"),
        ("mismatched_keys", "has {} tensors of another shape than its config says, first {}"),
    ):
        names = sorted(str(item[0] if isinstance(item, (tuple, list)) else item) for item in info.get(key) or ())
        if names:
            raise InputError(folder, reason.format(len(names), names[0]), "get the model again")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise InputError(file, "is not readable JSON", "get or make the file again") from error
    if not isinstance(parsed, dict):
        raise InputError(file, "is not a JSON object", "get or make the file again")
    return parsed


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
