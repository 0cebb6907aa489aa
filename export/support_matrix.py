"""Print export/README.md: its support matrix is what the tests exported, published and therefore verified.

    python export/support_matrix.py            print the README
    python export/support_matrix.py --write    rewrite export/README.md

`pytest --support write` writes `support.json` after a whole run, `--support check` (continuous integration) fails where
the file says more or less than the run has proved. A test compares the page with this text.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from edgealign.export_recipes import QUANTS, ExportRecipe
from edgealign.parity import BITS
from edgealign.parity_recipes import VerifyRecipe
from edgealign.runtimes.gguf_names import ARCHITECTURES, NOT_IN_LLAMA_CPP
from edgealign.runtimes.lora_weights import FOREIGN
from edgealign.targets import TARGETS
from edgealign.tensor_types import GROUPS, SEARCHED, TYPES

README, SUPPORT = (Path(__file__).with_name(name) for name in ("README.md", "support.json"))
MEANING = {
    "f32": "every bit; for proofs", "f16": "half the size", "q8_0": "nearly lossless",
    "q6_k": "six bits", "q5_k_m": "five bits", "q4_k_s": "4 bits, a scale for every 32 weights",
    "q4_0": "smallest, quickest on a CPU", "q4_k_m": "4 bits with more care",
    "fp32": "every bit; for proofs", "int8": "nearly lossless", "int4": "smallest; 8 bits for the head",
    "int4_k": "4 bits with more care", "8da4w": "4 bits, activations in 8, 8 bits for the head",
}
# transformers' own GGUF reader, the second opinion on the tensor map, knows these.
READ_BACK = {"lfm2": "transformers", "llama": "transformers", "qwen3": "transformers", "gemma3_text": "transformers"}
EXAMPLES = {
    "lfm2": "LFM2 and LFM2.5, dense", "lfm2_moe": "LFM2-8B-A1B", "llama": "Llama 3.2, SmolLM2", "qwen3": "Qwen3",
    "gemma3_text": "Gemma 3, text", "lfm3": "LFM3 (random weights tried)",
}

HEAD = """\
# Export programs

Model directory in, bundle directory out. Each program runs alone, in any Python that has its tools, and publishes only
what its own runtime has loaded and found equal to torch.

```
edgealign export --target gguf --model MODEL --out BUNDLE --quant q4_0 --adapter ana=ADAPTER
edgealign export --target onnx --model MODEL --out BUNDLE --quant int4 --adapter ana=ADAPTER
edgealign export --target executorch --model MODEL --out BUNDLE --quant 8da4w --adapter ana=ADAPTER
python export/to_gguf.py --model MODEL --out BUNDLE --recipe export/recipes/gguf-q4_0.toml --adapter ana=ADAPTER
edgealign export --target gguf --model MODEL --out BUNDLE --quant auto --kl-budget 0.1
```

Exit status: 0 published, 1 a check failed and nothing was published, 2 wrong use or unusable input, 3 a tool is
missing.

This page is printed by `python export/support_matrix.py`; change the tables in the code, then run it with `--write`.
"""


def readme() -> str:
    """The whole text of export/README.md."""
    return "\n".join((HEAD, _matrix(), _search(), _gates(), _architectures(), _adapters(), _inside()))


def _matrix() -> str:
    cells = {tuple(cell) for cell in json.loads(SUPPORT.read_text(encoding="utf-8"))}
    kinds = [kind for kind in EXAMPLES if any(cell[2] == kind for cell in cells)]
    lines = [
        "## Target x quantisation x architecture x adapter", "",
        "What the tests have exported, verified and published; *LoRA*: with users, one file each (rsLoRA, alpha and",
        "rank patterns included). A dot: the tests do not run it.", "",
        _row("target", "quantisation", *kinds), _row(*["---"] * (2 + len(kinds))),
    ]
    for target in TARGETS:
        for quant in QUANTS[target]:
            carriers = [{cell[3] for cell in cells if cell[:3] == (target, quant, kind)} for kind in kinds]
            words = ["LoRA" if "lora" in found else "base" if found else "·" for found in carriers]
            lines.append(_row(target, f"{quant}: {MEANING[quant]}", *words))
    return "\n".join([*lines, ""])


def _search() -> str:
    recipe = ExportRecipe()
    groups = ", ".join(f"`{group}`" for group in GROUPS)
    bases = "\n".join(
        f"- {base}: its own{''.join(f', {head}' for head in heads if head)}" for base, heads in SEARCHED.items()
    )
    return f"""\
## Mixtures of types, and `--quant auto` (gguf)

A recipe may store the head and groups of tensors in other types than the rest:

```
quant = "q4_0"
head_type = "q8_0"
tensor_types = ["attn=q6_k"]
```

Groups: {groups}; with tied weights the head is the embedding too.
Types: {', '.join(TYPES)}.
The K types need rows of a multiple of 256 weights; a named type that does not fit is refused. The manifest says what
every group became (`tensor_types`), and calls the file by all of it: `q4_0+head=q8_0+attn=q6_k`. The gates are those of
the lowest bits.

`--quant auto` measures, on this machine. It tries these bases with these heads:

{bases}

Each is held against torch over the built-in text; bases that lose more than `kl_budget` ({recipe.kl_budget:g} nat
unless you say otherwise) with every head have single groups raised. What is within the budget and the gates below is
timed: {recipe.search_gen} tokens after a prompt of {recipe.search_prompt}, in fresh processes that take turns, with
`threads` threads, adapter off, in rounds that keep the faster half. The fastest decode wins; where the intervals
overlap the faster prefill, where those overlap too the lower KL. Interrupted, it goes on where it was; with another
budget it measures only what is new.
`--dry-run` estimates the time.

The bundle has `search/recipe.toml` (the choice, for `--config`, on any machine), `search/table.md` and `result.json`
(every mixture, also those skipped and why) and `search/front.png`. With `--device REPORT|CARD.json|bandwidth_gb_s=N`
nothing is timed: decoding is predicted as bandwidth over the bytes that a token reads, and said to be predicted.
`--calibration TEXT` weighs every mixture's rounding. The other targets' types come whole: `auto` is refused there.
"""


def _gates() -> str:
    gate = VerifyRecipe()
    lines = [
        "## What must hold before anything is published", "",
        f"First a 32-bit file against torch: largest logit difference {gate.exact_tolerance:g}, token by token, in",
        "split prompts, in a second conversation, with each user's adapter on, off and swapped. Then the file that was",
        "asked for:", "",
        _row("quantisation", "mean KL, at most (nat)", "same likeliest token", "correlation of an adapter's effect"),
        _row(*["---"] * 4),
    ]
    for quant in (quant for quants in QUANTS.values() for quant in quants if BITS[quant] != 32):
        bits = BITS[quant]
        kl, top1, survival = (getattr(gate, f"{name}_{bits}bit") for name in ("kl", "top1", "survival"))
        lines.append(_row(quant, f"{kl:g}", f"{top1:g}", f"{survival:g}"))
    lines += ["", "A recipe changes a tolerance by name: `verify = [\"kl_4bit=0.55\"]`.", "", *_TEXT]
    return "\n".join(lines)


_TEXT = (
    "Before any number, text: 200 strings (emoji, code, white space, scripts, special tokens as a user may type them)",
    "and every word of the vocabulary have the same token ids in torch, in the bundle's files and in the runtime's own",
    "tokenizer; conversations render the same; no special token that was typed becomes one. llama.cpp and the bundle's",
    "`tokenizer.json` can keep the two apart. onnxruntime-genai 0.18's own tokenizer cannot: a typed `<|im_end|>` ends",
    "the turn there, and a text ends at its first NUL. It is held to the 158 ordinary strings without those; a program",
    "that tokenises with it must take special tokens out of what users type.",
    "",
)


def _architectures() -> str:
    lines = [
        "## Architectures", "",
        _row("model type", "llama.cpp's name", "models", "GGUF read back by", "32-bit gate, GGUF", "the others"),
        _row(*["---"] * 6),
    ]
    for kind, table in ARCHITECTURES.items():
        tolerance = table.exact_tolerance or VerifyRecipe().exact_tolerance
        reader, onnx = READ_BACK.get(kind, "gguf only"), f"{VerifyRecipe().exact_tolerance:g}"
        lines.append(_row(kind, table.name, EXAMPLES[kind], reader, f"{tolerance:g}", onnx))
    for kind in NOT_IN_LLAMA_CPP:
        written = f"{VerifyRecipe().exact_tolerance:g}, written from torch"
        lines.append(_row(kind, "none yet", EXAMPLES[kind], "-", "refused", written))
    lines += ["", *(f"llama.cpp cannot run {kind}: it lacks {lack}." for kind, lack in NOT_IN_LLAMA_CPP.items())]
    rules = "Llama 3 (also LFM2), Qwen2, SmolLM or GPT-2"
    lines += [
        "", "llama.cpp takes Gemma's GELU from a table in half precision, hence its wider gate.",
        f"GGUF tokenizers: byte-level BPE with the splitting rule of {rules}.", "",
    ]
    return "\n".join(lines)


def _adapters() -> str:
    lines = ["## Adapters that are refused, and why", "", _row("what its adapter_config.json says", "reason")]
    lines += [_row("---", "---"), *(_row(f"`{option}`", f"it {reason}") for option, reason in FOREIGN.items())]
    lines += [
        _row("`bias`", "it trains biases"),
        _row("a target in the embedding or the head", "llama.cpp aborts or refuses; in ONNX both are one table"),
        _row("a target in a norm", "llama.cpp ignores it silently; in ONNX it is no linear layer"),
        _row("another base model", "both digests are named"), "",
        "The way out of all but the last: merge the adapter into the model (`edgealign merge`) and export that.", "",
    ]
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _inside() -> str:
    return """\
## How it works

- `to_gguf.py`, `to_onnx.py` and `to_executorch.py` are the programs: order of work, what is in a bundle. What all do
  alike (arguments, inputs, the gate, the answer) is in `export_program.py`.
- `gguf_model.py` writes the 32-bit file, one tensor at a time, from the table in `edgealign/runtimes/gguf_names.py`.
- `gguf_vocab.py` writes the tokenizer, and refuses one that llama.cpp would cut differently.
- `gguf_quantize.py` calls llama.cpp's own quantiser, with an importance matrix from `--calibration` text if given.
- `quant_search.py` is `--quant auto`; `quant_candidates.py` says what is tried and chosen, `quant_timing.py` times or
  predicts, `quant_report.py` writes what is left in the bundle.
- A user's LoRA becomes a file of its own, scale folded in, by `edgealign/runtimes/gguf_adapter.py`, without torch.
- `genai_model.py` has onnxruntime-genai build the graph, ties its head to the embedding in quantised models, and gives
  every linear layer two inputs of rank zero; `adapter_inputs.json` beside the graph says which modules they hold.
- There is no fp16 for ONNX: for the CPU the builder takes a 16-bit attention apart into operations that copy the whole
  cache for every token (onnxruntime-genai 0.18: `Concat` where fp32 and int4 have `GroupQueryAttention`). int8 is
  smaller and nearly lossless.
- A user's LoRA becomes an `.onnx_adapter` with those inputs, by `edgealign/runtimes/onnx_adapter.py`, without torch.
- `genai_check.py` opens the finished folder in onnxruntime-genai: same token ids, same logits, users in turn.
- `android_kit.py` adds a phone's scripts (`kits/android/`) to a GGUF bundle with `--kit android`, and the greedy tokens
  that a phone must draw. Without a phone: [under qemu](../docs/results/android_kit.md).
- An architecture that the builder does not know goes through `general_model.py`: transformers' exporter writes the
  graph of the model as a function of tokens and states (`stateful_model.py`), onnxruntime's quantiser rounds it, and
  `graph.json` names its states. Same gate, same users' adapters; but only edgealign's session opens it:
  onnxruntime-genai has no pipeline for it, and `genai` in the manifest's checks says that it was not asked.
- A graph by the builder has positions for at most 32,768 tokens unless the recipe's `context` says more.
- `executorch_model.py` fills ExecuTorch's own definition of the model and replaces its short convolution, norms and
  linear layers; `executorch_lower.py` lowers two methods over the same weights: `forward(tokens, input_pos)`, and
  `adapted(tokens, input_pos, A, B, ...)` with a user's matrices in the order of `adapter_inputs.json`.
- A user's LoRA becomes a `.safetensors` with those matrices, by `edgealign/runtimes/executorch_adapter.py`.
- An architecture that ExecuTorch has no definition of goes through `executorch_general.py`: transformers' exporter
  records the torch model as a function of tokens and states (`stateful_model.py`), both methods are lowered as above,
  and `graph.json` names the states, which the session carries from run to run. Same gate, same users' adapters; but
  `TextLLMRunner` has no place for states, and `runner` in the manifest's checks says that it was not asked.
- `runner_check.py` opens the finished folder in ExecuTorch's own `TextLLMRunner`: same greedy text, twice.
- An ExecuTorch program holds its KV cache for at most 4,096 tokens unless the recipe's `context` says more, and takes
  511 tokens at once (127 where the states are inputs). Groups of 32 weights share a scale in bfloat16.

## What upstream does, and what that means here

- ExecuTorch 1.5.1's LFM2 never empties the convolution's state: a second conversation is off by 0.01 to 0.03. Ours is
  emptied at position 0, a test proves it, and another shows that upstream's does not pass the gate.
- ExecuTorch's `TextLLMRunner` drives `forward` only: it speaks for the base model, and it goes on with the last
  conversation unless `reset()` is called. Reports of its degenerating on LFM2.5 (executorch#21858) were not met here.
- transformers' `ExecutorchExporter` lowers one method and writes no facts into it; ours takes its recording
  (`DynamoExporter` with its repairs for ExecuTorch) and lowers two methods over the same weights.
- ExecuTorch's own LoRA knows no LFM2 (its key map has Llama's names only); the inputs of `adapted` replace it.
- `edgealign export --target gguf` needs llama.cpp to know the architecture; it does not know LFM3.

## Why not Optimum

Optimum's exporters would be the usual way. Today optimum-onnx 0.1.0 needs transformers below 4.58 and has no LFM2, and
optimum-executorch pins transformers 5.0.0rc1, static caches only, no LFM2; LFM2 with its cache needs 5.x. They come
back when they accept transformers 5.23 and export a hybrid cache: then `genai_model.py` and `executorch_model.py` are
what they would replace, behind the same gate.
"""


def main() -> int:
    """Print or write the page."""
    if "--write" in sys.argv[1:]:
        README.write_text(readme(), encoding="utf-8")
    else:
        sys.stdout.write(readme())
    return 0


if __name__ == "__main__":
    sys.exit(main())
