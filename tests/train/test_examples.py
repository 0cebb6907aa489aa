from __future__ import annotations

import json

import pytest
import torch

from edgealign.models.load import load_tokenizer
from edgealign.train.curves import PREFERENCE_PANELS, SFT_PANELS, draw_curves
from edgealign.train.examples import hold_out, load_documents, load_pairs
from edgealign.train.layout import document, pair
from edgealign.train.precision import choose_precision, cpu_flags, fixed_threads
from edgealign.train.recipes import PreferenceRecipe, SftRecipe


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_pairs_of_one_prompt_never_stand_on_both_sides():
    trees = [pair((1, prompt), (2, i), (3, i)) for i in range(10) for prompt in range(8)]
    kept, held = hold_out(trees, fraction=0.3, limit=100, seed=0)
    assert sorted(kept + held) == list(range(80))
    prompts = [{trees[i].segments[0].ids for i in side} for side in (kept, held)]
    assert not prompts[0] & prompts[1]
    assert len(held) == 20  # whole prompts of ten pairs each, within 24


def test_the_split_depends_on_the_seed_and_not_on_the_order():
    trees = [document((i, i + 1), (False, True)) for i in range(60)]
    held = {trees[i] for i in hold_out(trees, fraction=0.2, limit=100, seed=0)[1]}
    backwards = trees[::-1]
    assert held == {backwards[i] for i in hold_out(backwards, fraction=0.2, limit=100, seed=0)[1]}
    assert held != {trees[i] for i in hold_out(trees, fraction=0.2, limit=100, seed=1)[1]}
    assert len(held) == 12


def test_one_prompt_alone_is_never_held_out():
    trees = [pair((1,), (2, i), (3,)) for i in range(5)]
    assert hold_out(trees, fraction=0.9, limit=100, seed=0) == ([0, 1, 2, 3, 4], [])
    assert hold_out([], fraction=0.5, limit=100, seed=0) == ([], [])


def test_rows_that_are_cut_or_too_long_are_counted_and_said(tiny_model, tmp_path, capsys):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b " * 60, "rejected": "c"}]
    rows.append({"prompt": "word " * 80, "chosen": "b", "rejected": "c"})
    data = write(tmp_path / "pairs.jsonl", rows)
    found = load_pairs([data], load_tokenizer(tiny_model), PreferenceRecipe(max_tokens=48, valid_fraction=0.0))
    assert (found.facts["rows"], found.facts["cut"], found.facts["refused"]) == (3, 1, 1)
    assert len(found.train) == 2
    assert max(len(t.segments[0].ids) + len(t.segments[1].ids) for t in found.train) == 48
    said = capsys.readouterr().err
    assert "1 of 3 rows are not used; first, line 3: prompt" in said
    assert "1 of 3 rows were cut to 48 tokens" in said


def test_only_the_assistants_words_are_learned(tiny_model, tmp_path):
    data = write(tmp_path / "turns.jsonl", [{"prompt": "Hello you", "completion": "yes"}])
    tokenizer = load_tokenizer(tiny_model)
    (tree,) = load_documents([data], tokenizer, SftRecipe(valid_fraction=0.0)).train
    (segment,) = tree.segments
    learned = [i for i, flag in zip(segment.ids, segment.learned, strict=True) if flag]
    assert tokenizer.decode(learned) == "yes<|im_end|>"


def test_the_number_of_threads_is_put_back():
    before = torch.get_num_threads()
    with fixed_threads(before + 1) as threads:
        assert torch.get_num_threads() == threads == before + 1
    with fixed_threads(0) as threads:
        assert threads == before
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("flags", "native"),
    [("fpu avx2 avx512_bf16", True), ("fpu amx_bf16 amx_tile", True), ("fpu avx2 avx512f", False), ("", False)],
)
def test_auto_precision_follows_the_cpu_and_the_size_of_the_model(flags, native, tmp_path, monkeypatch):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr("edgealign.train.precision.cpu_flags", lambda: cpu_flags(cpuinfo))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert choose_precision("auto", lora=True, n_parameters=10**9).name == ("bfloat16" if native else "float32")
    assert choose_precision("auto", lora=True, n_parameters=10**6).name == "float32"


def test_an_arm_cpu_lists_its_features_and_a_system_without_the_file_none(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nFeatures : fp asimd bf16\n")
    assert "bf16" in cpu_flags(cpuinfo)
    assert cpu_flags(tmp_path / "absent") == set()


def test_full_training_keeps_float32_weights_in_bfloat16_arithmetic():
    assert choose_precision("bfloat16", lora=False, n_parameters=1).weights == "float32"
    assert choose_precision("bfloat16", lora=True, n_parameters=1).weights == "bfloat16"
    assert choose_precision("float32", lora=True, n_parameters=1).autocast is False


@pytest.mark.parametrize("n_rows", [1, 40])
def test_curves_are_drawn_for_any_number_of_steps(n_rows, tmp_path):
    rows = [{"step": i + 1, "loss": 1.0 / (i + 1), "learning_rate": 1e-4, "hit": 0.5, "kl": 0.0} for i in range(n_rows)]
    for name, panels in (("sft", SFT_PANELS), ("dpo", PREFERENCE_PANELS)):
        file = tmp_path / f"{name}.png"
        draw_curves(rows, panels, file, title="run")
        assert file.stat().st_size > 10_000
