"""Policies that are kept at milestones of the KL: how near they come, and what a resumed training knows."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from toolkit.training.milestones import RESPONSES, TOLERANCE, KlMilestones, MilestonePolicy

pytestmark = pytest.mark.invariant

NOISE = torch.randn(RESPONSES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Toy:
    """A policy whose KL is its weight squared. It records what is kept, with the weight at that time."""

    def __init__(self, *milestones: float) -> None:
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.kept: list[tuple[MilestonePolicy, float]] = []
        self.measured = 0
        self.milestones = KlMilestones(milestones, [self.weight], self.measure, self.keep)

    def measure(self) -> torch.Tensor:
        self.measured += 1
        noise = NOISE - NOISE.mean()
        return self.weight.detach() ** 2 + noise / noise.std()

    def keep(self, policy: MilestonePolicy) -> None:
        self.kept.append((policy, self.weight.item()))

    def step(self, number: int, kl: float, estimate: float | None = None) -> None:
        self.weight.data.fill_(math.sqrt(kl))
        self.milestones.reach(number, kl if estimate is None else estimate)
        assert self.weight.item() == math.sqrt(kl)  # training goes on from where it was


def test_a_jump_beyond_two_milestones_keeps_a_policy_at_each() -> None:
    toy = Toy(2.0, 1.0)
    toy.milestones.start()
    toy.step(4, 0.0)
    toy.step(8, 4.66)
    assert [(policy.milestone, policy.step, policy.name) for policy, _ in toy.kept] == [(1, 8, "kl-1"), (2, 8, "kl-2")]
    for policy, weight in toy.kept:
        assert policy.kl_nats == pytest.approx(weight**2) == pytest.approx(policy.milestone, rel=TOLERANCE)
        assert policy.kl_standard_error == pytest.approx(1 / math.sqrt(RESPONSES))
    assert toy.milestones.ahead == []
    toy.step(12, 9.0)
    assert len(toy.kept) == 2


@given(
    kls=st.lists(st.floats(0.0, 40.0), min_size=1, max_size=6),
    milestones=st.lists(st.floats(0.25, 30.0), min_size=1, max_size=4, unique=True),
)
def test_each_milestone_that_is_passed_is_met_once(kls: list[float], milestones: list[float]) -> None:
    assume(all(abs(milestone - kl) > 1e-6 for milestone in milestones for kl in kls))
    toy = Toy(*milestones)
    toy.milestones.start()
    for number, kl in enumerate(kls):
        toy.step(number, kl)
    assert [policy.milestone for policy, _ in toy.kept] == sorted(m for m in milestones if m <= max(kls))
    for policy, weight in toy.kept:
        assert weight**2 == pytest.approx(policy.milestone, rel=2 * TOLERANCE)
        assert kls[policy.step] >= policy.milestone


def test_an_estimate_on_few_responses_decides_only_where_it_is_far_below() -> None:
    toy = Toy(2.0)
    toy.milestones.start()
    toy.step(1, 0.5)
    assert toy.measured == 0
    toy.step(2, 1.9, estimate=2.4)  # it looks as if the milestone were passed
    assert toy.measured == 1 and not toy.kept
    toy.step(3, 2.2, estimate=1.2)
    [(policy, weight)] = toy.kept
    assert policy.step == 3 and weight**2 == pytest.approx(2.0, rel=TOLERANCE)


def test_a_milestone_that_an_estimate_missed_keeps_the_nearest_policy() -> None:
    toy = Toy(1.0)
    toy.milestones.start()
    toy.step(1, 1.2, estimate=0.1)
    toy.step(2, 3.0)
    [(policy, weight)] = toy.kept
    assert policy.kl_nats == pytest.approx(weight**2) == pytest.approx(1.2, abs=0.1)


def test_milestones_that_were_not_reached_are_said_and_recorded() -> None:
    toy, said = Toy(1.0, 2.0, 30.0), []
    toy.milestones.start()
    toy.step(1, 1.2)
    assert toy.milestones.missed("ppo", said.append) == {"kl_milestones_missed": [2.0, 30.0]}
    assert said == ["ppo: no policy is kept for KL 2, 30: training did not get that far from the reference"]
    toy.step(2, 40.0)
    assert toy.milestones.missed("ppo", said.append) == {"kl_milestones_missed": []} and len(said) == 1


def test_a_resumed_training_goes_on_between_the_same_policies(tmp_path: Path) -> None:
    whole, part, resumed = Toy(1.0, 2.0, 3.0), Toy(1.0, 2.0, 3.0), Toy(1.0, 2.0, 3.0)
    for toy in (whole, part):
        toy.milestones.start()
        toy.step(1, 1.5)
    part.milestones.save(tmp_path / "checkpoint")
    resumed.milestones.load(tmp_path / "checkpoint")
    for toy in (whole, resumed):
        toy.step(2, 5.0)
    assert whole.kept[1:] == resumed.kept and len(resumed.kept) == 2
    resumed.milestones.save(tmp_path / "end")
    resumed.milestones.load(tmp_path / "end")
    assert resumed.milestones.ahead == [] and resumed.milestones.before is None
