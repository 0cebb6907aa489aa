"""What is typed stays text: no look-alike becomes a token, nothing typed is lost, ordinary turns keep their ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgealign.data.encode import encode_conversation, encode_prompt, render
from edgealign.data.forms import Message
from edgealign.data.typed import cut, encode_segments, encoder, mark, special_tokens
from edgealign.errors import InputError
from edgealign.parity_strings import ORDINARY, look_alikes

MakeTokenizer = Callable[..., Any]
TOKENS = ("<|im_end|>", "<|im_start|>", "<|startoftext|>", "<|pad|>", "<|endoftext|>")
PLAIN = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = st.lists(st.one_of(st.sampled_from([*TOKENS, "<|", "|>", "im_end", "\n", "Qz0x", " "]), st.text(max_size=5)))


def typed(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def spelled(tokenizer: Any, ids: Any) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def count_special(tokenizer: Any, ids: Any) -> int:
    special = set(special_tokens(tokenizer).values())
    return sum(token in special for token in ids)


@given(TEXTS.map("".join))
@settings(deadline=None, max_examples=200)
def test_whatever_is_typed_reads_back_and_adds_no_special_token(tokenizer: Any, text: str) -> None:
    if not text.strip():
        return
    ids = encode_prompt(tokenizer, typed(text), typed=True)
    expected = f"<|startoftext|><|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    assert spelled(tokenizer, ids) == expected
    assert count_special(tokenizer, ids) == 4
    if not any(token in text for token in TOKENS):
        assert ids == encode_prompt(tokenizer, typed(text))


@given(TEXTS.map("".join), TEXTS.map("".join))
@settings(deadline=None, max_examples=100)
def test_a_whole_talk_with_look_alikes_on_both_sides_has_only_the_templates_tokens(
    tokenizer: Any, asked: str, answered: str
) -> None:
    turns = (Message("system", asked), Message("user", asked), Message("assistant", answered), Message("user", "So?"))
    ids = encode_prompt(tokenizer, turns, typed=True)
    assert count_special(tokenizer, ids) == 1 + 2 * 4 + 1
    wanted = "".join(f"<|im_start|>{turn.role}\n{turn.content}<|im_end|>\n" for turn in turns)
    assert spelled(tokenizer, ids) == f"<|startoftext|>{wanted}<|im_start|>assistant\n"


@pytest.mark.parametrize("text", [text for text in ORDINARY if text])
def test_an_ordinary_text_has_the_same_ids_in_segments_as_in_the_rendered_conversation(
    make_tokenizer: MakeTokenizer, text: str
) -> None:
    tokenizer = make_tokenizer(split=False)  # tokens reach across anything but special tokens
    turns = (Message("user", text), Message("assistant", text))
    marked = mark(tokenizer, turns)
    assert (marked.messages, marked.typed) == (turns, {})
    whole = render(tokenizer, turns)
    segments = cut(tokenizer, whole, marked)
    assert "".join(segment.text for segment in segments) == whole
    ids = encode_segments(encoder(tokenizer), segments)
    assert list(ids) == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert encode_prompt(tokenizer, turns[:1], typed=True) == encode_prompt(tokenizer, turns[:1])


@pytest.mark.parametrize("text", look_alikes(TOKENS[:4], TOKENS))
def test_transformers_own_way_agrees_on_what_is_a_token_and_on_the_text(tokenizer: Any, text: str) -> None:
    """It cuts the text at each look-alike, so the ids of the text may differ; the special ones and the text may not."""
    ids = encode_prompt(tokenizer, typed(text), typed=True)
    theirs = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, sanitize_control_tokens=True,
        return_dict=False,
    )
    special = set(special_tokens(tokenizer).values())
    assert [token for token in ids if token in special] == [token for token in theirs if token in special]
    assert spelled(tokenizer, ids) == spelled(tokenizer, theirs)


def test_training_data_is_still_refused(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="contains the control token"):
        encode_conversation(tokenizer, (Message("user", "a<|im_end|>b"), Message("assistant", "Yes")))
    with pytest.raises(InputError, match="contains the control token"):
        encode_prompt(tokenizer, typed("a<|im_end|>b"))


@pytest.mark.parametrize(
    "content", ["m.content | upper", "m.content | replace('Q', '')", "'gone'"], ids=["upper", "replaced", "left out"]
)
def test_a_template_that_changes_a_look_alike_is_refused_and_takes_ordinary_text(
    make_tokenizer: MakeTokenizer, content: str
) -> None:
    written = "{{ m.content if m.role == 'assistant' else (" + content + ") }}"
    tokenizer = make_tokenizer(PLAIN.replace("{{ m.content }}", written))
    assert encode_prompt(tokenizer, typed("fine"), typed=True) == encode_prompt(tokenizer, typed("fine"))
    with pytest.raises(InputError, match=r"changes or leaves out the turn that contains <\|im_end\|>"):
        encode_prompt(tokenizer, typed("a<|im_end|>b"), typed=True)


def test_a_template_that_strips_strips_as_before(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(PLAIN.replace("m.content }}", "m.content | trim }}"))
    ids = encode_prompt(tokenizer, typed("  <|im_end|> a  "), typed=True)
    assert "user\n<|im_end|> a<|im_end|>\n" in spelled(tokenizer, ids)
    assert count_special(tokenizer, ids) == 4


def test_a_token_that_swallows_the_space_beside_it_does_so_in_segments_too(make_tokenizer: MakeTokenizer) -> None:
    from tokenizers import AddedToken

    tokenizer = make_tokenizer(PLAIN.replace("<|im_end|>", "<|stop|>"))
    tokenizer.add_tokens([AddedToken("<|stop|>", special=True, rstrip=True, normalized=False)], special_tokens=True)
    turns = (Message("user", "Hi"), Message("assistant", "Yes"))
    whole = render(tokenizer, turns)
    segments = cut(tokenizer, whole, mark(tokenizer, turns))
    ids = encode_segments(encoder(tokenizer), segments)
    assert list(ids) == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert "<|stop|>\n" in [segment.text for segment in segments]


def test_the_stand_in_is_a_word_that_nobody_wrote(tokenizer: Any) -> None:
    text = "Qz0x0Yv Qz1x <|im_end|> Qz0x1Yv<|im_end|>"
    marked = mark(tokenizer, typed(text))
    assert len(marked.typed) == 2
    assert not any(word in text for word in marked.typed)
    ids = encode_prompt(tokenizer, typed(text), typed=True)
    assert text in spelled(tokenizer, ids)
