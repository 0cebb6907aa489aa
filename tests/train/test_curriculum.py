"""Easy to hard: the order is by difficulty, resumes exactly, and judges of any tokenizer can be asked."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from edgealign.artifact import open_artifact, sha256_file
from edgealign.cli import main
from edgealign.data.encode import encode_conversation, encode_text
from edgealign.data.forms import Conversation, Message, Text
from edgealign.errors import InputError, RecipeError
from edgealign.models import create
from edgealign.models.load import load_model, load_tokenizer
from edgealign.models.recipes import InitRecipe
from edgealign.train import curriculum, difficulty, sft, stage
from edgealign.train.curriculum import Curriculum, epoch_order, rank_correlation, step_difficulties
from edgealign.train.difficulty import PER_SYMBOL, PER_TOKEN, Difficulty, judge, open_judges
from edgealign.train.examples import Origin, load_documents
from edgealign.train.layout import document
from edgealign.train.precision import Precision
from edgealign.train.recipes import SftRecipe
from edgealign.train.schedule import plan_steps
from edgealign.train.scoring import Passes
from edgealign.train.tasks import SftTask
from edgealign.train.trainer import AlignTrainer

FLOAT32 = Precision("float32", "float32", False)
SMALL = {"threads": 1, "batch_size": 4, "tokens_per_pass": 256, "learning_rate": 5e-3, "order": "easy_to_hard"}


@pytest.fixture(autouse=True)
def _quick_pictures(request, monkeypatch):
    """Drawing takes longer than these runs."""
    monkeypatch.setattr(stage, "draw_curves", lambda rows, panels, file, title: file.write_bytes(b""))
    if "real_picture" not in request.fixturenames:
        monkeypatch.setattr(curriculum, "draw", lambda made, rows, file: file.write_bytes(b""))


@pytest.fixture
def real_picture():
    """Ask for this to have the difficulties drawn."""


@pytest.fixture
def turns(tmp_path):
    rows = [{"prompt": f"Say {i}.", "completion": "It is " + "z q" * (i % 5) + f" {i}."} for i in range(24)]
    file = tmp_path / "turns.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="session")
def other_tokenizer(tmp_path_factory):
    """A tiny model whose tokenizer was trained on other text: the same answer has other tokens."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "text.txt").write_text("It is. Say it is, say it is. " * 200, encoding="utf-8")
    recipe = InitRecipe(shape="tiny", seed=5, vocab_size=300, context=512, dtype="float32", norm_noise=0.1)
    create.run(recipe, text=[folder / "text.txt"], out=folder / "model")
    return folder / "model"


@pytest.fixture(scope="session")
def same_tokenizer(tiny_model, tmp_path_factory):
    """Other weights, the same tokenizer."""
    folder = tmp_path_factory.mktemp("same") / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "manifest.json").unlink()
    model = load_model(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 + 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    model.save_pretrained(folder)
    return folder


def scored(values, success=None):
    losses = np.asarray(values, dtype=float)
    return Difficulty(losses, np.zeros(len(losses)) if success is None else np.asarray(success, float), PER_TOKEN, 1)


def judged(tiny_model, rows, judges=(), max_tokens=64, **options):
    """Difficulty of conversations or texts for the tiny model, computed as the stage does."""
    tokenizer = load_tokenizer(tiny_model)
    trees, origins = [], []
    for line, row in enumerate(rows, start=1):
        if isinstance(row, Text):
            pieces = encode_text(tokenizer, row.text, max_tokens=max_tokens)
        else:
            pieces = [encode_conversation(tokenizer, row.messages, max_tokens=max_tokens)]
        trees += [document(piece.ids, piece.mask) for piece in pieces]
        origins += [Origin(0, line, row)] * len(pieces)
    source, model = open_artifact(tiny_model), load_model(tiny_model)
    passes = Passes.of(model, FLOAT32, tokens_per_pass=128)
    found = judge(
        open_judges(judges), trees, origins, base=(source, model, tokenizer), passes=passes, max_tokens=max_tokens,
        precision="float32", **options,
    )
    return found, trees


def ask(prompt, answer):
    return Conversation((Message("user", prompt), Message("assistant", answer)))


def teacher_forced(model, tree):
    """Summed nats and right first guesses of the learned tokens, by transformers' own forward pass."""
    (segment,) = tree.segments
    ids = torch.tensor([segment.ids])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].float()
    nats, hits, count = 0.0, 0, 0
    for place in range(1, len(segment.ids)):
        if segment.learned[place]:
            nats -= float(logits[place - 1].log_softmax(-1)[segment.ids[place]])
            hits += int(logits[place - 1].argmax()) == segment.ids[place]
            count += 1
    return nats, hits, count


ROWS = [ask("Say 1.", "One."), ask("Say 2.", "Two, it is two!"), ask("Who?", "Nobody knows. Zürich, perhaps: ✓.")]


def test_the_order_is_by_difficulty_and_the_control_is_its_reverse():
    difficulty = scored([3.0, 1.0, 2.0, 5.0, 4.0])
    options = {"by": "loss", "mixing": 0.0, "seed": 0, "epoch": 0}
    assert epoch_order(difficulty, easy_first=True, **options) == [1, 2, 0, 4, 3]
    assert epoch_order(difficulty, easy_first=False, **options) == [3, 4, 0, 2, 1]


def test_equal_success_is_ordered_by_loss():
    difficulty = scored([3.0, 1.0, 2.0, 0.5], success=[1.0, 1.0, 0.5, 0.0])
    assert epoch_order(difficulty, by="success", easy_first=True, mixing=0.0, seed=0, epoch=0) == [1, 0, 2, 3]


def test_mixing_goes_from_the_strict_order_to_a_shuffle():
    values = np.random.default_rng(4).random(400)
    ranks = np.argsort(np.argsort(values))

    def agreement(mixing):
        order = epoch_order(scored(values), by="loss", easy_first=True, mixing=mixing, seed=0, epoch=0)
        assert sorted(order) == list(range(400))
        return rank_correlation(ranks[order].astype(float), np.arange(400.0))

    strict, default, half, shuffled = (agreement(mixing) for mixing in (0.0, 0.1, 0.5, 1.0))
    assert strict == pytest.approx(1.0)
    assert 0.97 < default < 1.0
    assert 0.5 < half < default
    assert abs(shuffled) < 0.2


def test_chance_comes_from_the_seed_and_the_epoch():
    values = np.random.default_rng(4).random(50)

    def order(seed, epoch):
        return epoch_order(scored(values), by="loss", easy_first=True, mixing=0.3, seed=seed, epoch=epoch)

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_steps_follow_the_order_and_later_epochs_are_shuffled_as_ever(lfm2):
    trees = [document((1, 5, 6 + i), (False, True, True)) for i in range(10)]
    passes = Passes.of(lfm2, FLOAT32, tokens_per_pass=64)
    recipe = SftRecipe(order="easy_to_hard", mixing=0.0, batch_size=3, epochs=3, curriculum_epochs=2)
    values = [float((7 * i) % 10) for i in range(10)]
    ordered = Curriculum.of(scored(values), [Origin(0, i, None) for i in range(10)], recipe, [2] * 10)
    steps = plan_steps(SftTask(trees), recipe, passes, ordered.order)
    plain = plan_steps(SftTask(trees), recipe, passes)
    flat = [[i for group in step for i in group] for step in steps]
    for epoch in (0, 1):
        means = [np.mean([values[i] for i in step]) for step in flat[4 * epoch : 4 * epoch + 4]]
        assert means == sorted(means)
        assert means == pytest.approx(step_difficulties(ordered, 12)[4 * epoch : 4 * epoch + 4])
    assert steps[8:] == plain[8:]
    assert math.isnan(step_difficulties(ordered, 12)[8])


def test_a_run_that_ends_within_its_first_epoch_is_warned_of(capsys):
    recipe = SftRecipe(order="easy_to_hard", batch_size=2, max_steps=3)
    warned = Curriculum.of(scored(range(10)), [Origin(0, i, None) for i in range(10)], recipe, [2] * 10)
    assert warned.warnings == ("3 steps are less than an epoch of 5: the hardest examples are never seen",)
    assert "warning: 3 steps are less" in capsys.readouterr().err


def test_the_loss_of_the_model_itself_is_that_of_its_own_forward_pass(tiny_model):
    found, trees = judged(tiny_model, ROWS)
    model = load_model(tiny_model)
    for tree, loss in zip(trees, found.losses, strict=True):
        nats, _, count = teacher_forced(model, tree)
        assert loss == pytest.approx(nats / count, rel=1e-4)
    assert found.unit == PER_TOKEN
    assert found.n_judges == 1


def test_success_is_the_share_of_judges_whose_first_guesses_are_right(tiny_model, same_tokenizer, turns, tmp_path):
    recipe = SftRecipe(**SMALL, epochs=6, valid_fraction=0.0)
    fitted = sft.run(recipe, model=tiny_model, data=[turns], out=tmp_path / "fitted").path
    rows = [ask(f"Say {i}.", f"It is  {i}.") for i in range(4)]
    accuracies = []
    for folder in (fitted, same_tokenizer):
        _, trees = judged(tiny_model, rows)
        found = [teacher_forced(load_model(folder), tree) for tree in trees]
        accuracies.append([hits / count for _, hits, count in found])
    threshold = (min(accuracies[0]) + max(accuracies[1])) / 2
    assert min(accuracies[0]) > max(accuracies[1])
    found, _ = judged(tiny_model, rows, [fitted, same_tokenizer], success_accuracy=threshold)
    assert found.success.tolist() == [0.5] * 4
    found, _ = judged(tiny_model, rows, [fitted], success_accuracy=threshold)
    assert found.success.tolist() == [1.0] * 4


def test_judges_of_one_tokenizer_are_averaged_per_token(tiny_model, same_tokenizer):
    alone = [judged(tiny_model, ROWS, [folder])[0].losses for folder in (tiny_model, same_tokenizer)]
    both, _ = judged(tiny_model, ROWS, [tiny_model, same_tokenizer])
    assert both.unit == PER_TOKEN
    assert both.n_judges == 2
    assert both.losses == pytest.approx((alone[0] + alone[1]) / 2, rel=1e-4)
    assert np.abs(alone[0] - alone[1]).max() > 1e-3


def test_a_judge_of_another_tokenizer_makes_all_of_them_count_per_byte(tiny_model, other_tokenizer):
    found, trees = judged(tiny_model, ROWS, [tiny_model, other_tokenizer])
    assert found.unit == PER_SYMBOL
    own, model = load_tokenizer(other_tokenizer), load_model(other_tokenizer)
    for row, tree, loss in zip(ROWS, trees, found.losses, strict=True):
        encoded = encode_conversation(own, row.messages)
        assert encoded.ids != tree.segments[0].ids
        symbols = len(row.messages[1].content.encode()) + 1  # and the end of the turn
        theirs, _, _ = teacher_forced(model, document(encoded.ids, encoded.mask))
        mine, _, _ = teacher_forced(load_model(tiny_model), tree)
        assert loss == pytest.approx((mine + theirs) / 2 / symbols, rel=1e-4)


def test_what_is_cut_off_for_training_is_cut_off_for_a_judge_of_another_tokenizer(tiny_model, other_tokenizer):
    easy, hard = "It is. Say it is, say it is. " * 3, "#%&$@ " * 40
    found, trees = judged(tiny_model, [ask("Say.", easy + hard), ask("Say.", easy)], [other_tokenizer], max_tokens=40)
    tokenizer = load_tokenizer(tiny_model)
    kept = tokenizer.decode([i for i, flag in zip(*_parts(trees[0]), strict=True) if flag])
    assert (easy + hard).startswith(kept)
    alone, _ = judged(tiny_model, [ask("Say.", kept)], [other_tokenizer], max_tokens=200)
    assert found.losses[0] == pytest.approx(alone.losses[0], rel=0.15)  # a token at the cut, and the end of the turn


def _parts(tree):
    return tree.segments[0].ids, tree.segments[0].learned


def test_the_pieces_of_a_long_text_share_what_a_judge_of_another_tokenizer_says(tiny_model, other_tokenizer):
    rows = [Text("Say it is. " * 30), Text("Zzz?")]
    found, trees = judged(tiny_model, rows, [other_tokenizer], max_tokens=32)
    assert len(trees) > 3
    assert len(set(found.losses[:-1].tolist())) == 1
    assert found.losses[-1] != found.losses[0]
    alone, _ = judged(tiny_model, rows, max_tokens=32)
    assert len(set(alone.losses[:-1].tolist())) > 1


def test_pieces_that_are_held_out_do_not_change_the_unit(tiny_model, same_tokenizer):
    tokenizer = load_tokenizer(tiny_model)
    row = Text("Say it is. " * 30)
    pieces = [document(piece.ids, piece.mask) for piece in encode_text(tokenizer, row.text, max_tokens=32)]
    model = load_model(tiny_model)
    found = judge(
        open_judges([same_tokenizer]), pieces[1:], [Origin(0, 1, row)] * (len(pieces) - 1),
        base=(open_artifact(tiny_model), model, tokenizer), max_tokens=32,
        passes=Passes.of(model, FLOAT32, tokens_per_pass=128),
    )
    assert found.unit == PER_TOKEN


def test_rows_that_no_judge_can_read_count_as_median_and_are_counted(tiny_model, other_tokenizer, tmp_path, capsys):
    folder = tmp_path / "strict"
    shutil.copytree(other_tokenizer, folder)
    (folder / "manifest.json").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = folder / "chat_template.jinja"
    text = template.read_text() if template.is_file() else config["chat_template"]
    rule = "{% for m in messages %}{% if 'Two' in m.content %}{{ raise_exception('no twos') }}{% endif %}{% endfor %}"
    template.write_text(rule + text)
    found, _ = judged(tiny_model, ROWS, [folder])
    assert found.unread == 1
    assert found.losses[1] == pytest.approx(np.median([found.losses[0], found.losses[2]]), rel=1e-4)
    assert "cannot read 1 of 3 examples; first: " in capsys.readouterr().err
    with pytest.raises(InputError, match=r"as a judge it can read none of the rows; first: .*no twos"):
        judged(tiny_model, ROWS[1:2], [folder])


def test_scores_are_computed_once_for_all_runs_on_the_same_data(
    tiny_model, other_tokenizer, turns, tmp_path, monkeypatch
):
    calls = []
    original = difficulty._grade_all
    monkeypatch.setattr(difficulty, "_grade_all", lambda *a: calls.append(1) or original(*a))
    judges = [tiny_model, other_tokenizer]
    recipe = {**SMALL, "valid_fraction": 0.0, "max_steps": 1}
    for place, change in enumerate([{}, {"seed": 7}, {"order": "hard_to_easy"}, {"difficulty": "success"}]):
        sft.run(
            SftRecipe(**{**recipe, **change}), model=tiny_model, data=[turns], judges=judges, out=tmp_path / str(place)
        )
        assert len(calls) == 2
    sft.run(SftRecipe(**recipe, max_tokens=20), model=tiny_model, data=[turns], judges=judges, out=tmp_path / "cut")
    assert len(calls) == 4


def test_the_published_model_says_how_difficult_its_data_was_and_holds_no_text(
    tiny_model, turns, tmp_path, real_picture
):
    recipe = SftRecipe(**SMALL, epochs=2, valid_fraction=0.15, mixing=0.0)
    made = sft.run(recipe, model=tiny_model, data=[turns], out=tmp_path / "out")
    assert (made.path / "difficulty.png").read_bytes()[:4] == b"\x89PNG"
    text = (made.path / "difficulty.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["index"] for row in rows] == list(range(21))
    assert len({row["line"] for row in rows}) == 21
    assert {key for row in rows for key in row} == {"index", "source", "line", "score", "loss", "success"}
    facts = made.meta["difficulty"]
    assert facts["order"] == "easy_to_hard"
    assert facts["unit"] == PER_TOKEN
    assert facts["quantiles"]["0"] == pytest.approx(min(row["score"] for row in rows))
    assert facts["quantiles"]["1"] == pytest.approx(max(row["score"] for row in rows))
    assert "Say" not in text + (made.path / "manifest.json").read_text()


def test_lines_in_the_scores_lead_back_to_the_rows(tiny_model, turns):
    tokenizer = load_tokenizer(tiny_model)
    examples = load_documents([turns], tokenizer, SftRecipe(valid_fraction=0.2), origins=True)
    rows = [json.loads(line) for line in Path(turns).read_text(encoding="utf-8").splitlines()]
    assert 0 < len(examples.held_out) < len(rows)
    for tree, origin in zip(examples.train, examples.origins, strict=True):
        assert rows[origin.line - 1]["prompt"] == origin.row.messages[0].content
        assert rows[origin.line - 1]["prompt"] in tokenizer.decode(tree.segments[0].ids)


def test_judges_are_inputs_of_what_is_published(tiny_model, other_tokenizer, turns, tmp_path):
    recipe = SftRecipe(**SMALL, max_steps=1, valid_fraction=0.0)
    made = sft.run(recipe, model=tiny_model, data=[turns], judges=[other_tokenizer], out=tmp_path / "out")
    inputs = {entry.role: entry.digest for entry in made.manifest.inputs}
    assert inputs["judge"] == open_artifact(other_tokenizer).digest
    assert made.meta["difficulty"]["judges"] == 1


class _Killed(BaseException):
    pass


def test_an_interrupted_curriculum_ends_with_the_same_bits(tiny_model, turns, tmp_path, monkeypatch):
    recipe = SftRecipe(**SMALL, epochs=2, valid_fraction=0.15, save_every_steps=2)
    wanted = sft.run(recipe, model=tiny_model, data=[turns], out=tmp_path / "whole")
    original = AlignTrainer.training_step

    def killed(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise _Killed
        return original(self, *args, **kwargs)

    monkeypatch.setattr(AlignTrainer, "training_step", killed)
    with pytest.raises(_Killed):
        sft.run(recipe, model=tiny_model, data=[turns], out=tmp_path / "cut")
    monkeypatch.setattr(AlignTrainer, "training_step", original)
    monkeypatch.setattr(difficulty, "_grade_all", lambda *a: pytest.fail("a resumed run has its scores"))
    shutil.rmtree(tmp_path / "cache")
    resumed = sft.run(recipe, model=tiny_model, data=[turns], out=tmp_path / "cut")
    assert resumed.meta["resumed_at_step"] == 4
    for name in ("model.safetensors", "difficulty.jsonl"):
        assert sha256_file(resumed.path / name) == sha256_file(wanted.path / name)
    other = sft.run(
        SftRecipe(**{**SMALL, "order": "shuffled"}, epochs=2, valid_fraction=0.15), model=tiny_model, data=[turns],
        out=tmp_path / "shuffled",
    )
    assert sha256_file(other.path / "model.safetensors") != sha256_file(wanted.path / "model.safetensors")
    assert not (other.path / "difficulty.jsonl").exists()


@pytest.mark.parametrize(
    ("what", "match"),
    [
        ("empty", r"empty: has no config.json: not a model directory"),
        ("file", r"is a file, a model is a directory"),
        ("absent", r"no such model directory"),
        ("truncated", r"truncated or damaged"),
        ("no tokenizer", r"has no tokenizer"),
        ("twice", r"is the same model as a --judge before it"),
    ],
)
def test_a_judge_that_is_no_model_is_one_line_before_any_work(what, match, tiny_model, turns, tmp_path):
    judges = [tmp_path / what]
    if what == "empty":
        judges[0].mkdir()
    elif what == "file":
        judges[0].write_text("x")
    elif what == "twice":
        judges = [tiny_model, tiny_model]
    elif what != "absent":
        shutil.copytree(tiny_model, judges[0])
        (judges[0] / "manifest.json").unlink()
        if what == "truncated":
            weights = judges[0] / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-100])
        else:
            (judges[0] / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=match) as caught:
        sft.run(SftRecipe(**SMALL), model=tiny_model, data=[turns], judges=judges, out=tmp_path / "out")
    assert "\n" not in caught.value.line()
    assert not list(tmp_path.glob("*out*"))


def test_judges_without_an_order_are_refused(tiny_model, turns, tmp_path):
    with pytest.raises(RecipeError, match="judges nothing while the order is shuffled; add --order easy_to_hard"):
        sft.run(SftRecipe(), model=tiny_model, data=[turns], judges=[tiny_model], out=tmp_path / "out")


@pytest.fixture
def edgealign(monkeypatch, capsys):
    """`edgealign("sft", ...)` -> exit status, standard output, standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["edgealign", *arguments])
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return call


def test_the_command_line_takes_judges_and_its_plan_counts_their_pass(
    tiny_model, other_tokenizer, turns, tmp_path, edgealign
):
    command = ["sft", "--model", str(tiny_model), "--data", turns, "--threads", "1", "--out", str(tmp_path / "out")]
    ordered = [*command, "--order", "easy_to_hard", "--json"]
    both = ["--judge", str(tiny_model), "--judge", str(other_tokenizer)]

    def planned(*arguments):
        status, out, _ = edgealign(*arguments, "--dry-run")
        assert status == 0
        return json.loads(out)["stages"][0]["estimate"].get("difficulty", "")

    assert planned(*command, "--json") == ""
    assert planned(*ordered).startswith("one forward pass over the data by the model itself, about ")
    assert "by each of 2 judges" in planned(*ordered, *both)
    assert "by each of 1 judges, once they are there" in planned(*ordered, "--judge", str(tmp_path / "later"))
    assert not (tmp_path / "out").exists()
    status, out, _ = edgealign(*ordered, *both, "--max-steps", "1")
    assert status == 0
    assert json.loads(out)["kind"] == "model"
    assert open_artifact(tmp_path / "out").meta["difficulty"]["judges"] == 2


def test_the_command_line_refuses_an_unknown_order_and_a_judge_that_is_no_model(
    tiny_model, turns, tmp_path, edgealign
):
    command = ["sft", "--model", str(tiny_model), "--data", turns, "--out", str(tmp_path / "out")]
    for more, part in (
        (["--order", "easiest"], "easy_to_hard"),
        (["--order", "easy_to_hard", "--judge", str(tmp_path)], "has no config.json: not a model directory"),
        (["--judge", str(tiny_model)], "--judge: judges nothing while the order is shuffled"),
    ):
        status, out, err = edgealign(*command, *more)
        assert (status, out) == (2, "")
        assert part in err
        assert len(err.strip().splitlines()) == 1
