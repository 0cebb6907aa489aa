"""Markdown as nodes: what a text becomes, and that the end of a growing text does not disturb its beginning."""

from __future__ import annotations

from typing import Any

import pytest

from .conftest import Talk

pytestmark = pytest.mark.browser
RENDER = """async (texts) => {
    const { render } = await import('/markdown.js');
    return texts.map((text) => {
        const node = document.createElement('div');
        render(node, text);
        node.querySelectorAll('.bar').forEach((bar) => bar.remove());
        for (const extra of node.querySelectorAll('[tabindex], [target]')) {
            for (const name of extra.getAttributeNames()) if (!/href|class/.test(name)) extra.removeAttribute(name);
        }
        return node.innerHTML;
    });
}"""
CASES = {
    "Hello\nyou": "<p>Hello<br>you</p>",
    "a\n\nb": "<p>a</p><p>b</p>",
    "# Big\n### Deep\n## Mid": "<h3>Big</h3><h4>Deep</h4><h4>Mid</h4>",
    "#no heading": "<p>#no heading</p>",
    "- a\n- b\n  - c": "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul>",
    "1. a\n2. b": "<ol><li>a</li><li>b</li></ol>",
    "3) a\n4) b": '<ol start="3"><li>a</li><li>b</li></ol>',
    "- a\n\n- b": "<ul><li>a</li><li>b</li></ul>",
    "- a\n\n  more": "<ul><li>a<p>more</p></li></ul>",
    "* * *": "<hr>",
    "> a\n> - b": "<blockquote><p>a</p><ul><li>b</li></ul></blockquote>",
    "*a* **b** _c_ __d__ ~~e~~": "<p><em>a</em> <strong>b</strong> <em>c</em> <strong>d</strong> <del>e</del></p>",
    "**a *b* c**": "<p><strong>a <em>b</em> c</strong></p>",
    "snake_case_name 2*3*4": "<p>snake_case_name 2<em>3</em>4</p>",
    "2 * 3 * 4": "<p>2 * 3 * 4</p>",
    r"\*no\*": "<p>*no*</p>",
    "`a *b* <c>`": "<p><code>a *b* &lt;c&gt;</code></p>",
    "``a ` b``": "<p><code>a ` b</code></p>",
    "```py\nif a < b:\n\n    pass\n```\nafter": (
        '<div class="code"><pre><code>if a &lt; b:\n\n    pass</code></pre></div><p>after</p>'
    ),
    "~~~\n```\n~~~": '<div class="code"><pre><code>```</code></pre></div>',
    "```\nnot closed": '<div class="code"><pre><code>not closed</code></pre></div>',
    "[a](https://b.org/c_(d))": '<p><a href="https://b.org/c_(d)">a</a></p>',
    "see https://b.org/x, ok": '<p>see <a href="https://b.org/x">https://b.org/x</a>, ok</p>',
    "[a](b.html) [c](mailto:d)": "<p>[a](b.html) [c](mailto:d)</p>",
    "a | b\n--|--\n1 | **2**": (
        '<div class="table"><table><thead><tr><th>a</th><th>b</th></tr></thead>'
        "<tbody><tr><td>1</td><td><strong>2</strong></td></tr></tbody></table></div>"
    ),
    "a &amp; <b>c</b>": "<p>a &amp;amp; &lt;b&gt;c&lt;/b&gt;</p>",
    "": "",
    "😀 **é** שלום": "<p>😀 <strong>é</strong> שלום</p>",
}


def test_texts_become_the_nodes_that_are_meant(talk: Talk) -> None:
    made = talk.page.evaluate(RENDER, list(CASES))
    assert dict(zip(CASES, made, strict=True)) == CASES


def test_a_text_that_grows_ends_like_one_that_was_there_at_once_and_keeps_its_first_nodes(talk: Talk) -> None:
    text = "\n\n".join(CASES)
    grown, whole, kept = talk.page.evaluate(
        """async (text) => {
            const { render } = await import('/markdown.js');
            const [grown, whole] = [document.createElement('div'), document.createElement('div')];
            let first = null;
            let kept = true;
            for (let end = 0; end <= text.length; end += 3) {
                render(grown, text.slice(0, end));
                if (end > 30) { first ??= grown.firstChild; kept &&= grown.firstChild === first; }
            }
            render(grown, text);
            render(whole, text);
            return [grown.innerHTML, whole.innerHTML, kept];
        }""",
        text,
    )
    assert grown == whole
    assert kept


@pytest.mark.parametrize(
    "text", ["**" * 9_000 + "x", "[" * 20_000, "`" * 20_000, "> " * 5_000, "- " * 5_000, "**a" * 6_000, "[a](" * 5_000,
             "_a" * 9_000, "|" * 9_000 + "\n" + "|-" * 9_000, "https://a" * 3_000, "# " * 9_000, "`a``" * 5_000],
    ids=lambda text: text[:6].strip(),
)  # fmt: skip
def test_a_text_made_to_take_forever_does_not(talk: Talk, text: str) -> None:
    """Each must be through long before the time limit of the whole page."""
    found: Any = talk.page.evaluate(
        """async (text) => {
            const { render } = await import('/markdown.js');
            const node = document.createElement('div');
            render(node, text);
            return node.textContent.length;
        }""",
        text,
    )
    assert found <= len(text)
