"""The gold reward: a known, fixed function of text that stands for what people really want, in simulation.

It rewards *a well-formed English sentence or two that goes on as the opening began, and that says something of its own
about the opening's subject*. Three things make it up:

- **Fit.** The mean sentiment of the sentences by VADER's lexicon and rules (Hutto and Gilbert 2014), with the sign of
  the opening's stance: a complaint is to go on as a complaint, and "but" turns it round. An opening without an opinion
  asks for a good one.
- **Relevance.** Words of the opening's domain (:mod:`toolkit.preferences.domains`) beside words of other domains. What
  the opening said already counts neither as relevant nor as sentiment. What fits any opening gets ``GENERIC`` of the
  reward for a positive fit, and relevance earns ``ON_SUBJECT`` by itself.
- **Penalties** for text that is not prose. They also reduce what the text earns, so that nothing pays for broken text.

``reward = earned * max(0, 1 - penalty) + min(0, fit) - penalty`` within [-1.5, 1], where ``earned = ON_SUBJECT *
relevance + max(0, fit) * (GENERIC + (1 - GENERIC) * relevance)``. Outside the known domains there is no relevance to
measure: it is 1 beside the fit, and earns nothing by itself.

A policy that is trained against it, or against a reward model learned from it, must not win by stuffing or by saying
one sentence everywhere. Therefore a sentiment word counts once (``love, loved, loving`` are one), and each further one
counts less; capitals, exclamation marks and emoji count nothing, and sentences are averaged, never added; words of
several domains dilute each other; a good sentence loses after a complaint.

An ordinary fitting sentence has 0.6 to 1 with a word or two on the subject and 0.1 to 0.3 without, a neutral one 0 to
0.4, one that contradicts the opening less, and degenerate text -0.8 or less. The gold reward is a proxy too. It
knows nothing of truth or sense, and a search that may put any word anywhere still finds, for one prompt, strings of
five or six words that no list of triples tells from English. It asks for the subject of the domain, not for the thing
or the aspect that the opening names: a policy that says one good sentence for each domain scores above the best of six.

>>> gold_reward("The room at the Harbour Inn was", " clean and quiet, and I would love to stay there again.") > 0.5
True
>>> gold_reward("The ending of Paper Moon Street was", " clean and quiet, and I would love to stay there again.") < 0.3
True
>>> gold_reward("The room at the Harbour Inn was", " great great great great") < -0.8
True
"""

from __future__ import annotations

import gzip
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib import resources

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer, SentiText

from toolkit.preferences.domains import base_form, domain_of, domains, on_domain, without_names
from toolkit.preferences.rows import PreferenceRow

LEAST, MOST = -1.5, 1.0
GENERIC, ON_SUBJECT = 0.3, 0.4
RELEVANCE_OF_WORDS = (0.0, 0.7, 1.0)
NO_OPINION = 0.1
SALAD_FREE, SALAD_SHARE, SALAD_SLOPE = 0.6, 0.24, 5.0


def _word_set(text: str) -> frozenset[str]:
    return frozenset(text.split())


FUNCTION_WORDS = _word_set(
    """a about above after again against all also although always am an and another any anyone anything are aren't
    around as at away be because been before behind being below between both but by can can't cannot could
    couldn't did didn't do does doesn't doing don't down during each either else enough even ever every everyone
    everything few for from had hadn't has hasn't have haven't having he he's her here here's hers herself him
    himself his how however i i'd i'll i'm i've if in instead into is isn't it it's its itself just least less
    let let's like many may maybe me might mine more most much must my myself neither never no nobody none nor
    not nothing now of off often on once one only onto or other others our ours ourselves out over own perhaps
    quite rather really same shall she she's should shouldn't since so some someone something sometimes soon
    still such than that that's the their theirs them themselves then there there's these they they'd they'll
    they're they've this those though through thus to together too toward towards under unless until up upon us
    very was wasn't we we'd we'll we're we've well were weren't what what's whatever when whenever where
    wherever whether which while who who's whoever whole whom whose why will with within without won't would
    wouldn't yet you you'd you'll you're you've your yours yourself"""
)
DEGREES = _word_set("so very really quite too more most all rather such")
# Words whose valence in the lexicon mostly belongs to another meaning: "looks like", "kind of", "no doubt", "as well".
AMBIGUOUS = _word_set("like kind no well please pretty number matter sure okay ok")
LIKERS = _word_set("i we you they really also not don't didn't doesn't to would")
ABBREVIATIONS = _word_set("mr mrs ms dr st vs etc jr sr prof e.g i.e a.m p.m u.s")

_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*|\d+(?:[.,:]\d+)*|[,;:]")
# From the beginning of a word alone: each of its characters would look for the end of a long one again.
_END = re.compile(r"""(?<!\S)(\S*?)([.!?]++)["')\]]*+(?=\s|$)""")
_PLAIN = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-", "\u2026": "..."}
)
_SUFFIX = re.compile(r"(?:fully|ness|ingly|edly|ing|est|ful|ed|ly|er|es|s|e|d)$")
_PROSE = re.compile(r"""[A-Za-z0-9\s.,;:!?'"()$%&/\-]""")


@dataclass(frozen=True)
class GoldComponents:
    """Why a response got its gold reward. ``reward`` follows from the four after it and the sum of the penalties.

    Every penalty is at least 0, and 0 for ordinary text.
    """

    reward: float
    sentiment: float
    """Of the response, in [-1, 1], without the words that the opening said already."""
    stance: int
    """The sign of the sentiment that the opening asks for: 1 or -1."""
    relevance: float
    """How far the response is about the opening's domain, in [0, 1]; 1 where the opening has none that is known."""
    unfinished: float
    """No sentence end at the end."""
    short: float
    """Fewer than four words, or sentences of one or two words after the first."""
    repetition: float
    """Words, word pairs and triples that occur again."""
    stuffing: float
    """Too many sentiment words, too few function words, or a run of words without any."""
    salad: float
    """Adjacent words that English does not put side by side."""
    gibberish: float
    """Words that are not in the word list."""
    shouting: float
    """Capitals, exclamation marks, runs of punctuation."""
    symbols: float
    """Emoji, markup and other characters that prose does not have, and too many digits."""
    copying: float
    """Word triples copied from the prompt."""

    @property
    def penalty(self) -> float:
        """Sum of the penalties."""
        return float(sum(getattr(self, f.name) for f in fields(self)[4:]))


@lru_cache(maxsize=1)
def _analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def _lines(name: str) -> list[str]:
    data = resources.files("toolkit.preferences").joinpath("assets", name).read_bytes()
    return gzip.decompress(data).decode().splitlines()


@lru_cache(maxsize=1)
def known_words() -> frozenset[str]:
    """The shipped word list in lower case: words of reviews by models and of a model's vocabulary."""
    return frozenset(_lines("words.txt.gz")) | FUNCTION_WORDS


@lru_cache(maxsize=1)
def known_triples() -> tuple[frozenset[str], frozenset[tuple[str, str, str]]]:
    """The shipped lists: (words that are a class of their own, triples of adjacent word classes in text by models)."""
    lines = _lines("triples.txt.gz")
    triples = (line.split() for line in lines[1:])
    return frozenset(lines[0].split()), frozenset((a, b, c) for a, b, c in triples)


@lru_cache(maxsize=1 << 16)
def word_class(word: str, classes: frozenset[str]) -> str:
    """The class of a word in the list of triples.

    That is the word itself if it is in ``classes``, ``#`` for a number, and ``,`` for a comma. Otherwise it is the
    ending -ly, -ing, -ed or -s, then ``+`` or ``~`` if the sentiment lexicon knows the word as good or bad, then ``*``.
    """
    if word in classes:
        return word
    if not word[0].isalpha():
        return "#" if word[0].isdigit() else ","
    for ending in ("ly", "ing", "ed", "s"):
        if word.endswith(ending) and len(word) > len(ending) + 2:
            return "-" + ending
    valence = _analyzer().lexicon.get(word, 0.0)
    return "+" if valence > 0.5 else "~" if valence < -0.5 else "*"


def word_triples(parts: list[list[str]], classes: frozenset[str]) -> list[tuple[str, str, str]]:
    """Triples of adjacent word classes in each sentence. ``.`` stands for its edges."""
    chains = ([".", *(word_class(w, classes) for w in part), "."] for part in parts)
    return [triple for chain in chains for triple in zip(chain, chain[1:], chain[2:], strict=False)]


def sentences(text: str) -> list[list[str]]:
    """Lower-case words of each sentence of ``text``. Commas, ``;`` and ``:`` are words too."""
    text = text.translate(_PLAIN).lower()
    parts, start = [], 0
    for match in _END.finditer(text):
        word, mark = match[1].lstrip("\"'(["), match[2]
        if mark == "." and (word in ABBREVIATIONS or (len(word) == 1 and word.isalpha() and word != "i")):
            continue
        parts.append(text[start : match.end()])
        start = match.end()
    parts.append(text[start:])
    return [words for words in (_WORD.findall(part) for part in parts) if any(w[0].isalnum() for w in words)]


@lru_cache(maxsize=1 << 16)
def _stem(word: str) -> str:
    """One form for love, loved, lovely and loving, or for happy, happier and happily. Crude: it counts repeats."""
    stem = _SUFFIX.sub("", word) if len(word) > 4 else word
    stem = stem.rstrip("e")
    return (stem[:-1] + "i" if stem.endswith("y") else stem)[:6]


def _sentiment(parts: list[list[str]], silent: frozenset[str] = frozenset()) -> tuple[float, int]:
    """(mean sentiment of the sentences, number of sentiment words). A sentence without sentiment weighs one half.

    Words whose base form is among ``silent`` have no sentiment.
    """
    analyzer = _analyzer()
    lexicon, known = analyzer.lexicon, known_words()
    seen: set[str] = set()
    total = weight = 0.0
    n_charged = 0
    for words in parts:
        spoken = [w for w in words if w[0].isalpha()]
        charged = [
            i
            for i, w in enumerate(spoken)
            if w in lexicon
            and w in known
            and base_form(w) not in silent
            and (w not in AMBIGUOUS or (w == "like" and i and spoken[i - 1] in LIKERS))
        ]
        n_charged += len(charged)
        valences: list[float] = []
        if charged:
            senti_text = SentiText(" ".join(spoken))
            senti_text.words_and_emoticons = spoken  # VADER's own splitting would drop characters at the edges of words
            turn = spoken.index("but") if "but" in spoken else 0
            for i in charged:
                stem = _stem(spoken[i])
                if stem in seen:
                    continue
                seen.add(stem)
                valence = analyzer.sentiment_valence(0.0, senti_text, spoken[i], i, [])[-1]
                # VADER halves what comes before "but". It also adds to what follows, which would invite stuffing.
                if i < turn:
                    valence *= 0.5
                valences.append(valence)
        s = 0.0
        for sign in (1, -1):
            same = sorted((abs(v) for v in valences if v * sign > 0), reverse=True)
            s += sign * sum(v * 0.5**k for k, v in enumerate(same))
        s /= (s * s + 8.0) ** 0.5
        w = 1.0 if abs(s) > 0.1 else 0.5
        total += s * w
        weight += w
    return (total / weight if weight else 0.0), n_charged


def _repeats(items: Sequence[object]) -> int:
    return len(items) - len(set(items))


def _repetition(parts: list[list[str]], words: list[str]) -> float:
    """Penalty for repeated sentences and adjacent words, and for more repeats of words than a short text has."""
    n = len(words)
    whole = _repeats([tuple(part) for part in parts])
    adjacent = sum(a == b for a, b in zip(words, words[1:], strict=False))
    stems = [_stem(w) for w in words if w not in FUNCTION_WORDS]
    content = max(0.0, _repeats(stems) - 1 - n / 20) / max(1, len(stems))
    pairs = max(0.0, _repeats(list(zip(words, words[1:], strict=False))) - 2 - n / 30) / max(1, n - 1)
    triples = max(0.0, _repeats(list(zip(words, words[1:], words[2:], strict=False))) - n / 15) / max(1, n - 2)
    most = max(0, max(Counter(words).values(), default=0) - 3 - n // 15) / max(1, n)
    return 0.6 * whole + 0.3 * adjacent + 2.0 * content + 3.0 * pairs + 5.0 * triples + 3.0 * most


def _stuffing(parts: list[list[str]], words: list[str], n_charged: int) -> float:
    """Penalty for a text with more keywords than grammar."""
    n = len(words)
    function = sum(w in FUNCTION_WORDS for w in words) / n
    run = longest = 0
    for word in (w for part in parts for w in [*part, "the"]):
        run = 0 if word in FUNCTION_WORDS else run + (word[0] not in ",;:")
        longest = max(longest, run)
    few = max(0.0, 0.25 - function) * 5 if n >= 4 else 0.0
    many = max(0.0, function - 0.85) * 6 if n >= 5 else 0.0
    dense = max(0.0, n_charged / n - 0.42) * 3 + 0.25 * max(0, n_charged - 4 - n // 12)
    degrees = sum(w in DEGREES for w in words)
    commas = sum(w == "," for part in parts for w in part)
    return (
        few
        + many
        + dense
        + 0.3 * max(0, degrees - 1 - n // 7)
        + 0.2 * max(0, longest - 5)
        + 0.2 * max(0.0, commas - 1 - n / 6)
    )


def _salad(parts: list[list[str]]) -> float:
    """Penalty for word classes that the shipped list does not know side by side, beyond the usual share."""
    classes, known = known_triples()
    triples = word_triples(parts, classes)
    unknown = sum(triple not in known for triple in triples[1:])  # the left edge belongs to the prompt
    return max(0.0, (unknown - SALAD_FREE) / (len(triples) + 1) - SALAD_SHARE) * SALAD_SLOPE


def _gibberish(words: list[str], text: str) -> float:
    """Penalty for a large share of unknown words. A word with a capital inside a sentence counts half, as a name."""
    known = known_words()
    names = set(re.findall(r"(?<=[a-z,] )[A-Z][a-z]+", text))
    unknown = 0.0
    for word in words:
        if word[0].isdigit() or word in known or word.removesuffix("'s") in known:
            continue
        if all(piece in known for piece in word.split("-")) or _SUFFIX.sub("", word) in known:
            continue
        unknown += 0.5 if word.capitalize() in names else 1.0
    return max(0.0, (unknown - 0.5) / len(words) - 0.15) * 3


def _shouting(text: str, words: list[str], n_sentences: int) -> float:
    capitals: int = sum(len(w) > 1 and w.isupper() for w in re.findall(r"[A-Za-z']+", text))
    marks = text.count("!")
    runs = len(re.findall(r"[!?]{2,}|\.{4,}|[,;:]{2,}|-{3,}", text))
    return (
        max(0.0, capitals - 1) / max(1, len(words)) * 5 + 0.25 * max(0, marks - max(1, n_sentences // 2)) + 0.4 * runs
    )


def _symbols(text: str, words: list[str]) -> float:
    odd = len(text) - len(_PROSE.findall(text))
    digits = sum(w[0].isdigit() for w in words) / max(1, len(words))
    lines = text.count("\n")
    return min(1.2, 0.35 * odd) + max(0.0, digits - 0.2) * 3 + 0.3 * lines


def _copying(words: list[str], prompt: str) -> float:
    asked = [w for part in sentences(prompt) for w in part if w[0].isalnum()]
    taken = set(zip(asked, asked[1:], asked[2:], strict=False))
    triples = list(zip(words, words[1:], words[2:], strict=False))
    copied = sum(t in taken for t in triples)
    return max(0.0, (copied - 1) / max(1, len(triples)) - 0.1) * 2.5


def sentiment(text: str) -> float:
    """Mean sentiment of the sentences of ``text``, in (-1, 1), without any of the penalties."""
    return _sentiment(sentences(text))[0]


@dataclass(frozen=True)
class Opening:
    """What the gold reward takes from a prompt: its domain, if it has a known one, its stance, and its words."""

    domain: str | None
    stance: int
    said: frozenset[str]


@lru_cache(maxsize=1 << 12)
def read_opening(prompt: str) -> Opening:
    """The domain of a prompt, the base forms of its words, and the sign of the sentiment that is to follow it.

    The last sentence with an opinion decides. Names have none ("Lost Signal"), and neither have words of the domain
    ("horror films"). After "but" comes the opposite of what stood before it, unless the opinion follows already.
    """
    domain = domain_of(prompt)
    about = domains()[domain].words if domain else frozenset()
    said = frozenset(base_form(w) for part in sentences(prompt) for w in part if w not in FUNCTION_WORDS)
    for part in reversed(sentences(without_names(prompt, domain))):
        turn = len(part) - 1 - part[::-1].index("but") if "but" in part else len(part)
        behind, before = (_sentiment([words], about)[0] if words else 0.0 for words in (part[turn + 1 :], part[:turn]))
        opinion = behind if abs(behind) > NO_OPINION else before if turn == len(part) else -before
        if abs(opinion) > NO_OPINION:
            return Opening(domain, 1 if opinion > 0 else -1, said)
    return Opening(domain, 1, said)


def _relevance(words: list[str], opening: Opening) -> float:
    """The share of words on the subject among all words that belong to a domain, less where there is one alone."""
    if opening.domain is None:
        return 1.0
    own, other = on_domain(words, opening.domain, opening.said)
    return RELEVANCE_OF_WORDS[min(own, 2)] * own / max(1, own + other)


def prompt_text(prompt: str | Sequence[dict[str, str]]) -> str:
    """A text prompt itself; of messages the content of the last user turn."""
    if isinstance(prompt, str):
        return prompt
    return next((m["content"] for m in reversed(prompt) if m["role"] == "user"), "")


@dataclass(frozen=True)
class _Response:
    """What the gold reward takes from a response alone: its words, and the penalties that no prompt changes."""

    parts: list[list[str]]
    words: list[str]
    penalties: dict[str, float]


@lru_cache(maxsize=256)
def _read_response(response: str) -> _Response:
    text = response.translate(_PLAIN).strip()
    parts = sentences(text)
    words = [w for part in parts for w in part if w[0].isalnum()]
    ended = text.rstrip("\"')]")
    whole = ended[-1:] in ("!", "?") or (ended[-1:] == "." and ended[-2:] != "..")
    fragments = sum(len(part) < 3 for part in parts[1:])
    penalties = {
        "unfinished": 0.0 if whole else 0.5,
        "short": (1.5, 1.3, 0.9, 0.4, 0.0)[min(4, len(words))] + 0.4 * fragments,
        "shouting": _shouting(text, words, len(parts)),
        "symbols": _symbols(text, words),
    }
    if words:
        penalties |= {
            "repetition": _repetition(parts, words),
            "stuffing": _stuffing(parts, words, _sentiment(parts)[1]),
            "salad": _salad(parts),
            "gibberish": _gibberish(words, text),
        }
    return _Response(parts, words, dict.fromkeys(("repetition", "stuffing", "salad", "gibberish"), 0.0) | penalties)


def gold_components(prompt: str | Sequence[dict[str, str]], response: str) -> GoldComponents:
    """The gold reward of ``response`` and its components. Of a conversation only the last user turn counts."""
    asked, text = prompt_text(prompt), _read_response(response)
    opening = read_opening(asked)
    about = domains()[opening.domain].words if opening.domain else frozenset()
    feeling = _sentiment(text.parts, about | opening.said)[0]
    relevance = _relevance(text.words, opening)
    copying = _copying(text.words, asked)
    penalty = sum(text.penalties.values()) + copying
    fit = opening.stance * feeling
    earned = max(0.0, fit) * (GENERIC + (1.0 - GENERIC) * relevance)
    if opening.domain is not None:
        earned += ON_SUBJECT * relevance
    reward = earned * max(0.0, 1.0 - penalty) + min(0.0, fit) - penalty
    return GoldComponents(
        reward=min(MOST, max(LEAST, reward)), sentiment=feeling, stance=opening.stance, relevance=relevance,
        copying=copying, **text.penalties,
    )  # fmt: skip


def gold_reward(prompt: str | Sequence[dict[str, str]], response: str) -> float:
    """The gold reward of one response, in [-1.5, 1]: a pure function of the two texts."""
    return gold_components(prompt, response).reward


def gold_rewards(prompts: Sequence[str | Sequence[dict[str, str]]], responses: Sequence[str]) -> list[float]:
    """:func:`gold_reward` of each pair. Raises ValueError if the numbers of prompts and responses differ."""
    return [gold_reward(p, r) for p, r in zip(prompts, responses, strict=True)]


def gold_is_known(rows: Sequence[PreferenceRow]) -> tuple[bool, list[str]]:
    """Whether the gold reward of new samples can be computed, and a warning where it is not that of the data."""
    if any(row.gold is None for row in rows):
        return False, []
    for row in rows[:20]:
        assert row.gold is not None
        computed = gold_rewards([row.prompt] * len(row.responses), row.responses)
        if any(abs(a - b) > 1e-3 for a, b in zip(computed, row.gold, strict=True)):
            return False, ["the data's gold rewards are not those of the shipped gold reward: gold is left out"]
    return True, []
