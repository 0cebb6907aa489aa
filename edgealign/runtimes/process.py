"""A session in a child process: a native crash becomes an error of this process, not its end.

The child speaks on its standard output in frames: one JSON line, then as many float32 numbers as the line says.
Nothing is pickled. What native code prints goes to a file and is shown only as the reason of a crash.

    python -m edgealign.runtimes.process             the child; one request per line on standard input
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np

import edgealign.errors
from edgealign.errors import EdgealignError, UsageError
from edgealign.progress import hush_libraries

if TYPE_CHECKING:
    from edgealign.runtimes.session import Logits

CALLS = ("prefill", "step", "score", "set_user", "reset", "tokenize", "info", "unload_adapters", "snapshot", "restore")
CLOSE_S = 10.0


class RuntimeCrash(EdgealignError):
    """The runtime's process died or went silent: a signal, an abort, a time limit."""


class ProcessSession:
    """Any session, opened by ``open_session`` in a process of its own.

    Args:
        timeout_s: a call that takes longer counts as a crash; None waits for ever.
        options: what ``open_session`` takes besides the path.
    """

    def __init__(self, path: Path | str, *, timeout_s: float | None = None, **options: Any) -> None:
        self.path = Path(path)
        self.timeout_s = timeout_s
        self._late = False
        self._settle(options)
        self._talk = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the child
        root = str(Path(__file__).resolve().parents[2])
        # OpenMP threads that wait for each other burn their cores for milliseconds; where another process wants those
        # cores everything stalls (a tiny model's verification: 119 s, and 4 s with a short spin, on two busy cores).
        environment = {"GOMP_SPINCOUNT": "1000", **os.environ}
        environment["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
        self._child = subprocess.Popen(
            [sys.executable, "-m", "edgealign.runtimes.process"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._talk, env=environment,
        )  # fmt: skip
        try:
            self._call("open", str(path), options)
        except BaseException:
            self.close()
            raise

    def prefill(self, tokens: Sequence[int]) -> Logits:
        return cast("Logits", self._call("prefill", [int(token) for token in tokens]))

    def step(self, token: int) -> Logits:
        return cast("Logits", self._call("step", int(token)))

    def score(self, tokens: Sequence[int]) -> Logits:
        return cast("Logits", self._call("score", [int(token) for token in tokens]))

    def set_user(self, adapter: Path | None) -> None:
        self._call("set_user", None if adapter is None else str(adapter))

    def reset(self) -> None:
        self._call("reset")

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        return cast("list[int]", self._call("tokenize", text, special))

    def info(self) -> dict[str, Any]:
        return cast("dict[str, Any]", self._call("info"))

    def snapshot(self) -> bytes:
        """The child's state; a runtime that cannot keep one raises a UsageError."""
        return base64.b64decode(self._call("snapshot"))

    def restore(self, state: bytes) -> None:
        self._call("restore", base64.b64encode(state).decode())

    def kill(self) -> None:
        """End the child now, from any thread: a call that is going on fails as a crash."""
        self._child.kill()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            cast("IO[bytes]", self._child.stdin).close()
        try:
            self._child.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        cast("IO[bytes]", self._child.stdout).close()
        self._talk.close()

    def __enter__(self) -> ProcessSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _settle(self, options: dict[str, Any]) -> None:
        """Ask the llama.cpp probe here, where what it says reaches the terminal."""
        from edgealign.runtimes.session import runtime_of

        name = options.get("runtime") or runtime_of(self.path)
        if name == "llama.cpp" and options.get("extra_bufts") is None:
            from edgealign.runtimes.probe import extra_buffers_work

            options["extra_bufts"] = extra_buffers_work()

    def _call(self, name: str, *arguments: Any) -> Any:
        if self._child.poll() is not None:
            raise self._crash(name)
        watchdog = threading.Timer(self.timeout_s, self._end_late) if self.timeout_s else None
        if watchdog:
            watchdog.start()
        try:
            stdin, stdout = cast("IO[bytes]", self._child.stdin), cast("IO[bytes]", self._child.stdout)
            stdin.write(json.dumps([name, *arguments]).encode() + b"\n")
            stdin.flush()
            line = stdout.readline()
            if not line.endswith(b"\n"):
                raise self._crash(name)
            return self._read(json.loads(line), stdout, name)
        except BrokenPipeError as error:
            raise self._crash(name) from error
        finally:
            if watchdog:
                watchdog.cancel()

    def _end_late(self) -> None:
        self._late = True
        self.kill()

    def _read(self, head: dict[str, Any], stdout: IO[bytes], name: str) -> Any:
        if "error" in head:
            raise getattr(edgealign.errors, head["error"])(*head["parts"])
        if "shape" not in head:
            return head["value"]
        values: Any = np.empty(head["shape"], dtype=np.float32)
        # Through bytes: numpy's own cast of an empty array to a memory view is an error.
        if values.nbytes and cast("Any", stdout).readinto(memoryview(values).cast("B")) != values.nbytes:
            raise self._crash(name)
        return values

    def _crash(self, name: str) -> RuntimeCrash:
        try:
            code = self._child.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            code = self._child.wait()
        reason = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        reason = f"gave no answer in {self.timeout_s:g} s" if self._late else reason
        self._talk.seek(0)
        words = [line.strip() for line in self._talk.read().decode("utf-8", "replace").splitlines() if line.strip()]
        last = f" ({words[-1][:200]})" if words else ""
        return RuntimeCrash(self.path, f"the runtime's process {reason} during {name}{last}", "open a new session")


def main() -> None:
    """The child's loop: read a call, do it, answer; ends when standard input does."""
    # Native code may print on descriptor 1; the answers get one of their own.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    hush_libraries()
    session: Any = None
    for line in sys.stdin.buffer:
        name, *arguments = json.loads(line)
        try:
            if name == "open":
                from edgealign.runtimes.session import open_session

                session = open_session(arguments[0], **arguments[1])
                value: Any = None
            else:
                value = _do(session, name, arguments)
        except EdgealignError as error:
            kind = type(error).__name__ if hasattr(edgealign.errors, type(error).__name__) else "EdgealignError"
            _answer(answers, {"error": kind, "parts": [error.value, error.reason, error.fix]})
            continue
        if isinstance(value, np.ndarray):
            _answer(answers, {"shape": value.shape}, np.ascontiguousarray(value, dtype=np.float32))
        else:
            _answer(answers, {"value": value})
    if session is not None:
        session.close()


def _do(session: Any, name: str, arguments: list[Any]) -> Any:
    if name not in CALLS:
        raise EdgealignError(name, "is not a call of a session", f"use one of: {', '.join(CALLS)}")
    if name == "score":
        from edgealign.runtimes.session import score

        return score(session, *arguments)
    if name in ("snapshot", "restore"):
        from edgealign.runtimes.session import Snapshots

        if not isinstance(session, Snapshots):
            raise UsageError(type(session).__name__, "cannot keep a state", "feed the prompt again")
        if name == "snapshot":
            return base64.b64encode(session.snapshot()).decode()
        arguments = [base64.b64decode(arguments[0])]
    if name == "set_user" and arguments[0] is not None:
        arguments = [Path(arguments[0])]
    return getattr(session, name)(*arguments)


def _answer(answers: IO[bytes], head: dict[str, Any], values: Any = None) -> None:
    answers.write(json.dumps(head).encode() + b"\n")
    if values is not None:
        answers.write(memoryview(values).cast("B"))
    answers.flush()


if __name__ == "__main__":
    main()
