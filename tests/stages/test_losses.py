"""DPO and reward-model losses against their formulas, and that batches, accumulation and resume change nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.comparisons import K4, examples

from toolkit.engine.engine import Engine
from toolkit.models.encoding import Tree, text_encoder
from toolkit.models.load import new_reward_model, trainable
from toolkit.preferences.rows import Comparison, PreferenceRow
from toolkit.recipe.schema import DpoSection, Lora, ModelSection
from toolkit.stages import dpo, reward_model, sft
from toolkit.training.batch import Example, PairBatch, collate, examples_of

pytestmark = pytest.mark.invariant

FP32 = ModelSection(name="tiny", dtype="float32", lora=None)
LORA = Lora(r=4, alpha=8)
Make = Callable[[], Any]


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def moved(model: Any, scale: float = 0.02) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * scale)
    return model


def engine(model: Any, **more: Any) -> Engine:
    return Engine(model, 0, dtype=torch.float32, **more)


def pack_of(scorer: Engine, chosen: list[tuple[int, Example]]) -> PairBatch:
    [part] = collate(scorer, chosen)["batch"]
    return part


def plain_sums(model: Any, tree: Tree) -> list[float]:
    """Summed log-probabilities of each response, one unpadded pass each."""
    sums = []
    for ids in tree.response_ids:
        logits = model(input_ids=torch.tensor([tree.prompt_ids + ids])).logits[0, len(tree.prompt_ids) - 1 : -1]
        sums.append(float(logits.double().log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum()))
    return sums


# ---------------------------------------------------------------- batches of pairs


def test_pair_weights_by_hand(tiny: Any, make_trees: Any) -> None:
    chosen = examples(make_trees)
    batch = pack_of(engine(tiny), [(7, chosen[0]), (3, chosen[2])])
    assert batch.first.tolist() == [0, 0, 0, 1, 1, 2, 4]
    assert batch.second.tolist() == [1, 2, 3, 2, 3, 3, 5]
    assert batch.prefer_first.tolist() == pytest.approx([1.0, 0.7, 0.5, 0.0, 0.25, 1.0, 1.0])
    # The first prompt's comparisons weigh 6.5 in all; each prompt has half of the batch.
    expected = [w / 6.5 / 2 for *_, w in K4] + [0.5]
    assert batch.weight.tolist() == pytest.approx(expected)
    assert batch.example.tolist() == [7, 3]
    assert batch.trees.tree.tolist() == [0, 0, 0, 0, 1, 1]


def test_rows_become_examples(tokenizer: Any) -> None:
    rows = [
        PreferenceRow(
            "a", "The film", [" is good", " is bad", " is"], [Comparison(1, 0, 0.25), Comparison(0, 1, 0.75)]
        ),
        PreferenceRow("b", "Nobody compared", [" this", " that"], []),
        PreferenceRow("c", "A tie", [" one", " two"], [Comparison(0, 1, 0.5), Comparison(1, 0, 0.5)]),
    ]
    encoder = text_encoder(tokenizer, rows[0].prompt)
    found = examples_of(rows, encoder, max_response_tokens=20)
    assert [example.pairs for example in found] == [[(0, 1, 0.75, 1.0)], [(0, 1, 0.5, 1.0)]]
    assert all(ids[-1] == tokenizer.eos_token_id for example in found for ids in example.tree.response_ids)
    assert examples_of([], encoder, 20) == []


def test_sft_imitates_the_response_that_wins_most() -> None:
    row = PreferenceRow("a", "", ["x", "y", "z"], [Comparison(2, 0), Comparison(1, 0), Comparison(2, 1, 0.4)])
    assert sft.targets(row, "preferred") == [2]
    assert sft.targets(row, "all") == [0, 1, 2]
    tied = PreferenceRow("a", "", ["x", "y"], [Comparison(0, 1, 0.5), Comparison(1, 0, 0.5)])
    assert sft.targets(tied, "preferred") == [0]


# ---------------------------------------------------------------- DPO


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
    reference = [torch.tensor(plain_sums(tiny, e.tree)) for e in chosen]
    scorer = engine(policy)
    loss, metrics = dpo.dpo_loss(scorer, section, reference, pack_of(scorer, list(enumerate(chosen))))
    total, margins = 0.0, []
    for example, ref in zip(chosen, reference, strict=True):
        ratios = [a - float(b) for a, b in zip(plain_sums(policy, example.tree), ref, strict=True)]
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
    loss, _ = dpo.dpo_loss(scorer, DpoSection(), reference, pack_of(scorer, list(enumerate(chosen))))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5)


def test_only_ties_give_a_loss_and_no_accuracy(new_tiny: Make, make_trees: Any) -> None:
    scorer = engine(moved(new_tiny()))
    [tree] = make_trees(1, k=2)
    batch = pack_of(scorer, [(0, Example(tree, [(0, 1, 0.5, 1.0)]))])
    loss, metrics = dpo.dpo_loss(scorer, DpoSection(), [torch.zeros(2)], batch)
    assert math.isfinite(loss.item()) and all(values.numel() == 0 for values in metrics.values())


# ---------------------------------------------------------------- the reward model


@pytest.mark.parametrize("coefficient", [0.0, 0.01])
def test_bradley_terry_is_a_double_loop(tiny_ref: Any, make_trees: Any, coefficient: float) -> None:
    model = new_reward_model(tiny_ref, FP32, pad_token_id=0, seed=1).eval()
    scorer, chosen = engine(model), examples(make_trees)
    loss, metrics = reward_model.bradley_terry(scorer, coefficient, pack_of(scorer, list(enumerate(chosen))))
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


def test_imitation_in_parts_is_the_mean_over_all_tokens(tiny: Any, make_trees: Any) -> None:
    items = [(k, Example(tree, [])) for k, tree in enumerate(make_trees(5, seed=8))]
    whole, parts = (engine(tiny, token_budget=n) for n in (10_000, 40))
    [batch] = collate(whole, items)["batch"]
    expected, _ = sft.completion_loss(whole, batch)
    split = [sft.completion_loss(parts, part)[0] for part in collate(parts, items)["batch"]]
    assert len(split) > 1
    assert sum(split).item() == pytest.approx(expected.item(), abs=1e-5)
    every = torch.cat([t for row in whole.logps([e.tree for _, e in items]) for t in row])
    assert expected.item() == pytest.approx(-every.mean().item(), abs=1e-5)
