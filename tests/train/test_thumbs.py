"""Thumbs: liked answers meet disliked ones, each under its own prompt, for objectives that are a sum over the two."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from edgealign.data.encode import encode_answer, encode_prompt
from edgealign.data.forms import Message
from edgealign.errors import InputError
from edgealign.models.load import load_tokenizer
from edgealign.objectives.table import of_sides
from edgealign.train import preference, stage
from edgealign.train.examples import hold_out, load_pairs
from edgealign.train.recipes import PreferenceRecipe
from edgealign.train.thumbs import pair_thumbs


def thumbs(count, liked=lambda i: i % 3 == 0):
    return [{"prompt": f"Say {i}.", "completion": f"It is {i}." if liked(i) else f"No {i}, no!", "label": liked(i)}
            for i in range(count)]  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def recipe(**options):
    given = {"threads": 1, "batch_size": 8, "tokens_per_pass": 512, "valid_fraction": 0.2, "precision": "float32"}
    return PreferenceRecipe(**{**given, "epochs": 2, "learning_rate": 3e-4, **options})


def test_the_less_frequent_kind_comes_again_in_turn_and_blocks_share_no_prompt():
    encoded = [((1, i // 2), (5, i)) for i in range(200)]  # every prompt twice
    labels = [i % 4 == 0 or i % 7 == 0 for i in range(200)]
    found = pair_thumbs(encoded, labels, "f")
    for tree, place in found:
        assert [segment.parent for segment in tree.segments] == [-1, 0, -1, 2]
        assert labels[place]
        assert tree.segments[1].ids == encoded[place][1]
        assert not labels[tree.segments[3].ids[1]]
        assert tree.leaves == (1, 3)
        assert tree.segments[2].ids == encoded[tree.segments[3].ids[1]][0]
    liked = Counter(place for _, place in found)
    disliked = Counter(tree.segments[3].ids[1] for tree, _ in found)
    assert set(liked) | set(disliked) == set(range(200))
    assert set(disliked.values()) <= {1, 2}
    assert max(liked.values()) > 1
    trees = [tree for tree, _ in found]
    kept, held = hold_out(trees, fraction=0.2, limit=100, seed=0)
    assert 10 < len(held) <= 0.2 * len(trees)
    seen = [{trees[i].segments[root].ids for i in part for root in (0, 2)} for part in (kept, held)]
    assert not seen[0] & seen[1]
    assert pair_thumbs(encoded, labels, "f") == found


def test_thumbs_of_one_kind_are_refused():
    with pytest.raises(InputError, match="f: has no disliked answer among 3; give thumbs of both kinds"):
        pair_thumbs([((1, i), (5,)) for i in range(3)], [True] * 3, "f")


def test_a_file_of_thumbs_becomes_the_tokens_of_its_prompts_and_answers(tiny_model, tmp_path):
    tok = load_tokenizer(tiny_model)
    data = write(tmp_path / "t.jsonl", thumbs(4, liked=lambda i: i < 2))
    texts = ("unrelated",)
    trees = load_pairs([data], tok, recipe(valid_fraction=0.0), columns=texts, texts=texts, thumbs=True).train
    expected = {
        (encode_prompt(tok, (Message("user", row["prompt"]),)),
         encode_answer(tok, (Message("user", row["prompt"]),), row["completion"]))
        for row in thumbs(4, liked=lambda i: i < 2)
    }  # fmt: skip
    assert {tuple(s.ids for s in tree.segments[place : place + 2]) for tree in trees for place in (0, 2)} == expected
    for one, other in pairwise([*trees, trees[0]]):
        assert one.segments[4].parent == 0
        assert one.segments[4].ids in {segment.ids for segment in (other.segments[1], other.segments[3])}


@pytest.mark.parametrize("objective", of_sides())
def test_every_objective_of_sides_learns_from_thumbs(objective, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "draw_curves", lambda rows, panels, file, title: file.write_bytes(b""))
    data = write(tmp_path / "t.jsonl", thumbs(60))
    made = preference.run(recipe(objective=objective), model=tiny_model, data=[data], out=tmp_path / "out")
    assert made.meta["after"]["loss"] < made.meta["before"]["loss"]
    assert made.meta["after"]["hit"] > 0.5
    before, after = (load_file(path / "model.safetensors") for path in (tiny_model, made.path))
    assert any(not torch.equal(value, before[name]) for name, value in after.items())


def test_an_objective_that_compares_two_answers_refuses_thumbs(tiny_model, tmp_path, command, capsys):
    data = write(tmp_path / "t.jsonl", thumbs(9))
    assert command("dpo", "--model", tiny_model, "--data", data, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "holds thumbs, and this objective compares two answers to one prompt; choose another --objective: " in said
    assert not (tmp_path / "out").exists()
