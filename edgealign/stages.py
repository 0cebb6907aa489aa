"""The stages by name: which recipe each one reads and which function runs it.

Every function has the form `run(recipe, *, <inputs>, out) -> Artifact`; the command line and the pipeline
know nothing else. Adding a stage is one line here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgealign.registry import Registry


@dataclass(frozen=True)
class Stage:
    """`kind`: what it publishes; `help`: one line for the command line and `edgealign config schema`."""

    kind: str
    help: str


STAGES: dict[str, Stage] = {
    "synth": Stage("dataset", "write the generated practice data: texts, pairs, three users' choices"),
    "users": Stage("dataset", "write many people's choices with planted tastes, and new people to try them on"),
    "shots": Stage("dataset", "pairs whose prompt begins with other choices of the same person (FSPO)"),
    "prepare": Stage("dataset", "collect, filter and split rows of any readable form"),
    "reading": Stage("dataset", "questions about short passages, asked by rule and answered in their own words"),
    "styles": Stage("dataset", "answers in a style that a system turn asks for, made by rule from real ones"),
    "candidates": Stage("dataset", "several answers of a model to each prompt, for planted users to choose between"),
    "tastes": Stage("dataset", "simulated users' choices between a model's answers, for a basis without real users"),
    "init": Stage("model", "make a model with random weights from a named shape"),
    "own_answers": Stage("dataset", "a model's own answers to given prompts, the best of a few that pass the rules"),
    "pretrain": Stage("model", "next-token training on plain text, from random weights or any model"),
    "distill": Stage("model", "next-token training of a student with a larger teacher's top tokens beside the text"),
    "sft": Stage("model", "supervised fine-tuning on conversations or text"),
    "dpo": Stage("model", "preference training, length-normalised by default"),
    "reward": Stage("basis", "a linear judge on a model's frozen states, fitted to preference pairs"),
    "pairs": Stage("dataset", "a model's own answers, judged: the best against the worst"),
    "pairs_filter": Stage("dataset", "pairs as several judges see them: turned round, softened, left out, ordered"),
    "pairs_revise": Stage("dataset", "chosen answers minimally revised by a stronger model (CLAIR)"),
    "merge": Stage("model", "merge models of one base, or an adapter into its base"),
    "personalize": Stage("adapter", "fit one user's adapter from a few choices"),
    "start": Stage("adapter", "where new users' LoRAs begin: what several users' have in common"),
    "basis": Stage("basis", "what users have in common, from many users' choices: for users as a few numbers"),
    "lora_basis": Stage("adapter", "one LoRA for each direction of a basis, for users as weighted sums of them"),
    "personalize_embedding": Stage("adapter", "one user as weights on a basis, from the first choice on"),
    "personalize_mix": Stage("adapter", "one user as a weighted sum of a basis's LoRAs, from the first choice on"),
    "personalize_fspo": Stage("adapter", "one user's choices as the beginning of every prompt, no weights"),
    "personalize_direction": Stage("adapter", "one user as a direction in the model's states: a control vector"),
    "personalize_linear": Stage("adapter", "one user as a stated preference, followed further than a prompt does"),
    "export": Stage("bundle", "convert model and adapters for a runtime, verified before it is published"),
    "verify": Stage("report", "the parity gate again: bundle against the torch reference"),
    "bench": Stage("report", "one table: prefill, decode, first token, load, swap, memory, size, KL, bandwidth"),
    "advise": Stage("report", "which target, quantisation and adapter carrier fit a device; measured or predicted"),
    "eval": Stage("report", "do the adapters move answers in their users' direction? in torch and as shipped"),
    "eval_few_shot": Stage("report", "what a few choices tell of users with planted tastes, in torch and as shipped"),
    "eval_language": Stage("report", "how well do models predict held-out text? beside n-gram models of the same text"),
    "eval_preferences": Stage("report", "how well models rank held-out pairs, and how their answers are judged"),
    "eval_steering": Stage("report", "how far linear alignment moves answers beyond the prompt, and what it costs"),
    "eval_chat": Stage("report", "forty fixed prompts: ends turns, keeps to a story, follows a style, same as shipped"),
}

RECIPES = Registry(
    "stage",
    {
        "synth": "edgealign.data.recipes:SynthRecipe",
        "users": "edgealign.data.recipes:UsersRecipe",
        "shots": "edgealign.personalize.fspo_recipes:ShotsRecipe",
        "prepare": "edgealign.data.recipes:PrepareRecipe",
        "reading": "edgealign.data.recipes:ReadingRecipe",
        "styles": "edgealign.data.recipes:StylesRecipe",
        "candidates": "edgealign.personalize.recipes:CandidatesRecipe",
        "tastes": "edgealign.personalize.recipes:TastesRecipe",
        "init": "edgealign.models.recipes:InitRecipe",
        "own_answers": "edgealign.train.recipes:OwnAnswersRecipe",
        "pretrain": "edgealign.train.recipes:PretrainRecipe",
        "distill": "edgealign.train.recipes:DistillRecipe",
        "sft": "edgealign.train.recipes:SftRecipe",
        "dpo": "edgealign.train.recipes:PreferenceRecipe",
        "reward": "edgealign.judges.recipes:RewardRecipe",
        "pairs": "edgealign.judges.recipes:SampleRecipe",
        "pairs_filter": "edgealign.judges.recipes:FilterRecipe",
        "pairs_revise": "edgealign.judges.recipes:ReviseRecipe",
        "merge": "edgealign.train.merge_recipe:MergeRecipe",
        "personalize": "edgealign.personalize.recipes:LoraRecipe",
        "start": "edgealign.personalize.recipes:StartRecipe",
        "basis": "edgealign.personalize.recipes:BasisRecipe",
        "lora_basis": "edgealign.personalize.recipes:LoraBasisRecipe",
        "personalize_mix": "edgealign.personalize.recipes:LoraMixRecipe",
        "personalize_embedding": "edgealign.personalize.recipes:EmbeddingRecipe",
        "personalize_fspo": "edgealign.personalize.fspo_recipes:FspoRecipe",
        "personalize_direction": "edgealign.personalize.recipes:DirectionRecipe",
        "personalize_linear": "edgealign.personalize.steering_recipe:LinearRecipe",
        "export": "edgealign.export_recipes:ExportRecipe",
        "verify": "edgealign.parity_recipes:VerifyRecipe",
        "bench": "edgealign.bench.recipes:BenchRecipe",
        "advise": "edgealign.advise.recipes:AdviceRecipe",
        "eval": "edgealign.personalize.evaluate_recipe:EvaluateRecipe",
        "eval_few_shot": "edgealign.personalize.recipes:FewShotRecipe",
        "eval_language": "edgealign.evaluate.recipes:LanguageRecipe",
        "eval_preferences": "edgealign.evaluate.recipes:PreferencesRecipe",
        "eval_chat": "edgealign.evaluate.recipes:ChatRecipe",
        "eval_steering": "edgealign.personalize.steering_recipe:SteeringRecipe",
    },
)

RUNNERS = Registry(
    "stage",
    {
        "synth": "edgealign.data.synthetic:run",
        "users": "edgealign.data.users:run",
        "shots": "edgealign.personalize.shot_data:run",
        "prepare": "edgealign.data.prepare:run",
        "reading": "edgealign.data.reading:run",
        "styles": "edgealign.data.restyle:run",
        "candidates": "edgealign.personalize.candidates:run",
        "tastes": "edgealign.personalize.tastes:run",
        "init": "edgealign.models.create:run",
        "own_answers": "edgealign.train.own_answers:run",
        "pretrain": "edgealign.train.pretrain:run",
        "distill": "edgealign.train.distill:run",
        "sft": "edgealign.train.sft:run",
        "dpo": "edgealign.train.preference:run",
        "reward": "edgealign.judges.reward:run",
        "pairs": "edgealign.judges.sample:run",
        "pairs_filter": "edgealign.judges.filter:run",
        "pairs_revise": "edgealign.judges.revise:run",
        "merge": "edgealign.train.merge:run",
        "personalize": "edgealign.personalize.lora:run",
        "start": "edgealign.personalize.start:run",
        "basis": "edgealign.personalize.basis:run",
        "lora_basis": "edgealign.personalize.lora_basis:run",
        "personalize_mix": "edgealign.personalize.lora_mix:run",
        "personalize_embedding": "edgealign.personalize.embedding:run",
        "personalize_fspo": "edgealign.personalize.fspo:run",
        "personalize_direction": "edgealign.personalize.direction:run",
        "personalize_linear": "edgealign.personalize.stated:run",
        "export": "edgealign.targets:run",
        "verify": "edgealign.parity:run",
        "bench": "edgealign.bench.run:run",
        "advise": "edgealign.advise.run:run",
        "eval": "edgealign.personalize.evaluate:run",
        "eval_few_shot": "edgealign.personalize.few_shot:run",
        "eval_language": "edgealign.evaluate.language:run",
        "eval_preferences": "edgealign.evaluate.preferences:run",
        "eval_chat": "edgealign.evaluate.chat:run",
        "eval_steering": "edgealign.personalize.steering:run",
    },
)


def recipe_class(stage: str) -> type[Any]:
    """The stage's recipe dataclass; importing it loads nothing heavy."""
    loaded: type[Any] = RECIPES.load(stage)
    return loaded
