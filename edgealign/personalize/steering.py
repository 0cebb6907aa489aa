"""How far does linear alignment move answers beyond the prompt, and what does it cost? A sweep over strengths.

    edgealign eval steering --model starter --bundle runs/q8 --candidates 8 --out R

Fixed prompts, each asked in every style: without the preference, with it in the system turn (strength 0), and mixed at
each strength. All answers are greedy. Of every answer:

- how much of the style's mark it has (`data/styles.py`), in standard deviations of that mark over all answers;
- KL per token of the mixed distribution to the prompted one (the unmixed stream) and to the base's, nats;
- perplexity under the base, which is not told the preference; distinct pairs of words, and loops, where text decays;
- passes: tokens that went through the model for each token of the answer.

The gain is against strength 0, prompt by prompt, with 95 % bootstrap intervals over prompts. With `--candidates N` also
REAR: the best of N drawn answers, against the mean of the N. Strength 0 must say what a plain session says when it is
prompted, token for token: that is a check; how far answers move is a report.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgealign.artifact import Artifact, Check, open_artifact, open_model, publish, refuse_existing
from edgealign.data.forms import Message
from edgealign.data.styles import STYLES, follows
from edgealign.errors import RecipeError
from edgealign.evaluate.chat_measures import bootstrap_mean
from edgealign.evaluate.chat_prompts import Prompt, all_prompts
from edgealign.evaluate.loops import is_doom_loop
from edgealign.personalize.attributes import words
from edgealign.personalize.linear import MixedSession, Mixing, find_lead, mix
from edgealign.personalize.ranking import log_softmax
from edgealign.personalize.steering_recipe import SteeringRecipe
from edgealign.progress import bar, say
from edgealign.registry import suggest

if TYPE_CHECKING:
    from edgealign.runtimes.session import Session

OF_A_STYLE = ("mark", "moved_sd", "gain_sd")
SAME = "strength 0 says what prompting says"


@dataclass(frozen=True)
class Steered:
    """One answer and what it cost. Nats are means over its tokens, the end of the turn included.

    ``decoded`` counts the tokens that went through the model after the prompt, of both streams.
    """

    text: str
    tokens: tuple[int, ...]
    ended: bool
    kl_prompted: float
    kl_base: float
    nats_base: float
    decoded: int


def run(recipe: SteeringRecipe, *, model: str | Path, out: Path, bundle: Path | None = None) -> Artifact:
    """Sweep and publish `result.json`, `table.md`, `answers.md` and `steering.png`.

    Args:
        bundle: an export of this very model; the answers are then its runtime's.

    Raises:
        RecipeError: no such style.
        InputError: the bundle is of another model, or the model's template has no system turns.
    """
    from edgealign.evaluate.chat import shipped_bundles
    from edgealign.models.load import load_tokenizer
    from edgealign.personalize.steering_report import write_report
    from edgealign.runtimes.session import open_session
    from edgealign.runtimes.streams import open_streams

    refuse_existing(Path(out))
    styles = _styles(recipe)
    base = open_model(model)
    label, place = next(iter(shipped_bundles([bundle] if bundle else [], base).items()), ("torch", base.path))
    prompts = _spread(all_prompts(), recipe.prompts)
    strengths = tuple(sorted({0.0, *recipe.strengths}))
    tokenizer = load_tokenizer(base.path)
    plain = open_session(place, threads=recipe.threads or None)
    try:
        streams = open_streams(place, threads=recipe.threads or None)
        try:
            mixed = MixedSession(streams, find_lead(tokenizer, STYLES[styles[0]].requests[0]), Mixing())
            result = Sweep(plain, mixed, tokenizer, recipe).all(prompts, styles, strengths)
        finally:
            streams.close()
    finally:
        plain.close()
    result |= {"runtime": label, "streams": type(streams).__name__, "prompts": [prompt.last for prompt in prompts]}
    inputs = [base.as_input("model")]
    if bundle:
        inputs.append(open_artifact(bundle, check_digests=False).as_input("bundle"))
    with publish(out, kind="report", format="eval", stage="eval_steering", recipe=recipe, inputs=inputs) as draft:
        note = "share of the answers at strength 0 that a plain session with the same prompt gives, token for token"
        draft.add_check(Check(SAME, result["same"], 1.0, result["same"] == 1.0, note))
        text = json.dumps(result, indent=1, ensure_ascii=False)
        (draft.dir / "result.json").write_text(text, encoding="utf-8")
        write_report(draft.dir, result, recipe, draft.checks)
    say(f"read {Path(out) / 'table.md'}")
    return open_artifact(out)


@dataclass(frozen=True)
class Sweep:
    """A plain session to prompt and to score with, and a mixed one over the same model."""

    plain: Session
    mixed: MixedSession
    tokenizer: Any
    recipe: SteeringRecipe

    def all(self, prompts: Sequence[Prompt], styles: Sequence[str], strengths: Sequence[float]) -> dict[str, Any]:
        """Every answer, and the tables made of them."""
        work = len(prompts) * (1 + len(styles) * (len(strengths) + (self.recipe.candidates > 0)))
        answers: dict[str, dict[str, list[Steered]]] = {}
        drawn: dict[str, list[tuple[str, list[str]]]] = {}
        same = []
        with bar(total=work, label="steering") as advance:
            bare = []
            for prompt in prompts:
                bare.append(self._text(self._prompted(prompt.messages)[0]))
                advance(1, "no preference")
            for name in styles:
                rows = answers[name] = {f"{strength:g}": [] for strength in strengths}
                for number, prompt in enumerate(prompts):
                    requests = STYLES[name].requests
                    asked = (Message("system", requests[number % len(requests)]), *prompt.messages)
                    for strength in strengths:
                        rows[f"{strength:g}"].append(self.one(prompt.messages, asked, strength))
                        advance(1, name)
                    same.append(self._prompted(asked) == (rows["0"][-1].tokens, rows["0"][-1].ended))
                    if self.recipe.candidates:
                        drawn.setdefault(name, []).append(self._rerank(prompt.messages, asked, number))
                        advance(1, name)
        found: dict[str, Any] = {"same": sum(same) / len(same), "bare": bare}
        found |= summarize(answers, bare, self.recipe)
        if drawn:
            found["rear"] = {name: _rear(name, rows, found["sd"][name], self.recipe) for name, rows in drawn.items()}
        found["answers"] = {
            name: {strength: [asdict(answer) for answer in row] for strength, row in rows.items()}
            for name, rows in answers.items()
        }
        return found

    def one(self, messages: Sequence[Message], asked: Sequence[Message], strength: float) -> Steered:
        """The answer at one strength, scored by both prompts in one pass each."""
        from edgealign.data.encode import encode_prompt

        mixing = Mixing(strength, self.recipe.plausible, self.recipe.mask_temperature)
        self.mixed.prefer(find_lead(self.tokenizer, asked[0].content), mixing)
        fed = self.mixed.fed
        prompt, bare = encode_prompt(self.tokenizer, asked), encode_prompt(self.tokenizer, messages)
        tokens, ended = self._generate(self.mixed, prompt)
        whole = (*tokens, self._end) if ended else tokens
        decoded = self.mixed.fed - fed - len(prompt) - (len(bare) if strength else 0)
        preferred, without = self._logits(prompt, whole), self._logits(bare, whole)
        mixed = np.stack([mix(left, right, mixing) for left, right in zip(preferred, without, strict=True)])
        own, prompted, base = log_softmax(mixed), log_softmax(preferred), log_softmax(without)
        return Steered(
            self._text(tokens), tokens, ended, _divergence(own, prompted), _divergence(own, base),
            -float(base[np.arange(len(whole)), list(whole)].mean()), decoded,
        )  # fmt: skip

    @property
    def _end(self) -> int:
        from edgealign.data.encode import end_of_turn_id

        return end_of_turn_id(self.tokenizer)

    def _prompted(self, messages: Sequence[Message]) -> tuple[tuple[int, ...], bool]:
        from edgealign.data.encode import encode_prompt

        return self._generate(self.plain, encode_prompt(self.tokenizer, messages))

    def _generate(self, session: Session, prompt: Sequence[int]) -> tuple[tuple[int, ...], bool]:
        from edgealign.runtimes.generate import generate
        from edgealign.runtimes.recipes import Sampling

        session.reset()
        sampling = Sampling(
            max_tokens=self.recipe.max_new_tokens, temperature=0.0, min_p=0.0, repetition_penalty=1.0
        )
        said = generate(session, prompt, sampling=sampling, stop={self._end})
        return said.tokens, said.finish == "stop"

    def _logits(self, prompt: Sequence[int], answer: Sequence[int]) -> Any:
        """Logits (answer's length, V) that each of the answer's tokens was predicted from."""
        from edgealign.runtimes.session import score

        return score(self.plain, [*prompt, *answer[:-1]])[len(prompt) - 1 :]

    def _rerank(
        self, messages: Sequence[Message], asked: Sequence[Message], number: int
    ) -> tuple[str, list[str]]:
        """The best candidate's text, and all of theirs."""
        from edgealign.data.encode import encode_prompt
        from edgealign.personalize.rerank import best_for_preference
        from edgealign.runtimes.recipes import Sampling

        recipe = self.recipe
        sampling = Sampling(
            max_tokens=recipe.max_new_tokens, temperature=recipe.temperature, min_p=0.0, repetition_penalty=1.0,
            seed=recipe.seed * 1_000_003 + 1000 * number,
        )  # fmt: skip
        plain, preferred = encode_prompt(self.tokenizer, messages), encode_prompt(self.tokenizer, asked)
        found = best_for_preference(
            self.plain, plain, preferred, recipe.candidates, sampling=sampling, stop={self._end}, weight=recipe.weight
        )
        return self._text(found[0].tokens), [self._text(each.tokens) for each in found]

    def _text(self, tokens: Any) -> str:
        return str(self.tokenizer.decode(tokens)).strip()


def summarize(
    answers: Mapping[str, Mapping[str, Sequence[Steered]]], bare: Sequence[str], recipe: SteeringRecipe
) -> dict[str, Any]:
    """Style -> strength -> measures; over all styles the mean, whose intervals are over prompts, too."""
    sd: dict[str, float] = {}
    table: dict[str, dict[str, Any]] = {}
    gains: dict[str, list[Any]] = {}
    for name, rows in answers.items():
        measure = STYLES[name].measure
        marks = {strength: np.array([measure(answer.text) for answer in row]) for strength, row in rows.items()}
        unasked = np.array([measure(text) for text in bare])
        sd[name] = float(np.concatenate([unasked, *marks.values()]).std()) or 1.0
        table[name] = {}
        for strength, row in rows.items():
            gain = (marks[strength] - marks["0"]) / sd[name]
            gains.setdefault(strength, []).append(gain)
            table[name][strength] = {
                "mark": float(marks[strength].mean()),
                "moved_sd": _interval((marks[strength] - unasked) / sd[name], recipe),
                "gain_sd": _interval(gain, recipe),
                "follows": float(np.mean([follows(name, a.text, b) for a, b in zip(row, bare, strict=True)])),
                **_measures(row),
            }
    overall = {}
    for strength, each in gains.items():
        every = [table[name][strength] for name in table]
        means = {key: float(np.mean([row[key] for row in every])) for key in every[0] if key not in OF_A_STYLE}
        moved = float(np.mean([row["moved_sd"]["mean"] for row in every]))
        overall[strength] = means | {"moved_sd": moved, "gain_sd": _interval(np.mean(each, axis=0), recipe)}
    return {"sd": sd, "styles": table, "all": overall}


def _measures(row: Sequence[Steered]) -> dict[str, float]:
    """What does not depend on the style; per token where it is of tokens."""
    found = [words(answer.text) for answer in row]
    lengths = np.array([len(answer.tokens) + answer.ended for answer in row])
    return {
        "kl_prompted": float(np.average([answer.kl_prompted for answer in row], weights=lengths)),
        "kl_base": float(np.average([answer.kl_base for answer in row], weights=lengths)),
        "perplexity": float(np.exp(np.average([answer.nats_base for answer in row], weights=lengths))),
        "distinct_1": _distinct(found, 1), "distinct_2": _distinct(found, 2),
        "loops": float(np.mean([is_doom_loop(answer.tokens) for answer in row])),
        "ended": float(np.mean([answer.ended for answer in row])),
        "words": float(np.mean([len(each) for each in found])),
        "passes": sum(answer.decoded for answer in row) / max(int((lengths - 1).sum()), 1),
    }  # fmt: skip


def _rear(
    name: str, rows: Sequence[tuple[str, Sequence[str]]], sd: float, recipe: SteeringRecipe
) -> dict[str, Any]:
    """The best candidate's mark, and its gain over the mean candidate."""
    measure = STYLES[name].measure
    best = np.array([measure(text) for text, _ in rows])
    mean = np.array([np.mean([measure(text) for text in texts]) for _, texts in rows])
    gain = _interval((best - mean) / sd, recipe)
    return {"mark": float(best.mean()), "mean_mark": float(mean.mean()), "gain_sd": gain}


def _divergence(own: Any, other: Any) -> float:
    """Mean over rows of KL(own || other), nats, of log-probabilities (T, V); no chance in `own` adds nothing."""
    chances = np.exp(own)
    ratio = np.subtract(own, other, out=np.zeros_like(own), where=chances > 0.0)
    return float((chances * ratio).sum(axis=-1).mean())


def _distinct(found: Sequence[Sequence[str]], n: int) -> float:
    """Different runs of n words in all answers together, as a share of all runs."""
    runs = [tuple(each[start : start + n]) for each in found for start in range(len(each) - n + 1)]
    return len(set(runs)) / len(runs) if runs else 0.0


def _interval(values: Any, recipe: SteeringRecipe) -> dict[str, float]:
    low, high = bootstrap_mean(list(values), resamples=recipe.bootstrap, seed=recipe.seed)
    return {"mean": float(np.mean(values)), "low": low, "high": high}


def _styles(recipe: SteeringRecipe) -> tuple[str, ...]:
    for name in recipe.styles:
        if name not in STYLES:
            raise RecipeError(name, f"is no style{suggest(name, STYLES)}", f"choose from: {', '.join(STYLES)}")
    return recipe.styles or tuple(STYLES)


def _spread(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """So many of them, evenly spread: their kinds follow one another."""
    return [prompts[int(place)] for place in np.linspace(0, len(prompts) - 1, count).round()]
