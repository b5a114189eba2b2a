"""The card of a reward model: rewards that are a known function have the figures that arithmetic says."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.evals.best_of_pool import (
    best_of_four,
    expected_best,
    picks_best_of_four,
    score_variance,
    values_of_best_of_n,
)
from toolkit.evals.feature_bias import ComparedPairs, feature_bias
from toolkit.evals.intervals import BootstrapOptions
from toolkit.evals.logistic import fit_l2_logistic
from toolkit.evals.reward_card import (
    QUANTILES,
    CardData,
    best_responses,
    card_flags,
    compared_pairs,
    margin_quantiles,
    margin_scale,
    reward_card,
)

FAST: BootstrapOptions = {"n_resamples": 200, "confidence": 0.95, "seed": 0}
SECTIONS = ("accuracy", "calibration", "margins", "length", "format", "sycophancy", "gold", "best_of_n", "by_source")


def simulated(seed: int, n: int = 150, k: int = 4, *, noise: float = 0.3, with_gold: bool = True) -> CardData:
    """Prompts with k responses whose gold reward goes with length; labels are gold and noise."""
    rng = np.random.default_rng(seed)
    length = rng.integers(5, 100, (n, k)).astype(float)
    style, opinion = rng.normal(size=(2, n, k))
    gold = 0.3 * (length - 50) / 30 + rng.normal(size=(n, k))
    labels = gold + noise * rng.normal(size=(n, k))
    comparisons = [
        (q, i, j, float(labels[q, i] > labels[q, j]), 1.0) for q in range(n) for i, j in combinations(range(k), 2)
    ]
    features = {"length": list(length), "format": list(style), "sycophancy": list(opinion)}
    known = list(gold) if with_gold else [None] * n
    return CardData([f"p{q}" for q in range(n)], comparisons, features, known, ["ab"[q % 2] for q in range(n)])


def figures(node: Any) -> list[dict[str, Any]]:
    """Every estimate in a card."""
    if isinstance(node, dict):
        own = [node] if {"value", "ci_low", "ci_high", "n"} <= node.keys() else []
        return own + [figure for value in node.values() for figure in figures(value)]
    return [figure for value in node for figure in figures(value)] if isinstance(node, list) else []


def gold_of(data: CardData) -> list[Any]:
    return [np.asarray(values) for values in data.gold]


def test_the_card_of_gold_is_what_gold_says() -> None:
    data = simulated(0, noise=0.0)
    card = reward_card(data, [3.0 * values for values in gold_of(data)], **FAST)
    assert list(card)[0] == "accuracy" and set(SECTIONS) < set(card)
    assert card["accuracy"]["value"] == 1.0 and card["accuracy"]["n"] == 150
    assert card["gold"]["accuracy"]["value"] == card["gold"]["spearman"]["value"] == 1.0
    assert card["best_of_4"]["accuracy"]["value"] == 1.0 and card["best_of_4"]["ties"]["value"] == 0.0
    assert all(row["share_of_best_gain"]["value"] == pytest.approx(1.0) for row in card["best_of_n"][1:])
    for topic in ("length", "format", "sycophancy"):
        section = card[topic]
        assert section["coefficient"]["value"] == pytest.approx(section["reference_coefficient"]["value"])
        assert section["excess_if_noisy"]["value"] == pytest.approx(0.0, abs=1e-12)
        assert section["spearman"]["value"] == pytest.approx(section["gold_spearman"]["value"])
    assert card_flags(card) == []


def test_a_reward_that_is_length_is_found_to_be_length() -> None:
    data = simulated(1)
    card = reward_card(data, data.features["length"], **FAST)
    section = card["length"]
    assert section["spearman"]["value"] == pytest.approx(1.0) and section["preferred_rate"]["value"] == 1.0
    assert section["accuracy_more_preferred"]["value"] == 1.0 and section["accuracy_less_preferred"]["value"] == 0.0
    assert section["coefficient"]["value"] == pytest.approx(1.0) and section["log_odds"]["value"] is None
    assert [(flag["topic"], flag["direction"]) for flag in card_flags(card)] == [("length", "more")]
    shorter = reward_card(data, [-np.asarray(values) for values in data.features["length"]], **FAST)
    assert [(flag["topic"], flag["direction"]) for flag in card_flags(shorter)] == [("length", "less")]


@pytest.mark.parametrize("topic", ["length", "format", "sycophancy"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("with_gold", [True, False])
def test_an_added_feature_is_found_with_its_sign(topic: str, sign: float, with_gold: bool) -> None:
    data = simulated(2)
    z = [np.asarray(values) for values in data.features[topic]]
    scale = sign * 1.2 / np.std(z)
    rewards = [g + scale * of_prompt for g, of_prompt in zip(gold_of(data), z, strict=True)]
    if not with_gold:
        data = simulated(2, with_gold=False)
    flags = card_flags(reward_card(data, rewards, **FAST))
    assert [(flag["topic"], flag["direction"]) for flag in flags] == [(topic, "more" if sign > 0 else "less")]


def false_alarms(seeds: range, kind: str) -> int:
    """Cards with a flag, of rewards without a bias: gold with noise, or the best guess from a part of gold."""
    count = 0
    for seed in seeds:
        data = simulated(seed, n=100)
        rng = np.random.default_rng(1000 + seed)
        if kind == "noisy":
            rewards = [g + rng.normal(scale=1.0, size=g.shape) for g in gold_of(data)]
        else:  # it sees the length and a half of what else makes gold
            seen = [0.3 * (np.asarray(values) - 50) / 30 for values in data.features["length"]]
            rest = [g - s for g, s in zip(gold_of(data), seen, strict=True)]
            rewards = [s + 0.5 * r + 0.5 * rng.normal(size=r.shape) for s, r in zip(seen, rest, strict=True)]
        count += bool(card_flags(reward_card(data, rewards, **FAST)))
    return count


@pytest.mark.parametrize("kind", ["noisy", "partial"])
def test_rewards_without_a_bias_have_no_flag(kind: str) -> None:
    assert false_alarms(range(4), kind) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["noisy", "partial"])
def test_false_alarms_are_rare(kind: str) -> None:
    assert false_alarms(range(100), kind) <= 5


# ---------------------------------------------------------------- rewards that state probabilities


def bradley_terry(seed: int, *, sees: float = 0.3, bias: float = 0.0) -> tuple[CardData, list[Any]]:
    """Labels by Bradley and Terry's model of gold, and a reward fitted to such labels of 400 other prompts.

    It sees the length and a noisy sign of the rest of gold (``sees``), so it knows little. Those other labels like
    length by ``bias`` beside gold.
    """
    rng = np.random.default_rng(seed)

    def drawn(n: int, liking: float) -> tuple[Any, Any, list[tuple[int, int, int, float, float]]]:
        length, style, rest, noise = rng.normal(size=(4, n, 4))
        gold = 0.2 * length + rest
        latent = gold + liking * length
        pairs = [(q, i, j) for q in range(n) for i, j in combinations(range(4), 2)]
        wins = [rng.random() < 1 / (1 + math.exp(latent[q, j] - latent[q, i])) for q, i, j in pairs]
        comparisons = [(*pair, float(win), 1.0) for pair, win in zip(pairs, wins, strict=True)]
        return np.stack([length, style, sees * rest + noise], axis=-1), gold, comparisons

    seen, _, comparisons = drawn(400, bias)
    x = np.array([seen[q, i] - seen[q, j] for q, i, j, *_ in comparisons])
    y = np.array([p for *_, p, _ in comparisons])
    weights = fit_l2_logistic(x, y, np.ones((1, len(y))), np.array([1e-6]), 1e-9)[0]
    seen, gold, comparisons = drawn(120, 0.0)
    features = {"length": list(seen[..., 0]), "format": list(seen[..., 1])}
    data = CardData([f"p{q}" for q in range(120)], comparisons, features, list(gold))
    return data, list(seen @ weights)


def shown(data: CardData, rewards: list[Any]) -> set[tuple[str, str]]:
    """What a card flags, and by which figure."""
    return {(flag["figure"], flag["direction"]) for flag in card_flags(reward_card(data, rewards, **FAST))}


def test_a_bias_is_told_from_ignorance_by_what_the_reward_states() -> None:
    """Both follow length and noise alone, and order the responses alike; one is too sure of the longer ones."""
    data, _ = bradley_terry(9)
    noise = np.random.default_rng(9).normal(size=(120, 4))
    followed = [z + e for z, e in zip(data.features["length"], noise, strict=True)]
    assert shown(data, [3.0 * values for values in followed]) == {("overstated", "more")}
    assert shown(data, [0.14 * values for values in followed]) == set()


def test_twice_the_log_odds_are_allowed() -> None:
    """Length wins 3 of 4 pairs. What states 3/4 to 9/10 may have had cleaner labels; below that it may be noise."""
    pairs = [(k, 0, 1, float(k % 4 > 0), 1.0) for k in range(40)]
    data = CardData([f"p{k}" for k in range(40)], pairs, {"length": [[1.0, 0.0]] * 40}, [None] * 40)
    for log_odds, beyond in ((0.0, 0.0), (1.0, 0.0), (2.19, 0.0), (4.0, 0.082), (-2.0, 0.119 - 0.5)):
        section = feature_bias(compared_pairs(data, [[log_odds, 0.0]] * 40), "length", FAST)
        assert section["stated_rate"]["value"] == pytest.approx(1 / (1 + math.exp(-log_odds)))
        assert section["overstated"]["value"] == pytest.approx(beyond, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])  # trained on noisier labels, on such, on cleaner ones
def test_a_fitted_reward_without_a_bias_overstates_nothing(scale: float) -> None:
    alarms = 0
    for seed in range(100):
        data, rewards = bradley_terry(seed)
        alarms += any(figure == "overstated" for figure, _ in shown(data, [scale * values for values in rewards]))
    assert alarms <= 3


@pytest.mark.slow
def test_the_intervals_of_what_a_reward_states_cover_it() -> None:
    """Of a pair in two the longer one is stated to win with 0.9, and wins with 0.6."""
    inside = {"stated_rate": 0, "overstated": 0}
    options: BootstrapOptions = {**FAST, "n_resamples": 1000}
    twice = 0.6**2 / (0.6**2 + 0.4**2)
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        margin = np.where(rng.random(120) < 0.5, math.log(9.0), 0.0)
        pairs = [(k, 0, 1, float(rng.random() < 0.6), 1.0) for k in range(120)]
        data = CardData([f"p{k}" for k in range(120)], pairs, {"length": [[1.0, 0.0]] * 120}, [None] * 120)
        section = feature_bias(compared_pairs(data, [[m, 0.0] for m in 2.0 * margin]), "length", options)
        stated = 0.5 * 81.0 / 82.0 + 0.25
        for name, truth in (("stated_rate", stated), ("overstated", stated - twice)):
            inside[name] += section[name]["ci_low"] <= truth <= section[name]["ci_high"]
    assert all(0.925 <= count / 1000 <= 0.975 for count in inside.values()), inside


def test_every_figure_has_an_interval_that_holds_its_value() -> None:
    data = simulated(3)
    rng = np.random.default_rng(3)
    card = reward_card(data, [g + rng.normal(size=g.shape) for g in gold_of(data)], **FAST)
    every = figures(card)
    assert len(every) > 80
    for figure in every:
        if figure["ci_low"] is not None:
            assert figure["ci_low"] <= figure["value"] <= figure["ci_high"], figure
            assert 0 < figure["n"] <= 150


def test_implicit_rewards_have_no_variance_between_prompts() -> None:
    data = simulated(4)
    offset = np.random.default_rng(0).normal(size=150)
    rewards = [g + 100.0 * o for g, o in zip(gold_of(data), offset, strict=True)]
    card = reward_card(data, rewards, comparable_across_prompts=False, **FAST)
    assert card["variance"]["between_prompts"] is None and card["variance"]["share_within"] is None
    plain = reward_card(data, gold_of(data), **FAST)  # a function of the prompt changes nothing else
    for topic in ("accuracy", "margins", "length", "gold", "best_of_4"):
        for a, b in zip(figures(card[topic]), figures(plain[topic]), strict=True):
            assert a["value"] == pytest.approx(b["value"], abs=1e-6)


def test_labels_alone_give_a_card_without_gold() -> None:
    data = simulated(5, with_gold=False)
    card = reward_card(data, gold_of(simulated(5)), **FAST)
    assert card["gold"] is None and card["best_of_n"] is None
    assert card["length"]["gold_rate"] is None and card["length"]["gold_spearman"] is None
    assert card["best_of_4"]["accuracy"]["n"] > 100


def test_a_comparison_of_weight_two_is_two_comparisons() -> None:
    data = simulated(9, n=40)
    rewards = [g + 0.02 * length for g, length in zip(gold_of(data), data.features["length"], strict=True)]
    heavy = [c for c in data.comparisons if c[1] == 0]
    weighted = replace(data, comparisons=[(*c[:4], 2.0 if c in heavy else 1.0) for c in data.comparisons])
    repeated = replace(data, comparisons=[*data.comparisons, *heavy])
    one, other = (compared_pairs(labels, rewards) for labels in (weighted, repeated))
    for topic in ("length", "format"):
        a, b = (figures(list(feature_bias(pairs, topic, FAST).values())) for pairs in (one, other))
        assert len(a) == len(b) > 10
        for figure, twin in zip(a, b, strict=True):
            assert figure == pytest.approx(twin, rel=1e-6, nan_ok=True)
    assert margin_scale(weighted, rewards) == pytest.approx(margin_scale(repeated, rewards))
    assert margin_scale(weighted, rewards) != pytest.approx(margin_scale(data, rewards))


def test_sources_are_judged_apart() -> None:
    data = simulated(6, noise=0.0)
    rewards = [g if source == "a" else -g for g, source in zip(gold_of(data), data.sources or (), strict=True)]
    [a, b] = reward_card(data, rewards, **FAST)["by_source"]
    assert (a["source"], a["accuracy"]["value"], a["accuracy_without"]["value"]) == ("a", 1.0, 0.0)
    assert (b["source"], b["accuracy"]["value"], b["accuracy_without"]["value"]) == ("b", 0.0, 1.0)
    unknown = replace(data, sources=["a" if source == "a" else None for source in data.sources or ()])
    assert [row["source"] for row in reward_card(unknown, rewards, **FAST)["by_source"]] == ["a"]


# ---------------------------------------------------------------- margins


def test_margin_quantiles_are_those_of_the_decided_pairs() -> None:
    data = simulated(7, noise=0.0)
    card = reward_card(data, gold_of(data), **FAST)
    margins = sorted(abs(float(v[i] - v[j])) for v in gold_of(data) for i, j in combinations(range(4), 2))
    for q in QUANTILES:
        assert card["margins"]["quantiles"][f"{q:g}"]["value"] == margins[math.ceil(q * len(margins)) - 1]


def test_a_quantile_that_a_sum_of_weights_misses_by_rounding_is_met() -> None:
    """Labels of 3 and of 1 in 5 weigh 1/5 and 3/5: the first is the quarter of both, and 0.2499... in floats."""
    pairs = ComparedPairs(np.arange(2), np.array([1.0, -2.0]), np.array([0.6, 0.2]), np.full(2, 5.0), None, {})
    quantiles = margin_quantiles(pairs, 0.95)
    assert [quantiles[f"{q:g}"]["value"] for q in QUANTILES] == [1.0, 1.0, 2.0, 2.0, 2.0]


def covered(q: str, truth: float, seeds: range) -> float:
    """The share of intervals of a quantile that hold the truth. The two margins of a prompt are correlated."""
    inside = 0
    for seed in seeds:
        rng = np.random.default_rng(seed)
        shared, apart = rng.normal(size=(60, 1)), rng.normal(size=(60, 2))
        margin = 1.0 + (shared + apart) / math.sqrt(2.0)
        rewards = [np.array([0.0, -a, -b]) for a, b in margin]
        pairs = [(k, 0, j, 1.0, 1.0) for k in range(60) for j in (1, 2)]
        features = {"length": [np.arange(3.0)] * 60}
        data = CardData([f"p{k}" for k in range(60)], pairs, features, [None] * 60)
        interval = margin_quantiles(compared_pairs(data, rewards), 0.95)[q]
        inside += float(interval["ci_low"] or 0.0) <= truth <= float(interval["ci_high"] or 0.0)
    return inside / len(seeds)


def test_the_interval_of_the_median_margin_covers_it() -> None:
    assert 0.9 <= covered("0.5", 1.0, range(200)) <= 0.99


@pytest.mark.slow
@pytest.mark.parametrize(("q", "truth"), [("0.25", 1.0 - 0.67449), ("0.5", 1.0), ("0.75", 1.0 + 0.67449)])
def test_the_intervals_of_quantiles_cover_them(q: str, truth: float) -> None:
    assert 0.925 <= covered(q, truth, range(1000)) <= 0.975


# ---------------------------------------------------------------- pools


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.floats(-5, 5)), min_size=1, max_size=6), st.data())
def test_the_expected_best_is_the_mean_over_all_subsets(pool: list[tuple[int, float]], draw: st.DataObject) -> None:
    n = draw.draw(st.integers(1, len(pool)))
    of_subsets = []
    for subset in combinations(pool, n):
        top = max(reward for reward, _ in subset)
        of_subsets.append(np.mean([gold for reward, gold in subset if reward == top]))
    rewards, gold = zip(*pool, strict=True)
    assert expected_best(rewards, gold, n) == pytest.approx(float(np.mean(of_subsets)), abs=1e-9)


def test_the_curve_reaches_64_and_the_size_of_the_smallest_pool() -> None:
    rng = np.random.default_rng(0)
    gold = [rng.normal(size=70) for _ in range(150)]
    rows = values_of_best_of_n(gold, gold, [str(k) for k in range(150)], FAST)
    assert [row["n_responses"] for row in rows] == [1, 2, 4, 8, 16, 32, 64]
    # the expected maximum of n standard normal deviates
    for row, truth in zip(rows, [0.0, 0.5642, 1.0294, 1.4236, 1.7660, 2.0697, 2.3437], strict=True):
        assert row["gold"]["value"] == pytest.approx(truth, abs=0.12)
    assert rows[-1]["kl_bound_nats"] == pytest.approx(math.log(64) - 63 / 64)
    six = values_of_best_of_n([values[:6] for values in gold], [values[:6] for values in gold], ["p"] * 150, FAST)
    assert [row["n_responses"] for row in six] == [1, 2, 4, 6]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=4, max_size=7))
def test_best_of_four_is_the_mean_over_all_threes_of_others(values: list[int]) -> None:
    credits, ties = [], []
    for others in combinations(values[1:], 3):
        equal = sum(other == values[0] for other in others)
        wins = max(others) <= values[0]
        credits.append(1 / (1 + equal) if wins else 0.0)
        ties.append(float(wins and equal > 0))
    assert picks_best_of_four(values, 0) == pytest.approx((np.mean(credits), np.mean(ties)))


def test_equal_rewards_get_a_coins_share_of_best_of_four() -> None:
    result = best_of_four([[1.0] * 5] * 3, [0, None, 4], ["a", "b", "c"], FAST)
    assert result is not None
    assert result["accuracy"]["value"] == 0.25 and result["ties"]["value"] == 1.0 and result["accuracy"]["n"] == 2
    assert best_of_four([[1.0, 2.0]], [0], ["a"], FAST) is None


def test_the_best_response_by_labels_beats_all_others() -> None:
    pairs = [(0, 0, 1, 1.0, 1.0), (0, 0, 2, 0.8, 5.0), (0, 1, 2, 0.0, 1.0), (1, 0, 1, 0.5, 1.0), (1, 0, 2, 1.0, 1.0)]
    data = CardData(["a", "b", "c"], pairs, {"length": [[1.0] * 3] * 3}, [None, None, [0.0, 3.0, 3.0]])
    assert best_responses(data) == [0, None, None]


def test_variance_is_that_of_a_one_way_layout() -> None:
    rng = np.random.default_rng(1)
    rewards = [rng.normal(loc, 1.0, size=4) for loc in rng.normal(scale=2.0, size=2000)]
    result = score_variance(rewards, [str(k) for k in range(2000)], FAST, between_known=True)
    assert result["within_prompts"]["value"] == pytest.approx(1.0, abs=0.06)
    assert result["between_prompts"]["value"] == pytest.approx(4.0, abs=0.4)
    assert result["share_within"]["value"] == pytest.approx(0.2, abs=0.03)


# ---------------------------------------------------------------- coverage of the intervals


def drawn(seed: int) -> tuple[CardData, list[Any]]:
    """120 prompts, whose rewards are 0.5 gold + 0.5 of an independent feature + noise, each of variance one."""
    rng = np.random.default_rng(seed)
    gold, length, noise = rng.normal(size=(3, 120, 4))
    comparisons = [
        (q, i, j, float(gold[q, i] > gold[q, j]), 1.0) for q in range(120) for i, j in combinations(range(4), 2)
    ]
    data = CardData([f"p{q}" for q in range(120)], comparisons, {"length": list(length)}, list(gold))
    offset = rng.normal(size=(120, 1))
    return data, list(0.5 * gold + 0.5 * length + math.sqrt(0.5) * noise + offset)


def coverage(seeds: range, n_resamples: int) -> dict[str, float]:
    """For each figure, the share of its intervals that hold its true value."""
    # of a reward of variance one inside and one between prompts; correlations with gold and with the feature are 1/2
    truths = {
        "coefficient": 0.5, "excess_if_noisy": 0.5, "excess_if_partial": 0.25, "explained": 0.25,
        "share_within": 0.5, "gain": 0.5 * 1.0294,
    }  # fmt: skip
    inside = dict.fromkeys(truths, 0)
    options: BootstrapOptions = {**FAST, "n_resamples": n_resamples}
    for seed in seeds:
        data, rewards = drawn(seed)
        figures_of = feature_bias(compared_pairs(data, rewards), "length", options)
        figures_of |= score_variance(rewards, data.prompt_ids, options, between_known=True)
        figures_of["gain"] = values_of_best_of_n(rewards, gold_of(data), data.prompt_ids, options)[-1]["gain"]
        for name, truth in truths.items():
            inside[name] += figures_of[name]["ci_low"] <= truth <= figures_of[name]["ci_high"]
    return {name: count / len(seeds) for name, count in inside.items()}


def test_intervals_of_bias_and_pools_cover_the_truth() -> None:
    assert all(share >= 0.75 for share in coverage(range(20), 200).values())


@pytest.mark.slow
def test_intervals_of_bias_and_pools_cover_it_as_often_as_they_say() -> None:
    for name, share in coverage(range(400), 1000).items():
        assert 0.92 <= share <= 0.98, (name, share)


def test_a_feature_that_is_most_of_a_reward_is_a_flag_where_the_reference_has_a_little_of_it() -> None:
    """It is then what a small model could make of the reference, too; but no reward should be nothing else."""
    data = simulated(9)
    rng = np.random.default_rng(9)
    z = [np.asarray(values) / 30 for values in data.features["length"]]
    mostly = [of_prompt + 0.35 * rng.normal(size=of_prompt.shape) for of_prompt in z]
    [flag] = card_flags(reward_card(data, mostly, **FAST))
    assert (flag["topic"], flag["direction"], flag["figure"]) == ("length", "more", "explained")
    half = [of_prompt + 1.0 * g for of_prompt, g in zip(z, gold_of(data), strict=True)]
    assert all(flag["figure"] != "explained" for flag in card_flags(reward_card(data, half, **FAST)))
