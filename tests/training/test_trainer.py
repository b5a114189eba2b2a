"""The trainer on the engine: resume, accumulation, precision, metrics, and the policies that it keeps on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.comparisons import examples
from support.small_trainers import LORA, LORA_FP32, assert_equal, build, losses, settings_of, trained
from transformers.trainer_pt_utils import get_length_grouped_indices

from toolkit.errors import DataError
from toolkit.models.load import load_policy, trainable
from toolkit.progress import Reporter
from toolkit.recipe.training import DpoSection
from toolkit.training.batch import Example, PairBatch, collate
from toolkit.training.callbacks import SaveAtKl, StageProgress
from toolkit.training.checkpoints import last_checkpoint
from toolkit.training.length import total_steps
from toolkit.training.milestones import TOLERANCE, KlMilestones, MilestonePolicy
from toolkit.training.trainer import (
    SimilarLengths,
    items_of,
    milestone_steps,
    seed_everything,
    train_to_end,
)

pytestmark = pytest.mark.invariant


@pytest.mark.parametrize(
    ("kind", "stop_at"), [("dpo", 3), ("dpo-lora", 3), ("rm", 3), ("rm-lora", 3), ("dpo-lora", 4), ("dpo-lora", 5)]
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, tiny_ref: Any, make_trees: Any, kind: str, stop_at: int
) -> None:
    section = settings_of()
    whole, model = build(kind, tmp_path / "whole", tiny_ref, make_trees, section)
    start = trained(model)
    whole.train()
    expected = trained(model)
    assert all(not torch.equal(w, expected[name]) for name, w in start.items() if "lora_A" not in name)

    stopped, _ = build(kind, tmp_path / "part", tiny_ref, make_trees, section, stop_at=stop_at)
    stopped.train()
    assert last_checkpoint(tmp_path / "part") == str(tmp_path / "part" / "trainer" / f"checkpoint-{stop_at}")
    resumed, model = build(kind, tmp_path / "part", tiny_ref, make_trees, section)
    resumed.train(resume_from_checkpoint=last_checkpoint(tmp_path / "part"))
    assert resumed.state.global_step == 6
    assert_equal(trained(model), expected)
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-6)
    # Six steps of two prompts, of eight: an epoch, and half of another.
    per_prompt = [sum(map(len, example.tree.response_ids)) for example in whole.examples]
    loader, order = whole.get_train_dataloader(), []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        order += [number for batch in loader for number, _ in batch["batch"]]
    assert resumed.spending.tokens == whole.spending.tokens == sum(per_prompt[i] for i in order[:12])
    assert whole.spending.seconds <= whole.spending.cost().wall_s


@pytest.mark.parametrize("kind", ["dpo-lora", "rm"])
def test_a_training_that_has_ended_takes_no_further_step(
    tmp_path: Path, tiny_ref: Any, make_trees: Any, kind: str
) -> None:
    """Its six steps end in the middle of an epoch of four, and a kill may come behind the last checkpoint."""
    section = settings_of(lr_scheduler_type="constant", num_train_epochs=1.5, max_steps=-1)
    whole, model = build(kind, tmp_path, tiny_ref, make_trees, section)
    whole.train()
    expected = trained(model)
    ended, model = build(kind, tmp_path, tiny_ref, make_trees, section)
    progress = StageProgress(Reporter(quiet=True), "dpo", 6)
    ended.add_callback(progress)
    train_to_end(ended, progress, tmp_path)
    assert ended.state.global_step == whole.state.global_step == 6
    assert_equal(trained(model), expected, tolerance=0)
    assert losses(ended) == losses(whole) == [entry["loss"] for entry in progress.history] and len(losses(ended)) == 6
    assert ended.spending.tokens == whole.spending.tokens > 0


def test_two_runs_with_one_seed_are_identical(tmp_path: Path, tiny_ref: Any, make_trees: Any) -> None:
    results = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        trainer, model = build("rm-lora", tmp_path / name, tiny_ref, make_trees, settings_of(max_steps=3), seed=seed)
        trainer.train()
        results.append((trained(model), losses(trainer)))
    assert results[0][1] == results[1][1] != results[2][1]
    assert_equal(results[0][0], results[1][0], tolerance=0)


@pytest.mark.parametrize("kind", ["dpo-lora", "rm"])
def test_accumulated_batches_equal_one_large_batch(tmp_path: Path, tiny_ref: Any, make_trees: Any, kind: str) -> None:
    """Prompts count alike, however many comparisons and tokens they have."""
    items = examples(make_trees) * 2
    results = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        section = settings_of(
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, max_steps=2, adam_epsilon=1e-3
        )
        trainer, model = build(kind, tmp_path / str(size), tiny_ref, make_trees, section, items=items)
        trainer.train()
        norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
        results.append((trained(model), losses(trainer), norms))
    for weights, loss, norms in results[1:]:
        assert loss == pytest.approx(results[0][1], abs=1e-4)
        assert norms == pytest.approx(results[0][2], rel=1e-3)
        assert_equal(weights, results[0][0], tolerance=2e-5)


@pytest.mark.parametrize("kind", ["dpo-lora", "rm"])
def test_a_batch_in_parts_is_the_same_batch(tmp_path: Path, tiny_ref: Any, make_trees: Any, kind: str) -> None:
    """The token budget is a matter of memory: losses, gradients, metrics and weights stay."""
    items = examples(make_trees) * 2
    results = []
    for budget in (10_000, 120, 1):
        section = settings_of(per_device_train_batch_size=4, max_steps=2, adam_epsilon=1e-3)
        folder = tmp_path / str(budget)
        trainer, model = build(kind, folder, tiny_ref, make_trees, section, items=items, token_budget=budget)
        n_parts = len(collate(trainer.engine, list(enumerate(items))[:4])["batch"])
        trainer.train()
        logged = [
            {k: v for k, v in e.items() if "rewards" in k or k in ("loss", "grad_norm")}
            for e in trainer.state.log_history
        ]
        results.append((n_parts, trained(model), [entry for entry in logged if "loss" in entry]))
    assert results[0][0] == 1 < results[1][0] < results[2][0] == 4
    for _, weights, logged in results[1:]:
        assert_equal(weights, results[0][1], tolerance=2e-5)
        for entry, expected in zip(logged, results[0][2], strict=True):
            assert entry == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("kind", ["dpo", "dpo-lora", "rm-lora"])
def test_training_runs_under_the_precision_of_its_reference(
    tmp_path: Path, tiny_ref: Any, make_trees: Any, kind: str
) -> None:
    """A reference scored under bf16 autocast and a policy trained outside it would start with a margin."""
    trainer, _ = build(kind, tmp_path, tiny_ref, make_trees, settings_of(max_steps=1), dtype="bfloat16")
    whole, seen = trainer.loss_fn, []

    def watched(batch: PairBatch) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return whole(batch)

    trainer.loss_fn = watched
    trainer.train()
    assert seen == [True]


def test_steps_and_milestones() -> None:
    section = settings_of(max_steps=-1, per_device_train_batch_size=3, gradient_accumulation_steps=2)
    assert total_steps(section, 13) == 3
    assert total_steps(section.model_copy(update={"num_train_epochs": 1.5}), 13) == 5
    assert total_steps(section.model_copy(update={"max_steps": 9}), 13) == 9
    assert milestone_steps(DpoSection(num_checkpoints=3), 10) == [3, 7, 10]
    assert milestone_steps(DpoSection(num_checkpoints=5), 2) == [1, 2]


# ---------------------------------------------------------------- KL milestones


def with_milestones(
    out: Path, tiny_ref: Any, make_trees: Any, milestones: list[float], **more: Any
) -> tuple[Any, list[tuple[MilestonePolicy, dict[str, torch.Tensor]]]]:
    """A trainer on a policy whose KL is made up: how far its weights have moved, squared."""
    trainer, model = build("dpo-lora", out, tiny_ref, make_trees, settings_of(max_steps=6, logging_steps=1), **more)
    start = trained(trainer_start(tiny_ref))
    weights = [weight for weight in model.parameters() if weight.requires_grad]

    def measure(_: int = 0) -> torch.Tensor:
        moved = sum(float((w - start[name]).double().square().sum()) for name, w in trained(model).items())
        return torch.tensor([moved - 1, moved + 1], dtype=torch.float64)

    saved: list[tuple[MilestonePolicy, dict[str, torch.Tensor]]] = []
    keeper = KlMilestones(milestones, weights, measure, lambda kept: saved.append((kept, trained(model))))
    trainer.add_callback(SaveAtKl(keeper, measure, trainer.values))
    return trainer, saved


def trainer_start(tiny_ref: Any) -> Any:
    seed_everything(0)
    return trainable(load_policy(tiny_ref, LORA_FP32), LORA, task="CAUSAL_LM")


def test_a_policy_is_kept_at_each_milestone_between_two_steps(tmp_path: Path, tiny_ref: Any, make_trees: Any) -> None:
    plain, _ = build("dpo-lora", tmp_path / "plain", tiny_ref, make_trees, settings_of(max_steps=6, logging_steps=1))
    plain.train()
    trainer, saved = with_milestones(tmp_path, tiny_ref, make_trees, [1e-9])
    trainer.train()
    logged = {entry["step"]: entry["objective/kl"] for entry in trainer.state.log_history if "objective/kl" in entry}
    assert list(logged) == [1, 2, 3, 4, 5, 6] and losses(trainer) == losses(plain)  # training itself is the same
    milestones = [0.5 * (logged[1] + logged[2]), 0.9 * logged[2], 0.5 * (logged[5] + logged[6]), 10 * logged[6]]
    trainer, saved = with_milestones(tmp_path / "more", tiny_ref, make_trees, milestones)
    trainer.train()
    assert [(kept.milestone, kept.step) for kept, _ in saved] == list(zip(milestones[:3], (2, 2, 6), strict=True))
    assert [kept.kl_nats for kept, _ in saved] == pytest.approx(milestones[:3], rel=TOLERANCE)


def test_a_resumed_run_keeps_the_same_policies(tmp_path: Path, tiny_ref: Any, make_trees: Any) -> None:
    trainer, saved = with_milestones(tmp_path / "first", tiny_ref, make_trees, [1e9])
    trainer.train()
    kl = [entry["objective/kl"] for entry in trainer.state.log_history if "objective/kl" in entry]
    milestones = [0.9 * kl[1], 0.5 * (kl[2] + kl[3])]  # passed by the steps 2 and 4
    whole, of_whole = with_milestones(tmp_path / "whole", tiny_ref, make_trees, milestones)
    whole.train()
    part, of_part = with_milestones(tmp_path / "part", tiny_ref, make_trees, milestones, stop_at=3)
    part.train()
    assert [kept.step for kept, _ in of_part] == [2]
    resumed, of_resumed = with_milestones(tmp_path / "part", tiny_ref, make_trees, milestones)
    resumed.train(resume_from_checkpoint=last_checkpoint(tmp_path / "part"))
    [(kept, weights)] = of_resumed
    assert kept == of_whole[1][0]
    assert_equal(weights, of_whole[1][1])


@pytest.mark.parametrize(("n", "batch_size"), [(1, 4), (7, 4), (16, 4), (100, 3), (900, 4)])
def test_examples_of_like_lengths_come_together_as_transformers_has_them(n: int, batch_size: int) -> None:
    """In the very order of transformers' sampler, which shuffles anew in each epoch."""
    lengths = torch.randint(1, 30, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    sampler = SimilarLengths(lengths, batch_size, seed=2)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        generator = torch.Generator().manual_seed(2 * 100_003 + epoch)
        assert list(sampler) == get_length_grouped_indices(lengths, batch_size, generator=generator)


@pytest.mark.parametrize(("trainer", "says"), [("engine", "no comparison to train on"), ("trl", "is a tie")])
def test_nothing_to_train_on_is_the_datas_fault(make_trees: Any, trainer: Any, says: str) -> None:
    ties = [Example(tree, [(0, 1, 0.5, 1.0)]) for tree in make_trees(2, seed=1)]
    with pytest.raises(DataError, match=says):
        items_of(DpoSection(trainer=trainer), ties if trainer == "trl" else [])
