"""Where does a step of preference training spend its time, and what does it hold in memory?

    python benchmarks/dpo_profile.py --shape starter --threads 1 --out docs/results/dpo_profile
    python benchmarks/dpo_profile.py --shape starter --kinds lora --operators 25

What is trained is what `dpo_vs_trl.py` trains (random weights and pairs, batches of 8). Parts of a step are timed by
wrapping the functions that do them, in CPU time, which a busy machine changes little; `--operators N` adds
torch.profiler's table of the N dearest operators of two steps. Shares say where time goes; how long a step takes is for
a quiet machine.

Share of the peak: the matrix products that the step cannot do without (`operations`), by its CPU time, against one
large product in the same type on the same threads, timed before and after.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fit_vs_trl import random_pairs
from result_files import write_results

from edgealign.bench.machine import busy, machine_card, peak_bytes

PARTS = (
    "layout", "decoder forward", "vocabulary forward", "loss", "backward, decoder", "backward, vocabulary", "clipping",
    "optimizer", "the rest",
)  # fmt: skip


PROMPT_TOKENS, PAIR_TOKENS, RANK = 60, 280, 8


class Clock:
    """Seconds by part. A part inside another is taken off the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._inner.append(0.0)
        start_s = time.process_time()
        try:
            yield
        finally:
            spent_s = time.process_time() - start_s
            self.seconds[name] += spent_s - self._inner.pop()
            if self._inner:
                self._inner[-1] += spent_s

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Replace a function for as long as this process lives."""
        plain: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return plain(*args, **kwargs)

        setattr(owner, name, staticmethod(timed) if isinstance(vars(owner).get(name), staticmethod) else timed)


def watch(clock: Clock) -> None:
    """Time every part of a step."""
    import torch

    from edgealign.train import logprobs, preference_task, scoring, trainer

    clock.wrap(scoring.Passes, "batch", "layout")
    clock.wrap(logprobs, "hidden_states", "decoder forward")
    clock.wrap(scoring, "token_logprobs", "vocabulary forward")
    clock.wrap(preference_task.PreferenceTask, "loss", "loss")
    clock.wrap(torch.autograd, "backward", "backward, decoder")
    clock.wrap(logprobs._ChunkedLogProb, "backward", "backward, vocabulary")
    clock.wrap(torch.nn.utils, "clip_grad_norm_", "clipping")
    clock.wrap(torch.optim.AdamW, "step", "optimizer")
    clock.wrap(trainer.AlignTrainer, "training_step", "the rest")


def profile(args: argparse.Namespace, model_dir: Path) -> dict[str, Any]:
    """Train `args.steps` steps after one to warm up; seconds a step by part, and memory after each stage."""
    import torch

    from edgealign.models.load import load_model
    from edgealign.objectives.table import find
    from edgealign.train.adapt import add_lora
    from edgealign.train.layout import pair
    from edgealign.train.precision import choose_precision
    from edgealign.train.preference_task import PreferenceTask
    from edgealign.train.recipes import PreferenceRecipe
    from edgealign.train.scoring import Passes, score, tokens_of_pass
    from edgealign.train.speed import matmul_flops
    from edgealign.train.tasks import PerToken
    from edgealign.train.trainer import fit

    if args.threads:
        torch.set_num_threads(args.threads)
    lora = args.kind == "lora"
    memory = {"imports": peak_bytes()}
    precision = choose_precision(args.dtype, lora=lora, n_parameters=0)
    network: Any = load_model(model_dir, dtype=precision.weights)  # as `edgealign dpo` loads it
    pairs = random_pairs(
        (args.steps + 1) * args.batch, prompt_tokens=PROMPT_TOKENS, pair_tokens=PAIR_TOKENS,
        vocab=int(network.config.vocab_size), seed=0,
    )  # fmt: skip
    trees = [pair(*row) for row in pairs]
    recipe = PreferenceRecipe(
        batch_size=args.batch, learning_rate=1e-5, schedule="constant", warmup_share=0.0, lora=lora,
        precision=args.dtype, save_every_s=0.0,
    )  # fmt: skip
    passes = Passes.of(network, precision, tokens_per_pass=tokens_of_pass(network, lora=lora))
    memory["model"] = peak_bytes()
    start_s = time.process_time()
    reference = PerToken.of(score(network, trees, passes), trees)
    reference_s = (time.process_time() - start_s) / (args.steps + 1)
    memory["reference"] = peak_bytes()
    if lora:
        network = add_lora(network, rank=RANK, alpha=16, seed=0)
    needed = operations(network, trees[: args.batch], lora=lora)
    task = PreferenceTask(trees, find("ln_dpo"), 5.0, reference)

    def train(count: int, work: str) -> None:
        steps = PreferenceTask(trees[: count * args.batch], task.objective, task.beta, reference)
        fit(network, steps, recipe, passes=passes, work=Path(work), order=lambda epoch: range(len(steps.trees)))

    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two, \
            tempfile.TemporaryDirectory() as three:  # fmt: skip
        train(1, one)
        memory["training"] = peak_bytes()
        clock = Clock()
        if args.operators:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
                train(2, three)
            table = found.key_averages().table(sort_by="self_cpu_time_total", row_limit=args.operators)
            print(table, file=sys.stderr)
        watch(clock)
        kind = torch.bfloat16 if precision.autocast else torch.float32
        peaks = [matmul_flops(torch.device("cpu"), kind)]
        start_s = time.process_time()
        train(args.steps, two)
        whole_s = time.process_time() - start_s
        peaks.append(matmul_flops(torch.device("cpu"), kind))
    seconds = {name: clock.seconds[name] / args.steps for name in PARTS}
    step_s, peak = sum(seconds.values()), max(peaks)
    return {
        "parts_s": seconds, "step_s": step_s, "whole_s": whole_s / args.steps, "reference_s": reference_s,
        "peak_bytes": memory, "operations": needed, "peak_flops": peak,
        "peak_share": needed / (step_s / torch.get_num_threads() * peak),
    }  # fmt: skip


def operations(network: Any, trees: Sequence[Any], *, lora: bool) -> float:
    """Matrix products that a step over `trees` needs, in operations (a multiply-add is two).

    A weight costs two operations a token forward, two for the gradient that passes through and, where it learns, two
    for its own; the vocabulary only at learned tokens; attention's two products half of a token's own path on average.
    """
    config = network.config
    vocabulary = int(config.vocab_size) * int(config.hidden_size)
    learned = int(sum(p.numel() for p in network.parameters() if p.requires_grad))
    frozen = int(sum(p.numel() for p in network.parameters())) - learned
    tokens, asked = int(sum(tree.n_tokens for tree in trees)), int(sum(tree.n_learned for tree in trees))
    layers = int(sum(kind == "full_attention" for kind in config.layer_types))
    path = PROMPT_TOKENS + (PAIR_TOKENS - PROMPT_TOKENS) / 2
    attention = 6.0 * path * int(config.hidden_size) * layers * tokens
    if lora:
        return (4.0 * (frozen - vocabulary) + 6.0 * learned) * tokens + 4.0 * vocabulary * asked + attention
    return 6.0 * (learned - vocabulary) * tokens + 6.0 * vocabulary * asked + attention


def render(result: dict[str, Any]) -> str:
    """Shares of a step by kind, the reference beside it, memory and the share of the machine's peak."""
    found, settings = result["kinds"], result["settings"]
    kinds = [{"full": "full weights", "lora": "a LoRA"}[kind] for kind in found]
    lines = [
        f"{settings['shape']}, random weights, batches of {settings['batch']} pairs of {PAIR_TOKENS} tokens that share "
        f"a prompt of {PROMPT_TOKENS}, {settings['dtype']}, threads: {settings['threads'] or 'all'}; "
        f"{result['machine']['cpu']}{'' if result['quiet'] else ' (not quiet: read shares, not times)'}. Shares of a "
        "step's CPU time.", "", f"| part | {' | '.join(kinds)} |", "|---" * (1 + len(kinds)) + "|",
    ]  # fmt: skip
    rows = {name: [f"{each['parts_s'][name] / each['step_s']:.1%}" for each in found.values()] for name in PARTS}
    rows["a step, ms of CPU time"] = [f"{1e3 * each['step_s']:.0f}" for each in found.values()]
    rows["the reference, once for the data, in steps"] = [
        f"{each['reference_s'] / each['step_s']:.2f}" for each in found.values()
    ]
    rows["operations needed, GFLOP a step"] = [f"{each['operations'] / 1e9:.0f}" for each in found.values()]
    rows["peak of one large product, GFLOP/s"] = [f"{each['peak_flops'] / 1e9:.0f}" for each in found.values()]
    rows["share of that peak"] = [f"{each['peak_share']:.0%}" for each in found.values()]
    for stage in ("imports", "model", "reference", "training"):
        rows[f"peak memory after {stage}, MiB"] = [
            f"{(each['peak_bytes'][stage] or 0) / 2**20:.0f}" for each in found.values()
        ]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="starter")
    parser.add_argument("--kinds", nargs="+", choices=("full", "lora"), default=["full", "lora"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--threads", type=int, default=0, help="0: all that this process may use")
    parser.add_argument("--operators", type=int, default=0, help="also show so many of the dearest operators")
    parser.add_argument("--out", type=Path, help="write table.md and result.json here")
    for hidden, kind in (("--kind", str), ("--model", Path)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.kind:  # the inside of a fresh process: peaks of memory are of one kind
        print(json.dumps(profile(args, args.model)))
        return 0
    from edgealign.models import create
    from edgealign.models.recipes import InitRecipe
    from edgealign.train.precision import native_bfloat16

    args.dtype = ("bfloat16" if native_bfloat16() else "float32") if args.dtype == "auto" else args.dtype
    card, kinds = machine_card(), {}
    names = ("shape", "batch", "steps", "dtype", "threads", "operators")
    settings = {name: getattr(args, name) for name in names}
    options = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        create.run(InitRecipe(shape=args.shape), text=[], out=model)
        for kind in args.kinds:
            command = [sys.executable, __file__, "--kind", kind, "--model", str(model), *options]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            kinds[kind] = json.loads(done.stdout.strip().splitlines()[-1])
    result = {"machine": card, "quiet": not busy(card), "settings": settings, "kinds": kinds}
    if args.out:
        write_results(args.out, result, render(result))
    print(render(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
