"""A LoRA from a user's choices, trained in the background and used only if it beats the version in use.

    trainer = Trainer(tastes)
    await trainer.start("me")            # a process of its own at low priority: edgealign personalize --method lora
    trainer.state("me")                  # {"state": "running", "progress": 0.4, "message": ...}
    await trainer.cancel("me")

`personalize` holds a part of the choices out and publishes nothing that ranks them worse than the base model does. Here
the bar is higher: it and the version in use are asked for the same held-out choices, four or more, in the runtime that
answers, and it has to rank more of them as they were chosen; numbers are fitted on the other choices for that, as the
LoRA was. Training needs no basis, but the model in torch: the starter, the model that the server answers with, or the
one that a bundle was exported from, where it still lies.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from assistant.conversations import Json
from assistant.engine import Engine
from assistant.faults import Fault
from assistant.preferences import Chosen
from assistant.tastes import Tastes
from edgealign.artifact import Artifact, open_artifact, read_manifest
from edgealign.data.forms import to_json
from edgealign.data.synthetic import write_jsonl
from edgealign.errors import EdgealignError
from edgealign.models.builtin import NAMES, built_in
from edgealign.models.load import load_tokenizer
from edgealign.personalize.choices import load_choices
from edgealign.personalize.in_place import LEAST, ranked_right
from edgealign.personalize.lore import fit_users
from edgealign.personalize.recipes import MIN_CHOICES, LoraRecipe
from edgealign.plan import count_parameters

T = TypeVar("T")

SMALL, QUICK = 50_000_000, 1e-2  # parameters below which a fit takes this learning rate (LoraRecipe.learning_rate)
STEP = re.compile(r"^(?P<what>.+): (?P<done>\d+)/(?P<of>\d+)")
BEGUN, FITTED, RANKED = 0.1, 0.8, 0.9  # of the whole, when these are done
LONGEST_LINE = 300


@dataclass
class Run:
    """One user's training. `task` ends when everything is cleaned up."""

    state: str = "running"
    progress: float = 0.0
    message: str = "Starting"
    task: asyncio.Task[None] | None = field(default=None, repr=False)

    def as_json(self) -> Json:
        return {"state": self.state, "progress": round(self.progress, 3), "message": self.message}


class Trainer:
    """Over the tastes of one server; one training at a time."""

    def __init__(self, tastes: Tastes) -> None:
        self.tastes = tastes
        self.runs: dict[str, Run] = {}

    def why_not(self, user: str) -> str:
        """Why no LoRA can be trained for this user; empty where one can."""
        if reason := self.tastes.closed_to(user):
            return reason
        return "" if base_model(self.tastes.engine) else (
            "training needs the model in torch, and what this bundle was exported from is not here"
        )  # fmt: skip

    def state(self, user: str) -> Json:
        run = self.runs.get(user)
        return run.as_json() if run else Run("none", message="").as_json()

    async def start(self, user: str) -> None:
        """Begin.

        Raises:
            Fault: it cannot be trained here, there are too few choices, or something is being trained.
        """
        if reason := await asyncio.to_thread(self.why_not, user):
            raise Fault(409, reason, code="not_trainable")
        if any(run.state == "running" for run in self.runs.values()):
            raise Fault(409, "a training is running already", code="training")
        run = self.runs[user] = Run()
        try:
            chosen = await asyncio.to_thread(self.tastes.choices, user)
            if len(chosen) < MIN_CHOICES:
                reason = f"training takes {MIN_CHOICES} choices, there are {len(chosen)}"
                raise Fault(409, reason, code="too_few_choices")
        except BaseException:
            del self.runs[user]
            raise
        run.task = asyncio.create_task(self._run(user, run, chosen))

    async def cancel(self, user: str) -> None:
        """Stop, and wait until nothing is left of it."""
        run = self.runs.get(user)
        if run is None or run.task is None or run.task.done():
            return
        run.task.cancel()
        await asyncio.gather(run.task, return_exceptions=True)

    async def forget(self, user: str) -> None:
        await self.cancel(user)
        self.runs.pop(user, None)

    async def close(self) -> None:
        for user in list(self.runs):
            await self.cancel(user)

    async def _run(self, user: str, run: Run, chosen: Sequence[Chosen]) -> None:
        try:
            with self.tastes.versions.scratch() as folder:
                choices = folder / "choices.jsonl"
                await _through(write_jsonl, choices, [to_json(each.pair) for each in chosen])
                recipe = LoraRecipe(held_out=held_out_share(len(chosen)))
                made = await self._train(user, run, choices, folder / "adapter", recipe)
                run.progress, run.message = RANKED, "Comparing with the version in use"
                sides = await _through(self._split, user, choices, recipe, chosen)
                run.message = await self._use_if_better(user, made, *sides)
                run.state, run.progress = "finished", 1.0
        except asyncio.CancelledError:
            run.state, run.message = "cancelled", "Stopped; everything is as it was."
            raise
        except Exception as error:  # whatever it was: it must not keep everybody from training until a restart
            run.state, run.message = "failed", _reason(error)

    def _split(
        self, user: str, choices: Path, recipe: LoraRecipe, chosen: Sequence[Chosen]
    ) -> tuple[list[Chosen], list[Chosen]]:
        """(fitted, held out), as the command split the same file."""
        base = base_model(self.tastes.engine)
        assert base is not None
        known = {(each.pair.prompt, each.pair.chosen, each.pair.rejected): each for each in chosen}
        read = load_choices(choices, user, load_tokenizer(base), recipe)
        fitted, held_out = (
            [known[pair.prompt, pair.chosen, pair.rejected] for pair in part] for part in (read.fitted, read.held_out)
        )
        return fitted, held_out

    async def _train(self, user: str, run: Run, choices: Path, out: Path, recipe: LoraRecipe) -> Artifact:
        """The command in a process of its own; what it says is the progress.

        Raises:
            Fault: it published nothing, with its own last line.
        """
        base = base_model(self.tastes.engine)
        assert base is not None
        command = [
            *(["nice", "-n", "15"] if shutil.which("nice") else []),
            *fit_command(base, choices, user, out, held_out=recipe.held_out),
        ]
        root = str(Path(sys.modules["edgealign"].__file__ or "").resolve().parents[1])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE, env=environment,
        )  # fmt: skip
        last = ""
        try:
            assert process.stderr is not None
            async for line in _lines(process.stderr):
                last = line or last
                _tell(run, last)
            code = await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if code:
            said = last.removeprefix("edgealign: ") or f"the training ended with status {code}"
            raise Fault(422, f"{said[0].upper()}{said[1:]}.", code="not_trained")
        return await asyncio.to_thread(open_artifact, out, kind="adapter")

    async def _use_if_better(
        self, user: str, made: Artifact, fitted: Sequence[Chosen], held_out: Sequence[Chosen]
    ) -> str:
        """Use it if it ranks more held-out choices as they were made than the version in use; what came of it.

        A LoRA in use may have learned from some of them, which makes the bar higher and never lower.
        """
        tastes = self.tastes
        async with tastes.lock:
            if len(held_out) < LEAST:
                added = await _through(tastes.add_version, user, made.path, False)
                return (
                    f"Version {added.number} is kept and not in use: {len(held_out)} of {len(fitted) + len(held_out)} "
                    f"choices were held out, and a comparison takes {LEAST} ({2 * LEAST} choices in all)."
                )
            in_use = await asyncio.to_thread(tastes.versions.in_use, user)
            adapter = await asyncio.to_thread(tastes.adapter_of, made.path, made.path.parent / "converted")
            score = await tastes.ranked(adapter, held_out)
            if in_use is None or user in tastes.faults:
                bar = await tastes.ranked(None, held_out)
            elif in_use.method == "lore" and tastes.readings is not None:
                own = torch.from_numpy(await tastes.readings.of_choices(fitted))
                asked = await tastes.readings.of_choices(held_out)
                bar = ranked_right(asked[:, 0] + asked[:, 1:] @ fit_users(own[None]).weights[0])
            else:
                place = tastes.versions.converted(in_use)
                bar = await tastes.ranked(await asyncio.to_thread(tastes.adapter_of, in_use.folder, place), held_out)
            said = f"it ranks {score:.0%} of {len(held_out)} held-out choices as you did, the version in use {bar:.0%}"
            if score <= bar:
                return f"Not used: {said}."
            added = await _through(tastes.add_version, user, made.path)
            reason = f"Version {added.number} is in use: {said}."
            await asyncio.to_thread(tastes.versions.decide, user, reason)
            return reason


def held_out_share(choices: int) -> float:
    """Of how many choices are kept for the comparison: enough for one, where there are enough."""
    share = LEAST / choices if choices >= 2 * LEAST else 0.0
    return max(share, LoraRecipe().held_out)


def fit_command(base: Path, choices: Path, user: str, out: Path, *, held_out: float) -> list[str]:
    """What fits a user's LoRA here, on half of the cores."""
    command = [
        sys.executable, "-m", "edgealign", "personalize", "--method", "lora", f"--model={base}",
        f"--choices={choices}", f"--user={user}", f"--out={out}", f"--threads={max(1, (os.cpu_count() or 1) // 2)}",
        f"--held-out={held_out}",
    ]  # fmt: skip
    return [*command, f"--learning-rate={QUICK}"] if count_parameters(base) < SMALL else command


def base_model(engine: Engine) -> Path | None:
    """The model in torch that the server's answers come from, if it is on this machine."""
    folder, wanted = Path(engine.facts.get("folder") or ""), engine.facts.get("base_digest")
    if not wanted:
        return None
    if engine.facts["runtime"] == "torch":
        return folder
    try:
        starter = built_in(NAMES[0])
        if starter is not None and read_manifest(starter).digest == wanted:
            return starter
        for entry in read_manifest(folder).inputs:
            if entry.digest == wanted and read_manifest(folder / entry.hint).digest == wanted:
                return (folder / entry.hint).resolve()
    except EdgealignError:
        return None
    return None


async def _through(call: Callable[..., T], *arguments: Any) -> T:
    """In a thread, whose end is waited for also by who is cancelled: what it does would come after what follows."""
    working = asyncio.ensure_future(asyncio.to_thread(call, *arguments))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait([working])
        raise


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Lines of any length, cut; a stream's own iterator gives up at 64 KiB."""
    rest = b""
    while chunk := await stream.read(1 << 16):
        *lines, rest = (rest + chunk).split(b"\n")
        rest = rest[:LONGEST_LINE]
        for line in lines:
            yield line[:LONGEST_LINE].decode("utf-8", "replace").strip()
    yield rest.decode("utf-8", "replace").strip()


def _reason(error: Exception) -> str:
    """One line, without the words of errors that are not ours: they may be the user's."""
    if isinstance(error, EdgealignError):
        return error.line()
    if isinstance(error, Fault):
        return error.message
    why = f": {error.strerror}" if isinstance(error, OSError) and error.strerror else ""
    return f"The training failed ({type(error).__name__}{why}); everything is as it was."


def _tell(run: Run, line: str) -> None:
    if found := STEP.match(line):
        share = int(found["done"]) / max(1, int(found["of"]))
        run.progress = max(run.progress, BEGUN + (FITTED - BEGUN) * share)
        run.message = f"{found['what'].capitalize()}: {found['done']} of {found['of']}"
    elif " choices to learn" in line:
        run.progress, run.message = BEGUN, "Learning from your choices"

