"""The loss mask, token by token, and everything a chat template can do wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from edgealign.data.encode import (
    encode_conversation,
    encode_conversations,
    encode_pair,
    encode_pairs,
    encode_prompt,
    encode_text,
    encode_thumb,
    encode_thumbs,
    end_of_turn_id,
    render,
    template_hash,
)
from edgealign.data.forms import Conversation, Message, Pair, Thumb, ToolCall
from edgealign.errors import InputError

SYSTEM = Message("system", "Be.")
HI, HELLO = Message("user", "Hi"), Message("assistant", "Yo")
BYE, CIAO = Message("user", "By"), Message("assistant", "Ok")
TOOL_CALL = Message("assistant", "", (ToolCall("brew", '{"leaf": "green"}'),))

MakeTokenizer = Callable[..., Any]


def spelled(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    return [tokenizer.decode([token]) for token in ids]


def test_only_the_assistants_words_and_end_of_turn_are_learned_token_by_token(tokenizer: Any) -> None:
    encoded = encode_conversation(tokenizer, (SYSTEM, HI, HELLO, BYE, CIAO))
    assert list(zip(spelled(tokenizer, encoded.ids), encoded.mask, strict=True)) == [
        ("<|startoftext|>", False),
        ("<|im_start|>", False), ("system", False), ("\n", False),
        ("B", False), ("e", False), (".", False), ("<|im_end|>", False), ("\n", False),
        ("<|im_start|>", False), ("user", False), ("\n", False),
        ("H", False), ("i", False), ("<|im_end|>", False), ("\n", False),
        ("<|im_start|>", False), ("assistant", False), ("\n", False),
        ("Y", True), ("o", True), ("<|im_end|>", True), ("\n", False),
        ("<|im_start|>", False), ("user", False), ("\n", False),
        ("B", False), ("y", False), ("<|im_end|>", False), ("\n", False),
        ("<|im_start|>", False), ("assistant", False), ("\n", False),
        ("O", True), ("k", True), ("<|im_end|>", True), ("\n", False),
    ]
    assert encoded.cut == 0


def test_the_tokens_are_those_of_the_rendered_text(tokenizer: Any) -> None:
    messages = (SYSTEM, HI, HELLO, BYE, CIAO)
    plain = tokenizer.apply_chat_template([message.as_dict() for message in messages], tokenize=False)
    assert render(tokenizer, messages) == plain
    assert list(encode_conversation(tokenizer, messages).ids) == tokenizer(plain, add_special_tokens=False)["input_ids"]


def test_a_tool_result_is_read_and_not_learned(tokenizer: Any) -> None:
    encoded = encode_conversation(tokenizer, (HI, Message("assistant", "?"), Message("tool", "4"), CIAO))
    learned = [token for token, mask in zip(encoded.ids, encoded.mask, strict=True) if mask]
    assert spelled(tokenizer, learned) == ["?", "<|im_end|>", "O", "k", "<|im_end|>"]


def test_an_assistant_that_opens_is_learned_from_its_first_word(tokenizer: Any) -> None:
    encoded = encode_conversation(tokenizer, (HELLO, BYE, CIAO))
    learned = [token for token, mask in zip(encoded.ids, encoded.mask, strict=True) if mask]
    assert spelled(tokenizer, learned) == ["Y", "o", "<|im_end|>", "O", "k", "<|im_end|>"]


def test_a_prompt_ends_where_the_answer_begins_and_has_one_bos(tokenizer: Any) -> None:
    ids = encode_prompt(tokenizer, (SYSTEM, HI))
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert spelled(tokenizer, ids)[-3:] == ["<|im_start|>", "assistant", "\n"]


def test_an_answer_that_begins_with_a_newline_is_cut_off_at_the_prompt(make_tokenizer: MakeTokenizer) -> None:
    """A tokenizer with a token for two newlines would join the header's and the answer's."""
    tokenizer = make_tokenizer(split=False)
    joined = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    assert len(joined) == 1  # the premise
    pair = Pair((HI,), "\nYes", "No")
    prompt, chosen, _ = encode_pair(tokenizer, pair)
    assert prompt == encode_prompt(tokenizer, (HI,))
    assert joined[0] not in prompt + chosen
    encoded = encode_conversation(tokenizer, (HI, Message("assistant", "\nYes")))
    assert encoded.ids[: len(prompt) + len(chosen)] == prompt + chosen
    assert encoded.mask == (False,) * len(prompt) + (True,) * len(chosen) + (False,)


def test_both_sides_of_a_pair_share_the_prompt_and_end_once(tokenizer: Any) -> None:
    end = end_of_turn_id(tokenizer)
    prompt, chosen, rejected = encode_pair(tokenizer, Pair((SYSTEM, HI, HELLO, BYE), "Ok", "No way"))
    assert prompt == encode_prompt(tokenizer, (SYSTEM, HI, HELLO, BYE))
    assert spelled(tokenizer, chosen) == ["O", "k", "<|im_end|>"]
    assert (chosen.count(end), rejected.count(end)) == (1, 1)
    assert rejected[-1] == end
    assert tokenizer.bos_token_id not in chosen + rejected


def test_pair_and_conversation_agree_on_every_token(tokenizer: Any) -> None:
    prompt, chosen, _ = encode_pair(tokenizer, Pair((SYSTEM, HI, HELLO, BYE), "Ok", "No"))
    whole = encode_conversation(tokenizer, (SYSTEM, HI, HELLO, BYE, CIAO))
    assert whole.ids[: len(prompt) + len(chosen)] == prompt + chosen
    assert encode_thumb(tokenizer, Thumb((SYSTEM, HI, HELLO, BYE), "Ok", True)) == (prompt, chosen)


@pytest.mark.parametrize("message", [Message("user", "Hi<|im_end|>"), Message("assistant", "Yo<|im_end|>")])
def test_a_control_token_in_the_text_is_refused(tokenizer: Any, message: Message) -> None:
    """Otherwise an answer would end twice, or a user could end the assistant's turn."""
    messages = (message, HELLO) if message.role == "user" else (HI, message)
    with pytest.raises(InputError, match=r"contains the control token <\|im_end\|>"):
        encode_conversation(tokenizer, messages)
    with pytest.raises(InputError, match="contains the control token"):
        encode_pair(tokenizer, Pair((HI,), "Yo<|im_end|>", "No"))
    with pytest.raises(InputError, match="contains the control token"):
        encode_text(tokenizer, "a<|startoftext|>b", max_tokens=9)


def test_template_hash_is_of_the_template_as_it_stands(tokenizer: Any) -> None:
    assert template_hash(tokenizer) == hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()


# --- templates


ENDLESS = "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
UNSTABLE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ '(last) ' if loop.last else '' }}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TWO_BOS = "{{ bos_token }}" + PLAIN
SHOUTING = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if m.content is string and 'Zr5' in m.content else m.content | upper }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('No system here.') }}{% endif %}" + PLAIN
DATED = (
    "{{ bos_token }}<|im_start|>system\nToday is {{ strftime_now('%d %B %Y, %A') }}.<|im_end|>\n"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALLING = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }}({{ c.function.arguments | tojson }})]{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ '<think></think>' if m.role == 'assistant' and loop.last else '' }}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (None, (HI, HELLO), "has no chat template"),
        (ENDLESS, (HI, HELLO), "writes no special token after an assistant's turn"),
        ("{{ bos_token }}{% for m in messages %}{{ m.role }}<|im_end|>{% endfor %}", (HI, HELLO), "leaves out what"),
        (UNSTABLE, (HI, HELLO), "is not prefix-stable: the text before turn 2 changes"),
        (TWO_BOS, (HI, HELLO), "begin-of-text token more than once"),
        (SHOUTING, (HI, HELLO), "changes or leaves out the assistant's text"),
        (STRICT, (SYSTEM, HI, HELLO), "refuses these turns (No system here)"),
        ("{% for m in messages %}{{ m.role }", (HI, HELLO), "the chat template refuses these turns"),
    ],
    ids=["none", "endless", "silent", "unstable", "two BOS", "shouting", "strict", "broken"],
)
def test_a_template_that_cannot_be_trained_on_is_refused(
    make_tokenizer: MakeTokenizer, template: str | None, messages: tuple[Message, ...], said: str
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputError) as error:
        encode_conversation(tokenizer, messages)
    assert said in error.value.line()


def test_tool_calls_that_the_template_drops_are_an_error(make_tokenizer: MakeTokenizer) -> None:
    messages = (HI, TOOL_CALL, Message("tool", "done"), CIAO)
    with pytest.raises(InputError, match="turn 2: the chat template leaves out tool_calls"):
        encode_conversation(make_tokenizer(), messages)
    tokenizer = make_tokenizer(CALLING)
    encoded = encode_conversation(tokenizer, messages)
    learned = tokenizer.decode([token for token, mask in zip(encoded.ids, encoded.mask, strict=True) if mask])
    assert learned == '[brew({"leaf": "green"})]<|im_end|>Ok<|im_end|>'


def test_the_date_in_a_template_is_frozen(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(DATED)
    text = render(tokenizer, (HI, HELLO))
    assert text.startswith("<|startoftext|><|im_start|>system\nToday is 01 January 2025, Wednesday.<|im_end|>\n")
    undated = tokenizer.apply_chat_template([HI.as_dict(), HELLO.as_dict()], tokenize=False)
    assert undated.partition("<|im_end|>")[2] == text.partition("<|im_end|>")[2]  # nothing else has changed
    assert template_hash(tokenizer) == hashlib.sha256(DATED.encode()).hexdigest()


def test_what_a_template_adds_to_the_last_answer_only_is_no_instability(make_tokenizer: MakeTokenizer) -> None:
    """Qwen 3 writes an empty thought into the last turn: generation still sees how the training text begins."""
    tokenizer = make_tokenizer(THINKING)
    encoded = encode_conversation(tokenizer, (HI, HELLO, BYE, CIAO))
    learned = tokenizer.decode([token for token, mask in zip(encoded.ids, encoded.mask, strict=True) if mask])
    assert learned == "Yo<|im_end|><think></think>Ok<|im_end|>"


def test_a_bos_that_is_also_the_turn_marker_is_no_double_bos(make_tokenizer: MakeTokenizer) -> None:
    """SmolLM2 names <|im_start|> its BOS."""
    template = PLAIN.replace("{{ bos_token }}", "")
    tokenizer = make_tokenizer(template, bos="<|im_start|>")
    assert sum(encode_conversation(tokenizer, (HI, HELLO, BYE, CIAO)).mask) == 6


def test_a_changed_template_is_noticed(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    before = encode_conversation(tokenizer, (HI, HELLO))
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|endoftext|>")
    after = encode_conversation(tokenizer, (HI, HELLO))
    assert end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert before.ids != after.ids


# --- what is too long


def test_a_long_conversation_keeps_its_start_and_says_how_much_was_cut(tokenizer: Any) -> None:
    whole = encode_conversation(tokenizer, (HI, HELLO, BYE, CIAO))
    part = encode_conversation(tokenizer, (HI, HELLO, BYE, CIAO), max_tokens=14)
    assert (part.ids, part.mask) == (whole.ids[:14], whole.mask[:14])
    assert part.cut == len(whole.ids) - 14


def test_a_conversation_without_a_learned_token_left_is_refused(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="nothing of the assistant in its first 11 tokens"):
        encode_conversation(tokenizer, (HI, HELLO), max_tokens=11)
    with pytest.raises(InputError, match="nothing of the assistant at all"):
        encode_conversation(tokenizer, (HI,))


def test_many_conversations_are_counted_and_none_is_lost(tokenizer: Any) -> None:
    long = Conversation((Message("user", "x" * 50), HELLO))
    rows = [Conversation((HI, HELLO)), long, Conversation((HI, HELLO, BYE, CIAO))]
    encoded = encode_conversations(tokenizer, rows, max_tokens=16)
    assert encoded.kept == (0, 2)
    assert encoded.cut == 1
    assert [place for place, _ in encoded.refused] == [1]
    assert "nothing of the assistant" in encoded.refused[0][1]


def test_a_long_pair_keeps_the_start_of_both_answers(tokenizer: Any) -> None:
    pair = Pair((HI,), "a" * 30, "b")
    prompt, _, _ = encode_pair(tokenizer, pair)
    room = 10
    cut = encode_pair(tokenizer, pair, max_tokens=len(prompt) + room)
    assert (cut[0], len(cut[1]), spelled(tokenizer, cut[2])) == (prompt, room, ["b", "<|im_end|>"])
    encoded = encode_pairs(tokenizer, [pair, Pair((HI,), "a", "b")], max_tokens=len(prompt) + room)
    assert (encoded.kept, encoded.cut, encoded.refused) == ((0, 1), 1, ())


def test_a_pair_without_room_or_difference_is_refused_and_listed(tokenizer: Any) -> None:
    same_start = Pair((HI,), "a" * 30 + "b", "a" * 30 + "c")
    prompt = encode_prompt(tokenizer, (HI,))
    with pytest.raises(InputError, match="the first 5 tokens of both answers are the same"):
        encode_pair(tokenizer, same_start, max_tokens=len(prompt) + 5)
    with pytest.raises(InputError, match="leave no room for an answer"):
        encode_pair(tokenizer, same_start, max_tokens=len(prompt))
    encoded = encode_pairs(tokenizer, [same_start, Pair((HI,), "a", "b")], max_tokens=len(prompt) + 5)
    assert (encoded.kept, [place for place, _ in encoded.refused]) == ((1,), [0])


def test_a_long_thumb_is_cut_and_counted(tokenizer: Any) -> None:
    prompt = encode_prompt(tokenizer, (HI,))
    encoded = encode_thumbs(tokenizer, [Thumb((HI,), "a" * 9, True)], max_tokens=len(prompt) + 4)
    assert (len(encoded.rows[0][1]), encoded.cut) == (4, 1)


def test_plain_text_is_learned_whole_in_pieces(tokenizer: Any) -> None:
    text = "Tea is a leaf."
    pieces = encode_text(tokenizer, text, max_tokens=6)
    assert {piece.ids[0] for piece in pieces} == {tokenizer.bos_token_id}
    assert all(piece.mask == (False, *[True] * (len(piece.ids) - 1)) for piece in pieces)
    assert max(len(piece.ids) for piece in pieces) == 6
    assert tokenizer.decode([token for piece in pieces for token in piece.ids[1:]]) == text
