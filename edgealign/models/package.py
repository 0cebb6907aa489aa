"""`edgealign package`: a finished run's model as the folder that is shipped inside edgealign.

    edgealign package runs/starter --preset starter --model merged --report chat --out edgealign/starter

The weights are rounded to bfloat16, everything about text is copied byte for byte, logs and pictures stay behind, and
a model card is written from the run's manifests. It is published only if it is small enough and still speaks: it is
opened again, predicts what the run's model predicts, and answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from edgealign.artifact import Artifact, Check, open_artifact, publish, refuse_existing
from edgealign.errors import CheckFailed
from edgealign.models import card
from edgealign.models.recipes import PackageRecipe
from edgealign.pipeline import load_preset
from edgealign.plan import count_parameters
from edgealign.progress import say

CARD = "README.md"
PROBE = "A fox met a hen at the gate. What did the hen say to the fox, and why did she say it?"
PROBE_TOKENS = 8


def run(
    recipe: PackageRecipe, *, run_dir: Path, preset: str, model: str, out: Path, reports: Sequence[str] = ()
) -> Artifact:
    """Publish the folder at `out`.

    Args:
        run_dir: where `edgealign run` put the preset's stages.
        preset: the preset's name or file: it says which data each stage read.
        model: id of the stage whose model is shipped.
        reports: ids or directories of reports on it; their checks go onto the card.

    Raises:
        InputError: the run is not complete, or its data has no credit.
        CheckFailed: too large, or rounding changed what it says; nothing is published.
    """
    import torch

    from edgealign.data.encode import template_hash
    from edgealign.models.load import load_model, load_tokenizer, read_config
    from edgealign.train.stage import save_model

    out = Path(out)
    refuse_existing(out)
    source = open_artifact(Path(run_dir) / model, kind="model")
    read = [_report(Path(run_dir), name) for name in reports]
    described = load_preset(preset)
    parameters = count_parameters(source.path)
    config = {**read_config(source.path), "dtype": "bfloat16"}
    facts = card.collect(
        out.name, source, described, config=config, parameters=parameters, reports=read, trained_on=recipe.trained_on
    )
    tokenizer = load_tokenizer(source.path)
    licences = {folder: f"{credit.licence}, {credit.credit}" for folder, (credit, _) in facts.sources.items()}
    with publish(
        out, kind="model", format="huggingface", stage="package", recipe=recipe,
        inputs=[source.as_input("model"), *(report.as_input("report") for report in read)],
        template_hash=template_hash(tokenizer), licences={**source.manifest.licences, **licences},
    ) as draft:
        save_model(load_model(source.path), source.path, draft.dir, dtype=torch.bfloat16)
        (draft.dir / CARD).write_text(card.render(facts), encoding="utf-8")
        draft.meta.update({
            "preset": described.name, "run": model, "parameters": parameters, "dtype": "bfloat16",
            "context": config.get("max_position_embeddings"), "vocab_size": config.get("vocab_size"),
        })  # fmt: skip
        for check in (_small(draft.dir, recipe), *_speaks(source.path, draft.dir, tokenizer, recipe)):
            draft.add_check(check)
            if not check.passed:
                raise CheckFailed(
                    out, f"{check.name} is {check.value:.4g}, {check.tolerance:.4g} is asked for", "not published"
                )
    size = sum(entry.bytes for entry in open_artifact(out).manifest.files)
    say(f"{out}: {parameters:,} parameters, {size / 2**20:.1f} MiB")
    return open_artifact(out)


def _report(run_dir: Path, name: str) -> Artifact:
    inside = run_dir / name
    return open_artifact(inside if inside.is_dir() else Path(name), kind="report")


def _small(folder: Path, recipe: PackageRecipe) -> Check:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20
    return Check("size in MiB", size, recipe.limit_mib, size <= recipe.limit_mib, "all files together, at most")


def _speaks(source: Path, folder: Path, tokenizer: Any, recipe: PackageRecipe) -> list[Check]:
    """Both models on one prompt: the divergence of every next token, and some words of the new one."""
    from edgealign.data.encode import encode_prompt
    from edgealign.data.forms import Message
    from edgealign.parity_metrics import measure
    from edgealign.runtimes.generate import generate
    from edgealign.runtimes.recipes import Sampling
    from edgealign.runtimes.torch_session import TorchSession

    prompt = encode_prompt(tokenizer, (Message("user", PROBE),))
    with closing(TorchSession(source)) as before:
        expected = before.score(prompt)
    with closing(TorchSession(folder)) as after:
        gap = measure([(expected, after.score(prompt))], admitted_noise=0.0).kl
        sampling = Sampling(max_tokens=PROBE_TOKENS, temperature=0.0, min_p=0.0, repetition_penalty=1.0)
        made = generate(after, prompt, sampling=sampling)
    return [
        Check(
            "rounding in nats", gap, recipe.max_divergence, gap <= recipe.max_divergence,
            "mean KL divergence of the next token, from the run's model to the rounded one, at most",
        ),
        Check(
            "tokens generated", float(len(made.tokens)), float(PROBE_TOKENS), len(made.tokens) == PROBE_TOKENS,
            "opened again from its files",
        ),
    ]
