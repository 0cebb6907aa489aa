"""`edgealign chat`: three ways to talk to a `Conversation`.

    edgealign chat                        a terminal: answers come token by token, /help lists the commands
    edgealign chat --user ana             one that learns what ana likes (taste.py)
    edgealign chat "one prompt"           one answer
    edgealign chat < prompts.txt          one prompt per line, an empty line after each answer; --json: a line each

Answers go to stdout, everything else to stderr. In a pipe every line is a prompt, also one that begins with a slash:
what is data there must not command anything.
"""

from __future__ import annotations

import json as jsonlib
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from edgealign.chat.conversation import DEFAULT_MODEL, Conversation, Reply, open_conversation
from edgealign.chat.recipes import ChatRecipe
from edgealign.chat.speakers import PERSONAL, Speakers
from edgealign.errors import InputError, UsageError
from edgealign.progress import say

HELP = """\
/user NAME     who is speaking: another conversation, and what this person chose shapes the answers
/compare [Q]   two answers to Q, or to the last question: choose the one that is more you, and it is learned from
/why           what shapes your answers
/undo          back to the version of your taste before this one
/reset         forget the conversation
/system TEXT   another system turn, and a new conversation; without TEXT none
/help          these lines
/quit          end; so does Ctrl-D. Ctrl-C stops an answer"""
ASK = "> "


def run(
    recipe: ChatRecipe,
    *,
    prompt: str | None = None,
    model: str | None = None,
    bundle: Path | None = None,
    adapter: str | None = None,
    user: str | None = None,
    basis: str | None = None,
    json: bool = False,
) -> None:
    """Open the model and talk until the prompts end.

    Args:
        user: a name in the registry of users, whose choices shape the answers.
        adapter: a published adapter of any method, or the name of one of the bundle's users.
        basis: what users of this model may differ in; None: the starter's.

    Raises:
        UsageError: a prompt, a model, a bundle or an adapter that cannot be used; in a pipe with the line's number.
        ToolMissing: the bundle's runtime, or the starter, is not installed.
    """
    if adapter is not None and user is not None:
        raise UsageError("--adapter", "and --user each say who is speaking", "give one of the two")
    terminal = prompt is None and sys.stdin.isatty()
    if terminal:
        say(f"loading {bundle or model or DEFAULT_MODEL}")
    conversation = open_conversation(recipe, model=model, bundle=bundle, adapter=adapter, basis=basis)
    with closing(conversation), Speakers(conversation, basis) as speakers:
        try:
            if user is not None:
                speakers.switch(user)
            if terminal:
                say("/help lists the commands")
                talk(conversation, speakers, json=json)
            else:
                lines = [(0, prompt)] if prompt is not None else read_lines()
                answer_lines(conversation, lines, memory=recipe.memory, json=json)
        except BrokenPipeError:  # the reader has what it wanted, and `head` is no mistake
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def talk(conversation: Conversation, speakers: Speakers, *, json: bool) -> None:
    """Prompt, answer, until Ctrl-D or /quit. A mistake or an interrupt ends the turn only."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with Ctrl-C ignored
    speakers.recall()
    while True:
        try:
            line = _read_prompt()
            if line is None or line in ("/quit", "/exit"):
                return
            if line.startswith("/"):
                command(speakers, line)
            elif line:
                reply(conversation, line, json=json)
        except KeyboardInterrupt:
            say("")
        except UsageError as error:
            say(f"edgealign: {error.line()}")


def command(speakers: Speakers, line: str) -> None:
    """What a line with a slash asks for."""
    conversation = speakers.conversation
    word, _, rest = line.partition(" ")
    if word in PERSONAL:
        PERSONAL[word](speakers, rest.strip())
    elif word == "/reset":
        conversation.reset()
        say("forgotten")
    elif word == "/system":
        conversation.reset(system=rest.strip())
        say(f"a new conversation with the system turn: {rest.strip()}" if rest.strip() else "no system turn")
    else:
        say(HELP if word == "/help" else f"{word} is no command\n{HELP}")


def answer_lines(
    conversation: Conversation, lines: Iterator[tuple[int, str]] | list[tuple[int, str]], *, memory: bool, json: bool
) -> None:
    """Answer each prompt; `lines` are (line number or 0, prompt)."""
    for number, line in lines:
        if not memory:
            conversation.reset()
        try:
            said = reply(conversation, line, json=json)
        except InputError as error:
            raise InputError(f"line {number}" if number else "prompt", error.reason, error.fix) from error
        if said.finish == "cancelled":
            raise KeyboardInterrupt
        if number and not json:
            print(flush=True)


def reply(conversation: Conversation, prompt: str, *, json: bool) -> Reply:
    """One prompt's answer on stdout: as it comes, or as one JSON line at its end."""
    said = conversation.ask(prompt, (lambda text: None) if json else _write)
    if json:
        row = {"prompt": prompt, "answer": said.text, "tokens": said.tokens, "seconds": round(said.seconds, 3)}
        print(jsonlib.dumps(row, ensure_ascii=False), flush=True)
    else:
        print(flush=True)
    if said.dropped:
        say(f"no room in {conversation.context:,} tokens: the oldest {said.dropped} turns of the conversation are gone")
    if not said.text and said.finish != "cancelled":
        say("(no answer)")
    return said


def read_lines() -> Iterator[tuple[int, str]]:
    """The prompts of a pipe by line number; empty lines are none.

    Raises:
        InputError: a line is not UTF-8.
    """
    for number, raw in enumerate(sys.stdin.buffer, start=1):
        try:
            line = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise InputError(f"line {number}", "is not UTF-8 text", "convert the file: iconv -t UTF-8") from error
        if line:
            yield number, line


def _read_prompt() -> str | None:
    """A line from the terminal; None at its end. The prompt sign stays out of a redirected stdout."""
    try:
        if sys.stdout.isatty():
            return input(ASK).strip()
        print(ASK, end="", file=sys.stderr, flush=True)
        return input().strip()
    except EOFError:
        say("")
        return None
    except UnicodeDecodeError as error:
        raise InputError("prompt", "is not UTF-8 text", "check the terminal's encoding") from error


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
