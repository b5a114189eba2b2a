"""What must hold of PPO whatever it learns: where it starts, what it may change, and that interrupting it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.ppo_models import PROMPTS, SECTION, UPDATES, Folders, changed, make_trainer, scores_of, timeless
from transformers import TrainerCallback

from toolkit.engine.sampling import sample_responses
from toolkit.models.encoding import Tree
from toolkit.ppo import sampling as ppo_sampling
from toolkit.training.checkpoints import last_checkpoint

pytestmark = pytest.mark.invariant


# ---------------------------------------------------------------- where it starts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["full", "lora", "mixed"])
def test_the_first_update_starts_at_the_policy_and_the_reference(
    folders: Folders, tmp_path: Path, kind: str, dtype: str
) -> None:
    models = folders.models(kind, dtype=dtype)
    # A microbatch for each prompt, so that all but the first are computed again.
    section = changed(SECTION, temperature=0.7, total_episodes=8, token_budget=1)
    trainer, record = make_trainer(models, folders, tmp_path, section, dtype=dtype)
    trainer.train()
    first = record.logs[0]
    # The mean of ones in fp32 is exact; a sum that is divided later may round in the last place.
    assert first["policy/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert first["policy/first_ratio_error"] <= 1e-6
    assert first["policy/approx_kl"] == 0.0
    assert first["policy/clip_fraction"] == 0.0
    assert first["value/clip_fraction"] == 0.0
    assert first["objective/kl"] == 0.0
    assert first["objective/kl_k3"] == 0.0
    assert first["objective/entropy"] > 0
    assert 0 < first["eos_rate"] < 1
    assert record.logs[-1]["policy/ratio"] != 1.0


def test_a_sampler_that_is_not_the_policy_shows(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both passes of ``first_ratio_error`` are training's, so that it is blind to what the samples came from."""
    section = changed(SECTION, temperature=0.7, total_episodes=8)

    def first_log(name: str, models: Any) -> dict[str, float]:
        trainer, record = make_trainer(models, folders, tmp_path / name, section)
        trainer.train()
        return dict(record.logs[0])

    right = first_log("right", folders.models("full"))
    assert 0 <= right["sampling/logp_difference"] <= right["sampling/logp_difference_max"] < 1e-3

    models = folders.models("full")

    def sample_another_policy(policy: Any, *args: Any, **more: Any) -> Any:
        weights = policy.get_output_embeddings().weight
        with torch.no_grad():
            weights *= 1.1
            responses = sample_responses(policy, *args, **more)
            weights /= 1.1
        return responses

    monkeypatch.setattr(ppo_sampling, "sample_responses", sample_another_policy)
    wrong = first_log("wrong", models)
    assert wrong["policy/first_ratio_error"] <= 1e-6
    assert 0.05 < wrong["sampling/logp_difference"] < wrong["sampling/logp_difference_max"]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_microbatches_do_not_change_the_gradients(folders: Folders, tmp_path: Path, kind: str) -> None:
    results = []
    for token_budget in (100_000, 1):
        models = folders.models(kind)
        trainer, _ = make_trainer(models, folders, tmp_path, changed(SECTION, token_budget=token_budget))
        loss = trainer.training_step(trainer.model, trainer.schedule[0])
        assert trainer.rollout is not None
        n_microbatches = len(trainer.rollout.minibatches[0])
        gradients = {n: w.grad for n, w in models.named_parameters() if w.grad is not None}
        results.append((n_microbatches, float(loss), gradients))
    (one, loss, whole), (several, summed, added_up) = results
    assert (one, several) == (1, 2)
    assert summed == pytest.approx(loss, abs=1e-5)
    assert whole.keys() == added_up.keys() and whole
    assert any("value_head" in name or "critic" in name for name in whole)
    for name, gradient in whole.items():
        assert float((gradient - added_up[name]).norm()) <= 1e-3 * float(gradient.norm()) + 1e-7, name


# ---------------------------------------------------------------- what training changes


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_every_update_is_an_optimiser_step_and_the_frozen_models_stay(
    folders: Folders, tmp_path: Path, kind: str
) -> None:
    models = folders.models(kind)
    batch = models.engine.pack([Tree(p.ids, [[7, 8, 9, 2]]) for p in PROMPTS])
    trained = {name for name, w in models.named_parameters() if w.requires_grad}
    before = {name: w.detach().clone() for name, w in models.named_parameters()}
    trees = list(batch.trees)
    reference, scores = models.reference_logps(batch, 1.0), scores_of(folders, models, trees)
    with torch.no_grad():
        logps, values = models.policy_logps(batch, 1.0)[0], models.values(batch)
    trainer, record = make_trainer(models, folders, tmp_path)
    trainer.train()
    assert trainer.state.global_step == len(record.weights) == 2 * UPDATES
    assert len(set(record.weights)) == 2 * UPDATES  # each of them moved the weights
    assert torch.equal(models.reference_logps(batch, 1.0), reference)
    assert scores_of(folders, models, trees) == scores
    with torch.no_grad():
        assert not torch.allclose(models.policy_logps(batch, 1.0)[0], logps, atol=1e-4)
        assert not torch.allclose(models.values(batch), values, atol=1e-4)
    after = dict(models.named_parameters())
    assert {name for name, w in before.items() if not torch.equal(w, after[name])} == trained
    assert [log["objective/kl"] != 0 for log in record.logs if "objective/kl" in log] == [False, True]
    rates = {group["lr"] for group in trainer.optimizer.param_groups}  # type: ignore[union-attr]
    assert rates == {1e-3} and trainer.optimizer.param_groups[0]["eps"] == 1e-5  # type: ignore[union-attr]


def test_a_learning_rate_of_zero_changes_nothing(folders: Folders, tmp_path: Path) -> None:
    models = folders.models("lora")
    before = {name: w.clone() for name, w in models.state_dict().items()}
    trainer, record = make_trainer(models, folders, tmp_path, changed(SECTION, learning_rate=0.0))
    trainer.train()
    after = models.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(w, after[name]) for name, w in before.items())
    assert len(record.logs) == 2 * UPDATES
    for log in record.logs:
        assert log["policy/ratio"] == pytest.approx(1.0, abs=1e-6)
        assert log["policy/approx_kl"] == log["policy/clip_fraction"] == 0
    assert record.logs[UPDATES]["objective/kl"] == 0


def test_the_critic_has_a_rate_of_its_own(folders: Folders, tmp_path: Path) -> None:
    models = folders.models("lora")
    before = {name: w.detach().clone() for name, w in models.trained_state().items()}
    section = changed(SECTION, learning_rate=0.0, value_learning_rate=1e-3, total_episodes=8)
    trainer, _ = make_trainer(models, folders, tmp_path, section)
    trainer.train()
    moved = {name for name, w in models.trained_state().items() if not torch.equal(w, before[name])}
    assert moved and all("critic" in name or "value_head" in name for name in moved)


def test_the_gradient_norm_is_clipped(folders: Folders, tmp_path: Path) -> None:
    """Adam hides the size of a gradient, so look at what reaches the optimiser."""
    section = changed(SECTION, max_grad_norm=1e-3, total_episodes=8)
    models = folders.models("lora")
    trainer, record = make_trainer(models, folders, tmp_path, section)
    norms: list[float] = []

    class Norms(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            weights = [w for w in models.parameters() if w.grad is not None]
            norms.append(float(torch.stack([w.grad.norm() for w in weights if w.grad is not None]).norm()))

    trainer.add_callback(Norms())
    trainer.train()
    assert len(norms) == UPDATES and max(norms) == pytest.approx(1e-3, rel=1e-2)
    assert max(log["grad_norm"] for log in record.logs) > 1e-2


def test_training_stops_when_the_kl_passes_its_limit(folders: Folders, tmp_path: Path) -> None:
    section = changed(SECTION, max_kl=1e-3, total_episodes=80)
    trainer, record = make_trainer(folders.models("lora"), folders, tmp_path, section)
    trainer.train()
    kls = [log["objective/kl"] for log in record.logs if "objective/kl" in log]
    assert trainer.state.global_step == (len(kls) - 1) * UPDATES + 1 < len(trainer.schedule)
    assert max(kls[:-1]) <= 1e-3 < kls[-1]


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize(("kind", "stop_at"), [("full", UPDATES), ("lora", 2 * UPDATES + 1)])
def test_a_resumed_run_equals_an_uninterrupted_one(folders: Folders, tmp_path: Path, kind: str, stop_at: int) -> None:
    section = changed(
        SECTION,
        total_episodes=24,
        adaptive_kl=True,
        kl_coef=0.2,
        adaptive_kl_target=1e-3,
        adaptive_kl_horizon=20,
        lr_scheduler_type="linear",
    )
    whole = folders.models(kind)
    trainer, uninterrupted = make_trainer(whole, folders, tmp_path / "whole", section)
    trainer.train()
    coefficients = [log["objective/kl_coef"] for log in uninterrupted.logs if "objective/kl_coef" in log]
    assert len(set(coefficients)) == 3

    trainer, _ = make_trainer(folders.models(kind), folders, tmp_path / "part", section, stop_at=stop_at)
    trainer.train()
    assert trainer.state.global_step == stop_at
    resumed = folders.models(kind)
    trainer, record = make_trainer(resumed, folders, tmp_path / "part", section)
    checkpoint = last_checkpoint(tmp_path / "part")
    assert checkpoint is not None and checkpoint.endswith(f"-{stop_at // UPDATES * UPDATES}")
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == 3 * UPDATES
    sampled = [log["tokens"] for log in uninterrupted.logs if "tokens" in log]
    assert trainer.spending.tokens == 2 * sum(sampled)  # two epochs
    state, expected = resumed.trained_state(), whole.trained_state()
    assert state.keys() == expected.keys()
    for name, weight in state.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6, msg=name)
    for log, same in zip(record.logs, uninterrupted.logs[-len(record.logs) :], strict=True):
        assert log.keys() == same.keys()
        assert timeless(log) == pytest.approx(timeless(same), rel=1e-4, abs=1e-5)


def test_two_runs_with_one_seed_are_identical(folders: Folders, tmp_path: Path) -> None:
    results = []
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        models = folders.models("lora")
        section = changed(SECTION, total_episodes=8)
        trainer, record = make_trainer(models, folders, tmp_path / name, section, seed=seed)
        trainer.train()
        results.append((record.weights, [log["loss"] for log in record.logs]))
    assert results[0] == results[1] != results[2]
