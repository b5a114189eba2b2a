"""What must hold of PPO whatever it learns: where it starts, what it may change, and that interrupting it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.ppo_models import (
    ENDS,
    LORA,
    MEAN,
    PROMPTS,
    SECTION,
    UPDATES,
    Folders,
    changed,
    make_trainer,
    roll,
    scores_of,
    shake,
    timeless,
)
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    MistralConfig,
    MistralForSequenceClassification,
    OPTConfig,
    Starcoder2Config,
    TrainerCallback,
)

from toolkit.engine.engine import Engine
from toolkit.engine.tree import pack
from toolkit.models.encoding import Tree
from toolkit.models.inspect import disable_dropout
from toolkit.models.load import load_policy, load_reward_model
from toolkit.models.resolve import resolve
from toolkit.ppo import objective
from toolkit.ppo.config import PPOConfig
from toolkit.ppo.models import AdapterModels, SeparateModels
from toolkit.ppo.rewards import Responses, model_reward
from toolkit.ppo.rollout import scatter_to_responses, split_evenly
from toolkit.ppo.schedule import Schedule
from toolkit.recipe.schema import ModelSection
from toolkit.training.trainer import last_checkpoint

pytestmark = pytest.mark.invariant

# ---------------------------------------------------------------- pieces


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


def test_the_reference_is_the_sft_policy_and_not_its_base(folders: Folders, tiny: Any) -> None:
    trees = [Tree(p.ids, [[7, 8, 9, 2]]) for p in PROMPTS]
    expected = Engine(load_policy(resolve(str(folders.sft)), ModelSection(dtype="float32")), 0, dtype=torch.float32)
    for kind in ("full", "lora", "mixed"):
        models = folders.models(kind)
        batch = models.engine.pack(trees)
        with torch.no_grad():
            sft, _ = expected.token_logps(batch)
            base, _ = Engine(tiny, 0, dtype=torch.float32).token_logps(batch)
        assert torch.equal(models.reference_logps(batch, 1.0), sft)
        assert float((sft - base).abs().max()) > 0.01


def test_dropout_is_off_wherever_a_model_keeps_its_rate() -> None:
    """OPT's layers have it as an attribute, and leave out whole layers at another rate."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    torch.manual_seed(0)
    for config in (
        OPTConfig(**sizes, ffn_dim=32, word_embed_proj_dim=16, dropout=0.5, attention_dropout=0.5, layerdrop=0.5),
        GPT2Config(**sizes, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5),
        BloomConfig(**sizes, hidden_dropout=0.5, attention_dropout=0.5),
        Starcoder2Config(**sizes, num_key_value_heads=1, residual_dropout=0.5, embedding_dropout=0.5),
    ):
        model = AutoModelForCausalLM.from_config(config).train()
        ids = torch.tensor([[5, 9, 30, 7]])
        with torch.no_grad():
            assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
            disable_dropout(model)
            assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
            assert torch.equal(model(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_the_kinds_of_models(folders: Folders) -> None:
    assert isinstance(folders.models("full"), SeparateModels)
    assert isinstance(folders.models("mixed"), SeparateModels)
    assert isinstance(folders.models("lora"), AdapterModels)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_critic_starts_as_told(folders: Folders, kind: str) -> None:
    trees = [Tree(p.ids, [[7, 8, 9, 2], [11, 2]]) for p in PROMPTS]
    models = folders.models(kind, value_head_init="zero")
    assert not models.values(models.engine.pack(trees)).any()
    models = folders.models(kind, value_head_init="reward_model")
    batch = models.engine.pack(trees)
    values_N = models.values(batch)
    # The value of the state before a token is what the reward model says of the text so far.
    shorter = [Tree(p.ids[:-1], [p.ids[-1:], [p.ids[-1], 7], [p.ids[-1], 7, 8], [p.ids[-1], 7, 8, 9]]) for p in PROMPTS]
    expected = torch.tensor(scores_of(folders, models, shorter)).view(len(PROMPTS), 4)
    torch.testing.assert_close(values_N.detach().view(len(PROMPTS), 6)[:, :4], expected, rtol=0, atol=1e-4)
    assert sum(w.requires_grad for w in models.critic_parameters()) == len(models.critic_parameters())


def test_values_of_a_shared_trunk_are_the_same_from_either_pass(folders: Folders) -> None:
    """A reward model's mean belongs to the head that it came with, which a head of zeros on the trunk is not."""
    models = folders.models("full", share_trunk=True, value_head_init="reward_model")
    batch = models.engine.pack([Tree(p.ids, [[7, 8, 9, 2], [11, 2]]) for p in PROMPTS])
    assert not models.values(batch).any()
    assert not models.logps_and_values(batch, 1.0)[2].any()


# ---------------------------------------------------------------- both kinds of models agree


def test_one_base_with_adapters_equals_four_models(folders: Folders, tmp_path: Path) -> None:
    shared = folders.models("lora")
    shake(shared.policy, ".default.", seed=4, scale=0.02)  # lora_A and lora_B of the policy alone
    shared.save_policy(tmp_path / "policy", folders.tokenizer)
    section = ModelSection(name="tiny", dtype="float32", lora=LORA)
    reward = load_reward_model(resolve(str(folders.rm_adapter)), section)
    apart = SeparateModels(
        load_policy(resolve(str(tmp_path / "policy")), section),
        load_policy(resolve(str(folders.sft)), section),
        reward.merge_and_unload(),
        pad_id=0,
        dtype=torch.float32,
        value_head_init="reward_model",
        value_shift=MEAN,
    )
    trees = [Tree(p.ids, [[7, 8, 9, 2], [11, 2], [300, 301]]) for p in PROMPTS]
    batch = shared.engine.pack(trees)
    with torch.no_grad():
        pairs = [
            (shared.policy_logps(batch, 0.7)[0], apart.policy_logps(batch, 0.7)[0]),
            (shared.reference_logps(batch, 0.7), apart.reference_logps(batch, 0.7)),
            (shared.values(batch), apart.values(batch)),
        ]
        scores = scores_of(folders, shared, trees)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    assert float((pairs[0][0] - pairs[1][0]).abs().max()) > 0.01
    # Centring: raw scores are the reward model's.
    reward = load_reward_model(resolve(str(folders.rm_adapter)), section)
    raw = [value for values in Engine(reward, 0, dtype=torch.float32).scores(trees) for value in values]
    assert scores == pytest.approx([value - MEAN for value in raw], abs=1e-4)


def test_scores_of_a_reward_model_that_cannot_take_the_tree(folders: Folders) -> None:
    """The policy takes tree batches and the reward model, with a short sliding window, does not."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        sliding_window=4,
        pad_token_id=0,
        num_labels=1,
    )
    reward = MistralForSequenceClassification(config).eval()
    section = ModelSection(name="tiny", dtype="float32", lora=None)
    policy, reference = (load_policy(resolve(str(folders.sft)), section) for _ in range(2))
    responses = [[7, 8, 9, 2], [11, 12, 13, 14, 15, 2]]
    trees = [Tree(p.ids, responses) for p in PROMPTS]
    score = model_reward(reward, folders.tokenizer, folders.tokenizer, dtype=torch.float32)
    texts = ["a", "b"] * len(PROMPTS)
    scores = torch.tensor(score(Responses(list(texts), texts, [False] * len(texts), trees)))
    # As the critic it takes a row for each response of the policy's batch, and values stay in the order of the tokens.
    models = SeparateModels(
        policy, reference, reward, pad_id=0, dtype=torch.float32, value_head_init="reward_model", value_shift=0.0
    )
    batch = models.engine.pack([Tree(p.ids[:-1], [[p.ids[-1], 7]]) for p in PROMPTS])
    with torch.no_grad():
        before = [reward(input_ids=torch.tensor([p.ids])).logits.item() for p in PROMPTS]
        torch.testing.assert_close(models.values(batch)[1::2], torch.tensor(before), rtol=0, atol=1e-3)
    with torch.no_grad():
        expected = [reward(input_ids=torch.tensor([p.ids + ids])).logits.item() for p in PROMPTS for ids in responses]
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=0, atol=1e-3)


# ---------------------------------------------------------------- the rollout


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


def test_accumulation_does_not_take_updates_away(folders: Folders, tmp_path: Path) -> None:
    """A minibatch is divided by token_budget; transformers' own accumulation must not merge updates or add rollouts."""
    trainer, record = make_trainer(
        folders.models("lora"), folders, tmp_path, changed(SECTION, gradient_accumulation_steps=2)
    )
    steps: list[tuple[int, int]] = []
    step = trainer.training_step

    def counted(model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        steps.append((inputs["rollout"], inputs["update"]))
        return step(model, inputs, num_items_in_batch)

    trainer.training_step = counted  # type: ignore[method-assign]
    trainer.train()
    assert steps == [(rollout, update) for rollout in range(2) for update in range(UPDATES)]
    assert len(record.weights) == 2 * UPDATES


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


@pytest.mark.parametrize("stop_at", [UPDATES, 2 * UPDATES + 1])
@pytest.mark.parametrize("kind", ["full", "lora"])
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
    state, expected = resumed.trained_state(), whole.trained_state()
    assert state.keys() == expected.keys()
    for name, weight in state.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6, msg=name)
    for log, same in zip(record.logs, uninterrupted.logs[-len(record.logs) :], strict=True):
        assert log.keys() == same.keys()
        assert timeless(log) == pytest.approx(timeless(same), rel=1e-4, abs=1e-5)


def test_a_checkpoint_of_other_weights_is_refused(folders: Folders) -> None:
    state = folders.models("lora").trained_state()
    with pytest.raises(RuntimeError, match="differ"):
        folders.models("full").load_trained_state(state)


def test_two_runs_with_one_seed_are_identical(folders: Folders, tmp_path: Path) -> None:
    results = []
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        models = folders.models("lora")
        section = changed(SECTION, total_episodes=8)
        trainer, record = make_trainer(models, folders, tmp_path / name, section, seed=seed)
        trainer.train()
        results.append((record.weights, [log["loss"] for log in record.logs]))
    assert results[0] == results[1] != results[2]


def test_a_saved_policy_is_the_policy(folders: Folders, tmp_path: Path) -> None:
    trees = [Tree(p.ids, [[7, 8, 9, 2], [11, 2]]) for p in PROMPTS]

    def logps_of(model: Any) -> list[list[torch.Tensor]]:
        return Engine(model, 0, dtype=torch.float32).logps(trees)

    for kind in ("full", "lora", "mixed"):
        models = folders.models(kind)
        trainer, _ = make_trainer(models, folders, tmp_path / kind, changed(SECTION, total_episodes=8))
        trainer.train()
        models.save_policy(tmp_path / kind / "model", folders.tokenizer)
        models.use_policy()
        ref = resolve(str(tmp_path / kind / "model"))
        loaded = load_policy(ref, ModelSection(dtype="float32"))
        assert ref.kind == ("folder" if kind == "full" else "adapter")
        for saved, trained in zip(logps_of(loaded), logps_of(models.policy), strict=True):
            for a, b in zip(saved, trained, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


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
