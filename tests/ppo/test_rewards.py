"""Rewards as PPO's users give them: functions, step rewards, ensembles, and a model that reads other tokens."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from toolkit.engine.engine import Engine
from toolkit.engine.reward_model import RewardModel
from toolkit.errors import ModelError
from toolkit.models.encoding import Tree
from toolkit.models.load import load_reward_model
from toolkit.models.resolve import resolve
from toolkit.models.reward_head import RewardHead
from toolkit.models.tokenizer import load_tokenizer
from toolkit.ppo import Ensemble
from toolkit.ppo.rewards import Responses, Scores, function_reward, model_reward, weighted_sum
from toolkit.recipe.training import ModelSection

pytestmark = pytest.mark.invariant


def responses_of(tokenizer: Any, texts: list[str], truncated: bool = False) -> Responses:
    prompt = tokenizer("The film")["input_ids"]
    end = [] if truncated else [tokenizer.eos_token_id]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] + end for text in texts]
    flags = [truncated] * len(texts)
    return Responses(["The film"] * len(texts), texts, flags, [Tree(prompt, ids)], {"wanted": [7] * len(texts)})


def test_a_function_gets_what_its_signature_names(tokenizer: Any) -> None:
    seen: dict[str, Any] = {}

    def score(prompts: list[str], completions: list[str], wanted: list[int]) -> list[Any]:
        seen.update(prompts=prompts, completions=completions, wanted=wanted)
        return [1, None]

    async def later(completions: list[str], **columns: Any) -> list[float]:
        seen["columns"] = sorted(columns)
        return [2.0, 3.0]

    responses = responses_of(tokenizer, [" was good.", " was bad."])
    first, second = function_reward(score)(responses), function_reward(later)(responses)
    assert seen["completions"] == [" was good.", " was bad."] and seen["wanted"] == [7, 7]
    assert seen["columns"] == ["completion_ids", "prompts", "wanted"]
    # None is left out of the sum
    assert weighted_sum([first, second], [0.5, 2.0]) == Scores([0.5 + 4.0, 6.0], [[], []])
    assert math.isnan(weighted_sum([first], [1.0]).values[1])  # no reward applies


def test_an_async_function_in_a_running_loop(tokenizer: Any) -> None:
    """As in a notebook."""

    async def later(completions: list[str]) -> list[float]:
        await asyncio.sleep(0)
        return [3.0] * len(completions)

    async def notebook() -> Any:
        return function_reward(later)(responses_of(tokenizer, ["a", "b"]))

    assert asyncio.run(notebook()) == [3.0, 3.0]


def test_conversational_completions_come_as_messages(tokenizer: Any) -> None:
    def score(completions: list[Any], **_: Any) -> list[float]:
        assert completions == [[{"role": "assistant", "content": "yes"}]]
        return [1.0]

    prompt = [{"role": "user", "content": "?"}]
    assert list(function_reward(score)(Responses([prompt], ["yes"], [False], [Tree([5], [[6]])]))) == [1.0]


def test_step_rewards_stand_at_their_tokens(tokenizer: Any) -> None:
    def steps(completion_ids: list[list[int]], **_: Any) -> list[Any]:
        return [[(0, 0.5), (len(ids) - 1, 1.0)] for ids in completion_ids]

    def beyond(completion_ids: list[list[int]], **_: Any) -> list[Any]:
        return [[(len(ids), 1.0)] for ids in completion_ids]

    responses = responses_of(tokenizer, [" was good."])
    scores = weighted_sum([function_reward(steps)(responses)], [2.0])
    last = len(responses.completion_ids[0]) - 1
    assert scores == Scores([0.0], [[(0, 1.0), (last, 2.0)]]) and scores.totals() == [3.0]
    with pytest.raises(ModelError, match="step reward stands at token"):
        function_reward(beyond)(responses)
    with pytest.raises(ModelError, match="1 values for 2 completions"):
        function_reward(lambda completions: [0.0])(responses_of(tokenizer, ["a", "b"]))


@pytest.mark.parametrize(("how", "expected"), [("mean", 2.0), ("wco", 1.0), ("uwo", 2.0 - 0.5 * 2 / 3)])
def test_ensembles(how: Any, expected: float) -> None:
    assert Ensemble((), how=how, lam=0.5).combine([1.0, 2.0, 3.0]) == pytest.approx(expected)


@pytest.mark.parametrize("truncated", [True, False])
def test_a_reward_model_with_another_tokenizer_reads_the_text(
    tokenizer: Any, reward_folder: Path, truncated: bool
) -> None:
    """The policy's ids are shifted; what is scored must be the reward model's ids of the same text."""
    ref = resolve(str(reward_folder))
    reward = load_reward_model(ref, ModelSection(name="tiny", dtype="float32", lora=None))
    other = load_tokenizer(ref)
    other.add_tokens(["<never seen>"])
    texts = [" was good.", " was very bad indeed."]
    responses = responses_of(tokenizer, texts, truncated)
    foreign = Responses(
        responses.prompts, texts, responses.truncated, [Tree([5, 6], [[7, 8], [9]])]
    )  # ids that mean something else
    scorer = RewardModel([Engine(reward, int(tokenizer.pad_token_id), dtype=torch.float32)], RewardHead())
    scores = model_reward(scorer, other, tokenizer)(foreign)
    direct = model_reward(scorer, tokenizer, tokenizer)(responses)
    assert scores == pytest.approx(direct, abs=1e-4)
    with torch.no_grad():
        tree = responses.trees[0]
        row_by_row = [
            reward(input_ids=torch.tensor([tree.prompt_ids + ids])).logits.item() for ids in tree.response_ids
        ]
    assert direct == pytest.approx(row_by_row, abs=1e-4)
