"""Pairs by minimal revision (CLAIR, arXiv 2408.06266): a stronger model mends an answer, and the mended one is chosen.

    edgealign pairs revise --data answers.jsonl --endpoint http://127.0.0.1:8080/v1 --out DIR

A pair's chosen answer is revised and stays as the rejected one, so that the two differ in little but what matters; of a
conversation the last answer. The endpoint is the user's own (see `endpoint`). An answer that comes back unchanged gives
no pair and is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from edgealign.artifact import Artifact, file_input, open_artifact, publish, refuse_existing
from edgealign.data.forms import Pair, to_json
from edgealign.data.synthetic import write_jsonl
from edgealign.errors import InputError
from edgealign.judges.endpoint import Endpoint
from edgealign.judges.recipes import ReviseRecipe
from edgealign.judges.sample import question
from edgealign.progress import track

ASK = (
    "You improve answers of an assistant with as few changes as possible: correct what is wrong, make clear what is "
    "unclear, and keep everything else word for word. Reply with the improved answer only."
)


def run(recipe: ReviseRecipe, *, data: Sequence[str], endpoint: str, out: Path) -> Artifact:
    """Revise and publish pairs.

    Raises:
        InputError: the data hold no answers, or none was changed.
        UsageError: the endpoint is no URL.
    """
    from edgealign.data.read import read_all

    refuse_existing(Path(out))
    asked = Endpoint.parse(endpoint)
    inputs, rows = [], []
    for loaded in read_all(list(data), mapping={}, skip_bad=recipe.skip_bad):
        inputs.append(file_input("data", loaded.source, loaded.digest))
        rows += [found for row in loaded.rows if (found := question(row))]
    rows = rows[: recipe.limit]
    if not rows:
        raise InputError(", ".join(map(str, data)), "holds no answers", "give conversations or pairs")
    pairs, left_out = [], Counter[str]()
    for prompt, answers in track(rows, total=len(rows), label="revising"):
        said = "\n".join(f"{message.role}: {message.content}" for message in prompt)
        user = f"Conversation:\n{said}\n\nAnswer:\n{answers[0]}"
        better = asked.say(ASK, user, max_tokens=recipe.max_new_tokens).strip()
        if not better or better == answers[0].strip():
            left_out["unchanged"] += 1
            continue
        pairs.append(Pair(prompt, better, answers[0]))
    if not pairs:
        raise InputError(f"{len(rows)} answers", "came back unchanged", "choose another model")
    with publish(out, kind="dataset", format="jsonl", stage="pairs_revise", recipe=recipe, inputs=inputs) as draft:
        write_jsonl(draft.dir / "train.jsonl", [to_json(pair) for pair in pairs])
        draft.meta.update(rows={"train.jsonl": len(pairs)}, left_out=dict(left_out), endpoint=asked.name)
    return open_artifact(out)
