"""Which prompts a rollout takes."""

from __future__ import annotations

import pytest
from support.ppo_models import (
    PROMPTS,
    SECTION,
    UPDATES,
    changed,
)

from toolkit.ppo.config import PPOConfig
from toolkit.ppo.schedule import Schedule

pytestmark = pytest.mark.invariant


def test_the_schedule_takes_every_prompt_once_in_each_round() -> None:
    section = changed(SECTION, total_episodes=8 * 6)  # 6 rollouts of 4 prompts: 4 rounds of 6 prompts
    schedule = Schedule(PROMPTS, PPOConfig(**section), seed=5)
    assert len(schedule) == 6 * UPDATES
    items = [schedule[step] for step in range(len(schedule))]
    assert [item["update"] for item in items[: 2 * UPDATES]] == [*range(UPDATES)] * 2
    epochs = [[item["minibatch"] for item in items[i : i + 2]] for i in range(0, len(items), 2)]
    assert all(sorted(epoch) == [0, 1] for epoch in epochs) and [1, 0] in epochs
    assert all(epoch == [0, 1] for epoch in epochs[::2])  # a rollout's first epoch takes them as they were drawn
    taken = [p.prompt_id for item in items[::UPDATES] for p in item["prompts"]]
    rounds = [taken[i : i + 6] for i in range(0, 24, 6)]
    assert all(sorted(r) == [p.prompt_id for p in PROMPTS] for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1
    again = Schedule(PROMPTS, PPOConfig(**section), seed=5)
    assert all(again[i]["prompts"] == items[i]["prompts"] for i in range(len(items)))
    assert any(
        Schedule(PROMPTS, PPOConfig(**section), seed=6)[i]["prompts"] != items[i]["prompts"] for i in range(len(items))
    )
