"""The phone kit in a GGUF bundle: scripts for adb and llama.cpp's own programs, and the tokens that a phone must draw.

`edgealign export --target gguf --kit android` adds a folder `kit/` to the bundle, before it is published. `check.sh` in
it compares a phone's greedy tokens with `expected.tsv`, which is written here by our own llama.cpp session; `bench.sh`
measures. The bundle opens like any other: every file of the kit is in its manifest.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from export_program import Job

from edgealign.artifact import Draft
from edgealign.errors import InputError
from edgealign.models.load import load_tokenizer
from edgealign.parity_text import PROBE_TEXT
from edgealign.progress import say
from edgealign.runtimes.gguf_header import check_gguf
from edgealign.runtimes.llamacpp import installed_version
from edgealign.runtimes.process import ProcessSession
from edgealign.runtimes.session import Bundle

SCRIPTS = Path(__file__).resolve().parent / "kits" / "android"
FOLDER = "kit"
NEW_TOKENS = 48
CONTEXT = 512  # check.sh says the same to llama-completion
SPEED_TOKENS = 512
SWAYS = 2.0  # another processor may round as differently again as two ways to compute do on this one
EXACT = 1e-3  # logits: 32-bit weights have hardly any rounding to speak of
BASE = "-"  # no user's name: those begin with a letter or a digit
QUESTIONS = (
    "Tell me a short story about a dog and a red ball.",
    "How do I keep bread fresh? Give me two tips.",
    "Write one friendly sentence to a colleague who starts today.",
)
PARAGRAPHS = PROBE_TEXT.split("\n\n")
OPENINGS = [PARAGRAPHS[place].partition(".")[0] for place in (0, 4, 5)]  # prose, to be gone on with


@dataclass(frozen=True)
class Prompt:
    """`text` as llama-completion gets it, `ids` as it must see it (with the start token that llama.cpp adds)."""

    text: str
    ids: list[int]


@dataclass(frozen=True)
class Answer:
    """What one user's model says to one prompt; `leads`: of each token over its rival, the second-best, in logits."""

    user: str
    adapter: Path | None
    number: int
    prompt: Prompt
    tokens: list[int] = field(default_factory=list)
    rivals: list[int] = field(default_factory=list)
    leads: list[float] = field(default_factory=list)

    def line(self, limit: int) -> str:
        ids, new = (" ".join(map(str, numbers)) for numbers in (self.prompt.ids, self.tokens))
        leads = " ".join(f"{lead:.4f}" for lead in self.leads)
        return "\t".join((self.user, str(self.number), str(limit), ids, new, leads)) + "\n"


def add_kit(job: Job, bundle: Bundle, draft: Draft) -> None:
    """Write the scripts, the prompts and the expected tokens into `draft`.

    Raises:
        InputError: the model's context is too short for the prompts.
    """
    folder = draft.dir / FOLDER
    shutil.copytree(SCRIPTS, folder)
    for script in folder.glob("*.sh"):
        script.chmod(0o755)
    tokenizer = load_tokenizer(job.base.path)
    with _session(bundle, job) as session:
        facts = session.info()
        reader = _Reader(session, facts, bundle.model_file)
        prompts = [reader.read(text) for text in _texts(tokenizer, reader.start)]
        longest = max(len(prompt.ids) for prompt in prompts)
        limit = min(NEW_TOKENS, min(CONTEXT, facts["n_ctx"]) - longest - 8)
        if limit < 1:
            raise InputError(
                bundle.path, f"its context of {facts['n_ctx']} tokens is too short for the kit's prompts",
                f"export with a context of at least {longest + 16} tokens",
            )
        say(f"kit: {limit} greedy tokens from {len(prompts)} prompts, base and {len(bundle.adapters)} users")
        answers = list(_draw_all(session, bundle, prompts, limit, _stop_ids(job, facts)))
        sway = max(_sway(session, answer, one_by_one=True) for answer in answers)
        speed = reader.cut(" ".join(PARAGRAPHS) * 8, min(SPEED_TOKENS, facts["n_ctx"] // 2))
    if facts["extra_bufts"]:
        with _session(bundle, job, extra_bufts=False) as session:
            sway = max(sway, *(_sway(session, answer, one_by_one=False) for answer in answers))
    for number, prompt in enumerate(prompts, start=1):
        (folder / f"prompt-{number}.txt").write_bytes(prompt.text.encode())
    (folder / "speed.txt").write_bytes(speed.text.encode())
    undecided = max(SWAYS * sway, EXACT)
    head = (
        f"# llama.cpp of llama-cpp-python {installed_version()}, {platform.machine()}: {facts['system_info']}\n"
        f"# undecided up to {undecided:.4f} logits: {SWAYS:g} times what rounding moved a lead on that machine\n"
        "# user, prompt, most new tokens, ids of the prompt, new ids, their leads in logits\n"
    )
    (folder / "expected.tsv").write_text(head + "".join(answer.line(limit) for answer in answers), encoding="utf-8")
    draft.meta["kit"] = {
        "name": "android", "prompts": len(prompts), "new_tokens": limit, "speed_tokens": len(speed.ids),
        "undecided_logits": round(undecided, 4), "answers_changed": _changed(answers),
    }


class _Reader:
    """Text to the ids that llama.cpp sees: its own tokenizer, and the start token where the file asks for one."""

    def __init__(self, session: ProcessSession, facts: dict[str, Any], file: Path) -> None:
        self._session = session
        self.start = [facts["bos"]] if check_gguf(file).metadata.get("tokenizer.ggml.add_bos_token") else []

    def read(self, text: str) -> Prompt:
        return Prompt(text, [*self.start, *self._session.tokenize(text)])

    def cut(self, text: str, most: int) -> Prompt:
        """The longest run of whole words from the start of `text` with at most `most` tokens."""
        words = text.split(" ")
        low, high = 1, len(words)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if len(self.read(" ".join(words[:middle])).ids) <= most else (low, middle - 1)
        return self.read(" ".join(words[:low]))


def _texts(tokenizer: Any, start: list[int]) -> list[str]:
    """Questions as the model's template renders them, and beginnings of texts."""
    texts = list(QUESTIONS)
    if tokenizer.chat_template:
        texts = [
            str(tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            ))
            for text in QUESTIONS
        ]
    # llama.cpp puts the start token in front by itself: a template's own would be a second one.
    bos = tokenizer.bos_token if start else None
    return [text.removeprefix(bos) if bos else text for text in (*texts, *OPENINGS)]


def _stop_ids(job: Job, facts: dict[str, Any]) -> set[int]:
    """What ends an answer, in the model's generation config or in the file."""
    from transformers import GenerationConfig

    stop: Any = None
    if (job.base.path / "generation_config.json").is_file():
        stop = GenerationConfig.from_pretrained(job.base.path).eos_token_id
    return {facts["eos"], *(stop if isinstance(stop, list) else [] if stop is None else [stop])}


def _session(bundle: Bundle, job: Job, **options: Any) -> ProcessSession:
    """F32 cache, no flash attention: what then differs elsewhere is arithmetic on the weights, and nothing else."""
    return ProcessSession(bundle.model_file, exact=True, threads=job.recipe.threads or None, **options)


def _draw_all(
    session: ProcessSession, bundle: Bundle, prompts: list[Prompt], limit: int, stop: set[int]
) -> Iterator[Answer]:
    """One answer for each user and prompt."""
    for user, adapter in ((BASE, None), *sorted(bundle.adapters.items())):
        session.set_user(adapter)
        for number, prompt in enumerate(prompts, start=1):
            yield _draw(session, Answer(user, adapter, number, prompt), limit, stop)


def _draw(session: ProcessSession, answer: Answer, limit: int, stop: set[int]) -> Answer:
    """Fill in the greedy tokens, a stop token included, and how far each led in logits."""
    logits = _feed(session, answer.prompt, one_by_one=False)
    while True:
        first = int(np.argmax(logits))  # of equals the first, as llama.cpp takes it
        others = logits.copy()
        others[first] = -np.inf
        second = int(np.argmax(others))
        answer.tokens.append(first)
        answer.rivals.append(second)
        answer.leads.append(float(logits[first] - logits[second]))
        if first in stop or len(answer.tokens) == limit:
            return answer
        logits = session.step(first)


def _sway(session: ProcessSession, answer: Answer, *, one_by_one: bool) -> float:
    """How far a lead moves at most where the same tokens are computed in another order: that is rounding, no error."""
    session.set_user(answer.adapter)
    logits = _feed(session, answer.prompt, one_by_one=one_by_one)
    most = 0.0
    for place, (token, rival, lead) in enumerate(zip(answer.tokens, answer.rivals, answer.leads, strict=True)):
        if place:
            logits = session.step(answer.tokens[place - 1])
        most = max(most, abs(float(logits[token] - logits[rival]) - lead))
    return most


def _feed(session: ProcessSession, prompt: Prompt, *, one_by_one: bool) -> Any:
    """Logits (V,) after a prompt from an empty state."""
    session.reset()
    head = prompt.ids[:-1]
    if one_by_one:
        for token in head:
            session.step(token)
    elif head:
        session.prefill(head)  # as llama-completion does with a prompt cache: all but the last token, then that one
    return session.step(prompt.ids[-1])


def _changed(answers: list[Answer]) -> dict[str, int]:
    """For each user, on how many prompts the adapter changes the answer: where it is 0, the check says nothing."""
    base = {answer.number: answer.tokens for answer in answers if answer.user == BASE}
    users = sorted({answer.user for answer in answers} - {BASE})
    return {
        user: sum(answer.tokens != base[answer.number] for answer in answers if answer.user == user) for user in users
    }
