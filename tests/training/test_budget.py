"""Training until a budget is spent: where it ends, which policies are kept, the learning rate, and resuming."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerCallback, TrainerControl

from toolkit.engine.engine import Engine
from toolkit.errors import RecipeError
from toolkit.models.encoding import Tree
from toolkit.models.load import load_policy, trainable
from toolkit.progress import Reporter
from toolkit.recipe.training import DpoSection, Lora, ModelSection
from toolkit.stages import dpo
from toolkit.training.batch import Example
from toolkit.training.budget import Budget, Spending
from toolkit.training.callbacks import StageProgress
from toolkit.training.checkpoints import last_checkpoint
from toolkit.training.length import Cost, Limit, limit_of, total_steps
from toolkit.training.trainer import (
    EngineTrainer,
    keep_along,
    seed_everything,
    training_arguments,
)

pytestmark = pytest.mark.invariant

LORA_FP32 = ModelSection(name="tiny", dtype="float32", lora=Lora(r=4, alpha=8))
TOKENS = 12  # of an example's responses


# ---------------------------------------------------------------- the decisions, on made-up costs


class Simulated:
    """A budget of tokens whose units cost what they are said to."""

    def __init__(self, amount: int, *, before: int = 0, n_policies: int = 3, **more: Any) -> None:
        self.spending, self.kept = Spending(Cost(before)), list[int]()
        limit = Limit("train_tokens", amount)
        self.budget = Budget(limit, self.spending, n_policies, self.kept.append, **more)
        self.args = SimpleNamespace(device=torch.device("cpu"))
        self.state = SimpleNamespace(global_step=0, is_world_process_zero=True, stateful_callbacks={})
        self.saved: list[int] = []
        self.shares: list[float] = []

    def begin(self) -> None:
        self.spending.on_train_begin(self.args, self.state)  # type: ignore[arg-type]
        self.budget.on_train_begin(self.args, self.state)  # type: ignore[arg-type]

    def train(self, costs: list[int]) -> int:
        """Returns the number of steps."""
        self.begin()
        for tokens in costs:
            control = TrainerControl()
            self.spending.add(tokens)
            self.spending.on_optimizer_step(self.args, self.state)  # type: ignore[arg-type]
            self.shares.append(self.budget.share())
            self.state.global_step += 1
            self.budget.on_step_end(self.args, self.state, control)  # type: ignore[arg-type]
            if control.should_save:
                self.saved.append(self.state.global_step)
            if control.should_training_stop:
                break
        return self.state.global_step


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 400), st.integers(0, 300))
def test_training_ends_at_the_unit_nearest_to_the_budget(costs: list[int], left: int, before: int) -> None:
    """Nearest by the price of the last unit: at most half of one is missing, or spent beyond."""
    simulated = Simulated(before + left, before=before)
    n = simulated.train(costs)
    spent = sum(costs[:n])
    assert simulated.budget.spent == before + spent
    if simulated.budget.ended:
        assert simulated.budget.ended == "spent" and spent + costs[n - 1] / 2 > left
        assert n == 1 or sum(costs[: n - 1]) + costs[n - 2] / 2 <= left
    else:
        assert n == len(costs) and spent + costs[-1] / 2 <= left
    assert simulated.shares == pytest.approx([min(1.0, sum(costs[: i + 1]) / left) for i in range(n)])


def test_policies_and_checkpoints_fall_on_even_shares_of_what_is_left() -> None:
    simulated = Simulated(1000 + 600, before=1000, n_policies=3)
    assert simulated.train([10] * 100) == 60 and simulated.budget.spent_share == 1.0
    assert simulated.kept == [20, 40] and simulated.saved == [10, 20, 30, 40, 50]
    assert str(simulated.budget) == (
        "spent 100% of the budget, 1,600 of 1,600 response tokens (1,000 in earlier stages)"
    )
    uneven = Simulated(600, n_policies=4)
    assert uneven.train([100, 40, 20, 200, 100, 200, 50]) == 6  # after each: 100, 140, 160, 360, 460, 660
    assert uneven.kept == [3, 4, 5] and uneven.saved == [1, 4, 5]  # one step passed two shares of six
    rollouts = Simulated(600, n_policies=2, unit_steps=4)
    assert rollouts.train([25] * 100) == 24
    assert rollouts.kept == [12] and rollouts.saved == [4, 8, 12, 16, 20]


def test_a_resumed_training_counts_what_it_repeats_once() -> None:
    costs = [50, 50, *[1] * 1000]
    whole, part, resumed = (Simulated(1000, before=10, unit_steps=2, cap=4) for _ in range(3))
    n = whole.train(costs)
    part.train(costs[:6])
    part.spending.started -= 100
    part.state.stateful_callbacks = {
        "Spending": json.loads(json.dumps(part.spending.state())),
        "Budget": json.loads(json.dumps(part.budget.state())),
    }
    part.train(costs[6:8])  # these are lost
    resumed.state = SimpleNamespace(**{**vars(part.state), "global_step": 6})
    assert resumed.train(costs[6:]) == n
    assert resumed.budget.ended == whole.budget.ended == "capped"
    assert resumed.spending.cost().train_tokens == whole.spending.cost().train_tokens == 10 + 100 + n - 2
    assert 100 < resumed.spending.cost().wall_s < 110


def test_units_that_shrink_do_not_train_for_ever() -> None:
    simulated = Simulated(1000, unit_steps=2, cap=4)
    assert simulated.train([50, 50, *[1] * 1000]) == 2 * 4 * 10  # four times the ten rollouts of 100 tokens
    assert simulated.budget.ended == "capped" and simulated.budget.spent_share == pytest.approx(0.178)
    assert Simulated(1000, unit_steps=2).train([50, 50, *[1] * 1000]) == 2 + 900


def test_a_budget_that_is_spent_before_training_is_refused() -> None:
    with pytest.raises(RecipeError, match="100 response tokens were spent before training began"):
        Simulated(100, before=100).begin()
    simulated = Simulated(100)
    simulated.spending.started -= 60
    simulated.budget.limit = Limit("train_seconds", 30.0)
    with pytest.raises(RecipeError, match=r"60\.. s were spent before training began"):
        simulated.begin()


def test_seconds_are_shared_from_the_beginning_of_training() -> None:
    simulated = Simulated(100)
    simulated.budget.limit = Limit("train_seconds", 110.0)
    simulated.spending.started -= 10  # the models were loaded
    simulated.begin()
    assert simulated.budget.share() == 0
    simulated.spending.started -= 25
    simulated.spending.on_optimizer_step(simulated.args, simulated.state)  # type: ignore[arg-type]
    assert simulated.budget.share() == pytest.approx(0.25, abs=0.02)
    assert simulated.budget.progress() == (35, 110)


def test_the_setting_that_has_a_value_is_the_limit() -> None:
    assert limit_of(DpoSection()) is None
    assert limit_of(DpoSection(train_tokens=70)) == Limit("train_tokens", 70)
    assert limit_of(DpoSection(train_seconds=1.5)) == Limit("train_seconds", 1.5)


# ---------------------------------------------------------------- DPO


class Watch(TrainerCallback):
    """The learning rate behind each step, and a stop on demand."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.rates: list[float] = []
        self.stop_at = stop_at

    def on_step_end(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **_: Any) -> None:
        self.rates.append(lr_scheduler.get_last_lr()[0])
        if state.global_step == self.stop_at:
            control.should_training_stop = True


def examples_of_equal_lengths() -> list[Example]:
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> list[int]:
        return torch.randint(10, 500, (n,), generator=generator).tolist()

    return [Example(Tree(draw(4), [draw(TOKENS // 2), draw(TOKENS // 2)]), [(0, 1, 1.0, 1.0)]) for _ in range(6)]


def build(
    out: Path, tiny_ref: Any, stop_at: int | None = None, items: list[Example] | None = None, **values: Any
) -> tuple[EngineTrainer, Watch, list[int]]:
    section = DpoSection(learning_rate=1e-3, per_device_train_batch_size=2, logging_steps=1, **values)
    seed_everything(0)
    model = trainable(load_policy(tiny_ref, LORA_FP32), LORA_FP32.lora, task="CAUSAL_LM")
    scorer = Engine(model, 0, dtype=torch.float32)
    items = items or examples_of_equal_lengths()
    model.eval()
    reference = [torch.stack([t.sum() for t in row]) for row in scorer.logps([e.tree for e in items])]
    steps = total_steps(section, len(items))
    arguments = training_arguments(section, out, seed=0, dtype="float32", steps=steps)
    kept: list[int] = []
    spending, watch = Spending(), Watch(stop_at)
    budget, keeping = keep_along(section, spending, steps, kept.append)
    loss = partial(dpo.dpo_loss, scorer, section, reference)
    return EngineTrainer(scorer, arguments, items, loss, [watch, *keeping], spending, budget), watch, kept


def trained(trainer: EngineTrainer) -> dict[str, torch.Tensor]:
    return {name: w.detach().clone() for name, w in trainer.model.named_parameters() if w.requires_grad}


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup"])
def test_with_constant_steps_a_budget_is_a_number_of_steps(tmp_path: Path, tiny_ref: Any, schedule: str) -> None:
    """Over epochs, too: 10 steps are more than three of 3."""
    options = {"lr_scheduler_type": schedule, "warmup_ratio": 0.2, "num_checkpoints": 5}
    by_steps, expected, kept_by_steps = build(tmp_path / "steps", tiny_ref, max_steps=10, **options)
    by_steps.train()
    by_tokens, watch, kept = build(tmp_path / "tokens", tiny_ref, train_tokens=10 * 2 * TOKENS, **options)
    by_tokens.train()
    assert by_tokens.state.global_step == 10 and by_tokens.spending.tokens == 240
    assert watch.rates == pytest.approx(expected.rates, abs=1e-12) and watch.rates[1] == 1e-3
    assert [*kept, 10] == kept_by_steps == [2, 4, 6, 8, 10]
    for name, weight in trained(by_steps).items():
        assert torch.equal(weight, trained(by_tokens)[name]), name


def test_a_budget_that_is_half_spent_leaves_half_the_learning_rate(
    tmp_path: Path, tiny_ref: Any, make_trees: Any
) -> None:
    items = [Example(tree, [(0, 1, 1.0, 1.0)]) for tree in make_trees(9, seed=3)]
    trainer, watch, _ = build(tmp_path, tiny_ref, items=items, train_tokens=400, warmup_ratio=0.0)
    shares = []
    follow = trainer.budget.share  # type: ignore[union-attr]

    class Shares(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            shares.append(follow())

    trainer.add_callback(Shares())
    trainer.train()
    assert watch.rates == pytest.approx([1e-3 * (1 - share) for share in shares])
    assert len({round(b - a, 6) for a, b in zip(shares, shares[1:], strict=False)}) > 1  # steps have unequal lengths
    assert any(abs(share - 0.5) < 0.2 for share in shares) and shares[-1] > 0.85


def test_a_resumed_budget_ends_where_an_uninterrupted_one_does(tmp_path: Path, tiny_ref: Any, make_trees: Any) -> None:
    items = [Example(tree, [(0, 1, 1.0, 1.0)]) for tree in make_trees(9, seed=3)]
    options = {"items": items, "train_tokens": 400, "num_checkpoints": 4}
    whole, expected, kept = build(tmp_path / "whole", tiny_ref, **options)
    whole.train()
    n = whole.state.global_step
    assert whole.budget is not None and whole.budget.ended == "spent" and n > 6
    part, _, before = build(tmp_path / "part", tiny_ref, stop_at=n - 3, **options)
    part.train()
    checkpoint = last_checkpoint(tmp_path / "part")
    assert checkpoint is not None
    resumed, watch, after = build(tmp_path / "part", tiny_ref, **options)
    spent_until = resumed.spending.tokens
    resumed.train(resume_from_checkpoint=checkpoint)
    assert (resumed.state.global_step, resumed.spending.tokens) == (n, whole.spending.tokens) and spent_until == 0
    assert watch.rates == pytest.approx(expected.rates[-len(watch.rates) :], abs=1e-12)
    assert sorted({*before, *after}) == kept and len(kept) == 3
    for name, weight in trained(whole).items():
        torch.testing.assert_close(trained(resumed)[name], weight, rtol=0, atol=1e-6, msg=name)


def test_progress_counts_what_the_budget_counts(tmp_path: Path, tiny_ref: Any) -> None:
    trainer, _, _ = build(tmp_path, tiny_ref, train_tokens=100)
    progress = StageProgress(Reporter(quiet=True), "dpo", 100, trainer.budget)
    trainer.add_callback(progress)
    with progress.shown():
        trainer.train()
        assert (progress.task.done, progress.task.total) == (96, 100)  # four steps of 24
        assert progress.task.label == "dpo (response tokens)"
