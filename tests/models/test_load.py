"""Models are loaded for what they are used for: a reward model's head, the precision of what trains."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.small_models import adapter

from toolkit.errors import ModelError
from toolkit.models.inspect import backbone
from toolkit.models.load import load_policy, load_reward_model, new_reward_model, trainable
from toolkit.models.resolve import resolve
from toolkit.models.reward_head import RewardHead
from toolkit.models.save import merge_and_save, save_policy
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


IDS = torch.tensor([[5, 9, 30, 77, 100]])


def saved(model: Any, folder: Path, tokenizer: Any, base: str) -> Path:
    save_policy(model, tokenizer, folder, dtype=torch.float32, base=resolve(base))
    return folder


def hidden(model: Any) -> torch.Tensor:
    with torch.no_grad():
        states: torch.Tensor = backbone(model)(input_ids=IDS).last_hidden_state
    return states


def test_a_reward_model_starts_from_what_an_adapter_computes(
    new_tiny: Callable[[], Any], tokenizer: Any, tmp_path: Path
) -> None:
    """It was made trainable by an adapter in the place of that one, and started from the base below it."""
    policy = adapter(new_tiny())
    ref = resolve(str(saved(policy, tmp_path / "policy", tokenizer, "tiny")))
    assert float((hidden(policy) - hidden(new_tiny())).abs().max()) > 0.1
    model = new_reward_model(ref, FP32, pad_token_id=0, seed=1).eval()
    torch.testing.assert_close(hidden(model), hidden(policy), rtol=0, atol=1e-4)
    model = trainable(model, LORA, task="SEQ_CLS", modules_to_save=["score"])
    torch.testing.assert_close(hidden(model), hidden(policy), rtol=0, atol=1e-4)
    # And so does the reward model that is read again: its base is the policy's adapter.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.01)
    folder = saved(model.eval(), tmp_path / "reward", tokenizer, str(tmp_path / "policy"))
    RewardHead().write(folder)
    again = load_reward_model(resolve(str(folder)), FP32)
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=0, atol=1e-4)


def test_an_adapter_on_an_adapter_computes_both(new_tiny: Callable[[], Any], tokenizer: Any, tmp_path: Path) -> None:
    saved(adapter(new_tiny()), tmp_path / "first", tokenizer, "tiny")
    merge_and_save(load_policy(resolve(str(tmp_path / "first")), FP32), tokenizer, tmp_path / "whole", torch.float32)
    second = adapter(load_policy(resolve(str(tmp_path / "whole")), FP32), target_modules=["q_proj"])
    saved(second, tmp_path / "second", tokenizer, str(tmp_path / "first"))
    loaded = load_policy(resolve(str(tmp_path / "second")), FP32)
    torch.testing.assert_close(hidden(loaded), hidden(second), rtol=0, atol=1e-4)
    with loaded.disable_adapter():  # the reference of a policy that trains the second
        expected = hidden(load_policy(resolve(str(tmp_path / "first")), FP32))
        torch.testing.assert_close(hidden(loaded), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["model.layers.0.attention.bias", "transformer.h.0.attn.bias"])
def test_causal_masks_among_the_weights_are_passed_over(tiny_ref: Any, tmp_path: Path, name: str) -> None:
    """Checkpoints of GPT-NeoX (Pythia), GPT-J and others have them."""
    folder = Path(shutil.copytree(tiny_ref.path, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    mask = torch.ones(1, 1, 4, 4, dtype=torch.uint8)
    save_file(weights | {name: mask}, folder / "model.safetensors", metadata={"format": "pt"})
    load_policy(resolve(str(folder)), FP32)
    save_file(weights | {f"{name}ed": mask}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="of type U8, and not a float"):
        load_policy(resolve(str(folder)), FP32)
