"""Simulated people with a hidden taste, and what they do on the page in a real browser (for assistant_run.py)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np

from edgealign.errors import ToolMissing
from edgealign.personalize.candidates import read_candidates
from edgealign.personalize.recipes import TastesRecipe
from edgealign.personalize.text_users import Pool, TextUsers
from edgealign.personalize.traits import Whitening, in_words

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

FEWEST = 6  # are drawn together: ana is the same person, however many are measured
NAMES = ("ana", "ben", "cleo", "dora", "emil", "finn", "gus", "hana")
NEW_PEOPLE = 1  # the basis learned from those of part 0
MAX_TOKENS, PATIENCE_S, TELLING = 96, 3600.0, 0.3
PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@dataclass(frozen=True)
class Person:
    """`taste` (J,) over the whitened attributes of `scale`."""

    name: str
    taste: Floats
    scale: Whitening

    def worth(self, texts: Sequence[str]) -> Floats:
        """(A,) what these answers are worth to them, in deviations."""
        found: Floats = self.scale.read(texts) @ self.taste
        return found

    def prefer(self, left: str, right: str) -> str:
        """What they press."""
        gap = float(np.subtract(*self.worth([left, right])))
        return "tie" if abs(gap) < 1e-9 else "left" if gap > 0 else "right"

    def words(self) -> str:
        order = np.argsort(-np.abs(self.taste))
        telling = [place for place in order if abs(self.taste[place]) >= TELLING]
        return ", ".join(in_words(self.scale.names[place], self.taste[place] > 0) for place in telling)


def draw_people(run: Path, count: int, seed: int) -> list[Person]:
    """New people of the population of `edgealign data tastes`, by the same attributes and scale, the first of six."""
    _, rows = read_candidates(run / "candidates")
    recipe = TastesRecipe()
    scale = Whitening.of([text for row in rows for text in row.answers], recipe.traits)
    axes = np.eye(len(scale.names))
    users = TextUsers.draw(
        Pool(axes, axes, np.arange(len(axes))), recipe.population, max(count, FEWEST), seed=seed, part=NEW_PEOPLE
    )
    return [Person(name, taste, scale) for name, taste in zip(NAMES, users.rewards(axes), strict=False)][:count]


def read_questions(run: Path) -> tuple[list[str], list[str]]:
    """Questions to choose on, that the basis has not seen, and those of the test."""
    _, rows = read_candidates(run / "candidates")
    seen = {row.prompt[-1].content for row in rows}
    lines = [json.loads(line) for line in (run / "people" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = dict.fromkeys(row["messages"][0]["content"] for row in lines)
    tested = [json.loads(line)["prompt"] for line in (run / "people" / "prompts.jsonl").read_text("utf-8").splitlines()]
    return [text for text in asked if text not in seen and text not in tested], tested


@dataclass
class Served:
    """The app's program, and a client that has its token."""

    page: str
    http: httpx.Client
    model: str

    def answers(self, model: str, prompts: Sequence[str]) -> list[str]:
        """Of a model that is not there (nothing was published yet) the base's."""
        known = [each["id"] for each in self.http.get("/v1/models").raise_for_status().json()["data"]]
        found = []
        for number, prompt in enumerate(prompts):
            form = {
                "model": model if model in known else self.model, "seed": number + 1,
                "messages": [{"role": "user", "content": prompt}], "max_tokens": MAX_TOKENS,
            }  # fmt: skip
            made = self.http.post("/v1/chat/completions", json=form).raise_for_status().json()
            found.append(str(made["choices"][0]["message"]["content"]))
        return found

    def first_event_ns(self, model: str, prompt: str, max_tokens: int) -> int:
        """From the request to the first event of its stream, which leaves with the first token's text."""
        form = {
            "model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens,
            "temperature": 0, "stream": True,
        }  # fmt: skip
        begun = time.perf_counter_ns()
        with self.http.stream("POST", "/v1/chat/completions", json=form) as response:
            lines = response.iter_lines()
            next(line for line in lines if line.startswith("data:"))
            taken = time.perf_counter_ns() - begun
            list(lines)
        return taken

    def shown(self) -> list[str]:
        """The two answers on show, as they were said: a list on the page has lost its marks."""
        (latest,) = self.http.get("/api/conversations", params={"limit": 1}).raise_for_status().json()
        talk = self.http.get(f"/api/conversations/{latest['id']}").raise_for_status().json()
        said = {each["id"]: each["content"] for each in talk["messages"]}
        return [said[talk["comparisons"][-1][side]] for side in ("left", "right")]

    def taste(self, user: str) -> dict[str, Any]:
        return dict(self.http.get("/api/taste", params={"user": user}).raise_for_status().json())


@contextmanager
def serving(bundle: Path, home: Path, adapters: dict[str, Path], threads: int) -> Iterator[Served]:
    """`edgealign app` in a process of its own, until the block ends."""
    command = [sys.executable, "-m", "edgealign", "app", "--bundle", str(bundle), "--home", str(home), "--port", "0"]
    command += ["--no-browser", "--json", f"--threads={threads}"]
    command += [f"--adapter={name}={path}" for name, path in adapters.items()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None
            facts = json.loads(running.stdout.readline())
            url, headers = facts["api"].removesuffix("/v1"), {"authorization": f"Bearer {facts['token']}"}
            with httpx.Client(base_url=url, headers=headers, timeout=PATIENCE_S) as http:
                yield Served(facts["page"], http, http.get("/api/state").raise_for_status().json()["model"])
        finally:
            running.terminate()


@contextmanager
def browsing() -> Iterator[Any]:
    """The system's Chromium: Playwright's own is not needed."""
    if PROGRAM is None:
        raise ToolMissing("chromium", "is not installed", "apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver, closing(driver.chromium.launch(executable_path=PROGRAM, args=FLAGS)) as browser:
        yield browser


def open_page(browser: Any, served: Served, person: str) -> Any:
    """The page, spoken to by this person."""
    served.http.put("/api/settings", json={"user": person, "max_tokens": MAX_TOKENS}).raise_for_status()
    page = browser.new_page(viewport={"width": 1280, "height": 800}, reduced_motion="reduce")
    page.set_default_timeout(1000 * PATIENCE_S)
    page.goto(served.page)
    page.wait_for_selector("body.ready")
    return page


def choose(page: Any, served: Served, person: Person, question: str) -> dict[str, Any] | None:
    """Ask for two answers and press the better one at once; what it taught. None: there is no better one."""
    page.get_by_role("button", name="New conversation", exact=True).click()
    page.get_by_role("button", name="Two answers", exact=True).click()
    field = page.get_by_label("Your question", exact=True)
    field.fill(question)
    field.press("Enter")
    page.locator("#which, .answer:not(.writing) [data-act=again]").first.wait_for(state="attached")
    if not page.locator("#which").count():
        return None  # there are no two different answers to this, and the page says so
    side = person.prefer(*served.shown())
    with page.expect_response(lambda found: found.url.endswith("/choice")) as made:
        page.locator(f".pair [data-act={side}]").click()
    made.value.finished()
    answered_s = made.value.request.timing["responseEnd"] / 1000
    learned: dict[str, Any] | None = made.value.json()["learned"]
    begun = time.perf_counter()
    while learned is None and served.taste(person.name)["learning"]:
        time.sleep(0.02)
    page.locator("#which").wait_for(state="detached")
    if side == "tie":
        return None
    return {"seconds": answered_s + time.perf_counter() - begun, "learned": learned, "side": side}
