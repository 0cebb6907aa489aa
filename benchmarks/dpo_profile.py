"""Where does a step of preference training spend its time, and what does it hold in memory?

    python benchmarks/dpo_profile.py --shape starter --kind full
    python benchmarks/dpo_profile.py --shape starter --kind lora --operators 25

What is trained is what `dpo_vs_trl.py` trains (random weights and pairs, batches of 8). Parts of a step are timed by
wrapping the functions that do them, in CPU time, which a busy machine changes little; `--operators N` adds
torch.profiler's table of the N dearest operators of two steps. Shares say where time goes; how long a step takes is for
a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fit_vs_trl import random_pairs

from edgealign.bench.machine import peak_bytes

PARTS = (
    "layout", "decoder forward", "vocabulary forward", "loss", "backward, decoder", "backward, vocabulary", "clipping",
    "optimizer", "the rest",
)  # fmt: skip


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

    from edgealign.train import logprobs, scoring, tasks, trainer

    clock.wrap(scoring.Passes, "batch", "layout")
    clock.wrap(logprobs, "hidden_states", "decoder forward")
    clock.wrap(scoring, "token_logprobs", "vocabulary forward")
    clock.wrap(tasks.PreferenceTask, "loss", "loss")
    clock.wrap(torch.Tensor, "backward", "backward, decoder")
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
    from edgealign.train.precision import choose_precision, count_parameters
    from edgealign.train.recipes import PreferenceRecipe
    from edgealign.train.scoring import Passes, score
    from edgealign.train.tasks import PerToken, PreferenceTask
    from edgealign.train.trainer import fit

    if args.threads:
        torch.set_num_threads(args.threads)
    lora = args.kind == "lora"
    memory = {"imports": peak_bytes()}
    network: Any = load_model(model_dir)
    vocab = int(network.config.vocab_size)
    pairs = random_pairs((args.steps + 1) * args.batch, prompt_tokens=60, pair_tokens=280, vocab=vocab, seed=0)
    trees = [pair(*row) for row in pairs]
    recipe = PreferenceRecipe(
        batch_size=args.batch, learning_rate=1e-5, schedule="constant", warmup_share=0.0, lora=lora,
        precision=args.dtype, save_every_s=0.0,
    )  # fmt: skip
    precision = choose_precision(args.dtype, lora=lora, n_parameters=count_parameters(network))
    passes = Passes.of(network, precision, tokens_per_pass=recipe.tokens_per_pass)
    memory["model"] = peak_bytes()
    start_s = time.process_time()
    reference = PerToken.of(score(network, trees, passes), trees)
    reference_s = (time.process_time() - start_s) / (args.steps + 1)
    memory["reference"] = peak_bytes()
    if lora:
        network = add_lora(network, rank=8, alpha=16, seed=0)
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
        start_s = time.process_time()
        train(args.steps, two)
        whole_s = time.process_time() - start_s
    seconds = {name: clock.seconds[name] / args.steps for name in PARTS}
    return {
        "parts_s": seconds, "step_s": sum(seconds.values()), "whole_s": whole_s / args.steps,
        "reference_s": reference_s, "peak_bytes": memory,
    }  # fmt: skip


def render(found: dict[str, Any]) -> str:
    """Shares of a step, the reference beside it, and memory."""
    step_s = found["step_s"]
    lines = ["| part | share of a step | ms |", "|---|---|---|"]
    lines += [f"| {name} | {value / step_s:.1%} | {1e3 * value:.1f} |" for name, value in found["parts_s"].items()]
    lines += [
        f"| a step | | {1e3 * step_s:.1f} |",
        f"| reference, once for the data | {found['reference_s'] / step_s:.1%} | {1e3 * found['reference_s']:.1f} |",
        "", "Peak memory, MiB, after: "
        + ", ".join(f"{name} {(value or 0) / 2**20:.0f}" for name, value in found["peak_bytes"].items()),
    ]  # fmt: skip
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="starter")
    parser.add_argument("--kind", choices=("full", "lora"), default="full")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=0, help="0: all that this process may use")
    parser.add_argument("--operators", type=int, default=0, help="also show so many of the dearest operators")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    from edgealign.models import create
    from edgealign.models.recipes import InitRecipe

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        create.run(InitRecipe(shape=args.shape), text=[], out=model)
        found = profile(args, model)
    print(json.dumps(found) if args.json else render(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
