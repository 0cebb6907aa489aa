"""`edgealign data tastes`: people with planted tastes choose between a model's own answers, as a file of choices.

    edgealign data candidates --model M questions.jsonl --out answers
    edgealign data tastes answers --out tastes
    edgealign basis --model M --choices tastes/pairs.jsonl --out BASIS

A way to a basis where no real users are at hand, and it says so: whoever learns from these choices learns which ways
of answering a model has, not what people want. A taste is a direction in whitened attributes of texts (traits.py); a
choice is drawn with probability sigmoid(sharpness x difference), and some are turned round (planted.py, text_users.py).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgealign.artifact import Artifact, open_artifact, publish, refuse_existing
from edgealign.data.forms import Pair, to_json
from edgealign.data.synthetic import LICENCE, write_jsonl
from edgealign.errors import UsageError
from edgealign.personalize.candidates import read_candidates
from edgealign.personalize.planted import KINDS
from edgealign.personalize.recipes import TastesRecipe
from edgealign.personalize.text_users import Pool, TextUsers
from edgealign.personalize.traits import Whitening
from edgealign.registry import suggest

FILE = "pairs.jsonl"


def run(recipe: TastesRecipe, *, candidates: str | Path, out: Path) -> Artifact:
    """Publish the choices, with a made-up user_id each.

    Raises:
        UsageError: an unknown population or attribute.
        InputError: no candidates, or answers that are too much alike.
    """
    refuse_existing(Path(out))
    if recipe.population not in KINDS:
        fix = f"choose from: {', '.join(KINDS)}"
        raise UsageError(recipe.population, f"is no population{suggest(recipe.population, KINDS)}", fix)
    answers, rows = read_candidates(candidates)
    texts = [text for row in rows for text in row.answers]
    prompts = np.array([number for number, row in enumerate(rows) for _ in row.answers])
    whitening = Whitening.of(texts, recipe.traits)
    traits = whitening.read(texts)
    users = TextUsers.draw(Pool(traits, traits, prompts), recipe.population, recipe.users, seed=recipe.seed, part=0)
    _, shown = users.choose(np.unique(prompts), recipe.pairs, seed=recipe.seed, flips=recipe.flips)
    chosen = [
        to_json(Pair(rows[prompts[first]].prompt, texts[first], texts[second], user_id=f"u{place // recipe.pairs}"))
        for place, (first, second) in enumerate(shown.tolist())
    ]
    with publish(
        out, kind="dataset", format="jsonl", stage="tastes", recipe=recipe, inputs=[answers.as_input("candidates")],
        licences={FILE: LICENCE},
    ) as draft:  # fmt: skip
        write_jsonl(draft.dir / FILE, chosen)
        draft.meta.update(rows={FILE: len(chosen)}, users=recipe.users, traits=list(whitening.names), simulated=True)
    return open_artifact(out)
