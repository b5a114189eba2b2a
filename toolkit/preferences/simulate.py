"""Preference data with a known truth: the gold reward, seen by annotators who are noisy and biased.

An annotator compares two responses by latent scores ``gold + bias_weight * feature + N(0, noise_std)``. The noise is
drawn anew for each (annotator, prompt, response, opponent) and depends only on these and on the seed; so does whether a
label is flipped. So a data set does not change with the order of its prompts, responses or annotators, and more of
them can be added.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import NormalDist
from typing import Literal

from toolkit.errors import DataError
from toolkit.preferences.gold import gold_rewards, prompt_text, sentiment
from toolkit.preferences.rows import Comparison, PreferenceRow, Prompt, canonical_prompt, prompt_id, soft_comparisons

Bias = Literal["length", "format", "agreement", "none"]
TIE_BELOW = 0.02
"""Latent scores closer than this are a tie, unless an annotator says otherwise: 1/2 for each response."""

_NORMAL = NormalDist()
_FORMAT = re.compile(r"^\s*(?:[-*+]|\d+[.)])\s|\*\*|^#{1,4}\s|\d|[!:;\"()]", re.MULTILINE)


@dataclass(frozen=True)
class Annotator:
    """One simulated annotator. ``noise_std`` and ``bias_weight`` are in units of the gold reward.

    ``bias`` names the feature that the annotator likes beside the gold reward. Each is in [-1, 1]:

    - ``length``: longer responses, tanh of (words - 15) / 10;
    - ``format``: lists, headings, bold, figures, quotes, brackets, exclamation marks: tanh of their number / 2;
    - ``agreement``: responses that feel as the writer of the prompt does (sycophancy): sentiment of the prompt times
      sentiment of the response, which is 0 where the prompt has no opinion;
    - ``none``: no feature, 0.

    ``flip_share`` of the labels that are no ties name the wrong winner, whatever the latent scores are. Latent scores
    closer than ``tie_below`` are a tie.
    """

    name: str
    noise_std: float
    bias: Bias = "none"
    bias_weight: float = 0.0
    flip_share: float = 0.0
    tie_below: float = TIE_BELOW


ANNOTATORS = (
    Annotator("prefers-long", noise_std=0.228, bias="length", bias_weight=0.16),
    Annotator("prefers-format", noise_std=0.228, bias="format", bias_weight=0.16),
    Annotator("prefers-agreement", noise_std=0.228, bias="agreement", bias_weight=0.32),
)
"""The annotators of the shipped data. In ``reviews`` two of them prefer the same response in 73% of the pairs that both
decide (for InstructGPT's labelers it is about 73%). Each prefers the one with the higher gold reward in 78 to 80% of
the pairs, and 3% are ties.
"""


def feature(bias: Bias, prompt: Prompt, response: str) -> float:
    """The feature in [-1, 1] of a response that an annotator with this bias likes. See :class:`Annotator`."""
    match bias:
        case "none":
            return 0.0
        case "length":
            return math.tanh((len(response.split()) - 15) / 10)
        case "format":
            return math.tanh(len(_FORMAT.findall(response)) / 2)
        case "agreement":
            return sentiment(prompt_text(prompt)) * sentiment(response)


def _uniform(*key: str) -> float:
    """A number in (0, 1) that depends only on the key."""
    digest = hashlib.sha256("\x1f".join(key).encode()).digest()
    return (int.from_bytes(digest[:8], "big") + 0.5) / 2.0**64


def _noise(seed: int, annotator: str, prompt_key: str, response: str, opponent: str) -> float:
    """A standard normal deviate that depends only on the arguments."""
    u = _uniform(str(seed), annotator, prompt_key, response, opponent)
    return _NORMAL.inv_cdf(min(max(u, 1e-15), 1 - 1e-15))


def _flipped(seed: int, annotator: Annotator, prompt_key: str, a: str, b: str) -> bool:
    """Whether this annotator's label of the pair is flipped; the order of the pair does not matter."""
    return _uniform("flip", str(seed), annotator.name, prompt_key, *sorted((a, b))) < annotator.flip_share


def annotate(
    prompt: Prompt,
    responses: Sequence[str],
    gold: Sequence[float],
    annotators: Sequence[Annotator] = ANNOTATORS,
    seed: int = 0,
) -> list[Comparison]:
    """All C(K,2) comparisons by each annotator. A tie is two comparisons of weight 1/2.

    Raises:
        DataError: fewer than two responses, equal responses, or another number of gold rewards.
    """
    if len(responses) < 2 or len(set(responses)) < len(responses):
        raise DataError(
            f"{len(responses)} responses, {len(set(responses))} distinct: a preference needs K >= 2 distinct responses",
            where=f"prompt {prompt_text(prompt)[:80]!r}",
        )
    if len(gold) != len(responses):
        raise DataError(
            f"{len(gold)} gold rewards for {len(responses)} responses", where=f"prompt {prompt_text(prompt)[:80]!r}"
        )
    key = canonical_prompt(prompt)
    comparisons: list[Comparison] = []
    for annotator in annotators:
        latent = [
            g + annotator.bias_weight * feature(annotator.bias, prompt, r) for g, r in zip(gold, responses, strict=True)
        ]
        for i, j in combinations(range(len(responses)), 2):
            a, b = responses[i], responses[j]
            difference = latent[i] - latent[j]
            difference += annotator.noise_std * (
                _noise(seed, annotator.name, key, a, b) - _noise(seed, annotator.name, key, b, a)
            )
            p = 0.5
            if difference != 0.0 and abs(difference) >= annotator.tie_below:
                p = float((difference > 0) != _flipped(seed, annotator, key, a, b))
            comparisons += soft_comparisons(i, j, p, annotator.name)
    return comparisons


def simulate_preferences(
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[str]],
    annotators: Sequence[Annotator] = ANNOTATORS,
    seed: int = 0,
    gold: Sequence[Sequence[float]] | None = None,
) -> list[PreferenceRow]:
    """Rows of prompts with K >= 2 responses each, their gold rewards and the annotators' comparisons.

    Equal responses to one prompt are merged. ``gold`` are the true rewards where the caller knows them; otherwise
    they are those of :func:`toolkit.preferences.gold.gold_reward`.

    Raises:
        DataError: a prompt that has fewer than two distinct responses or that occurs twice, or another number of
            response lists than of prompts.
    """
    if len(prompts) != len(responses):
        raise DataError(f"{len(responses)} lists of responses for {len(prompts)} prompts")
    rows: list[PreferenceRow] = []
    seen: dict[str, int] = {}
    for n, (prompt, texts) in enumerate(zip(prompts, responses, strict=True), start=1):
        identifier = prompt_id(prompt)
        if identifier in seen:
            raise DataError(
                f"prompts {seen[identifier]} and {n} are the same", where=repr(prompt_text(prompt)[:80]),
                fix="give each prompt once, with all of its responses",
            )  # fmt: skip
        seen[identifier] = n
        distinct = list(dict.fromkeys(texts))
        if gold is None:
            rewards = [round(g, 4) for g in gold_rewards([prompt] * len(distinct), distinct)]
        else:
            rewards = [gold[n - 1][texts.index(text)] for text in distinct]
        comparisons = annotate(prompt, distinct, rewards, annotators, seed)
        rows.append(PreferenceRow(identifier, prompt, distinct, comparisons, rewards, n))
    return rows


def agreement(rows: Sequence[PreferenceRow]) -> float | None:
    """Share of pairs on which two annotators prefer the same response, over all pairs of annotators.

    Pairs that one of the two calls a tie are left out. None where no pair remains.
    """
    same = total = 0
    for row in rows:
        votes: dict[tuple[int, int], dict[str, int]] = {}
        for c in row.comparisons:
            if c.weight == 1.0:
                pair = (min(c.winner, c.loser), max(c.winner, c.loser))
                votes.setdefault(pair, {})[c.annotator] = c.winner
        for winners in votes.values():
            for a, b in combinations(sorted(winners), 2):
                total += 1
                same += winners[a] == winners[b]
    return same / total if total else None
