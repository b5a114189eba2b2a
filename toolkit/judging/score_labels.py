"""Labels from a judge that scores one response at a time: a reward model, an implicit reward, a function, gold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Literal

from toolkit.judging.options import JudgeOptions
from toolkit.judging.principles import Labelled
from toolkit.judging.records import preference_by_log_odds, preference_by_score
from toolkit.judging.scorers import score
from toolkit.preferences.rows import Comparison, PreferenceRow, Prompt, prompt_id, soft_comparisons
from toolkit.preferences.stored import StoredRows
from toolkit.storage.lazy import Computed

# Their scores are the rewards of a Bradley-Terry model, so that a difference is a log odds.
LOG_ODDS = ("rm", "implicit")


def label_by_scores(
    judge: str,
    responses: Sequence[tuple[Prompt, Sequence[str]]],
    options: JudgeOptions,
    labels: Literal["soft", "hard"],
) -> Labelled:
    """Preference rows over all C(K,2) pairs of the distinct responses to each prompt, by the judge's scores.

    ``soft`` labels of a reward model or an implicit reward are the Bradley-Terry probabilities of its scores. Other
    judges, and ``hard`` labels, say which score is higher; equal scores tie. A pair with a score that is not finite is
    left out, and counted. The rows wait on disk.
    """
    prompts = Computed(responses, lambda of: of[0])
    distinct = Computed(responses, lambda of: list(dict.fromkeys(of[1])))
    scores = score(judge, prompts, distinct, options)
    soft = labels == "soft" and judge.partition(":")[0] in LOG_ODDS
    rows, n_pairs, n_failed, n_tied = StoredRows(), 0, 0, 0
    for prompt, texts, of_texts in zip(prompts, distinct, scores, strict=True):
        comparisons: list[Comparison] = []
        for i, j in combinations(range(len(texts)), 2):
            n_pairs += 1
            first, second = of_texts[i], of_texts[j]
            if not (math.isfinite(first) and math.isfinite(second)):
                n_failed += 1
                continue
            p = preference_by_log_odds(first - second) if soft else preference_by_score(first, second)
            n_tied += p == 0.5
            comparisons += soft_comparisons(i, j, p, judge)
        if comparisons:
            rows.add(PreferenceRow(prompt_id(prompt), prompt, texts, comparisons), [])
    return Labelled(rows, n_pairs, n_failed, n_tied, 0, None)
