"""Policy, reference, critic and reward model: what they start from; adapters on one base equal models of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.ppo_models import (
    LORA,
    MEAN,
    PROMPTS,
    SECTION,
    Folders,
    changed,
    make_trainer,
    scores_of,
    shake,
)
from support.small_models import SMALL, assert_same_gradients, gradients, loss_of, random_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForSequenceClassification,
)

from toolkit.engine.engine import Engine
from toolkit.engine.reward_model import RewardModel
from toolkit.models.encoding import Tree
from toolkit.models.load import load_policy, load_reward_model
from toolkit.models.resolve import base_record, resolve, resolve_base
from toolkit.models.reward_head import RewardHead
from toolkit.ppo.models import AdapterModels, SeparateModels
from toolkit.ppo.rewards import Responses, model_reward
from toolkit.recipe.training import ModelSection

pytestmark = pytest.mark.invariant


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


class OwnFactor(LlamaForCausalLM):
    """Scales its logits by a factor that stands under no name that the engine knows."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 0.25 * output.logits
        return output


def test_a_shared_trunk_takes_the_logits_that_the_reference_takes() -> None:
    """The layout's probe sees the factor, and both read the model's own logits: the KL starts at 0."""
    policy, reference = (random_model(LlamaConfig(**SMALL), OwnFactor) for _ in range(2))
    models = SeparateModels(policy, reference, None, pad_id=0, dtype=torch.float32)
    batch = models.engine.pack([Tree([5, 6, 7], [[8, 9, 2], [10, 2]]), Tree([5], [[11, 12, 13, 2]])])
    assert models.engine.row_per_response is True
    logps_N, entropy_N, values_N = models.logps_and_values(batch, 0.7, with_entropy=True)
    torch.testing.assert_close(logps_N, models.reference_logps(batch, 0.7), rtol=0, atol=1e-6)
    torch.testing.assert_close(values_N, models.values(batch), rtol=0, atol=1e-6)
    loss_of(logps_N, batch.owner).backward()
    found = gradients(policy)
    expected_N, expected_entropy_N = models.policy_logps(batch, 0.7, with_entropy=True)
    assert entropy_N is not None and torch.equal(entropy_N, expected_entropy_N)
    loss_of(expected_N, batch.owner).backward()
    assert_same_gradients(found, gradients(policy))


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
    scorer = RewardModel([Engine(reward, 0, dtype=torch.float32)], RewardHead())
    score = model_reward(scorer, folders.tokenizer, folders.tokenizer)
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


def test_a_checkpoint_of_other_weights_is_refused(folders: Folders) -> None:
    state = folders.models("lora").trained_state()
    with pytest.raises(RuntimeError, match="differ"):
        folders.models("full").load_trained_state(state)


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
        if ref.kind == "adapter":
            base, record = resolve_base(Path(ref.path)), base_record(Path(ref.path))
            assert base.path == str(folders.sft.resolve()) and record is not None and record.is_of(base)
        for saved, trained in zip(logps_of(loaded), logps_of(models.policy), strict=True):
            for a, b in zip(saved, trained, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
