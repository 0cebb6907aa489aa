"""A small grammar of how-to questions and answers in eight styles, written for this project.

A question is an action on a thing ("clean the kettle"). An answer is the action's steps about that thing,
spelled short or long, as bullets or prose, formal or casual: three independent switches, so that a taste for
one of them says nothing about the others. Questions are split by (action, thing), so an unseen question is a
new combination of words that were all seen.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ACTIONS: dict[str, tuple[str, ...]] = {
    "clean": (
        "take the {x} to the sink",
        "wash the {x} with warm water",
        "wipe the {x} with a soft cloth",
        "let the {x} dry in the air",
        "put the {x} back in its place",
    ),
    "repair": (
        "look at the {x} from all sides",
        "find the broken part of the {x}",
        "glue the broken part",
        "hold the {x} still for an hour",
        "test the {x} with care",
    ),
    "paint": (
        "cover the floor under the {x}",
        "sand the {x} until it is smooth",
        "choose a colour for the {x}",
        "put two thin coats on the {x}",
        "leave the {x} alone for a day",
    ),
    "pack": (
        "find a box for the {x}",
        "wrap the {x} in paper",
        "lay the {x} in the box",
        "fill the gaps around the {x}",
        "close the box with tape",
    ),
    "choose": (
        "write down what the {x} is for",
        "set a price for the {x}",
        "compare three kinds of {x}",
        "ask a friend about the {x}",
        "sleep a night before you buy the {x}",
    ),
    "store": (
        "empty the {x} first",
        "dry the {x} well",
        "find a cool and dark shelf for the {x}",
        "put a label on the {x}",
        "look at the {x} once a month",
    ),
    "sell": (
        "take a bright picture of the {x}",
        "write an honest note about the {x}",
        "ask a fair price for the {x}",
        "answer every question about the {x}",
        "hand over the {x} in person",
    ),
    "decorate": (
        "measure the {x}",
        "draw a pattern for the {x}",
        "cut paper to fit the {x}",
        "glue the pattern to the {x}",
        "seal the {x} with clear paint",
    ),
    "move": (
        "clear the way for the {x}",
        "lift the {x} with two people",
        "keep the {x} close to your body",
        "rest the {x} on every floor",
        "set the {x} down slowly",
    ),
    "borrow": (
        "ask the owner of the {x}",
        "say how long you need the {x}",
        "treat the {x} as your own",
        "clean the {x} before you return it",
        "bring the {x} back with thanks",
    ),
}
THINGS = (
    "kettle",
    "chair",
    "lamp",
    "bicycle",
    "clock",
    "mirror",
    "basket",
    "drum",
    "tent",
    "vase",
    "shelf",
    "radio",
    "table",
    "guitar",
    "carpet",
    "bucket",
    "ladder",
    "suitcase",
    "teapot",
    "toolbox",
    "camera",
    "bench",
    "kite",
    "blanket",
)
QUESTIONS = (
    "How do I {a} a {x}?",
    "What is the best way to {a} a {x}?",
    "Can you tell me how to {a} a {x}?",
    "I want to {a} a {x}. Where do I start?",
    "Please explain how to {a} a {x}.",
)
STEP_ADVERBS = ("First", "Then", "After that", "Next", "At the end")
FORMAL: Mapping[str, Any] = {
    "open": ("Certainly. I would recommend the following.", "Thank you for your question. Kindly proceed as follows."),
    "advice": "One should {s}.",
    "more": "This is important, therefore please do not hurry.",
    "close": "I remain at your service.",
}
CASUAL: Mapping[str, Any] = {
    "open": ("Hey, no worries, it's easy!", "Sure thing! Here's what I'd do."),
    "advice": "Just {s}, ok?",
    "more": "Don't rush it, that's the fun part!",
    "close": "You've got this, buddy!",
}


@dataclass(frozen=True)
class Style:
    """The three switches of an answer."""

    long: bool
    bullets: bool
    formal: bool


STYLES = tuple(Style(*switches) for switches in itertools.product((False, True), repeat=3))


@dataclass(frozen=True)
class Question:
    """An action on a thing; `text` spells it in one of five ways."""

    action: str
    thing: str

    def text(self, rng: random.Random) -> str:
        return rng.choice(QUESTIONS).format(a=self.action, x=self.thing)


def questions() -> tuple[Question, ...]:
    """Every action on every thing, in a fixed order."""
    return tuple(Question(action, thing) for action in ACTIONS for thing in THINGS)


def split_questions(unseen: float, rng: random.Random) -> tuple[list[Question], list[Question]]:
    """Seen and unseen questions; every action and every thing stays among the seen ones."""
    everything = list(questions())
    rng.shuffle(everything)
    cut = max(1, int(len(everything) * unseen))
    return everything[cut:], everything[:cut]


def answer(question: Question, style: Style, rng: random.Random, steps_of: tuple[int, int] = (2, 5)) -> str:
    """An answer in the given style; only the opening is drawn, so that two answers differ by style, not by luck.

    Args:
        steps_of: how many steps a short and a long answer have.
    """
    words = FORMAL if style.formal else CASUAL
    steps = [step.format(x=question.thing) for step in ACTIONS[question.action]]
    lines = [_step(step, index, style, words) for index, step in enumerate(steps[: steps_of[style.long]])]
    body = "\n".join(f"- {line}" for line in lines) if style.bullets else " ".join(lines)
    glue = "\n" if style.bullets else " "
    closing = f"{glue}{words['close']}" if style.long else ""
    return f"{rng.choice(words['open'])}{glue}{body}{closing}"


def wrong_answer(question: Question, style: Style, rng: random.Random) -> str:
    """An answer to another question, in the same style: what alignment should push down."""
    action = rng.choice([name for name in ACTIONS if name != question.action])
    thing = rng.choice([name for name in THINGS if name != question.thing])
    return answer(Question(action, thing), style, rng)


def _step(step: str, index: int, style: Style, words: Mapping[str, Any]) -> str:
    text = str(words["advice"]).format(s=step)
    if not style.bullets:
        text = f"{STEP_ADVERBS[index]}, {text[0].lower()}{text[1:]}"
    return f"{text} {words['more']}" if style.long and index % 2 == 0 else text
