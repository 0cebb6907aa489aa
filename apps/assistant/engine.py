"""One decoding worker over one session: a queue of limited length, what is a user's own per request, cancelling.

    engine = open_engine("bundle")
    async for event in engine.answer(Job(prompt=ids, sampling=sampling, user="ana")): ...   # Piece, ..., Answer
    await engine.lend(lambda session: score(session, ids))                                  # the base model's session

The session lives in a process of its own, so that a native crash, or a call that never returns, costs one answer and
not the server; the next request opens it again. Every request starts from an empty state, under its own user: its
answer depends on nothing else. Only a `keep` job, the next turn of a conversation, continues the state, and only if the
user is the same one and the state is a beginning of its prompt.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from assistant.constrained import Grammars
from assistant.faults import Fault, fault_of
from assistant.metrics import Metrics
from assistant.pieces import Answer, Emit, Event, Job, Personal, Writer
from edgealign.data.encode import encode_prompt, end_of_turn_id
from edgealign.data.forms import Message
from edgealign.data.typed import encoder
from edgealign.errors import EdgealignError, InputError
from edgealign.personalize.tilt import sentence_ends, whole
from edgealign.runtimes.generate import Generated, generate
from edgealign.runtimes.process import ProcessSession, RuntimeCrash

if TYPE_CHECKING:
    from edgealign.runtimes.session import Session

T = TypeVar("T")
OPEN_S, CALL_S = 600.0, 120.0  # a runtime that is silent for longer, while it opens and in one call, is started again
CLOSE_S = 5.0  # how long the end of the server waits for a call that does not come back
PREFILL = 512  # prompt tokens between two looks at whether the request was cancelled; llama.cpp's own n_ubatch


class Engine:
    """The worker. `users` are adapters by name, `personal` what was learned here; `open_session` makes the session,
    again after a crash."""

    def __init__(
        self, open_session: Callable[[], Session], *, name: str, tokenizers: tuple[Any, Any], context: int,
        users: Mapping[str, Path], metrics: Metrics, facts: Mapping[str, Any], queue: int,
    ) -> None:  # fmt: skip
        self.name, self.context, self.users, self.metrics, self.facts = name, context, dict(users), metrics, dict(facts)
        self.personal: dict[str, Personal] = {}  # by the user's name; whoever changes it replaces whole values
        self.queue = queue
        self._open, self._session = open_session, open_session()
        # One tokenizer for each side: encoding changes a tokenizer's settings for a moment, decoding must not see it.
        self.tokenizer, self._decoder = tokenizers
        self._encoding = threading.Lock()
        self._end = end_of_turn_id(self.tokenizer)
        self._grammars = Grammars(self.tokenizer, self._end)
        self._broken = False
        self._user: Path | None = None
        self._fed: list[int] = []
        self._thread = ThreadPoolExecutor(1, "decoding")
        self._turn = asyncio.Lock()
        self._lent = False
        self._waiting = 0
        self._usual_s = 1.0  # how long a request has taken lately
        self._closing = threading.Event()
        for adapter in self.users.values():
            self._session.set_user(adapter)  # a wrong base is refused now, not in the middle of a conversation
        self._session.set_user(None)

    def models(self) -> dict[str, str | None]:
        """Every model id and its user: the base, and `base@user`."""
        return {self.name: None, **{f"{self.name}@{user}": user for user in sorted({*self.users, *self.personal})}}

    def user_of(self, model: str) -> str | None:
        """The user whose own version a model id means; None is the base.

        Raises:
            Fault: no such model.
        """
        known = self.models()
        if model not in known:
            raise Fault(404, "no such model; GET /v1/models lists them", code="model_not_found", param="model")
        return known[model]

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """What the model sees of a conversation; what is typed is text, never a special token."""
        with self._encoding:
            return tuple(encode_prompt(self.tokenizer, messages, typed=True))

    def encode_answer(self, text: str) -> tuple[int, ...]:
        """A whole answer with its end of turn, as it is read."""
        with self._encoding:
            return (*self.tokenizer.encode(text, add_special_tokens=False), self._end)

    def grammar(self, schema: Mapping[str, Any]) -> str:
        """What a `Job` needs for answers that follow a JSON schema.

        Raises:
            Fault: it cannot be followed.
        """
        with self._encoding:
            return self._grammars.compile(schema)

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Plain text to be continued, behind the token that begins every text."""
        with self._encoding:
            first = self.tokenizer("a")["input_ids"][0]
            begin = (int(first),) if first == self.tokenizer.bos_token_id else ()
            return (*begin, *encoder(self.tokenizer)(text, False))

    async def answer(self, job: Job, *, admitted: bool = False) -> AsyncGenerator[Event, None]:
        """Wait for the turn, then pieces as they come and an `Answer` at the end. Leaving the loop cancels.

        Args:
            admitted: a further answer to a request that has had its place in the queue.

        Raises:
            Fault: the queue is full, or the model failed.
        """
        busy = (self._turn.locked() and not self._lent) or self._waiting
        if not admitted and busy and self._waiting >= self.queue:
            self.metrics.refused.inc()
            wait_s = max(1, round(self._usual_s * (self._waiting + 1)))
            raise Fault(
                429, f"{self._waiting} requests are waiting already", code="queue_full",
                headers={"retry-after": str(wait_s)},
            )  # fmt: skip
        start_s = time.perf_counter()
        self._waiting += 1
        self.metrics.waiting.set(self._waiting)
        try:
            await self._turn.acquire()
        finally:
            self._waiting -= 1
            self.metrics.waiting.set(self._waiting)
        self.metrics.queued.observe(time.perf_counter() - start_s)
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        cancelled = threading.Event()

        def emit(event: Event | Exception) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        working = loop.run_in_executor(self._thread, self._work, job, emit, cancelled)
        working.add_done_callback(lambda _: self._turn.release())  # the next one's turn: when the worker is free
        try:
            while True:
                event = await events.get()
                if isinstance(event, EdgealignError):
                    raise fault_of(event)
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Answer):
                    return
        finally:
            cancelled.set()

    async def lend(self, call: Callable[[Session], T], adapter: Path | None = None) -> T:
        """The result of `call`, in the worker's thread; when those who wait by now had their turn.

        The session is the base model's, or has this adapter, as the runtime reads it.

        Leaving before its turn cancels it. It has no place in the queue, so it never makes an answer be refused.
        """
        await self._turn.acquire()
        self._lent = True

        def release(_: object) -> None:
            self._lent = False
            self._turn.release()

        working = asyncio.get_running_loop().run_in_executor(self._thread, self._work_lent, call, adapter)
        working.add_done_callback(release)
        return await working

    def close(self) -> None:
        """Stop what is being decoded, and free the model; a call that hangs is not waited for."""
        self._closing.set()
        late = threading.Timer(CLOSE_S, getattr(self._session, "kill", lambda: None))
        late.start()
        self._thread.shutdown()
        late.cancel()
        self._session.close()

    def _work_lent(self, call: Callable[[Session], T], adapter: Path | None) -> T:
        """In the worker's thread: the state is anybody's guess afterwards."""
        try:
            self._enter(adapter, keep=False, prompt=())
            self._fed = []
            return call(self._session)
        except Exception:
            self._broken = True
            raise

    def _work(self, job: Job, emit: Emit, cancelled: threading.Event) -> None:
        """In the worker's thread: one job, whose last event is its answer or its error."""
        start_s = time.perf_counter()
        try:
            answer = self._decode(job, emit, lambda: cancelled.is_set() or self._closing.is_set())
        except Exception as error:
            self._broken = True  # whatever happened: the next request gets a fresh session
            self.metrics.crashes.inc(isinstance(error, RuntimeCrash))
            emit(error)
        else:
            self._usual_s += 0.2 * (time.perf_counter() - start_s - self._usual_s)
            self.metrics.answers.labels(answer.finish).inc()
            self.metrics.prompt_tokens.inc(answer.prompt_tokens)
            self.metrics.generated_tokens.inc(answer.tokens)
            if answer.tokens:
                self.metrics.ttft.observe(answer.ttft_s)
            emit(answer)

    def _decode(self, job: Job, emit: Emit, cancelled: Callable[[], bool]) -> Answer:
        start_s = time.perf_counter()
        own = job.personal or self._own(job.user)
        prompt, known = job.prompt, self._enter(own.adapter, keep=job.keep, prompt=job.prompt)
        writer = Writer(self._decoder, job, emit)
        ends = {self._end} if job.chat else {self._end, int(self.tokenizer.eos_token_id or self._end)}
        tilt = replace(own.tilt, paid=[]) if own.tilt else None
        hooks = [whole(tilt, sorted(ends), sentence_ends(self._decoder))] if tilt else []
        hooks += [] if job.top_logprobs is None else [writer.see]
        hooks += [] if job.grammar is None else [self._grammars.hook(job.grammar)]
        self._fed = []  # until the answer is through, nobody knows
        while len(prompt) - known > PREFILL and not cancelled():
            self._session.prefill(prompt[known : known + PREFILL])
            known += PREFILL
        if cancelled():
            return Answer("", "cancelled", len(prompt), 0, 0.0, time.perf_counter() - start_s)
        fed_s = time.perf_counter() - start_s
        made = generate(
            self._session, prompt[known:], before=prompt[:known], sampling=job.sampling,
            stop=ends, hooks=hooks,
            on_token=lambda token: writer.push(token) and not cancelled(),
        )  # fmt: skip
        self._fed = [*prompt, *_fed(made)]
        text = writer.close()
        finish = "stop" if writer.stopped else made.finish
        seconds = time.perf_counter() - start_s
        paid = {"kl_nats": round(tilt.mean_kl_nats, 4)} if tilt else {}
        taste = {**own.facts, **paid} if own.facts else None
        return Answer(text, finish, len(prompt), len(made.tokens), fed_s + made.ttft_s, seconds, taste)

    def _own(self, user: str | None) -> Personal:
        """What is this user's own now; who was forgotten while they waited has nothing."""
        if user is None:
            return Personal()
        return self.personal.get(user) or Personal(adapter=self.users.get(user))

    def _enter(self, adapter: Path | None, *, keep: bool, prompt: tuple[int, ...]) -> int:
        """Make the state that a job starts from: its user's, and empty or a beginning of its prompt of this length."""
        if self._closing.is_set():
            raise EdgealignError("the server", "is ending", "start it again")
        if self._broken:
            self._session.close()
            self._session, self._broken, self._user, self._fed = self._open(), False, None, []
        if adapter != self._user:
            start_s = time.perf_counter()
            self._fed = []
            self._session.set_user(adapter)
            self._user = adapter
            self.metrics.swaps.observe(time.perf_counter() - start_s)
            return 0
        known = len(self._fed)
        if keep and 0 < known < len(prompt) and list(prompt[:known]) == self._fed:
            return known
        self._session.reset()
        return 0


def open_engine(
    source: str | Path, *, adapters: Mapping[str, Path] | None = None, metrics: Metrics | None = None,
    threads: int | None = None, context: int | None = None, queue: int = 16,
) -> Engine:  # fmt: skip
    """An engine over a bundle, with its own users, or over a model in torch; `adapters` are more users by name.

    Raises:
        UsageError: it cannot be opened, or an adapter is not of this model.
        ToolMissing: the bundle's runtime is not installed.
    """
    from edgealign.artifact import MANIFEST, open_artifact, sha256_file
    from edgealign.chat.conversation import DEFAULT_CONTEXT
    from edgealign.models.load import load_tokenizer, read_config, resolve_model
    from edgealign.runtimes.session import read_bundle, runtime_of

    folder = resolve_model(source)
    runtime = runtime_of(folder)
    options: dict[str, Any] = {"threads": threads}
    users: dict[str, Path] = {}
    if runtime == "torch":
        base = digest = open_artifact(folder, kind="model").digest if (folder / MANIFEST).is_file() else None
    else:
        users |= read_bundle(folder).adapters
        bundle = open_artifact(folder, check_digests=False)
        digest, base = bundle.digest, bundle.meta.get("model_digest")
        options |= {"context": context, "check_digests": False}
    users |= adapters or {}
    if odd := next((user for user in users if not user.isprintable() or not user or len(user) > 64), None):
        raise InputError(repr(odd), "is no user's name", "use 1 to 64 printable characters")

    weights = {user: path if path.is_file() else path / "adapter_model.safetensors" for user, path in users.items()}
    digests = {user: sha256_file(file) for user, file in weights.items() if file.is_file()}

    def open_session() -> ProcessSession:
        opened = ProcessSession(folder, timeout_s=OPEN_S, **options)
        opened.timeout_s = CALL_S
        return opened

    session = open_session()
    ready = [session]
    try:
        own = session.info().get("n_ctx") or read_config(folder).get("max_position_embeddings") or DEFAULT_CONTEXT
        return Engine(
            lambda: ready.pop() if ready else open_session(), name=folder.resolve().name.replace("@", "-"),
            tokenizers=(load_tokenizer(folder), load_tokenizer(folder)), context=min(int(own), context or int(own)),
            users=users, metrics=metrics or Metrics(), queue=queue,
            facts={"runtime": runtime, "digest": digest, "adapters": digests, "base_digest": base, "folder": folder},
        )  # fmt: skip
    except BaseException:
        session.close()
        raise


def _fed(made: Generated) -> tuple[int, ...]:
    """The tokens that the loop fed: all but the last, unless a stop token came after it."""
    return made.tokens if made.finish == "stop" else made.tokens[:-1]
