"""A bundle of a named shape with random weights, for measuring speed: no parity gate, and not to be shipped.

    python benchmarks/random_bundle.py --init lfm2-350m --model runs/m
    python benchmarks/random_bundle.py --init lfm2-350m --set hidden_size=64 --set vocab_size=512 --model runs/thin
    python benchmarks/random_bundle.py --model runs/m --target gguf --quant q4_0 --context 2112 --out runs/b

The export functions of `export/` are called without the gate around them, which would load the model in 32 bits to find
out what is known of random weights. The manifest says so. The last line on standard output is JSON: the seconds, and
the peak memory of this process or of the largest of its children.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from edgealign.artifact import open_artifact, publish
from edgealign.bench.machine import peak_bytes
from edgealign.errors import EdgealignError, UsageError

EXPORT = Path(__file__).resolve().parents[1] / "export"
FILES = {"gguf": "model.gguf", "onnx": "model.onnx", "executorch": "model.pte"}
KEPT = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def make_model(shape: str, changed: Mapping[str, object], out: Path) -> None:
    """Random weights in 16 bits, which is what models are published in; the tokenizer is trained on nothing much.

    Args:
        changed: fields of the shape's configuration that are to be other ones.
    """
    from edgealign.models import create
    from edgealign.models.recipes import InitRecipe
    from edgealign.models.shapes import SHAPES

    if changed:  # for this process
        SHAPES[shape] = replace(SHAPES[shape], facts={**SHAPES[shape].facts, **changed})
    create.run(InitRecipe(shape=shape, dtype="bfloat16"), text=[], out=out)


def make_bundle(model: Path, target: str, quant: str, context: int, out: Path, head: str | None = None) -> None:
    """Publish the bundle, with the reason for its missing checks in its recipe."""
    sys.path.insert(0, str(EXPORT))
    digest = open_artifact(model, kind="model", check_digests=False).digest
    gate = "none was run: random weights, for speed only"
    recipe = {"quant": quant, "head_type": head, "context": context, "gate": gate}
    with publish(out, kind="bundle", format=target, stage="random_bundle", recipe=recipe) as draft:
        if target == "gguf":
            from gguf_model import write_model as write_gguf
            from gguf_quantize import quantize

            from edgealign.tensor_types import Mixture

            whole = draft.dir / "whole.gguf"
            write_gguf(model, whole, digest=digest)
            quantize(whole, draft.dir / FILES[target], Mixture(quant, head), importance=None, threads=0)
            whole.unlink()
        elif target == "executorch":
            from executorch_lower import write_program

            write_program(model, draft.dir / FILES[target], quant=quant, digest=digest, context=context)
        else:
            from genai_model import write_model as write_onnx

            write_onnx(model, draft.dir, quant=quant, digest=digest, context=context)
        for name in KEPT:
            shutil.copy(model / name, draft.dir / name)
        draft.meta.update(
            target=target, quant=quant, model_file=FILES[target], adapters={}, model_digest=digest,
            weights="random weights",
        )  # fmt: skip


def read_changes(items: Sequence[str]) -> dict[str, object]:
    """`name=value` items, the values in JSON."""
    found: dict[str, object] = {}
    for item in items:
        name, _, value = item.partition("=")
        try:
            found[name] = json.loads(value)
        except ValueError as error:
            raise UsageError(item, "is not name=value with a JSON value", "for example: hidden_size=64") from error
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the model directory; made by --init")
    parser.add_argument("--init", metavar="SHAPE", help="make --model with random weights and stop")
    parser.add_argument("--set", metavar="NAME=JSON", action="append", default=[], help="change the shape; repeatable")
    parser.add_argument("--target", choices=tuple(FILES))
    parser.add_argument("--quant")
    parser.add_argument("--head", metavar="TYPE", help="how a GGUF file stores the head")
    parser.add_argument("--context", type=int, default=4096, help="positions of a graph or a program")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    start_s = time.perf_counter()
    try:
        if given.init:
            make_model(given.init, read_changes(given.set), given.model)
        elif given.target and given.quant and given.out:
            make_bundle(given.model, given.target, given.quant, given.context, given.out, given.head)
        else:
            raise UsageError("--target, --quant, --out", "are needed for a bundle", "see --help")
    except EdgealignError as error:
        print(json.dumps({"error": [error.value, error.reason, error.fix]}))
        print(error.line(), file=sys.stderr)
        return error.exit_code
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    cost = {"seconds": time.perf_counter() - start_s, "peak_bytes": max(peak_bytes() or 0, children)}
    print(json.dumps(cost))
    return 0


if __name__ == "__main__":
    sys.exit(main())
