"""Which columns make which form: one table, and a converter per line of it.

The first line whose required columns a row has is the row's shape, so special shapes stand before general ones. To
read another kind of file, add a line (or rename its columns with `--map`).

Prompts for rows that have none in words:
    UKP arguments   "TITLE Argue for this side: STANCE", as in the data's own majority pairs
    Persona         the model-written evaluations of Perez et al. 2022: whoever has the persona agrees or does not
    Disfl-QA        asks to say the question without its slips, or a mixture would learn to parrot questions
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from edgealign.data.faults import RowFault, Tie
from edgealign.data.forms import (
    PAIR_LISTS,
    PAIR_NUMBERS,
    PAIR_TEXTS,
    Conversation,
    Fact,
    Message,
    Pair,
    Row,
    Text,
    Thumb,
)
from edgealign.data.messages import (
    SHAREGPT_ROLES,
    SPEAKERS,
    TASKMASTER_ROLES,
    answer_of,
    check_order,
    messages_of,
    plain_content,
    prompt_of,
    system_of,
    text_of,
    turns_of,
)

Columns = Mapping[str, Any]

ABOUT_YOURSELF = "Tell me something about yourself."
WITHOUT_SLIPS = "Say this question again without the slips of the tongue:\n"
PLAY_PERSON = "You are this person: "
HH_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Shape:
    """One line of the table. `partner`: the stem of a file beside this one that holds the rest, joined by `key`."""

    name: str
    form: str
    required: tuple[str, ...]
    convert: Callable[[Columns], Row]
    optional: tuple[str, ...] = ()
    common: bool = True  # named in the message about unknown columns
    partner: str | None = None
    key: str = ""

    def fits(self, row: Columns) -> bool:
        return all(column in row for column in self.required)

    def join(self, row: Columns, partner: Mapping[Any, Columns]) -> Columns:
        """The row together with the one it refers to; the required columns must be there."""
        missing = [column for column in self.required if column not in row]
        if missing:
            raise RowFault("columns", f"column {missing[0]} is missing or null")
        if self.partner is None:
            return row
        other = partner.get(row[self.key]) if isinstance(row[self.key], str) else None
        if other is None:
            raise RowFault("join", f"its {self.key} is not in {self.partner}")
        return {**other, **row}


def known_columns() -> set[str]:
    """Every column that some shape reads: what `--map` may map to."""
    return {column for shape in SHAPES for column in (*shape.required, *shape.optional)}


def _conversation(messages: tuple[Message, ...], column: str, row: Columns) -> Conversation:
    check_order(messages, column)
    if not any(message.role == "assistant" for message in messages):
        raise RowFault("roles", f"{column} has no assistant turn: there is nothing to learn")
    return Conversation(messages, _user(row))


def _from_messages(row: Columns) -> Conversation:
    return _conversation((*system_of(row), *messages_of(row["messages"], "messages")), "messages", row)


def _from_sharegpt(row: Columns) -> Conversation:
    turns = row["conversations"]
    plain = isinstance(turns, list) and turns and isinstance(turns[0], Mapping) and "role" in turns[0]
    keys = ("role", "content") if plain else ("from", "value")
    messages = turns_of(turns, "conversations", roles=SHAREGPT_ROLES, keys=keys)
    return _conversation((*system_of(row), *messages), "conversations", row)


def _from_completion(row: Columns) -> Conversation:
    answer = Message("assistant", answer_of(row, "completion"))
    return Conversation((*prompt_of(row), answer), _user(row))


def _from_instruction(row: Columns) -> Conversation:
    """Alpaca's `input` and Dolly's `context` follow the instruction after a blank line."""
    asked = text_of(row, "instruction")
    for column in ("input", "context"):
        more = text_of(row, column, may_be_blank=True) if column in row else ""
        asked += f"\n\n{more}" if more.strip() else ""
    answer = text_of(row, "output" if "output" in row else "response")
    return Conversation((*system_of(row), Message("user", asked), Message("assistant", answer)), _user(row))


def _from_question(row: Columns) -> Conversation:
    return Conversation((Message("user", text_of(row, "question")), Message("assistant", text_of(row, "answer"))))


def _from_reading(row: Columns) -> Conversation:
    """The first answer is learned: the others say the same in other words."""
    answers = row["answers"]
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise RowFault("columns", "answers is not a list of text")
    if not answers[0].strip():
        raise RowFault("empty", "the first of answers is empty")
    asked = f"{text_of(row, 'context')}\n\n{text_of(row, 'question')}"
    return Conversation((Message("user", asked), Message("assistant", answers[0])))


def _from_disfluent(row: Columns) -> Conversation:
    asked = WITHOUT_SLIPS + text_of(row, "disfluent")
    return Conversation((Message("user", asked), Message("assistant", text_of(row, "original"))))


def _from_turns(row: Columns) -> Conversation:
    messages = turns_of(row["turns"], "turns", roles=SPEAKERS, keys=(0, 1))
    persona: tuple[Message, ...] = ()
    if "persona2" in row:
        facts = row["persona2"]
        if not isinstance(facts, list) or not facts or not all(isinstance(fact, str) for fact in facts):
            raise RowFault("columns", "persona2 is not a list of text")
        persona = (Message("system", PLAY_PERSON + " ".join(facts)),)
    return _conversation((*persona, *messages), "turns", row)


def _from_text(row: Columns) -> Text:
    return Text(text_of(row, "text"))


def _pair(prompt: tuple[Message, ...], chosen: str, rejected: str, row: Columns) -> Pair:
    if chosen.strip() == rejected.strip():
        raise RowFault("same", "chosen and rejected are the same")
    return Pair(prompt, chosen, rejected, _user(row), _margin(row), _facts(row))


def _from_pair(row: Columns) -> Pair:
    column = "messages" if "messages" in row else "prompt"
    shared = prompt_of(row, column)
    if isinstance(row["chosen"], list) and len(row["chosen"]) > 1:  # prompt given, and repeated inside both sides
        implicit = _from_implicit_pair(row)
        if implicit.prompt not in (shared, shared[len(system_of(row)) :]):
            raise RowFault("roles", f"{column} is not how chosen and rejected begin")
        return replace(implicit, prompt=shared)
    return _pair(shared, answer_of(row, "chosen"), answer_of(row, "rejected"), row)


def _from_implicit_pair(row: Columns) -> Pair:
    """Two whole conversations that differ in their last turn."""
    sides = [_whole(row[column], column) for column in ("chosen", "rejected")]
    for side, column in zip(sides, ("chosen", "rejected"), strict=True):
        check_order(side, column)
        if len(side) < 2 or side[-1].role != "assistant":
            raise RowFault("roles", f"{column} is not a prompt and then an assistant turn")
    chosen, rejected = sides
    if chosen[:-1] != rejected[:-1]:
        raise RowFault("roles", "chosen and rejected differ before their last turn")
    return _pair(chosen[:-1], plain_content(chosen[-1], "chosen"), plain_content(rejected[-1], "rejected"), row)


def _whole(value: object, column: str) -> tuple[Message, ...]:
    """A conversation as messages, or as one text with Anthropic's "Human:" and "Assistant:" turns."""
    if not isinstance(value, str):
        return messages_of(value, column)
    if not value.startswith("\n\nHuman: "):
        raise RowFault("columns", f"there is no prompt, and {column} is not a whole conversation")
    parts = re.split(r"\n\n(Human|Assistant): ", value)[1:]
    pairs = list(zip(parts[::2], parts[1::2], strict=True))
    return turns_of(pairs, column, roles=HH_ROLES, keys=(0, 1))


def _from_thumb(row: Columns) -> Thumb:
    column = "messages" if "messages" in row else "prompt"
    return Thumb(prompt_of(row, column), answer_of(row, "completion"), _yes(row, "label"), _user(row))


def _from_taskmaster(row: Columns) -> Thumb:
    """API calls and their results stand as JSON text: that is what a model of this data would have to write."""
    spoken = [_spoken(turn, f"turn {n} of context") for n, turn in enumerate(_list(row, "context"), start=1)]
    prompt = turns_of(spoken, "context", roles=TASKMASTER_ROLES, keys=("role", "text"))
    check_order(prompt, "context")
    if prompt[-1].role == "assistant":
        raise RowFault("roles", "context ends with the agent, so no answer is due")
    said = _spoken(row["generation"], "generation")
    if said.get("role") != "agent":
        raise RowFault("roles", "generation is not the agent's")
    return Thumb(prompt, text_of({"generation": said.get("text")}, "generation"), _yes(row, "reward"), _user(row))


def _spoken(turn: object, where: str) -> Columns:
    if not isinstance(turn, Mapping):
        raise RowFault("columns", f"{where} is not an object")
    for column in ("api", "response"):
        if column in turn and "text" not in turn:
            return {"role": turn.get("role"), "text": json.dumps(turn[column], ensure_ascii=False)}
    return turn


def _from_persona(row: Columns) -> Thumb:
    """Everybody who has the persona likes to hear it said, or does not: the persona is the user."""
    prompt = (Message("user", ABOUT_YOURSELF),)
    return Thumb(prompt, text_of(row, "statement"), _yes(row, "agree"), text_of(row, "persona"))


def _from_argument_votes(row: Columns) -> Pair:
    """The majority's pair; `margin` is by how many votes."""
    votes = row["dev_votes"]
    if not isinstance(votes, Mapping) or not all(isinstance(votes.get(side), int) for side in ("a1", "a2")):
        raise RowFault("columns", "dev_votes does not count a1 and a2")
    lead = votes["a1"] - votes["a2"]
    return _argument(row, "a1" if lead > 0 else "a2" if lead < 0 else "equal", abs(lead))


def _from_vote(row: Columns) -> Pair:
    return _argument(row, row["choice"], None)


def _argument(row: Columns, choice: object, margin: int | None) -> Pair:
    if choice == "equal":
        raise Tie
    if choice not in ("a1", "a2"):
        raise RowFault("columns", "choice is not a1, a2 or equal")
    prompt = (Message("user", f"{text_of(row, 'title')} Argue for this side: {text_of(row, 'stance')}"),)
    chosen, rejected = text_of(row, str(choice)), text_of(row, "a2" if choice == "a1" else "a1")
    return _pair(prompt, chosen, rejected, {**row, "margin": margin})


def _user(row: Columns) -> str | None:
    user = row.get("user_id")
    if user is None:
        return None
    if isinstance(user, bool) or not isinstance(user, str | int) or not str(user).strip():
        raise RowFault("columns", "user_id is neither text nor a whole number")
    return str(user)


def _margin(row: Columns) -> float | None:
    margin = row.get("margin")
    if margin is None:
        return None
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise RowFault("columns", "margin is not a finite number")
    return float(margin)


def _facts(row: Columns) -> dict[str, Fact]:
    """What an objective may read. Other people's columns have such names too, so what is no number or no text there
    does not make a row bad: it is not there, and an objective that reads it says so."""
    found: dict[str, Fact] = {}
    for name in PAIR_NUMBERS:
        if _is_number(value := row.get(name)):
            found[name] = float(value)
    for name in PAIR_TEXTS:
        text = row.get(name)
        if isinstance(text, str) and text.strip():
            found[name] = text
    grades, others = (row.get(name) for name in PAIR_LISTS)
    if isinstance(grades, list) and all(map(_is_number, grades)):
        found["grades"] = tuple(map(float, grades))
    if isinstance(others, list) and others and all(isinstance(text, str) and text.strip() for text in others):
        found["others"] = tuple(others)
    return found


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _yes(row: Columns, column: str) -> bool:
    value = row.get(column)
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    raise RowFault("columns", f"{column} is not true, false, 1 or 0")


def _list(row: Columns, column: str) -> list[object]:
    value = row[column]
    if not isinstance(value, list):
        raise RowFault("columns", f"{column} is not a list")
    return value


_WHO = ("user_id",)
_BESIDE = ("user_id", "margin", *PAIR_NUMBERS, *PAIR_TEXTS, *PAIR_LISTS)
_PAIR = (*_BESIDE, "system")

SHAPES: tuple[Shape, ...] = (
    Shape("messages pair", "pair", ("messages", "chosen", "rejected"), _from_pair, _PAIR),
    Shape("pair", "pair", ("prompt", "chosen", "rejected"), _from_pair, _PAIR),
    Shape("implicit pair", "pair", ("chosen", "rejected"), _from_implicit_pair, _BESIDE),
    Shape("messages thumb", "thumb", ("messages", "completion", "label"), _from_thumb, (*_WHO, "system")),
    Shape("thumb", "thumb", ("prompt", "completion", "label"), _from_thumb, (*_WHO, "system")),
    Shape("taskmaster reward", "thumb", ("context", "generation", "reward"), _from_taskmaster, _WHO, common=False),
    Shape("persona statement", "thumb", ("persona", "statement", "agree"), _from_persona, common=False),
    Shape(
        "argument votes", "pair", ("pair_id", "title", "stance", "a1", "a2", "dev_votes"), _from_argument_votes,
        common=False,
    ),
    Shape(
        "vote", "pair", ("pair_id", "user_id", "choice"), _from_vote, common=False, partner="pairs", key="pair_id"
    ),
    Shape("messages", "conversation", ("messages",), _from_messages, (*_WHO, "system")),
    Shape("sharegpt", "conversation", ("conversations",), _from_sharegpt, (*_WHO, "system")),
    Shape("completion", "conversation", ("prompt", "completion"), _from_completion, (*_WHO, "system")),
    Shape(
        "instruction output", "conversation", ("instruction", "output"), _from_instruction,
        (*_WHO, "system", "input", "context"),
    ),
    Shape(
        "instruction response", "conversation", ("instruction", "response"), _from_instruction,
        (*_WHO, "system", "input", "context"),
    ),
    Shape("reading", "conversation", ("context", "question", "answers"), _from_reading, common=False),
    Shape("question", "conversation", ("question", "answer"), _from_question),
    Shape("disfluent question", "conversation", ("disfluent", "original"), _from_disfluent, common=False),
    Shape("turns", "conversation", ("turns",), _from_turns, ("persona2", *_WHO)),
    Shape("text", "text", ("text",), _from_text),
)
