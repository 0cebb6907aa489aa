"""A user as a prompt: `personalize --method fspo` writes no weights, only what every prompt of that user begins with.

    choices -> hold some out -> the newest others as shots -> rank the held-out ones with and without them -> publish

It is published only if the model ranks the user's held-out choices at least as well with the shots as without them,
which a model learns by `edgealign data shots` and training on its result. The adapter holds the choices as text and
the digest of the tokens that they become, so that another template or tokenizer is noticed.

    shots = open_shots("runs/ada", "runs/bundle")
    with closing(open_session("runs/bundle")) as session:
        enter(session, shots.prefix(tokenizer), states=users.private("ada"))      # restored from there, or fed and kept
        generate(session, shots.rest(tokenizer, messages), before=shots.prefix(tokenizer))

A state is what the model remembers of the choices: it belongs into the registry's private folder of the user, which
`edgealign users forget` overwrites and removes.

Source: FSPO, arXiv 2502.19312.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgealign.artifact import Artifact, open_artifact, open_model, publish, refuse_existing
from edgealign.data.forms import Message, Pair, to_json
from edgealign.errors import ArtifactError, InputError, UsageError, writing
from edgealign.personalize.adapter import model_digest, open_adapter
from edgealign.personalize.choices import load_choices
from edgealign.personalize.fspo_recipes import FspoRecipe
from edgealign.personalize.lora import held_to, slug
from edgealign.personalize.shots import digest_ids, fit_shots, prefix_ids, with_shots
from edgealign.progress import say

if TYPE_CHECKING:
    from edgealign.runtimes.session import Session

FORMAT = "shots"
SHOTS = "shots.jsonl"


def run(recipe: FspoRecipe, *, model: str | Path, choices: str | Path, user: str, out: Path) -> Artifact:
    """Publish one user's shots at `out`.

    Raises:
        InputError: too few choices, or none that fits the prefix.
        CheckFailed: the model ranks the held-out choices worse with the shots than without; nothing is published.
    """
    from edgealign.data.encode import encode_pairs, template_hash
    from edgealign.models.load import load_model, load_tokenizer
    from edgealign.train.held_out import rank_pairs
    from edgealign.train.layout import pair
    from edgealign.train.precision import fixed_threads
    from edgealign.train.scoring import Passes

    out = Path(out)
    refuse_existing(out)
    started_s = time.monotonic()
    base = open_model(model)
    tok: Any = load_tokenizer(base.path)
    own = load_choices(choices, user, tok, recipe)
    name = slug(user)
    newest = own.fitted[-recipe.shots :]
    shots = fit_shots(newest, lambda kept: len(prefix_ids(tok, kept)) <= recipe.prefix_tokens)
    if not shots:
        reason = f"not one choice fits a prefix of {recipe.prefix_tokens} tokens"
        raise InputError(f"user {name}", reason, "raise --prefix-tokens")
    shots = tuple(replace(shot, user_id=None) for shot in shots)
    prefix = prefix_ids(tok, shots)
    with fixed_threads(recipe.threads) as threads:
        network: Any = load_model(base.path)
        passes = Passes.reading(network)

        def rank(rows: Sequence[Pair], longest: int, label: str) -> Any:
            encoded = encode_pairs(tok, rows, max_tokens=longest).rows
            return rank_pairs(network, [pair(*row) for row in encoded], passes, label=label)

        say(f"user {name}: {len(shots)} choices in {len(prefix)} tokens, {len(own.held_out)} to check")
        before = rank(own.held_out, recipe.max_tokens, "ranking without the shots")
        shown = [replace(row, prompt=with_shots(row.prompt, shots)) for row in own.held_out]
        after = rank(shown, recipe.max_tokens + recipe.prefix_tokens, "ranking with the shots")
    checks, numbers = held_to(
        name, before, after, than="without the shots",
        fix="collect more choices, or train the model on shots: edgealign data shots",
    )
    with publish(
        out, kind="adapter", format=FORMAT, stage="personalize_fspo", recipe=recipe,
        inputs=[base.as_input("base"), own.source], template_hash=template_hash(tok),
        licences=base.manifest.licences,
    ) as draft:
        for check in checks:
            draft.add_check(check)
        lines = "".join(json.dumps(to_json(shot), ensure_ascii=False) + "\n" for shot in shots)
        (draft.dir / SHOTS).write_text(lines, encoding="utf-8")
        draft.meta |= {
            "base_digest": base.digest, "user": name, "method": "fspo", "choices": own.facts, "shots": len(shots),
            "shots_left_out": len(newest) - len(shots), "prefix_tokens": len(prefix),
            "prefix_digest": digest_ids(prefix), "held_out_before": asdict(before), "held_out_after": asdict(after),
            "threads": threads, "seconds": round(time.monotonic() - started_s, 1),
        }
    say(f"user {name}: {numbers}")
    return open_artifact(out)


@dataclass(frozen=True)
class UserShots:
    """A published user: their choices, and the digest of the tokens that they must become."""

    user: str
    shots: tuple[Pair, ...]
    prefix_digest: str

    def prefix(self, tok: Any) -> tuple[int, ...]:
        """The tokens that all prompts of this user begin with.

        Raises:
            InputError: this tokenizer and template make others than at publication.
        """
        ids = prefix_ids(tok, self.shots)
        if digest_ids(ids) != self.prefix_digest:
            raise InputError(
                f"user {self.user}", "the choices become other tokens than when they were published: another tokenizer "
                "or chat template", "publish them again: edgealign personalize --method fspo",
            )
        return ids

    def rest(self, tok: Any, messages: Sequence[Message]) -> tuple[int, ...]:
        """The tokens of this user's prompt after the prefix.

        Raises:
            InputError: a system turn of the conversation's own: its prompt does not begin with the prefix.
        """
        from edgealign.data.encode import encode_prompt

        prefix = self.prefix(tok)
        whole = encode_prompt(tok, with_shots(messages, self.shots))
        if whole[: len(prefix)] != prefix:
            raise InputError(
                f"user {self.user}", "the conversation has a system turn of its own, so its prompt does not begin with "
                "the user's prefix", "feed it whole: encode_prompt(tokenizer, with_shots(messages, shots.shots))",
            )
        return whole[len(prefix) :]


def open_shots(adapter: str | Path, place: str | Path) -> UserShots:
    """The user published at `adapter`, for the model or bundle at `place`.

    Raises:
        ArtifactError: no adapter, or a damaged one.
        InputError: an adapter of another kind or another model; choices that cannot be read.
    """
    from edgealign.data.read import read

    artifact = open_adapter(adapter)
    if artifact.manifest.format != FORMAT:
        reason = f"is an adapter of the format {artifact.manifest.format}, not of choices in the prompt"
        raise InputError(adapter, reason, "publish one: edgealign personalize --method fspo")
    wanted, there = str(artifact.meta["base_digest"]), model_digest(place)
    if wanted != there:
        reason = f"was checked on the model {wanted[:12]}, this is {there[:12] or 'an unknown one'}"
        raise InputError(adapter, reason, "publish it for this model: edgealign personalize --method fspo")
    rows = read(artifact.path / SHOTS, form="pair").rows
    try:
        return UserShots(
            str(artifact.meta["user"]), tuple(row for row in rows if isinstance(row, Pair)),
            str(artifact.meta["prefix_digest"]),
        )
    except KeyError as error:
        raise ArtifactError(
            adapter, f"its manifest lacks {error}", "publish it again: edgealign personalize --method fspo"
        ) from error


def enter(session: Session, prefix: Sequence[int], *, states: Path) -> str:
    """Bring a session to the state after `prefix`: "restored" from `states`, else fed, and "stored" where it can be.

    A state is kept by the prefix and the user's adapter, model and runtime that made it; what does not fit, or is
    damaged, is made again.
    """
    from edgealign.runtimes.session import Snapshots

    session.reset()
    again = f"{len(prefix)} tokens are fed again every time"
    if not isinstance(session, Snapshots):
        say(f"{type(session).__name__} cannot keep a state: {again}")
        session.prefill(prefix)
        return "fed"
    file = states / f"{digest_ids(prefix)}.state"
    if file.is_file():
        try:
            session.restore(file.read_bytes())
            return "restored"
        except InputError as error:
            say(f"{error.line()}: {len(prefix)} tokens are fed again")
    session.prefill(prefix)
    try:
        state = session.snapshot()
    except UsageError as error:  # a child process whose runtime cannot
        say(f"{error.value} {error.reason}: {again}")
        return "fed"
    part = file.with_name(f".{file.name}.part-{os.getpid()}")
    with writing(file):
        states.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(state)
            os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)
    return "stored"
