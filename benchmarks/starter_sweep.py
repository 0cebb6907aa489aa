"""Which shape and optimizer for the starter? Every candidate trains for the same CPU time on the same rows.

    python benchmarks/starter_sweep.py --model M --data text/train.jsonl --valid text/valid.jsonl --cpu-seconds 160

`--model` gives the tokenizer. The budget is CPU time of this process, not wall time, so that a busy neighbour does not
change the result; the schedule (WSD) follows the budget. Results: one JSON line per candidate on standard output.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import torch

from edgealign.models.create import random_model
from edgealign.models.load import load_tokenizer
from edgealign.models.shapes import BOS_ID, EOS_ID, PAD_ID
from edgealign.progress import say
from edgealign.train.optimizers import build_optimizer
from edgealign.train.precision import choose_precision
from edgealign.train.recipes import PretrainRecipe
from edgealign.train.rows import PretrainTask, Rows, load_rows
from edgealign.train.schedule import learning_rate_share
from edgealign.train.scoring import Passes, evaluate
from edgealign.train.shortconv import tree_rows

MILLE = 1000  # the schedule's resolution


def shape(layers: int, attention: tuple[int, ...], d: int, ff: int, head: int = 64) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers, "hidden_size": d, "intermediate_size": ff, "num_attention_heads": d // head,
        "num_key_value_heads": max(1, d // head // 2),
        "layer_types": ["full_attention" if i in attention else "conv" for i in range(layers)],
    }


CANDIDATES: dict[str, tuple[dict[str, Any], str, float]] = {
    "8 layers, muon 3e-3": (shape(8, (2, 4, 6), 256, 768), "muon", 3e-3),
    "6 layers, muon 3e-3": (shape(6, (2, 4), 256, 768), "muon", 3e-3),
    "8 layers, adamw 3e-3": (shape(8, (2, 4, 6), 256, 768), "adamw", 3e-3),
    "10 narrow layers, muon 3e-3": (shape(10, (2, 5, 8), 256, 512), "muon", 3e-3),
    "8 layers, muon 8e-3": (shape(8, (2, 4, 6), 256, 768), "muon", 8e-3),
}


def config(facts: dict[str, Any], vocab_size: int) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(
        "lfm2", vocab_size=vocab_size, block_auto_adjust_ff_dim=False, max_position_embeddings=1024, conv_L_cache=3,
        norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=True,
        pad_token_id=PAD_ID, bos_token_id=BOS_ID, eos_token_id=EOS_ID, **facts,
    )


def train(
    name: str, rows: Rows, held: Rows, vocab_size: int, budget_s: float, recipe: PretrainRecipe
) -> dict[str, Any]:
    facts, optimizer_name, lr = CANDIDATES[name]
    model: Any = random_model(config(facts, vocab_size), seed=0, dtype="float32")
    n = sum(p.numel() for p in model.parameters())
    passes = Passes.of(model, choose_precision("bfloat16", lora=False, n_parameters=n), tokens_per_pass=4096)
    if optimizer_name == "muon":
        optimizer: Any = build_optimizer(model, lr=lr, weight_decay=0.1, betas=(0.9, 0.95))
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    task, used, done = PretrainTask(rows), 0.0, 0
    model.train()
    with tree_rows(model):
        while used < budget_s:
            start_s = time.process_time()
            picked = [order[(done * recipe.batch_size + i) % len(order)] for i in range(recipe.batch_size)]
            weight = sum(task.weight(i) for i in picked)
            for group in passes.groups(rows, picked):
                batch = passes.batch(rows, group, "cpu")
                loss: Any = -passes.logprobs(model, batch).sum() / weight
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            share = learning_rate_share(int(MILLE * used / budget_s), MILLE, recipe)
            for group_ in optimizer.param_groups:
                group_["lr"] = lr * share
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            used += time.process_time() - start_s
    loss = evaluate(model, PretrainTask(held), passes, label="")["loss"]
    tokens = done * recipe.batch_size * recipe.max_tokens
    return {"name": name, "parameters": n, "tokens": tokens, "cpu_s": round(used, 1), "loss": round(loss, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--valid", required=True)
    parser.add_argument("--cpu-seconds", type=float, default=160.0)
    parser.add_argument("--batch-rows", type=int, default=16)
    options = parser.parse_args()
    recipe = PretrainRecipe(max_tokens=256, batch_size=options.batch_rows)
    tokenizer = load_tokenizer(options.model)
    examples = load_rows([options.data], tokenizer, recipe, valid=[options.valid])
    rows: Any = examples.train
    held: Any = examples.held_out
    for name in CANDIDATES:
        result = train(name, rows, held, len(tokenizer), options.cpu_seconds, recipe)
        say(f"{name}: {result['tokens']:,} tokens, {result['loss']} nats per token")
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
