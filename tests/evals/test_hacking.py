from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from toolkit.errors import DataError
from toolkit.evals.hacking import FEATURE_NAMES, corpus_drift, drift, text_features, words_beside
from toolkit.evals.summary import hacking_rows

WORDS = [
    "the",
    "film",
    "was",
    "slow",
    "but",
    "kind",
    "and",
    "quite",
    "funny",
    "in",
    "its",
    "own",
    "odd",
    "little",
    "way",
    "with",
    "a",
    "cast",
    "that",
    "tries",
    "hard",
]


def sample_texts(n: int, seed: int, vocabulary: int = len(WORDS)) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS[:vocabulary], size=rng.integers(10, 20))) + "." for _ in range(n)]


def features(texts: Sequence[str], others: Sequence[str] | None = None, **more: Any) -> dict[str, Any]:
    """Of texts beside others to the same prompts; beside themselves, all of each text counts."""
    others = texts if others is None else others
    return text_features(texts, words_beside(range(len(texts)), others, range(len(others))), **more)


def test_features_by_hand() -> None:
    f = features(["Good good good good!", "- one\n* two\n\nThree lines. Really!", "", "two words"], eos=[1, 0, 1, 1])
    assert f["n_words"].tolist() == [4, 5, 0, 2] and f["n_chars"][0] == 20
    assert f["distinct_1"][0] == 1 / 4 and f["distinct_2"][0] == 1 / 3 and f["distinct_3"][0] == 1 / 2
    assert f["repetition"][0] == 1 / 2 and f["repetition"][1] == 0.0
    assert np.isnan(f["distinct_1"][2]) and np.isnan(f["repetition"][3])  # too short to say
    assert f["exclamation_density"].tolist() == [1.0, 0.5, 0.0, 0.0]
    assert f["list_density"].tolist() == pytest.approx([0, 2 / 3, 0, 0])
    assert f["eos"].tolist() == [1, 0, 1, 1]


def test_the_corpus_shows_what_single_texts_hide() -> None:
    same, sft = ["a fine film indeed"] * 10, sample_texts(10, 0)
    assert features(same, sft)["distinct_2"].tolist() == [1.0] * 10
    row = next(r for r in corpus_drift(same, sft, np.arange(10)) if r["feature"] == "corpus_distinct_2")
    assert row["policy"] == pytest.approx(3 / 30) and row["flagged"]
    assert corpus_drift(["word"] * 10, sft, np.arange(10))[-1]["feature"] == "corpus_distinct_1"  # it has no 2-grams


def test_diversity_counts_equal_numbers_of_words_by_hand() -> None:
    """Each response beside each of the other side: "a a b b" beside 2 words and 3 words, and these beside 4."""
    policy, sft = features_of_prompt(["a a b b"], ["c d", "e e e"])
    # 2 of 4 words hold 1 + 2/3 distinct ones on average, 3 of them always both
    assert policy["distinct_1"].tolist() == pytest.approx([(5 / 6 + 2 / 3) / 2])
    assert sft["distinct_1"].tolist() == pytest.approx([1.0, 1 / 3])
    assert policy["distinct_3"].tolist() == [1.0]  # beside the text that has a 3-gram
    assert np.isnan(sft["distinct_3"][0]) and sft["repetition"][1] == 0.0


def features_of_prompt(policy: list[str], sft: list[str]) -> list[dict[str, Any]]:
    sides = ((policy, sft), (sft, policy))
    return [text_features(of, words_beside([0] * len(of), to, [0] * len(to))) for of, to in sides]


ZIPF = 1.0 / np.arange(1, 2001)


def zipf_texts(seed: int, n_words: tuple[int, int] = (10, 20), vocabulary: int = 2000) -> list[str]:
    """Texts of words with the frequencies of a language."""
    rng = np.random.default_rng(seed)
    p = ZIPF[:vocabulary] / ZIPF[:vocabulary].sum()
    return [" ".join(f"w{k}" for k in rng.choice(vocabulary, rng.integers(*n_words), p=p)) for _ in range(100)]


def changed_diversity(policy: list[str], sft: list[str]) -> set[str]:
    tables = (
        [{"prompt_id": f"p{k}", "response": text, "truncated": False, "n_tokens": 1} for k, text in enumerate(texts)]
        for texts in (policy, sft)
    )
    rows = hacking_rows(*tables, {"n_resamples": 300, "confidence": 0.95, "seed": 0})
    assert {*FEATURE_NAMES} == {row["feature"] for row in rows}
    return {r["feature"] for r in rows if r["flagged"] and ("distinct" in r["feature"] or r["feature"] == "repetition")}


@pytest.mark.parametrize("seed", range(5))
def test_length_alone_is_no_loss_of_diversity(seed: int) -> None:
    sft, again = zipf_texts(3 * seed), zipf_texts(3 * seed + 1)
    joined = [f"{a} {b}" for a, b in zip(again, zipf_texts(3 * seed + 2), strict=True)]
    assert changed_diversity(joined, sft) == set() == changed_diversity(sft, joined) == changed_diversity(again, sft)


def test_a_loss_of_diversity_is_flagged_at_any_length() -> None:
    sft = zipf_texts(0, (40, 60))
    everywhere = {"distinct_1", "corpus_distinct_1", "corpus_distinct_2"}
    assert everywhere <= changed_diversity(zipf_texts(1, (40, 60), 30), sft)
    assert everywhere <= changed_diversity(zipf_texts(1, (80, 120), 30), sft)
    # so short that its share of distinct words is that of SFT
    assert "corpus_distinct_1" in changed_diversity(zipf_texts(1, (8, 12), 300), sft)
    looping = [text + " great" * 50 for text in zipf_texts(1, (40, 60))]  # from where SFT has ended
    assert {"distinct_1", "repetition"} <= changed_diversity(looping, sft)


def test_drift_flags_what_changed_and_only_that() -> None:
    sft = sample_texts(60, 0)
    policy = [t[:-1] + "! great! great! great! great! great! great!" for t in sft]
    rows = {r["feature"]: r for r in drift(features(policy, sft), features(sft, policy), np.arange(60))}
    assert rows["exclamation_density"]["flagged"] and rows["n_words"]["flagged"] and rows["repetition"]["flagged"]
    assert rows["n_words"]["difference"] == pytest.approx(6.0)
    assert not rows["list_density"]["flagged"] and rows["list_density"]["difference"] == 0.0
    assert rows["n_chars"]["n_prompts"] == 60


@pytest.mark.parametrize(("n", "flagged"), [(5, False), (6, True)])
def test_constant_difference_has_no_interval_and_goes_by_the_sign_test(n: int, flagged: bool) -> None:
    row = drift({"n_chars": [50.0] * n}, {"n_chars": [10.0] * n}, np.arange(n))[0]
    assert row["ci_low"] is None and row["difference"] == 40.0 and row["flagged"] is flagged
    assert drift({"n_chars": [10.0] * n}, {"n_chars": [10.0] * n}, np.arange(n))[0]["flagged"] is False


def test_differences_that_are_equal_but_for_rounding_go_by_the_sign_test() -> None:
    row = drift({"n_tokens": [0.4, 0.5]}, {"n_tokens": [0.3, 0.4]}, [0, 1])[0]
    assert 0.4 - 0.3 != 0.5 - 0.4
    assert (row["ci_low"], row["ci_high"], row["flagged"]) == (None, None, False)


def test_a_small_significant_change_is_not_flagged() -> None:
    rng = np.random.default_rng(0)
    sft = rng.normal(100, 10, 400)
    row = drift({"n_chars": sft + rng.normal(5, 1, 400)}, {"n_chars": sft}, np.arange(400))[0]
    assert row["ci_low"] > 0 and not row["flagged"]  # type: ignore[operator]
    assert drift({"n_chars": sft + 30 + rng.normal(size=400)}, {"n_chars": sft}, np.arange(400))[0]["flagged"]


def test_same_policy_is_rarely_flagged() -> None:
    flagged = 0
    for seed in range(20):
        texts = [sample_texts(40, 2 * seed + k) for k in (0, 1)]
        a, b = features(*texts), features(*texts[::-1])
        flagged += sum(bool(r["flagged"]) for r in drift(a, b, np.arange(40), n_resamples=300))
    assert flagged <= 8  # 160 comparisons at 5%


def test_samples_of_a_prompt_are_averaged_and_pairing_is_by_prompt() -> None:
    policy = {"n_chars": [10.0, 30.0, 5.0, np.nan]}
    sft = {"n_chars": [4.0, 1.0, 9.0]}
    rows = drift(policy, sft, ["p", "p", "q", "r"], prompt_index_sft=["q", "p", "r"])
    assert rows[0]["n_prompts"] == 2  # r has no value on one side
    assert rows[0]["policy"] == pytest.approx((20 + 5) / 2) and rows[0]["sft"] == pytest.approx((1 + 4) / 2)


def test_corpus_drift_flags_collapse_and_not_another_sample() -> None:
    prompts = np.arange(80)
    sft, again, collapsed = sample_texts(80, 1), sample_texts(80, 2), sample_texts(80, 3, vocabulary=4)
    assert all(r["flagged"] for r in corpus_drift(collapsed, sft, prompts) if r["feature"] != "corpus_distinct_1")
    assert not any(r["flagged"] for r in corpus_drift(again, sft, prompts))
    assert [r["feature"] for r in corpus_drift(again, sft, prompts)] == [f"corpus_distinct_{k}" for k in (1, 2, 3)]


def test_misaligned_inputs_are_refused() -> None:
    with pytest.raises(DataError):
        drift({"n_chars": [1.0, 2.0]}, {"n_chars": [1.0, 2.0]}, [0])
    with pytest.raises(DataError):
        corpus_drift(["a"], ["b", "c"], [0])
    with pytest.raises(DataError):
        features(["a"], eos=[1, 0])
    with pytest.raises(DataError):
        text_features(["a"], [])
