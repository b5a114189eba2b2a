from __future__ import annotations

import numpy as np
import pytest

from toolkit.errors import DataError
from toolkit.evals.hacking import corpus_distinct, corpus_drift, drift, text_features

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


def test_features_by_hand() -> None:
    f = text_features(
        ["Good good good good!", "- one\n* two\n\nThree lines. Really!", "", "two words"], eos=[1, 0, 1, 1]
    )
    assert f["n_words"].tolist() == [4, 5, 0, 2] and f["n_chars"][0] == 20
    assert f["distinct_1"][0] == 1 / 4 and f["distinct_2"][0] == 1 / 3 and f["distinct_3"][0] == 1 / 2
    assert f["repetition"][0] == 1 / 2 and f["repetition"][1] == 0.0
    assert np.isnan(f["distinct_1"][2]) and np.isnan(f["repetition"][3])  # too short to say
    assert f["exclamation_density"].tolist() == [1.0, 0.5, 0.0, 0.0]
    assert f["list_density"].tolist() == pytest.approx([0, 2 / 3, 0, 0])
    assert f["eos"].tolist() == [1, 0, 1, 1]


def test_corpus_distinct_sees_what_single_texts_hide() -> None:
    same = ["a fine film indeed"] * 10
    assert text_features(same)["distinct_2"].tolist() == [1.0] * 10
    assert corpus_distinct(same, 2) == pytest.approx(3 / 30)
    assert corpus_distinct(["word"], 2) is None


def test_drift_flags_what_changed_and_only_that() -> None:
    sft = sample_texts(60, 0)
    policy = [t[:-1] + "! great! great! great! great! great! great!" for t in sft]
    rows = {r["feature"]: r for r in drift(text_features(policy), text_features(sft), np.arange(60))}
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
        a, b = (text_features(sample_texts(40, 2 * seed + k)) for k in (0, 1))
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
        text_features(["a"], eos=[1, 0])
