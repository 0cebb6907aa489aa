"""Unusable data: every bad row has its line and its reason, and a bad file is one line and exit 2."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgealign.data import jsonl
from edgealign.data.check import check, render
from edgealign.data.faults import KINDS, RowFault
from edgealign.data.read import read, scan
from edgealign.errors import InputError

GOOD = b'{"prompt": "Tea?", "completion": "Green."}\n'


def turns(*roles: str) -> bytes:
    return json.dumps({"messages": [{"role": role, "content": "x"} for role in roles]}).encode() + b"\n"


def pair(**columns: Any) -> bytes:
    return json.dumps({"prompt": "Tea?", "chosen": "Green.", "rejected": "None."} | columns).encode() + b"\n"


# (name, good row of the same form, bad line, kind, part of the reason)
BAD: list[tuple[str, bytes, bytes, str, str]] = [
    ("bad JSON", GOOD, b"{'prompt': 1}\n", "json", "not JSON: Expecting property name"),
    ("a blank line", GOOD, b"\n", "json", "blank"),
    ("a list", GOOD, b"[1, 2]\n", "json", "a JSON array, not an object"),
    ("null", GOOD, b"null\n", "json", "a JSON null"),
    ("two objects on a line", GOOD, GOOD[:-1] + GOOD, "json", "Extra data"),
    ("NaN", GOOD, b'{"prompt": "a", "completion": "b", "score": NaN}\n', "json", "NaN, which is not JSON"),
    ("-Infinity", GOOD, b'{"prompt": "a", "completion": "b", "x": -Infinity}\n', "json", "-Infinity"),
    ("a key twice", GOOD, b'{"prompt": "a", "completion": "b", "prompt": "c"}\n', "json", "same key twice"),
    ("deep nesting", GOOD, b"[" * 100_000 + b"\n", "json", "nested too deeply"),
    ("a number of 5,000 digits", GOOD, b'{"prompt": ' + b"9" * 5000 + b"}\n", "json", "thousands of digits"),
    ("a raw control character", GOOD, b'{"prompt": "a\x01", "completion": "b"}\n', "json", "control character"),
    ("CR LF", GOOD, GOOD[:-1] + b"\r\n", "encoding", "CR LF"),
    ("Latin-1", GOOD, b'{"prompt": "caf\xe9", "completion": "b"}\n', "encoding", "not UTF-8: byte 0xe9 at 16"),
    ("a lone surrogate", GOOD, b'{"prompt": "\\ud83d", "completion": "b"}\n', "encoding", "lone surrogate"),
    ("a missing column", GOOD, b'{"prompt": "a"}\n', "columns", "completion is missing or null"),
    ("a number as text", GOOD, b'{"prompt": "a", "completion": 5}\n', "columns", "completion is a number, not text"),
    ("an empty prompt", GOOD, b'{"prompt": "  ", "completion": "b"}\n', "empty", "prompt is empty"),
    ("an empty answer", GOOD, b'{"prompt": "a", "completion": ""}\n', "empty", "completion is empty"),
    ("an unknown role", turns("user", "assistant"), turns("user", "robot"), "roles", "turn 2 of messages has no role"),
    (
        "two users in a row", turns("user", "assistant"), turns("user", "user", "assistant"), "roles",
        "roles do not alternate: turn 2 of messages is user after user",
    ),
    ("a late system turn", turns("user", "assistant"), turns("user", "system", "assistant"), "roles", "turn 2"),
    ("nobody to learn from", turns("user", "assistant"), turns("system", "user"), "roles", "no assistant turn"),
    ("no turns", turns("user", "assistant"), turns(), "empty", "messages is an empty list"),
    (
        "an empty turn", turns("user", "assistant"),
        b'{"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "x"}]}\n',
        "empty", "turn 1 of messages (user) is empty",
    ),
    ("chosen == rejected", pair(), pair(rejected="Green. "), "same", "chosen and rejected are the same"),
    ("an empty rejected", pair(), pair(rejected=""), "empty", "rejected is empty"),
    ("a text margin", pair(), pair(margin="high"), "columns", "margin is not a finite number"),
    ("an infinite margin", pair(), pair()[:-2] + b', "margin": 1e999}\n', "columns", "margin is not a finite number"),
    ("a list as user", pair(), pair(user_id=["a"]), "columns", "user_id"),
    (
        "a prompt that ends with the assistant", pair(),
        pair(prompt=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
        "roles", "no answer is due",
    ),
    (
        "a label of 2", b'{"prompt": "a", "completion": "b", "label": 1}\n',
        b'{"prompt": "a", "completion": "b", "label": 2}\n', "columns", "label is not true, false, 1 or 0",
    ),
    ("an unknown speaker", b'{"turns": [["U", "a"], ["S", "b"]]}\n', b'{"turns": [["X", "a"]]}\n', "roles", "speaker"),
    ("a picture", turns("user", "assistant"),
     b'{"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "x"}]}\n',
     "columns", "a part that is not text"),
]


@pytest.mark.parametrize(("good", "bad", "kind", "reason"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_a_bad_row_is_reported_with_its_line_and_reason(
    good: bytes, bad: bytes, kind: str, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(good + good + bad + good)
    loaded = scan(path)
    assert (len(loaded.rows), len(loaded.bad)) == (3, 1)
    assert (loaded.bad[0].line, loaded.bad[0].kind) == (3, kind)
    assert reason in loaded.bad[0].reason
    with pytest.raises(InputError, match="line 3") as error:
        read(path)
    assert "\n" not in error.value.line()
    assert len(read(path, skip_bad=1).rows) == 3
    report = check(path)
    assert not report["ok"]
    assert "line 3: " + loaded.bad[0].reason in render(report)


def test_every_kind_of_fault_has_a_case() -> None:
    covered = {case[3] for case in BAD} | {"half", "huge", "join"}  # these three are below and in test_read
    assert covered == set(KINDS)


def test_a_truncated_file_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD * 2 + GOOD[:20])
    assert [(bad.line, bad.kind) for bad in scan(path).bad] == [(3, "half")]
    with pytest.raises(InputError, match=r"line 3 \(half a line: the file ends inside a JSON value\)"):
        read(path)


def test_a_file_cut_inside_a_character_is_a_half_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + '{"prompt": "é'.encode()[:-1])
    assert [(bad.line, bad.kind) for bad in scan(path).bad] == [(2, "half")]


def test_a_missing_last_newline_alone_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + GOOD[:-1])
    assert len(read(path).rows) == 2


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_a_truncated_gzip_is_refused_with_its_line(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "rows.jsonl.gz"
    rows = [{"prompt": f"{n} {n * 7919 % 65537}", "completion": "b"} for n in range(3000)]
    whole = gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    path.write_bytes(whole[: int(len(whole) * keep)])
    loaded = scan(path)
    assert 0 < len(loaded.rows) < 3000
    assert [(bad.line, bad.kind) for bad in loaded.bad] == [(len(loaded.rows) + 1, "half")]
    assert "all after it are lost" in loaded.bad[0].reason


def test_damaged_gzip_never_reads_as_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    whole = bytearray(gzip.compress(GOOD * 100))
    whole[-6] ^= 0xFF  # in the check sum
    path.write_bytes(whole)
    assert [bad.kind for bad in scan(path).bad] == ["half"]


def test_a_byte_order_mark_is_reported_on_line_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + GOOD)
    (bad,) = scan(path).bad
    assert (bad.line, bad.kind) == (1, "encoding")
    assert "byte-order mark" in bad.reason


def test_a_json_array_is_told_how_to_become_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([json.loads(GOOD)] * 2, indent=1) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"line 1 \(a JSON array over many lines: make it JSON Lines with jq"):
        read(path)


def test_a_huge_line_is_reported_and_the_next_one_still_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 2000)
    path = tmp_path / "rows.jsonl"
    huge = json.dumps({"prompt": "a" * 5_000_000, "completion": "b"}).encode() + b"\n"
    path.write_bytes(GOOD + huge + GOOD + huge[:-1])
    loaded = scan(path)
    assert loaded.lines == (1, 3)
    assert [(bad.line, bad.kind) for bad in loaded.bad] == [(2, "huge"), (4, "huge")]


def test_all_rows_bad_is_still_a_report(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD.replace(b"\n", b"\r\n") * 50)
    report = check(path)
    assert (report["rows"], len(report["bad_rows"]), report["lengths"]) == (0, 50, None)
    assert "lines 1-50: ends in CR LF" in render(report)
    with pytest.raises(InputError, match="no usable row is left"):
        read(path, skip_bad=50)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([None, *[case[2] for case in BAD if case[1] == GOOD]]), min_size=1, max_size=30))
def test_as_many_bad_rows_are_reported_as_were_injected(tmp_path: Path, injected: list[bytes | None]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"".join(GOOD if line is None else line for line in injected))
    loaded = scan(path)
    assert [bad.line for bad in loaded.bad] == [n for n, line in enumerate(injected, start=2) if line is not None]
    assert loaded.total == len(injected) + 1


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_crash_the_line_parser(line: bytes) -> None:
    with contextlib.suppress(RowFault):
        assert isinstance(jsonl.parse_line(line + b"\n", first=True), dict)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from(["messages", "prompt", "chosen", "rejected", "completion", "label", "conversations", "turns",
                         "text", "user_id", "margin", "context", "generation", "reward", "dev_votes", "answers"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=3),
            lambda inner: st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["role", "content", "from", "value", "text", "tool_calls"]), inner, max_size=3
            ),
            max_leaves=6,
        ),
        min_size=1,
    )
)
def test_no_columns_crash_the_reader(tmp_path: Path, row: dict[str, Any]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with contextlib.suppress(InputError):  # no known form, or votes without their pairs
        assert scan(path).total == 1


# --- files that are no source at all


def unreadable(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (unreadable("rows.jsonl", b""), "is empty: it has no rows"),
        (unreadable("rows.jsonl.gz", gzip.compress(b"")), "is empty: it has no rows"),
        (unreadable("rows.jsonl.gz", GOOD), "is not gzip data"),
        (unreadable("rows.parquet", b"PAR1 but not much more"), "is not a whole Parquet file"),
        (unreadable("rows.csv", b"prompt,completion\n"), "is neither JSONL"),
        (unreadable("rows.jsonl", b'{"foo": 1, "bar": 2}\n'), "the columns bar, foo are no known form"),
        (lambda folder: folder / "gone.jsonl", "no such file or directory"),
        (lambda folder: folder, "has no data files"),
    ],
    ids=["empty", "empty gzip", "not gzip", "broken parquet", "csv", "wrong columns", "missing", "empty directory"],
)
def test_an_unusable_source_is_one_line(make: Callable[[Path], Path], said: str, tmp_path: Path) -> None:
    source = make(tmp_path)
    for look in (read, check):
        with pytest.raises(InputError) as error:
            look(source)
        assert said in error.value.line()
        assert str(source) in error.value.line()
        assert error.value.exit_code == 2


def test_a_hub_id_out_of_reach_is_one_line() -> None:
    with pytest.raises(InputError, match="nobody/nothing-here: is neither here nor to be had from the hub"):
        read("nobody/nothing-here")


def test_a_file_without_permission_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD)
    path.chmod(0)
    try:
        path.open("rb").close()
    except PermissionError:
        with pytest.raises(InputError, match=r"cannot be read \(Permission denied\)"):
            read(path)
    else:
        pytest.skip("this user may read everything")
