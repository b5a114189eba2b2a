"""The DPO losses against their formulas, and the estimate of the KL on the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.comparisons import batch_of, examples, moved, summed_logps
from support.small_models import engine

from toolkit.engine.engine import Engine
from toolkit.models.encoding import Tree, text_encoder
from toolkit.models.load import load_policy, trainable
from toolkit.preferences.rows import PreferenceRow
from toolkit.recipe.training import DpoSection, Lora, ModelSection, RewardModelSection
from toolkit.stages import dpo
from toolkit.stages.contexts import DpoContext, ResponseLimit
from toolkit.stages.dpo import KL_PROMPTS, KlProbe
from toolkit.training.batch import Example
from toolkit.training.trainer import prompts_seen

pytestmark = pytest.mark.invariant

LORA = Lora(r=4, alpha=8)
LORA_FP32 = ModelSection(name="tiny", dtype="float32", lora=LORA)
Make = Callable[[], Any]


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


@settings(max_examples=50, deadline=None)
@given(
    st.floats(-20, 20),
    st.floats(-20, 20),
    st.floats(0, 1),
    st.floats(0.01, 2),
    st.sampled_from(
        [("sigmoid", 0.0), ("sigmoid", 0.2), ("sigmoid_norm", 0.0), ("robust", 0.2), ("ipo", 0.0), ("hinge", 0.0)]
    ),
)
def test_preference_losses(a: float, b: float, p: float, beta: float, kind: tuple[str, float]) -> None:
    loss_type, smoothing = kind
    section = DpoSection(beta=beta, loss_type=loss_type, label_smoothing=smoothing)
    x = [torch.tensor([v], dtype=torch.float64) for v in (a, b, p)]
    ours = float(dpo.preference_loss(*x, section))

    def one(d: float) -> float:
        if loss_type.startswith("sigmoid"):
            return -(1 - smoothing) * log_sigmoid(beta * d) - smoothing * log_sigmoid(-beta * d)
        if loss_type == "robust":  # unbiased: its mean over labels flipped with that probability is the clean loss
            clean, other = -log_sigmoid(beta * d), -log_sigmoid(-beta * d)
            return ((1 - smoothing) * clean - smoothing * other) / (1 - 2 * smoothing)
        return (d - 1 / (2 * beta)) ** 2 if loss_type == "ipo" else max(0.0, 1 - beta * d)

    assert ours == pytest.approx(p * one(a - b) + (1 - p) * one(b - a), rel=1e-6, abs=1e-9)
    swapped = dpo.preference_loss(x[1], x[0], 1 - x[2], section)
    assert float(swapped) == pytest.approx(ours, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_dpo_on_k_responses_is_the_mean_over_prompts_of_the_mean_over_comparisons(
    new_tiny: Make, tiny: Any, make_trees: Any, loss_type: str
) -> None:
    policy = moved(new_tiny()).requires_grad_(False)
    section = DpoSection(beta=0.2, loss_type=loss_type)
    chosen = examples(make_trees)
    reference = [torch.tensor(summed_logps(tiny, e.tree)) for e in chosen]
    scorer = engine(policy)
    loss, metrics = dpo.dpo_loss(scorer, section, reference, batch_of(scorer, list(enumerate(chosen))))
    total, margins = 0.0, []
    for example, ref in zip(chosen, reference, strict=True):
        ratios = [a - float(b) for a, b in zip(summed_logps(policy, example.tree), ref, strict=True)]
        lengths = [len(ids) for ids in example.tree.response_ids]
        per_prompt = weight_sum = 0.0
        for i, j, p, weight in example.pairs:
            if loss_type == "sigmoid":
                d = section.beta * (ratios[i] - ratios[j])
                value = -p * log_sigmoid(d) - (1 - p) * log_sigmoid(-d)
            else:
                d = ratios[i] / lengths[i] - ratios[j] / lengths[j]
                target = 1 / (2 * section.beta)
                value = p * (d - target) ** 2 + (1 - p) * (-d - target) ** 2
            per_prompt += weight * value
            weight_sum += weight
            if p != 0.5:
                margins.append(section.beta * (ratios[i] - ratios[j]) * (1 if p > 0.5 else -1))
        total += per_prompt / weight_sum / len(chosen)
    assert loss.item() == pytest.approx(total, rel=1e-4)
    mean = {name: values.mean().item() for name, values in metrics.items()}
    assert mean["rewards/margins"] == pytest.approx(sum(margins) / len(margins), abs=1e-4)
    assert mean["rewards/accuracies"] == pytest.approx(sum(m > 0 for m in margins) / len(margins))
    assert mean["rewards/chosen"] - mean["rewards/rejected"] == pytest.approx(mean["rewards/margins"], abs=1e-4)
    fallen = metrics["displacement/chosen"] < 0
    assert mean["displacement/rate"] == pytest.approx(fallen.float().mean().item())
    assert mean["rewards/chosen"] == pytest.approx(section.beta * mean["displacement/chosen"], abs=1e-5)


def test_dpo_starts_at_the_logarithm_of_two(tiny: Any, make_trees: Any) -> None:
    chosen = examples(make_trees)
    scorer = engine(tiny)
    reference = [torch.stack([t.sum() for t in row]) for row in scorer.logps([e.tree for e in chosen])]
    loss, _ = dpo.dpo_loss(scorer, DpoSection(), reference, batch_of(scorer, list(enumerate(chosen))))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5)


def test_only_ties_give_a_loss_and_no_accuracy(new_tiny: Make, make_trees: Any) -> None:
    scorer = engine(moved(new_tiny()))
    [tree] = make_trees(1, k=2)
    batch = batch_of(scorer, [(0, Example(tree, [(0, 1, 0.5, 1.0)]))])
    loss, metrics = dpo.dpo_loss(scorer, DpoSection(), [torch.zeros(2)], batch)
    assert math.isfinite(loss.item()) and all(values.numel() == 0 for values in metrics.values())


def probe_of(policy: Any, reference: Any, tokenizer: Any) -> KlProbe:
    rows = [
        PreferenceRow(prompt_id=str(i), prompt=f"The film number {i} was", responses=["a", "b"], comparisons=[])
        for i in range(KL_PROMPTS + 5)
    ]
    context = DpoContext(seed=3, model=LORA_FP32, data=ResponseLimit(9), dpo=DpoSection())
    return KlProbe(policy, reference, text_encoder(tokenizer, rows[0].prompt), rows, context)


@pytest.mark.parametrize("adapter", [True, False])
def test_the_probe_is_zero_at_the_start_and_the_log_ratio_later(tiny_ref: Any, tokenizer: Any, adapter: bool) -> None:
    lora = LORA if adapter else None
    policy = trainable(load_policy(tiny_ref, LORA_FP32), lora, task="CAUSAL_LM")
    start = load_policy(tiny_ref, LORA_FP32)
    probe = probe_of(policy, None if adapter else start, tokenizer)
    assert torch.equal(probe(1), torch.zeros(KL_PROMPTS, dtype=torch.float64))

    moved(policy)
    ratios = probe(2)
    assert torch.equal(ratios, probe(2)) and not torch.equal(ratios, probe(3))
    assert ratios.mean() > 0
    # The same samples, scored one by one by both models.
    trees = []

    whole = Engine.logps

    def recording(self: Engine, asked: Any, **more: Any) -> Any:
        trees.append(asked)
        return whole(self, asked, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "logps", recording)
        probe(2)
    assert trees[0] == trees[1] and len(trees[0]) == KL_PROMPTS
    for tree, ratio in zip(trees[0], ratios.tolist(), strict=True):
        [response] = tree.response_ids
        ids = torch.tensor([tree.prompt_ids + response])
        sums = []
        for model in (policy, start):
            with torch.no_grad():
                logp = model(input_ids=ids).logits[0, len(tree.prompt_ids) - 1 : -1].double().log_softmax(-1)
            sums.append(logp.gather(1, torch.tensor(response)[:, None]).sum().item())
        assert ratio == pytest.approx(sums[0] - sums[1], abs=1e-4)


def test_the_probe_samples_with_its_cache_under_gradient_checkpointing(tiny_ref: Any, tokenizer: Any) -> None:
    """transformers drops the cache where a model in training mode checkpoints its activations."""
    policy = moved(trainable(load_policy(tiny_ref, LORA_FP32), LORA, task="CAUSAL_LM"))
    expected = probe_of(policy, None, tokenizer)(2)
    policy.gradient_checkpointing_enable()
    policy.train()
    torch.testing.assert_close(probe_of(policy, None, tokenizer)(2), expected)


def test_the_reward_model_counts_its_prompts_as_the_arms_do() -> None:
    items = [Example(Tree([1], [[3] * n, [3, 3]]), [(0, 1, 1.0, 1.0)]) for n in (1, 2, 3, 4)]
    for trainer in ("engine", "trl"):
        dpo_section = DpoSection(per_device_train_batch_size=2, trainer=trainer)
        section = RewardModelSection(per_device_train_batch_size=2, trainer=trainer)
        assert prompts_seen(section, 4, items) == prompts_seen(dpo_section, 4, items) == 4  # two epochs
        assert prompts_seen(section, 1, items) == prompts_seen(dpo_section, 1, items) == 2


def test_how_many_prompts_were_trained_on() -> None:
    pairs = [(0, 1, 1.0, 1.0), (1, 2, 0.0, 1.0), (0, 2, 0.5, 1.0)]
    items = [Example(Tree([1, 2], [[3] * n, [3] * 2 * n, [3]]), pairs[: 1 + 2 * (n > 1)]) for n in range(1, 6)]
    tied = Example(Tree([1], [[3], [3]]), [(0, 1, 0.5, 1.0)])
    section = DpoSection(per_device_train_batch_size=2)
    # six prompts in three steps: an epoch and a third of another
    assert prompts_seen(section, 4, [*items, tied]) == 6
    assert prompts_seen(section, 2, [*items, tied]) == 4
    assert prompts_seen(section, 3, items) == 5  # the last batch has one
    # TRL's items are pairs with a winner
    assert prompts_seen(section.model_copy(update={"trainer": "trl"}), 5, [*items, tied]) == 5
