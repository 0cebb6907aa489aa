"""`edgealign personalize --method linear`: a user as one sentence that says what answers should be like.

    edgealign personalize --method linear --model M --user ana --preference "Answer with bullet points." --out ana

Nothing is learned and nothing is checked: the sentence goes into the system turn, and linear alignment (linear.py)
follows it further than a prompt does, for two passes a token. The adapter is `preference.json`, the sentence and how
far to go; the manifest holds no word of it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from edgealign.artifact import Artifact, open_artifact, open_model, publish, refuse_existing, write_atomic
from edgealign.errors import ArtifactError, InputError
from edgealign.personalize.linear import Mixing, find_lead
from edgealign.personalize.lora import slug
from edgealign.personalize.steering_recipe import LinearRecipe
from edgealign.progress import say

FORMAT, FILE = "linear", "preference.json"
LONGEST = 2000  # characters


@dataclass(frozen=True)
class Stated:
    """A preference in words, and how far it is followed: `linear.Mixing.strength`."""

    preference: str
    strength: float


def run(recipe: LinearRecipe, *, model: str | Path, preference: str, user: str, out: Path) -> Artifact:
    """Publish a user's stated preference at `out`.

    Raises:
        InputError: it is empty, too long or no text, or the model's template has no system turns.
    """
    from edgealign.data.encode import template_hash
    from edgealign.models.load import load_tokenizer

    out = Path(out)
    refuse_existing(out)
    base = open_model(model)
    tokenizer = load_tokenizer(base.path)
    text = preference.strip()
    if len(text) > LONGEST:
        raise InputError("preference", f"has {len(text):,} characters, more than {LONGEST:,}", "say it in fewer words")
    lead = find_lead(tokenizer, text)
    with publish(
        out, kind="adapter", format=FORMAT, stage="personalize_linear", recipe=recipe, inputs=[base.as_input("base")],
        template_hash=template_hash(tokenizer), licences=base.manifest.licences,
    ) as draft:
        stated = {"preference": text, "strength": recipe.strength}
        write_atomic(draft.dir / FILE, json.dumps(stated, ensure_ascii=False) + "\n")
        draft.meta |= {
            "base_digest": base.digest, "user": slug(user), "method": "linear", "strength": recipe.strength,
            "tokens": len(lead.preferred),
        }  # fmt: skip
    say(f"user {slug(user)}: a preference of {len(text)} characters, followed with strength {recipe.strength:g}")
    return open_artifact(out)


def read_stated(folder: Path | str) -> Stated:
    """A published preference.

    Raises:
        ArtifactError: damaged, or an adapter of another method.
    """
    artifact = open_artifact(Path(folder), kind="adapter")
    fix = "state it again: edgealign personalize --method linear"
    if artifact.manifest.format != FORMAT:
        raise ArtifactError(folder, f"is a {artifact.manifest.format} adapter, no stated preference", fix)
    try:
        read = json.loads((artifact.path / FILE).read_text(encoding="utf-8"))
        found = Stated(str(read["preference"]), Mixing(float(read["strength"])).strength)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(folder, "is no readable preference", fix) from error
    if not found.preference.strip():
        raise ArtifactError(folder, "states nothing", fix)
    return found
