"""The conversation report: every check can pass and can fail, and the whole runs on a tiny model and its bundles."""

from __future__ import annotations

import json

import pytest

from edgealign.artifact import Check, open_artifact
from edgealign.data.encode import encode_prompt, end_of_turn_id
from edgealign.data.forms import Message
from edgealign.data.styles import STYLES
from edgealign.errors import InputError
from edgealign.evaluate import chat, chat_checks
from edgealign.evaluate.chat_prompts import STORY, all_prompts
from edgealign.evaluate.chat_report import draw_styles, render, render_answers
from edgealign.evaluate.chat_talk import Answer, Compare, Talk
from edgealign.evaluate.recipes import ChatRecipe
from edgealign.models.load import load_tokenizer
from edgealign.runtimes.scripted import ScriptedSession

RECIPE = ChatRecipe(threads=1, bootstrap=200)
PROMPTS = all_prompts()


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


class Speaker(ScriptedSession):
    """Says what `say(prompt, style)` decides, token by token; the style is None without a system turn."""

    def __init__(self, tokenizer, say, *, ends=True):
        super().__init__(vocab=len(tokenizer))
        self.ends, self.tokenizer, self.replies = ends, tokenizer, {}
        for number, prompt in enumerate(PROMPTS):
            self.replies[encode_prompt(tokenizer, prompt.messages)] = say(prompt, None)
            for name, style in STYLES.items():
                system = Message("system", style.requests[number % len(style.requests)])
                self.replies[encode_prompt(tokenizer, (system, *prompt.messages))] = say(prompt, name)

    def prefill(self, tokens):
        if not self.tokens:
            said = self.tokenizer(self.replies[tuple(tokens)], add_special_tokens=False)["input_ids"]
            self.script = (*said, *([end_of_turn_id(self.tokenizer)] if self.ends else said * 100))
        return super().prefill(tokens)


def good(prompt, style):
    """An answer that a check likes: about the story, in the style."""
    answer = f"It was the {prompt.keywords[0]}." if prompt.kind == STORY else "I like the sun and the sea."
    if style is None:
        return answer
    return {
        "short": "It was.", "long": f"{answer} {answer} Then they went home.", "bulleted": f"- {answer}\n- The end.",
        "formal": f"Certainly. {answer} I trust this is sufficient.", "casual": f"Hey! Yeah, okay. {answer}",
        "cheerful": f"Hooray! {answer} How wonderful!", "with-a-question": f"{answer} What do you think?",
    }[style]  # fmt: skip


def report(session, tokenizer, recipe=RECIPE):
    """What `run` makes of a session's answers, without bundles."""
    talk = Talk(session, tokenizer, recipe, end_of_turn_id(tokenizer), lambda steps, note: None)
    plain = {how: talk.all([prompt.messages for prompt in PROMPTS], how) for how in chat_checks.PLAIN}
    styled = talk.styles(PROMPTS)
    return {
        "prompts": [chat._describe(prompt) for prompt in PROMPTS],
        "answers": {how: [chat._plain_answer(answer) for answer in plain[how]] for how in plain},
        "measures": {how: chat_checks.measure_answers(PROMPTS, plain[how]) for how in plain},
        "topic": chat_checks.measure_topic(PROMPTS, plain, recipe),
        "styles": chat_checks.measure_styles([answer.text for answer in plain["greedy"]], styled),
        "words": chat_checks.measure_words(PROMPTS, plain, ["It was the bridge. I like the sun and the sea."]),
        "styled_answers": styled, "styles_runtime": "scripted", "bundles": {},
    }  # fmt: skip


@pytest.fixture(scope="module")
def good_report(tokenizer):
    return report(Speaker(tokenizer, good), tokenizer)


def verdicts(result, recipe=RECIPE):
    return {check.name: check for check in chat_checks.checks(result, recipe)}


def test_forty_prompts_of_four_kinds_and_each_story_holds_its_answer():
    kinds = [prompt.kind for prompt in PROMPTS]
    assert len(PROMPTS) == 40
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "story": 16, "greeting": 8, "instruction": 10, "two turns": 6,
    }  # fmt: skip
    assert len({prompt.messages for prompt in PROMPTS}) == 40
    assert all(prompt.messages[-1].role == "user" for prompt in PROMPTS)
    for prompt in PROMPTS[:16]:
        assert 3 <= prompt.story.count(".") <= 6, prompt.story
        assert prompt.question.endswith("?")
        assert prompt.keywords
        assert prompt.messages[0].content == f"{prompt.story}\n\n{prompt.question}"


def test_a_model_that_does_everything_well_passes_every_check(good_report):
    recipe = ChatRecipe(known_words=0.5)
    found = verdicts(good_report, recipe)
    assert set(found) == {"ends_turn", "sentences", "known_words", "on_topic", *(f"style_{name}" for name in STYLES)}
    assert [check.name for check in found.values() if not check.passed] == []
    assert found["ends_turn"].value == 1.0
    assert all(row["share"] == 1.0 for row in good_report["styles"].values())
    assert good_report["topic"]["greedy"]["keyword"] == 16
    assert good_report["topic"]["greedy"]["keyword_control"] < 0.3


def test_a_model_that_never_stops_fails_to_end_its_turn(tokenizer):
    found = report(Speaker(tokenizer, good, ends=False), tokenizer)
    assert not verdicts(found)["ends_turn"].passed
    assert found["measures"]["greedy"]["ended"] == 0
    assert found["measures"]["greedy"]["repeated"] > 0.3
    assert " ..." in render_answers(found, RECIPE)


def test_a_model_that_answers_with_another_story_is_off_topic(tokenizer):
    def wrong(prompt, style):
        if prompt.kind != STORY:
            return "Yes."
        place = PROMPTS.index(prompt)
        return f"It was the {PROMPTS[(place + 5) % 16].keywords[0]} and the moon."

    found = report(Speaker(tokenizer, wrong), tokenizer)
    assert not verdicts(found)["on_topic"].passed
    assert found["topic"]["greedy"]["keyword"] <= 2


def test_a_model_that_ignores_the_system_turn_follows_no_style(tokenizer):
    found = verdicts(report(Speaker(tokenizer, lambda prompt, style: good(prompt, None)), tokenizer))
    assert [name for name in STYLES if found[f"style_{name}"].passed] == []
    assert found["on_topic"].passed


def test_a_model_with_one_manner_for_every_request_shows_in_the_control(tokenizer):
    def always_cheerful(prompt, style):
        return good(prompt, None if style is None else "cheerful")

    rows = report(Speaker(tokenizer, always_cheerful), tokenizer)["styles"]
    assert rows["cheerful"]["share"] == 1.0
    assert rows["cheerful"]["control"] == 1.0
    assert rows["long"]["share"] == 1.0  # longer, too, by accident: the control says so
    assert rows["long"]["control"] == 1.0
    assert rows["bulleted"]["share"] == 0.0


def test_fragments_in_unknown_words_fail_the_proxies(tokenizer):
    found = report(Speaker(tokenizer, lambda prompt, style: "zorp blim the"), tokenizer)
    checks = verdicts(found)
    assert not checks["sentences"].passed
    assert not checks["known_words"].passed
    assert checks["known_words"].value == pytest.approx(1 / 3)


@pytest.mark.parametrize(("hits", "passed"), [(28, True), (27, False)])
def test_seventy_percent_of_forty_is_twenty_eight(good_report, hits, passed):
    rows = {name: {**row, "hits": hits} for name, row in good_report["styles"].items()}
    found = verdicts({**good_report, "styles": rows})
    assert found["style_formal"].passed is passed
    assert found["style_formal"].note.startswith(f"{hits} of 40, 95 % from 0.5")


@pytest.mark.parametrize(("bits", "same", "passed"), [(8, 36, True), (8, 35, False), (4, 24, True), (4, 23, False)])
def test_wide_bundles_must_agree_on_nine_prompts_in_ten_and_narrow_ones_on_six(good_report, bits, same, passed):
    row = {"same": same, "total": 40, "bits": bits, "differences": []}
    assert verdicts({**good_report, "bundles": {"gguf x": row}})["tokens gguf x"].passed is passed


def test_two_answers_part_where_their_tokens_do_and_the_gap_is_torch_s(tokenizer):
    oracle = ScriptedSession(vocab=len(tokenizer))
    compare = Compare(oracle, tokenizer, end=7, count=4)
    prompt = PROMPTS[20]
    ours, theirs = Answer("", (50, 51, 52, 53, 54), False), Answer("", (50, 51, 99), True)
    entry = compare.one(3, prompt, ours, theirs)
    assert (entry["prompt"], entry["position"]) == (3, 2)
    assert entry["torch"] == tokenizer.decode([52])
    import numpy as np

    oracle.reset()
    logits = oracle.prefill((*encode_prompt(tokenizer, prompt.messages), 50, 51)).astype(np.float64)
    chances = np.exp(logits) / np.exp(logits).sum()
    assert entry["torch_probability"] == pytest.approx(chances[52])
    assert entry["bundle_probability"] == pytest.approx(chances[99])
    assert entry["gap_nats"] == pytest.approx(np.log(chances[52] / chances[99]))
    assert entry["tie"] is bool(entry["gap_nats"] < 0.1)


def test_only_the_first_tokens_count_and_the_end_of_the_turn_is_one_of_them(tokenizer):
    compare = Compare(ScriptedSession(vocab=len(tokenizer)), tokenizer, end=7, count=3)
    same = [
        (Answer("", (50, 51, 52, 53), False), Answer("", (50, 51, 52, 99), False)),
        (Answer("", (50, 51), True), Answer("", (50, 51), True)),
    ]
    for ours, theirs in same:
        assert compare.one(0, PROMPTS[0], ours, theirs) is None
    entry = compare.one(0, PROMPTS[0], Answer("", (50, 51), True), Answer("", (50, 51, 52), False))
    assert entry["position"] == 2
    assert entry["torch"] == tokenizer.decode([7])
    found = compare.all([(PROMPTS[0], *pair) for pair in same])
    assert (found["same"], found["total"]) == (2, 2)


def test_sampled_answers_repeat_with_their_seed_and_change_with_another(tokenizer):
    def answers(seed):
        recipe = ChatRecipe(max_new_tokens=8, seed=seed, temperature=2.0, min_p=0.0)
        talk = Talk(ScriptedSession(vocab=len(tokenizer)), tokenizer, recipe, 7, lambda steps, note: None)
        return talk.all([PROMPTS[0].messages] * 3, "sampled")

    assert answers(1) == answers(1)
    assert answers(1) != answers(100)
    assert len({answer.tokens for answer in answers(1)}) == 3


def test_the_report_shows_all_prompts_and_answers_and_draws_the_styles(good_report, tmp_path):
    text = render_answers(good_report, RECIPE)
    for prompt in PROMPTS:
        assert prompt.messages[-1].content.split("\n\n")[-1] in text
    assert text.count("> *greedy:*") == text.count("> *sampled:*") == 40
    assert text.count("> *bulleted:*") == 3
    table = render(good_report, RECIPE, list(chat_checks.checks(good_report, RECIPE)))
    assert "| cheerful | 40/40 |" in table
    assert "| greedy | 40/40 | 40/40 |" in table
    draw_styles(tmp_path / "styles.png", good_report, RECIPE)
    assert (tmp_path / "styles.png").read_bytes().startswith(b"\x89PNG")


def test_a_bundle_s_differences_stand_in_the_table(good_report):
    entry = {"prompt": 4, "position": 9, "torch": " a|b", "bundle": " c", "torch_probability": 0.31,
             "bundle_probability": 0.3, "tie": True}  # fmt: skip
    row = {"same": 39, "total": 40, "bits": 8, "differences": [entry]}
    table = render({**good_report, "bundles": {"gguf q8_0": row}}, RECIPE, [Check("x", 1.0, 1.0, True, "")])
    assert "| gguf q8_0 | 39/40 | 1/1 | 5, 9, ` a\\|b` 0.310 / ` c` 0.300 |" in table


def test_the_whole_report_of_a_tiny_model_in_torch(tiny_model, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "The cat sat on the mat."}\n', encoding="utf-8")
    recipe = ChatRecipe(max_new_tokens=2, threads=1, bootstrap=100)
    artifact = chat.run(recipe, model=tiny_model, data=[data], out=tmp_path / "out")
    assert {entry.path for entry in artifact.manifest.files} == {"result.json", "table.md", "answers.md", "styles.png"}
    assert artifact.manifest.stage == "eval_chat"
    result = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert result["styles_runtime"] == "torch"
    assert len(result["answers"]["greedy"]) == 40
    assert not {check.name: check.passed for check in artifact.manifest.checks}["ends_turn"]  # random weights


@pytest.mark.runtime
def test_a_faithful_bundle_agrees_with_torch_and_answers_for_the_styles(tiny_model, tiny_bundle, tmp_path):
    recipe = ChatRecipe(max_new_tokens=6, agree_tokens=6, threads=1, bootstrap=100)
    bundles = [tiny_bundle("q4_0"), tiny_bundle("f32")]
    artifact = chat.run(recipe, model=tiny_model, bundles=bundles, out=tmp_path / "out")
    result = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert result["styles_runtime"] == "gguf f32"
    assert result["bundles"]["gguf f32"]["same"] >= 39
    assert result["bundles"]["gguf q4_0"]["bits"] == 4
    assert [entry.role for entry in artifact.manifest.inputs] == ["model", "gguf f32", "gguf q4_0"]
    open_artifact(tmp_path / "out", kind="report")


@pytest.mark.runtime
def test_a_bundle_of_another_model_and_a_second_of_one_kind_are_refused(tiny_bundle, tiny_model, tmp_path):
    from edgealign.models import create
    from edgealign.models.recipes import InitRecipe

    other = tmp_path / "other"
    create.run(InitRecipe(shape="tiny", vocab_size=400, context=256, seed=5), text=[], out=other)
    with pytest.raises(InputError, match="was exported from the model"):
        chat.run(RECIPE, model=other, bundles=[tiny_bundle("f32")], out=tmp_path / "out")
    with pytest.raises(InputError, match="second bundle of the kind gguf f32"):
        chat.run(RECIPE, model=tiny_model, bundles=[tiny_bundle("f32")] * 2, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
