"""`edgealign chat` as it is used: a pipe, one prompt, a real terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgealign.chat import terminal
from edgealign.chat.conversation import Conversation
from edgealign.chat.recipes import ChatRecipe
from edgealign.chat.speakers import Speakers
from edgealign.errors import InputError, UsageError

Talk = Callable[..., Conversation]
PATIENCE_S = 120.0
PROMPT = "\r\n> "  # at the start of a line: an answer of a random model may hold the sign itself


class Pipe(io.TextIOWrapper):
    """A stdin that is no terminal."""

    def __init__(self, raw: bytes) -> None:
        super().__init__(io.BytesIO(raw), encoding="utf-8")


@pytest.fixture
def piped(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Conversation]:
    """`piped(bytes, answers, **options of terminal.run)`: run with that stdin; returns the conversation."""

    def run(raw: bytes, answers: list[str], *, memory: bool = False, **options: Any) -> Conversation:
        conversation = talk(answers)
        monkeypatch.setattr(sys, "stdin", Pipe(raw))
        monkeypatch.setattr(terminal, "open_conversation", lambda recipe, **given: conversation)
        terminal.run(ChatRecipe(memory=memory), **options)
        return conversation

    return run


def test_a_pipe_gets_a_block_for_each_line(piped: Any, capsys: pytest.CaptureFixture[str]) -> None:
    piped(b"one\n\n  two  \r\nthree", ["A b.", "C\nd.", "E."])
    assert capsys.readouterr().out == "A b.\n\nC\nd.\n\nE.\n\n"


def test_a_pipe_with_json_gets_a_line_for_each_line(piped: Any, capsys: pytest.CaptureFixture[str]) -> None:
    piped("caf\u00e9\n/reset\n".encode(), ["A b.", "C."], json=True)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["prompt"], row["answer"]) for row in rows] == [("caf\u00e9", "A b."), ("/reset", "C.")]
    assert all(set(row) == {"prompt", "answer", "tokens", "seconds"} and row["tokens"] > 0 for row in rows)


@pytest.mark.parametrize(("memory", "turns"), [(False, 2), (True, 4)])
def test_lines_are_conversations_of_their_own_unless_memory_is_asked_for(
    piped: Any, memory: bool, turns: int
) -> None:
    assert len(piped(b"one\ntwo\n", ["A.", "B."], memory=memory).turns) == turns


@pytest.mark.parametrize(
    ("raw", "reason"),
    [(b"fine\n\xff\xfe\n", "line 2: is not UTF-8"), (b"fine\n" + b"word " * 600, "line 2: .*no room")],
)
def test_a_bad_line_is_named_by_its_number(piped: Any, raw: bytes, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        piped(raw, ["A.", "B."])


def test_a_pipe_takes_a_typed_look_alike_as_text(piped: Any, capsys: pytest.CaptureFixture[str]) -> None:
    piped(b"what is <|im_end|>?\n", ["A."], json=True)
    row = json.loads(capsys.readouterr().out)
    assert (row["prompt"], row["answer"]) == ("what is <|im_end|>?", "A.")


def test_one_prompt_is_answered_once_and_stdin_is_left_alone(piped: Any, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = piped(b"other\n", ["A b."], prompt="one")
    assert capsys.readouterr().out == "A b.\n"
    assert conversation.turns[0].content == "one"


def test_commands_do_what_the_help_says(talk: Talk, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = talk(["A."])
    terminal.command(Speakers(conversation, None), "/system Be brief.")
    assert conversation.system == "Be brief."
    conversation.ask("one", lambda text: None)
    terminal.command(Speakers(conversation, None), "/reset")
    assert (conversation.turns, conversation.system) == ([], "Be brief.")
    terminal.command(Speakers(conversation, None), "/system")
    assert conversation.system == ""
    terminal.command(Speakers(conversation, None), "/rest")
    terminal.command(Speakers(conversation, None), "/help")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "/rest is no command" in captured.err
    for word in ("/reset", "/system", "/help", "/quit", "Ctrl-C", "Ctrl-D"):
        assert word in terminal.HELP
    terminal.command(Speakers(conversation, None), "/system <|im_end|>")
    assert conversation.system == "<|im_end|>"
    with pytest.raises(UsageError, match="not UTF-8"):
        terminal.command(Speakers(conversation, None), "/system \udcff")


def test_a_pipe_that_closes_early_is_no_mistake(tiny_model: Path) -> None:
    command = [sys.executable, "-m", "edgealign", "chat", "--model", str(tiny_model), "--max-tokens", "3", "--json"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdin is not None and child.stdout is not None and child.stderr is not None  # noqa: PT018
        child.stdout.close()
        child.stdin.write(b"one\ntwo\n")
        child.stdin.close()
        assert child.stderr.read() == b""
        assert child.wait() == 0


class Terminal:
    """A program in a pseudo-terminal: type, wait for what it shows."""

    def __init__(self, *command: str) -> None:
        self.pid, self.handle = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "dumb"
            os.execv(sys.executable, [sys.executable, *command])
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self.handle, text.encode())

    def wait_for(self, text: str) -> None:
        assert self.waits_for(text, patience_s=PATIENCE_S), f"{text!r} did not come; shown: {self.shown!r}"

    def waits_for(self, text: str, *, patience_s: float) -> bool:
        """Until `text` is shown after what was waited for before; False where it does not come."""
        end_s = time.monotonic() + patience_s
        while text not in self.shown:
            ready, _, _ = select.select([self.handle], [], [], max(0.0, end_s - time.monotonic()))
            if not ready:
                return False
            self.shown += os.read(self.handle, 4096).decode(errors="replace")
        self.shown = self.shown.partition(text)[2]
        return True

    def end(self) -> int:
        """The exit status; what is still shown is read first."""
        try:
            while os.read(self.handle, 4096):
                pass
        except OSError:  # the other side is gone
            pass
        status = os.waitpid(self.pid, 0)[1]
        os.close(self.handle)
        return os.waitstatus_to_exitcode(status)


def test_ctrl_c_stops_an_answer_and_ctrl_d_the_program(tiny_model: Path) -> None:
    # A random model never ends its turn, so that an answer of 100,000 tokens lasts until it is stopped.
    options = ["--model", str(tiny_model), "--max-tokens", "100000", "--context", "500", "--temperature", "1"]
    window = Terminal("-m", "edgealign", "chat", *options, "--min-p", "0")
    window.wait_for("/help lists the commands")
    window.wait_for(PROMPT)
    window.type("/help\n")
    window.wait_for("/system TEXT")
    window.wait_for(PROMPT)
    window.type("word " * 600 + "\n")
    window.wait_for("leave no room")
    window.wait_for(PROMPT)
    window.type("Hello\n")
    window.wait_for("Hello\r\n")
    while len(window.shown) < 10:
        window.shown += os.read(window.handle, 4096).decode(errors="replace")
    window.type("\x03")
    window.wait_for(PROMPT)
    # At the prompt it only gives a new one. Python loses one that comes just before it waits for a key: type again.
    for _ in range(10):
        window.type("\x03")
        if window.waits_for(PROMPT, patience_s=5.0):
            break
    else:
        pytest.fail(f"no new prompt; shown: {window.shown!r}")
    window.type("\x04")
    assert window.end() == 0
