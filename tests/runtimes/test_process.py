"""A session in a child process: the same answers, and its death is an error here."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from edgealign.errors import InputError, UsageError
from edgealign.runtimes.process import ProcessSession, RuntimeCrash
from edgealign.runtimes.scripted import ScriptedSession


@pytest.fixture(scope="module")
def child() -> ProcessSession:
    session = ProcessSession("nowhere", runtime="scripted", vocab=1000)
    yield session
    session.close()


def test_a_child_answers_bit_for_bit_like_the_session_itself(child: ProcessSession) -> None:
    own = ScriptedSession(vocab=1000)
    child.set_user(None)
    assert np.array_equal(child.prefill([1, 2, 3]), own.prefill([1, 2, 3]))
    assert np.array_equal(child.step(7), own.step(7))
    child.set_user(Path("ana"))
    own.set_user(Path("ana"))
    assert np.array_equal(child.prefill(np.array([4, 5])), own.prefill([4, 5]))
    child.reset()
    own.reset()
    rows = child.score([9, 8, 7])
    assert rows.shape == (3, 1000)
    assert np.array_equal(rows[0], own.prefill([9]))
    assert child.info()["runtime"] == "scripted"


def test_an_error_in_the_child_keeps_its_type_and_message_and_the_child_lives(child: ProcessSession) -> None:
    child.reset()
    with pytest.raises(UsageError, match="5000: is outside the vocabulary of 1000; encode with this tokenizer"):
        child.step(5000)
    assert child.prefill([1]).shape == (1000,)


def test_a_child_that_cannot_open_says_why() -> None:
    with pytest.raises(InputError, match="is neither a bundle"):
        ProcessSession("nowhere")


def test_a_native_crash_is_one_line_with_the_signal_and_this_process_lives() -> None:
    with ProcessSession("nowhere", runtime="scripted", fault="crash", fault_after=3) as session:
        session.prefill([1, 2])
        with pytest.raises(RuntimeCrash, match="nowhere: the runtime's process died of SIGSEGV during step") as caught:
            session.step(3)
        assert "\n" not in caught.value.line()
        assert caught.value.exit_code == 1
        with pytest.raises(RuntimeCrash):
            session.step(4)


@pytest.mark.slow
def test_a_child_that_hangs_is_killed_at_the_time_limit() -> None:
    start = time.monotonic()
    with (
        ProcessSession("nowhere", runtime="scripted", fault="hang", timeout_s=2.0) as session,
        pytest.raises(RuntimeCrash, match="gave no answer in 2 s during prefill"),
    ):
        session.prefill([1])
    assert time.monotonic() - start < 10


def test_closing_ends_the_child() -> None:
    session = ProcessSession("nowhere", runtime="scripted")
    pid = session._child.pid
    session.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    session.close()
