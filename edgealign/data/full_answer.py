"""A bare answer and its question to a whole sentence: "Where did the boy go?", "to the forest" -> "The boy went ...".

Only forms of question whose words stay in place are known; everything else gives None, and the bare answer stands.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from edgealign.data.english import as_sentence, count_words, decapitalise

MOST_WORDS = 30  # of the whole sentence
# fmt: off
_IRREGULAR = {
    "be": "was", "bear": "bore", "beat": "beat", "become": "became", "begin": "began", "bite": "bit", "blow": "blew",
    "break": "broke", "bring": "brought", "build": "built", "buy": "bought", "catch": "caught", "choose": "chose",
    "come": "came", "cut": "cut", "dig": "dug", "draw": "drew", "drink": "drank", "drive": "drove", "eat": "ate",
    "fall": "fell", "feed": "fed", "feel": "felt", "fight": "fought", "find": "found", "flee": "fled", "fly": "flew",
    "forget": "forgot", "get": "got", "give": "gave", "go": "went", "grow": "grew", "hang": "hung", "have": "had",
    "hear": "heard", "hide": "hid", "hit": "hit", "hold": "held", "keep": "kept", "kneel": "knelt", "know": "knew",
    "lay": "laid", "lead": "led", "leave": "left", "lend": "lent", "let": "let", "lie": "lay", "lose": "lost",
    "make": "made", "meet": "met", "pay": "paid", "put": "put", "ride": "rode", "ring": "rang", "rise": "rose",
    "run": "ran", "say": "said", "see": "saw", "seek": "sought", "sell": "sold", "send": "sent", "set": "set",
    "shake": "shook", "shoot": "shot", "shut": "shut", "sing": "sang", "sit": "sat", "sleep": "slept",
    "speak": "spoke", "spend": "spent", "spring": "sprang", "stand": "stood", "steal": "stole", "strike": "struck",
    "swear": "swore", "swim": "swam", "take": "took", "teach": "taught", "tell": "told", "think": "thought",
    "throw": "threw", "understand": "understood", "wake": "woke", "wear": "wore", "weep": "wept", "win": "won",
    "write": "wrote",
}
_REGULAR = frozenset((
    "agree", "allow", "appear", "arrive", "ask", "attack", "bake", "beg", "believe", "belong", "blame", "bless",
    "boast", "borrow", "build", "bury", "call", "carry", "change", "chase", "claim", "climb", "close", "compare",
    "complain", "cook", "cover", "cross", "cry", "dance", "decide", "demand", "deserve", "destroy", "die",
    "disappear", "discover", "disguise", "dislike", "dress", "earn", "enjoy", "enter", "escape", "exchange",
    "expect", "explain", "fear", "fetch", "fill", "finish", "follow", "force", "gain", "gather", "grant", "greet",
    "hate", "help", "hire", "hope", "hunt", "hurry", "imagine", "invite", "join", "jump", "kill", "kiss", "knock",
    "laugh", "learn", "like", "listen", "live", "lock", "long", "look", "love", "marry", "mention", "miss",
    "mistake", "move", "name", "need", "notice", "obey", "offer", "open", "order", "own", "paint", "pass",
    "persuade", "pick", "plan", "plant", "play", "plead", "please", "pray", "prefer", "prepare", "pretend",
    "promise", "pull", "punish", "push", "raise", "reach", "realize", "receive", "recognize", "refuse", "regret",
    "remain", "remember", "remove", "repeat", "reply", "request", "rescue", "rest", "return", "reveal", "reward",
    "roll", "rush", "save", "scold", "scream", "search", "seem", "serve", "share", "shout", "show", "smell",
    "smile", "spare", "stare", "start", "stay", "stop", "store", "succeed", "suggest", "suspect", "thank", "tie",
    "touch", "travel", "treat", "trick", "trust", "try", "turn", "use", "visit", "wait", "walk", "want", "warn",
    "wash", "watch", "whisper", "wish", "wonder", "work", "worry",
))
_DOUBLED = {"beg", "hop", "plan", "rob", "stop", "drag", "grab", "prefer", "regret"}
# first words of a bare answer that are no noun phrase or verb
_SUBJECTS = frozenset((
    "he", "she", "it", "they", "we", "you", "i", "there", "because", "to", "by", "in", "on", "at", "for", "so", "yes",
    "no", "not", "if", "when", "that",
))
# fmt: on
_DETERMINERS = frozenset(("the", "a", "an", "his", "her", "their", "its", "my", "some", "two", "three", "all"))
_PAST_VERB = re.compile(rf"(?i)^(?:{'|'.join(sorted(set(_IRREGULAR.values())))}|[a-z]+[^e\W]ed)\b")
_PLACE = re.compile(
    r"(?i)^(?:in|on|at|to|into|under|over|behind|near|by|from|through|home|outside|inside|up|down|out)\b"
)
_TIME = re.compile(
    r"(?i)^(?:in|on|at|when|after|before|during|while|until|every|once|the (?:next|first|last|same)|one)\b"
)


def full_answer(question: str, bare: str) -> str | None:
    """The whole sentence, or None where no rule fits; never longer than MOST_WORDS words."""
    asked = re.fullmatch(r"(\w+) (.+?)\s*\?*", " ".join(question.split()))
    answer = bare.strip().rstrip(".")
    if asked is None or not count_words(answer) or not answer[0].isalpha() or re.search(r"[.!?\n\"]", answer):
        return None
    rule = _RULES.get(asked.group(1).lower())
    made = rule(asked.group(2), _small(answer)) if rule else None
    if made is None or count_words(made) > MOST_WORDS or count_words(made) <= count_words(bare):
        return None
    return as_sentence(made)


def past(verb: str) -> str | None:
    """The past tense of a verb that we know."""
    if verb in _IRREGULAR:
        return _IRREGULAR[verb]
    if verb not in _REGULAR:
        return None
    if verb in _DOUBLED:
        return f"{verb}{verb[-1]}ed"
    if verb.endswith("e"):
        return f"{verb}d"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return f"{verb[:-1]}ied"
    return f"{verb}ed"


def present(told: str) -> str:
    """The verb whose past tense this is, one of PAST_FORMS."""
    return _PRESENT[told]


def _small(answer: str) -> str:
    """The answer inside a sentence; a name keeps its capital."""
    first = answer.split()[0]
    return decapitalise(answer) or (answer if first[0].isupper() else answer[0].lower() + answer[1:])


def _lower(answer: str) -> str:
    """An answer that begins with a verb or an adjective, which is never a name."""
    return answer[0].lower() + answer[1:]


def _told(rest: str) -> tuple[str, str, str] | None:
    """ "did the king give to the boy" as ("the king", "gave", "to the boy")."""
    found = re.fullmatch(r"did (.+)", rest)
    if found is None:
        return None
    words = found.group(1).split()
    for place in range(1, min(len(words), 6)):
        after = words[place - 1].lower() in _DETERMINERS or words[place - 1].endswith("'s")
        happened = past(words[place]) if not after else None
        if happened:
            return " ".join(words[:place]), happened, " ".join(words[place + 1 :])
    return None


def _how(rest: str, answer: str) -> str | None:
    first = answer.split()[0].lower()
    found = re.match(r"(did|will|would|does) (.+?) feel\b", rest)
    if found and count_words(answer) <= 4 and first not in _SUBJECTS | _DETERMINERS and "feel" not in answer:
        verb = {"did": "felt", "does": "feels"}.get(found.group(1), f"{found.group(1)} feel")
        return f"{found.group(2)} {verb} {_lower(answer)}" if "felt" not in answer else None
    told = _told(rest)
    if told and first == "by":
        return " ".join(filter(None, (*told, answer)))
    return None


def _what(rest: str, answer: str) -> str | None:
    first = answer.split()[0].lower()
    wanted = re.match(r"did (.+?) (want|need|have|try|decide|plan|hope|promise|wish|agree) to do\b", rest)
    if wanted:
        fits = past(first) and count_words(wanted.group(1)) <= 5
        return f"{wanted.group(1)} {past(wanted.group(2))} to {_lower(answer)}" if fits else None
    found = re.match(r"(did|will|would) (.+?) do\b", rest)
    if found:
        if first in _SUBJECTS | _DETERMINERS or count_words(found.group(2)) > 5 or re.search(r"\bto$", found.group(2)):
            return None
        answer = _lower(answer)
        if found.group(1) == "did":
            return f"{found.group(2)} {answer}" if _PAST_VERB.match(answer) else None
        return f"{found.group(2)} {found.group(1)} {answer}" if past(first) else None
    told = _told(rest)
    if told is None or told[1] == "said" or first in _SUBJECTS or count_words(answer) > 8:
        return None
    if _PAST_VERB.match(answer) or past(first):
        return None
    subject, verb, more = told
    if re.search(r"\b(?:to|that|of|about|for|from|with|like)$", more):
        return None if re.search(r"\b(?:after|when)\b", more) else f"{subject} {verb} {more} {answer}"
    if more and not re.match(r"(?:to|from|for|with|in|on|at|into|when|after|before|as|every|by)\b", more):
        return None
    return " ".join(filter(None, (subject, verb, answer, more)))


def _where(rest: str, answer: str) -> str | None:
    was = re.fullmatch(r"(was|were) ((?:\w+ ){0,3}\w+)", rest)
    if was and _PLACE.match(answer):
        return f"{was.group(2)} {was.group(1)} {answer}"
    told = _told(rest)
    if told is None or not _PLACE.match(answer):
        return None
    subject, verb, more = told
    if re.search(r"\b(?:after|before|when|while|to [a-z]+)\b", more):
        return None  # "went after he met a man to the city"
    if re.search(r"\b(?:to|from|in|at)$", more):
        more = re.sub(r"\s*\b(?:to|from|in|at)$", "", more)
    return " ".join(filter(None, (subject, verb, more, answer)))


def _when(rest: str, answer: str) -> str | None:
    told = _told(rest)
    return " ".join(filter(None, (*told, answer))) if told and _TIME.match(answer) else None


def _why(rest: str, answer: str) -> str | None:
    told = _told(rest)
    if told is None:
        return None
    first = answer.split()[0].lower()
    if first in ("because", "to", "so"):
        return " ".join(filter(None, (*told, answer)))
    if first in ("he", "she", "it", "they", "there"):
        return " ".join(filter(None, (*told, "because", answer)))
    return None


def _who(rest: str, answer: str) -> str | None:
    first = rest.split()[0].lower()
    told = _PAST_VERB.match(first) or (first in ("was", "were", "had") and re.match(r"\w+ \w+(?:ing|ed|en)\b", rest))
    single = " and " not in answer and "," not in answer
    if not told or count_words(answer) > 6 or answer.split()[0].lower() in _SUBJECTS or (first == "was" and not single):
        return None
    return f"{answer} {rest}"


_RULES: dict[str, Callable[[str, str], str | None]] = {
    "how": _how, "what": _what, "where": _where, "when": _when, "why": _why, "who": _who,
}
# also another word, or the past of another verb
_UNSURE = frozenset(("lay", "felt", "was", "had", "said", "thought", "rose"))
_PRESENT = {
    told: verb
    for verb in (*_IRREGULAR, *sorted(_REGULAR))
    if (told := past(verb)) is not None and told != verb and told not in _UNSURE
}
PAST_FORMS = frozenset(_PRESENT)  # without words that may be another one
