"""What the page gets and sends about a user's taste, as pydantic models."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from assistant.forms import ComparisonRecord, Edited, Form, MessageRecord
from edgealign.personalize.recipes import MAX_TASTE


class Learned(BaseModel):
    """What a choice taught. `version` is null where nothing was published, and `reason` says why."""

    user: str
    choices: int
    words: str = Field(description="what this user wants more than everybody does; empty: nothing stands out")
    version: int | None
    reason: str
    seconds: float = Field(description="of the fit, once the answers are read")


class Chosen(ComparisonRecord):
    """A comparison with its choice. `learned` is null where nothing is learned, or it takes longer than a moment."""

    learned: Learned | None = None


class EditedRecord(Edited):
    """An edit, and what it taught."""

    learned: Learned | None = None


class Rated(MessageRecord):
    """A message with its thumb. `learned` is null where the thumb makes no choice with another, or it takes longer."""

    learned: Learned | None = None


class TasteVersion(BaseModel):
    """`score` and `population`: of this version and of the model as it is for everybody, on the user's choices. For
    "lore" the mean log-loss of each choice, predicted from the others (less is better; e^-score is how surely it is
    foreseen); for "lora" the share of held-out choices that are ranked as chosen."""

    version: int
    made_s: float
    method: str
    choices: int
    words: str
    score: float | None
    population: float | None
    active: bool


class TrainingState(BaseModel):
    """The LoRA that is being trained in the background, or how the last one ended."""

    state: Literal["none", "running", "finished", "failed", "cancelled"]
    progress: float = Field(ge=0, le=1)
    message: str


class TasteState(BaseModel):
    """All that is known of a user's taste, without a text."""

    user: str
    ready: bool = Field(description="whether each choice teaches at once, as numbers on a basis; a LoRA needs none")
    why_not: str = Field(description="why it does not, and what is possible instead; empty where it does")
    fault: str = Field(description="a version that cannot be used, and why")
    simulated: bool = Field(description="the basis was learned from simulated users")
    choices: int = Field(description="answers that were preferred to others")
    words: str = Field(description="of the version in use")
    active: int = Field(description="the version in use; 0: the model as it is for everybody")
    strength: float
    usual_strength: float
    max_strength: float
    versions: list[TasteVersion]
    learning: bool = Field(description="choices are being read or fitted just now")
    decision: str = Field(description="how numbers and a LoRA compared; empty: they did not")
    trainable: str = Field(description="why no LoRA can be trained here; empty where one can")
    training: TrainingState


class StrengthForm(Form):
    strength: float = Field(ge=0, le=MAX_TASTE, description="0: answers are everybody's")


class ActiveForm(Form):
    version: int = Field(ge=0, le=2**31, description="0: the model as it is for everybody")
