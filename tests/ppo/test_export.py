"""What training leaves behind: evaluations, completions, milestones, checkpoints, the saved policy and its card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.ppo_models import ENDS
from support.ppo_models import LORA_CONFIG as LORA
from support.ppo_trainers import PROMPTS, config, length_reward
from transformers import AutoModelForCausalLM

from toolkit.engine.engine import Engine
from toolkit.engine.logps import hidden_states
from toolkit.engine.sampling import SamplingParams, sample_responses
from toolkit.models.encoding import Tree
from toolkit.models.inspect import disable_dropout
from toolkit.ppo import PPOTrainer
from toolkit.ppo.export import append_completions, some_completions
from toolkit.ppo.rollout_metrics import CompletionRow
from toolkit.progress import COMPLETIONS_FILE
from toolkit.training.milestones import TOLERANCE

pytestmark = pytest.mark.invariant


def test_evaluation_completions_milestones_and_export(tmp_path: Path, tiny_ref: Any, tokenizer: Any) -> None:
    args = config(
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        kl_milestones=[-1.0],
        log_completions_steps=2,
        ema_decay=0.5,
    )
    trainer = PPOTrainer("tiny", args, length_reward, PROMPTS, eval_dataset=PROMPTS[:3], peft_config=LORA)
    trainer.train()
    evaluations = [log for log in trainer.state.log_history if "eval_objective/score" in log]
    assert [log["step"] for log in evaluations] == [2, 4]
    assert all(log["eval_objective/score"] == -log["eval_length/mean"] for log in evaluations)
    assert evaluations[-1]["eval_objective/kl"] != 0 and 0 <= evaluations[-1]["eval_eos_rate"] <= 1

    tables = sorted((tmp_path / "completions").glob("*.parquet"))
    rows = pq.read_table(tables[-1]).to_pylist()
    assert len(tables) == 2 and len(rows) == 8
    assert {"step", "prompt", "completion", "score", "kl_nats", "n_tokens", "truncated"} <= rows[0].keys()
    assert rows[0]["prompt"].startswith("The film was") and rows[0]["score"] == -rows[0]["n_tokens"]
    records = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0] * 8 + [2] * 8 and len({r["prompt_id"] for r in records}) == 4
    assert {json.dumps(row, sort_keys=True) for row in rows} == {json.dumps(r, sort_keys=True) for r in records[8:]}

    assert [path.name for path in (tmp_path / "milestones").iterdir()] == ["kl--1"]

    trainer.save_model(str(tmp_path / "final"))
    card = (tmp_path / "final" / "README.md").read_text(encoding="utf-8")
    assert "objective/score" in card and "| `kl_coef` | 0.05 |" in card
    critic = tmp_path / "final" / "critic"
    head = load_file(critic / "value_head.safetensors")
    trunk = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_ref.path), critic)
    batch = trainer.models.engine.pack([Tree([300], [[400, 2]])])
    with torch.no_grad():
        states = hidden_states(disable_dropout(trunk).eval(), batch)[batch.predictor]
        assert bool(head["value_head.weight"].any())
        expected = trainer.models.values(batch)
    torch.testing.assert_close(states @ head["value_head.weight"][0], expected, rtol=0, atol=1e-4)
    trainer.models.use_policy()
    assert torch.equal(head["value_head.weight"], trainer.models.value_head.weight) and head["value_head.shift"] == 0
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_ref.path), tmp_path / "final")
    with trainer.averaged():
        expected = Engine(trainer.models.policy, 0, dtype=torch.float32).logps([Tree([300], [[400, 2]])])[0][0]
    trainer.models.use_policy()
    latest = Engine(trainer.models.policy, 0, dtype=torch.float32).logps([Tree([300], [[400, 2]])])[0][0]
    exported = Engine(disable_dropout(loaded).eval(), 0, dtype=torch.float32).logps([Tree([300], [[400, 2]])])[0][0]
    torch.testing.assert_close(exported, expected, rtol=0, atol=1e-5)  # the average
    assert not torch.equal(expected, latest)


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.3}, {"share_trunk": True}])
def test_the_policy_of_a_milestone_has_its_kl(options: dict[str, Any], tmp_path: Path, tiny_ref: Any) -> None:
    """A rollout's updates jump over two milestones. What is kept lies on them, measured on samples of their own."""
    args = config(
        tmp_path,
        **{
            "kl_milestones": [0.2, 0.6, 1e6],
            "learning_rate": 1.5e-2,
            "num_ppo_epochs": 4,
            "per_device_train_batch_size": 32,
        },
        **{"total_episodes": 96, **options},
    )
    trainer = PPOTrainer("tiny", args, length_reward, PROMPTS, peft_config=LORA)
    trainer.train()
    kl = [log["objective/kl"] for log in trainer.state.log_history if "objective/kl" in log]
    assert kl[0] == 0 and max(kl) > 1
    assert sorted(path.name for path in (tmp_path / "milestones").iterdir()) == ["kl-0.2", "kl-0.6"]
    after = trainer.models.trained_state()
    for milestone in (0.2, 0.6):
        folder = tmp_path / "milestones" / f"kl-{milestone}"
        record = json.loads((folder / "duel.json").read_text(encoding="utf-8"))
        assert record["kl_milestone"] == milestone and record["kl_standard_error"] < 0.2
        assert record["kl_nats"] == pytest.approx(
            milestone, abs=max(TOLERANCE * milestone, record["kl_standard_error"])
        )
        loaded = disable_dropout(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_ref.path), folder))
        assert measured_kl(loaded.eval(), trainer) == pytest.approx(milestone, abs=4 * record["kl_standard_error"])
    assert all(torch.equal(weight, after[name]) for name, weight in trainer.models.trained_state().items())


def measured_kl(policy: Any, trainer: PPOTrainer) -> float:
    """By 512 samples with seeds of their own."""
    tokenizer = trainer.sampling.tokenizer
    prompts = [prompt.ids for prompt in trainer.data.prompts]
    params = SamplingParams(8, n=128, stop_token_ids=ENDS)
    samples = sample_responses(policy, tokenizer, prompts, lambda i, k: ("test", i, k), params, dtype=torch.float32)
    trees = [Tree(ids, [r.ids for r in group]) for ids, group in zip(prompts, samples, strict=True)]
    with policy.disable_adapter():
        reference = Engine(policy, 0, dtype=torch.float32).logps(trees)
    ratios = [
        float((a - b).sum())
        for of_policy, of_reference in zip(Engine(policy, 0, dtype=torch.float32).logps(trees), reference, strict=True)
        for a, b in zip(of_policy, of_reference, strict=True)
    ]
    return sum(ratios) / len(ratios)


def test_a_checkpoint_holds_what_training_changes(tmp_path: Path) -> None:
    args = config(tmp_path, save_strategy="steps", save_steps=1)
    PPOTrainer("tiny", args, length_reward, PROMPTS, peft_config=LORA).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert all(
        ".lora_" in name or "value_head" in name for name in load_file(tmp_path / "checkpoint-4/actors.safetensors")
    )
    assert json.loads((tmp_path / "checkpoint-4/ppo_state.json").read_text())["kl_coef"] == 0.05


def test_a_few_prompts_are_shown_and_later_steps_leave(tmp_path: Path) -> None:
    rows = [CompletionRow(0, f"p{i % 6}", "The film", f"text {i}", 0.5, 0.1, 3, False) for i in range(12)]
    shown = some_completions(rows, 4)
    assert [(row["prompt_id"], row["completion"]) for row in shown] == [
        (f"p{i}", f"text {k}") for i in range(4) for k in (i, i + 6)
    ]
    assert some_completions(rows[::-1], 4) == shown
    for step in (0, 2, 4, 2):  # killed behind 4, and resumed at 2
        append_completions(some_completions(rows, step), tmp_path)
    lines = (tmp_path / COMPLETIONS_FILE).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0] * 8 + [2] * 8
