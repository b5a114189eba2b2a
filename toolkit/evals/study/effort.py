"""Expected best of n trials: what an arm reaches when n of its settings are tried.

Dodge et al. 2019 ("Show Your Work", 1909.03004) estimate it with replacement, which is biased downwards. The estimator
here is without replacement, which is unbiased (Tang et al. 2020, "Showing Your Work Doesn't Always Work", 2004.13705).
Trials are ranked on dev prompts and valued on test prompts, so that a lucky selection does not raise the value.
"""

from __future__ import annotations

import numpy as np
from scipy.special import comb

from toolkit.evals.intervals import Floats


def best_of_n_weights(dev_T: Floats, n_max: int | None = None) -> Floats:
    """The probability (n, T) that each trial is the best on dev of n = 1..n_max trials drawn without replacement.

    The trial of rank r (1 is the worst) is the best of n with probability C(r - 1, n - 1) / C(T, n). Trials with equal
    dev scores have equal probabilities.

    >>> best_of_n_weights(np.array([0.3, 0.1, 0.2])).round(3).tolist()
    [[0.333, 0.333, 0.333], [0.667, 0.0, 0.333], [1.0, 0.0, 0.0]]
    """
    t = len(dev_T)
    n = np.arange(1, (n_max or t) + 1)[:, None]
    order = np.argsort(dev_T, kind="stable")
    weights_NT = np.empty((len(n), t))
    weights_NT[:, order] = comb(np.arange(t)[None], n - 1) / comb(t, n)
    for value in np.unique(dev_T):
        tied = dev_T == value
        weights_NT[:, tied] = weights_NT[:, tied].mean(axis=1, keepdims=True)
    return weights_NT
