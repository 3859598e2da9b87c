"""The clarity filter: can this prompt be depicted, and is it nothing but a depiction?"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Final

from rsi_jobs.prompts.settings import PASS, FilterSettings, Reason, Verdict
from rsi_jobs.prompts.wording import Reading, read

_VERBS = (
    "draw|paint|sketch|render|generate|create|make|produce|design|depict|illustrate|show|"
    "imagine|visuali[sz]e|give|picture"
)
_PREFIX = re.compile(
    rf"^(?:please[, ]+)?(?:{_VERBS})\s+(?:(?:me|us)\s+)?"
    r"(?=(?:an?|the|some|one|two|three|four|five|six|seven|eight|nine|ten|\d+)\s)"
    r"(?:(?:an?|the|some)\s+(?:new\s+)?(?:images?|pictures?|depiction|visuali[sz]ation)\s+"
    r"(?:of|showing|depicting|that shows)\s+)?",
    re.I,
)
_INSTRUCTION = re.compile(
    r"\b(?:please|make sure|ensure (?:that|the)|you (?:must|should|can|need to|are (?:an?|asked))|"
    r"your (?:task|answer|response|output|prompt)|as an ai|step by step|"
    r"here(?:'s| is| are) (?:an?|the|your|some) |ignore (?:all|any|the|previous))\b|"
    rf"(?:^|[.;:!]\s+)(?:{_VERBS}|describe|write|add|remove|use|avoid|include|replace|change|do|"
    r"edit|turn|put|draw)\s+(?:me|us|it|this|that|the|an?|some|your|all)\b",
    re.I,
)
_QUESTION = re.compile(
    r"\?|^(?:what|why|how|whose|who|which|can you|could you|would you|will you|do you|does|did|"
    r"is (?:it|there|this|that)|are (?:there|these|those|you))\b",
    re.I,
)
_NEGATION = re.compile(
    r"\b(?:no|not|without|never|none|neither|nor|nobody|nothing|cannot|lacks?|lacking|devoid of|"
    r"except(?: for)?|minus|absence of)\b|n['\u2019]t\b",
    re.I,
)
_URL = re.compile(
    r"\b(?:https?|ftp|s3|file)://|\bwww\.|\b[\w.+-]+@[\w-]+\.\w|"
    r"\b[a-z0-9-]+\.(?:com|org|net|io|gov|edu|html?|php|png|jpe?g|gif|webp)\b",
    re.I,
)
_MARKUP = re.compile(
    r"</?[a-z!][^>]*>|&(?:[a-z]+|#\d+);|\[[^\]]*\]|[{}|\\`]|\*\*|\*\w[^*]*\*|__|^\s*#{1,6}\s|"
    r"^\s*(?:[-*•>]|\d+[.)])\s|(?:^|\s)--\w|\(+[^()]*:\s*\d+(?:\.\d+)?\)|\(\(|\\n|"
    r"^(?:prompt|caption|image|title|answer)\s*:",
    re.I,
)
_QUOTED = re.compile(r"[\"\u201c\u201d\u201e\u00ab\u00bb]|(?<!\w)['\u2018][^'\u2019]{1,80}['\u2019](?!\w)")
_LETTERING = re.compile(
    r"\bthe (?:words?|texts?|letters?|phrase|saying|slogan|caption|title|message)\b|"
    r"\b(?:says|spells|spelling|spelled|labell?ed|inscribed|inscription|captioned|"
    r"written|handwritten|lettering|typography)\b|"
    r"\b(?:sign|banner|poster|shirt|label|screen|bubble|board)s? (?:that )?"
    r"(?:reads|reading|saying)\b|\bwith (?:the )?(?:text|words?|letters|writing|name)\b",
    re.I,
)
_WRAPPED = re.compile(r"^(?:\"([^\"]*)\"|\u201c([^\u201c\u201d]*)\u201d)[.,]?$")

_TEXT_CHECKS: Final[tuple[tuple[Reason, re.Pattern[str]], ...]] = (
    ("url", _URL),
    ("markup", _MARKUP),
    ("text rendering", _QUOTED),
    ("text rendering", _LETTERING),
    ("instruction", _INSTRUCTION),
    ("question", _QUESTION),
    ("negation", _NEGATION),
)


def tidy(prompt: str) -> str:
    """The caption in a prompt: spaces folded, wrapping quotes and a leading "draw ..." taken off.

    After "generate an image of" comes an ordinary caption, and to drop it for its first words
    would waste it. Anything else that is said to the model stays, and fails clarity.
    """
    text = " ".join(unicodedata.normalize("NFC", prompt).split())
    wrapped = _WRAPPED.match(text)
    if wrapped:
        text = (wrapped.group(1) or wrapped.group(2) or "").strip()
    return _PREFIX.sub("", text, count=1)


def clarity(
    prompts: Sequence[str],
    settings: FilterSettings,
    window: int,
    count_tokens: Callable[[str], int] | None = None,
    readings: Sequence[Reading] | None = None,
) -> list[Verdict]:
    """Whether each (tidied) prompt is well formed and can be depicted.

    `window`: tokens the shortest reader takes in, its begin and end marks included, which
    `count_tokens` counts too; without it, words and punctuation marks plus two stand in for them.
    """
    known = readings if readings is not None else [read(prompt) for prompt in prompts]
    count = count_tokens or _count_words
    return [
        _clarity(prompt, reading, settings, window, count)
        for prompt, reading in zip(prompts, known, strict=True)
    ]


def _clarity(
    prompt: str,
    reading: Reading,
    settings: FilterSettings,
    window: int,
    count_tokens: Callable[[str], int],
) -> Verdict:
    if problem := _unreadable(prompt):
        return Verdict("unreadable", problem)
    for reason, pattern in _TEXT_CHECKS:
        found = pattern.search(prompt)
        if found:
            return Verdict(reason, found.group().strip())
    if reading.n_words < settings.min_words:
        return Verdict("too short", f"{reading.n_words} words")
    tokens = count_tokens(prompt)
    if tokens > window:
        return Verdict("too long", f"{tokens} of {window} tokens")
    if reading.concrete < settings.min_concrete:
        return Verdict("abstract", f"{reading.concrete:.0%} of the words are concrete")
    if reading.conflict:
        return Verdict("contradiction", reading.conflict)
    return PASS


def overlong(
    prompts: Sequence[str], window: int, count_tokens: Callable[[str], int] | None = None
) -> list[Verdict]:
    """Prompts that the shortest reader would cut; `window` and `count_tokens` as in `clarity`."""
    counts = [(count_tokens or _count_words)(prompt) for prompt in prompts]
    return [Verdict("too long", f"{n} of {window} tokens") if n > window else PASS for n in counts]


def _unreadable(prompt: str) -> str:
    odd = next((c for c in prompt if not c.isprintable() or c == "\ufffd"), None)
    if odd is not None:
        return f"character U+{ord(odd):04X}"
    # The word lists and the models' readers are English; é and ñ are Latin letters too.
    foreign = sum(c.isalpha() and "LATIN" not in unicodedata.name(c, "") for c in prompt)
    written = sum(c.isalnum() for c in prompt)
    solid = sum(not c.isspace() for c in prompt)
    if foreign > 0.2 * written or written < 0.6 * solid:
        return f"{written - foreign} Latin letters and digits among {solid} characters"
    return ""


def _count_words(prompt: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]", prompt)) + 2
