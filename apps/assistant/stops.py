"""Stop strings in a text that comes in pieces: nothing of them is shown, nothing before them is held for long."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """`push` a piece, get what is certainly before any stop string; `close` gets the rest."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.text = ""
        self.found = False
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> str:
        """What may be shown now. After a stop string was `found`, nothing."""
        if self.found:
            return ""
        self._held += piece
        # The first to be complete counts, so that it does not matter how the text was cut.
        found = [(place + len(stop), place) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.found = True
            return self._give(min(found)[1])
        return self._give(len(self._held) - self._beginning())

    def close(self) -> str:
        """The text ends here: what looked like the beginning of a stop string was none."""
        return "" if self.found else self._give(len(self._held))

    def _beginning(self) -> int:
        """Length of the longest end of the held text with which a stop string may begin."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                return size
        return 0

    def _give(self, count: int) -> str:
        given, self._held = self._held[:count], self._held[count:]
        self.text += given
        return given
