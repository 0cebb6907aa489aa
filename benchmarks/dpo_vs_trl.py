"""How fast is preference training, against TRL's DPOTrainer with the same model, pairs, batch, steps and loss?

    python benchmarks/dpo_vs_trl.py --shapes starter --pairs 64 --out docs/results/dpo_vs_trl
    python benchmarks/dpo_vs_trl.py --shapes lfm2-350m --pairs 8 --batch 4 --out docs/results/dpo_vs_trl_350m
    python benchmarks/dpo_vs_trl.py --shapes starter --neighbours 1 --out docs/results/dpo_vs_trl_busy
    python benchmarks/dpo_vs_trl.py --shapes tiny --pairs 16 --repetitions 2          a quick look

Full weights and a LoRA on every linear layer, `sigmoid_norm` at beta 5, AdamW at a constant rate, batches in one order.
Weights and token ids are random; speed depends on neither. Each run is a fresh process and the variants take turns.
Timed is the training itself, reference log-probabilities included; imports and loading are not.

    trl          DPOTrainer as it comes (gradient checkpointing; the reference is a second model, or the LoRA off)
    trl-tuned    without gradient checkpointing, reference log-probabilities computed once; a LoRA's frozen weights
                 in bfloat16 where the products are
    ours         `edgealign.train.trainer.fit`, what `edgealign dpo` runs

The losses of all steps must agree to 1e-3 in 32 bits, or they do not compute the same thing: `--check` runs that
alone. It learns one batch over and over, because random pairs teach nothing about the next ones and a loss that stays
at ln 2 would agree with anything. The gap in the arithmetic of the race is reported beside it. `--out` gets table.md
and result.json.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fit_vs_trl import random_pairs
from neighbour import neighbours
from result_files import write_results

from edgealign.bench.machine import busy, machine_card, peak_bytes, usable_cores
from edgealign.bench.timing import spread
from edgealign.progress import say, track

VARIANTS = ("trl", "trl-tuned", "ours")
KINDS = ("full", "lora")
GOALS = {"full": 2.0, "lora": 5.0}
RANK, ALPHA, BETA = 8, 16, 5.0
RATES = {"full": 1e-4, "lora": 1e-3}
SAME = 1e-3


def train_ours(model_dir: Path, pairs: Sequence[Any], args: Any) -> dict[str, Any]:
    from edgealign.models.load import load_model
    from edgealign.objectives.table import find
    from edgealign.train.adapt import add_lora
    from edgealign.train.layout import pair
    from edgealign.train.precision import choose_precision
    from edgealign.train.preference_task import PreferenceTask
    from edgealign.train.recipes import PreferenceRecipe
    from edgealign.train.scoring import Passes, score
    from edgealign.train.tasks import PerToken
    from edgealign.train.trainer import fit

    lora = args.kind == "lora"
    recipe = PreferenceRecipe(
        batch_size=args.batch, learning_rate=RATES[args.kind], schedule="constant", warmup_share=0.0, lora=lora,
        rank=RANK, alpha=ALPHA, precision=args.dtype, save_every_s=0.0,
    )  # fmt: skip
    precision = choose_precision(args.dtype, lora=lora, n_parameters=0)
    network: Any = load_model(model_dir, dtype=precision.weights)  # as `edgealign dpo` loads it
    trees = [pair(*row) for row in pairs]
    with tempfile.TemporaryDirectory() as work:
        start_s = time.perf_counter()
        passes = Passes.for_training(network, precision, lora=lora)
        reference = PerToken.of(score(network, trees, passes), trees)
        if lora:
            network = add_lora(network, rank=RANK, alpha=ALPHA, seed=0)
        task = PreferenceTask(trees, find("ln_dpo"), BETA, reference)
        done = fit(network, task, recipe, passes=passes, work=Path(work), order=lambda epoch: range(len(trees)))
        seconds = time.perf_counter() - start_s
    return {"seconds": seconds, "losses": [row["loss"] for row in done.rows]}


def train_trl(model_dir: Path, pairs: Sequence[Any], args: Any) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    from edgealign.models.lint import lora_targets
    from edgealign.models.load import load_model, load_tokenizer

    class InOrder(DPOTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(dataset or self.train_dataset)

    tuned, lora = args.worker == "trl-tuned", args.kind == "lora"
    network: Any = load_model(model_dir, dtype=args.dtype if tuned and lora else "float32")
    names = list(lora_targets(network).modules)
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder, per_device_train_batch_size=args.batch, num_train_epochs=1, loss_type=["sigmoid_norm"],
            beta=BETA, learning_rate=RATES[args.kind], lr_scheduler_type="constant", use_cpu=True,
            bf16=args.dtype == "bfloat16", gradient_checkpointing=not tuned, precompute_ref_log_probs=tuned,
            save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=1, seed=0, dataset_num_proc=None,
        )  # fmt: skip
        peft = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, task_type="CAUSAL_LM") if lora else None
        torch.manual_seed(0)  # the LoRA's random half, as ours draws it
        trainer = InOrder(
            model=network, args=config, processing_class=load_tokenizer(model_dir), peft_config=peft,
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * len(pairs)),
        )
        trainer.train_dataset = Dataset.from_list(
            [{"prompt_ids": p, "chosen_ids": y, "rejected_ids": n} for p, y, n in pairs]
        )
        start_s = time.perf_counter()
        if tuned:  # it did so for the rows that were there when it was made
            trainer.train_dataset = trainer._precompute_ref_logps(trainer.train_dataset, "train", args.batch)
        trainer.train()
        seconds = time.perf_counter() - start_s
    return {"seconds": seconds, "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row]}


def work(args: Any) -> None:
    """The inside of a fresh process: one run, one line of JSON."""
    import torch

    torch.set_num_threads(args.threads)
    vocab = json.loads((args.model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    pairs = random_pairs(
        args.pairs, prompt_tokens=args.prompt_tokens, pair_tokens=args.pair_tokens, vocab=vocab, seed=args.seed
    )
    if args.one_batch:
        pairs = (pairs[: args.batch] * -(-args.pairs // args.batch))[: args.pairs]
    result = (train_trl if args.worker.startswith("trl") else train_ours)(args.model, pairs, args)
    print(json.dumps({**result, "peak_bytes": peak_bytes()}))


def run_one(variant: str, kind: str, dtype: str, model: Path, args: Any, *flags: str) -> dict[str, Any]:
    numbers = ("pairs", "pair_tokens", "prompt_tokens", "threads", "seed", "batch")
    command = [
        sys.executable, __file__, "--worker", variant, "--kind", kind, "--model", str(model), "--dtype", dtype,
        *(part for name in numbers for part in (f"--{name.replace('_', '-')}", str(getattr(args, name)))), *flags,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{variant} {kind} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def compare(shape: str, kind: str, model: Path, args: Any) -> dict[str, Any]:
    """One shape, full weights or LoRA: same losses in 32 bits, then speeds, the variants in turn."""
    losses = {name: run_one(name, kind, "float32", model, args, "--one-batch")["losses"] for name in ("trl", "ours")}
    gap, ours = largest_gap(losses["trl"], losses["ours"]), losses["ours"]
    say(f"{shape}, {kind}: {len(ours)} steps from {ours[0]:.3f} to {ours[-1]:.3f}, losses differ by at most {gap:.2g}")
    found: dict[str, Any] = {"shape": shape, "kind": kind, "loss_gap": gap, "losses": losses, "variants": {}}
    if args.check:
        return found
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    for number in track(range(args.repetitions), total=args.repetitions, label=f"{shape}, {kind}"):
        for name in VARIANTS if number % 2 == 0 else VARIANTS[::-1]:
            runs[name].append(run_one(name, kind, args.dtype, model, args))
    for name, samples in runs.items():
        seconds = spread([sample["seconds"] for sample in samples])
        found["variants"][name] = {
            "seconds": vars(seconds), "pairs_per_s": args.pairs / seconds.median,
            "peak_bytes": max(sample["peak_bytes"] or 0 for sample in samples), "samples": samples,
        }  # fmt: skip
    found["race_gap"] = largest_gap(runs["trl"][0]["losses"], runs["ours"][0]["losses"])
    ours, peers = found["variants"]["ours"], [found["variants"][name] for name in VARIANTS if name != "ours"]
    found["faster"] = {
        "default": ours["pairs_per_s"] / peers[0]["pairs_per_s"],
        "best": ours["pairs_per_s"] / max(peer["pairs_per_s"] for peer in peers),
    }
    found["memory"] = ours["peak_bytes"] / min(peer["peak_bytes"] for peer in peers)
    return found


def largest_gap(a: Sequence[float], b: Sequence[float]) -> float:
    """Largest difference of two loss curves, nats."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def render(result: Mapping[str, Any]) -> str:
    """Markdown."""
    settings, card = result["settings"], result["machine"]
    quiet = "" if result["quiet"] else " (NOT QUIET: numbers are not comparable)"
    others = settings.get("neighbours", 0)
    beside = f" (beside {others} busy process{'es' * (others > 1)})" if others else ""
    lines = [
        f"Random weights, {settings['pairs']} pairs of about {settings['pair_tokens']} tokens in batches of "
        f"{settings['batch']}, {settings['dtype']}, {settings['threads']} threads, {settings['repetitions']} runs each "
        f"in turn{beside}; {card['cpu']}{quiet}. Goal: 2 times TRL with full weights, 5 with a LoRA, half its memory.",
        "",
        f"| shape | | variant | training, s | pairs/s | ours is faster by | peak GiB | losses differ by, 32 bits | "
        f"{settings['dtype']} |", "|---" * 9 + "|",
    ]  # fmt: skip
    for found in result["comparisons"]:
        for name, row in found["variants"].items():
            ours = found["variants"]["ours"]["pairs_per_s"]
            ratio = "" if name == "ours" else f"{ours / row['pairs_per_s']:.2f}x"
            seconds = row["seconds"]
            lines.append(
                f"| {found['shape']} | {found['kind']} | {name} | {seconds['median']:.2f} ± {seconds['sd']:.2f} | "
                f"{row['pairs_per_s']:.2f} | {ratio} | {row['peak_bytes'] / 2**30:.2f} | {found['loss_gap']:.1g} | "
                f"{found['race_gap']:.1g} |"
            )
        if found["variants"]:
            speed, memory, same = (
                "reached" if reached else "not reached" for reached in (
                    found["faster"]["best"] >= GOALS[found["kind"]], found["memory"] <= 0.5, found["loss_gap"] <= SAME,
                )
            )  # fmt: skip
            least = f"{found['memory']:.2f}x TRL's least: {memory}"
            lines.append(f"| | | goal | | | {GOALS[found['kind']]:g}x: {speed} | {least} | {same} | |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 where the losses differ: then nothing else means anything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["starter", "lfm2-350m"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pair-tokens", type=int, default=280, help="prompt, chosen and rejected together")
    parser.add_argument("--prompt-tokens", type=int, default=60)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--threads", type=int, default=0, help="0: all that this process may use")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--neighbours", type=int, default=0, help="so many processes beside that never rest")
    parser.add_argument("--check", action="store_true", help="compare losses only")
    parser.add_argument("--out", type=Path, help="write table.md and result.json here")
    parser.add_argument("--one-batch", action="store_true", help=argparse.SUPPRESS)
    for hidden, kind in (("--worker", str), ("--kind", str), ("--model", Path)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        work(args)
        return 0
    from edgealign.models import create
    from edgealign.models.recipes import InitRecipe
    from edgealign.train.precision import native_bfloat16

    args.threads = args.threads or usable_cores()
    args.dtype = ("bfloat16" if native_bfloat16() else "float32") if args.dtype == "auto" else args.dtype
    card, comparisons = machine_card(), []
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            create.run(InitRecipe(shape=shape), text=[], out=model)
            with neighbours(args.neighbours):
                comparisons += [compare(shape, kind, model, args) for kind in args.kinds]
    names = ("pairs", "pair_tokens", "prompt_tokens", "batch", "dtype", "threads", "repetitions", "seed", "neighbours")
    result = {
        "benchmark": "dpo_vs_trl", "machine": card, "quiet": not busy(card), "comparisons": comparisons,
        "settings": {name: getattr(args, name) for name in names},
    }  # fmt: skip
    if args.out:
        write_results(args.out, result, render(result))
    print(render(result))
    return 0 if all(math.isfinite(each["loss_gap"]) and each["loss_gap"] <= SAME for each in comparisons) else 1


if __name__ == "__main__":
    raise SystemExit(main())
