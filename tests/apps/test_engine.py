"""The queue refuses what it cannot hold, a client that leaves stops the decoding, a crash costs one answer."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from assistant.engine import Engine, open_engine
from assistant.pieces import Answer, Job

from edgealign.personalize.tilt import Tilt, kl_nats, whole
from edgealign.runtimes.process import ProcessSession, RuntimeCrash
from edgealign.runtimes.recipes import Sampling
from edgealign.runtimes.scripted import ScriptedSession

from .conftest import PATIENCE_S, TOKEN, EngineMaker, Gate, Served, serving, until

ASK = {"model": "script", "prompt": "A fox", "max_tokens": 200}


@contextmanager
def asking(served: Served, body: dict[str, Any], path: str = "/v1/completions") -> Iterator[http.client.HTTPConnection]:
    """A request that was sent and whose answer was not read yet."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=PATIENCE_S)
    headers = {"authorization": f"Bearer {TOKEN}", "content-type": "application/json"}
    connection.request("POST", path, json.dumps(body), headers)
    try:
        yield connection
    finally:
        connection.close()


def value(served: Served, name: str) -> float:
    return float(served.engine.metrics.registry.get_sample_value(name) or 0.0)


def finished(served: Served, how: str) -> float:
    registry = served.engine.metrics.registry
    return float(registry.get_sample_value("edgealign_answers_total", {"finish": how}) or 0.0)


def test_a_full_queue_is_429_with_retry_after_and_nobody_admitted_is_lost(
    scripted: EngineMaker, gate: Gate, tmp_path: Path
) -> None:
    gate.held = True
    with serving(scripted(gate, queue=2), tmp_path) as served:
        statuses: list[int] = []

        def ask() -> None:
            statuses.append(served.http.post("/v1/completions", json={**ASK, "max_tokens": 3}).status_code)

        admitted = [threading.Thread(target=ask) for _ in range(3)]  # one is decoded, two wait
        for number, thread in enumerate(admitted):
            thread.start()
            until(lambda: gate.entered.is_set() and value(served, "edgealign_waiting") == number)  # noqa: B023
        refused = [served.http.post("/v1/completions", json=ASK) for _ in range(5)]
        streamed = served.http.post("/v1/completions", json={**ASK, "stream": True})
        assert served.http.get("/health").json() == {"status": "ok"}  # the queue is full, the server is not
        gate.permit(100)
        for thread in admitted:
            thread.join()
    assert statuses == [200, 200, 200]
    for answer in (*refused, streamed):
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "queue_full"
    assert value(served, "edgealign_refused_total") == 6


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_the_decoding(
    stream: bool, scripted: EngineMaker, gate: Gate, tmp_path: Path
) -> None:
    gate.held = True
    with serving(scripted(gate), tmp_path) as served:
        with asking(served, {**ASK, "stream": stream}) as connection:
            gate.permit(3)
            until(lambda: gate.steps == 3)
            if stream:
                assert connection.getresponse().read(6) == b"data: "
        # A step now and then, until the news has arrived; 200 would be the whole answer.
        until(lambda: gate.permit() or finished(served, "cancelled") == 1.0)
    assert gate.steps < 100


def test_who_leaves_the_queue_frees_the_place(scripted: EngineMaker, gate: Gate, tmp_path: Path) -> None:
    gate.held = True
    with serving(scripted(gate, queue=1), tmp_path) as served:
        with asking(served, ASK):
            until(gate.entered.is_set)
            with asking(served, ASK):
                until(lambda: value(served, "edgealign_waiting") == 1)
                assert served.http.post("/v1/completions", json=ASK).status_code == 429
            until(lambda: value(served, "edgealign_waiting") == 0)
        gate.held = False
        gate.permit()
        until(lambda: finished(served, "cancelled") + finished(served, "length") == 1.0)
        assert served.http.post("/v1/completions", json={**ASK, "max_tokens": 2}).status_code == 200


def test_a_long_prompt_is_cancelled_between_its_pieces(scripted: EngineMaker, gate: Gate, tmp_path: Path) -> None:
    gate.held = True
    with serving(scripted(gate, context=200_000), tmp_path) as served:
        with asking(served, {**ASK, "prompt": [5] * 100_000}):
            until(gate.entered.is_set)
        until(lambda: gate.permit() or finished(served, "cancelled") == 1.0)
    assert len(gate.tokens) < 100_000


def test_a_crash_of_the_runtime_costs_one_answer(scripted: EngineMaker, tmp_path: Path) -> None:
    opened = []

    def reopen() -> ProcessSession:
        opened.append(True)
        return ProcessSession(Path("nothing"), runtime="scripted", vocab=4096, fault="crash", fault_after=60)

    with serving(scripted(reopen=reopen), tmp_path) as served:
        short = {**ASK, "max_tokens": 4}
        first = served.http.post("/v1/completions", json=short)
        crashed = served.http.post("/v1/completions", json=ASK)
        again = served.http.post("/v1/completions", json={**short, "seed": 1})
        metrics = served.http.get("/metrics").text
    assert (first.status_code, crashed.status_code, again.status_code) == (200, 503, 200)
    assert crashed.json()["error"]["code"] == "runtime_failed"
    assert len(opened) == 2
    assert "edgealign_runtime_crashes_total 1.0" in metrics


def test_a_crash_in_a_stream_is_an_error_event(scripted: EngineMaker, tmp_path: Path) -> None:
    def reopen() -> ProcessSession:
        return ProcessSession(Path("nothing"), runtime="scripted", vocab=4096, fault="crash", fault_after=60)

    with serving(scripted(reopen=reopen), tmp_path) as served:
        body = {**ASK, "stream": True, "temperature": 2, "seed": 3}
        lines = [line for line in served.http.post("/v1/completions", json=body).text.splitlines() if line]
    last = json.loads(lines[-1].removeprefix("data: "))
    assert last["error"]["code"] == "runtime_failed"
    assert "[DONE]" not in lines[-1]


def child_of(engine: Engine) -> psutil.Process:
    session: Any = engine._session
    return psutil.Process(session._child.pid)


def test_a_runtime_that_hangs_costs_one_answer(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("assistant.engine.CALL_S", 3.0)
    with serving(open_engine(tiny_model), tmp_path) as served:
        ask = {**ASK, "model": served.model, "max_tokens": 2}
        assert served.http.post("/v1/completions", json=ask).status_code == 200
        child_of(served.engine).suspend()
        hung = served.http.post("/v1/completions", json=ask)
        assert hung.status_code == 503
        assert "gave no answer in 3 s" in hung.json()["error"]["message"]
        assert served.http.post("/v1/completions", json=ask).status_code == 200
        child_of(served.engine).suspend()
        with pytest.raises(RuntimeCrash, match="gave no answer"):
            served.engine._thread.submit(served.engine._work_lent, lambda session: session.reset(), None).result()
        assert served.http.post("/v1/completions", json=ask).status_code == 200


def test_the_end_does_not_wait_for_a_runtime_that_hangs(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("assistant.engine.CLOSE_S", 0.5)
    engine = open_engine(tiny_model)
    child = child_of(engine)
    child.suspend()
    asking = engine._thread.submit(engine._work_lent, lambda session: session.reset(), None)
    begun_s = time.monotonic()
    engine.close()
    assert time.monotonic() - begun_s < 30.0  # and not 120, what a call may take
    assert not child.is_running()
    assert isinstance(asking.exception(), RuntimeCrash)


def test_metrics_count_what_was_done(scripted_server: Served) -> None:
    http_client = scripted_server.http
    for _ in range(3):
        assert http_client.post("/v1/completions", json={**ASK, "model": "script@ana", "max_tokens": 2}).is_success
    http_client.get("/v1/models/nobody")
    text = http_client.get("/metrics").text
    assert 'edgealign_requests_total{route="/v1/completions",status="200"} 3.0' in text
    assert 'edgealign_requests_total{route="/v1/models/{model:path}",status="404"} 1.0' in text
    assert "edgealign_swap_seconds_count 1.0" in text
    assert "edgealign_ttft_seconds_count 3.0" in text
    assert "ana" not in text


def test_an_adapter_that_does_not_fit_is_refused_at_the_start(scripted: EngineMaker) -> None:
    class Picky(ScriptedSession):
        def set_user(self, adapter: Path | None) -> None:
            if adapter is not None:
                raise ValueError("another base")

    with pytest.raises(ValueError, match="another base"):
        scripted(Picky(vocab=4096), users=["ana"])


def test_what_borrows_the_session_gets_the_base_model_and_changes_no_answer(
    scripted: EngineMaker, gate: Gate
) -> None:
    engine = scripted(gate, users=("ana",), queue=0)
    sampling = Sampling(temperature=0, max_tokens=3)
    job = Job(prompt=engine.encode_text("A fox"), sampling=sampling, user="ana", chat=False)

    async def run() -> tuple[Any, ...]:
        async def said() -> list[str]:
            return [event.text async for event in engine.answer(job) if isinstance(event, Answer)]

        before = await said()
        seen = await engine.lend(lambda session: (gate.user, len(gate.tokens), session is gate))
        return before, seen, await said()

    with closing(engine):
        before, seen, after = asyncio.run(run())
    assert seen == ("", 0, True)
    assert before == after != [""]


def test_a_tilt_makes_no_end_likelier_and_leaves_everything_else_as_it_is() -> None:
    rng = np.random.default_rng(0)
    for reward in (-5.0, 0.5, 50.0):
        rewards, logits = rng.normal(size=24).astype(np.float32), rng.normal(size=24).astype(np.float32)
        rewards[7] = reward
        plain, tilt = Tilt(rewards, 1.5), Tilt(rewards, 1.5)
        found, raw = whole(tilt, [7])((), logits), plain((), logits)
        others = np.arange(24) != 7
        assert np.array_equal(found[others], raw[others])
        below = found[others].max() - found[7]
        assert below >= logits[others].max() - logits[7] - 1e-5
        assert below == pytest.approx(max(raw[others].max() - raw[7], logits[others].max() - logits[7]), abs=1e-5)
        assert tilt.paid == pytest.approx([kl_nats(found, logits)])
