"""Stop strings over pieces: whatever the cuts, the same text comes out, and nothing of a stop string does."""

from __future__ import annotations

from assistant.stops import StopText
from hypothesis import given
from hypothesis import strategies as st


@given(st.lists(st.text("abc", max_size=4), max_size=12), st.lists(st.text("abc", min_size=1, max_size=3), max_size=3))
def test_any_cut_of_a_text_stops_at_the_same_place(pieces: list[str], stops: list[str]) -> None:
    stream = StopText(stops)
    shown = [stream.push(piece) for piece in pieces]
    shown.append(stream.close())
    whole = "".join(pieces)
    # The first stop string to be complete ends the text, as when characters come one by one.
    ends = sorted((place + len(stop), place) for stop in stops if (place := whole.find(stop)) >= 0)
    assert "".join(shown) == stream.text
    assert stream.found == bool(ends)
    assert stream.text == (whole[: ends[0][1]] if ends else whole)
    assert not any(stop in stream.text for stop in stops)


def test_what_may_be_the_beginning_of_a_stop_string_waits() -> None:
    stream = StopText(["END"])
    assert [stream.push(piece) for piece in ("a E", "N", "x E")] == ["a ", "", "ENx "]
    assert stream.close() == "E"


def test_after_the_stop_string_nothing_is_shown() -> None:
    stream = StopText(["##"])
    assert [stream.push(piece) for piece in ("one #", "# two", "three")] == ["one ", "", ""]
    assert (stream.close(), stream.found, stream.text) == ("", True, "one ")
