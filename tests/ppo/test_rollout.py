"""A rollout's targets, and an update's losses, against loops over one response at a time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.ppo_models import (
    ENDS,
    LORA_CONFIG,
    MEAN,
    PROMPTS,
    SECTION,
    Folders,
    changed,
    roll,
    shake,
)
from support.small_models import one_response

from toolkit.engine.tree import pack
from toolkit.models.encoding import Tree
from toolkit.models.load import load_policy, load_reward_model
from toolkit.models.resolve import resolve
from toolkit.ppo import PPOConfig, PPOTrainer, objective
from toolkit.ppo.rewards import Responses
from toolkit.ppo.rollout import collect, scatter_to_responses, split_evenly
from toolkit.ppo.sampling import SamplingSettings, Scorer
from toolkit.recipe.training import ModelSection

pytestmark = pytest.mark.invariant


def whole(responses: Responses) -> list[float]:
    return [0.3 * len(ids) - 1 + (ids[0] % 5) / 10 for ids in responses.completion_ids]


def stepwise(responses: Responses) -> list[Any]:
    return [[(len(ids) // 2, 0.25)] for ids in responses.completion_ids]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kl_estimator": "k3", "gamma": 0.9, "lam": 0.7},
        {"temperature": 0.7, "missing_eos_penalty": None, "reward_clip": 0.5},
        {"whiten_rewards": True},
    ],
)
def test_a_rollout_is_what_a_loop_over_responses_gives(folders: Folders, options: dict[str, Any]) -> None:
    models = folders.models("lora")
    shake(models.policy, "lora_B.default.", seed=4, scale=0.02)
    section = changed(SECTION, whiten_advantages=False, token_budget=30, **options)
    config, kl_coef = PPOConfig(**section), 0.3
    sampling, score = SamplingSettings(folders.tokenizer, ENDS, torch.float32, 0), Scorer([whole, stepwise], [2.0, 4.0])
    rollout = collect(models, PROMPTS[:4], config, score, sampling, index=0, kl_coef=kl_coef)
    reference = load_policy(resolve(str(folders.sft)), ModelSection(dtype="float32"))
    models.use_policy()

    rows = []
    for microbatch in (item for minibatch in rollout.minibatches for item in minibatch):
        responses = [(tree.prompt_ids, ids) for tree in microbatch.batch.trees for ids in tree.response_ids]
        assert microbatch.mask_ST.sum(1).tolist() == [len(ids) for _, ids in responses]
        for row, (prompt, ids) in enumerate(responses):
            with torch.no_grad():
                logps, entropy = one_response(models.policy, prompt, ids, config.temperature)
                log_ratio = (logps - one_response(reference, prompt, ids, config.temperature)[0]).tolist()
            n, truncated = len(ids), ids[-1] not in ENDS
            score_of = 2.0 * (0.3 * n - 1 + (ids[0] % 5) / 10)
            clip = config.reward_clip or math.inf
            shaped = max(-clip, min(clip, score_of))
            if truncated and config.missing_eos_penalty is not None:
                shaped = config.missing_eos_penalty
            k3 = [math.exp(-x) - 1 + x for x in log_ratio]
            rewards = [-kl_coef * x for x in (k3 if config.kl_estimator == "k3" else log_ratio)]
            rewards[-1] += shaped
            rewards[n // 2] += 1.0
            targets = [
                t[row, :n].tolist() for t in (microbatch.old_values_ST, microbatch.advantages_ST, microbatch.returns_ST)
            ]
            rows.append((rewards, targets, log_ratio, k3, entropy.tolist(), score_of + 1.0, truncated))
    assert {row[6] for row in rows} == {True, False} and len(rows) == 8

    if config.whiten_rewards:
        flat = np.array([r for row in rows for r in row[0]])
        scale = 1 / math.sqrt(flat.var(ddof=1) + 1e-8)
        rows = [([(r - flat.mean()) * scale + flat.mean() for r in row[0]], *row[1:]) for row in rows]
    for rewards, (values, advantages, returns), *_ in rows:
        following = 0.0
        for t in reversed(range(len(rewards))):
            after = values[t + 1] if t + 1 < len(values) else 0.0
            following = rewards[t] + config.gamma * after - values[t] + config.gamma * config.lam * following
            assert advantages[t] == pytest.approx(following, abs=1e-4)
            assert returns[t] == pytest.approx(following + values[t], abs=1e-4)

    scores, n_tokens = [row[5] for row in rows], sum(len(row[0]) for row in rows)
    all_returns, all_values = (np.array([x for row in rows for x in row[1][i]]) for i in (2, 0))
    expected = {
        "objective/kl": np.mean([sum(row[2]) for row in rows]),
        "objective/kl_k3": np.mean([sum(row[3]) for row in rows]),
        "objective/entropy": sum(sum(row[4]) for row in rows) / n_tokens,
        "objective/score": np.mean(scores),
        "objective/rlhf_reward": np.mean([sum(row[0]) for row in rows]),
        **{f"objective/score_q{q}": np.quantile(scores, q / 100) for q in (10, 50, 90)},
        "value/explained_variance": 1 - (all_returns - all_values).var(ddof=1) / all_returns.var(ddof=1),
        "length/mean": n_tokens / len(rows),
        "eos_rate": np.mean([not row[6] for row in rows]),
        "tokens": n_tokens,
        "objective/kl_coef": kl_coef,
        # What samples and what trains are one policy, up to rounding.
        "sampling/logp_difference": 0.0,
        "sampling/logp_difference_max": 0.0,
    }
    assert rollout.metrics["objective/entropy"] > 0 and abs(rollout.metrics["objective/kl"]) > 0.01
    for name, value in expected.items():
        assert rollout.metrics[name] == pytest.approx(float(value), rel=1e-3, abs=1e-3), name
    others = {"objective/score_shaped", "speed/generate_tokens_per_s", "speed/score_tokens_per_s"}
    assert rollout.metrics.keys() == expected.keys() | others
    for name in ("kl_nats", "score", "n_tokens"):
        of_table = sorted(float(getattr(row, name)) for row in rollout.completions)
        of_loop = {"kl_nats": [sum(row[2]) for row in rows], "score": scores, "n_tokens": [len(row[0]) for row in rows]}
        assert of_table == pytest.approx(sorted(map(float, of_loop[name])), abs=1e-3)


@pytest.mark.parametrize("kind", ["full", "lora", "mixed"])
@pytest.mark.parametrize("budget", [1, 30, 4096])
def test_a_rollout_of_rloo_is_what_a_loop_over_responses_gives(folders: Folders, kind: str, budget: int) -> None:
    """The score minus the KL penalty of a response, against the prompt's other samples; in any packing."""
    models = folders.models(kind, with_critic=False)
    shake(models.policy, "lora_B.default." if kind != "full" else "layers.1", seed=4, scale=0.02)
    section = changed(SECTION, advantage="rloo", per_device_train_batch_size=12, samples_per_prompt=3)
    section = changed(section, whiten_advantages=False, token_budget=budget)
    config, kl_coef = PPOConfig(**section), 0.3
    sampling, score = SamplingSettings(folders.tokenizer, ENDS, torch.float32, 0), Scorer([whole, stepwise], [2.0, 4.0])
    rollout = collect(models, PROMPTS[:4], config, score, sampling, index=0, kl_coef=kl_coef)
    reference = load_policy(resolve(str(folders.sft)), ModelSection(dtype="float32"))
    models.use_policy()
    for microbatch in (item for minibatch in rollout.minibatches for item in minibatch):
        assert microbatch.old_values_ST is None and microbatch.returns_ST is None
        row = 0
        for tree in microbatch.batch.trees:
            rewards = []
            for ids in tree.response_ids:
                with torch.no_grad():
                    logps = one_response(models.policy, tree.prompt_ids, ids, 1.0)[0]
                    kl = float((logps - one_response(reference, tree.prompt_ids, ids, 1.0)[0]).sum())
                truncated = ids[-1] not in ENDS
                shaped = -1.0 if truncated else max(-10.0, min(10.0, 2.0 * (0.3 * len(ids) - 1 + (ids[0] % 5) / 10)))
                rewards.append(shaped + 1.0 - kl_coef * kl)
            for i, ids in enumerate(tree.response_ids):
                others = [reward for j, reward in enumerate(rewards) if j != i]
                advantage = rewards[i] - sum(others) / 2
                expected = [advantage] * len(ids) + [0.0] * (microbatch.mask_ST.shape[1] - len(ids))
                assert microbatch.advantages_ST[row].tolist() == pytest.approx(expected, abs=1e-4)
                row += 1
    assert rollout.metrics["objective/kl"] != 0 and not any(name.startswith("value/") for name in rollout.metrics)


@pytest.mark.parametrize("share_trunk", [False, True])
def test_an_update_takes_its_clips_and_weights_from_the_settings(tmp_path: Path, share_trunk: bool) -> None:
    """The second update's losses, whose ratios and values have moved, are those of the equations."""
    chosen: dict[str, Any] = {"cliprange": 0.01, "cliprange_value": 0.02, "dual_clip": 1.05, "vf_coef": 0.7}
    section = changed(SECTION, num_mini_batches=1, total_episodes=8, share_trunk=share_trunk, stop_token_ids=ENDS)
    args = PPOConfig(str(tmp_path), **(section | chosen | {"learning_rate": 3e-2, "save_strategy": "no"}))

    def lengths(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(len(ids)) for ids in completion_ids]

    rows = [{"prompt": f"The film was {word}"} for word in ("good", "bad", "long", "new")]
    trainer = PPOTrainer("tiny", args, lengths, rows, peft_config=LORA_CONFIG)
    trainer.training_step(trainer.model, trainer.schedule[0])
    trainer.create_optimizer().step()
    trainer.model.zero_grad()
    assert trainer.rollout is not None
    [microbatch] = trainer.rollout.minibatches[0]
    width, n_tokens = microbatch.mask_ST.shape[1], int(microbatch.mask_ST.sum())
    with torch.no_grad():
        logps_N, _ = trainer.models.policy_logps(microbatch.batch, 1.0)
        values_N = trainer.models.values(microbatch.batch)
    logps, values = (
        scatter_to_responses(logps_N, microbatch.batch, width),
        scatter_to_responses(values_N, microbatch.batch, width),
    )
    policy = objective.policy_loss(
        logps,
        microbatch.old_logps_ST,
        microbatch.advantages_ST,
        microbatch.mask_ST,
        cliprange=0.01,
        n_tokens=n_tokens,
        dual_clip=1.05,
    )
    value, _ = objective.value_loss(
        values,
        microbatch.old_values_ST,
        microbatch.returns_ST,
        microbatch.mask_ST,
        cliprange_value=0.02,
        n_tokens=n_tokens,
    )
    # Each of the settings moves the losses here.
    for other in ({"cliprange": 0.2, "dual_clip": 1.05}, {"cliprange": 0.01, "dual_clip": None}):
        differs = objective.policy_loss(
            logps, microbatch.old_logps_ST, microbatch.advantages_ST, microbatch.mask_ST, n_tokens=n_tokens, **other
        )
        assert abs(float(differs.loss) - float(policy.loss)) > 1e-4
    differs, _ = objective.value_loss(
        values,
        microbatch.old_values_ST,
        microbatch.returns_ST,
        microbatch.mask_ST,
        cliprange_value=0.2,
        n_tokens=n_tokens,
    )
    assert abs(float(differs) - float(value)) > 1e-4
    total = trainer.training_step(trainer.model, trainer.schedule[1])
    assert trainer.unlogged.values["loss/policy"][-1] == pytest.approx(float(policy.loss), abs=1e-5)
    assert trainer.unlogged.values["value/loss"][-1] == pytest.approx(float(value), rel=1e-4)
    assert float(total) == pytest.approx(float(policy.loss) + 0.7 * float(value), rel=1e-4, abs=1e-5)


def test_scattering_to_responses_by_hand() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], requires_grad=True)
    out = scatter_to_responses(values, pack([Tree([5], [[6, 2], [7, 8, 9]])], 0), 4)
    assert out.tolist() == [[1, 2, 0, 0], [3, 4, 5, 0]]
    out.sum().backward()
    assert values.grad is not None and values.grad.tolist() == [1.0] * 5


def test_split_evenly_is_a_partition() -> None:
    parts = split_evenly(11, 3, torch.Generator().manual_seed(0))
    assert sorted(i for part in parts for i in part) == list(range(11))
    assert {len(part) for part in parts} == {3, 4}
    assert parts != split_evenly(11, 3, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("penalty", [-1.0, None])
def test_the_score_lands_on_the_last_token_and_the_penalty_on_truncation_alone(
    folders: Folders, penalty: float | None
) -> None:
    """With gamma = lambda = 0 a return is the reward of its token."""
    section = changed(
        SECTION,
        gamma=0.0,
        lam=0.0,
        reward_clip=0.5,
        missing_eos_penalty=penalty,
        whiten_advantages=False,
        response_length=4,
    )
    models = folders.models("full")
    rollout = roll(models, folders, section, kl_coef=0.0)
    microbatches = [microbatch for minibatch in rollout.minibatches for microbatch in minibatch]
    rewards = [row[mask] for item in microbatches for row, mask in zip(item.returns_ST, item.mask_ST, strict=True)]
    reward_model = load_reward_model(resolve(str(folders.rm_full)), ModelSection(dtype="float32", lora=None))
    seen = set()
    packed = [(tree.prompt_ids, ids) for item in microbatches for tree in item.batch.trees for ids in tree.response_ids]
    assert len(rewards) == len(rollout.completions) == 8
    for (prompt, ids), entry, row in zip(packed, rollout.completions, rewards, strict=True):
        truncated = ids[-1] not in ENDS
        seen.add(truncated)
        assert len(row) == len(ids) and not set(ids[:-1]) & set(ENDS)
        with torch.no_grad():
            raw = reward_model(input_ids=torch.tensor([prompt + ids])).logits.item() - MEAN
        assert entry.score == pytest.approx(raw, abs=1e-4)
        assert (entry.truncated, entry.n_tokens) == (truncated, len(ids))
        expected = penalty if truncated and penalty is not None else min(max(raw, -0.5), 0.5)
        assert row[:-1].abs().max() < 1e-6 if len(row) > 1 else True
        assert float(row[-1]) == pytest.approx(expected, abs=1e-4)
    assert seen == {True, False}


def test_the_kl_penalty_is_on_every_token(folders: Folders) -> None:
    models = folders.models("lora")
    shake(models.policy, "lora_B.default.", seed=4, scale=0.02)
    section = changed(SECTION, gamma=0.0, lam=0.0, missing_eos_penalty=0.0, whiten_advantages=False)
    with_kl, without = roll(models, folders, section, kl_coef=0.5), roll(models, folders, section, kl_coef=0.0)
    total = []
    for microbatch, same in zip(with_kl.minibatches[0], without.minibatches[0], strict=True):
        reference = models.reference_logps(microbatch.batch, 1.0)
        kl = microbatch.old_logps_ST - scatter_to_responses(reference, microbatch.batch, microbatch.mask_ST.shape[1])
        expected = torch.where(microbatch.mask_ST, -0.5 * kl, 0.0)
        torch.testing.assert_close(microbatch.returns_ST - same.returns_ST, expected, rtol=0, atol=1e-4)
        total.append(kl.abs().max())
    assert max(total) > 0.01


def test_advantages_are_whitened_over_the_whole_rollout(folders: Folders) -> None:
    rollout = roll(folders.models("full"), folders)
    flat = [microbatch for minibatch in rollout.minibatches for microbatch in minibatch]
    advantages = torch.cat([microbatch.advantages_ST[microbatch.mask_ST] for microbatch in flat])
    assert float(advantages.mean()) == pytest.approx(0, abs=1e-5)
    assert float(advantages.std()) == pytest.approx(1, abs=1e-4)
    raw = roll(folders.models("full"), folders, changed(SECTION, whiten_advantages=False))
    for microbatch, whitened in zip([item for minibatch in raw.minibatches for item in minibatch], flat, strict=True):
        # What the critic learns is never whitened.
        torch.testing.assert_close(microbatch.returns_ST, whitened.returns_ST)
        rewards_to_go = microbatch.advantages_ST + torch.where(microbatch.mask_ST, microbatch.old_values_ST, 0.0)
        torch.testing.assert_close(rewards_to_go, microbatch.returns_ST, rtol=0, atol=1e-5)


def test_minibatches_hold_every_sample_once(folders: Folders) -> None:
    rollout = roll(folders.models("full"), folders, changed(SECTION, token_budget=1))
    assert [sum(microbatch.batch.n_responses for microbatch in minibatch) for minibatch in rollout.minibatches] == [
        4,
        4,
    ]
    assert max(len(minibatch) for minibatch in rollout.minibatches) > 1
    together = sorted((row.prompt_id, row.completion) for row in roll(folders.models("full"), folders).completions)
    assert sorted((row.prompt_id, row.completion) for row in rollout.completions) == together
    assert rollout.metrics["tokens"] == sum(row.n_tokens for row in rollout.completions)


def test_rollout_and_update_agree_on_the_objective(folders: Folders) -> None:
    """The old log-probabilities of a microbatch are those that its packing gives."""
    models = folders.models("full")
    for microbatch in roll(models, folders, changed(SECTION, token_budget=1)).minibatches[1]:
        width = microbatch.mask_ST.shape[1]
        with torch.no_grad():
            logps_N, _ = models.policy_logps(microbatch.batch, 1.0)
        new = scatter_to_responses(logps_N, microbatch.batch, width)
        assert torch.equal(new, microbatch.old_logps_ST)
        n = int(microbatch.mask_ST.sum())
        loss = objective.policy_loss(
            new, microbatch.old_logps_ST, microbatch.advantages_ST, microbatch.mask_ST, cliprange=0.2, n_tokens=n
        )
        assert float(loss.loss) == pytest.approx(-float(microbatch.advantages_ST[microbatch.mask_ST].mean()), abs=1e-5)
