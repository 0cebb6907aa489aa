"""JSON answers through the official client: whatever the model would say, the answer is what was asked for."""

from __future__ import annotations

import json
from enum import Enum
from typing import Annotated, Any

import openai
import pytest
from assistant.constrained import Grammars
from assistant.faults import Fault
from pydantic import BaseModel, ConfigDict, Field

from edgealign.data.encode import end_of_turn_id
from edgealign.models.load import load_tokenizer
from edgealign.runtimes.generate import generate
from edgealign.runtimes.recipes import Sampling
from edgealign.runtimes.scripted import ScriptedSession

from .conftest import Served

ASKED = [{"role": "user", "content": "How can I fall asleep more easily? Answer in JSON."}]
MOOD = {
    "type": "object", "additionalProperties": False, "required": ["mood", "size"],
    "properties": {"mood": {"enum": ["good", "bad", "mixed"]}, "size": {"type": "integer", "minimum": 3, "maximum": 7}},
}  # fmt: skip


def asked_for(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "asked", "schema": schema, "strict": True}}


def ask(served: Served, form: dict[str, Any], **options: Any) -> Any:
    options = {"max_tokens": 200, "seed": 1, **options}
    return served.client.chat.completions.create(
        model=served.model, messages=ASKED, response_format=form, **options  # type: ignore[call-overload]
    )


@pytest.mark.parametrize("seed", range(3))
def test_an_answer_follows_its_schema(served: Served, seed: int) -> None:
    answer = ask(served, asked_for(MOOD), seed=seed, temperature=1.5).choices[0]
    said = json.loads(answer.message.content)
    assert answer.finish_reason == "stop"
    assert set(said) == {"mood", "size"}
    assert said["mood"] in ("good", "bad", "mixed")
    assert said["size"] in range(3, 8)


def test_any_object_is_the_beginning_of_one_or_whole(served: Served) -> None:
    answer = ask(served, {"type": "json_object"}, max_tokens=40).choices[0]
    assert answer.message.content.startswith("{")
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.message.content), dict)


def test_a_stream_follows_it_too_and_says_the_same(served: Served) -> None:
    whole = ask(served, asked_for(MOOD)).choices[0].message.content
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(served, asked_for(MOOD), stream=True)]
    assert "".join(pieces) == whole


def test_the_clients_own_parsing_of_a_class(served: Served) -> None:
    class Kind(Enum):
        tea = "tea"
        bath = "bath"

    class Evening(BaseModel):
        model_config = ConfigDict(extra="forbid")

        kind: Kind
        minutes: Annotated[int, Field(ge=1, le=90)]
        calm: bool

    answer = served.client.chat.completions.parse(
        model=served.model, messages=ASKED, response_format=Evening, max_tokens=80, seed=3  # type: ignore[arg-type]
    )
    assert isinstance(answer.choices[0].message.parsed, Evening)


def test_every_users_adapter_follows_it(served: Served) -> None:
    for model in (served.model, f"{served.model}@ana"):
        answer = served.client.chat.completions.create(
            model=model, messages=ASKED, response_format=asked_for(MOOD), max_tokens=80  # type: ignore[call-overload]
        )
        assert set(json.loads(answer.choices[0].message.content)) == {"mood", "size"}


def test_an_answer_without_a_schema_is_what_it_was(served: Served) -> None:
    plain = ask(served, {"type": "text"}, max_tokens=12).choices[0].message.content
    ask(served, asked_for(MOOD))
    assert ask(served, {"type": "text"}, max_tokens=12).choices[0].message.content == plain


@pytest.mark.parametrize("form", [
    asked_for({"type": "nonsense"}), asked_for({"$ref": "#/nowhere"}), asked_for({"type": "string", "pattern": "("}),
    asked_for({"type": "object", "properties": 5}), {"type": "json_schema"},
    {**asked_for(MOOD), "type": "json_object"}, {"type": "xml"},
])  # fmt: skip
def test_what_cannot_be_followed_is_refused_by_name(served: Served, form: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as found:
        ask(served, form)
    assert str(found.value.param).startswith("response_format")


def test_the_worst_model_can_say_nothing_else() -> None:
    """Logits that want anything but JSON: the hook alone decides."""
    tokenizer = load_tokenizer("starter")
    end = end_of_turn_id(tokenizer)
    grammars = Grammars(tokenizer, end)
    grammar = grammars.compile({"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4})
    for seed in range(4):
        session = ScriptedSession(vocab=len(tokenizer) + 3)  # padded, as some runtimes do
        made = generate(
            session, [1, 2, 3 + seed], sampling=Sampling(temperature=2.0, min_p=0.0, seed=seed, max_tokens=40),
            stop={end}, hooks=[grammars.hook(grammar)],
        )  # fmt: skip
        said = json.loads(tokenizer.decode(made.tokens))
        assert made.finish == "stop"
        assert len(said) in range(2, 5)
        assert all(isinstance(each, bool) for each in said)


def test_a_schema_that_nothing_fulfils_is_refused() -> None:
    tokenizer = load_tokenizer("starter")
    grammars = Grammars(tokenizer, end_of_turn_id(tokenizer))
    with pytest.raises(Fault):
        grammars.compile({"type": "integer", "minimum": 5, "maximum": 4})
