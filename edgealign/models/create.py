"""`edgealign init`: publish a model directory with random weights of a named shape.

The weights know nothing; the point is the shape. It is what latency is measured on, what tests run on, and where
training from scratch starts. The manifest says "random weights".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgealign.artifact import Artifact, file_input, open_artifact, publish, refuse_existing, sha256_file
from edgealign.models.recipes import InitRecipe
from edgealign.models.shapes import BOS_ID, EOS_ID, PAD_ID, parameter_count, shape
from edgealign.progress import say

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

LARGE = 50_000_000  # parameters; above it the weights are stored as bfloat16 unless the recipe says otherwise


def run(recipe: InitRecipe, *, text: Sequence[Path], out: Path) -> Artifact:
    """Make the model that the recipe names and publish it at `out`.

    Args:
        text: files that the tokenizer is trained on; none takes a built-in page.

    Raises:
        InputError: a text file cannot be used.
        OutputError: `out` exists or cannot be written.
    """
    from edgealign.data.template import template_hash
    from edgealign.models.tokenizer import train_tokenizer

    out = Path(out)
    refuse_existing(out)
    named = shape(recipe.shape)
    config = named.config(vocab_size=recipe.vocab_size, context=recipe.context)
    tokenizer = train_tokenizer(
        text, vocab_size=int(config.vocab_size), context=int(config.max_position_embeddings),
        max_bytes=recipe.tokenizer_bytes,
    )
    count = parameter_count(recipe.shape, vocab_size=recipe.vocab_size)
    dtype = recipe.dtype if recipe.dtype != "auto" else ("bfloat16" if count > LARGE else "float32")
    inputs = [file_input("text", file, sha256_file(Path(file))) for file in text]
    with publish(
        out, kind="model", format="huggingface", stage="init", recipe=recipe, inputs=inputs,
        template_hash=template_hash(tokenizer),
    ) as draft:
        write_model(draft.dir, config, tokenizer, seed=recipe.seed, dtype=dtype, norm_noise=recipe.norm_noise)
        draft.meta.update({
            "weights": "random weights", "shape": recipe.shape, "parameters": count, "dtype": dtype,
            "context": int(config.max_position_embeddings), "vocab_size": int(config.vocab_size),
            "reserved_tokens": sum(token.startswith("<|reserved_") for token in tokenizer.get_vocab()),
        })
    say(f"{out}: {recipe.shape}, {count:,} random weights in {dtype}, {config.vocab_size:,} tokens")
    return open_artifact(out)


def write_model(
    folder: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast, *, seed: int, dtype: str,
    norm_noise: float = 0.0,
) -> None:
    """Write a complete Hugging Face directory: configuration, random weights, tokenizer, generation config."""
    from transformers.utils import logging

    model = random_model(config, seed=seed, dtype=dtype, norm_noise=norm_noise)
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    if shown:
        logging.enable_progress_bar()
    tokenizer.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def random_model(config: PreTrainedConfig, *, seed: int, dtype: str, norm_noise: float = 0.0) -> PreTrainedModel:
    """Seeded random weights as transformers initialises the architecture; the caller's random state is kept.

    `norm_noise` spreads the norms and biases, which start all equal: without it a converter could mix them up unseen.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        if norm_noise:
            with torch.no_grad():
                for tensor in model.state_dict().values():
                    if tensor.ndim == 1 and tensor.is_floating_point():
                        tensor.add_(norm_noise * torch.randn_like(tensor))
    model.eval()
    model.generation_config = GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    return model
