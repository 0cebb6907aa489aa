"""How fast is a per-user fit, against TRL's DPOTrainer with the same LoRA, loss, tokens and threads?

    python benchmarks/fit_vs_trl.py --repetitions 3 --json result.json          LFM2-350M shape, 8 pairs of 280 tokens
    python benchmarks/fit_vs_trl.py --shape tiny --pairs 4 --pair-tokens 60     a quick look

Weights and token ids are random: speed depends on neither. Each run is a fresh process and the variants take turns,
so that drift hits all. Timed is the training itself (TRL: `trainer.train()`; ours: from putting the LoRA on to the
last optimizer step, reference log-probabilities included); loading and imports are reported apart.

    trl          DPOTrainer as it comes (bf16 autocast over fp32 weights, gradient checkpointing), batch 8
    trl-tuned    without gradient checkpointing, which costs a forward pass (bf16 weights make TRL slower, not faster)
    ours         `edgealign.personalize.fit` with the same loss; bf16 weights and products where native
    ours-anchor  what `edgealign personalize` does: plus the base's own answers, made and anchored

The first loss must be log 2 in all of them, or they do not compute the same thing.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgealign.bench.machine import busy, machine_card, peak_bytes
from edgealign.bench.timing import spread
from edgealign.progress import say, track

GOAL = 5.0
VARIANTS = ("trl", "trl-tuned", "ours", "ours-anchor")
RANK, ALPHA, BETA, LEARNING_RATE = 8, 16, 5.0, 1e-4


def random_pairs(
    count: int, *, prompt_tokens: int, pair_tokens: int, vocab: int, seed: int
) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, chosen, rejected) ids; lengths vary by a quarter, `pair_tokens` on average in all three together."""
    rng = random.Random(seed)
    answer = (pair_tokens - prompt_tokens) / 2

    def ids(mean: float) -> list[int]:
        return [rng.randrange(300, vocab) for _ in range(max(2, round(mean * rng.uniform(0.75, 1.25))))]

    return [(ids(prompt_tokens), ids(answer), ids(answer)) for _ in range(count)]


def fit_ours(model_dir: Path, pairs: Sequence[tuple[list[int], list[int], list[int]]], args: Any) -> dict[str, Any]:
    """One epoch with our loop."""
    from edgealign.models.lint import lora_targets
    from edgealign.models.load import load_model
    from edgealign.objectives.table import find
    from edgealign.personalize.anchor import base_answers
    from edgealign.personalize.fit import fit
    from edgealign.personalize.lowrank import wrap
    from edgealign.personalize.recipes import LoraRecipe
    from edgealign.train.layout import branches

    anchored = args.worker == "ours-anchor"
    network: Any = load_model(model_dir, dtype=args.dtype)
    recipe = LoraRecipe(epochs=1, learning_rate=LEARNING_RATE, anchor=1.0 if anchored else 0.0, chosen_nll=0.0)
    start_s = time.perf_counter()
    names = lora_targets(network).modules
    layers = wrap(network, names, rank=RANK, scale=ALPHA / RANK, seed=0)
    said: list[tuple[tuple[int, ...], ...]] = [()] * len(pairs)
    if anchored:
        prompts = [prompt for prompt, _, _ in pairs]
        answers = base_answers(network, prompts, n_tokens=recipe.anchor_tokens, end_id=7, pad_id=0)
        said = [(answer,) for answer in answers]
    trees = [branches(prompt, (y, n, *extra)) for (prompt, y, n), extra in zip(pairs, said, strict=True)]
    parameters = [p for layer in layers.values() for p in (layer.a, layer.b)]
    steps = fit(network, parameters, trees, recipe, objective=find("ln_dpo"), beta=BETA)
    return {
        "fit_s": time.perf_counter() - start_s, "first_loss": steps[0].preference, "steps": len(steps),
        "parameters": sum(p.numel() for p in parameters), "tokens": sum(tree.n_tokens for tree in trees),
    }


def fit_trl(model_dir: Path, pairs: Sequence[tuple[list[int], list[int], list[int]]], args: Any) -> dict[str, Any]:
    """One epoch with TRL; the token ids go in as they are, past its tokenisation."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    from edgealign.models.lint import lora_targets
    from edgealign.models.load import load_model, load_tokenizer

    tuned = args.worker == "trl-tuned"
    network: Any = load_model(model_dir)  # in float32, as TRL itself loads it
    names = list(lora_targets(network).modules)
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder, per_device_train_batch_size=8, num_train_epochs=1, loss_type=["sigmoid_norm"], beta=BETA,
            learning_rate=LEARNING_RATE, use_cpu=True, bf16=args.dtype == "bfloat16", gradient_checkpointing=not tuned,
            save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=1, seed=0, dataset_num_proc=None,
        )
        trainer = DPOTrainer(
            model=network, args=config, processing_class=load_tokenizer(model_dir),
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * len(pairs)),
            peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, task_type="CAUSAL_LM"),
        )
        trainer.train_dataset = Dataset.from_list(
            [{"prompt_ids": p, "chosen_ids": y, "rejected_ids": n} for p, y, n in pairs]
        )
        start_s = time.perf_counter()
        trainer.train()
        fit_s = time.perf_counter() - start_s
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    learned = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    tokens = sum(2 * len(p) + len(y) + len(n) for p, y, n in pairs)
    assert torch.get_num_threads() == args.threads
    return {"fit_s": fit_s, "first_loss": losses[0], "steps": trainer.state.global_step, "parameters": learned,
            "tokens": tokens}


def work(args: Any) -> None:
    """The inside of a fresh process: one run, one line of JSON."""
    import torch

    start_s = time.perf_counter()
    torch.set_num_threads(args.threads)
    vocab = json.loads((args.model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    pairs = random_pairs(
        args.pairs, prompt_tokens=args.prompt_tokens, pair_tokens=args.pair_tokens, vocab=vocab, seed=args.seed
    )
    result = (fit_trl if args.worker.startswith("trl") else fit_ours)(args.model, pairs, args)
    print(json.dumps({**result, "process_s": time.perf_counter() - start_s, "peak_bytes": peak_bytes()}))


def compare(args: Any) -> dict[str, Any]:
    """All variants, `repetitions` times in turn, each run in its own process."""
    card = machine_card()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in args.variants}
    order = [name for i in range(args.repetitions) for name in (args.variants if i % 2 == 0 else args.variants[::-1])]
    for name in track(order, label="runs"):
        command = [
            sys.executable, __file__, "--worker", name, "--model", str(args.model), "--dtype", args.dtype,
            *(part for key in ("pairs", "pair_tokens", "prompt_tokens", "threads", "seed")
              for part in (f"--{key.replace('_', '-')}", str(getattr(args, key)))),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
        runs[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
        say(f"{name}: {runs[name][-1]['fit_s']:.1f} s")
    return summarise(runs, args, card)


def summarise(runs: dict[str, list[dict[str, Any]]], args: Any, card: dict[str, Any]) -> dict[str, Any]:
    """Medians, spreads and ratios."""
    rows: dict[str, Any] = {}
    for name, samples in runs.items():
        fit_s = spread([sample["fit_s"] for sample in samples])
        rows[name] = {
            "fit_s": vars(fit_s), "pairs_per_s": args.pairs / fit_s.median,
            "process_s": spread([sample["process_s"] for sample in samples]).median,
            "peak_bytes": max(sample["peak_bytes"] or 0 for sample in samples),
            **{key: samples[0][key] for key in ("first_loss", "steps", "parameters", "tokens")}, "samples": samples,
        }
    peers = [rows[name]["pairs_per_s"] for name in rows if name.startswith("trl")]
    ours = rows.get("ours")
    ratios = {name: ours["pairs_per_s"] / rows[name]["pairs_per_s"] for name in rows if ours and name != "ours"}
    same = all(abs(row["first_loss"] - math.log(2)) < 0.02 for row in rows.values())
    reached = bool(ours and peers and same and ours["pairs_per_s"] >= GOAL * max(peers))
    return {
        "benchmark": "fit_vs_trl", "shape": args.shape, "weights": "random", "dtype": args.dtype, "pairs": args.pairs,
        "pair_tokens": args.pair_tokens, "prompt_tokens": args.prompt_tokens, "rank": RANK, "threads": args.threads,
        "repetitions": args.repetitions, "machine": card, "quiet": not busy(card), "variants": rows,
        "ours_is_times_faster_than": ratios, "first_losses_are_log_2": same, "goal": GOAL, "reached": reached,
    }


def render(result: dict[str, Any]) -> str:
    """The table."""
    lines = [
        f"{result['shape']} (random weights), {result['pairs']} pairs of about {result['pair_tokens']} tokens, "
        f"LoRA rank {result['rank']} on every linear layer, {result['dtype']}, {result['threads']} threads, "
        f"{result['repetitions']} runs each; {result['machine']['cpu']}"
        + ("" if result["quiet"] else " (NOT QUIET: numbers are not comparable)"),
        "",
        "| variant | fit, s (median) | sd | pairs/s | ours is faster by | peak GiB | whole process, s | first loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["variants"].items():
        ratio = result["ours_is_times_faster_than"].get(name)
        lines.append(
            f"| {name} | {row['fit_s']['median']:.2f} | {row['fit_s']['sd']:.2f} | {row['pairs_per_s']:.2f} | "
            f"{f'{ratio:.2f}x' if ratio else ''} | {row['peak_bytes'] / 2**30:.1f} | {row['process_s']:.1f} | "
            f"{row['first_loss']:.4f} |"
        )
    verdict = "reached" if result["reached"] else "not reached"
    return "\n".join([*lines, "", f"Goal: {result['goal']:g} times the quickest TRL variant: {verdict}."])


def parse(argv: Sequence[str] | None = None) -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="lfm2-350m")
    parser.add_argument("--model", type=Path, help="a model directory; none makes one of the shape")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--pair-tokens", type=int, default=280, help="prompt, chosen and rejected together")
    parser.add_argument("--prompt-tokens", type=int, default=60)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--threads", type=int, default=0, help="0: all that this process may use")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 when the goal is reached, 1 when it is not."""
    args = parse(argv)
    if args.worker:
        work(args)
        return 0
    from edgealign.bench.machine import usable_cores
    from edgealign.models import create
    from edgealign.models.recipes import InitRecipe
    from edgealign.train.precision import native_bfloat16

    args.threads = args.threads or usable_cores()
    if args.dtype == "auto":
        args.dtype = "bfloat16" if native_bfloat16() else "float32"
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            args.model = Path(folder) / "model"
            create.run(InitRecipe(shape=args.shape), text=[], out=args.model)
        result = compare(args)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(render(result))
    return 0 if result["reached"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
