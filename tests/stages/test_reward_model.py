"""The reward model's loss against its formula, and rankings of several responses."""

from __future__ import annotations

import json
import math
import os
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from support.comparisons import batch_of, examples
from support.small_models import engine

from toolkit.models.encoding import text_encoder
from toolkit.models.load import new_reward_model
from toolkit.models.tokenizer import load_tokenizer
from toolkit.preferences import splits
from toolkit.preferences.reading import read_preferences
from toolkit.recipe.training import ModelSection, RewardModelSection
from toolkit.training import reward_model
from toolkit.training.batch import examples_of
from toolkit.training.budget import Spending
from toolkit.training.trainer import EngineTrainer, seed_everything, training_arguments

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


@pytest.mark.parametrize("k", [4, 9])
def test_a_ranking_is_the_mean_over_all_its_pairs(k: int, tiny_ref: Any, tmp_path: Path) -> None:
    """Read from ranks, with a tie between two: C(K, 2) comparisons, each response computed once."""
    ranks = [*range(1, k), k - 1]
    row = {"prompt": "The film was", "responses": [f" number {i} of these." for i in range(k)], "ranks": ranks}
    (tmp_path / "ranked.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    rows = read_preferences(str(tmp_path / "ranked.jsonl")).rows
    [example] = examples_of(rows, text_encoder(load_tokenizer(tiny_ref), rows[0].prompt), 20)
    assert len(example.pairs) == k * (k - 1) // 2
    scorer = engine(new_reward_model(tiny_ref, FP32, pad_token_id=0, seed=1).eval())
    batch = batch_of(scorer, [(0, example)])
    assert batch.trees.n_responses == k
    loss, _ = reward_model.bradley_terry(scorer, 0.0, batch)
    [scores] = scorer.scores([example.tree])
    losses = []
    for i, j in combinations(range(k), 2):
        first, second = (math.log1p(math.exp(-sign * (scores[i] - scores[j]))) for sign in (1, -1))
        losses.append(first if ranks[i] < ranks[j] else (first + second) / 2)
    assert loss.item() == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def real_file(name: str) -> str:
    folder = os.environ.get("DUEL_REAL_DATA")
    if not folder:
        pytest.skip("DUEL_REAL_DATA is not set")
    return str(Path(folder) / name)


@pytest.mark.parametrize("source", ["reviews", "finegrained_qa_k4/rankings.jsonl.gz"])
def test_real_rankings_train(source: str, tiny_ref: Any, tmp_path: Path) -> None:
    """K = 6 of the shipped reviews and K = 4 of people's comparisons: a prompt is one element of a batch, its responses
    are computed once, and the comparisons that were trained on are learned."""
    path = source if source == "reviews" else real_file(source)
    tokenizer = load_tokenizer(tiny_ref)
    rows = [row for row in read_preferences(path).rows if any(pair.p != 0.5 for pair in splits.pairs(row))][:16]
    chosen = examples_of(rows, text_encoder(tokenizer, rows[0].prompt), 40)
    k = len(rows[0].responses)
    assert all(len(example.pairs) == k * (k - 1) // 2 for example in chosen) and k in (4, 6)
    seed_everything(0)
    scorer = engine(new_reward_model(tiny_ref, FP32, pad_token_id=0, seed=0))
    settings = RewardModelSection(
        learning_rate=1e-3, per_device_train_batch_size=4, num_train_epochs=10, warmup_ratio=0.0, logging_steps=4
    )
    arguments = training_arguments(settings, tmp_path, seed=0, dtype="float32", steps=40) | {"save_strategy": "no"}
    loss, spending = partial(reward_model.bradley_terry, scorer, 0.0), Spending()
    trainer = EngineTrainer(scorer, arguments, chosen, loss, spending=spending)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "accuracy" in log]
    assert logs[-1]["accuracy"] > 0.8 and logs[-1]["loss"] < 0.75 * logs[0]["loss"]
    assert spending.tokens == 10 * sum(len(ids) for example in chosen for ids in example.tree.response_ids)
