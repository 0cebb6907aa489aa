"""Kill -9 at random moments, under load: what was acknowledged is there, what was not is whole or absent."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from edgealign.errors import UsageError

from .conftest import TOKEN, until

PROGRAM = Path(__file__).with_name("killed_server.py")
NO_TLS = httpx.create_ssl_context(verify=False)  # once: a client of its own would read all certificates for each
WRITER = """
import http.client, json, sys
port, token, conversation, question, writer, count = sys.argv[1:]
link = http.client.HTTPConnection("127.0.0.1", int(port), timeout=600)
headers = {"authorization": "Bearer " + token, "content-type": "application/json"}
for number in range(int(count)):
    body = json.dumps({"content": f"{writer} {number}", "parent": question})
    link.request("POST", f"/api/conversations/{conversation}/messages", body, headers)
    answer = link.getresponse()
    answer.read()
    assert answer.status == 201, answer.status
"""


class Killed:
    """The other side of `killed_server.py`."""

    def __init__(self, home: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.program = subprocess.Popen(
            [sys.executable, str(PROGRAM), str(home), str(self.port), TOKEN], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.pid = 0

    @contextmanager
    def client(self) -> Iterator[httpx.Client]:
        headers, url = {"authorization": f"Bearer {TOKEN}"}, f"http://127.0.0.1:{self.port}"
        with httpx.Client(base_url=url, headers=headers, timeout=600, verify=NO_TLS) as client:
            yield client

    def start(self) -> None:
        assert self.program.stdin
        assert self.program.stdout
        self.program.stdin.write("start\n")
        self.program.stdin.flush()
        self.pid = int(self.program.stdout.readline())
        until(self._answers)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def end(self) -> None:
        self.kill()
        assert self.program.stdin
        assert self.program.stdout
        self.program.stdin.close()
        self.program.wait()
        self.program.stdout.close()

    def _answers(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/health", verify=NO_TLS).status_code == 200
        except httpx.TransportError:
            return False


@pytest.fixture
def killed(tmp_path: Path) -> Iterator[Killed]:
    server = Killed(tmp_path / "home")
    server.start()
    yield server
    server.end()


def conversation_of(client: httpx.Client, answers: int) -> tuple[str, str, list[str]]:
    """A conversation, its question, and this many answers to it."""
    made = client.post("/api/conversations", json={}).json()["id"]
    question = client.post(f"/api/conversations/{made}/messages", json={"content": "Q"}).json()["id"]
    said = [
        client.post(f"/api/messages/{question}/answers", json={"stream": False, "max_tokens": 1}).json()["id"]
        for _ in range(answers)
    ]
    return made, question, said


@pytest.mark.parametrize("kills", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_acknowledged_feedback_survives_sigkill(killed: Killed, kills: int) -> None:
    with killed.client() as client:
        conversation, _, answers = conversation_of(client, 8)
    acknowledged: dict[str, int] = {}
    counts = [0] * len(answers)
    sent: dict[str, int] = {}
    dice = random.Random(7)
    for round_number in range(kills):

        def write(answer: str, first: int) -> None:
            number = first
            with killed.client() as client:
                while True:
                    sent[answer] = number
                    form = {"rating": 1 if number % 2 else -1, "comment": str(number)}
                    try:
                        done = client.put(f"/api/messages/{answer}/feedback", json=form)
                    except httpx.TransportError:
                        return
                    assert done.status_code == 200
                    acknowledged[answer] = number
                    counts[answers.index(answer)] += 1
                    number += 1

        first = round_number * 1_000_000
        writers = [threading.Thread(target=write, args=(answer, first)) for answer in answers]
        for writer in writers:
            writer.start()
        wanted = sum(counts) + dice.randint(1, 40)  # counted, not timed: a busy machine writes slowly
        until(lambda: sum(counts) >= wanted)  # noqa: B023
        time.sleep(dice.uniform(0.0, 0.01))
        killed.kill()
        for writer in writers:
            writer.join()
        killed.start()
        with killed.client() as client:
            messages = client.get(f"/api/conversations/{conversation}").json()["messages"]
        kept = {entry["id"]: entry["feedback"] for entry in messages if entry["feedback"]}
        for answer, number in acknowledged.items():
            stored = int(kept[answer]["comment"])
            assert number <= stored <= sent[answer], (round_number, answer)
            assert kept[answer]["rating"] == (1 if stored % 2 else -1)
    assert sum(counts) >= kills


@pytest.mark.parametrize("count", [25, pytest.param(1000, marks=pytest.mark.slow)])
def test_eight_processes_write_exactly_what_they_say(killed: Killed, count: int) -> None:
    with killed.client() as client:
        conversation, _, (parent,) = conversation_of(client, 1)
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, str(killed.port), TOKEN, conversation, parent, str(writer), str(count)]
            )
            for writer in range(8)
        ]
        assert [writer.wait() for writer in writers] == [0] * 8
        messages: list[dict[str, Any]] = client.get(f"/api/conversations/{conversation}").json()["messages"]
    written = sorted(entry["content"] for entry in messages if entry["parent"] == parent)
    assert written == sorted(f"{writer} {number}" for writer in range(8) for number in range(count))


def test_a_second_server_on_the_same_folder_is_refused(killed: Killed, tmp_path: Path) -> None:
    from assistant.store import Store

    with pytest.raises(UsageError, match="open in another"):
        Store(tmp_path / "home")
    killed.kill()
    until(lambda: _opens(tmp_path / "home"))  # a killed server holds nothing


def _opens(home: Path) -> bool:
    from assistant.store import Store

    try:
        Store(home).close()
    except UsageError:
        return False
    return True
