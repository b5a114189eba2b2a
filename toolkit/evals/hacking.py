"""Signs of reward hacking: how a policy's texts drifted from those of the SFT policy on the same prompts.

None of these features proves that a reward was hacked; each says where to look. Words are runs of letters, digits and
apostrophes in lower case.

The share of distinct words falls with the length of a text, however diverse it is. So two texts are compared at equal
numbers of n-grams: of the longer one as many are drawn as the shorter one has, and what counts is how many of them are
distinct on average (:func:`expected_distinct`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln, ndtri

from toolkit.errors import DataError
from toolkit.evals.intervals import Floats, bca_interval, check_settings, resample_counts, rounded_alike

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_LIST_LINE = re.compile(r"^\s*(?:[-*•+]|\d{1,3}[.)])\s+\S", re.MULTILINE)
_SENTENCE_END = re.compile(r"[.!?…]+")

# A difference is flagged when its interval leaves out 0 and it is at least this share of the SFT policy's mean.
RELATIVE_CHANGE = 0.2
# A smaller mean counts as this much: a feature that SFT texts hardly show would otherwise flag any trace of itself.
FLOOR = {
    "n_chars": 1.0,
    "n_words": 1.0,
    "distinct_1": 0.05,
    "distinct_2": 0.05,
    "distinct_3": 0.05,
    "repetition": 0.05,
    "eos": 0.05,
    "exclamation_density": 0.05,
    "list_density": 0.05,
    "corpus_distinct_1": 0.01,
    "corpus_distinct_2": 0.01,
    "corpus_distinct_3": 0.01,
}
_DEFAULT_FLOOR = 1e-12
# In the order in which they are shown. The tokens come from the caller.
FEATURE_NAMES = {
    "n_tokens": "length in tokens",
    "n_words": "length in words",
    "n_chars": "length in characters",
    "eos": "share that ends by itself",
    "repetition": "repeated 3-grams",
    "distinct_1": "distinct words in a response",
    "distinct_2": "distinct 2-grams in a response",
    "distinct_3": "distinct 3-grams in a response",
    "corpus_distinct_1": "distinct words over all responses",
    "corpus_distinct_2": "distinct 2-grams over all responses",
    "corpus_distinct_3": "distinct 3-grams over all responses",
    "exclamation_density": "exclamation marks per sentence",
    "list_density": "share of lines that are list items",
}


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[k : k + n]) for k in range(len(tokens) - n + 1)]


def expected_distinct(counts: NDArray[np.int64], n_drawn: int) -> float:
    """How many distinct n-grams are on average among ``n_drawn`` ones, drawn without replacement (Hurlbert 1971).

    ``counts`` says how often each distinct one is there; together they are ``n_drawn`` or more.

    >>> expected_distinct(np.array([2, 1, 1]), 4), round(expected_distinct(np.array([2, 2]), 2), 6)  # 1 + 2/3
    (3.0, 1.666667)
    """
    total = int(counts.sum())
    if n_drawn >= total:
        return float(len(counts))
    if len(counts) == total:  # there is no other
        return float(n_drawn)
    n_ngrams = np.bincount(counts)
    times = np.flatnonzero(n_ngrams)
    left = total - times
    # C(total - times, n_drawn) / C(total, n_drawn): no draw is this n-gram
    log_missing = gammaln(left + 1) - gammaln(np.maximum(left - n_drawn, 0) + 1)
    log_missing += gammaln(total - n_drawn + 1) - gammaln(total + 1)
    missing = np.where(left >= n_drawn, np.exp(log_missing), 0.0)
    return float(np.sum(n_ngrams[times] * (1.0 - missing)))


def text_features(
    texts: Sequence[str], beside: Sequence[Sequence[int]], *, eos: ArrayLike | None = None
) -> dict[str, Floats]:
    """Features of each text (n,), NaN where a text is too short to have one.

    - ``n_chars``, ``n_words``: lengths;
    - ``distinct_1/2/3``: distinct n-grams / n-grams within the text (Li et al. 2016), at equal numbers of n-grams;
    - ``repetition``: share of 3-grams that occurred in the text before, at equal numbers of 3-grams;
    - ``exclamation_density``: exclamation marks per sentence;
    - ``list_density``: share of non-empty lines that are list items;
    - ``eos``: 1 if the response ended by itself, 0 if it was cut. Only where the argument ``eos`` (n,) says it.

    ``beside`` (n,) has for each text the numbers of words of those that it is compared with, as
    :func:`words_beside` gives them. The diversity is the mean over these, without those too short for an n-gram.

    Raises:
        DataError: ``beside`` or ``eos`` of another length.
    """
    if len(beside) != len(texts):
        raise DataError(f"{len(beside)} lists of lengths for {len(texts)} texts", where="text_features")
    columns: dict[str, list[float]] = {
        name: []
        for name in (
            *("n_chars", "n_words", "distinct_1", "distinct_2", "distinct_3"),
            *("repetition", "exclamation_density", "list_density"),
        )
    }
    for text, lengths in zip(texts, beside, strict=True):
        tokens = words(text)
        columns["n_chars"].append(float(len(text)))
        columns["n_words"].append(float(len(tokens)))
        for n in (1, 2, 3):
            columns[f"distinct_{n}"].append(_distinct_share(tokens, n, lengths))
        columns["repetition"].append(1.0 - columns["distinct_3"][-1])
        sentences = max(1, len(_SENTENCE_END.findall(text)))
        columns["exclamation_density"].append(text.count("!") / sentences)
        lines = [line for line in text.splitlines() if line.strip()]
        columns["list_density"].append(len(_LIST_LINE.findall(text)) / len(lines) if lines else 0.0)
    features = {name: np.array(values, dtype=np.float64) for name, values in columns.items()}
    if eos is not None:
        features["eos"] = np.asarray(eos, dtype=np.float64)
        if features["eos"].shape != (len(texts),):
            raise DataError(f"{features['eos'].shape} eos flags for {len(texts)} texts", where="text_features")
    return features


def _distinct_share(tokens: Sequence[str], n: int, lengths: Sequence[int]) -> float:
    """Distinct n-grams / n-grams of a text beside texts of these lengths in words; the mean over them."""
    counts = np.array([*Counter(_ngrams(tokens, n)).values()], dtype=np.int64)
    drawn = [min(len(tokens), length) - n + 1 for length in lengths]
    shares = [expected_distinct(counts, m) / m for m in drawn if m > 0]
    return float(np.mean(shares)) if shares else np.nan


def words_beside(
    prompt_index: Sequence[int], others: Sequence[str], prompt_index_others: Sequence[int]
) -> list[list[int]]:
    """For each text, whose prompt is in ``prompt_index``, the numbers of words of ``others`` to the same prompt."""
    by_prompt: dict[int, list[int]] = {prompt: [] for prompt in prompt_index}
    for text, prompt in zip(others, prompt_index_others, strict=True):
        if prompt in by_prompt:
            by_prompt[prompt].append(len(words(text)))
    return [by_prompt[prompt] for prompt in prompt_index]


class DriftRow(TypedDict):
    """One feature of a policy's texts beside the same feature of the SFT policy's texts."""

    feature: str
    sft: float
    policy: float
    difference: float
    ci_low: float | None
    ci_high: float | None
    flagged: bool
    n_prompts: int


def drift(
    features_policy: Mapping[str, ArrayLike],
    features_sft: Mapping[str, ArrayLike],
    prompt_index: ArrayLike,
    *,
    prompt_index_sft: ArrayLike | None = None,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    relative_change: float = RELATIVE_CHANGE,
) -> list[DriftRow]:
    """Paired difference of each feature, policy minus SFT. One row for each feature that both have.

    Features are arrays (m,), one value per response. ``prompt_index`` (m,) says which prompt a response answers;
    ``prompt_index_sft`` says it for the SFT responses where their number differs. Several responses to a prompt are
    averaged first. A prompt that lacks the feature on one side is left out. The interval (BCa) resamples prompts.

    A row is ``flagged`` where its interval leaves out 0 and |difference| is at least ``relative_change`` of the SFT
    mean, or of ``FLOOR`` if that is larger. Where every prompt shows the same difference there is no interval, and the
    exact sign test (2 * 0.5^n) takes its place.

    Raises:
        DataError: features and prompt indices of different lengths.
    """
    check_settings(n_resamples, confidence)
    index_sft = prompt_index if prompt_index_sft is None else prompt_index_sft
    # features with equally many prompts share one set of resamples
    draws: dict[int, Floats] = {}
    rows = []
    for name, (policy, sft) in _prompt_means(features_policy, features_sft, prompt_index, index_sft).items():
        n = len(policy)
        if n == 0:
            continue
        difference = policy - sft
        interval: tuple[float | None, float | None] = (None, None)
        alike = rounded_alike(difference)
        if n > 1 and not alike:
            if n not in draws:
                draws[n] = np.concatenate(list(resample_counts(n, n_resamples, seed)))
            jackknife = (difference.sum() - difference) / (n - 1)
            interval = bca_interval(float(difference.mean()), draws[n] @ difference / n, jackknife, confidence)
        sure = _excludes_zero(interval)
        if alike:
            sure = difference[0] != 0.0 and 0.5 ** (n - 1) <= 1.0 - confidence
        rows.append(_row(name, float(sft.mean()), float(policy.mean()), interval, n, sure, relative_change))
    return rows


def _prompt_means(
    features_policy: Mapping[str, ArrayLike],
    features_sft: Mapping[str, ArrayLike],
    index_policy: ArrayLike,
    index_sft: ArrayLike,
) -> dict[str, tuple[Floats, Floats]]:
    """For each shared feature its mean on each prompt, (policy (n,), SFT (n,)), over the prompts that both have."""
    of_policy, of_sft = np.asarray(index_policy), np.asarray(index_sft)
    _, prompt = np.unique(np.concatenate([of_policy, of_sft]), return_inverse=True)
    n_prompts = int(prompt.max()) + 1 if len(prompt) else 0
    means = {}
    for name in features_policy:
        if name not in features_sft:
            continue
        policy = _means_of(name, features_policy[name], prompt[: len(of_policy)], n_prompts)
        sft = _means_of(name, features_sft[name], prompt[len(of_policy) :], n_prompts)
        known = ~np.isnan(policy) & ~np.isnan(sft)
        means[name] = (policy[known], sft[known])
    return means


def _means_of(name: str, feature: ArrayLike, prompt: NDArray[np.int64], n_prompts: int) -> Floats:
    values = np.asarray(feature, dtype=np.float64)
    if values.shape != prompt.shape:
        raise DataError(f"{name}: {values.shape} values for {prompt.shape} prompt indices", where="drift")
    known = ~np.isnan(values)
    counts = np.bincount(prompt[known], minlength=n_prompts)
    sums = np.bincount(prompt[known], weights=values[known], minlength=n_prompts)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _row(
    feature: str,
    sft: float,
    policy: float,
    interval: tuple[float | None, float | None],
    n_prompts: int,
    sure: bool,
    relative_change: float,
) -> DriftRow:
    difference = policy - sft
    relative = abs(difference) / max(abs(sft), FLOOR.get(feature, _DEFAULT_FLOOR))
    return {
        "feature": feature,
        "sft": sft,
        "policy": policy,
        "difference": difference,
        "ci_low": interval[0],
        "ci_high": interval[1],
        "flagged": bool(sure and relative >= relative_change),
        "n_prompts": n_prompts,
    }


def _excludes_zero(interval: tuple[float | None, float | None]) -> bool:
    low, high = interval
    return low is not None and high is not None and (low > 0.0 or high < 0.0)


def corpus_drift(
    texts_policy: Sequence[str],
    texts_sft: Sequence[str],
    prompt_index: ArrayLike,
    *,
    n_resamples: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
    relative_change: float = RELATIVE_CHANGE,
) -> list[DriftRow]:
    """Rows like those of :func:`drift` for ``corpus_distinct_1/2/3``: distinct n-grams / n-grams over all texts.

    It falls where texts become alike. The two sides are compared at equal numbers of n-grams.

    The texts are aligned: entry m of both answers ``prompt_index[m]``. A bootstrap would repeat prompts and with them
    their n-grams, which lowers any count of distinct n-grams. So the intervals come from subsamples of half the prompts
    without replacement, whose spread estimates that of the whole (Politis and Romano 1994); they are normal about the
    value.

    Raises:
        DataError: texts and prompt indices of different numbers.
    """
    check_settings(n_resamples, confidence)
    index = np.asarray(prompt_index)
    if not len(texts_policy) == len(texts_sft) == len(index):
        raise DataError(
            f"{len(texts_policy)} policy texts, {len(texts_sft)} SFT texts, {len(index)} prompt indices",
            where="corpus_drift",
        )
    _, prompt = np.unique(index, return_inverse=True)
    n = int(prompt.max()) + 1 if len(prompt) else 0
    if n < 2:
        return []
    rng = np.random.default_rng(seed)
    half = n // 2
    halves = [np.isin(prompt, rng.permutation(n)[:half]) for _ in range(n_resamples)]
    quantile = float(-ndtri((1.0 - confidence) / 2.0))
    rows = []
    for size in (1, 2, 3):
        shares = _distinct_shares((texts_policy, texts_sft), size, halves)
        if shares is None:
            continue
        (policy, sft), differences = shares[0].tolist(), shares[:, 0] - shares[:, 1]
        spread = float(np.std(differences[1:], ddof=1)) if n_resamples > 1 else 0.0
        # the variance of half a sample about the whole is 1/half - 1/n, that of the whole is 1/n
        error = spread / np.sqrt(n / half - 1.0)
        difference = policy - sft
        interval = (difference - quantile * error, difference + quantile * error) if error > 0.0 else (None, None)
        sure = _excludes_zero(interval)
        rows.append(_row(f"corpus_distinct_{size}", sft, policy, interval, n, sure, relative_change))
    return rows


def _distinct_shares(sides: Sequence[Sequence[str]], size: int, subsets: Sequence[NDArray[np.bool_]]) -> Floats | None:
    """Distinct n-grams / n-grams of each side at equal numbers of n-grams: (1 + n_subsets, 2).

    The first row is of all texts, the others of each subset of them. None where a side has no n-gram.
    """
    codes: dict[tuple[str, ...], int] = {}
    coded = []  # of each side, the code of each n-gram and the text that it is in
    for texts in sides:
        grams = [[codes.setdefault(gram, len(codes)) for gram in _ngrams(words(text), size)] for text in texts]
        text_of = np.repeat(np.arange(len(grams)), [len(of_text) for of_text in grams])
        coded.append((np.array([code for of_text in grams for code in of_text], dtype=np.int64), text_of))
    if any(len(flat) == 0 for flat, _ in coded):
        return None
    shares = []
    for subset in [np.ones(len(sides[0]), dtype=np.bool_), *subsets]:
        inside = [flat[subset[text_of]] for flat, text_of in coded]
        n_drawn = min(map(len, inside))
        counts = [np.bincount(grams) for grams in inside]
        shares.append([expected_distinct(of_side[of_side > 0], n_drawn) / max(n_drawn, 1) for of_side in counts])
    return np.array(shares)
