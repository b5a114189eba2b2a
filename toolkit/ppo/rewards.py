"""What PPO optimises: reward models, ensembles of them, functions, and weighted sums of these.

A reward function is called with :class:`Responses` and gives one reward for each: a score for the whole response, or a
list of (token position, value) steps, as a process reward model has. NaN means "does not apply".
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from anyio.from_thread import start_blocking_portal
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from toolkit.engine.engine import Engine
from toolkit.engine.reward_model import RewardModel, load_scorer, step_ends_of
from toolkit.errors import ModelError, RecipeError
from toolkit.evals.ensembles import Combination, combined, disagreement
from toolkit.models.encoding import Tree, is_conversation, text_encoder
from toolkit.models.inspect import disable_dropout, torch_dtype
from toolkit.models.resolve import resolve
from toolkit.models.reward_head import RewardHead
from toolkit.models.tokenizer import load_tokenizer, reads_the_same
from toolkit.ppo.models import AdapterModels
from toolkit.ppo.process import RewardShape, check_shape, on_sampled_tokens, rewards_of_steps
from toolkit.preferences.rows import Prompt
from toolkit.recipe.training import ModelSection

StepRewards = list[tuple[int, float]]
Reward = float | StepRewards


@dataclass(frozen=True)
class Responses:
    """Sampled responses to score, the same number for each tree and in the order of the trees.

    Every list has one entry per response, except that ``trees`` has one per prompt. ``columns`` are the data set's
    other columns. ``sampler_logps``: log-probabilities under what sampled, in nats; empty for text from elsewhere.
    """

    prompts: list[Prompt]
    completions: list[str]
    truncated: list[bool]
    trees: list[Tree]
    columns: dict[str, list[Any]] = field(default_factory=dict)
    sampler_logps: list[float] = field(default_factory=list)

    @property
    def completion_ids(self) -> list[list[int]]:
        return [ids for tree in self.trees for ids in tree.response_ids]


class EnsembleScores(list[float]):
    """The scores of an ensemble, and for each response the standard deviation of its members' scores."""

    def __init__(self, scores: Sequence[float], disagreement: Sequence[float]) -> None:
        super().__init__(scores)
        self.disagreement = list(disagreement)


RewardFunction = Callable[[Responses], Sequence[Reward]]


@dataclass(frozen=True)
class Scores:
    """Of each response, the score of the whole and the rewards of its steps. NaN: no reward applies to a response."""

    values: list[float]
    steps: list[StepRewards]
    disagreement: list[float] = field(default_factory=list)  # of the outputs of an ensemble; empty where there is none

    def totals(self) -> list[float]:
        """Each response's score and steps in one number."""
        return [value + sum(step for _, step in steps) for value, steps in zip(self.values, self.steps, strict=True)]


@dataclass(frozen=True)
class Ensemble:
    """Several reward models as one, against over-optimisation (Coste et al. 2024, arXiv 2310.02743).

    ``how`` combines the members: ``mean``; ``wco``, the worst of them; ``uwo``, their mean minus ``lam`` times their
    variance.
    """

    members: Sequence[str | PreTrainedModel]
    how: Combination = "mean"
    lam: float = 0.5

    def combine(self, values: Sequence[float]) -> float:
        """One response's score from its members' scores.

        >>> [Ensemble((), how).combine([1.0, 3.0]) for how in ("mean", "wco", "uwo")]
        [2.0, 1.0, 1.5]
        """
        return float(combined(values, self.how, self.lam))


def model_reward(
    model: RewardModel,
    tokenizer: PreTrainedTokenizerBase,
    policy_tokenizer: PreTrainedTokenizerBase,
    shape: RewardShape = "score",
) -> RewardFunction:
    """Scores of a reward model, whose tokenizer is ``tokenizer``; with ``shape="steps"`` the rewards of its steps.

    The ids that were sampled are scored as they are. Their text is encoded again only where the reward model has
    another tokenizer or chat template; a truncated response gets no end of text in either case.
    """
    check_shape(model.head, shape)
    same_ids = reads_the_same(tokenizer, policy_tokenizer)
    sampled_ends = step_ends_of(model.head, policy_tokenizer)

    def encode_again(responses: Responses) -> list[Tree]:
        encoder = text_encoder(tokenizer, responses.prompts[0], "the reward model", pair=model.reads_pairs)
        trees, start = [], 0
        for tree in responses.trees:
            stop = start + len(tree.response_ids)
            texts, truncated = responses.completions[start:stop], responses.truncated[start:stop]
            trees.append(model.read(encoder, responses.prompts[start], texts, truncated))
            start = stop
        return trees

    def score(responses: Responses) -> Sequence[Reward]:
        trees = responses.trees if same_ids else encode_again(responses)
        if sampled_ends is None:
            return head_scores(model.head, model.outputs(trees))
        steps = [of_response for of_tree in model.step_probabilities(trees) for of_response in of_tree]
        if not same_ids:
            pairs = zip(steps, responses.completion_ids, strict=True)
            steps = [on_sampled_tokens(of_response, ids, sampled_ends) for of_response, ids in pairs]
        return rewards_of_steps(model.head, shape, steps)

    return score


def adapter_reward(
    models: AdapterModels, head: RewardHead, tokenizer: PreTrainedTokenizerBase, shape: RewardShape = "score"
) -> RewardFunction:
    """Scores of the reward model, or the ensemble, whose members are adapters on the policy's base.

    ``tokenizer`` is the policy's; ``shape="steps"`` takes the rewards of a process reward model's steps.
    """
    check_shape(head, shape)
    ends = step_ends_of(head, tokenizer)

    def score(responses: Responses) -> Sequence[Reward]:
        if ends is None:
            return head_scores(head, models.reward_outputs(responses.trees))
        scores = [by_token for of_tree in models.reward_by_token(responses.trees) for by_token in of_tree]
        pairs = zip(responses.completion_ids, scores, strict=True)
        return rewards_of_steps(head, shape, [ends.probabilities(ids, by_token) for ids, by_token in pairs])

    return score


def head_scores(head: RewardHead, outputs: Sequence[NDArray[np.float64]]) -> list[float]:
    """The score of each response of [K, M] outputs by tree."""
    if not outputs:
        return []
    values = np.concatenate(outputs)
    scores = head.scores(values).tolist()
    return EnsembleScores(scores, disagreement(head.centred(values)).tolist()) if values.shape[1] > 1 else scores


def length_reward(target: float) -> RewardFunction:
    """1 - \|n / target - 1\| for a response of n tokens, its EOS among them: only the length counts.

    Singhal et al. 2023 (arXiv 2310.03716), length-only PPO, whose target length is a setting of each data set.

    >>> tree = Tree([5], [[7] * 10, [7] * 20, [7] * 30, [7] * 50])
    >>> length_reward(20)(Responses([""] * 4, [""] * 4, [False] * 4, [tree]))
    [0.5, 1.0, 0.5, -0.5]
    """

    def score(responses: Responses) -> list[float]:
        return [1 - abs(len(ids) / target - 1) for ids in responses.completion_ids]

    return score


def function_reward(function: Callable[..., Any]) -> RewardFunction:
    """A function of TRL's signature, ``f(prompts, completions, completion_ids, **columns)``, sync or async.

    It returns, for each completion, a number, None (does not apply), or a list of (token position, value) steps.
    Conversational completions come as TRL gives them, a list with one assistant message. Steps are added to the rewards
    as they are: clipping, centring and ``missing_eos_penalty`` are for the score.
    """
    name = getattr(function, "__name__", type(function).__name__)
    takes = inspect.signature(function).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes.values())

    def score(responses: Responses) -> list[Reward]:
        completions: list[Any] = list(responses.completions)
        if is_conversation(responses.prompts[0]):
            completions = [[{"role": "assistant", "content": text}] for text in completions]
        offered = {
            **responses.columns,
            "prompts": responses.prompts,
            "completions": completions,
            "completion_ids": responses.completion_ids,
        }
        result = function(**(offered if takes_all else {key: offered[key] for key in takes if key in offered}))
        values = list(_awaited(result) if inspect.iscoroutine(result) else result)
        if len(values) != len(completions):
            raise ModelError(
                f"the reward function gave {len(values)} values for {len(completions)} completions", where=name
            )
        return [_checked(value, ids, name) for value, ids in zip(values, responses.completion_ids, strict=True)]

    return score


def _awaited(coroutine: Coroutine[Any, Any, Any]) -> Any:
    async def result() -> Any:
        return await coroutine

    with start_blocking_portal() as loop:  # another loop, since a notebook has one running already
        return loop.call(result)


def _checked(value: Any, ids: list[int], name: str) -> Reward:
    if value is None:
        return math.nan
    if not isinstance(value, list | tuple):
        return float(value)
    steps = [(int(position), float(step)) for position, step in value]
    wrong = [position for position, _ in steps if not 0 <= position < len(ids)]
    if wrong:
        raise ModelError(
            f"a step reward stands at token {wrong[0]} of a response of {len(ids)} tokens",
            where=name,
            fix=f"positions count from 0 to {len(ids) - 1}",
        )
    return steps


def ensemble_reward(members: Sequence[RewardFunction], ensemble: Ensemble) -> RewardFunction:
    def score(responses: Responses) -> list[float]:
        scores = [member(responses) for member in members]
        of_responses = [[float(value) for value in values] for values in zip(*scores, strict=True)]
        return EnsembleScores([*map(ensemble.combine, of_responses)], [float(disagreement(v)) for v in of_responses])

    return score


def reward_functions(
    reward: Any,
    policy_tokenizer: PreTrainedTokenizerBase,
    section: ModelSection,
    device: torch.device,
    *,
    tokenizers: Sequence[PreTrainedTokenizerBase | None] | None = None,
    shape: RewardShape = "score",
) -> list[RewardFunction]:
    """One function for each reward: the name or folder of a reward model, a loaded one, an :class:`Ensemble`, a
    function, or a list of these. Models go to ``device``. ``tokenizers`` belong to loaded models (None: the policy's).
    ``shape="steps"`` takes the rewards of steps, of process reward models.

    Raises RecipeError for anything else.
    """
    rewards = list(reward) if isinstance(reward, list | tuple) else [reward]
    reward_tokenizers = list(tokenizers) if tokenizers is not None else [None] * len(rewards)
    if len(reward_tokenizers) != len(rewards):
        raise RecipeError(
            f"{len(rewards)} rewards and {len(reward_tokenizers)} tokenizers",
            where="reward_processing_classes",
            fix="one for each",
        )

    def _loaded(item: Any, reads: PreTrainedTokenizerBase) -> RewardModel:
        model = disable_dropout(item).eval().requires_grad_(False).to(device)
        return RewardModel([Engine(model, int(reads.pad_token_id), dtype=torch_dtype(section.dtype))], RewardHead())

    def one(item: Any, tokenizer: PreTrainedTokenizerBase | None) -> RewardFunction:
        if isinstance(item, str):
            ref = resolve(item)
            reads = tokenizer or load_tokenizer(ref)
            return model_reward(load_scorer(ref, section, reads, device=device), reads, policy_tokenizer, shape)
        if isinstance(item, nn.Module):
            reads = tokenizer or policy_tokenizer
            return model_reward(_loaded(item, reads), reads, policy_tokenizer, shape)
        if isinstance(item, Ensemble):
            _check_members(item, shape)
            return ensemble_reward([one(member, tokenizer) for member in item.members], item)
        if callable(item):
            return function_reward(item)
        raise RecipeError(
            f"{type(item).__name__} is no reward",
            where="reward",
            fix="a model, its name or folder, toolkit.ppo.Ensemble, or a function",
        )

    return [one(item, tokenizer) for item, tokenizer in zip(rewards, reward_tokenizers, strict=True)]


def _check_members(ensemble: Ensemble, shape: RewardShape) -> None:
    if shape == "steps":
        raise RecipeError("an ensemble combines scores of whole responses", where="reward_shape", fix="score")
    if not ensemble.members:
        raise RecipeError("an ensemble needs members", where="reward")
    if not all(isinstance(member, str | nn.Module) for member in ensemble.members):
        raise RecipeError(
            "an ensemble's members are reward models",
            where="reward",
            fix="give functions in a list, with reward_weights",
        )


def weighted_sum(rewards: Sequence[Sequence[Reward]], weights: Sequence[float]) -> Scores:
    """The weighted sum of several reward functions' results, which have one reward per response each.

    A NaN is left out of the sum. A response without any reward has the score NaN, which the caller reports.

    >>> weighted_sum([[1.0, math.nan], [[(0, 0.5)], 3.0]], [2.0, 1.0])
    Scores(values=[2.0, 3.0], steps=[[(0, 0.5)], []], disagreement=[])
    """
    values, steps = [], []
    for rewards_of_response in zip(*rewards, strict=True):
        score, step_rewards, applies = 0.0, StepRewards(), False
        for reward, weight in zip(rewards_of_response, weights, strict=True):
            if isinstance(reward, list):
                step_rewards += [(position, weight * step) for position, step in reward]
                applies = True
            elif not math.isnan(reward):
                score += weight * reward
                applies = True
        values.append(score if applies else math.nan)
        steps.append(step_rewards)
    return Scores(values, steps)
