"""Every form, from every kind of source; nothing lost on the way."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgealign.data.forms import Conversation, Message, Pair, Row, Text, Thumb, ToolCall, to_json
from edgealign.data.read import read, read_all, scan
from edgealign.errors import InputError

WriteJsonl = Callable[..., Path]

ASKED = Message("user", "Tea?")
GREEN = Message("assistant", "Green.")
PAIR = {"prompt": "Tea?", "chosen": "Green.", "rejected": "None."}


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


FORMS: list[tuple[str, dict[str, Any], Row]] = [
    ("messages", {"messages": [turn("user", "Tea?"), turn("assistant", "Green.")]}, Conversation((ASKED, GREEN))),
    (
        "messages with a system turn",
        {"messages": [turn("system", "Be kind."), turn("user", "Tea?"), turn("assistant", "Green.")]},
        Conversation((Message("system", "Be kind."), ASKED, GREEN)),
    ),
    (
        "messages in parts",
        {"messages": [turn("user", "Tea?"), {"role": "assistant", "content": [{"type": "text", "text": "Green."}]}]},
        Conversation((ASKED, GREEN)),
    ),
    ("completion", {"prompt": "Tea?", "completion": "Green."}, Conversation((ASKED, GREEN))),
    (
        "completion of messages",
        {"prompt": [turn("user", "Tea?")], "completion": [turn("assistant", "Green.")], "user_id": 7},
        Conversation((ASKED, GREEN), "7"),
    ),
    ("instruction, output", {"instruction": "Tea?", "input": "", "output": "Green."}, Conversation((ASKED, GREEN))),
    (
        "instruction, input, output",
        {"instruction": "Translate.", "input": "Tee", "output": "tea"},
        Conversation((Message("user", "Translate.\n\nTee"), Message("assistant", "tea"))),
    ),
    ("instruction, response", {"instruction": "Tea?", "response": "Green."}, Conversation((ASKED, GREEN))),
    (
        "sharegpt",
        {"conversations": [
            {"from": "system", "value": "Be kind."}, {"from": "human", "value": "Tea?"},
            {"from": "gpt", "value": "Green."},
        ]},
        Conversation((Message("system", "Be kind."), ASKED, GREEN)),
    ),
    ("text", {"text": "Tea is a leaf.", "title": "Tea"}, Text("Tea is a leaf.")),
    ("pair", PAIR | {"user_id": "ana", "margin": 2}, Pair((ASKED,), "Green.", "None.", "ana", 2.0)),
    (
        "pair of message lists",
        {"prompt": [turn("user", "Tea?")], "chosen": [turn("assistant", "Green.")],
         "rejected": [turn("assistant", "None.")]},
        Pair((ASKED,), "Green.", "None."),
    ),
    (
        "pair with messages",
        {"messages": [turn("user", "Hi"), turn("assistant", "Hello"), turn("user", "Tea?")],
         "chosen": "Green.", "rejected": "None."},
        Pair((Message("user", "Hi"), Message("assistant", "Hello"), ASKED), "Green.", "None."),
    ),
    (
        "pair with an implicit prompt",
        {"chosen": [turn("user", "Tea?"), turn("assistant", "Green.")],
         "rejected": [turn("user", "Tea?"), turn("assistant", "None.")]},
        Pair((ASKED,), "Green.", "None."),
    ),
    (
        "pair whose sides repeat the prompt",
        {"prompt": "Tea?", "chosen": [turn("user", "Tea?"), turn("assistant", "Green.")],
         "rejected": [turn("user", "Tea?"), turn("assistant", "None.")]},
        Pair((ASKED,), "Green.", "None."),
    ),
    (
        "pair as Anthropic writes it",
        {"chosen": "\n\nHuman: Tea?\n\nAssistant: Green.", "rejected": "\n\nHuman: Tea?\n\nAssistant: None."},
        Pair((ASKED,), "Green.", "None."),
    ),
    ("thumb", {"prompt": "Tea?", "completion": "Green.", "label": True}, Thumb((ASKED,), "Green.", True)),
    (
        "thumb of a user", {"prompt": "Tea?", "completion": "Green.", "label": 0, "user_id": "bo"},
        Thumb((ASKED,), "Green.", False, "bo"),
    ),
    (
        "dialogue",
        {"turns": [["U", "Tea?"], ["S", "Green."]], "id": "1"}, Conversation((ASKED, GREEN)),
    ),
    (
        "persona dialogue", {"turns": [[1, "Tea?"], [2, "Green."]], "persona1": [], "persona2": ["I grow.", "I sip."]},
        Conversation((Message("system", "You are this person: I grow. I sip."), ASKED, GREEN)),
    ),
    (
        "reading", {"context": "Tea grows.", "question": "What grows?", "answers": ["Tea", "tea"]},
        Conversation((Message("user", "Tea grows.\n\nWhat grows?"), Message("assistant", "Tea"))),
    ),
    ("question", {"question": "Tea?", "answer": "Green."}, Conversation((ASKED, GREEN))),
    (
        "an API call as thumb",
        {"context": [{"role": "user", "text": "Tea?"}], "generation": {"role": "agent", "api": {"brew": {"n": 1}}},
         "reward": 1},
        Thumb((ASKED,), '{"brew": {"n": 1}}', True),
    ),
    (
        "persona statement", {"persona": "kind", "statement": "I share.", "agree": 1},
        Thumb((Message("user", "Tell me something about yourself."),), "I share.", True, "kind"),
    ),
]


@pytest.mark.parametrize(("columns", "row"), [form[1:] for form in FORMS], ids=[form[0] for form in FORMS])
def test_every_form_is_read(columns: dict[str, Any], row: Row, write_jsonl: WriteJsonl) -> None:
    loaded = read(write_jsonl([columns]))
    assert loaded.rows == (row,)
    assert (loaded.bad, loaded.lines, loaded.total) == ((), (1,), 1)


@pytest.mark.parametrize("row", [form[2] for form in FORMS], ids=[form[0] for form in FORMS])
def test_what_to_json_writes_reads_back_equal(row: Row, write_jsonl: WriteJsonl) -> None:
    assert read(write_jsonl([to_json(row)])).rows == (row,)


def test_a_tool_call_survives_the_round_trip(write_jsonl: WriteJsonl) -> None:
    call = {"type": "function", "function": {"name": "brew", "arguments": '{"leaf": "green"}'}}
    columns = {"messages": [
        turn("user", "Tea?"), {"role": "assistant", "content": None, "tool_calls": [call]}, turn("tool", "done"),
        turn("assistant", "Here."),
    ]}
    (row,) = read(write_jsonl([columns])).rows
    assert isinstance(row, Conversation)
    assert row.messages[1] == Message("assistant", "", (ToolCall("brew", '{"leaf": "green"}'),))
    assert read(write_jsonl([to_json(row)])).rows == (row,)


def test_gzip_parquet_and_jsonl_hold_the_same_rows(write_jsonl: WriteJsonl, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [PAIR | {"prompt": f"Tea {n}?"} for n in range(5)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    plain = read(write_jsonl(rows))
    zipped = read(write_jsonl(rows, "rows.jsonl.gz"))
    columnar = read(tmp_path / "rows.parquet")
    assert plain.rows == zipped.rows == columnar.rows
    assert columnar.lines == (1, 2, 3, 4, 5)
    assert len({plain.digest, zipped.digest, columnar.digest}) == 3  # of the bytes, not of the rows


def test_an_incomplete_first_row_does_not_decide_the_form(write_jsonl: WriteJsonl) -> None:
    thumb = {"prompt": "Tea?", "completion": "Green.", "label": True}
    loaded = scan(write_jsonl([{"prompt": "Tea?", "completion": "Green."}, thumb, thumb]))
    assert loaded.form == "thumb"
    assert [(bad.line, bad.kind, bad.reason) for bad in loaded.bad] == [
        (1, "columns", "column label is missing or null")
    ]


def test_a_null_column_is_a_missing_one(write_jsonl: WriteJsonl) -> None:
    loaded = read(write_jsonl([{"prompt": "Tea?", "completion": "Green.", "label": None, "user_id": None}]))
    assert loaded.rows == (Conversation((ASKED, GREEN)),)


def test_columns_that_nobody_reads_are_named(write_jsonl: WriteJsonl) -> None:
    assert read(write_jsonl([PAIR | {"source": "x", "id": 1}])).unused == ("id", "source")


# --- names of columns


def test_map_renames_and_reaches_inside(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl([{"query": "Tea?", "answers": {"text": ["Green.", "Black."]}, "meta": {"who": "ana"}}])
    mapping = {"query": "prompt", "answers.text.0": "chosen", "answers.text.1": "rejected", "meta.who": "user_id"}
    assert read(path, mapping=mapping).rows == (Pair((ASKED,), "Green.", "Black.", "ana"),)


def test_map_hides_a_column_and_so_changes_the_form(write_jsonl: WriteJsonl) -> None:
    path = write_jsonl([PAIR])
    loaded = read(path, form="conversation", mapping={"chosen": "completion", "rejected": "-"})
    assert loaded.rows == (Conversation((ASKED, GREEN)),)


@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        ({"qurey": "prompt"}, "no row has qurey; the columns are chosen, prompt, rejected"),
        ({"chosen": "completoin"}, "did you mean completion?"),
        ({"chosen": "prompt", "rejected": "prompt"}, "prompt is filled twice"),
    ],
)
def test_a_wrong_map_is_refused(mapping: dict[str, str], said: str, write_jsonl: WriteJsonl) -> None:
    with pytest.raises(InputError) as error:
        read(write_jsonl([PAIR]), mapping=mapping)
    assert said in error.value.line()


def test_another_form_than_asked_for_is_refused(write_jsonl: WriteJsonl) -> None:
    with pytest.raises(InputError, match=r"holds preference pairs \(prompt, chosen, rejected\), not conversations"):
        read(write_jsonl([PAIR]), form="conversation")


# --- bad rows are accepted by number or not at all


@pytest.fixture
def half_bad(write_jsonl: WriteJsonl) -> Path:
    return write_jsonl([PAIR, PAIR | {"chosen": "None."}, PAIR, "{"])


def test_bad_rows_stop_the_reader_with_the_first_line_the_count_and_the_way_out(half_bad: Path) -> None:
    with pytest.raises(InputError) as error:
        read(half_bad)
    said = error.value.line()
    assert "2 of 4 rows are bad; the first is line 2 (chosen and rejected are the same)" in said
    assert f"edgealign data check {half_bad}" in said
    assert "--skip-bad 2" in said
    assert error.value.exit_code == 2


@pytest.mark.parametrize("number", [0, 1, 3])
def test_skip_bad_must_be_the_number_of_bad_rows(half_bad: Path, number: int) -> None:
    with pytest.raises(InputError, match=f"not the {number} that --skip-bad accepts"):
        read(half_bad, skip_bad=number)


def test_skip_bad_keeps_the_good_rows_and_the_list(half_bad: Path) -> None:
    loaded = read(half_bad, skip_bad=2)
    assert (len(loaded.rows), loaded.lines, loaded.total) == (2, (1, 3), 4)
    assert [bad.line for bad in loaded.bad] == [2, 4]


def test_skip_bad_on_a_clean_file_is_a_mistake(write_jsonl: WriteJsonl) -> None:
    assert read(write_jsonl([PAIR]), skip_bad=0).bad == ()
    with pytest.raises(InputError, match="no row is bad, but --skip-bad accepts 2"):
        read(write_jsonl([PAIR]), skip_bad=2)


def test_several_sources_share_one_number(half_bad: Path, write_jsonl: WriteJsonl) -> None:
    other = write_jsonl([PAIR, "[]"], "other.jsonl")
    assert [len(loaded.rows) for loaded in read_all([half_bad, other], skip_bad=3)] == [2, 1]
    with pytest.raises(InputError, match="3 of 6 rows are bad"):
        read_all([half_bad, other], skip_bad=2)


def test_limit_looks_at_the_first_rows_only(half_bad: Path) -> None:
    assert len(read(half_bad, limit=1).rows) == 1


# --- votes beside their pairs

ARGUMENTS = {"title": "Tea or coffee?", "stance": "tea", "a1": "It calms.", "a2": "It is hot."}
TEA_PROMPT = (Message("user", "Tea or coffee? Argue for this side: tea"),)


def argument(name: str, ones: int, twos: int, **more: Any) -> dict[str, Any]:
    return {"pair_id": name, **ARGUMENTS, "dev_votes": {"a1": ones, "a2": twos, "equal": 0}, **more}


def test_votes_join_their_pairs_and_ties_are_counted(write_jsonl: WriteJsonl) -> None:
    write_jsonl([argument("p1", 2, 1), argument("p2", 1, 1, a2="It calms.")], "pairs.jsonl.gz")
    votes = write_jsonl(
        [
            {"pair_id": "p1", "user_id": "u1", "choice": "a2"},
            {"pair_id": "p1", "user_id": "u2", "choice": "equal"},
            {"pair_id": "p9", "user_id": "u2", "choice": "a1"},
            {"pair_id": "p2", "user_id": "u2", "choice": "a1"},
            {"pair_id": "p1", "user_id": "u3", "choice": "both"},
        ],
        "votes.jsonl",
    )
    loaded = scan(votes)
    assert loaded.rows == (Pair(TEA_PROMPT, "It is hot.", "It calms.", "u1"),)
    assert loaded.ties == 1
    assert [(bad.line, bad.kind) for bad in loaded.bad] == [(3, "join"), (4, "same"), (5, "columns")]
    assert loaded.total == 5


def test_the_digest_of_votes_depends_on_the_pairs(write_jsonl: WriteJsonl) -> None:
    votes = write_jsonl([{"pair_id": "p1", "user_id": "u1", "choice": "a2"}], "votes.jsonl")
    write_jsonl([argument("p1", 2, 1)], "pairs.jsonl")
    before = read(votes).digest
    write_jsonl([argument("p1", 2, 1, a2="It is cheap.")], "pairs.jsonl")
    assert read(votes).digest != before


def test_votes_without_their_pairs_are_refused(write_jsonl: WriteJsonl) -> None:
    with pytest.raises(InputError, match="refers to rows of pairs, which is not beside it"):
        read(write_jsonl([{"pair_id": "p1", "user_id": "u1", "choice": "a2"}], "votes.jsonl"))


def test_pairs_alone_give_the_majority_and_its_margin(write_jsonl: WriteJsonl) -> None:
    loaded = read(write_jsonl([argument("p1", 4, 1), argument("p2", 2, 2), argument("p3", 0, 1)]))
    assert loaded.rows == (
        Pair(TEA_PROMPT, "It calms.", "It is hot.", None, 3.0), Pair(TEA_PROMPT, "It is hot.", "It calms.", None, 1.0)
    )
    assert (loaded.ties, loaded.lines) == (1, (1, 3))


# --- directories and the hub


def test_a_saved_dataset_is_read(tmp_path: Path) -> None:
    import datasets
    rows = [PAIR, PAIR | {"prompt": "Milk?"}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "one"))
    splits = {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[:1])}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "two"))
    assert len(read(tmp_path / "one").rows) == 2
    assert len(read(tmp_path / "two").rows) == 2
    assert len(read(f"{tmp_path / 'two'}:test").rows) == 1
    with pytest.raises(InputError, match="has no split dev; its splits are train, test"):
        read(f"{tmp_path / 'two'}:dev")


def test_nulls_that_arrow_adds_to_messages_do_no_harm(tmp_path: Path) -> None:
    import datasets
    messages = [turn("user", "Tea?") | {"tool_calls": None}, turn("assistant", "Green.") | {"tool_calls": None}]
    datasets.Dataset.from_list([{"messages": messages}]).save_to_disk(str(tmp_path / "saved"))
    assert read(tmp_path / "saved").rows == (Conversation((ASKED, GREEN)),)


def test_a_directory_in_the_hubs_layout_keeps_line_numbers(tmp_path: Path) -> None:
    data = tmp_path / "set" / "data"
    data.mkdir(parents=True)
    (data / "train-00000-of-00002.jsonl").write_text(json.dumps(PAIR) + "\n", encoding="utf-8")
    (data / "train-00001-of-00002.jsonl").write_text(json.dumps(PAIR) + "\n{\n", encoding="utf-8")
    (data / "test-00000-of-00001.jsonl").write_text(json.dumps(PAIR) + "\n", encoding="utf-8")
    loaded = scan(tmp_path / "set")
    assert len(loaded.rows) == 2
    assert [bad.where() for bad in loaded.bad] == ["data/train-00001-of-00002.jsonl:2"]
    assert len(read(f"{tmp_path / 'set'}:test").rows) == 1


def test_a_directory_of_parquet_is_read(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "set").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist([PAIR] * 3), tmp_path / "set" / "train.parquet")
    (tmp_path / "set" / "manifest.json").write_text("{}", encoding="utf-8")
    assert len(read(tmp_path / "set").rows) == 3


def test_a_hub_id_is_loaded_by_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    asked = {}

    def load(name: str, config: str | None, **options: Any) -> Any:
        asked.update(name=name, config=config, **options)
        return datasets.DatasetDict(
            {"train": datasets.Dataset.from_list([PAIR]), "test": datasets.Dataset.from_list([PAIR] * 2)}
        )

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    loaded = read("tea-house/tastes@v2:green/test")
    assert len(loaded.rows) == 2
    assert loaded.digest == read("tea-house/tastes:test").digest != read("tea-house/tastes").digest
    assert asked == {"name": "tea-house/tastes", "config": None, "revision": None}


def test_reading_jsonl_loads_nothing_heavy() -> None:
    import subprocess

    heavy = "{'datasets', 'torch', 'transformers', 'pyarrow', 'numpy'}"
    code = f"import sys, edgealign.data.read; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_objectives_read_beside_a_pair_is_kept_and_foreign_columns_of_that_name_are_not(
    write_jsonl: WriteJsonl,
) -> None:
    own = {"epsilon": 0.2, "score": 3, "gold": "Yellow.", "rejected_prompt": "And then?"}
    odd = {"epsilon": "high", "score": {"a": 1}, "gold": " ", "advantage": True}
    (file_rows,) = (read(write_jsonl([PAIR | own, PAIR | odd])).rows,)
    kept, bare = file_rows
    assert isinstance(kept, Pair)
    assert kept.facts == {"epsilon": 0.2, "score": 3.0, "gold": "Yellow.", "rejected_prompt": "And then?"}
    assert isinstance(bare, Pair)
    assert bare.facts == {}
    (ranked,) = read(write_jsonl([PAIR | {"grades": [2, 0, 1], "others": ["Some."], "score": 1}])).rows
    assert isinstance(ranked, Pair)
    assert ranked.facts == {"score": 1.0, "grades": (2.0, 0.0, 1.0), "others": ("Some.",)}
    assert read(write_jsonl([to_json(kept), to_json(ranked)])).rows == (kept, ranked)
