"""What is read of a loaded model, and switched off in it."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    OPTConfig,
    Starcoder2Config,
)

from toolkit.errors import NotFiniteError
from toolkit.models.inspect import check_finite, disable_dropout

pytestmark = pytest.mark.invariant


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_weight_that_is_not_finite_is_found_wherever_it_stands(dtype: torch.dtype, bad: float) -> None:
    for n in (1, 7, 33, 100_003):
        layer = torch.nn.Linear(n, 1, dtype=dtype)
        layer.empty = torch.nn.Parameter(torch.empty(0, dtype=dtype))
        check_finite(layer, "model")
        for place in {0, n // 2, n - 1}:
            good = layer.weight[0, place].item()
            layer.weight.data[0, place] = bad
            with pytest.raises(NotFiniteError, match="not finite"):
                check_finite(layer, "model")
            layer.weight.data[0, place] = good
