"""A merged model computes what its adapter did, on disk too."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_models import adapter
from transformers import AutoModelForCausalLM

from toolkit.engine.fast import adapters
from toolkit.errors import ModelError
from toolkit.models.merged import merged
from toolkit.models.save import merge_and_save

IDS = torch.tensor([[5, 9, 30, 77, 100]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


TIED = [
    {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": ["embed_tokens", "lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
]


@pytest.mark.filterwarnings("ignore::UserWarning:peft")  # of adapters on tied layers, which this is about
@pytest.mark.parametrize("more", TIED, ids=["head", "embedding", "both", "whole head", "whole embedding"])
def test_an_adapter_of_one_tied_layer_does_not_change_the_other(
    new_tiny: Callable[[], Any], tokenizer: Any, tmp_path: Path, more: dict[str, Any]
) -> None:
    bare = new_tiny()
    assert bare.config.tie_word_embeddings and bare.lm_head.weight is bare.model.embed_tokens.weight
    policy = adapter(bare, **more)
    expected = logits(policy)
    merge_and_save(policy, tokenizer, tmp_path, torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-4)
    # Other loaders than transformers' go by this.
    assert not json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]
    assert float((expected - logits(new_tiny())).abs().max()) > 0.1


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_an_adapter_that_peft_leaves_in_the_model_is_refused(new_tiny: Callable[[], Any]) -> None:
    policy = adapter(new_tiny(), target_modules=["lm_head"], trainable_token_indices=[5, 9])
    with pytest.raises(ModelError, match="cannot merge the adapter of 'lm_head.token_adapter'"):
        merged(policy)


def test_tied_layers_that_no_adapter_changes_stay_tied(new_tiny: Callable[[], Any]) -> None:
    policy = adapter(new_tiny(), target_modules=["q_proj"])
    expected = logits(policy)
    whole = merged(policy)
    assert whole.config.tie_word_embeddings and whole.lm_head.weight is whole.model.embed_tokens.weight
    torch.testing.assert_close(logits(whole), expected, rtol=0, atol=1e-4)
    assert merged(whole) is whole


def test_merging_into_bf16_gives_the_weights_that_are_sampled_from(
    new_tiny: Callable[[], Any], tokenizer: Any, tmp_path: Path
) -> None:
    """In memory, and on disk as SFT and ``duel push`` write them: updates far below the distance of two numbers too."""
    policy = adapter(new_tiny().bfloat16())
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            weight.data = weight.data * 1e-3
    start = policy.get_base_model().model.layers[0].mlp.down_proj
    bare, update = start.base_layer.weight.clone(), start.get_delta_weight("default").detach().float()
    with adapters.merged_adapters(policy.get_base_model(), torch.bfloat16):
        sampled = {name: weight.clone() for name, weight in policy.get_base_model().named_parameters()}
    moved = sampled["model.layers.0.mlp.down_proj.weight"].float() - bare.float()
    assert float((moved * update).sum() / update.square().sum()) == pytest.approx(1, abs=0.1)
    merge_and_save(copy.deepcopy(policy), tokenizer, tmp_path, torch.bfloat16)
    written = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for whole, least in ((merged(policy), 1.0), (written, 0.9999)):  # on disk from another order of fp32 sums
        for name, weight in whole.named_parameters():
            assert float((weight == sampled[name]).float().mean()) >= least, name
