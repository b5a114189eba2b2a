"""What PPO optimises: reward models, ensembles of them, functions, and weighted sums of these.

A reward source is called with a :class:`Sampled` rollout and gives one value for each response: a score for the whole
of it, or a list of (token position, value) steps, as a process reward model has. NaN means "does not apply".
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from anyio.from_thread import start_blocking_portal
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from toolkit.engine.engine import Engine
from toolkit.errors import ModelError, RecipeError
from toolkit.models.encoding import Tree, is_conversation, text_encoder
from toolkit.models.inspect import DTYPES, disable_dropout
from toolkit.models.load import load_reward_model
from toolkit.models.resolve import resolve
from toolkit.models.save import reward_mean
from toolkit.models.tokenizer import load_tokenizer
from toolkit.preferences.rows import Prompt
from toolkit.recipe.schema import ModelSection

Steps = list[tuple[int, float]]
Value = float | Steps


@dataclass(frozen=True)
class Sampled:
    """Responses to score, ``samples_per_prompt`` for each tree in its order; every list has one entry per response
    but ``trees``, which has one per prompt. ``columns`` are the data set's other columns."""

    prompts: list[Prompt]
    completions: list[str]
    truncated: list[bool]
    trees: list[Tree]
    columns: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def completion_ids(self) -> list[list[int]]:
        return [ids for tree in self.trees for ids in tree.response_ids]


Source = Callable[[Sampled], Sequence[Value]]


@dataclass(frozen=True)
class Ensemble:
    """Several reward models as one, against over-optimisation (Coste et al. 2024, arXiv 2310.02743).

    ``how``: ``mean``; ``wco`` the worst member; ``uwo`` the mean minus ``lam`` times the members' variance.
    """

    members: Sequence[str | PreTrainedModel]
    how: Literal["mean", "wco", "uwo"] = "mean"
    lam: float = 0.5

    def combine(self, values: Sequence[float]) -> float:
        """One response's score from its members' scores.

        >>> [Ensemble((), how).combine([1.0, 3.0]) for how in ("mean", "wco", "uwo")]
        [2.0, 1.0, 1.5]
        """
        mean = sum(values) / len(values)
        if self.how == "wco":
            return min(values)
        if self.how == "uwo":
            return mean - self.lam * sum((value - mean) ** 2 for value in values) / len(values)
        return mean


def model_source(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    policy_tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: Any,
    mean: float = 0.0,
    token_budget: int | None = None,
) -> Source:
    """Scores of a sequence classifier with one output, minus ``mean``.

    The ids that were sampled are scored as they are; text is encoded again only where the reward model has another
    tokenizer or chat template. A truncated response gets no end of text in either case.
    """
    engine = Engine(model, int(tokenizer.pad_token_id), dtype=dtype, token_budget=token_budget)
    same = reads_the_same(tokenizer, policy_tokenizer)

    def trees_of(sampled: Sampled) -> list[Tree]:
        if same:
            return sampled.trees
        encoder = text_encoder(tokenizer, sampled.prompts[0], "the reward model")
        out, at = [], 0
        for tree in sampled.trees:
            stop = at + len(tree.response_ids)
            texts, truncated = sampled.completions[at:stop], sampled.truncated[at:stop]
            out.append(encoder.encode_samples(sampled.prompts[at], texts, truncated))
            at = stop
        return out

    def score(sampled: Sampled) -> list[float]:
        return [value - mean for values in engine.scores(trees_of(sampled)) for value in values]

    return score


def reads_the_same(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers turn a conversation into the same ids."""
    return tokenizer.get_vocab() == other.get_vocab() and tokenizer.chat_template == other.chat_template


def function_source(function: Callable[..., Any]) -> Source:
    """A function of TRL's signature, ``f(prompts, completions, completion_ids, **columns)``, sync or async.

    It returns, for each completion, a number, None (does not apply), or a list of (token position, value) steps.
    Conversational completions come as TRL gives them, a list with one assistant message. Steps are added to the rewards
    as they are: clipping, centring and ``missing_eos_penalty`` are for the score.
    """
    name = getattr(function, "__name__", type(function).__name__)
    takes = inspect.signature(function).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes.values())

    def score(sampled: Sampled) -> list[Value]:
        conversational = is_conversation(sampled.prompts[0])
        completions: list[Any] = list(sampled.completions)
        if conversational:
            completions = [[{"role": "assistant", "content": text}] for text in completions]
        offered = {
            **sampled.columns,
            "prompts": sampled.prompts,
            "completions": completions,
            "completion_ids": sampled.completion_ids,
        }
        result = function(**(offered if takes_all else {key: offered[key] for key in takes if key in offered}))
        values = list(_awaited(result) if inspect.iscoroutine(result) else result)
        if len(values) != len(completions):
            raise ModelError(
                f"the reward function gave {len(values)} values for {len(completions)} completions", where=name
            )
        return [_checked(value, ids, name) for value, ids in zip(values, sampled.completion_ids, strict=True)]

    return score


def _awaited(coroutine: Coroutine[Any, Any, Any]) -> Any:
    async def result() -> Any:
        return await coroutine

    with start_blocking_portal() as loop:  # a loop of its own: a notebook has one running already
        return loop.call(result)


def _checked(value: Any, ids: list[int], name: str) -> Value:
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


def ensemble_source(members: Sequence[Source], ensemble: Ensemble) -> Source:
    def score(sampled: Sampled) -> list[float]:
        scores = [member(sampled) for member in members]
        return [ensemble.combine(values) for values in zip(*scores, strict=True)]  # type: ignore[arg-type]

    return score


def sources(
    reward: Any,
    policy_tokenizer: PreTrainedTokenizerBase,
    section: ModelSection,
    device: torch.device,
    *,
    tokenizers: Sequence[PreTrainedTokenizerBase | None] | None = None,
) -> list[Source]:
    """One source for each reward that a user gave: a name or folder of a reward model, a loaded one, an
    :class:`Ensemble`, a function, or a list of these. Models go to ``device``; ``tokenizers`` are those of loaded ones
    (None: the policy's).

    Raises RecipeError for anything else.
    """
    given = list(reward) if isinstance(reward, list | tuple) else [reward]
    own = list(tokenizers) if tokenizers is not None else [None] * len(given)
    if len(own) != len(given):
        raise RecipeError(
            f"{len(given)} rewards and {len(own)} tokenizers", where="reward_processing_classes", fix="one for each"
        )

    def one(item: Any, tokenizer: PreTrainedTokenizerBase | None) -> Source:
        if isinstance(item, str):
            ref = resolve(item)
            model = load_reward_model(ref, section).to(device)
            return model_source(
                model,
                tokenizer or load_tokenizer(ref),
                policy_tokenizer,
                dtype=DTYPES[section.dtype],
                mean=reward_mean(ref.path),
            )
        if isinstance(item, nn.Module):
            model = disable_dropout(item).eval().requires_grad_(False).to(device)
            return model_source(model, tokenizer or policy_tokenizer, policy_tokenizer, dtype=DTYPES[section.dtype])
        if isinstance(item, Ensemble):
            if not item.members:
                raise RecipeError("an ensemble needs members", where="reward")
            if not all(isinstance(member, str | nn.Module) for member in item.members):
                raise RecipeError(
                    "an ensemble's members are reward models",
                    where="reward",
                    fix="give functions in a list, with reward_weights",
                )
            return ensemble_source([one(member, tokenizer) for member in item.members], item)
        if callable(item):
            return function_source(item)
        raise RecipeError(
            f"{type(item).__name__} is no reward",
            where="reward",
            fix="a model, its name or folder, toolkit.ppo.Ensemble, or a function",
        )

    return [one(item, tokenizer) for item, tokenizer in zip(given, own, strict=True)]


def combine(values: Sequence[Sequence[Value]], weights: Sequence[float]) -> tuple[list[float], list[Steps]]:
    """The weighted sum of several sources' values for each response: its score, and its steps.

    A NaN is left out of the sum; a response without any value has the score NaN, which the caller reports.
    """
    scores, steps = [], []
    for per_source in zip(*values, strict=True):
        total, any_value = 0.0, False
        found: Steps = []
        for value, weight in zip(per_source, weights, strict=True):
            if isinstance(value, list):
                found += [(position, weight * step) for position, step in value]
                any_value = True
            elif not math.isnan(value):
                total += weight * value
                any_value = True
        scores.append(total if any_value else math.nan)
        steps.append(found)
    return scores, steps
