"""The shipped domains: which of them a prompt is about, and that no list of words is on every subject."""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from toolkit.preferences.domains import base_form, domain_of, domains, on_domain
from toolkit.preferences.gold import read_opening

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def build_openings() -> ModuleType:
    sys.path.insert(0, str(REPO / "scripts"))
    try:
        import build_openings
    finally:
        sys.path.pop(0)
    return build_openings


def test_no_word_is_in_more_than_four_domains() -> None:
    sharing = Counter(word for domain in domains().values() for word in domain.words)
    assert len(domains()) == 18 and max(sharing.values()) <= 4
    assert all(word == word.lower() for word in sharing)


def test_every_opening_is_recognised_with_its_domain_and_stance(build_openings: ModuleType) -> None:
    """Of each template with each domain: the gold reward reads back what the template was filled with."""
    rng = random.Random(0)
    wrong = []
    for opinion, templates in build_openings.OPINIONS.items():
        for template in templates:
            turned = opinion == "negative" and ", but {thing}" in template
            for name, domain in domains().items():
                text = build_openings._fill(template, domain, rng)
                opening = read_opening(text)
                assert opening.domain == name, text
                if opening.stance != (-1 if opinion == "negative" and not turned else 1):
                    wrong.append(text)
    assert len(wrong) <= 2, wrong  # of 666


@pytest.mark.parametrize(
    ("prompt", "domain"),
    [
        ("The soup in the new bistro was", "restaurant"),
        ("My new camera phone has", "phone"),
        ("The pilot told the passengers that the runway", "travel"),
        ("The lions and the elephants were", "museum"),
        ("What do you think of it?", None),
        ("", None),
    ],
)
def test_a_prompt_without_a_known_name_is_read_by_its_words(prompt: str, domain: str | None) -> None:
    assert domain_of(prompt) == domain


def test_plurals_and_possessives_are_the_same_word() -> None:
    words = ["pastries", "pastry", "barista's", "sandwiches", "sandwich", "cups"]
    assert {base_form(word) for word in words} == {"pastry", "barista", "sandwich", "cup"}


def test_each_word_counts_once_and_not_where_the_prompt_said_it() -> None:
    words = ["the", "menu", "and", "menus", "and", "the", "pool", "and", "bed"]
    assert on_domain(words, "hotel", frozenset()) == (2, 1)
    assert on_domain(words, "hotel", frozenset({"pool"})) == (1, 1)
    assert on_domain(words, "restaurant", frozenset()) == (1, 2)
