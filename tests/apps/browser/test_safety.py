"""What others wrote stays text: no payload runs, no request leaves the machine, links lead to the web only."""

from __future__ import annotations

from typing import Any

import pytest

from ..conftest import Served
from .conftest import Talk, TalkMaker, bring
from .payloads import payloads

pytestmark = pytest.mark.browser
PAYLOADS = payloads()
HITS = "window.hits = 0; window.hit = window.alert = () => { window.hits++ };"
ALLOWED = {
    "A", "BLOCKQUOTE", "BR", "BUTTON", "CODE", "DEL", "DIV", "EM", "H3", "H4", "H5", "H6", "HR", "LI", "OL", "P",
    "path", "PRE", "SPAN", "STRONG", "svg", "TABLE", "TBODY", "TD", "TH", "THEAD", "TR", "UL",
}  # fmt: skip
ATTRIBUTES = {
    "aria-hidden", "aria-label", "class", "d", "data-copy", "href", "rel", "role", "start", "tabindex", "target",
    "title", "type", "viewBox",
}  # fmt: skip
FOUND = """() => [...document.querySelectorAll('.text *')].map(node => ({
    tag: node.tagName, attributes: node.getAttributeNames(), href: node.getAttribute('href'),
    rel: node.getAttribute('rel'),
}))"""


def armed(tab: TalkMaker, url: str, **options: Any) -> Talk:
    talk = tab(url, ready=False, **options)
    talk.page.add_init_script(HITS)
    talk.open("?token=a-token-for-tests-0123456789")
    return talk


def check(talk: Talk) -> None:
    """Nothing ran, and there is nothing that could: only our own elements, attributes and web addresses."""
    nodes = talk.page.evaluate(FOUND)
    assert {node["tag"] for node in nodes} <= ALLOWED
    assert {name for node in nodes for name in node["attributes"]} <= ATTRIBUTES
    for node in nodes:
        if node["tag"] == "A":
            assert node["href"].startswith(("http://", "https://"))
            assert node["rel"] == "noopener noreferrer"
    for link in talk.find(".text a").all()[:20]:
        link.dispatch_event("mouseover")
    talk.page.wait_for_timeout(200)
    assert talk.page.evaluate("window.hits") == 0


@pytest.mark.parametrize("policy", ["as served", "policy off"])
def test_no_payload_runs_in_questions_or_answers(starter: Served, tab: TalkMaker, policy: str) -> None:
    """With the security policy off the renderer stands alone."""
    assert len(set(PAYLOADS)) >= 200
    turns = [text for payload in PAYLOADS for text in (payload, payload)]
    (key,) = bring(starter, turns, title="All of them")
    talk = armed(tab, starter.url, bypass_csp=policy == "policy off")
    talk.open(f"#/c/{key}")
    talk.answers.nth(len(PAYLOADS) - 1).wait_for(state="attached")
    check(talk)
    shown = talk.questions.first.inner_text()
    assert shown == PAYLOADS[0]  # it is there, as text


def test_no_payload_runs_while_it_is_typed_by_a_model(starter: Served, tab: TalkMaker) -> None:
    """Every beginning of a payload is shown for a moment while an answer grows."""
    talk = armed(tab, starter.url, bypass_csp=True)
    talk.page.evaluate(
        """async (payloads) => {
            const { render } = await import('/markdown.js');
            const node = document.createElement('div');
            node.className = 'text';
            document.querySelector('#log').append(node);
            for (const text of payloads) for (let end = 1; end <= text.length; end++) render(node, text.slice(0, end));
        }""",
        PAYLOADS,
    )
    check(talk)


def test_no_payload_runs_as_title_user_system_model_facts_or_choice(starter: Served, tab: TalkMaker) -> None:
    few = [payload for payload in PAYLOADS if len(payload) < 64][:40]
    for payload in few:
        bring(starter, [payload, payload], title=payload, user=payload)
    user = few[5]
    keys = bring(starter, *([f"{number}", payload] for number, payload in enumerate(few)), user=user)
    for key in keys[:6]:
        answer = starter.http.get(f"/api/conversations/{key}").json()["messages"][1]
        starter.http.post(f"/api/messages/{answer['id']}/edit", json={"content": answer["content"] + "!"})
    starter.http.put("/api/settings", json={"user": user, "system": few[0]}).raise_for_status()
    talk = armed(tab, starter.url, bypass_csp=True)
    talk.page.wait_for_selector("#conversations a")
    talk.button("Your taste").click()
    talk.find("#recent li").first.wait_for()
    talk.page.keyboard.press("Escape")
    talk.button("Settings").click()
    talk.page.keyboard.press("Escape")
    talk.find("#conversations li").first.hover()
    talk.find("#conversations li [data-act=delete]").first.click()
    talk.find("dialog.small").wait_for()
    talk.page.keyboard.press("Escape")
    talk.find("#conversations a").first.click()
    talk.answers.first.wait_for()
    check(talk)


def test_the_policy_would_stop_a_script_and_this_check_can_fail(starter: Served, tab: TalkMaker) -> None:
    """The control: markup that is really put into the page runs without the policy, and does not with it."""
    inject = "document.querySelector('#log').innerHTML = '<img src=x onerror=hit()>'"
    off = armed(tab, starter.url, bypass_csp=True)
    off.page.evaluate(inject)
    off.page.wait_for_function("() => window.hits === 1")
    on = armed(tab, starter.url)
    with on.page.expect_console_message(lambda line: "Content Security" in line.text):
        on.page.evaluate(inject)
    assert on.page.evaluate("window.hits") == 0
    assert on.broken
    on.broken.clear()


def test_links_show_where_they_lead_and_images_are_not_loaded(talk: Talk, starter: Served) -> None:
    text = "[here](https://example.org/a) ![cat](https://example.org/cat.png) https://example.org/b. [no](ftp://example.org)"
    (key,) = bring(starter, ["Links?", text])
    talk.open(f"#/c/{key}")
    links = talk.find(".answer .text a")
    links.first.wait_for()
    assert [link.get_attribute("href") for link in links.all()] == [
        "https://example.org/a", "https://example.org/cat.png", "https://example.org/b",
    ]  # fmt: skip
    assert links.first.get_attribute("title") == "https://example.org/a"
    assert talk.find(".text img").count() == 0
    assert "[no](ftp://example.org)" in talk.answers.inner_text()


def test_a_whole_session_asks_for_nothing_but_its_own_server(talk: Talk, starter: Served) -> None:
    """Every test of this folder checks this when it ends; this one makes sure that it looks at something."""
    talk.ask("Hello.")
    talk.act(talk.find(".answer"), "up")
    talk.side()
    talk.button("Your taste").click()
    talk.find("#taste[open]").wait_for()
    talk.page.keyboard.press("Escape")
    paths = {at.removeprefix(starter.url).split("?")[0] for at in talk.asked}
    assert {"/", "/main.js", "/style.css", "/api/state", "/api/conversations", "/api/choices"} <= paths
    assert all(at.startswith(starter.url) for at in talk.asked)


def test_nothing_of_a_conversation_is_left_in_the_browser(talk: Talk) -> None:
    talk.ask("A secret question.")
    kept = talk.page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
    assert "secret" not in kept
