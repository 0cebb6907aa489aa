"""`--quant auto`: measure mixtures of tensor types, and take the fastest that loses little.

First what every mixture costs: it is quantised, opened in llama.cpp in a process of its own, and held against torch
over the built-in text, exactly as the parity gate does it. Bases that lose too much get single groups raised. Then what
is within the budget is timed, in fresh processes that take turns, in rounds that keep the faster half.

Everything measured is kept beside the output until the bundle is published, so that an interrupted search goes on, and
one with another budget measures nothing twice.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import quant_candidates as candidates
from export_program import Job, require_space
from gguf_model import write_model
from gguf_quantize import Importance, quantize
from quant_candidates import Trial
from quant_timing import Device, Timer, Timing, make_timer

from edgealign.artifact import hash_json, versions, workdir, write_atomic
from edgealign.bench.machine import machine_card
from edgealign.errors import CheckFailed, EdgealignError
from edgealign.export_recipes import ExportRecipe
from edgealign.parity import quant_bits
from edgealign.parity_logits import open_bundle
from edgealign.parity_metrics import measure
from edgealign.parity_recipes import VerifyRecipe
from edgealign.parity_text import text_windows
from edgealign.progress import bar, say, track
from edgealign.runtimes.gguf_header import GgufInfo, count_token_bytes
from edgealign.runtimes.probe import default_threads
from edgealign.runtimes.session import Bundle
from edgealign.runtimes.torch_session import TorchSession
from edgealign.tensor_types import Mixture, count_types

# Repetitions and processes of each round; the last one's repetitions are the recipe's.
ROUNDS = ((2, 1), (3, 2), (0, 3))
SPARE = 20  # files of mixtures stay while the disk has room for so many more
MEMORY = "measured.json"


@dataclass(frozen=True)
class Found:
    """The choice, and everything that speaks for it."""

    recipe: ExportRecipe
    chosen: Trial
    why: str
    trials: tuple[Trial, ...]
    facts: Mapping[str, Any]  # machine, caveats, budget, shape
    gate: VerifyRecipe
    importance: Importance | None


def search(
    job: Job, *, out: Path, weigh: Callable[[], Importance | None], device: Device | None = None,
    timer: Timer | None = None,
) -> Found:
    """Search for the best mixture.

    Args:
        weigh: measures the importance matrix, if there is a text for it.
        device: predict speeds for this one instead of timing here.
        timer: replaces this machine's clock.

    Raises:
        CheckFailed: no mixture is within the budget; the best KL found is named.
    """
    card: Mapping[str, Any] = device.card if device else machine_card()
    caveats: list[str] = []
    if device is None and timer is None:
        timer, card, caveats = make_timer(job.recipe)
    bench = _Workbench(job, out, weigh, card)
    recipe, budget = job.recipe, job.recipe.kl_budget
    trials = bench.lose(candidates.first_mixtures())
    for start, singles in candidates.single_repairs(trials, job.gate, budget):
        tried = bench.lose(singles)
        trials += tried
        if all(candidates.excess(trial, job.gate, budget) for trial in tried if trial.measured):
            for mixture in candidates.joint_repairs(start, tried):
                trials += bench.lose([mixture])
                if trials[-1].measured and candidates.excess(trials[-1], job.gate, budget) is None:
                    break
    inside = [trial for trial in trials if trial.measured and candidates.excess(trial, job.gate, budget) is None]
    if not inside:
        shutil.rmtree(bench.files)  # large, and quickly made again
        raise _nothing_fits(trials, job)
    if device is not None:
        for trial in trials:
            trial.predicted = device.bytes_per_s / trial.token_bytes if trial.measured else None
        left = inside
    else:
        assert timer is not None
        left = bench.race(inside, candidates.neighbours(trials, job.gate, budget), timer)
    chosen, why = candidates.choose(left)
    say(f"auto: {chosen.label}, {chosen.kl:.4f} nat of {budget:g}: {why}")
    mixture = chosen.mixture
    final = replace(recipe, quant=mixture.base, head_type=mixture.head, tensor_types=mixture.groups)
    facts = {
        "machine": dict(card), "caveats": caveats, "kl_budget": budget, "windows": len(bench.windows),
        "positions": sum(map(len, bench.windows)), "prompt_tokens": recipe.search_prompt,
        "gen_tokens": recipe.search_gen, "threads": device.threads if device else recipe.threads or default_threads(),
        "predicted": device is not None, "bytes_per_s": device.bytes_per_s if device else None,
        "calibrated": bench.importance is not None,
    }  # fmt: skip
    return Found(final, chosen, why, tuple(trials), facts, job.gate, bench.importance)


def work_key(job: Job, card: Mapping[str, Any]) -> str:
    """What measurements depend on; the budget is not among it."""
    recipe = {name: value for name, value in asdict(job.recipe).items() if name not in ("kl_budget", "exact_gate")}
    gate = {name: getattr(job.gate, name) for name in ("windows", "window_tokens", "threads")}
    inputs = [entry.digest for entry in job.inputs() if entry.role in ("model", "calibration")]
    machine = {name: card.get(name) for name in ("cpu", "cores_usable", "device")}
    recipe.pop("verify")
    return hash_json({"recipe": recipe, "gate": gate, "inputs": inputs, "on": machine, "with": versions()})


class _Workbench:
    """The folder beside the output: the 32-bit file, torch's logits, the mixtures' files, what was measured."""

    def __init__(
        self, job: Job, out: Path, weigh: Callable[[], Importance | None], card: Mapping[str, Any]
    ) -> None:
        self.job = job
        self.work = workdir(out, work_key(job, card))
        self.files = self.work / "mixtures"
        self.files.mkdir(exist_ok=True)
        # The 32-bit file and three mixtures; more are kept only where the disk has room for many.
        require_space(job.base, self.work, per_weight=4 * (1.02 + 3 * 0.28))
        self.importance = self._weigh(weigh)
        self.memory = self._recall()
        self.windows = text_windows(job.base.path, count=job.gate.windows, length=job.gate.window_tokens)
        self.seen: dict[str, str] = {}

    def lose(self, mixtures: Sequence[Mixture]) -> list[Trial]:
        """What each mixture costs; one that cannot be made or that crashes has its reason instead."""
        trials = []
        with bar(total=len(mixtures), label="auto: KL") as advance:
            for mixture in mixtures:
                trial = self._remembered(mixture)
                if trial is None:
                    trial = Trial(mixture)
                    try:
                        self._measure(trial)
                    except EdgealignError as error:
                        trial.error = error.line()
                        self._file(mixture).unlink(missing_ok=True)
                    self.memory["trials"][mixture.label] = _facts(trial)
                    self._save()
                self._skip_twin(trial)
                trials.append(trial)
                advance(1, f"{trial.label}: {'skipped' if trial.kl is None else f'{trial.kl:.4f} nat'}")
        return trials

    def race(self, inside: Sequence[Trial], over: Sequence[Trial], timer: Timer) -> list[Trial]:
        """Time in rounds, taking turns; returns those of the last round.

        Raises:
            CheckFailed: none could be timed.
        """
        field, guests = list(inside), list(over)
        rounds = [(count or self.job.recipe.search_repetitions, turns) for count, turns in ROUNDS]
        for place, (repetitions, turns) in enumerate(rounds):
            label = f"auto: speed, round {place + 1} of {len(rounds)}"
            entries = [(turn, trial) for turn in range(turns) for trial in [*field, *guests]]
            for turn, trial in track(entries, label=label):
                if trial.error is None:
                    self._time(trial, timer, f"{place}.{turn}", repetitions)
            if not (left := [trial for trial in field if trial.error is None]):
                raise CheckFailed("auto", f"no mixture could be timed ({field[0].error})", "name a --quant")
            field, guests = candidates.keep_faster(left) if place < len(rounds) - 1 else left, []
        return field

    def _measure(self, trial: Trial) -> None:
        file, info = self._make(trial.mixture)
        assert info is not None
        trial.types = count_types((tensor.name, tensor.type, len(tensor.shape)) for tensor in info.tensors)
        trial.file_bytes, trial.token_bytes = file.stat().st_size, count_token_bytes(file)
        bundle = Bundle(self.files, "gguf", trial.label, file, {})
        noise = float(getattr(self.job.gate, f"noise_{quant_bits(trial.label)}bit"))
        with closing(open_bundle(bundle, self.job.gate, exact=False)) as session:
            pairs = (
                (np.load(self._reference(place)), session.score(window)) for place, window in enumerate(self.windows)
            )
            found = measure(pairs, admitted_noise=noise)
        finite = bool(np.isfinite(found.kl))
        trial.kl, trial.correlation = (found.kl, found.correlation) if finite else (None, None)
        trial.top1 = found.top1
        trial.feeding = self._feed(bundle)
        trial.error = None if finite else "its logits are not all numbers"
        self._release(file)

    def _feed(self, bundle: Bundle) -> float:
        """The gate's other question that some mixtures fail: is a prompt the same in one pass and token by token?"""
        with closing(open_bundle(bundle, self.job.gate, exact=True)) as session:
            tokens = feeding_tokens(self.job.gate, int(session.info()["vocab"]))
            rows = session.score(tokens)
            session.reset()
            singles = np.stack([session.step(token) for token in tokens])
        return float(np.abs(singles - rows).max() / rows.std())

    def _time(self, trial: Trial, timer: Timer, turn: str, repetitions: int) -> None:
        known = self.memory["times"].setdefault(trial.label, {})
        if turn not in known:
            try:
                file, _ = self._make(trial.mixture, again=True)
                known[turn] = asdict(timer(trial.mixture, file, repetitions))
                self._release(file)
            except EdgealignError as error:
                known[turn] = asdict(Timing(error=error.line()))
            self._save()
        taken = known[turn]
        if taken["error"] is not None:
            trial.error = f"its timing failed: {taken['error']}"
        trial.prefill += taken["prefill"]
        trial.decode += taken["decode"]

    def _make(self, mixture: Mixture, *, again: bool = False) -> tuple[Path, GgufInfo | None]:
        """The mixture's file; with `again` one that is there already will do."""
        file = self._file(mixture)
        if again and file.is_file():
            return file, None
        part = self.work / ".part.gguf"
        info = quantize(
            self._whole(), part, mixture, importance=self.importance, threads=self.job.recipe.threads
        )
        part.replace(file)
        return file, info

    def _file(self, mixture: Mixture) -> Path:
        return self.files / f"{mixture.label}.gguf"

    def _whole(self) -> Path:
        whole = self.work / "whole.gguf"
        if not whole.is_file():
            part = self.work / ".part.gguf"
            write_model(self.job.base.path, part, digest=self.job.base.digest, context=self.job.recipe.context)
            part.replace(whole)
        return whole

    def _weigh(self, weigh: Callable[[], Importance | None]) -> Importance | None:
        if self.job.calibration is None:
            return None
        values, about = self.work / "importance.npz", self.work / "importance.json"
        if not about.is_file():
            found = weigh()
            assert found is not None
            np.savez(values, **found.values)  # type: ignore[arg-type]
            write_atomic(about, json.dumps([found.tokens, found.windows, found.text_digest]))
        with np.load(values) as kept:
            return Importance(dict(kept), *json.loads(about.read_text(encoding="utf-8")))

    def _reference(self, wanted: int) -> Path:
        """Torch's logits of one window; all are computed at the first call, and torch is gone afterwards."""
        file = self.work / f"torch-{wanted}.npy"
        if not file.is_file():
            with closing(TorchSession(self.job.base.path, threads=self.job.gate.threads or None)) as oracle:
                for place, window in enumerate(track(self.windows, label="auto: torch")):
                    part = self.work / ".part.npy"
                    np.save(part, oracle.score(window))
                    part.replace(self.work / f"torch-{place}.npy")
        return file

    def _release(self, file: Path) -> None:
        """Files are kept for the next turn while the disk is far from full."""
        if shutil.disk_usage(self.work).free < SPARE * file.stat().st_size:
            file.unlink()

    def _skip_twin(self, trial: Trial) -> None:
        """llama.cpp takes another type where rows do not fit, so two names may mean one file."""
        if trial.error is not None:
            return
        types = hash_json([trial.types, trial.file_bytes, trial.kl])
        if types in self.seen:
            trial.error = f"has the same tensor types as {self.seen[types]}"
        else:
            self.seen[types] = trial.label

    def _recall(self) -> dict[str, dict[str, Any]]:
        try:
            found = json.loads((self.work / MEMORY).read_text(encoding="utf-8"))
            return {"trials": dict(found["trials"]), "times": dict(found["times"])}
        except (OSError, ValueError, KeyError, TypeError):
            return {"trials": {}, "times": {}}

    def _remembered(self, mixture: Mixture) -> Trial | None:
        known = self.memory["trials"].get(mixture.label)
        return None if known is None or known["error"] is not None else Trial(mixture, **known)

    def _save(self) -> None:
        write_atomic(self.work / MEMORY, json.dumps(self.memory))


def feeding_tokens(gate: VerifyRecipe, vocab: int) -> list[int]:
    """Random tokens, as many as the gate's longest prompt has."""
    rng = np.random.default_rng(gate.seed)
    return [int(token) for token in rng.integers(0, vocab, max(gate.prompt_lengths))]


def _facts(trial: Trial) -> dict[str, Any]:
    kept = ("error", "types", "file_bytes", "token_bytes", "kl", "correlation", "top1", "feeding")
    return {name: getattr(trial, name) for name in kept}


def _nothing_fits(trials: Sequence[Trial], job: Job) -> CheckFailed:
    known = [trial for trial in trials if trial.measured]
    if not known:
        return CheckFailed("auto", f"no mixture could be measured ({trials[0].error})", "name a --quant")
    best = min(known, key=lambda trial: (trial.kl, trial.label))
    reason = f"no mixture of types is within it: the best KL found is {best.kl:.3g} nat, of {best.label}"
    if (best.kl or 0.0) <= job.recipe.kl_budget:
        reason += f", which is {candidates.excess(best, job.gate, job.recipe.kl_budget)}"
    fix = "raise --kl-budget (what was measured is kept), or take --quant f16"
    return CheckFailed(f"kl_budget {job.recipe.kl_budget:g}", reason, fix)
