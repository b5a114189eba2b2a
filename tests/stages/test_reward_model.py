"""The reward model's loss against its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.comparisons import batch_of, examples
from support.small_models import engine

from toolkit.models.load import new_reward_model
from toolkit.recipe.schema import ModelSection
from toolkit.training import reward_model

pytestmark = pytest.mark.invariant

FP32 = ModelSection(name="tiny", dtype="float32", lora=None)


@pytest.mark.parametrize("coefficient", [0.0, 0.01])
def test_bradley_terry_is_a_double_loop(tiny_ref: Any, make_trees: Any, coefficient: float) -> None:
    model = new_reward_model(tiny_ref, FP32, pad_token_id=0, seed=1).eval()
    scorer, chosen = engine(model), examples(make_trees)
    loss, metrics = reward_model.bradley_terry(scorer, coefficient, batch_of(scorer, list(enumerate(chosen))))
    loss.backward()
    found = {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}
    model.zero_grad(set_to_none=True)
    total = torch.zeros(())
    right: list[float] = []
    for example in chosen:
        prompt = example.tree.prompt_ids
        r = [model(input_ids=torch.tensor([prompt + ids])).logits[0, 0] for ids in example.tree.response_ids]
        weight_sum = sum(w for *_, w in example.pairs)
        for i, j, p, weight in example.pairs:
            nll = -p * torch.log(torch.sigmoid(r[i] - r[j])) - (1 - p) * torch.log(torch.sigmoid(r[j] - r[i]))
            total = total + weight / weight_sum / len(chosen) * (nll + coefficient * (r[i] + r[j]) ** 2)
            if p != 0.5:
                right.append(float((r[i] > r[j]) == (p > 0.5)))
    total.backward()
    assert loss.item() == pytest.approx(total.item(), abs=1e-5)
    assert metrics["rewards/accuracies"].mean().item() == pytest.approx(sum(right) / len(right))
    assert torch.equal(metrics["margin"], metrics["rewards/chosen"] - metrics["rewards/rejected"])
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            assert float((weight.grad - found[name]).norm() / weight.grad.norm().clamp(min=1e-9)) < 1e-3, name
