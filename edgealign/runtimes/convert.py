"""A user's published adapter in the form that a place's runtime takes: converted once, kept where it is said.

    session.set_user(as_runtime_reads(Path("runs/ada"), Path("runs/bundle"), kept=users.private("ada")))

`edgealign export --adapter` puts adapters into a bundle; this is for a bundle that was there before its user. No torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgealign.artifact import open_artifact
from edgealign.errors import InputError, UsageError, writing
from edgealign.runtimes.control_vector import find_control_vector
from edgealign.runtimes.gguf_header import check_gguf
from edgealign.runtimes.gguf_names import ARCHITECTURES
from edgealign.runtimes.session import read_bundle, runtime_of

SUFFIXES = {"llama.cpp": ".gguf", "onnxruntime": ".onnx_adapter", "executorch": ".safetensors"}


def as_runtime_reads(adapter: Path, place: Path, *, kept: Path) -> Path:
    """What ``Session.set_user`` of a session on `place` takes for a LoRA or a direction.

    Args:
        adapter: a published adapter directory.
        place: a model directory or a bundle.
        kept: a folder for the converted file; what is there already is not made again.

    Raises:
        UsageError: this runtime has no place for such an adapter.
        ArtifactError, InputError: the adapter is damaged, or does not fit the bundle.
    """
    runtime = runtime_of(place)
    if runtime == "torch":
        return adapter
    vector = find_control_vector(adapter)
    if vector is not None and runtime == "llama.cpp":
        return vector
    if vector is not None:
        reason = f"is a direction, and a program for {runtime} has no place behind a layer to add it"
        raise UsageError(adapter, reason, "use the model itself or a GGUF bundle, or fit a LoRA: --method lora")
    names = (open_artifact(each, check_digests=False).digest[:16] for each in (adapter, place))
    out = kept / f"{'-'.join(names)}{SUFFIXES[runtime]}"
    if not out.is_file():
        part = out.with_name(f".part-{os.getpid()}-{out.name}")
        with writing(out):
            kept.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                _write(adapter, place, runtime, part)
                os.replace(part, out)
            finally:
                part.unlink(missing_ok=True)
    return out


def gguf_config(file: Path) -> dict[str, Any]:
    """What a LoRA's conversion asks of the base's `config.json`, from a model file's own header.

    Raises:
        InputError: damaged, or of an architecture without a tensor table here.
    """
    info = check_gguf(file)
    types = {table.name: kind for kind, table in ARCHITECTURES.items()}
    if info.arch not in types:
        raise InputError(file, f"is of the architecture {info.arch}, which has no tensor table here", "export it again")
    return {
        "model_type": types[info.arch],
        "num_attention_heads": _heads(info.metadata, f"{info.arch}.attention.head_count"),
        "num_key_value_heads": _heads(info.metadata, f"{info.arch}.attention.head_count_kv"),
    }


def _write(adapter: Path, place: Path, runtime: str, file: Path) -> None:
    bundle = read_bundle(place, check_digests=False)
    if runtime == "llama.cpp":
        from edgealign.runtimes.gguf_adapter import write_lora_gguf

        write_lora_gguf(adapter, file, base_config=gguf_config(bundle.model_file))
        return
    from edgealign.runtimes.lora_inputs import read_inputs

    if runtime == "onnxruntime":
        from edgealign.runtimes.onnx_adapter import write_lora_onnx

        write_lora_onnx(adapter, file, inputs=read_inputs(bundle.path))
    else:
        from edgealign.runtimes.executorch_adapter import write_lora_executorch

        write_lora_executorch(adapter, file, inputs=read_inputs(bundle.path))


def _heads(metadata: Mapping[str, Any], key: str) -> int:
    """A number of heads; where layers differ (a convolution has none) the attention layers'."""
    value = metadata.get(key) or 0
    return int(max(value) if isinstance(value, (list, tuple)) else value)
