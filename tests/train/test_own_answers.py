"""A model's own answers: which pass, which is kept, and that a scripted model's are found as written."""

from __future__ import annotations

import json

import pytest

from edgealign.artifact import open_artifact
from edgealign.data.forms import Message
from edgealign.data.styles import STYLES
from edgealign.data.template import end_of_turn_id
from edgealign.errors import InputError
from edgealign.models.load import load_tokenizer
from edgealign.train import own_answers
from edgealign.train.own_answers import _Asker, loops, taken_from_passage
from edgealign.train.recipes import OwnAnswersRecipe

SHORT = STYLES["short"].requests[0]


class Speaker:
    """A session that says given texts one after the other, from the first token of each prompt on."""

    def __init__(self, tokenizer, texts, ends=True):
        self.tokenizer, self.texts, self.ends = tokenizer, list(texts), ends
        self.end = end_of_turn_id(tokenizer)

    def reset(self):
        self.left = None

    def prefill(self, tokens):
        text = self.texts.pop(0)
        self.left = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.end]
        return self._next()

    def step(self, token):
        return self._next()

    def _next(self):
        import numpy as np

        logits = np.full(len(self.tokenizer), -50.0, dtype=np.float32)
        logits[self.left.pop(0) if self.left else 20] = 50.0
        return logits

    def set_user(self, adapter): ...
    def close(self): ...


@pytest.fixture
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


def best(tokenizer, texts, messages, answer="", samples=1):
    asker = _Asker(Speaker(tokenizer, texts), tokenizer, OwnAnswersRecipe(samples=samples, max_new_tokens=80))
    return asker.best(tuple(Message(*m) for m in messages), answer, seed=0)


def test_a_run_of_four_words_that_comes_twice_is_a_loop():
    assert loops("the fox ran home and the fox ran home")
    assert not loops("the fox ran home and the hen ran home")


def test_the_answer_that_shares_most_with_the_question_and_the_data_is_kept(tokenizer):
    texts = ["Nobody knows that.", "The hungry fox went into the forest."]
    found, _ = best(tokenizer, texts, [("user", "A hungry fox went home. Where did it go?")], "Into the forest.")
    assert found == texts[1]


def test_an_answer_that_ignores_the_style_does_not_pass(tokenizer):
    plain, long, short = "It went home in the evening.", "It went home in the evening with its mother.", "It went home."
    asked = [("system", SHORT), ("user", "Where did it go?")]
    assert best(tokenizer, [plain, long, short], asked)[0] == short
    assert best(tokenizer, [plain, long, long], asked) == (None, "no answer passes (short)")


def test_an_answer_about_a_story_that_looks_up_the_wrong_thing_does_not_pass(tokenizer):
    story = "The hungry fox ran into the forest. It saw a bridge.\n\nWhere did the fox run?"
    wrong, right = "The fox ran to the bridge.", "It went into the forest."
    assert taken_from_passage("The fox ran into the forest.", story) == {"into", "forest"}
    assert best(tokenizer, [wrong, right], [("user", story)], "The fox ran into the forest.")[0] == right
    assert best(tokenizer, [wrong, wrong], [("user", story)], "The fox ran into the forest.") == (
        None, "no answer passes (plain)",
    )  # fmt: skip
    free = "Because it was dark."  # nothing of it stands in the story, so nothing is asked of an answer
    assert best(tokenizer, [wrong, wrong], [("user", story)], free)[0] == wrong


@pytest.mark.parametrize(
    "text",
    ["it ran home and it ran home and it ran home.", "it has no end mark", "", "It ran.<|im_start|>user."],
)
def test_loops_fragments_and_silence_do_not_pass(text, tokenizer):
    assert best(tokenizer, [text, text], [("user", "Hello?")])[0] is None


def test_an_answer_that_never_ends_does_not_pass(tokenizer):
    found, reason = best(tokenizer, ["word " * 200 + "."] * 2, [("user", "Hello?")])
    assert found is None
    assert "plain" in reason


def test_a_source_without_a_usable_answer_is_refused_in_one_line(tiny_model, tmp_path):
    file = tmp_path / "chats.jsonl"
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    file.write_text(json.dumps(row) + "\n")
    recipe = OwnAnswersRecipe(limit=1, samples=0, max_new_tokens=8)
    with pytest.raises(InputError, match="no prompt with an answer that passes"):
        own_answers.run(recipe, model=tiny_model, sources=[file], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_answers_of_a_trained_model_become_conversations(tiny_model, tmp_path):
    """A model that learned one answer by heart is asked for it."""
    from edgealign.train import sft
    from edgealign.train.recipes import SftRecipe

    file = tmp_path / "chats.jsonl"
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, my friend."}]}
    file.write_text((json.dumps(row) + "\n") * 8)
    recipe = SftRecipe(epochs=40, batch_size=8, learning_rate=5e-3, valid_fraction=0.0)
    model = sft.run(recipe, model=tiny_model, data=[str(file)], out=tmp_path / "model")
    own_answers.run(OwnAnswersRecipe(limit=3), model=model.path, sources=[file], out=tmp_path / "own")
    made = open_artifact(tmp_path / "own")
    rows = [json.loads(line) for line in (made.path / "train.jsonl").read_text().splitlines()]
    assert [r["messages"][-1]["content"] for r in rows] == ["Hello, my friend."] * 3
    assert {len(r["messages"]) for r in rows} <= {2, 4}
