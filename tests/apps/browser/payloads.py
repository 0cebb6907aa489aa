"""Texts that try to run a script in the page that shows them. Every one calls `hit()` if it runs.

Sources: OWASP's XSS filter evasion cheat sheet, PortSwigger's XSS cheat sheet, DOMPurify's test fixtures, and what was
found in chat pages (markdown links, images, fences, headings, tables that become HTML).
"""

from __future__ import annotations

SCRIPTS = [
    "<script>hit()</script>", "<SCRIPT>hit()</SCRIPT>", "<script >hit()</script >", "<script/x>hit()</script>",
    "<scr<script>ipt>hit()</scr</script>ipt>", "<script src=data:text/javascript,hit()></script>",
    "<script type=module>hit()</script>", "<script>hit()", "</script><script>hit()</script>",
    "<svg><script>hit()</script>", "<svg><script>hit&#40;&#41;</script>", "<math><mtext><script>hit()</script>",
    "<noscript><p title='</noscript><img src=x onerror=hit()>'>", "<template><script>hit()</script></template>",
    "<iframe srcdoc='<script>parent.hit()</script>'></iframe>",
]  # fmt: skip
HANDLERS = [
    "<img src=x onerror=hit()>", "<img src=x onerror='hit()'>", "<img/src=x/onerror=hit()>",
    "<IMG SRC=x ONERROR=hit()>", "<img src=data:, onerror=hit()>", "<img srcset=x onerror=hit()>",
    "<image src=x onerror=hit()>", "<svg onload=hit()>", "<svg/onload=hit()>",
    "<svg><animate onbegin=hit() attributeName=x dur=1s>", "<svg><set onbegin=hit() attributeName=x>",
    "<body onload=hit()>", "<body onpageshow=hit()>", "<video src=x onerror=hit()>",
    "<video><source onerror=hit()></video>", "<audio src=x onerror=hit()>", "<input autofocus onfocus=hit()>",
    "<select autofocus onfocus=hit()>", "<textarea autofocus onfocus=hit()>", "<button autofocus onfocus=hit()>",
    "<details open ontoggle=hit()>", "<marquee onstart=hit()>", "<object data=x onerror=hit()>",
    "<style onload=hit()></style>", "<link rel=stylesheet href=x onerror=hit()>",
    "<div style='animation:breathe 1s' onanimationstart=hit()>", "<div tabindex=1 autofocus onfocus=hit()>",
    "<iframe onload=hit()></iframe>", "<img src=x onerror=&#104;it()>",
    "<xss contenteditable autofocus onfocus=hit()>", "<img src='x' onerror=\"hit()\" alt='a",
]  # fmt: skip
ADDRESSES = [
    "javascript:hit()", "JavaScript:hit()", "java\tscript:hit()", "java&#9;script:hit()", "&#106;avascript:hit()",
    "javascript&colon;hit()", "\x01javascript:hit()", "javascript://%0ahit()", "javascript:/*http://a*/hit()",
    "data:text/html,<script>hit()</script>", "data:text/html;base64,PHNjcmlwdD5oaXQoKTwvc2NyaXB0Pg==",
    "vbscript:hit()", "view-source:javascript:hit()", "http:javascript:hit()", "https:javascript:hit()",
    "//javascript:hit()", "blob:javascript:hit()", "filesystem:javascript:hit()", "feed:javascript:hit()",
    "javascript%3Ahit()",
]  # fmt: skip
FRAMES = [
    "<iframe src=\"javascript:parent.hit()\"></iframe>", "<object data=\"javascript:hit()\"></object>",
    "<embed src=\"javascript:hit()\">", "<a href=\"javascript:hit()\" autofocus>x</a>",
    "<base href=\"javascript:hit()//\">", "<form action=\"javascript:hit()\"><button autofocus>x</button></form>",
    "<meta http-equiv=refresh content=\"0;url=javascript:hit()\">",
    "<svg><a xlink:href=\"javascript:hit()\"><text>x</text></a></svg>", "<math href=\"javascript:hit()\">x</math>",
    "<isindex action=\"javascript:hit()\">",
]  # fmt: skip
BROKEN = [
    "\"><img src=x onerror=hit()>", "'><img src=x onerror=hit()>", "--><img src=x onerror=hit()>",
    "]]><img src=x onerror=hit()>", "</title><img src=x onerror=hit()>", "</textarea><img src=x onerror=hit()>",
    "</style><img src=x onerror=hit()>", "<!--<img src=\"--><img src=x onerror=hit()>\">",
    "<![CDATA[<img src=x onerror=hit()>]]>", "<?xml ?><img src=x onerror=hit()>", "<img src=x onerror=hit()>",
    "&lt;img src=x onerror=hit()&gt;", "&amp;lt;img src=x onerror=hit()&amp;gt;", "<a href='x' onclick='hit()'>x",
    "<<img src=x onerror=hit()>>", "${hit()}", "{{hit()}}", "{{constructor.constructor('hit()')()}}",
    "<svg><style><img src=x onerror=hit()></style>",
    "<form><math><mtext></form><form><mglyph><style></math><img src onerror=hit()>",
]  # fmt: skip
MARKS = [
    "[x]({})", "![x]({})", "<{}>", "[x]({} \"title\")", "[![x]({})]({})", "[x]: {}\n\n[x]",
]  # fmt: skip
AROUND = [
    "# {}", "- {}", "1. {}", "> {}", "**{}**", "*{}*", "`{}`", "```\n{}\n```", "```{}\ncode\n```",
    "| a |\n|---|\n| {} |", "[{}](https://example.org/)", "[x](https://example.org/{})", "~~{}~~",
    "https://example.org/{}",
]  # fmt: skip
FEW = [
    "<script>hit()</script>", "<img src=x onerror=hit()>", "\"><svg onload=hit()>",
    "\" onmouseover=\"hit()\" autofocus onfocus=\"hit()",
]  # fmt: skip


def payloads() -> list[str]:
    """All of them."""
    plain = [*SCRIPTS, *HANDLERS, *FRAMES, *BROKEN]
    links = [mark.replace("{}", address) for mark in MARKS for address in ADDRESSES]
    wrapped = [frame.replace("{}", text) for frame in AROUND for text in FEW]
    return [*plain, *links, *wrapped]
