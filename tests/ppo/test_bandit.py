"""Both arms against mathematics: on a small response space each must find pi* ~ pi_ref exp(r / beta)."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from toolkit.engine.engine import Engine
from toolkit.engine.sampling import SamplingParams
from toolkit.models.encoding import TextEncoder, Tree
from toolkit.ppo import PPOConfig, PPOTrainer
from toolkit.preferences.rows import PreferenceRow
from toolkit.recipe.training import DpoSection
from toolkit.stages.dpo import dpo_loss
from toolkit.training.batch import Example
from toolkit.training.online import OnlineData, OnlineTrainer, SampledPrompts
from toolkit.training.trainer import EngineTrainer

pytestmark = pytest.mark.invariant

WORDS = 8
REWARD = [0.0, 1.0, 0.3, -0.5, 0.8, 0.1, -1.0, 0.6]
PROMPT = [2, 3]
LIMIT_NATS = 0.02


def policy() -> Any:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def words() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<end>": 1, **{f"w{i}": i for i in range(2, WORDS)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


@torch.no_grad()
def log_probabilities(model: Any) -> torch.Tensor:
    return model(input_ids=torch.tensor([PROMPT])).logits[0, -1].double().log_softmax(-1)  # type: ignore[no-any-return]


def optimum(beta: float) -> torch.Tensor:
    return (log_probabilities(policy()) + torch.tensor(REWARD, dtype=torch.float64) / beta).log_softmax(-1)


def distance(model: Any, beta: float) -> float:
    """KL(policy || optimum) in nats."""
    log_p = log_probabilities(model)
    return float((log_p.exp() * (log_p - optimum(beta))).sum())


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [REWARD[ids[0]] for ids in completion_ids]


@pytest.mark.parametrize("critic", [{}, {"share_trunk": True}, {"advantage": "rloo"}], ids=["own", "trunk", "none"])
@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_ppo_finds_the_optimum(beta: float, critic: dict[str, Any], tmp_path: Path) -> None:
    model = policy()
    assert distance(model, beta) > 5 * LIMIT_NATS
    args = PPOConfig(
        output_dir=str(tmp_path),
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=512,
        samples_per_prompt=512,
        total_episodes=512 * 60,
        num_ppo_epochs=2,
        response_length=1,
        stop_token_ids=list(range(WORDS)),
        missing_eos_penalty=None,
        kl_coef=beta,
        **critic,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    PPOTrainer(model, args, reward, [{"prompt": "w2 w3"}], processing_class=words()).train()
    assert distance(model, beta) < LIMIT_NATS


@torch.no_grad()
def sequences(model: Any) -> dict[tuple[int, ...], float]:
    """The log-probability of every response of up to three tokens; token 1 ends one."""
    log_probs, open_ = {}, {(): 0.0}
    for length in (1, 2, 3):
        contexts = torch.tensor([[*PROMPT, *ids] for ids in open_])
        log_p = model(input_ids=contexts).logits[:, -1].double().log_softmax(-1).tolist()
        longer = {(*ids, t): open_[ids] + row[t] for ids, row in zip(open_, log_p, strict=True) for t in range(WORDS)}
        log_probs |= {ids: value for ids, value in longer.items() if ids[-1] == 1 or length == 3}
        open_ = {ids: value for ids, value in longer.items() if ids[-1] != 1}
    return log_probs


@pytest.mark.parametrize("advantage", ["gae", "rloo"])
def test_ppo_finds_the_optimum_over_sequences(advantage: str, tmp_path: Path) -> None:
    """The penalty counts on every token, values and advantages on the way to a score that stands at the end."""
    beta = 1.0

    def total(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [sum(REWARD[t] for t in ids) for ids in completion_ids]

    started = sequences(policy())
    assert sum(map(math.exp, started.values())) == pytest.approx(1) and len(started) == 1 + 7 + 49 * 8
    log_z = torch.tensor([log_p + total([list(ids)])[0] / beta for ids, log_p in started.items()]).logsumexp(0)

    def off(model: Any) -> float:
        optimum = {ids: log_p + total([list(ids)])[0] / beta - float(log_z) for ids, log_p in started.items()}
        return sum(math.exp(log_p) * (log_p - optimum[ids]) for ids, log_p in sequences(model).items())

    model = policy()
    assert off(model) > 5 * LIMIT_NATS
    args = PPOConfig(
        output_dir=str(tmp_path),
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=1024,
        samples_per_prompt=64,  # of 16 copies of the prompt: a row with all would be mostly mask
        total_episodes=1024 * 60,
        num_ppo_epochs=2,
        response_length=3,
        stop_token_ids=[1],
        missing_eos_penalty=None,
        kl_coef=beta,
        advantage=advantage,
        lam=1.0,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    PPOTrainer(model, args, total, [{"prompt": "w2 w3"}] * 16, processing_class=words()).train()
    assert off(model) < LIMIT_NATS


def test_online_dpo_finds_the_optimum(tmp_path: Path) -> None:
    """Its comparisons are drawn from Bradley-Terry, on pairs that the current policy samples; IPO's would not do."""
    beta, model, start = 1.0, policy(), policy()
    tokenizer = words()
    engine = Engine(model, 0, dtype=torch.float32)
    reference_engine = Engine(start, 0, dtype=torch.float32)
    noise = torch.Generator().manual_seed(0)

    def labels(sampled: SampledPrompts) -> list[list[float]]:
        """The better of two by reward + Gumbel noise is that of Bradley-Terry."""
        gumbel = -torch.empty(len(sampled.trees), 2).exponential_(generator=noise).log()
        return [
            [REWARD[ids[0]] + float(g) for ids, g in zip(tree.response_ids, row, strict=True)]
            for tree, row in zip(sampled.trees, gumbel, strict=True)
        ]

    data = OnlineData(
        [PreferenceRow(str(i), "w2 w3", ["a", "b"], []) for i in range(128)],
        TextEncoder(tokenizer, False),
        SamplingParams(1, n=2, batch_size=256, stop_token_ids=list(range(WORDS))),
        labels,
        lambda trees: [torch.cat(logps) for logps in reference_engine.logps(trees)],
        seed=0,
        dtype=torch.float32,
    )
    arguments = {
        "output_dir": str(tmp_path),
        "learning_rate": 5e-3,
        "lr_scheduler_type": "cosine",
        "per_device_train_batch_size": 128,
        "max_steps": 300,
        "data_seed": 0,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    assert distance(model, beta) > 5 * LIMIT_NATS
    OnlineTrainer(engine, arguments, data, partial(dpo_loss, engine, DpoSection(beta=beta))).train()
    assert distance(model, beta) < LIMIT_NATS


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_dpo_finds_the_optimum(beta: float, tmp_path: Path) -> None:
    """Every pair is compared as often as Bradley-Terry says, so the loss has its minimum at the optimum."""
    model = policy()
    tree = Tree(PROMPT, [[i] for i in range(WORDS)])
    r = torch.tensor(REWARD)
    pairs = [(i, j, float(torch.sigmoid(r[i] - r[j])), 1.0) for i in range(WORDS) for j in range(i + 1, WORDS)]
    engine = Engine(model, 0, dtype=torch.float32)
    with torch.no_grad():
        reference = [torch.cat([logp for logp in engine.logps([tree])[0]])]
    section = DpoSection(beta=beta)
    arguments = {
        "output_dir": str(tmp_path),
        "learning_rate": 5e-3,
        "lr_scheduler_type": "cosine",
        "max_steps": 200,
        "data_seed": 0,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    loss = partial(dpo_loss, engine, section, reference)
    trainer = EngineTrainer(engine, arguments, [Example(tree, pairs)], loss)
    trainer.train()
    assert distance(model, beta) < LIMIT_NATS
