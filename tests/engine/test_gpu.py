"""On a GPU, where the attention and the limits of a pass differ: the numbers are those of a CPU.

The other tests hide a GPU from torch: ``DUEL_TEST_GPU=1 scripts/test tests/engine/test_gpu.py`` runs these.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.ppo_models import LORA_CONFIG, SECTION, changed
from support.small_models import Trees, adapter, assert_same, classifier, llama, loss_of, oracle, score_oracle

from toolkit.engine.engine import Engine
from toolkit.engine.fast import speedups
from toolkit.engine.sampling import SamplingParams, generate
from toolkit.ppo import Ensemble, PPOConfig, PPOTrainer

pytestmark = [pytest.mark.invariant, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
PROMPTS = [{"prompt": f"The film was {word}"} for word in ("good", "bad", "long", "new")]


def test_trees_on_a_gpu_equal_one_response_at_a_time(make_trees: Trees) -> None:
    trees = make_trees(6, 64, seed=3)
    for model, expected in ((llama(), oracle), (classifier(), score_oracle)):
        with torch.no_grad():
            wanted = expected(model, trees)
        engine = Engine(model.cuda(), 0, dtype=torch.float32)
        assert_same(engine.scores(trees) if engine.classifier else engine.logps(trees), wanted)
        assert engine.row_per_response is False


def test_the_tree_is_taken_in_bf16_and_close_to_fp32(tiny: Any, new_tiny: Callable[[], Any], make_trees: Trees) -> None:
    trees = make_trees(8, 2000, k=4, longest=60)
    exact = Engine(tiny, 0, dtype=torch.float32).logps(trees)
    engine = Engine(new_tiny().cuda(), 0, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rounded = engine.logps(trees)
    off = torch.cat([(a - b).abs() for x, y in zip(exact, rounded, strict=True) for a, b in zip(x, y, strict=True)])
    assert float(off.mean()) < 0.03 and engine.row_per_response is False


def test_gradients_of_fused_adapters_on_a_gpu_are_those_of_fp32(new_tiny: Callable[[], Any], make_trees: Trees) -> None:
    trees = make_trees(6, 2000, k=2, longest=30)
    torch.manual_seed(0)
    exact = get_peft_model(new_tiny(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    fast = speedups.install(copy.deepcopy(exact).cuda())
    flat_gradients = []
    for model, dtype in ((exact, torch.float32), (fast, torch.bfloat16)):
        engine = Engine(model, 0, dtype=dtype)
        batch = engine.pack(trees)
        with torch.autocast(engine.device.type, dtype=dtype, enabled=dtype is torch.bfloat16):
            logps_N, _ = engine.token_logps(batch)
        loss_of(logps_N.cpu(), batch.owner.cpu()).backward()
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        flat_gradients.append(torch.cat([gradient.flatten().double().cpu() for gradient in gradients]))
    assert float((flat_gradients[0] - flat_gradients[1]).norm() / flat_gradients[0].norm()) < 0.05


def test_samples_do_not_depend_on_the_batch_nor_on_the_device(tiny: Any, new_tiny: Callable[[], Any]) -> None:
    prompts = [[5, 9, 300], [7, 11], [5, 9, 300], [800, 20, 4, 90]]
    keys, params = [(i,) for i in range(4)], SamplingParams(max_new_tokens=12, temperature=0.9)
    settings: dict[str, Any] = {"stop_token_ids": [2], "pad_id": 0, "dtype": torch.float32}
    on_gpu = new_tiny().cuda()
    whole = generate(on_gpu, prompts, keys, params, **settings)
    assert generate(on_gpu, prompts, keys, replace(params, batch_size=1), **settings) == whole
    assert generate(tiny, prompts, keys, params, **settings) == whole


def test_a_graph_gives_the_tokens_of_decoding_without(
    new_tiny: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Two batches, of which the second replays the first one's graph; some rows end early."""
    model = adapter(new_tiny()).cuda()
    prompts = [[5 + i % 7] * (1 + i % 5) + [9, 300] for i in range(20)]
    keys, params = [(i,) for i in range(20)], SamplingParams(40, batch_size=12, fixed_shapes=False)
    settings: dict[str, Any] = {"pad_id": 0, "dtype": torch.float32}
    free = generate(model, prompts, keys, params, stop_token_ids=[2047], **settings)
    stop = sorted({response.ids[10] for response in free})[:4]
    expected = generate(model, prompts, keys, params, stop_token_ids=stop, **settings)
    graph = generate(model, prompts, keys, replace(params, fixed_shapes=None), stop_token_ids=stop, **settings)
    assert graph == expected and len({len(response.ids) for response in graph}) > 2
    assert "without a CUDA graph" not in caplog.text


def trainer_of(out: Path, reward: Any, *, lora: bool, **options: Any) -> PPOTrainer:
    # Adam divides a gradient by its size; with a large epsilon a step is proportional to it, and can be compared.
    settings = changed(SECTION, learning_rate=1.0, adam_epsilon=1.0, save_strategy="no", use_cpu=False)
    args = PPOConfig(str(out), **(settings | options))
    return PPOTrainer("tiny", args, reward, PROMPTS, peft_config=LORA_CONFIG if lora else None)


def logs_of(trainer: PPOTrainer) -> list[dict[str, float]]:
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("share_trunk", [False, True])
def test_ppo_on_a_gpu_is_ppo_on_a_cpu(reward_folder: Path, tmp_path: Path, lora: bool, share_trunk: bool) -> None:
    logs = []
    for device in ("cpu", "cuda"):
        reward = Ensemble([str(reward_folder)] * 2, how="wco")
        more: dict[str, Any] = {"use_cpu": device == "cpu", "share_trunk": share_trunk}
        if not lora:  # all weights at that rate would fly apart
            more["learning_rate"] = 1e-3
        trainer = trainer_of(tmp_path / device, reward, lora=lora, **more)
        assert {weight.device.type for weight in trainer.models.parameters()} == {device}
        logs.append(logs_of(trainer))
    for cpu, gpu in zip(*logs, strict=True):
        assert cpu.keys() == gpu.keys()
        for name, value in cpu.items():
            if not name.startswith("speed/"):
                assert gpu[name] == pytest.approx(value, rel=0.01, abs=1e-3), name


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_the_first_update_starts_at_policy_and_reference(
    reward_adapter: Path, tmp_path: Path, lora: bool, bf16: bool
) -> None:
    options: dict[str, Any] = {"learning_rate": 1e-3, "adam_epsilon": 1e-5, "bf16": bf16, "temperature": 0.7}
    # A microbatch for each prompt, so that all but the first are computed again.
    trainer = trainer_of(tmp_path, str(reward_adapter), lora=lora, token_budget=1, **options)
    logs = logs_of(trainer)
    assert logs[0]["policy/ratio"] == pytest.approx(1.0, abs=1e-6)
    for name in ("policy/approx_kl", "policy/clip_fraction", "objective/kl", "objective/kl_k3"):
        assert logs[0][name] == 0.0, name
    assert logs[-1]["policy/ratio"] != 1.0
    assert [log["objective/kl"] != 0.0 for log in logs if "objective/kl" in log] == [False, True]
