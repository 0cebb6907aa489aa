"""What the page sends and gets, as pydantic models: the OpenAPI description is made of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from assistant.openai_forms import SampledForm

Id = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Title = Annotated[str, StringConstraints(max_length=200)]
User = Annotated[str, StringConstraints(min_length=1, max_length=64)]
Content = Annotated[str, StringConstraints(min_length=1, max_length=200_000)]
System = Annotated[str, StringConstraints(max_length=20_000)]
Moment = Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False, description="seconds since 1970")]
# The shape of Apple's LanguageModelFeedback, which people have filled in before, and matters of taste.
Reason = Literal[
    "too_long", "too_short", "wrong_style", "did_not_follow_instructions", "incorrect", "stereotype_or_bias", "sexual",
    "vulgar_or_offensive", "refused_unexpectedly", "unhelpful", "good_style", "good_length", "correct", "helpful",
    "other",
]  # fmt: skip
DEFAULT_USER = "me"


class Form(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class NewConversation(Form):
    title: Title = Field("", description="empty: the beginning of the first question")
    user: User | None = Field(None, description="whose taste it is; none: the setting `user`")
    system: System | None = Field(None, description="none: the setting `system`")


class ConversationChange(Form):
    title: Title | None = None
    user: User | None = None
    system: System | None = None
    head: Id | None = Field(None, description="the last message of the branch to show")


class NewMessage(Form):
    content: Content
    parent: Id | None = Field(None, description="the answer it follows; none: it begins the conversation")


class AnswerForm(SampledForm):
    model: str | None = Field(None, max_length=200, description="none: the conversation's user's, or the base")
    stream: bool = True


class CompareForm(SampledForm):
    models: Annotated[list[str], Field(min_length=2, max_length=2)] | None = Field(
        None, description="two models to compare blindly, in random places; none: two seeds of one model"
    )


class ExistingPair(Form):
    left: Id
    right: Id


class Choice(Form):
    choice: Literal["left", "right", "tie"]


class Feedback(Form):
    rating: Literal[-1, 1]
    reasons: Annotated[list[Reason], Field(max_length=15)] = []
    comment: Annotated[str, StringConstraints(max_length=5_000)] = ""


class Edit(Form):
    content: Content


class Settings(Form):
    """Everything optional: what is left out stays, null goes back to its default."""

    user: User | None = Field(None, description="who is speaking: choices and thumbs are theirs")
    system: System | None = Field(None, description="the system turn of new conversations")
    theme: Literal["system", "light", "dark"] | None = None
    temperature: float | None = Field(None, ge=0, le=2, description="0 takes the likeliest token; higher is livelier")
    top_p: float | None = Field(None, ge=0, le=1, description="keep the smallest set of tokens with this probability")
    top_k: int | None = Field(None, ge=0, le=1_000_000, description="keep the k likeliest tokens; 0 keeps all")
    min_p: float | None = Field(None, ge=0, lt=1, description="drop tokens below this part of the likeliest")
    repetition_penalty: float | None = Field(None, ge=0.1, le=10, description="above 1 makes repetition less likely")
    max_tokens: int | None = Field(None, ge=1, le=100_000, description="the longest answer, in tokens")
    compare_every: int | None = Field(None, ge=0, le=1000, description="ask for a choice at every nth answer; 0: never")


class Thumb(Form):
    rating: Literal[-1, 1]
    reasons: Annotated[list[str], Field(max_length=15)]
    comment: Annotated[str, StringConstraints(max_length=5_000)]
    created_s: Moment


class MessageRecord(Form):
    """`facts` of an answer: model, digests, seed, sampling, finish, tokens, times."""

    id: Id
    conversation: Id
    parent: Id | None
    role: Literal["user", "assistant"]
    content: Annotated[str, StringConstraints(max_length=1_000_000)]
    created_s: Moment
    facts: dict[str, Any]
    feedback: Thumb | None


class ComparisonRecord(Form):
    """Two answers to the message `prompt`; `choice` is null until one was made."""

    id: Id
    prompt: Id
    left: Id
    right: Id
    source: Literal["compare", "edit"]
    choice: Literal["left", "right", "tie"] | None
    created_s: Moment
    chosen_s: Moment | None


class ConversationHead(Form):
    id: Id
    title: Title
    user: User
    system: System
    created_s: Moment
    updated_s: Moment
    head: Id | None


class ConversationListed(ConversationHead):
    messages: int


class Archived(ConversationHead):
    """A conversation with all its branches: a message's `parent` leads back to the beginning."""

    messages: Annotated[list[MessageRecord], Field(max_length=100_000)]
    comparisons: Annotated[list[ComparisonRecord], Field(max_length=100_000)]


class Archive(Form):
    format: Literal["edgealign.conversations"]
    version: Literal[1]
    conversations: Annotated[list[Archived], Field(max_length=100_000)]


class Edited(Form):
    message: MessageRecord
    comparison: ComparisonRecord


class State(BaseModel):
    """What a page needs to begin with."""

    version: str
    model: str
    models: list[str]
    users: list[str] = Field(description="users with a version of their own")
    runtime: str
    digest: str | None
    context: int
    queue: int
    settings: Settings = Field(description="as they are in force")


class Counts(BaseModel):
    imported: int
    skipped: int


class Forgotten(BaseModel):
    conversations: int
    versions: int = Field(description="of what was learned of this user")
