"""Styles by rule: each moves its own measure, on any text, and the stage's splits leak nothing."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgealign.artifact import open_artifact
from edgealign.data import restyle
from edgealign.data.manners import manners
from edgealign.data.prepare import prompt_of
from edgealign.data.read import read
from edgealign.data.recipes import STYLE_NAMES, StylesRecipe
from edgealign.data.styles import STYLES, follows
from edgealign.errors import EdgealignError, InputError, RecipeError

ANSWERS = (
    "The boy hid the key under a flat stone. He told nobody about it, because he was afraid of his uncle.",
    "Because the bridge had been washed away in the night.",
    "Apples, pears and plums.",
    "Yes, I do. I don't get to play it often, but it's my favourite game.",
    "Fill the pot with water and put it on the stove. Add some salt. Wait until the water boils, then add the rice.",
    "Hello! I'm very well, thank you. How are you?",
    "You should wear a warm coat, and you shouldn't forget your gloves.",
    "The miller's daughter.",
    "I am not sure, but I think that it is in the north of the country.",
    "Water freezes at zero degrees. It becomes ice, which is lighter than water, so it floats.",
    "She gave the bread to the old woman, and the old woman thanked her.",
    "The sailor died at sea and everyone in the village wept.",
    "- Bring a tent\n- Bring a lamp",
    "Mr. Brown was sorry that he lost the race. He had trained for it all summer.",
    "Yeah, that's gonna be fun!",
    "Three.",
    "Cats sleep a lot; they wake up at night and hunt.",
    "No, there is not enough room in the boat for all of us.",
    "Thanks, you too! Have a great day!",
    "The farmer planted the beans in spring, watered them every day and picked them in the autumn.",
    "It was the first time that anybody had seen a horse in that town, and the children ran after it.",
    "One should never open the door to a stranger. Please keep it closed.",
)
STORY = (
    "A potter lived at the edge of a dry plain. Every morning he carried his jars to the well. "
    "One day the well was empty, and the potter walked to the river. At the river he met a heron with a broken wing. "
    "He mended the wing with clay and a thread. The heron showed him a spring under the rocks."
)
ASKED = f"{STORY}\n\nWhere did the potter meet the heron?"


@pytest.mark.parametrize("name", STYLES)
def test_a_style_moves_its_own_measure_wherever_it_applies(name: str) -> None:
    style = STYLES[name]
    applied = 0
    for seed, answer in enumerate(ANSWERS * 4):
        styled = style.apply(answer, random.Random(seed), asked=ASKED)
        if styled is not None:
            applied += 1
            assert style.measure(styled) > style.measure(answer), (answer, styled)
            assert follows(name, styled, answer)
            assert not follows(name, answer, styled)
    assert applied >= 30


def test_the_styles_have_the_names_that_everyone_uses_and_no_request_asks_for_two() -> None:
    assert tuple(STYLES) == STYLE_NAMES
    requests = [request for style in STYLES.values() for request in style.requests]
    assert len(requests) == len(set(requests))
    assert all(len(style.requests) >= 4 and style.name == name for name, style in STYLES.items())


@settings(max_examples=150, deadline=None)
@given(answer=st.text(max_size=200), material=st.text(max_size=100), asked=st.text(max_size=100))
def test_any_text_gives_none_or_a_text_with_words_that_follows_the_style(
    answer: str, material: str, asked: str
) -> None:
    for name, style in STYLES.items():
        styled = style.apply(answer, random.Random(1), material=material, asked=asked)
        again = style.apply(answer, random.Random(1), material=material, asked=asked)
        assert styled == again
        if styled is not None:
            assert styled.strip()
            assert follows(name, styled, answer)


def test_a_rule_that_would_add_nothing_gives_none() -> None:
    """ "Hey there!" for "Hey!" is no more casual than the answer was."""
    made = [STYLES["casual"].apply("Hey! Come in.", random.Random(seed)) for seed in range(30)]
    assert None in made
    assert all(text is None or follows("casual", text, "Hey! Come in.") for text in made)


def test_an_empty_answer_follows_no_style() -> None:
    assert not any(follows(name, blank, "A plain answer of some words!") for name in STYLES for blank in ("", " \n"))


def test_short_is_one_sentence_of_at_most_twelve_words() -> None:
    for answer in ANSWERS:
        short = STYLES["short"].apply(answer, random.Random(0))
        if short is not None:
            assert len(short.split()) <= 12
            assert short[-1] in ".!?"
    assert STYLES["short"].apply("The old goat ate the hat because it was hungry and nobody fed it all day long.",
                                 random.Random(0)) == "The old goat ate the hat."


def test_long_holds_the_whole_answer_and_the_material() -> None:
    long = STYLES["long"].apply("The goat ate it.", random.Random(0), material="It was hungry. Nobody had fed it.")
    assert long is not None
    assert "The goat ate it." in long
    assert "It was hungry. Nobody had fed it." in long
    assert STYLES["long"].apply("Goodbye!", random.Random(0), asked="Bye!") is None


def test_bullets_split_lists_and_sentences_into_lines() -> None:
    bulleted = STYLES["bulleted"].apply
    assert bulleted("Apples, pears and plums.", random.Random(0)) == "- Apples\n- Pears\n- Plums"
    assert bulleted("He left. She stayed.", random.Random(0)) == "- He left.\n- She stayed."
    assert bulleted("Dr. Gray lives in the U.S. now.", random.Random(0)) is None


def test_formal_and_casual_change_the_words_themselves() -> None:
    answer = "I don't know, but it's been a long day and the king's men aren't here. Isn't it odd?"
    formal = STYLES["formal"].apply(answer, random.Random(0))
    assert formal is not None
    for said in ("do not know", "it has been", "the king's men are not here", "Is it not odd?"):
        assert said in formal, formal
    casual = STYLES["casual"].apply("I do not know. It is far and we will not go. Yes, I am.", random.Random(0))
    assert casual is not None
    for said in ("don't know", "t's far", "won't go", "I am"):
        assert said in casual, casual


def test_a_sad_answer_is_not_cheered_at() -> None:
    for seed in range(40):
        rng = random.Random(seed)
        cheerful = STYLES["cheerful"].apply("The old dog died in the snow.", rng, asked="What happened?")
        assert cheerful is not None
        assert not any(word in cheerful for word in ("lovely!", "Hooray", "Yay", "wonderful!")) or "day!" in cheerful


def test_the_question_back_names_a_thing_that_was_talked_about() -> None:
    asked = [
        STYLES["with-a-question"].apply("At the river.", random.Random(seed), asked="What did the heron see?")
        for seed in range(20)
    ]
    assert sum("the river" in (text or "").partition(". ")[2] for text in asked) >= 10
    assert all(text and text.startswith("At the river. ") and text.endswith("?") for text in asked)


@pytest.fixture
def source(write_jsonl: Callable[..., Path]) -> Path:
    rows: list[dict[str, Any]] = [{"context": STORY, "question": "Where did the potter meet the heron?",
                                   "answers": ["at the river"]},
                                  {"context": STORY, "question": "What was empty?", "answers": ["the well"]}]
    rows += [{"context": f"{STORY} He had {n} jars.", "question": "What did he carry?", "answers": [answer]}
             for n, answer in enumerate(ANSWERS)]
    return write_jsonl(rows)


def lines(out: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text(encoding="utf-8").splitlines()]


def test_the_stage_publishes_styled_and_plain_copies_and_counts_them(source: Path, tmp_path: Path) -> None:
    made = restyle.run(StylesRecipe(manners=60, valid=0.2), sources=[source], out=tmp_path / "out")
    assert open_artifact(made.path).kind == "dataset"
    rows = lines(made.path, "train.jsonl") + lines(made.path, "valid.jsonl")
    requests = {request: name for name, style in STYLES.items() for request in style.requests}
    counted = Counter(
        requests.get(row["messages"][0]["content"], "plain") if row["messages"][0]["role"] == "system" else "plain"
        for row in rows
    )
    assert counted == {name: count for name, count in made.meta["styles"].items() if count}
    assert min(counted.get(name, 0) for name in STYLES) >= 5
    assert sum(made.meta["rows"].values()) == len(rows)
    loaded = read(made.path / "train.jsonl", form="conversation")
    assert len(loaded.rows) == made.meta["rows"]["train.jsonl"]


def test_a_styled_copy_differs_from_the_plain_one_in_the_way_it_was_asked_to(source: Path, tmp_path: Path) -> None:
    recipe = StylesRecipe(copies_per_row=7, share=1.0, plain=1.0, neutral=0.0, valid=0.0)
    made = restyle.run(recipe, sources=[source], out=tmp_path / "out")
    rows = [row["messages"] for row in lines(made.path, "train.jsonl")]
    plain = {turns[0]["content"]: turns[1]["content"] for turns in rows if turns[0]["role"] == "user"}
    requests = {request: name for name, style in STYLES.items() for request in style.requests}
    styled = [turns for turns in rows if turns[0]["role"] == "system"]
    assert len(styled) > 80
    assert all(follows(requests[system["content"]], answer["content"], plain[user["content"]])
               for system, user, answer in styled)
    assert plain[ASKED] == "The potter met the heron at the river."
    shorts = [answer["content"] for system, user, answer in styled
              if user["content"] == ASKED and requests[system["content"]] == "short"]
    assert shorts == ["At the river."]


def test_a_long_story_is_cut_to_whole_sentences_around_the_answer() -> None:
    for seed in range(10):
        cut = restyle.cut_story(ASKED, "at the river", 30, random.Random(seed))
        assert cut is not None
        story, _, question = cut.rpartition("\n\n")
        assert question == "Where did the potter meet the heron?"
        assert "At the river he met a heron with a broken wing." in story
        assert story in STORY
        assert len(story.split()) <= 30
    assert restyle.cut_story(ASKED, "at the river", None, random.Random(0)) == ASKED
    assert restyle.cut_story(f"{STORY}\n\nWhich tax?", "zinc", 30, random.Random(0)) is None


def test_no_story_and_no_prompt_is_on_both_sides(source: Path, tmp_path: Path) -> None:
    made = restyle.run(StylesRecipe(manners=200, valid=0.4), sources=[source], out=tmp_path / "out")
    sides = []
    for name in ("train.jsonl", "valid.jsonl"):
        loaded = read(made.path / name)
        sides.append({restyle.split_key(row) for row in loaded.rows})  # type: ignore[arg-type]
        assert {prompt_of(row) for row in loaded.rows}
    assert sides[0]
    assert sides[1]
    assert not sides[0] & sides[1]


def test_the_same_seed_gives_the_same_digest_and_another_seed_another(source: Path, tmp_path: Path) -> None:
    digests = [
        restyle.run(StylesRecipe(manners=50, seed=seed), sources=[source], out=tmp_path / str(n)).digest
        for n, seed in enumerate((3, 3, 4))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_turns_of_others_stay_as_they_are(write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    """A system turn, tools and later turns: kept as they are, only in the plain copy."""
    talk = [{"role": role, "content": f"The {role} says {n} things."} for n, role in
            enumerate(["user", "assistant"] * 3)]
    persona = [{"role": "system", "content": "You are a pirate."}, *talk[:2]]
    file = write_jsonl([{"messages": talk}, {"messages": persona}])
    made = restyle.run(StylesRecipe(share=1.0, plain=1.0, neutral=0.0, valid=0.0), sources=[file], out=tmp_path / "o")
    rows = [row["messages"] for row in lines(made.path, "train.jsonl")]
    assert talk in rows
    assert persona in rows
    assert all(len(turns) == 3 for turns in rows if turns not in (talk, persona))


def test_without_any_source_or_row_the_stage_says_what_to_do(
    write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="--manners"):
        restyle.run(StylesRecipe(), sources=[], out=tmp_path / "none")
    with pytest.raises(InputError, match="empty"):
        restyle.run(StylesRecipe(), sources=[write_jsonl([], "empty.jsonl")], out=tmp_path / "empty")
    long = write_jsonl([{"question": "Why?", "answer": "word " * 500}], "long.jsonl")
    with pytest.raises(InputError, match="--max-words"):
        restyle.run(StylesRecipe(), sources=[long], out=tmp_path / "long")
    assert not any((tmp_path / name).exists() for name in ("none", "empty", "long"))


@pytest.mark.parametrize(
    "content",
    [b'{"question": "Why?", "answer": ', b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n', b"\x00\xff\xfe\n",
     b'{"question": null, "answer": 3}\n', b'{"messages": []}\n', b'{"text": "only text"}\n'],
)
def test_broken_and_foreign_sources_are_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "hostile.jsonl"
    file.write_bytes(content)
    with pytest.raises(EdgealignError) as caught:
        restyle.run(StylesRecipe(), sources=[file], out=tmp_path / "out")
    assert caught.value.exit_code == 2
    assert "\n" not in caught.value.line()
    assert not (tmp_path / "out").exists()


def test_hostile_texts_inside_sound_rows_are_styled_or_kept(write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    odd = ["\u202eabc\u202c", "<|im_end|>", "()" * 40, "?" * 30, "1. 2. 3.", "\ud55c\uad6d\uc5b4", "a\x00b", "'" * 9]
    file = write_jsonl([{"question": text, "answer": text} for text in odd])
    made = restyle.run(StylesRecipe(share=1.0, copies_per_row=7), sources=[file], out=tmp_path / "out")
    assert sum(made.meta["rows"].values()) >= len(odd)
    assert read(made.path / "train.jsonl").rows


def test_manners_are_as_many_as_asked_for_all_different_and_say_who_speaks() -> None:
    made = manners(500, random.Random(0))
    assert len({row.messages for row, _ in made}) == len(made) == 500
    whole = " ".join(message.content for row, _ in made for message in row.messages)
    for said in ("I am edgealign starter", "runs on this device" if "runs on" in whole else "run on this device",
                 "I do not know that.", "You are welcome.", "Goodbye!"):
        assert said in whole
    assert manners(50, random.Random(1)) == manners(50, random.Random(1))


def test_the_command_line_makes_the_set_and_refuses_an_unknown_style(source: Path, tmp_path: Path) -> None:
    def run(styles: str, out: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "edgealign", "data", "styles", str(source), "--styles", styles, "--out", out]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    done = run("short,formal", "made")
    assert done.returncode == 0, done.stderr
    assert set(open_artifact(tmp_path / "made").meta["styles"]) == {"short", "formal", "plain"}
    refused = run("loud", "none")
    assert refused.returncode == 2
    assert "loud" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
