"""Against the limit: what share of the machine's read bandwidth a decode speed uses.

A decoded token reads the model's weights once, so decoding cannot be faster than bandwidth / bytes per token. The bytes
are counted by the reader of each format, beside it; adding a target is one line here. Counted are the weights that a
token touches: of an embedding table one row (all of it where it is the head too), of experts those in use. The KV
cache, the convolution's state and activations are not counted, so the share is a lower bound, most of all after long
prompts. An adapter that is on is counted with the size of its file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgealign.errors import EdgealignError
from edgealign.registry import Registry
from edgealign.runtimes.session import Bundle

# A target's function takes the model file and returns the bytes of weights that one decoded token reads.
READERS = Registry(
    "target",
    {
        "gguf": "edgealign.runtimes.gguf_header:count_token_bytes",
        "onnx": "edgealign.runtimes.onnx_weights:count_token_bytes",
        "executorch": "edgealign.runtimes.executorch_weights:count_token_bytes",
    },
)


def count_token_bytes(bundle: Bundle) -> dict[str, Any]:
    """`bytes` per decoded token (None if the file cannot be read) and how they were counted."""
    if bundle.target not in READERS.names():
        return {"bytes": bundle.model_bytes, "how": "the size of the whole model file: an upper bound"}
    try:
        return {"bytes": int(READERS.load(bundle.target)(bundle.model_file)), "how": "weights that a token touches"}
    except EdgealignError as error:
        return {"bytes": None, "how": error.line()}


def bandwidth_share(result: Mapping[str, Any], row: Mapping[str, Any]) -> float | None:
    """Bytes read per second at a decode row's median speed over the measured bandwidth; None if one is unknown."""
    bundle = next((entry for entry in result["bundles"] if entry["bundle"] == row["bundle"]), None)
    limit = next(
        (entry["bytes_per_s"] for entry in result["bandwidth"] if entry["threads"] in (row["n_threads"], None)), None
    )
    if bundle is None or not limit or not row["median_ts"] or not bundle["token_bytes"]["bytes"]:
        return None
    read = bundle["token_bytes"]["bytes"] + bundle["adapter_bytes"].get(row["user"], 0)
    return float(read * row["median_ts"] / limit)
