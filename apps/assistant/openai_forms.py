"""What OpenAI's clients send, as far as this server does it; everything else is refused by name, not ignored.

`min_p`, `top_k` and `repetition_penalty` are beyond OpenAI's API (`extra_body` in its client). What says nothing about
the answer itself (`user`, `metadata`, `store`, ...) is accepted without effect. Source: OpenAI's API reference.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from assistant.constrained import ANY_OBJECT
from assistant.faults import Fault
from edgealign.data.forms import Message
from edgealign.runtimes.recipes import Sampling

CHOICES = 8
StopString = Annotated[str, StringConstraints(min_length=1, max_length=200)]
# Parameters of OpenAI's API that change answers and are not there, with the values that ask for nothing.
ABSENT: Mapping[str, tuple[object, ...]] = {
    "tools": (None, []), "tool_choice": (None, "none", "auto"), "functions": (None, []),
    "function_call": (None, "none"), "parallel_tool_calls": (None, True, False), "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0), "logit_bias": (None, {}), "modalities": (None, ["text"]), "audio": (None,),
    "prediction": (None,), "web_search_options": (None,), "reasoning_effort": (None, "none"), "verbosity": (None,),
    "echo": (None, False), "suffix": (None, ""), "best_of": (None, 1),
}  # fmt: skip


class SampledForm(BaseModel):
    """How tokens are drawn; what is left out is this server's default."""

    model_config = ConfigDict(extra="forbid", strict=True)

    temperature: float | None = Field(None, ge=0, le=2, description="0 takes the likeliest token")
    top_p: float | None = Field(None, ge=0, le=1, description="keep the smallest set with this probability")
    top_k: int | None = Field(None, ge=0, le=1_000_000, description="keep the k likeliest; 0 keeps all")
    min_p: float | None = Field(None, ge=0, lt=1, description="drop tokens below this part of the likeliest")
    repetition_penalty: float | None = Field(None, ge=0.1, le=10, description="above 1: seen tokens less likely")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="the same seed gives the same answer")
    max_tokens: int | None = Field(None, ge=1, le=1_000_000, description="at most this many new tokens")

    def sampling(self, default: Sampling, *, max_tokens: int) -> Sampling:
        """The whole recipe; a seed is drawn where neither the request nor the default has one."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if "top_p" in given:
            given["top_p"] = max(given["top_p"], 1e-9)  # 0 means the likeliest alone
        seed = (default.seed or secrets.randbelow(2**31)) if self.seed is None else self.seed % 2**64
        return Sampling(
            **{name: given.get(name, getattr(default, name)) for name in names}, seed=seed, max_tokens=max_tokens
        )


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description="no effect: nothing leaves this machine")


class OpenAIForm(SampledForm):
    """What both kinds of completion have in common."""

    model: str = Field(max_length=200)
    n: int | None = Field(None, ge=1, le=CHOICES, description="answers, with the seeds seed, seed + 1, ...")
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="no effect; a user's adapter is chosen by the model's name")
    metadata: dict[str, str] | None = Field(None, description="no effect")
    store: bool | None = Field(None, description="no effect: nothing is stored")
    service_tier: str | None = Field(None, description="no effect")
    safety_identifier: str | None = Field(None, description="no effect")
    prompt_cache_key: str | None = Field(None, description="no effect")
    # Named here only so that they can be refused by name.
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    logit_bias: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    echo: Any = None
    suffix: Any = None
    best_of: Any = None
    parallel_tool_calls: Any = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def check(self) -> None:
        """Refuse what this server does not do.

        Raises:
            Fault: names the parameter.
        """
        for name, neutral in ABSENT.items():
            if getattr(self, name) not in neutral:
                raise Fault(400, f"{name} is not supported; leave it out", code="unsupported_parameter", param=name)
        if self.stream_options is not None and not self.stream:
            raise Fault(400, "stream_options needs stream", code="invalid_value", param="stream_options")


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn. Only text: pictures, sound and tool calls are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = Field(None, description="no effect")
    refusal: None = None

    def message(self) -> Message:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, content)


class NamedSchema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(max_length=64)
    description: str | None = Field(None, description="no effect")
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="no effect: a schema is always followed")


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @property
    def schema_wanted(self) -> Mapping[str, Any] | None:
        """None: any text.

        Raises:
            Fault: a schema is announced and not there, or there and not announced.
        """
        if (self.json_schema is None) == (self.type == "json_schema"):
            what = "needs json_schema" if self.json_schema is None else "takes no json_schema"
            raise Fault(400, f"type {self.type} {what}", code="invalid_value", param="response_format")
        if self.json_schema is not None:
            return self.json_schema.json_schema
        return ANY_OBJECT if self.type == "json_object" else None


class ChatForm(OpenAIForm):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None

    @property
    def wanted(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise Fault(400, "top_logprobs needs logprobs", code="invalid_value", param="top_logprobs")
        if self.messages[-1].role == "assistant":
            raise Fault(400, "the last message is the assistant's: no answer is due", code="invalid_value",
                        param="messages")  # fmt: skip


class CompletionForm(OpenAIForm):
    prompt: (
        str | Annotated[list[str], Field(min_length=1, max_length=CHOICES)] | Annotated[list[int], Field(min_length=1)]
        | Annotated[list[Annotated[list[int], Field(min_length=1)]], Field(min_length=1, max_length=CHOICES)]
    )  # fmt: skip
    logprobs: int | None = Field(None, ge=0, le=5)

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry for each prompt: text, or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        single: list[int] = [part for part in self.prompt if isinstance(part, int)]
        return [single] if single else [part for part in self.prompt if not isinstance(part, int)]


def seeded(sampling: Sampling, number: int) -> Sampling:
    """The recipe of choice `number`."""
    return replace(sampling, seed=(sampling.seed + number) % 2**64)
