"""The last check of an ONNX bundle: onnxruntime-genai opens the folder as it is and says the same.

The parity gate drives plain onnxruntime through our own session. Many will open the bundle with onnxruntime-genai:
its tokenizer, state and adapter table are its own. So both are asked, for the base and for every user.

Known limits of genai 0.18's tokenizer, which no check can mend: special tokens in a text are always tokens, so a
program that hands it what a user typed must take them out first; and a text ends at its first NUL.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from edgealign.artifact import Check
from edgealign.parity_strings import ORDINARY
from edgealign.parity_text import CONVERSATIONS
from edgealign.runtimes.onnx_session import OnnxSession
from edgealign.runtimes.session import Bundle

PROMPT_TOKENS = 24
STEPS = 4
NUL = "\x00"
TOLERANCE = 1e-3  # one runtime under both, so the numbers are the same but for the order of sums


def check_genai(bundle: Bundle, *, seed: int = 0) -> list[Check]:
    """Token ids and the logits of a prompt and a few steps; users in turn, the base before and after them."""
    import onnxruntime_genai as genai

    model = _open(genai, bundle)
    adapters = genai.Adapters(model)
    for name, file in bundle.adapters.items():
        adapters.load(str(file), name)
    with closing(OnnxSession(bundle.model_file, threads=1)) as session:
        checks = [_check_tokens(genai.Tokenizer(model), session)]
        prompt = [int(token) for token in np.random.default_rng(seed).integers(0, session.vocab, PROMPT_TOKENS)]
        turns: list[tuple[str, str | None]] = [("base", None), *((user, user) for user in bundle.adapters)]
        for name, user in (*turns, ("base_again", None)):
            ours = _our_logits(session, None if user is None else bundle.adapters[user], prompt)
            theirs = _their_logits(genai, model, adapters, user, prompt)
            gap = float(np.abs(ours - theirs).max())
            note = f"onnxruntime-genai against our session, {PROMPT_TOKENS} tokens and {STEPS} steps; at most"
            checks.append(Check(f"genai.{name}", gap, TOLERANCE, gap <= TOLERANCE, note))
    return checks


def _open(genai: Any, bundle: Bundle) -> Any:
    """The model on one thread, as our session: another number sums an adapter's products in another order.

    Where activations have 8 bits such a difference grows: 0.14 standard deviations of the logits were measured
    at the LFM2-350M shape with random weights, and none on one thread.
    """
    config = genai.Config(str(bundle.path))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}))
    return genai.Model(config)


def _our_logits(session: OnnxSession, adapter: Path | None, prompt: Sequence[int]) -> Any:
    session.set_user(adapter)
    rows = [session.prefill(prompt[:-STEPS])]
    return np.stack([*rows, *(session.step(token) for token in prompt[-STEPS:])])


def _their_logits(genai: Any, model: Any, adapters: Any, user: str | None, prompt: Sequence[int]) -> Any:
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=PROMPT_TOKENS + 8, do_sample=False)
    generator = genai.Generator(model, settings)
    if user is not None:
        generator.set_active_adapter(adapters, user)
    rows = []
    for part in (prompt[:-STEPS], *([token] for token in prompt[-STEPS:])):
        generator.append_tokens(np.array(part, dtype=np.int32))
        rows.append(np.array(generator.get_logits(), dtype=np.float32)[0, -1])
    return np.stack(rows)


def _check_tokens(tokenizer: Any, session: OnnxSession) -> Check:
    """Ordinary strings; genai 0.18 has no way to take typed special tokens as text, and ends a text at a NUL."""
    texts = [text for text in ORDINARY if text and NUL not in text]
    texts += [turn["content"] for turns in CONVERSATIONS for turn in turns]
    wrong = [text for text in texts if [int(token) for token in tokenizer.encode(text)] != session.tokenize(text)]
    note = f"texts of {len(texts)} with other token ids" + (f", first {wrong[0][:30]!r}" if wrong else "")
    return Check("genai.tokens", float(len(wrong)), 0.0, not wrong, note)
