"""What the outputs of an ensemble, or the heads of annotators, say of held-out comparisons beside their one score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.evals.agreement import Comparison, EstimateDict, estimate_dict, pairwise_accuracy
from toolkit.evals.ensembles import disagreement
from toolkit.evals.intervals import BootstrapOptions, bootstrap_mean, bootstrap_share


@dataclass(frozen=True)
class JudgedPair:
    """Responses i < j of a prompt, and the preference for i of each annotator who compared them: 1, 1/2 or 0."""

    prompt: int
    i: int
    j: int
    preferences: Mapping[str, float]


def outputs_report(
    names: Sequence[str],
    outputs: Sequence[NDArray[np.float64]],
    scores: Sequence[NDArray[np.float64]],
    comparisons: Sequence[Comparison],
    pairs: Sequence[JudgedPair],
    options: BootstrapOptions,
) -> dict[str, Any]:
    """For results.json. ``outputs`` has for each prompt [K, M] centred outputs, ``scores`` [K] what is made of them.

    ``names`` are those of the outputs. ``outputs`` of the result has each one's accuracy on all ``comparisons`` beside
    that of the score. ``annotators`` is None unless each output is an annotator's head. Options are those of the
    bootstrap over prompts.
    """
    rows = [
        {"output": name, "accuracy": _accuracy(comparisons, [of_prompt[:, m] for of_prompt in outputs], options)}
        for m, name in enumerate(names)
    ]
    spread = [float(disagreement(of_prompt).mean()) for of_prompt in outputs]
    known = {name for pair in pairs for name in pair.preferences}
    return {
        "outputs": rows,
        "accuracy": _accuracy(comparisons, scores, options),
        "disagreement": estimate_dict(bootstrap_mean(spread, **options)),
        "annotators": annotators_report(names, outputs, scores, pairs, options) if known & set(names) else None,
    }


def annotators_report(
    names: Sequence[str],
    outputs: Sequence[NDArray[np.float64]],
    scores: Sequence[NDArray[np.float64]],
    pairs: Sequence[JudgedPair],
    options: BootstrapOptions,
) -> dict[str, Any]:
    """How well the score and each annotator's head agree with each annotator, and with the majority of those of a pair.

    ``agreement`` is how often two annotators of a pair prefer the same response (two ties agree, a tie and a winner do
    not): what no reward model can be expected to exceed. A majority needs two annotators; equal sides have none.
    """
    rows = []
    for name in sorted({name for pair in pairs for name in pair.preferences}):
        judged = [(p.prompt, p.i, p.j, p.preferences[name], 1.0) for p in pairs if name in p.preferences]
        head = [of_prompt[:, names.index(name)] for of_prompt in outputs] if name in names else None
        rows.append(
            {
                "annotator": name,
                "n": len(judged),
                "accuracy_of_head": None if head is None else _accuracy(judged, head, options),
                "accuracy_of_score": _accuracy(judged, scores, options),
                "agreement_with_others": _agreement(pairs, options, name),
            }
        )
    majority = [(p.prompt, p.i, p.j, side, 1.0) for p in pairs if (side := _majority(p)) is not None]
    return {
        "agreement": _agreement(pairs, options),
        "annotators": rows,
        "majority": {"n": len(majority), "accuracy_of_score": _accuracy(majority, scores, options)},
    }


def _majority(pair: JudgedPair) -> float | None:
    """The side of more annotators; None with one annotator, or equal sides."""
    mean = sum(pair.preferences.values()) / len(pair.preferences)
    return None if len(pair.preferences) < 2 or mean == 0.5 else float(mean > 0.5)


def _agreement(pairs: Sequence[JudgedPair], options: BootstrapOptions, name: str | None = None) -> EstimateDict:
    """Share of equal preferences among two annotators of a pair, of whom ``name`` is one."""
    prompts: list[int] = []
    equal: list[float] = []
    for pair in pairs:
        for (a, first), (b, second) in combinations(pair.preferences.items(), 2):
            if name is None or name in (a, b):
                prompts.append(pair.prompt)
                equal.append(float(first == second))
    return estimate_dict(bootstrap_share(prompts, equal, np.ones(len(equal)), **options))


def _accuracy(comparisons: Sequence[Comparison], rewards: Sequence[NDArray[np.float64]], options: Any) -> EstimateDict:
    return estimate_dict(pairwise_accuracy(comparisons, rewards, **options))
