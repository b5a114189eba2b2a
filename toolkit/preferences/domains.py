"""What the shipped openings are about: for each domain the parts that fill the templates, and words that belong to it.

The gold reward asks whether a response is about the domain of its prompt. A list answers that in a few microseconds and
without a model. ``scripts/build_openings.py`` writes the openings from the same file, ``assets/domains.yaml``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib import resources

import yaml


@dataclass(frozen=True)
class Domain:
    """What one kind of review is about.

    ``things`` are reviewed, ``kinds`` are liked or disliked, ``aspects`` are judged; ``did``, ``doing`` and
    ``preposition`` go with them in a sentence. ``words`` are what a text on the domain speaks of.
    """

    did: str
    doing: str
    preposition: str
    things: tuple[str, ...]
    kinds: tuple[str, ...]
    aspects: tuple[str, ...]
    words: frozenset[str]


@lru_cache(maxsize=1)
def domains() -> dict[str, Domain]:
    """The shipped domains by name."""
    text = resources.files("toolkit.preferences").joinpath("assets", "domains.yaml").read_text(encoding="utf-8")
    lists = {"things", "kinds", "aspects"}
    return {
        name: Domain(
            **{f.name: tuple(entry[f.name]) if f.name in lists else entry[f.name] for f in fields(Domain)}
            | {"words": frozenset(entry["words"].split())}
        )
        for name, entry in yaml.safe_load(text).items()
    }


@lru_cache(maxsize=1)
def _domains_of_words() -> dict[str, frozenset[str]]:
    """The names of the domains that each word belongs to."""
    every = {word for domain in domains().values() for word in domain.words}
    return {word: frozenset(name for name, domain in domains().items() if word in domain.words) for word in every}


@lru_cache(maxsize=1)
def _names() -> tuple[re.Pattern[str], dict[str, str]]:
    """A pattern that finds the things and kinds of all domains in a text in lower case, and the domain of each."""
    owner = {name.lower(): key for key, domain in domains().items() for name in (*domain.things, *domain.kinds)}
    longest_first = sorted(owner, key=lambda name: (-len(name), name))
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, longest_first))})\b"), owner


def without_names(prompt: str, domain: str | None) -> str:
    """A prompt in lower case without the things and kinds that it names, and without what was done with them."""
    text = _names()[0].sub("it", prompt.lower())
    if domain is None:
        return text
    return re.sub(rf"\b(?:{domains()[domain].did}|{domains()[domain].doing})\b", "had", text)


@lru_cache(maxsize=1 << 14)
def base_form(word: str) -> str:
    """The form under which the lists know a word: without a plural's or a possessive's ending.

    >>> base_form("pastries"), base_form("waiter's"), base_form("sandwiches"), base_form("xylophones")
    ('pastry', 'waiter', 'sandwich', 'xylophones')
    """
    known = _domains_of_words()
    stems = (
        word.removesuffix("'s"),
        word[:-1] if word.endswith("s") else word,
        word[:-2] if word.endswith("es") else word,
        word[:-3] + "y" if word.endswith("ies") else word,
    )
    return next((stem for stem in (*stems[1:], stems[0]) if stem in known), word)


@lru_cache(maxsize=1 << 12)
def domain_of(prompt: str) -> str | None:
    """The domain that a prompt is about: of the thing that it names, else of most of its words; None if it says none.

    >>> domain_of("I watched Harbour Lights last night, and"), domain_of("The soup in the new bistro was")
    ('film', 'restaurant')
    >>> domain_of("My uncle is") is None
    True
    """
    text = prompt.lower()
    pattern, owner = _names()
    votes: Counter[str] = Counter()
    for name in pattern.findall(text):
        votes[owner[name]] += len(name)
    if not votes:
        of_words = _domains_of_words()
        for word in re.findall(r"[a-z'-]+", text):
            sharing = of_words.get(base_form(word), frozenset())
            votes.update(dict.fromkeys(sorted(sharing), 1 / len(sharing)) if sharing else {})
    return max(votes, key=lambda name: (votes[name], name)) if votes else None


def on_domain(words: Sequence[str], domain: str, said: frozenset[str]) -> tuple[int, int]:
    """(number of words of ``domain``, number of words of other domains alone) among ``words``, in lower case.

    Each word counts once, and none that is among ``said``, the base forms of the prompt's words.
    """
    of_words = _domains_of_words()
    own, other = 0, 0
    for word in {base_form(word) for word in words} - said:
        sharing = of_words.get(word)
        if sharing is not None:
            own, other = (own + 1, other) if domain in sharing else (own, other + 1)
    return own, other
