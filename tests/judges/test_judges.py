"""Judges by rule, by reward head and behind a real HTTP endpoint; and pairs sampled with them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from edgealign import targets
from edgealign.artifact import open_artifact
from edgealign.data.forms import Message, Pair
from edgealign.errors import ArtifactError, EdgealignError, InputError, UsageError
from edgealign.export_recipes import ExportRecipe
from edgealign.judges import endpoint, revise, reward, sample
from edgealign.judges.judge import open_judge, verdict
from edgealign.judges.recipes import ReviseRecipe, RewardRecipe, SampleRecipe
from edgealign.judges.sample import Candidate, best_and_worst

HELLO = (Message("user", "Say hello."),)


class Server(BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint that gives a longer answer a better grade, and fails first where asked to."""

    failures: ClassVar[list[int]] = []
    seen: ClassVar[list[dict[str, object]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).seen.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
        if self.failures:
            self.send_response(self.failures.pop())
            self.end_headers()
            return
        answer = body["messages"][1]["content"].partition("Answer:\n")[2]
        if "improve" in body["messages"][0]["content"]:
            grade = answer.replace("teh", "the")
        else:
            grade = f"Grade: {min(10, len(answer))}"
        grade = "no idea" if answer == "odd" else grade
        data = json.dumps({"choices": [{"message": {"content": grade}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        return


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(endpoint, "WAIT_S", 0.001)
    Server.failures, Server.seen = [], []
    server = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_rule_judges_by_one_attribute_or_its_opposite():
    asked = [(HELLO, "Hi."), (HELLO, "Hello to you, and a good day.")]
    short, long = open_judge("rule:length").scores(asked)
    assert long > short
    assert open_judge("rule:-length").scores(asked) == [-short, -long]
    assert (verdict(2, 1), verdict(1, 2), verdict(1, 1)) == (1.0, 0.0, 0.5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rule:lenght", r"is no attribute \(did you mean length\?\)"), ("length", "names no judge"),
        ("rewards:x", r"names no judge \(did you mean reward\?\)"), ("ftp://x/v1", "is no http or https URL"),
    ],
)  # fmt: skip
def test_what_names_no_judge_is_refused(text, words):
    with pytest.raises(UsageError, match=words):
        open_judge(text)


def test_an_endpoint_is_asked_and_asked_again(url, monkeypatch):
    monkeypatch.setenv("EDGEALIGN_JUDGE_KEY", "secret")
    Server.failures = [503, 429]
    judge = open_judge(f"some-model@{url}/")
    assert judge.scores([(HELLO, "Hi."), (HELLO, "Hello to you.")]) == [3.0, 10.0]
    assert [entry["path"] for entry in Server.seen] == ["/v1/chat/completions"] * 4
    assert Server.seen[-1]["model"] == "some-model"
    assert Server.seen[-1]["key"] == "Bearer secret"
    assert "secret" not in judge.name


def test_an_endpoint_that_refuses_or_says_no_grade_is_one_line(url):
    Server.failures = [401]
    with pytest.raises(EdgealignError, match="refuses with status 401; check URL and key"):
        open_judge(url).scores([(HELLO, "Hi.")])
    with pytest.raises(EdgealignError, match="answered 'no idea' and no grade"):
        open_judge(url).scores([(HELLO, "odd")])
    with pytest.raises(EdgealignError, match="does not answer"):
        open_judge("http://127.0.0.1:9/v1").scores([(HELLO, "Hi.")])


def test_the_fit_finds_the_direction_that_made_the_choices():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=12)
    gaps = rng.normal(size=(4000, 12))
    gaps *= np.where(rng.random(4000) < 1 / (1 + np.exp(-gaps @ truth)), 1, -1)[:, None]
    found = reward.fit(gaps, 1e-6)
    assert found == pytest.approx(truth, abs=0.25)
    p = 1 / (1 + np.exp(gaps @ found))
    assert np.abs(-gaps.T @ p / 4000 + 1e-6 * found).max() < 1e-8
    assert not reward.fit(np.zeros((4, 3)), 0.1).any()


@pytest.fixture
def liked_words(tmp_path: Path) -> Path:
    """Pairs whose chosen answer says yes, and the rejected one no."""
    rows = [
        {"prompt": f"Is it {i}?", "chosen": f"Yes yes, it is {i}.", "rejected": f"No no, it is {i}."} for i in range(60)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_pairs_of_one_prompt_are_on_one_side():
    pairs = [Pair((Message("user", f"About {i % 5}?"),), f"yes {i}", f"no {i}") for i in range(50)]
    held, rest = reward.hold_out(pairs, 0.3, seed=1)
    assert sorted([*held, *rest]) == list(range(50))
    assert len(held) == 20
    assert not {pairs[i].prompt for i in held} & {pairs[i].prompt for i in rest}


def test_a_reward_head_is_fitted_published_and_judges(tiny_model, liked_words, tmp_path):
    made = reward.run(RewardRecipe(threads=1), model=tiny_model, data=[str(liked_words)], out=tmp_path / "head")
    assert made.meta["held_out_accuracy"] > 0.9
    assert made.meta["pairs"] + made.meta["held_out_pairs"] == 60
    judge = open_judge(f"reward:{tmp_path / 'head'}", threads=1)
    yes, no = judge.scores([((Message("user", "Is it 99?"),), text) for text in ("Yes yes, it is 99.", "No no, no.")])
    assert yes > no
    judge.close()


def test_a_reward_head_of_another_model_is_refused(tiny_model, liked_words, tmp_path):
    from edgealign.models import create
    from edgealign.models.recipes import InitRecipe

    reward.run(RewardRecipe(threads=1), model=tiny_model, data=[str(liked_words)], out=tmp_path / "head")
    create.run(InitRecipe(shape="tiny", seed=5), text=[], out=tmp_path / "other")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "head").rename(tmp_path / "elsewhere" / "head")
    with pytest.raises(InputError, match=r"its model is not where it was; say where it is: reward:.*@MODEL"):
        open_judge(f"reward:{tmp_path / 'elsewhere' / 'head'}")
    open_judge(f"reward:{tmp_path / 'elsewhere' / 'head'}@{tiny_model}", threads=1).close()
    (tmp_path / "elsewhere" / "head").rename(tmp_path / "head")
    with pytest.raises(ArtifactError, match="is not the model that the reward head was fitted on"):
        reward.open_reward(tmp_path / "head", model=tmp_path / "other")
    with pytest.raises(InputError, match="3 pairs: of 3 prompts are too few"):
        reward.run(RewardRecipe(limit=3), model=tiny_model, data=[str(liked_words)], out=tmp_path / "few")
    assert not (tmp_path / "few").exists()


def test_the_best_stands_against_the_worst_and_ties_go_to_the_models_own():
    given, own, worse = Candidate("a", 2.0, False), Candidate("b", 2.0, True), Candidate("c", 1.0, False)
    own_worse = Candidate("d", 1.0, True)
    assert best_and_worst([given, own, worse, own_worse]) == (own, own_worse)
    assert best_and_worst([given, own]) is None
    assert best_and_worst([given]) is None
    assert best_and_worst([given, worse], margin=1.5) is None
    assert best_and_worst([worse, given]) == (given, worse)


@pytest.mark.slow
def test_pairs_are_sampled_judged_and_published(tmp_path):
    rows = [{"prompt": f"Hello, I am {name}.", "completion": "Hello."} for name in ("Ann", "Ben", "Cleo", "Dan")]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = SampleRecipe(samples=3, max_new_tokens=48, threads=1)
    made = sample.run(recipe, model="starter", data=[str(file)], judge="rule:length", out=tmp_path / "pairs")
    found = [json.loads(line) for line in (made.path / "train.jsonl").read_text().splitlines()]
    assert found
    for row in found:
        assert len(row["chosen"].split()) > len(row["rejected"].split())
        assert row["margin"] > 0
    assert made.meta["judge"] == "rule:length"
    assert 0 < made.meta["own_chosen"] <= 1
    again = sample.run(recipe, model="starter", data=[str(file)], judge="rule:length", out=tmp_path / "again")
    assert (again.path / "train.jsonl").read_bytes() == (made.path / "train.jsonl").read_bytes()
    assert open_artifact(tmp_path / "pairs").manifest.stage == "pairs"


@pytest.mark.runtime
def test_pairs_are_drawn_with_an_exported_model_and_only_with_its_own(tmp_path, tiny_bundle, monkeypatch):
    opened, really = [], sample.open_session
    monkeypatch.setattr(sample, "open_session", lambda path, **given: opened.append(path) or really(path, **given))
    made = targets.run(ExportRecipe(quant="q8_0"), target="gguf", model="starter", out=tmp_path / "q8")
    rows = [{"prompt": f"Hello, I am {name}.", "completion": "Hello."} for name in ("Ann", "Ben", "Cleo")]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = SampleRecipe(samples=3, max_new_tokens=48, threads=1)
    common = {"model": "starter", "data": [str(file)], "judge": "rule:length"}
    pairs = sample.run(recipe, **common, bundle=made.path, out=tmp_path / "pairs")
    found = [json.loads(line) for line in (pairs.path / "train.jsonl").read_text().splitlines()]
    assert found
    assert all(len(row["chosen"].split()) > len(row["rejected"].split()) for row in found)
    assert 0 < pairs.meta["own_chosen"] <= 1
    assert [entry.role for entry in pairs.manifest.inputs] == ["model", "bundle", "data"]
    assert opened == [made.path]
    with pytest.raises(InputError, match=r"was exported from the model .*, this one is .*; export it: edgealign"):
        sample.run(recipe, **common, bundle=tiny_bundle("f32"), out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_revised_answer_is_chosen_over_what_it_was(url, tmp_path):
    rows = [{"prompt": "Well?", "chosen": text, "rejected": "no"} for text in ("teh cat", "fine as it is")]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    made = revise.run(ReviseRecipe(), data=[str(file)], endpoint=url, out=tmp_path / "out")
    (pair,) = [json.loads(line) for line in (made.path / "train.jsonl").read_text().splitlines()]
    assert (pair["chosen"], pair["rejected"]) == ("the cat", "teh cat")
    assert made.meta["left_out"] == {"unchanged": 1}
    assert "http" not in json.dumps(made.meta)
