"""Models are loaded for what they are used for: a reward model's head, the precision of what trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from toolkit.models.load import new_reward_model, trainable
from toolkit.recipe.training import Lora, ModelSection

pytestmark = pytest.mark.invariant

FP32 = ModelSection(name="tiny", dtype="float32", lora=None)
LORA = Lora(r=4, alpha=8)


def test_a_new_reward_model_has_the_published_head(tiny_ref: Any) -> None:
    model = new_reward_model(tiny_ref, FP32, pad_token_id=0, seed=1)
    head = model.score.weight
    assert head.shape == (1, model.config.hidden_size) and model.config.pad_token_id == 0
    assert float(head.detach().std()) == pytest.approx((model.config.hidden_size + 1) ** -0.5, rel=0.3)
    again = new_reward_model(tiny_ref, FP32, pad_token_id=0, seed=1).score.weight
    other = new_reward_model(tiny_ref, FP32, pad_token_id=0, seed=2).score.weight
    assert torch.equal(head, again) and not torch.equal(head, other)


def test_what_trains_is_kept_in_full_precision(tiny_ref: Any) -> None:
    """Steps of 1e-4 vanish in bf16 weights of size 0.1, in a head as in an adapter."""
    section = ModelSection(name="tiny", dtype="bfloat16", lora=LORA)
    model = new_reward_model(tiny_ref, section, pad_token_id=0, seed=1)
    model = trainable(model, LORA, task="SEQ_CLS", modules_to_save=["score"])
    trained = {name: weight.dtype for name, weight in model.named_parameters() if weight.requires_grad}
    assert any("score" in name for name in trained)
    assert {name for name, dtype in trained.items() if dtype != torch.float32} == set()
