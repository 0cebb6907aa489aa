"""The knobs of `edgealign data synth` and `edgealign data prepare`."""

from __future__ import annotations

from dataclasses import dataclass

from edgealign.recipe import option


@dataclass(frozen=True, kw_only=True)
class SynthRecipe:
    """Generated practice data: how-to questions, answers in eight styles, users with planted tastes."""

    conversations: int = option(3600, ge=10, help="conversations for supervised fine-tuning")
    pairs: int = option(600, ge=4, help="pairs for the alignment of everyone: right answer against a wrong one")
    choices: int = option(64, ge=4, le=64, help="choices per user")
    noise: float = option(
        4.0,
        gt=0.0,
        help="sharpness of a user's taste: P(choice) = sigmoid(noise x taste difference)",
        source="the planted-user protocol: tau about 4",
    )
    unseen: float = option(0.2, gt=0.0, lt=1.0, help="share of the questions that no training file holds")
    seed: int = option(0, ge=0, help="of everything that is drawn")


@dataclass(frozen=True, kw_only=True)
class PrepareRecipe:
    """Collect rows from several sources, filter them with a count of every reason, split off a validation part."""

    form: str = option("conversation", choices=("conversation", "text", "pair", "thumb"), help="the form to keep")
    limit: int | None = option(None, ge=1, help="at most this many rows per source, drawn with the seed")
    max_chars: int | None = option(None, ge=1, unit="characters", help="leave out longer rows")
    max_turns: int | None = option(None, ge=2, help="cut conversations after this many turns")
    leave_out: str = option("", help="leave out rows whose text matches this regular expression")
    valid: float = option(0.05, ge=0.0, lt=1.0, help="share of the rows in valid.jsonl, split by prompt")
    top_users: int | None = option(None, ge=1, help="keep only the users with the most choices")
    max_choices: int = option(
        64, ge=4, le=64, help="choices per kept user in choices.jsonl; the rest of theirs go to unseen_choices.jsonl"
    )
    skip_bad: int | None = option(None, ge=0, help="how many bad rows of all sources may be left out, exactly")
    seed: int = option(0, ge=0, help="of the drawing and the split")
