"""A judge behind an OpenAI-compatible endpoint: it is asked for a grade from 1 to 10, one answer at a time.

The key comes from the environment (EDGEALIGN_JUDGE_KEY, or OPENAI_API_KEY), never from the command line. Sending texts
to a machine that is not this one is the user's decision: `https://` and foreign hosts are used only because their URL
was given.
"""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass

from edgealign.errors import EdgealignError, UsageError
from edgealign.judges.judge import Question
from edgealign.progress import track

KEYS = ("EDGEALIGN_JUDGE_KEY", "OPENAI_API_KEY")
TRIES, WAIT_S, TIMEOUT_S = 4, 1.0, 120.0
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
ASK = (
    "You grade answers of an assistant. Read the conversation and the answer, then say how good the answer is for the "
    "person who asked, as a number from 1 (useless) to 10 (could not be better). Length alone is no merit. "
    "Reply with the number only."
)
NUMBER = re.compile(r"\b(10|[1-9])(?:\.\d+)?\b")


@dataclass(frozen=True)
class Endpoint:
    """`url` ends before /chat/completions; `model` is what the endpoint calls it, "" takes its only one."""

    url: str
    model: str

    @property
    def name(self) -> str:
        return f"endpoint:{self.model or 'default'}"

    @staticmethod
    def parse(text: str) -> Endpoint:
        """`URL` or `MODEL@URL`.

        Raises:
            UsageError: no http or https URL.
        """
        model, at, url = text.rpartition("@") if "@http" in text else ("", "", text)
        if not url.startswith(("http://", "https://")):
            raise UsageError(text, "is no http or https URL", "for example http://127.0.0.1:8080/v1")
        return Endpoint(url.rstrip("/"), model if at else "")

    def scores(self, questions: Sequence[Question]) -> list[float]:
        asked = track(questions, total=len(questions), label="judging")
        return [self._grade(question) for question in asked]

    def close(self) -> None:
        return None

    def say(self, system: str, user: str, *, max_tokens: int) -> str:
        """One answer of the endpoint's model, at temperature 0."""
        body = {
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
            "temperature": 0, "max_tokens": max_tokens, **({"model": self.model} if self.model else {}),
        }  # fmt: skip
        return self._post(body)

    def _grade(self, question: Question) -> float:
        messages, answer = question
        said = "\n".join(f"{message.role}: {message.content}" for message in messages)
        text = self.say(ASK, f"Conversation:\n{said}\n\nAnswer:\n{answer}", max_tokens=8)
        found = NUMBER.search(text)
        if found is None:
            raise EdgealignError(self.url, f"answered {text[:60]!r} and no grade", "choose another judge")
        return float(found.group())

    def _post(self, body: dict[str, object]) -> str:
        """The text of the endpoint's answer; what is worth another try is tried again."""
        key = next((os.environ[name] for name in KEYS if os.environ.get(name)), None)
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        for attempt in range(TRIES):
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                    return str(json.load(answer)["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as error:
                if error.code not in AGAIN or attempt + 1 == TRIES:
                    raise EdgealignError(self.url, f"refuses with status {error.code}", "check URL and key") from error
            except (urllib.error.URLError, TimeoutError) as error:
                if attempt + 1 == TRIES:
                    raise EdgealignError(self.url, "does not answer", "is the endpoint running?") from error
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise EdgealignError(self.url, "answers in another form", "is it OpenAI-compatible?") from error
            time.sleep(WAIT_S * 2**attempt)
        raise AssertionError("unreachable")
