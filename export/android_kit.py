"""The phone kit in a GGUF bundle: scripts for adb and llama.cpp's own programs, and the tokens that a phone must draw.

`edgealign export --target gguf --kit android` adds a folder `kit/` to the bundle, before it is published. `check.sh` in
it compares a phone's greedy tokens with `expected.tsv`, which is written here by our own llama.cpp session; `bench.sh`
measures. The bundle opens like any other: every file of the kit is in its manifest.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
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
    # F32 cache, no flash attention: what differs then is the processor's arithmetic on the weights, and nothing else.
    with closing(ProcessSession(bundle.model_file, exact=True, threads=job.recipe.threads or None)) as session:
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
        stop = _stop_ids(job, facts)
        lines = list(_expected(session, bundle, prompts, limit, stop))
        speed = reader.cut(" ".join(PARAGRAPHS) * 8, min(SPEED_TOKENS, facts["n_ctx"] // 2))
    for number, prompt in enumerate(prompts, start=1):
        (folder / f"prompt-{number}.txt").write_bytes(prompt.text.encode())
    (folder / "speed.txt").write_bytes(speed.text.encode())
    made_by = f"# llama.cpp of llama-cpp-python {installed_version()}, {platform.machine()}: {facts['system_info']}\n"
    columns = "# user, prompt, most new tokens, ids of the prompt, new ids, their leads in logits\n"
    (folder / "expected.tsv").write_text(made_by + columns + "\n".join(lines) + "\n", encoding="utf-8")
    draft.meta["kit"] = {
        "name": "android", "prompts": len(prompts), "new_tokens": limit, "speed_tokens": len(speed.ids),
        "users": sorted(bundle.adapters),
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


def _expected(
    session: ProcessSession, bundle: Bundle, prompts: list[Prompt], limit: int, stop: set[int]
) -> Iterator[str]:
    """One line for each user and prompt."""
    for user, adapter in ((BASE, None), *sorted(bundle.adapters.items())):
        session.set_user(adapter)
        for number, prompt in enumerate(prompts, start=1):
            tokens, leads = _draw(session, prompt.ids, limit, stop)
            ids, new = " ".join(map(str, prompt.ids)), " ".join(map(str, tokens))
            yield "\t".join((user, str(number), str(limit), ids, new, " ".join(f"{lead:.4f}" for lead in leads)))


def _draw(session: ProcessSession, ids: list[int], limit: int, stop: set[int]) -> tuple[list[int], list[float]]:
    """Greedy tokens, a stop token included, and how far each led in logits."""
    session.reset()
    # As llama-completion does with a prompt cache: it saves the state before the last token of the prompt.
    if len(ids) > 1:
        session.prefill(ids[:-1])
    logits = session.step(ids[-1])
    tokens: list[int] = []
    leads: list[float] = []
    while True:
        second, first = np.partition(logits, -2)[-2:]
        tokens.append(int(np.argmax(logits)))
        leads.append(float(first - second))
        if tokens[-1] in stop or len(tokens) == limit:
            return tokens, leads
        logits = session.step(tokens[-1])
