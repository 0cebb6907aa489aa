"""The knobs of `edgealign data synth`, `users`, `prepare`, `reading` and `styles`."""

from __future__ import annotations

from dataclasses import dataclass

from edgealign.recipe import option

STYLE_NAMES = ("short", "long", "bulleted", "formal", "casual", "cheerful", "with-a-question")


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
class UsersRecipe:
    """Many people with planted tastes: what meta-training over users learns from, and new people to try it on."""

    users: int = option(64, ge=2, le=10_000, help="people to learn from")
    new_users: int = option(24, ge=2, le=10_000, help="people whom no training file knows")
    choices: int = option(24, ge=4, le=150, help="choices per person")
    asked: int = option(16, ge=1, le=40, help="choices of new people on unseen questions, without noise: the test")
    conversations: int = option(800, ge=10, help="conversations for supervised fine-tuning, in everybody's styles")
    traits: int = option(12, ge=2, le=20, help="things that may be said of a person")
    traits_per_user: int = option(2, ge=1, le=10, help="how many of them are said of one")
    alpha: float = option(
        1.0, gt=0.0, help="Dirichlet concentration of a trait's pull on the attributes: 0.1 distinct, 10 alike",
        source="the planted-user protocol",
    )
    signed: bool = option(True, help="a trait may also pull the other way; without it everybody likes the same things")
    short_steps: int = option(1, ge=1, le=5, unit="steps", help="of a short answer")
    long_steps: int = option(2, ge=2, le=5, unit="steps", help="of a long answer")
    noise: float = option(4.0, gt=0.0, help="sharpness of a taste: P(choice) = sigmoid(noise x taste difference)")
    unseen: float = option(0.2, gt=0.0, lt=1.0, help="share of the questions that no training file holds")
    seed: int = option(0, ge=0, help="of everything that is drawn, also of what a trait means")


@dataclass(frozen=True, kw_only=True)
class PrepareRecipe:
    """Collect rows from several sources, filter them with a count of every reason, split off a validation part."""

    form: str = option("conversation", choices=("conversation", "text", "pair", "thumb"), help="the form to keep")
    limit: int | None = option(None, ge=1, help="at most this many rows per source, drawn with the seed")
    max_chars: int | None = option(None, ge=1, unit="characters", help="leave out longer rows")
    min_chars: int | None = option(None, ge=1, unit="characters", help="leave out rows with a shorter answer or text")
    mend: bool = option(False, help="tidy line ends and spaces; give answers a capital letter and an end mark")
    max_turns: int | None = option(None, ge=2, help="cut conversations after this many turns")
    leave_out: str = option("", help="leave out rows whose text matches this regular expression")
    valid: float = option(0.05, ge=0.0, lt=1.0, help="share of the rows in valid.jsonl, split by prompt")
    top_users: int | None = option(None, ge=1, help="keep only the users with the most choices")
    max_choices: int = option(
        64, ge=4, le=64, help="choices per kept user in choices.jsonl; the rest of theirs go to unseen_choices.jsonl"
    )
    skip_bad: int | None = option(None, ge=0, help="how many bad rows of all sources may be left out, exactly")
    seed: int = option(0, ge=0, help="of the drawing and the split")


@dataclass(frozen=True, kw_only=True)
class ReadingRecipe:
    """Questions about short passages of plain text, asked by rule, answered in the passage's own words."""

    passage_words: int = option(60, ge=12, unit="words", help="the longest passage; shorter ones are drawn too")
    limit: int | None = option(None, ge=1, help="at most this many questions, drawn with the seed")
    valid: float = option(0.05, ge=0.0, lt=1.0, help="share of the documents whose questions go to valid.jsonl")
    skip_bad: int | None = option(None, ge=0, help="how many bad rows of all sources may be left out, exactly")
    seed: int = option(0, ge=0, help="of the drawing and the split")


@dataclass(frozen=True, kw_only=True)
class StylesRecipe:
    """Style-conditioned answers, made by rule from real ones: a system turn asks, the answer has the style."""

    styles: tuple[str, ...] = option(STYLE_NAMES, choices=STYLE_NAMES, help="the styles to make")
    share: float = option(0.7, ge=0.0, le=1.0, help="share of the conversations that get a style")
    copies_per_row: int = option(2, ge=1, le=7, help="at most this many styles of one conversation")
    plain: float = option(0.7, ge=0.0, le=1.0, help="share of those that also stay plain, without a system turn")
    neutral: float = option(0.1, ge=0.0, le=1.0, help="share of the plain ones with a system turn that asks nothing")
    max_words: int = option(120, ge=1, unit="words", help="leave out conversations with a longer answer")
    head_words: int = option(
        30, ge=4, unit="words", help="cut plain answers at a sentence end before this; long has the rest"
    )
    story_words: int | None = option(
        None, ge=20, unit="words", help="cut a longer story in the question to whole sentences around the answer"
    )
    fuller: int = option(
        9, ge=0, unit="words", help="a shorter answer about a story is followed by the sentence that supports it"
    )
    mend: bool = option(True, help="tidy line ends and spaces; give answers a capital letter and an end mark")
    manners: int = option(0, ge=0, le=2000, help="conversations to add of greetings, thanks and who the model is")
    limit: int | None = option(None, ge=1, help="at most this many conversations per source, drawn with the seed")
    valid: float = option(0.05, ge=0.0, lt=1.0, help="share of the prompts in valid.jsonl")
    skip_bad: int | None = option(None, ge=0, help="how many bad rows of all sources may be left out, exactly")
    seed: int = option(0, ge=0, help="of the drawing and the split")
