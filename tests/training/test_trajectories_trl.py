"""Steps of DPO and of reward model training equal TRL's trainers on the same batches: losses and gradients."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from toolkit.engine.engine import Engine
from toolkit.models.encoding import text_encoder
from toolkit.models.load import load_policy, lora_config, new_reward_model, trainable
from toolkit.models.resolve import ModelRef, resolve
from toolkit.models.tokenizer import load_tokenizer
from toolkit.preferences.reading import read_preferences
from toolkit.recipe.training import DpoSection, Lora, ModelSection
from toolkit.stages.dpo import dpo_loss
from toolkit.training.batch import Example, collate, examples_of
from toolkit.training.reward_model import bradley_terry

pytestmark = pytest.mark.parity

LORA = Lora(r=4, alpha=8)


def small_pairs(tokenizer: Any, n: int, longest: int) -> list[Example]:
    """Pairs of the real data, the first that are short."""
    folder = os.environ.get("DUEL_REAL_DATA")
    if not folder:
        pytest.skip("DUEL_REAL_DATA is not set")
    rows = read_preferences(str(Path(folder) / "hh_harmless" / "pairs.jsonl.gz")).rows
    short = [e for e in examples_of(rows, text_encoder(tokenizer, rows[0].prompt), 512) if len(e.tree) <= longest]
    assert len(short) >= n
    return short[:n]


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """By name within the adapter, so that wrappers do not matter."""
    return {
        name: weight.grad.detach().clone()
        for name, weight in model.named_parameters()
        if weight.requires_grad and weight.grad is not None
    }


def follow(
    engine_model: Any,
    trl_model: Any,
    engine_loss: Callable[[int], torch.Tensor],
    trl_loss: Callable[[int], torch.Tensor],
    steps: int,
) -> list[float]:
    """Train both for ``steps``, each by its own gradients, and compare on the way. Returns the losses."""
    optimisers = [
        torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-3, eps=1e-6)
        for model in (engine_model, trl_model)
    ]
    losses = []
    for step in range(steps):
        for optimiser in optimisers:
            optimiser.zero_grad(set_to_none=True)
        a, b = engine_loss(step), trl_loss(step)
        a.backward()
        b.backward()
        assert a.item() == pytest.approx(b.item(), abs=1e-4), step
        mine, other = gradients(engine_model), gradients(trl_model)
        assert mine.keys() == other.keys() and mine
        gap = sum(float((mine[name] - other[name]).square().sum()) for name in mine)
        assert (gap / sum(float(g.square().sum()) for g in other.values())) ** 0.5 < 1e-3, step
        for optimiser in optimisers:
            optimiser.step()
        losses.append(a.item())
    return losses


def config_of(cls: Any, out: Path, **more: Any) -> Any:
    settings = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "disable_dropout": True}
    return cls(output_dir=str(out), max_length=None, report_to="none", **settings, **more)


def rows_of(examples: list[Example], *, apart: bool) -> list[dict[str, Any]]:
    """Token ids as TRL's collators want them: the prompt apart (DPO) or in front of both responses (RM)."""
    rows = []
    for example in examples:
        prompt, (first, second) = example.tree.prompt_ids, example.tree.response_ids
        chosen, rejected = (first, second) if example.pairs[0][2] > 0.5 else (second, first)
        if apart:
            rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
        else:
            [margin] = example.margins
            rows.append({"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected, "margin": margin})
    return rows


def dpo_trajectory(ref: ModelRef, examples: list[Example], size: int, out: Path, steps: int) -> list[float]:
    section, sdpa = ModelSection(dtype="float32"), ModelSection(dtype="float32", attn_implementation="sdpa")
    tokenizer = load_tokenizer(ref)
    pad_id = int(tokenizer.pad_token_id)
    trl_trainer = DPOTrainer(
        model=load_policy(ref, sdpa),  # with transformers' attention
        args=config_of(DPOConfig, out, beta=0.3),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=tokenizer,
        peft_config=lora_config(LORA, task="CAUSAL_LM"),
    )
    policy = load_policy(ref, section)
    frozen = Engine(policy, pad_id, dtype=torch.float32)
    reference = [torch.stack([t.sum() for t in row]) for row in frozen.logps([e.tree for e in examples])]
    policy = trainable(policy, LORA, task="CAUSAL_LM")
    policy.load_state_dict(trl_trainer.model.state_dict())  # the adapters start from random numbers
    engine, rows = Engine(policy, pad_id, dtype=torch.float32, token_budget=600), rows_of(examples, apart=True)

    def engine_loss(step: int) -> torch.Tensor:
        chosen = [(i, examples[i]) for i in range(step * size % len(examples), step * size % len(examples) + size)]
        parts = collate(engine, chosen)["batch"]
        return torch.stack([dpo_loss(engine, DpoSection(beta=0.3), reference, part)[0] for part in parts]).sum()

    def trl(step: int) -> torch.Tensor:
        start = step * size % len(examples)
        return trl_trainer.compute_loss(trl_trainer.model, trl_trainer.data_collator(rows[start : start + size]))

    return follow(policy, trl_trainer.model, engine_loss, trl, steps)


def rm_trajectory(ref: ModelRef, examples: list[Example], size: int, out: Path, steps: int) -> list[float]:
    section = ModelSection(dtype="float32", lora=LORA)
    sdpa = ModelSection(dtype="float32", lora=LORA, attn_implementation="sdpa")
    tokenizer = load_tokenizer(ref)
    pad_id = int(tokenizer.pad_token_id)
    examples = [replace(e, margins=(0.1 * (k % 3),)) for k, e in enumerate(examples)]
    rows = rows_of(examples, apart=False)
    trl_trainer = RewardTrainer(
        model=new_reward_model(ref, sdpa, pad_id, 0),  # with transformers' attention
        args=config_of(RewardConfig, out, center_rewards_coefficient=0.01),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora_config(LORA, task="SEQ_CLS", modules_to_save=["score"]),
    )
    model = trainable(new_reward_model(ref, section, pad_id, 0), LORA, task="SEQ_CLS", modules_to_save=["score"])
    model.load_state_dict(trl_trainer.model.state_dict())
    engine = Engine(model, pad_id, dtype=torch.float32, token_budget=600)

    def engine_loss(step: int) -> torch.Tensor:
        start = step * size % len(examples)
        parts = collate(engine, list(enumerate(examples))[start : start + size])["batch"]
        return torch.stack([bradley_terry(engine, 0.01, part)[0] for part in parts]).sum()

    def trl(step: int) -> torch.Tensor:
        start = step * size % len(examples)
        return trl_trainer.compute_loss(trl_trainer.model, trl_trainer.data_collator(rows[start : start + size]))

    return follow(model, trl_trainer.model, engine_loss, trl, steps)


TRAJECTORIES = {"dpo": dpo_trajectory, "rm": rm_trajectory}


@pytest.mark.parametrize("kind", TRAJECTORIES)
def test_a_small_model(tiny_ref: ModelRef, tokenizer: Any, tmp_path: Path, kind: str) -> None:
    examples = small_pairs(tokenizer, 16, 160)
    losses = TRAJECTORIES[kind](tiny_ref, examples, 4, tmp_path, 20)
    assert min(losses[-4:]) < losses[0] - 0.02  # something was learned on the way


@pytest.mark.parametrize(
    ("n_pairs", "longest", "steps"),
    [pytest.param(1, 80, 4, id="short"), pytest.param(3, 80, 20, id="long", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("kind", TRAJECTORIES)
def test_smollm2(tmp_path: Path, kind: str, n_pairs: int, longest: int, steps: int) -> None:
    ref = resolve("smollm2-135m")
    examples = small_pairs(load_tokenizer(ref), n_pairs, longest)
    losses = TRAJECTORIES[kind](ref, examples, 1, tmp_path, steps)
    assert min(losses[-3:]) < losses[0] - 0.02
