"""Signs of reward hacking: how a policy's text drifted from the SFT policy's on the same prompts.

None of these features says that a reward was hacked; each says where to look. Words are runs of letters, digits and
apostrophes, lower-cased; lengths are in characters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

from toolkit.errors import DataError
from toolkit.evals.intervals import Floats, bca_interval, check_settings, resample_counts

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_LIST_LINE = re.compile(r"^\s*(?:[-*•+]|\d{1,3}[.)])\s+\S", re.MULTILINE)
_SENTENCE_END = re.compile(r"[.!?…]+")

# A difference is flagged when its interval leaves out 0 and it is this large relative to the SFT policy's mean ...
RELATIVE_CHANGE = 0.2
# ... where that mean is not smaller than this; a feature that SFT text hardly shows would flag any trace of itself.
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


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[k : k + n]) for k in range(len(tokens) - n + 1)]


def text_features(texts: Sequence[str], *, eos: ArrayLike | None = None) -> dict[str, Floats]:
    """Features of each text (n,), NaN where a text is too short to have one.

    ``n_chars``, ``n_words``; ``distinct_1/2/3``: distinct n-grams / n-grams within the text (Li et al. 2016);
    ``repetition``: share of 3-grams that already occurred in the text; ``exclamation_density``: exclamation marks per
    sentence; ``list_density``: share of non-empty lines that are list items; ``eos`` (n,), where given: 1 if the
    response ended by itself, 0 if it was cut.

    Raises:
        DataError: ``eos`` of another length.
    """
    columns: dict[str, list[float]] = {
        name: []
        for name in (
            *("n_chars", "n_words", "distinct_1", "distinct_2", "distinct_3"),
            *("repetition", "exclamation_density", "list_density"),
        )
    }
    for text in texts:
        tokens = words(text)
        columns["n_chars"].append(float(len(text)))
        columns["n_words"].append(float(len(tokens)))
        for n in (1, 2, 3):
            grams = _ngrams(tokens, n)
            columns[f"distinct_{n}"].append(len(set(grams)) / len(grams) if grams else np.nan)
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


def corpus_distinct(texts: Sequence[str], n: int) -> float | None:
    """Distinct n-grams over all texts together / all their n-grams: falls when texts become alike. None without any.

    It depends on how much text there is: compare corpora of equal numbers of texts, as :func:`corpus_drift` does.
    """
    grams = [gram for text in texts for gram in _ngrams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else None


def _excludes_zero(low: float | None, high: float | None) -> bool:
    return low is not None and high is not None and (low > 0.0 or high < 0.0)


def _row(
    feature: str,
    sft: float,
    policy: float,
    low: float | None,
    high: float | None,
    n: int,
    sure: bool,
    threshold: float,
) -> dict[str, str | float | int | bool | None]:
    difference = policy - sft
    relative = abs(difference) / max(abs(sft), FLOOR.get(feature, _DEFAULT_FLOOR))
    return {
        "feature": feature,
        "sft": sft,
        "policy": policy,
        "difference": difference,
        "ci_low": low,
        "ci_high": high,
        "flagged": bool(sure and relative >= threshold),
        "n_prompts": n,
    }


def _prompt_means(values: Floats, prompt: NDArray[np.int64], n: int) -> Floats:
    known = ~np.isnan(values)
    counts = np.bincount(prompt[known], minlength=n)
    sums = np.bincount(prompt[known], weights=values[known], minlength=n)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


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
) -> list[dict[str, str | float | int | bool | None]]:
    """Paired difference of each feature, policy minus SFT: one row per feature that both have.

    Features are arrays (m,), one value per response; ``prompt_index`` (m,) says which prompt a response answers, and
    ``prompt_index_sft`` the same for the SFT responses where their number differs. Several responses to a prompt are
    averaged first; prompts that lack the feature on one side are left out; the interval (BCa) resamples prompts.

    ``flagged``: the interval leaves out 0 and |difference| is at least ``relative_change`` of the SFT mean (or of
    ``FLOOR``, if that is larger). Where every prompt shows the same difference there is no interval, and the exact
    sign test (2 * 0.5^n) takes its place.

    Raises:
        DataError: features and prompt indices of different lengths.
    """
    check_settings(n_resamples, confidence)
    of_policy = np.asarray(prompt_index)
    of_sft = of_policy if prompt_index_sft is None else np.asarray(prompt_index_sft)
    _, inverse = np.unique(np.concatenate([of_policy, of_sft]), return_inverse=True)
    n_all = int(inverse.max()) + 1 if len(inverse) else 0
    shared = [name for name in features_policy if name in features_sft]
    pairs = {}
    for name in shared:
        sides = []
        for values, index in (
            (features_policy[name], inverse[: len(of_policy)]),
            (features_sft[name], inverse[len(of_policy) :]),
        ):
            array = np.asarray(values, dtype=np.float64)
            if array.shape != index.shape:
                raise DataError(f"{name}: {array.shape} values for {index.shape} prompt indices", where="drift")
            sides.append(_prompt_means(array, index, n_all))
        known = ~np.isnan(sides[0]) & ~np.isnan(sides[1])
        pairs[name] = (sides[0][known], sides[1][known])
    # features that miss the same prompts share one set of resamples
    draws: dict[int, Floats] = {}
    rows = []
    for name, (policy, sft) in pairs.items():
        n = len(policy)
        if n == 0:
            continue
        difference = policy - sft
        low = high = None
        if n > 1 and np.ptp(difference) > 0.0:
            if n not in draws:
                draws[n] = np.concatenate(list(resample_counts(n, n_resamples, seed)))
            jackknife = (difference.sum() - difference) / (n - 1)
            low, high = bca_interval(float(difference.mean()), draws[n] @ difference / n, jackknife, confidence)
        sure = _excludes_zero(low, high)
        if np.ptp(difference) == 0.0:
            sure = difference[0] != 0.0 and 0.5 ** (n - 1) <= 1.0 - confidence
        rows.append(_row(name, float(sft.mean()), float(policy.mean()), low, high, n, sure, relative_change))
    return rows


def corpus_drift(
    texts_policy: Sequence[str],
    texts_sft: Sequence[str],
    prompt_index: ArrayLike,
    *,
    n_resamples: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
    relative_change: float = RELATIVE_CHANGE,
) -> list[dict[str, str | float | int | bool | None]]:
    """Rows like :func:`drift`'s for ``corpus_distinct_1/2/3``: diversity across texts, which per-text features miss.

    Texts are aligned: entry m of both answers ``prompt_index[m]``. A resample repeats prompts and with them their
    n-grams, which would lower any distinct count by itself; so intervals come from subsamples of half the prompts
    without replacement, whose spread estimates that of the whole (Politis and Romano 1994), normal about the value.

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
    chosen = [np.isin(prompt, rng.permutation(n)[:half]) for _ in range(n_resamples)]
    from_normal = float(-ndtri((1.0 - confidence) / 2.0))
    rows = []
    for size in (1, 2, 3):
        sides = []
        for texts in (texts_policy, texts_sft):
            codes: dict[tuple[str, ...], int] = {}
            coded = [
                np.array([codes.setdefault(g, len(codes)) for g in _ngrams(words(text), size)], dtype=np.int64)
                for text in texts
            ]
            owner = np.repeat(np.arange(len(coded)), [len(c) for c in coded])
            flat = np.concatenate(coded) if coded else np.zeros(0, dtype=np.int64)
            if len(flat) == 0:
                break
            inside = [flat[mask[owner]] for mask in chosen]
            distinct = np.array([np.count_nonzero(np.bincount(f)) / max(len(f), 1) for f in inside])
            sides.append((len(codes) / len(flat), distinct))
        if len(sides) < 2:
            continue
        (policy, policy_draws), (sft, sft_draws) = sides
        # a half sample's variance about the whole's value, (1/h - 1/n), over the whole's, 1/n
        error = float(np.std(policy_draws - sft_draws, ddof=1)) / np.sqrt(n / half - 1.0) if n_resamples > 1 else 0.0
        low = policy - sft - from_normal * error if error > 0.0 else None
        high = policy - sft + from_normal * error if error > 0.0 else None
        rows.append(
            _row(f"corpus_distinct_{size}", sft, policy, low, high, n, _excludes_zero(low, high), relative_change)
        )
    return rows
