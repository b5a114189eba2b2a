"""What a process reward model gives to PPO: the solution score at the end of a response, or a reward at every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from toolkit.engine.process import StepEnds, StepProbabilities
from toolkit.errors import RecipeError
from toolkit.evals.process import solution_score, step_rewards
from toolkit.models.reward_head import RewardHead

RewardShape = Literal["score", "steps"]


def rewards_of_steps(
    head: RewardHead, shape: RewardShape, steps: Sequence[StepProbabilities]
) -> list[float | list[tuple[int, float]]]:
    """The reward of each response: its centred solution score, or (token position, value) of each step.

    A step has its reward at the token that closes it, not at its own last token: whether the step ends there is decided
    by what follows, and an advantage counts rewards from its token on.

    The value of a step is the change that it makes in the solution score, so that the values add up to the score, and
    the policy that is best for one is best for the other (a potential that is 0 before the first step: Ng, Harada and
    Russell 1999). A sum of the steps' own scores would pay for more steps (Cheng et al. 2025, arXiv 2504.15275).

    >>> from toolkit.models.reward_head import ProcessHead
    >>> head = RewardHead(process=ProcessHead("; ", "min"), mean=0.5)
    >>> steps = [[(3, 0.75), (7, 0.25)]]
    >>> rewards_of_steps(head, "steps", steps), rewards_of_steps(head, "score", steps)
    ([[(3, 0.75), (7, -0.5)]], [-0.25])
    """
    assert head.process is not None
    rule = head.process.solution_score
    if shape == "score":
        return [solution_score([p for _, p in of_response], rule) - head.mean for of_response in steps]
    return [
        list(zip([at for at, _ in of_response], step_rewards([p for _, p in of_response], rule), strict=True))
        for of_response in steps
    ]


def on_sampled_tokens(steps: StepProbabilities, ids: Sequence[int], ends: StepEnds) -> StepProbabilities:
    """The steps at the tokens that the policy sampled, where the reward model read them as other tokens.

    Steps that the reward model read and the policy's tokens do not show, if any, stand at the last token.
    """
    places = [*(step.closed for step in ends(ids)), *([len(ids) - 1] * len(steps))]
    return [(place, p) for place, (_, p) in zip(places, steps, strict=False)]


def shape_of(name: str) -> RewardShape:
    """The shape of this name, which :class:`toolkit.ppo.PPOConfig` has checked."""
    return "steps" if name == "steps" else "score"


def check_shape(head: RewardHead, shape: RewardShape) -> None:
    """Raises RecipeError where rewards of steps are asked of a reward model that has none."""
    if shape == "steps" and head.process is None:
        raise RecipeError(
            "this reward model scores whole responses, and has no rewards of steps",
            where="reward_shape",
            fix="score, or a process reward model (reward_model.kind: process)",
        )
