"""What a process reward model says of labelled steps, and what the implicit reward says of the same steps.

The implicit process reward of a step is the running sum of ``beta * log(pi / pi_ref)`` up to its end (Yuan et al. 2024,
arXiv 2412.01981); what the step itself adds to the sum stands beside it.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from toolkit.engine.engine import Engine
from toolkit.engine.process import (
    along_solutions,
    probabilities_at,
    scored,
    scores_by_token,
    step_trees,
    sums_between,
)
from toolkit.engine.reward_model import load_scorer
from toolkit.errors import ModelError
from toolkit.evals.intervals import BootstrapOptions
from toolkit.evals.process import PROBABLE, ScoredSolution, paired_figures, process_figures
from toolkit.models.encoding import Tree, text_encoder
from toolkit.models.inspect import best_device, torch_dtype
from toolkit.models.load import load_policy
from toolkit.models.resolve import ModelRef
from toolkit.models.reward_head import ProcessHead, RewardHead, reward_head
from toolkit.models.tokenizer import load_tokenizer
from toolkit.preferences.solutions import Solution
from toolkit.progress import Reporter
from toolkit.recipe.training import ModelSection

THRESHOLDS = (
    "The explicit reward calls a step right from a probability of one half on. The implicit rewards have no such "
    "threshold: theirs is chosen on other steps, those of the prompts in the other half. The areas (auc) need none."
)


@dataclass(frozen=True)
class StepScoring:
    """How steps are read and computed."""

    model: ModelSection
    max_response_tokens: int
    token_budget: int | None = None


@dataclass(frozen=True)
class ImplicitSteps:
    """The implicit reward of each step: the running sum up to its end, and what the step adds to it."""

    running: list[ScoredSolution]
    own: list[ScoredSolution]


def process_head(ref: ModelRef) -> ProcessHead:
    """What makes a model a process reward model. Raises ModelError for any other."""
    head: RewardHead = reward_head(ref.path)
    if head.process is None:
        raise ModelError(
            f"{ref.spec!r} is not a process reward model: its folder names no separator of steps",
            where="reward model",
            fix="one that was trained with reward_model.kind: process; for others, give preference data with --data",
        )
    return head.process


def explicit_steps(
    ref: ModelRef, solutions: Sequence[Solution], scoring: StepScoring, reporter: Reporter
) -> list[ScoredSolution]:
    """The process reward model's probability that each step is right."""
    head, tokenizer = process_head(ref), load_tokenizer(ref)
    encoder = text_encoder(tokenizer, solutions[0].prompt, ref.spec)
    trees, _ = step_trees(solutions, encoder, head.separator, scoring.max_response_tokens)
    gc.collect()
    model = load_scorer(ref, scoring.model, tokenizer, token_budget=scoring.token_budget)
    with reporter.task("process rewards of steps", sum(len(tree.solutions) for tree in trees)) as task:
        by_token = scores_by_token(model.engines[0], [tree.tree for tree in trees], task.advance)
    values = [
        [probabilities_at(scores, ends) for scores, ends in zip(of_tree, tree.ends, strict=True)]
        for tree, of_tree in zip(trees, by_token, strict=True)
    ]
    along = along_solutions(solutions, trees, values)
    return [scored(solution, values) for solution, values in zip(solutions, along, strict=True) if values]


def implicit_steps(
    policy: ModelRef,
    reference: ModelRef,
    beta: float,
    separator: str,
    solutions: Sequence[Solution],
    scoring: StepScoring,
    reporter: Reporter,
) -> ImplicitSteps:
    """The implicit rewards of each step, from a policy and its reference, in nats times ``beta``."""
    tokenizer = load_tokenizer(policy)
    encoder = text_encoder(tokenizer, solutions[0].prompt, policy.spec)
    trees, _ = step_trees(solutions, encoder, separator, scoring.max_response_tokens)
    whole = [tree.tree for tree in trees]
    of_policy, of_reference = (
        _logps(ref, whole, int(tokenizer.pad_token_id), scoring, label, reporter)
        for ref, label in ((policy, "steps under the policy"), (reference, "steps under the reference"))
    )
    values = [
        [
            sums_between(beta * (a.double() - b.double()), ends)
            for a, b, ends in zip(in_policy, in_reference, tree.ends, strict=True)
        ]
        for tree, in_policy, in_reference in zip(trees, of_policy, of_reference, strict=True)
    ]
    along = along_solutions(solutions, trees, values)
    pairs = [(solution, values) for solution, values in zip(solutions, along, strict=True) if values]
    return ImplicitSteps(
        [scored(solution, list(accumulate(values))) for solution, values in pairs],
        [scored(solution, values) for solution, values in pairs],
    )


def _logps(
    ref: ModelRef, trees: Sequence[Tree], pad_id: int, scoring: StepScoring, label: str, reporter: Reporter
) -> list[list[torch.Tensor]]:
    gc.collect()  # the model before this one: one at a time is in memory
    model = load_policy(ref, scoring.model).to(best_device())
    engine = Engine(model, pad_id, dtype=torch_dtype(scoring.model.dtype), token_budget=scoring.token_budget)
    with reporter.task(label, sum(len(tree.response_ids) for tree in trees)) as task:
        return engine.logps(trees, advance=task.advance)


def process_results(
    explicit: Sequence[ScoredSolution], implicit: ImplicitSteps | None, options: BootstrapOptions
) -> dict[str, Any]:
    """The figures of the explicit and the implicit reward on the same steps, and how much better the former is."""
    results: dict[str, Any] = {
        "explicit": process_figures(explicit, options, threshold=PROBABLE),
        "implicit": None,
        "implicit_own": None,
        "explicit_over_implicit": None,
        "explicit_over_implicit_own": None,
        "thresholds": THRESHOLDS,
    }
    if implicit is not None:
        for name, values in (("implicit", implicit.running), ("implicit_own", implicit.own)):
            results[name] = process_figures(values, options)
            results[f"explicit_over_{name}"] = paired_figures(explicit, values, options, threshold=PROBABLE)
    return results
