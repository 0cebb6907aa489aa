"""Shipped equals trained: a bundle in its own runtime, in a child process, against torch in 32-bit floats.

First text (`parity_text`: template, token ids), then logits (`parity_logits`): prompts shorter and longer than the
convolution, token by token, split prompts, a second conversation, every user's adapter on, and A -> B -> A bit for bit.

    checks = verify(Path("bundle"), model="model", adapters={"ana": Path("ana")}, recipe=VerifyRecipe())
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgealign import parity_logits as logits
from edgealign.artifact import Artifact, Check, open_artifact, open_model, publish
from edgealign.errors import InputError, UsageError
from edgealign.models.load import resolve_model
from edgealign.parity_recipes import VerifyRecipe
from edgealign.parity_text import check_text
from edgealign.progress import track
from edgealign.runtimes.session import Bundle, read_bundle
from edgealign.runtimes.torch_session import TorchSession
from edgealign.tensor_types import TYPES

if TYPE_CHECKING:
    from edgealign.runtimes.session import Logits

# Which gates a quantisation answers to: 32 bit exactly, the others as distributions.
BITS: Mapping[str, int] = {
    "f32": 32, "f16": 16, "bf16": 16, "q8_0": 8, "q6_k": 8, "q5_k_m": 4, "q4_0": 4, "q4_k_m": 4, "q4_k_s": 4,
    "iq4_xs": 4,
    "fp32": 32, "int8": 8, "int4": 4, "int4_k": 4, "8da4w": 4,
}  # fmt: skip


def verify(
    bundle: Path | Bundle, *, model: str | Path, adapters: Mapping[str, Path], recipe: VerifyRecipe
) -> list[Check]:
    """Every check of a bundle against the model and the adapters (directories) it was made from: LoRAs, directions.

    Args:
        bundle: a published bundle, or the facts of one that is not published yet.

    Raises:
        UsageError: the adapters are not those of the bundle, or the model is another one.
        RuntimeCrash: the runtime died.
    """
    opened = bundle if isinstance(bundle, Bundle) else _open_bundle(Path(bundle), model)
    bits = quant_bits(opened.quant)
    if bits is None:
        known = ", ".join(BITS)
        raise InputError(opened.path, f"is quantised as {opened.quant}, which has no gates", f"known: {known}")
    if odd := sorted(set(opened.adapters) ^ set(adapters)):
        reason = "is not on both sides: the bundle's users and the given adapters"
        raise UsageError(", ".join(odd), reason, "give each user as --adapter NAME=DIR")
    oracle = TorchSession(resolve_model(model), threads=recipe.threads or None)
    with closing(oracle):
        subject = logits.Subject(opened, bits, oracle, adapters, recipe)
        checks: list[Check] = []
        first = subject.first_lora is not None
        total = 5 + bool(adapters) + first if subject.bits == 32 else 6 + bool(adapters)
        for part in track(_parts(subject, model), total=total, label=f"verify {opened.path.name}"):
            checks += part()
    return checks


def quant_bits(quant: str) -> int | None:
    """The gates that a quantisation, or a mixture by its label, answers to: its lowest bits'; None if unknown."""
    base, *parts = quant.split("+")
    kinds = [TYPES.get(part.partition("=")[2]) for part in parts]
    if base not in BITS or None in kinds:
        return None
    return min([BITS[base], *(kind.bits for kind in kinds if kind)])


def run(
    recipe: VerifyRecipe, *, bundle: Path, model: str | Path, adapters: Mapping[str, Path], out: Path | None = None
) -> Artifact | dict[str, Any]:
    """Verify, and publish the verdict as a report when `out` is given; failed checks are in the result."""
    checks = verify(bundle, model=model, adapters=adapters, recipe=recipe)
    text = render(checks)
    if out is None:
        return {"checks": [vars(check) for check in checks], "text": text}
    given = open_artifact(bundle, kind="bundle", check_digests=False)
    inputs = [given.as_input("bundle"), open_model(model).as_input("model")]
    with publish(out, kind="report", format="parity", stage="verify", recipe=recipe, inputs=inputs) as draft:
        (draft.dir / "table.md").write_text(text + "\n", encoding="utf-8")
        for check in checks:
            draft.add_check(check)
    return open_artifact(out)


def render(checks: Sequence[Check]) -> str:
    """The verdicts as a Markdown table."""
    lines = ["| check | value | tolerance | verdict | |", "|---|---|---|---|---|"]
    for check in checks:
        value, tolerance = (("" if number is None else f"{number:.3g}") for number in (check.value, check.tolerance))
        verdict = "passed" if check.passed else "FAILED"
        lines.append(f"| {check.name} | {value} | {tolerance} | {verdict} | {check.note} |")
    failed = sum(not check.passed for check in checks)
    return "\n".join([*lines, "", f"{len(checks) - failed} of {len(checks)} checks passed"])


def _open_bundle(path: Path, model: str | Path) -> Bundle:
    recorded = open_artifact(path, kind="bundle").meta.get("model_digest")
    digest = open_model(model).digest
    if recorded is not None and recorded != digest:
        reason = f"was exported from the model {str(recorded)[:12]}, {model} is {digest[:12]}"
        raise InputError(path, reason, "give the model it was made from")
    return read_bundle(path, check_digests=False)


def _parts(subject: logits.Subject, model: str | Path) -> Iterator[Callable[[], list[Check]]]:
    """The checks in groups; the child processes follow each other, so that memory holds one bundle at a time."""
    prompts = logits.prompts(subject)
    longest = prompts[-1]
    fresh: dict[str, Logits] = {}
    rows: dict[str | None, Logits] = {}
    users: list[str | None] = [None, *subject.adapters]
    first = next(iter(subject.adapters), None)
    merged = subject.first_lora
    if first is not None:
        yield lambda: logits.remember_fresh(subject, first, longest, fresh)
    with closing(subject.open(exact=True)) as session:
        yield lambda: check_text(subject.bundle.path, model, session.tokenize, session.info())
        yield lambda: logits.check_feeding(subject, session, prompts, fresh)
        yield lambda: [check for user in users for check in logits.check_user(subject, session, user, prompts, rows)]
        yield lambda: logits.check_swaps(subject, session, longest, fresh)
    with closing(subject.open(exact=False)) as session:
        if subject.bits == 32:
            yield lambda: logits.check_default_mode(subject, session, longest)
        else:
            yield lambda: logits.check_distribution(subject, session, model)
    # These change the oracle for good, so they come last.
    if subject.bits != 32:
        with closing(subject.open(exact=True)) as session:
            yield lambda: logits.check_same_weights(subject, session, model, longest)
    elif merged is not None:
        yield lambda: logits.check_merged(subject, merged, longest, rows[merged])
