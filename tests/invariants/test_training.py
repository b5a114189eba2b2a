"""DPO and reward-model losses against their formulas, and that batches, accumulation and resume change nothing."""

from __future__ import annotations

import doctest
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerCallback, TrainingArguments

from toolkit import models, training
from toolkit.preferences.formats import Comparison, PreferenceRow
from toolkit.recipe import DpoSection, Lora, ModelSection, RewardModelSection, Training
from toolkit.scoring import Engine, Tree
from toolkit.stages import dpo, reward_model, sft
from toolkit.training import EngineTrainer, Example, PairBatch, collate, examples_of

FP32 = ModelSection(name="tiny", dtype="float32", lora=None)
LORA = Lora(r=4, alpha=8)
K4 = [(0, 1, 1.0, 1.0), (0, 2, 0.7, 2.0), (0, 3, 0.5, 1.0), (1, 2, 0.0, 1.0), (1, 3, 0.25, 0.5), (2, 3, 1.0, 1.0)]
K2 = [(0, 1, 1.0, 1.0)]
Make = Callable[[], Any]


def examples(make_trees: Any) -> list[Example]:
    trees = [*make_trees(2, seed=1, k=4), *make_trees(2, seed=2, k=2)]
    return [Example(tree, K4 if len(tree.response_ids) == 4 else K2) for tree in trees]


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
    found = examples_of(rows, tokenizer, max_response_tokens=20)
    assert [example.pairs for example in found] == [[(0, 1, 0.75, 1.0)], [(0, 1, 0.5, 1.0)]]
    assert all(ids[-1] == tokenizer.eos_token_id for example in found for ids in example.tree.response_ids)
    assert examples_of([], tokenizer, 20) == []


def test_sft_imitates_the_response_that_wins_most() -> None:
    row = PreferenceRow("a", "", ["x", "y", "z"], [Comparison(2, 0), Comparison(1, 0), Comparison(2, 1, 0.4)])
    assert sft.targets(row, "preferred") == [2]
    assert sft.targets(row, "all") == [0, 1, 2]
    tied = PreferenceRow("a", "", ["x", "y"], [Comparison(0, 1, 0.5), Comparison(1, 0, 0.5)])
    assert sft.targets(tied, "preferred") == [0]


# ---------------------------------------------------------------- DPO


def test_the_examples_in_the_docstrings_are_true() -> None:
    result = doctest.testmod(dpo, extraglobs={"torch": torch})
    assert result.attempted >= 1 and result.failed == 0


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
    model = models.new_reward_model(tiny_ref, FP32, pad_token_id=0, seed=1).eval()
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
    model = models.new_reward_model(tiny_ref, FP32, pad_token_id=0, seed=1)
    head = model.score.weight
    assert head.shape == (1, model.config.hidden_size) and model.config.pad_token_id == 0
    assert float(head.detach().std()) == pytest.approx((model.config.hidden_size + 1) ** -0.5, rel=0.3)
    again = models.new_reward_model(tiny_ref, FP32, pad_token_id=0, seed=1).score.weight
    other = models.new_reward_model(tiny_ref, FP32, pad_token_id=0, seed=2).score.weight
    assert torch.equal(head, again) and not torch.equal(head, other)


def test_what_trains_is_kept_in_full_precision(tiny_ref: Any) -> None:
    """Steps of 1e-4 vanish in bf16 weights of size 0.1, in a head as in an adapter."""
    section = ModelSection(name="tiny", dtype="bfloat16", lora=LORA)
    model = models.new_reward_model(tiny_ref, section, pad_token_id=0, seed=1)
    model = models.trainable(model, LORA, task="SEQ_CLS", modules_to_save=["score"])
    trained = {name: weight.dtype for name, weight in model.named_parameters() if weight.requires_grad}
    assert any("score" in name for name in trained)
    assert {name for name, dtype in trained.items() if dtype != torch.float32} == set()


# ---------------------------------------------------------------- EngineTrainer


def settings_of(**values: Any) -> Training:
    base = {"learning_rate": 1e-3, "per_device_train_batch_size": 2, "max_steps": 6, "warmup_ratio": 0.0}
    return Training(**(base | {"logging_steps": 1} | values))


class Stop(TrainerCallback):
    def __init__(self, at: int | None) -> None:
        self.at = at

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.at:
            control.should_training_stop = True


def build(
    kind: str,
    out: Path,
    tiny_ref: Any,
    make_trees: Any,
    section: Training,
    *,
    dtype: str = "float32",
    stop_at: int | None = None,
    seed: int = 0,
    items: list[Example] | None = None,
    token_budget: int | None = None,
) -> tuple[EngineTrainer, Any]:
    """A trainer as the stages make it; ``kind`` is dpo or rm, with ``-lora`` behind it or not."""
    task, _, adapter = kind.partition("-")
    lora = LORA if adapter else None
    model_section = ModelSection(name="tiny", dtype=dtype, lora=lora)
    training.seed_everything(seed)
    if task == "dpo":
        full = None if lora else torch.float32
        model = models.trainable(models.load_policy(tiny_ref, model_section, dtype=full), lora, task="CAUSAL_LM")
    else:
        model = models.new_reward_model(tiny_ref, model_section, 0, seed=1)
        model = models.trainable(model, lora, task="SEQ_CLS", modules_to_save=["score"])
    scorer = Engine(model, 0, dtype=models.DTYPES[dtype], token_budget=token_budget)
    if items is None:
        items = [Example(tree, [(0, 1, 1.0, 1.0), (1, 2, 0.3, 1.0)]) for tree in make_trees(8, seed=3)]
    if task == "dpo":
        model.eval()
        reference = [torch.stack([t.sum() for t in row]) for row in scorer.logps([e.tree for e in items])]
        loss_fn = partial(dpo.dpo_loss, scorer, DpoSection(), reference)
    else:
        loss_fn = partial(reward_model.bradley_terry, scorer, RewardModelSection().center_rewards_coefficient)
    steps = training.total_steps(section, len(items))
    trainer = EngineTrainer(
        model=model,
        args=TrainingArguments(**training.arguments(section, out, seed=seed, dtype=dtype, steps=steps)),
        train_dataset=list(enumerate(items)),
        data_collator=partial(collate, scorer),
        loss_fn=loss_fn,
        callbacks=[Stop(stop_at)],
    )
    return trainer, model


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: w.detach().clone() for name, w in model.named_parameters() if w.requires_grad}


def losses(trainer: EngineTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_equal(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    assert ours.keys() == expected.keys() and ours
    for name, weight in ours.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("kind", ["dpo", "dpo-lora", "rm", "rm-lora"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, tiny_ref: Any, make_trees: Any, kind: str) -> None:
    section = settings_of()
    whole, model = build(kind, tmp_path / "whole", tiny_ref, make_trees, section)
    start = trained(model)
    whole.train()
    expected = trained(model)
    assert all(not torch.equal(w, expected[name]) for name, w in start.items() if "lora_A" not in name)

    stopped, _ = build(kind, tmp_path / "part", tiny_ref, make_trees, section, stop_at=3)
    stopped.train()
    assert training.last_checkpoint(tmp_path / "part") == str(tmp_path / "part" / "trainer" / "checkpoint-3")
    resumed, model = build(kind, tmp_path / "part", tiny_ref, make_trees, section)
    resumed.train(resume_from_checkpoint=training.last_checkpoint(tmp_path / "part"))
    assert resumed.state.global_step == 6
    assert_equal(trained(model), expected)
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-6)


def test_two_runs_with_one_seed_are_identical(tmp_path: Path, tiny_ref: Any, make_trees: Any) -> None:
    results = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        trainer, model = build("rm-lora", tmp_path / name, tiny_ref, make_trees, settings_of(max_steps=3), seed=seed)
        trainer.train()
        results.append((trained(model), losses(trainer)))
    assert results[0][1] == results[1][1] != results[2][1]
    assert_equal(results[0][0], results[1][0], tolerance=0)


@pytest.mark.parametrize("kind", ["dpo-lora", "rm"])
def test_accumulated_batches_equal_one_large_batch(tmp_path: Path, tiny_ref: Any, make_trees: Any, kind: str) -> None:
    """Prompts count alike, however many comparisons and tokens they have."""
    items = examples(make_trees) * 2
    results = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        section = settings_of(
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, max_steps=2, adam_epsilon=1e-3
        )
        trainer, model = build(kind, tmp_path / str(size), tiny_ref, make_trees, section, items=items)
        trainer.train()
        norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
        results.append((trained(model), losses(trainer), norms))
    for weights, loss, norms in results[1:]:
        assert loss == pytest.approx(results[0][1], abs=1e-4)
        assert norms == pytest.approx(results[0][2], rel=1e-3)
        assert_equal(weights, results[0][0], tolerance=2e-5)


@pytest.mark.parametrize("kind", ["dpo-lora", "rm"])
def test_a_batch_in_parts_is_the_same_batch(tmp_path: Path, tiny_ref: Any, make_trees: Any, kind: str) -> None:
    """The token budget is a matter of memory: losses, gradients, metrics and weights stay."""
    items = examples(make_trees) * 2
    results = []
    for budget in (10_000, 120, 1):
        section = settings_of(per_device_train_batch_size=4, max_steps=2, adam_epsilon=1e-3)
        folder = tmp_path / str(budget)
        trainer, model = build(kind, folder, tiny_ref, make_trees, section, items=items, token_budget=budget)
        n_parts = len(trainer.data_collator(list(enumerate(items))[:4])["batch"])
        trainer.train()
        logged = [
            {k: v for k, v in e.items() if "rewards" in k or k in ("loss", "grad_norm")}
            for e in trainer.state.log_history
        ]
        results.append((n_parts, trained(model), [entry for entry in logged if "loss" in entry]))
    assert results[0][0] == 1 < results[1][0] < results[2][0] == 4
    for _, weights, logged in results[1:]:
        assert_equal(weights, results[0][1], tolerance=2e-5)
        for entry, expected in zip(logged, results[0][2], strict=True):
            assert entry == pytest.approx(expected, rel=1e-3, abs=1e-4)


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


@pytest.mark.parametrize("kind", ["dpo", "dpo-lora", "rm-lora"])
def test_training_runs_under_the_precision_of_its_reference(
    tmp_path: Path, tiny_ref: Any, make_trees: Any, kind: str
) -> None:
    """A reference scored under bf16 autocast and a policy trained outside it would start with a margin."""
    trainer, _ = build(kind, tmp_path, tiny_ref, make_trees, settings_of(max_steps=1), dtype="bfloat16")
    whole, seen = trainer.loss_fn, []

    def watched(batch: PairBatch) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return whole(batch)

    trainer.loss_fn = watched
    trainer.train()
    assert seen == [True]


def test_steps_and_milestones() -> None:
    section = settings_of(max_steps=-1, per_device_train_batch_size=3, gradient_accumulation_steps=2)
    assert training.total_steps(section, 13) == 3
    assert training.total_steps(section.model_copy(update={"num_train_epochs": 1.5}), 13) == 5
    assert training.total_steps(section.model_copy(update={"max_steps": 9}), 13) == 9
    assert training.milestones(DpoSection(num_checkpoints=3), 10) == [3, 7, 10]
    assert training.milestones(DpoSection(num_checkpoints=5), 2) == [1, 2]


def test_a_checkpoint_without_its_last_file_is_no_checkpoint(tmp_path: Path) -> None:
    assert training.last_checkpoint(tmp_path) is None
    for step, whole in ((2, True), (10, True), (12, False)):
        folder = tmp_path / "trainer" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        if whole:
            (folder / "trainer_state.json").write_text("{}")
    assert training.last_checkpoint(tmp_path) == str(tmp_path / "trainer" / "checkpoint-10")
