"""How should a user's LoRA reach an ExecuTorch program? As inputs of a method, or as constants in a file of data.

    python benchmarks/executorch_adapters.py --model MODEL --work DIR --threads 1 2 --out OUT

`inputs` is what `edgealign export` writes: A and B are inputs of `adapted`, swapping users hands other tensors in.
`constants` has A and B as weights of XNNPACK's own layers, kept outside the program in a `.ptd` file. XNNPACK finds
them by the digest of their bytes, so that each user's file is written under the keys of the matrices that stood in for
them at export ("re-keyed"); swapping users loads the program again. `base` is `forward`, without any.

Each variant is lowered once into DIR (minutes; what is there is kept). Then every cell runs in a fresh process, the
variants taking turns. Both must agree with each other on a user's logits before anything is timed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

EXPORT = Path(__file__).resolve().parents[1] / "export"
VARIANTS = ("base", "inputs", "constants")
GAP = 0.05  # standard deviations of the logits; the two add in another order and 8-bit activations carry a flip on


def lower(model: Path, work: Path, *, rank: int, context: int, quant: str) -> None:
    """Make both programs, and the file of a random user for each."""
    sys.path.insert(0, str(EXPORT))
    import executorch_lower
    from executorch_model import adaptable

    from edgealign.runtimes.lora_inputs import read_inputs

    started = time.perf_counter()
    if not (work / "inputs/model.pte").is_file():
        (work / "inputs").mkdir(parents=True, exist_ok=True)
        executorch_lower.write_program(model, work / "inputs/model.pte", quant=quant, digest="", context=context)
        _note(work, "inputs", time.perf_counter() - started)
    rng = np.random.default_rng(0)
    user = {}
    for entry in read_inputs(work / "inputs"):
        user[entry.a] = rng.normal(0, 0.01, (1, entry.columns, rank)).astype(np.float32)
        user[entry.b] = rng.normal(0, 0.01, (1, rank, entry.out)).astype(np.float32)
    if (work / "constants/user.ptd").is_file():
        return
    started = time.perf_counter()
    template = _lower_with_constants(executorch_lower, adaptable, model, work / "constants", rank, context, quant)
    _write_data(work / "constants", template, user)
    from safetensors.numpy import save_file

    save_file(user, work / "inputs/user.safetensors", metadata={"edgealign.base_digest": ""})
    _note(work, "constants", time.perf_counter() - started)


def _lower_with_constants(
    lowering: Any, adaptable: Any, model: Path, folder: Path, rank: int, context: int, quant: str
) -> dict[str, bytes]:
    """The other program: pairs of small layers beside each layer. Returns input name -> bytes of its stand-in."""
    import executorch_model
    import torch
    from executorch.exir.passes.external_constants_pass import delegate_external_constants_pass_unlifted

    from edgealign.models.load import read_config
    from edgealign.runtimes.executorch_names import FORWARD, architecture

    folder.mkdir(parents=True, exist_ok=True)
    config = read_config(model)
    batch = min(lowering.BATCH, context)

    def through_layers(x: Any, pair: Any) -> Any:
        return pair[1](pair[0](x))

    executorch_model.low_rank = through_layers
    with lowering.quiet():
        net = executorch_model.build(model, architecture("lfm2"), config, context=context, batch=batch)
        if quant != "fp32":
            executorch_model.round_weights(net, model)
        torch.manual_seed(0)
        template = {}
        for place in adaptable(net):
            place.lora_a = torch.nn.Linear(place.entry.columns, rank, bias=False).requires_grad_(False)
            place.lora_b = torch.nn.Linear(rank, place.entry.out, bias=False).requires_grad_(False)
            template[place.entry.a] = place.lora_a.weight.numpy().tobytes()
            template[place.entry.b] = place.lora_b.weight.numpy().tobytes()

        class Fixed(executorch_model.Program):
            def forward(self, tokens: Any, input_pos: Any, *_: Any) -> Any:
                for convolution in self.convolutions:
                    convolution.keep = (input_pos > 0).to(torch.float32)
                for place in self.places:
                    place.pair = (place.lora_a, place.lora_b)
                return self.net(tokens, {"input_pos": input_pos})

        def tag(node: Any) -> str | None:
            return "lora" if "lora_" in f"{node.target}{node.name}" else None

        graph = lowering._trace(Fixed(net, adapted=False), (), batch).module()
        delegate_external_constants_pass_unlifted(module=graph, gen_tag_fn=tag)
        length = torch.export.Dim("length", max=batch - 1)
        example = (torch.tensor([[2, 3, 4]]), torch.tensor([0]))
        graph = torch.export.export(graph, example, dynamic_shapes=({1: length}, None), strict=False)
        program = lowering.lower({FORWARD: graph.run_decompositions({})}, {"get_vocab_size": int(net.vocab_size)})
        with open(folder / "model.pte", "wb") as file:
            program.write_to_file(file)
        program.write_tensor_data_to_file(str(folder))
    return template


def _write_data(folder: Path, template: dict[str, bytes], user: dict[str, Any]) -> None:
    """The user's matrices under the stand-ins' keys, as (out, in) layers hold them."""
    from executorch.exir._serialize._cord import Cord
    from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer

    serializer = FlatTensorSerializer()
    payload = serializer.deserialize(Cord((folder / "lora.ptd").read_bytes()))
    keys = {hashlib.sha256(raw).hexdigest(): name for name, raw in template.items()}
    buffers = list(payload.buffers)
    missing = set(keys)
    for key, entry in payload.named_data.items():
        if key in keys:
            buffers[entry.buffer_index] = np.ascontiguousarray(user[keys[key]][0].T).tobytes()
            missing.discard(key)
    assert not missing, f"{len(missing)} matrices are not in the file of data"
    payload.buffers = buffers
    (folder / "user.ptd").write_bytes(bytes(serializer.serialize(payload)))


def work_cell(job: dict[str, Any]) -> dict[str, Any]:
    """One process: load, swap, prefill, decode; seconds."""
    sys.path.insert(0, str(EXPORT))
    import torch

    from edgealign.bench.machine import peak_bytes
    from edgealign.runtimes.executorch_adapter import read_lora_executorch
    from edgealign.runtimes.executorch_session import _load_runtime
    from edgealign.runtimes.lora_inputs import read_inputs

    runtime, folder, variant = _load_runtime(job["threads"]), Path(job["folder"]), job["variant"]
    data = str(folder / "user.ptd") if variant == "constants" else None
    started = time.perf_counter()
    program = runtime.load_program(str(folder / "model.pte"), data_path=data)
    method = program.load_method("adapted" if variant == "inputs" else "forward")
    load_s = time.perf_counter() - started
    matrices: list[Any] = []
    started = time.perf_counter()
    if variant == "inputs":
        values = read_lora_executorch(folder / "user.safetensors").values
        matrices = [torch.from_numpy(values[name]) for entry in read_inputs(folder) for name in (entry.a, entry.b)]
    elif variant == "constants":
        again = runtime.load_program(str(folder / "model.pte"), data_path=data)
        again.load_method("forward")
    swap_s = time.perf_counter() - started if variant != "base" else None
    ids = torch.from_numpy(np.random.default_rng(1).integers(3, 400, (1, job["prompt"])))
    prefill, decode = [], []
    for _ in range(job["rounds"] + 1):
        started = time.perf_counter()
        logits = method.execute((ids, torch.tensor([0]), *matrices))[0]
        between = time.perf_counter()
        for place in range(job["gen"]):
            method.execute((ids[:, place : place + 1], torch.tensor([job["prompt"] + place]), *matrices))
        prefill.append(job["prompt"] / (between - started))
        decode.append(job["gen"] / (time.perf_counter() - between))
    return {
        "load_s": load_s, "swap_s": swap_s, "prefill": prefill[1:], "decode": decode[1:], "peak_bytes": peak_bytes(),
        "logits": logits.reshape(-1)[:512].tolist(),
    }  # fmt: skip


def measure(
    work: Path, *, threads: Sequence[int], prompt: int, gen: int, rounds: int, turns: int
) -> list[dict[str, Any]]:
    """Every variant at every number of threads, taking turns; checks that both carriers say the same."""
    rows: list[dict[str, Any]] = []
    for turn in range(turns):
        for count in threads:
            for variant in VARIANTS[:: 1 if turn % 2 else -1]:
                folder = work / ("constants" if variant == "constants" else "inputs")
                job = {"variant": variant, "folder": str(folder), "threads": count, "prompt": prompt, "gen": gen,
                       "rounds": rounds}  # fmt: skip
                done = subprocess.run(
                    [sys.executable, __file__, "--cell", json.dumps(job)], capture_output=True, text=True, check=True
                )
                rows.append({**job, "turn": turn, **json.loads(done.stdout.splitlines()[-1])})
                speed = statistics.median(rows[-1]["decode"])
                print(f"{variant}, {count} threads: decode {speed:.1f} tok/s", file=sys.stderr)
    logits = {row["variant"]: np.array(row["logits"]) for row in rows}
    gap = float(np.abs(logits["inputs"] - logits["constants"]).max() / logits["base"].std())
    moved = float(np.abs(logits["inputs"] - logits["base"]).max() / logits["base"].std())
    assert gap < GAP < moved, f"the carriers differ by {gap:.3f} and the user moves by {moved:.3f}"
    return [{name: value for name, value in row.items() if name not in ("logits", "folder")} for row in rows]


def render(result: dict[str, Any]) -> str:
    """The medians with the range over all rounds of all turns."""
    lines = ["| variant | threads | load s | swap ms | prefill tok/s | decode tok/s | peak MiB |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for count in sorted({row["threads"] for row in result["rows"]}):
        for variant in VARIANTS:
            rows = [row for row in result["rows"] if row["variant"] == variant and row["threads"] == count]
            cells = [_range([row["load_s"] for row in rows], 1)]
            cells.append("" if variant == "base" else _range([1e3 * row["swap_s"] for row in rows], 0))
            cells += [_range([value for row in rows for value in row[name]], 1) for name in ("prefill", "decode")]
            cells.append(_range([row["peak_bytes"] / 2**20 for row in rows], 0))
            lines.append(f"| {variant} | {count} | {' | '.join(cells)} |")
    lines += ["", f"Model {result['model']}, {result['quant']}, rank {result['rank']}; prompt {result['prompt']}, then "
              f"{result['gen']} tokens one by one. Medians, lowest to highest in brackets.", ""]  # fmt: skip
    card = result["machine"]
    lines += [f"- {name}: {card[name]}" for name in ("cpu", "flags", "cores_usable", "os", "cpu_busy_before")]
    lines += [f"- lowering, s: {result['lowering_s']}", f"- command: `{result['command']}`"]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Lower, measure, write `result.json` and `table.md`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quant", default="8da4w")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    for name, value in (("rank", 8), ("context", 1024), ("prompt", 511), ("gen", 64), ("rounds", 3), ("turns", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args(argv)
    if given.cell:
        print(json.dumps(work_cell(json.loads(given.cell))))
        return 0
    if not (given.model and given.work and given.out):
        parser.error("--model, --work and --out are needed")
    from edgealign.bench.machine import machine_card

    lower(given.model, given.work, rank=given.rank, context=given.context, quant=given.quant)
    rows = measure(
        given.work, threads=given.threads, prompt=given.prompt, gen=given.gen, rounds=given.rounds, turns=given.turns
    )
    command = f"python benchmarks/executorch_adapters.py --model {given.model.name} --work DIR --out DIR"
    result = {**{name: getattr(given, name) for name in ("quant", "rank", "prompt", "gen")}, "model": given.model.name,
              "machine": machine_card(), "lowering_s": json.loads((given.work / "lowering.json").read_text()),
              "command": command, "rows": rows}  # fmt: skip
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (given.out / "table.md").write_text(render(result), encoding="utf-8")
    print(render(result))
    return 0


def _range(values: Sequence[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _note(work: Path, name: str, seconds: float) -> None:
    file = work / "lowering.json"
    noted = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**noted, name: round(seconds)}))


if __name__ == "__main__":
    sys.exit(main())
