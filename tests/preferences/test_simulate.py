"""Simulated annotators: what they prefer, how noisy they are, and that nothing but the seed decides."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.errors import DataError
from toolkit.preferences.gold import gold_rewards
from toolkit.preferences.reading import read_preferences
from toolkit.preferences.rows import Comparison, prompt_id, write_native
from toolkit.preferences.simulate import ANNOTATORS, Annotator, agreement, annotate, feature, simulate_preferences

PROMPT = "I usually hate horror films, but this one was"
RESPONSES = [
    " the best film I have seen in years, and I loved it.",
    " a bit long. I left early.",
    " terrible from start to finish.",
    " shown at eight in the large hall of the old theatre on the corner of our street.",
]
GOLD = [0.8, 0.0, -0.6, 0.1]


def preferred(comparisons: list[Comparison], responses: list[str], annotator: str) -> dict[frozenset[str], str | None]:
    """The winner's text of every pair of texts, None for a tie."""
    out: dict[frozenset[str], str | None] = {}
    for c in comparisons:
        if c.annotator == annotator:
            pair = frozenset((responses[c.winner], responses[c.loser]))
            out[pair] = responses[c.winner] if c.weight == 1.0 else None
    return out


def test_an_annotator_without_noise_and_bias_follows_the_gold_reward() -> None:
    exact = Annotator("exact", noise_std=0.0)
    comparisons = annotate(PROMPT, RESPONSES, GOLD, [exact], seed=3)
    assert len(comparisons) == math.comb(4, 2)
    assert all(GOLD[c.winner] > GOLD[c.loser] and c.weight == 1.0 for c in comparisons)


def test_near_equal_latent_scores_are_a_tie_of_two_halves() -> None:
    comparisons = annotate(PROMPT, RESPONSES[:2], [0.5, 0.51], [Annotator("exact", 0.0, tie_below=0.02)], seed=0)
    assert comparisons == [Comparison(0, 1, 0.5, "exact"), Comparison(1, 0, 0.5, "exact")]
    decided = annotate(PROMPT, RESPONSES[:2], [0.5, 0.53], [Annotator("exact", 0.0, tie_below=0.02)], seed=0)
    assert decided == [Comparison(1, 0, 1.0, "exact")]


def test_every_pair_is_judged_by_every_annotator() -> None:
    comparisons = annotate(PROMPT, RESPONSES, GOLD, ANNOTATORS, seed=0)
    for annotator in ANNOTATORS:
        pairs = preferred(comparisons, RESPONSES, annotator.name)
        assert pairs.keys() == {frozenset(p) for p in combinations(RESPONSES, 2)}


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(4)), st.permutations(ANNOTATORS), st.integers(0, 5))
def test_the_order_of_responses_and_annotators_changes_nothing(
    order: list[int], annotators: list[Annotator], seed: int
) -> None:
    straight = annotate(PROMPT, RESPONSES, GOLD, ANNOTATORS, seed=seed)
    shuffled = [RESPONSES[i] for i in order]
    turned = annotate(PROMPT, shuffled, [GOLD[i] for i in order], annotators, seed=seed)
    for annotator in ANNOTATORS:
        assert preferred(turned, shuffled, annotator.name) == preferred(straight, RESPONSES, annotator.name)


def test_a_pair_is_judged_alike_whatever_other_responses_there_are() -> None:
    all_four = annotate(PROMPT, RESPONSES, GOLD, ANNOTATORS, seed=1)
    two = annotate(PROMPT, RESPONSES[1:3], GOLD[1:3], ANNOTATORS, seed=1)
    for annotator in ANNOTATORS:
        pair = frozenset(RESPONSES[1:3])
        assert (
            preferred(two, RESPONSES[1:3], annotator.name)[pair] == preferred(all_four, RESPONSES, annotator.name)[pair]
        )


def test_seed_prompt_and_annotator_each_give_other_noise() -> None:
    noisy = [Annotator("a", 5.0), Annotator("b", 5.0)]
    responses = [f" response number {i}." for i in range(12)]
    gold = [0.0] * 12

    def winners(prompt: str, name: str, seed: int) -> list[tuple[int, int]]:
        return [(c.winner, c.loser) for c in annotate(prompt, responses, gold, noisy, seed) if c.annotator == name]

    base = winners("P", "a", 0)
    assert base == winners("P", "a", 0)
    for other in (winners("P", "b", 0), winners("Q", "a", 0), winners("P", "a", 1)):
        same = sum(x == y for x, y in zip(base, other, strict=True)) / len(base)
        assert 0.25 < same < 0.75


def test_the_noise_has_the_stated_standard_deviation() -> None:
    """With a gap of one sd of the difference, sqrt(2) * noise_std, the better response wins with Phi(1) = 0.841."""
    annotator = [Annotator("a", noise_std=0.3, tie_below=0.0)]
    wins = 0
    for n in range(1500):
        (comparison,) = annotate(f"prompt {n}", [" x.", " y."], [0.3 * math.sqrt(2), 0.0], annotator, 0)
        wins += comparison.winner == 0
    assert wins / 1500 == pytest.approx(0.8413, abs=0.03)


def test_features_see_length_format_and_agreement() -> None:
    assert feature("none", PROMPT, RESPONSES[0]) == 0.0
    assert feature("length", PROMPT, " short.") < 0 < feature("length", PROMPT, " word" * 25 + ".")
    assert feature("format", PROMPT, " plain words.") == 0.0
    assert feature("format", PROMPT, "# Title\n- one\n- two") > feature("format", PROMPT, " room 7.") > 0
    hates, loves = "I usually hate operas, and this one was", "I usually love operas, and this one was"
    assert feature("agreement", hates, " terrible.") > 0 > feature("agreement", hates, " wonderful.")
    assert feature("agreement", loves, " wonderful.") > 0 > feature("agreement", loves, " terrible.")
    assert feature("agreement", "I went to the opera on Monday, and it was", " wonderful.") == 0.0
    chat = [{"role": "user", "content": hates}]
    assert feature("agreement", chat, " terrible.") == feature("agreement", hates, " terrible.")


@pytest.mark.parametrize("bias", ["length", "format", "agreement"])
def test_a_bias_turns_preferences_its_way(bias: str) -> None:
    by_bias = {
        "length": (" a hotel near the sea with a long garden, a pool and two rooms for guests.", " a hotel."),
        "format": (' "home": 3 rooms (2 beds)!', " home with rooms and beds."),
        "agreement": (" terrible.", " wonderful."),
    }
    liked, other = by_bias[bias]
    annotator = Annotator("biased", noise_std=0.0, bias=bias, bias_weight=2.0)  # type: ignore[arg-type]
    (comparison,) = annotate("I hated the last hotel, and this one was", [other, liked], [0.1, 0.0], [annotator])
    assert comparison.winner == 1


def test_rows_carry_gold_rewards_and_survive_the_native_format(tmp_path: Path) -> None:
    rows = simulate_preferences([PROMPT, "The hotel was"], [RESPONSES, [*RESPONSES[:2], RESPONSES[0]]], seed=2)
    assert [row.prompt_id for row in rows] == [prompt_id(PROMPT), prompt_id("The hotel was")]
    assert rows[1].responses == RESPONSES[:2]  # equal samples are one response
    assert rows[0].gold == pytest.approx(gold_rewards([PROMPT] * 4, RESPONSES), abs=1e-4)
    assert rows[0].comparisons == annotate(PROMPT, RESPONSES, rows[0].gold or [], ANNOTATORS, seed=2)
    write_native(rows, tmp_path / "rows.jsonl.gz")
    assert read_preferences(str(tmp_path / "rows.jsonl.gz")).rows == rows


def test_agreement_counts_decided_pairs() -> None:
    row = simulate_preferences(["P"], [[" a.", " b."]], [Annotator("x", 0.0)])[0]

    def of(*comparisons: Comparison) -> float | None:
        return agreement([replace(row, responses=[" a.", " b.", " c."], comparisons=list(comparisons))])

    same = [Comparison(0, 1, 1.0, "x"), Comparison(0, 1, 1.0, "y")]
    other = [Comparison(0, 2, 1.0, "x"), Comparison(2, 0, 1.0, "y")]
    tied = [Comparison(1, 2, 1.0, "x"), Comparison(1, 2, 0.5, "y"), Comparison(2, 1, 0.5, "y")]
    assert of(*same, *other, *tied) == 0.5
    assert of(*tied) is None


def test_more_noise_is_less_agreement() -> None:
    rng = random.Random(0)
    prompts = [f"Prompt {n}" for n in range(100)]
    moods = ("I was happy with the room", "I was angry about the room", "we went to the room")
    responses = [[f" {rng.choice(moods)} on day {k}." for k in range(4)] for _ in prompts]
    levels = []
    for noise in (0.05, 0.5, 20.0):
        rows = simulate_preferences(prompts, responses, [Annotator("a", noise), Annotator("b", noise)])
        levels.append(agreement(rows) or 0.0)
    assert levels[0] > levels[1] + 0.1 > levels[2] + 0.1 and levels[2] == pytest.approx(0.5, abs=0.1), levels


def test_wrong_input_is_named() -> None:
    with pytest.raises(DataError, match="K >= 2"):
        annotate(PROMPT, [" one."], [0.0])
    with pytest.raises(DataError, match="distinct"):
        simulate_preferences([PROMPT], [[" one.", " one."]])
    with pytest.raises(DataError, match="2 gold rewards for 3"):
        annotate(PROMPT, RESPONSES[:3], [0.0, 0.1])
    with pytest.raises(DataError, match="prompts 1 and 2 are the same"):
        simulate_preferences([PROMPT, PROMPT], [RESPONSES, RESPONSES])
    with pytest.raises(DataError, match="1 lists of responses for 2 prompts"):
        simulate_preferences([PROMPT, "x"], [RESPONSES])


def test_flipped_labels_are_the_stated_share_and_depend_on_the_pair_alone() -> None:
    flipping = [Annotator("a", noise_std=0.0, flip_share=0.2)]
    flips = 0
    for n in range(2000):
        (comparison,) = annotate(f"prompt {n}", [" x.", " y."], [1.0, 0.0], flipping)
        (turned,) = annotate(f"prompt {n}", [" y.", " x."], [0.0, 1.0], flipping)
        assert comparison.winner == 1 - turned.winner
        flips += comparison.winner == 1
    assert flips / 2000 == pytest.approx(0.2, abs=0.03)
    tied = annotate(PROMPT, [" x.", " y."], [0.0, 0.0], [Annotator("a", 0.0, flip_share=1.0, tie_below=0.0)])
    assert [c.weight for c in tied] == [0.5, 0.5]  # equal latent scores are a tie, and a tie has no wrong winner


def test_gold_rewards_that_the_caller_knows_are_the_truth() -> None:
    known = [[0.3, 2.0, 0.3]]
    rows = simulate_preferences(["P"], [[" a.", " b.", " a."]], [Annotator("exact", 0.0)], gold=known)
    assert rows[0].gold == [0.3, 2.0] and [c.winner for c in rows[0].comparisons] == [1]
