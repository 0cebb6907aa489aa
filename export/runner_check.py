"""The last check of an ExecuTorch bundle: ExecuTorch's own text runner opens it as it is and says the same.

The parity gate drives `forward` and `adapted` through our own session. Many will run the bundle with `TextLLMRunner`,
in C++ or on Android: its tokenizer and its loop are its own. It calls `forward`, so it speaks for the base model only,
and a conversation must begin with `reset()`: without one it goes on where the last one ended.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from edgealign.artifact import Check
from edgealign.models.load import load_tokenizer
from edgealign.runtimes.executorch_session import ExecutorchSession
from edgealign.runtimes.session import Bundle

QUESTION = "What keeps bread fresh?"
TOKENS = 24


def check_runner(bundle: Bundle, *, threads: int = 0) -> list[Check]:
    """The runner's greedy text for a question, twice with a reset between, against our session's."""
    tokenizer: Any = load_tokenizer(bundle.path)
    prompt = QUESTION
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": QUESTION}]
        prompt = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    with closing(ExecutorchSession(bundle.model_file, threads=threads or None)) as session:
        ids = session.tokenize(prompt)
        ends = {int(session.info()["eos"])}
        ours = _our_tokens(session, ids, ends)
    theirs = _their_texts(bundle, prompt)
    expected = str(tokenizer.decode(ours))
    checks = []
    for name, text in zip(("runner.first", "runner.after_reset"), theirs, strict=True):
        apart = _first_difference(text, expected)
        note = f"first character of {len(expected)} that ExecuTorch's runner writes otherwise, {len(ours)} tokens"
        checks.append(Check(name, float(apart), 0.0, apart == 0, note))
    return checks


def _our_tokens(session: ExecutorchSession, ids: list[int], ends: set[int]) -> list[int]:
    said: list[int] = []
    logits = session.prefill(ids)
    while len(said) < TOKENS:
        token = int(logits.argmax())
        if token in ends:
            break
        said.append(token)
        logits = session.step(token)
    return said


def _their_texts(bundle: Bundle, prompt: str) -> list[str]:
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    texts = []
    with _hushed():
        runner = TextLLMRunner(str(bundle.model_file), str(bundle.path / "tokenizer.json"))
        # The template writes the begin token itself.
        settings = GenerationConfig(echo=False, max_new_tokens=TOKENS, temperature=0.0, num_bos=0, num_eos=0)
        for _ in range(2):
            pieces: list[str] = []
            runner.generate(prompt, settings, pieces.append)
            texts.append("".join(pieces))
            runner.reset()
    return texts


def _first_difference(text: str, expected: str) -> int:
    """The place of the first other character, from 1; 0 for none. The runner may add the token that ends the turn."""
    if text.startswith(expected):
        return 0
    pairs = enumerate(zip(text, expected, strict=False))
    return 1 + next((place for place, (theirs, ours) in pairs if theirs != ours), len(text))


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """The runner prints its statistics on the descriptors of the process; standard output is ours."""
    kept = [os.dup(1), os.dup(2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        for number, descriptor in enumerate(kept, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.close(nowhere)
