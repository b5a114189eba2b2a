"""The cases of ``gpu.py``: each builds its model from random weights, computes, and gives seconds and peak memory."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu
import harness
import ppo as ppo_bench
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    TrainerCallback,
)

from toolkit.engine.engine import Engine
from toolkit.engine.fast.speedups import default_attention
from toolkit.engine.fixed_decoding import REFUSED
from toolkit.engine.sampling import SamplingParams, sample_responses
from toolkit.models.encoding import Tree
from toolkit.models.inspect import backbone, disable_dropout, parameter_count, precision
from toolkit.models.load import lora_config, trainable
from toolkit.models.resolve import resolve
from toolkit.models.tokenizer import load_tokenizer
from toolkit.recipe.training import Lora

LORA = Lora(r=gpu.RANK, alpha=2 * gpu.RANK)
BF16 = torch.bfloat16
# A token's log-probability may be off by this much on average. A wrong mask moves it by a tenth or more.
TOLERANCE = {torch.float32: 1e-3, BF16: 0.03}
FIRST_ID = 10  # below are special tokens


@dataclass(frozen=True)
class Bench:
    """A size, how much to compute, and where."""

    shape: gpu.Shape
    load: gpu.Load
    device: torch.device
    folder: Path

    @cached_property
    def tokenizer(self) -> Any:
        """The shipped one: its ids are a part of every size's vocabulary."""
        return load_tokenizer(resolve("tiny"))

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    def model(self, kind: Any = AutoModelForCausalLM, *, dtype: torch.dtype = BF16, attention: str = "") -> Any:
        """A Llama of random weights, the same for every peer; ``kind`` is a class of transformers."""
        shape = self.shape
        config = LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            max_position_embeddings=max(self.load.rows) + 1024,
            tie_word_embeddings=shape.tied,
            pad_token_id=self.pad_id,
            bos_token_id=None,
            eos_token_id=self.tokenizer.eos_token_id,
            num_labels=1,
        )
        torch.manual_seed(0)
        with self.device:
            model = kind.from_config(config, dtype=dtype, attn_implementation=attention or default_attention())
        return disable_dropout(model).eval()

    def ids(self, n: int, seed: int) -> list[int]:
        return random.Random(seed).choices(range(FIRST_ID, len(self.tokenizer)), k=n)

    def trees(self, n: int) -> list[Tree]:
        """Pairs: two responses of a prompt."""
        load = self.load
        return [
            Tree(self.ids(load.prompt, 3 * i), [self.ids(load.response, 3 * i + k) for k in (1, 2)]) for i in range(n)
        ]

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def timed(self, work: Callable[[], Any]) -> float:
        self.synchronise()
        started = time.perf_counter()
        work()
        self.synchronise()
        return time.perf_counter() - started

    def peak_gib(self) -> float:
        """The tensors' on a GPU, since the case began; the process's elsewhere."""
        gib = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else harness.memory("VmHWM")
        return round(gib, 3)

    def measured(self, seconds: float) -> dict[str, Any]:
        return {"seconds": round(seconds, 5), "peak_gib": self.peak_gib()}


class Clock(TrainerCallback):  # type: ignore[misc]
    """Seconds of a training step after the first ``warm``, with the device synchronised at both ends."""

    def __init__(self, bench: Bench, warm: int) -> None:
        self.bench, self.warm, self.step, self.began, self.ended = bench, warm, 0, 0.0, 0.0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.step += 1
        if self.step == self.warm:
            self.bench.synchronise()
            self.began = time.perf_counter()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.bench.synchronise()
        self.ended = time.perf_counter()

    @property
    def seconds(self) -> float:
        return (self.ended - self.began) / (self.step - self.warm)


# ---------------------------------------------------------------- correctness


def correctness(bench: Bench) -> dict[str, Any]:
    """Log-probabilities of trees against the model's own forward pass, and of samples against both."""
    differences: dict[str, float] = {}
    right = True
    for dtype in (torch.float32, BF16):
        model, name = bench.model(dtype=dtype), str(dtype).removeprefix("torch.")
        engine = Engine(model, bench.pad_id, dtype=dtype)
        trees = [
            Tree(bench.ids(20 + i, 10 * i), [bench.ids(6 + 3 * k, 10 * i + k) for k in (1, 2, 3)]) for i in range(4)
        ]
        off = [
            (logps - own_logps(bench, model, tree.prompt_ids, ids)).abs().mean().item()
            for tree, of_tree in zip(trees, engine.logps(trees), strict=True)
            for ids, logps in zip(tree.response_ids, of_tree, strict=True)
        ]
        differences[f"tree, {name}"] = max(off)
        prompts = [tree.prompt_ids for tree in trees]
        params = SamplingParams(16, stop_token_ids=[-1], n=2, fixed_shapes=True)
        samples = sample_responses(model, bench.tokenizer, prompts, lambda i, k: (i, k), params, dtype=dtype)
        sampled = [Tree(ids, [sample.ids for sample in of]) for ids, of in zip(prompts, samples, strict=True)]
        off = [
            abs(sample.logp - logps.sum().item()) / len(sample.ids)
            for of, of_tree in zip(samples, engine.logps(sampled), strict=True)
            for sample, logps in zip(of, of_tree, strict=True)
        ]
        differences[f"samples, {name}"] = max(off)
        right &= all(d <= TOLERANCE[dtype] for what, d in differences.items() if what.endswith(name))
        right &= not REFUSED and not engine.row_per_response and parameter_count(model) == bench.shape.parameters
    return {"right": right, "differences": {what: float(f"{d:.3g}") for what, d in differences.items()}}


@torch.no_grad()
def own_logps(bench: Bench, model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    """[N] log-probabilities of one response by a plain forward pass, in the weights' precision."""
    ids = torch.tensor([prompt + response], device=bench.device)
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    return -F.cross_entropy(logits, ids[0, len(prompt) :], reduction="none").cpu()


# ---------------------------------------------------------------- scoring and training on pairs


def rewards(bench: Bench) -> dict[str, Any]:
    """Implicit rewards of a batch: log-probabilities under policy and reference."""
    trees = bench.trees(bench.load.pairs)
    engines = [Engine(bench.model(), bench.pad_id, dtype=BF16) for _ in range(2)]

    def once() -> None:
        for engine in engines:
            engine.logps(trees)

    for _ in range(gpu.WARM_STEPS):
        once()
    n = bench.load.steps - gpu.WARM_STEPS
    return bench.measured(bench.timed(lambda: [once() for _ in range(n)]) / n)


def examples_of(bench: Bench) -> list[Any]:
    from toolkit.training.batch import Example

    return [Example(tree, [(0, 1, 1.0, 1.0)]) for tree in bench.trees(bench.load.pairs * bench.load.steps)]


def settings_of(bench: Bench, section: Any) -> tuple[Any, dict[str, Any]]:
    args: Any = SimpleNamespace(dtype="bfloat16")
    load = bench.load
    return harness.training_settings(section, args, str(bench.folder), batch=load.pairs, steps=load.steps)


def dpo(bench: Bench) -> dict[str, Any]:
    """A step with the reference's pass over its pairs, which runs before training."""
    from toolkit.recipe.training import DpoSection
    from toolkit.stages.dpo import dpo_loss
    from toolkit.training.trainer import EngineTrainer

    examples, policy = examples_of(bench), bench.model()
    trees = [example.tree for example in examples]
    frozen = Engine(policy, bench.pad_id, dtype=BF16)
    frozen.logps(trees[: bench.load.pairs])
    reference: list[torch.Tensor] = []

    def of_reference() -> None:
        reference.extend(torch.stack([logps.sum() for logps in row]) for row in frozen.logps(trees))

    before = bench.timed(of_reference) / bench.load.steps
    section, arguments = settings_of(bench, DpoSection)
    engine, clock = (
        Engine(trainable(policy, LORA, task="CAUSAL_LM"), bench.pad_id, dtype=BF16),
        Clock(bench, gpu.WARM_STEPS),
    )
    EngineTrainer(engine, arguments, examples, partial(dpo_loss, engine, section, reference), [clock]).train()
    return bench.measured(clock.seconds + before)


def trl_dpo(bench: Bench) -> dict[str, Any]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from toolkit.recipe.training import DpoSection

    section, arguments = settings_of(bench, DpoSection)
    clock, names = Clock(bench, gpu.WARM_STEPS), ("prompt_ids", "chosen_ids", "rejected_ids")
    trainer = DPOTrainer(
        model=bench.model(attention="sdpa"),
        args=DPOConfig(**arguments, gradient_checkpointing=False, max_length=None, beta=section.beta),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),  # it insists on text
        processing_class=bench.tokenizer,
        peft_config=lora_config(LORA, task="CAUSAL_LM"),
        callbacks=[clock],
    )
    rows = [dict(zip(names, (e.tree.prompt_ids, *e.tree.response_ids), strict=True)) for e in examples_of(bench)]
    trainer.train_dataset = Dataset.from_list(rows)
    trainer.train()
    return bench.measured(clock.seconds)


def reward_model(bench: Bench) -> dict[str, Any]:
    from toolkit.recipe.training import RewardModelSection
    from toolkit.training.reward_model import bradley_terry
    from toolkit.training.trainer import EngineTrainer

    model = trainable(bench.model(AutoModelForSequenceClassification), LORA, task="SEQ_CLS", modules_to_save=["score"])
    _, arguments = settings_of(bench, RewardModelSection)
    engine, clock = Engine(model, bench.pad_id, dtype=BF16), Clock(bench, gpu.WARM_STEPS)
    EngineTrainer(engine, arguments, examples_of(bench), partial(bradley_terry, engine, 0.0), [clock]).train()
    return bench.measured(clock.seconds)


def trl_reward_model(bench: Bench) -> dict[str, Any]:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    from toolkit.recipe.training import RewardModelSection

    _, arguments = settings_of(bench, RewardModelSection)
    clock, names = Clock(bench, gpu.WARM_STEPS), ("chosen_ids", "rejected_ids")
    rows = [
        {name: e.tree.prompt_ids + ids for name, ids in zip(names, e.tree.response_ids, strict=True)}
        for e in examples_of(bench)
    ]
    RewardTrainer(
        model=bench.model(AutoModelForSequenceClassification, attention="sdpa"),
        args=RewardConfig(**arguments, gradient_checkpointing=False, max_length=None),
        train_dataset=Dataset.from_list(rows),
        processing_class=bench.tokenizer,
        peft_config=lora_config(LORA, task="SEQ_CLS", modules_to_save=["score"]),
        callbacks=[clock],
    ).train()
    return bench.measured(clock.seconds)


# ---------------------------------------------------------------- PPO


def prompt_texts(bench: Bench) -> list[str]:
    """Different prompts of exactly so many tokens: words that are a token each."""
    tokenizer, n = bench.tokenizer, bench.load.sampled_prompt
    words = [tokenizer.decode([i]) for i in range(FIRST_ID, len(tokenizer))]
    words = [word for word in words if word[:1] == " " and word[1:].isalpha()]
    draw = random.Random(0)
    texts = ["".join(draw.choices(words, k=n)) for _ in range(20 * bench.load.ppo_prompts)]
    exact = [text for text in texts if len(tokenizer(text)["input_ids"]) == n]
    return exact[: bench.load.ppo_prompts]


def ppo_values(bench: Bench) -> dict[str, Any]:
    """Settings that both trainers have by the same name."""
    load = bench.load
    return {
        "output_dir": str(bench.folder / "trainer"),
        "per_device_train_batch_size": load.ppo_prompts,
        "total_episodes": load.ppo_prompts * load.rollouts,
        "num_ppo_epochs": load.ppo_epochs,
        "num_mini_batches": 1,
        "response_length": load.new_tokens,
        "temperature": 1.0,
        "missing_eos_penalty": None,
        "learning_rate": 1e-5,
        "bf16": True,
        "use_cpu": bench.device.type == "cpu",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def ppo(bench: Bench) -> dict[str, Any]:
    """Critic on the policy's trunk; the reward model is an adapter on the policy's weights."""
    from toolkit.models.save import merge_and_save, save_policy
    from toolkit.ppo import PPOConfig, PPOTrainer

    base = bench.folder / "policy"
    merge_and_save(bench.model(), bench.tokenizer, base, BF16)
    reward = trainable(bench.model(AutoModelForSequenceClassification), LORA, task="SEQ_CLS", modules_to_save=["score"])
    save_policy(reward, bench.tokenizer, bench.folder / "reward", dtype=BF16, base=resolve(str(base)))
    del reward
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    load = bench.load
    clock = Clock(bench, load.ppo_epochs)  # the first rollout
    PPOTrainer(
        str(base),
        PPOConfig(**ppo_values(bench), share_trunk=True, stop_token_ids=[-1]),
        str(bench.folder / "reward"),
        [{"prompt": text} for text in prompt_texts(bench)],
        peft_config=lora_config(LORA, task="CAUSAL_LM"),
        callbacks=[clock],
    ).train()
    return bench.measured(clock.seconds * load.ppo_epochs)


def trl_ppo(bench: Bench) -> dict[str, Any]:
    """TRL's critic is a whole model that trains in full."""
    load = bench.load
    trainer = ppo_bench.peer_trainer(
        bench.tokenizer,
        {
            **ppo_values(bench),
            "gradient_accumulation_steps": 1,
            "local_rollout_forward_batch_size": load.ppo_prompts,
            "num_sample_generations": 0,
            "gradient_checkpointing": False,
        },
        bench.model(attention="sdpa"),
        [bench.model(AutoModelForSequenceClassification, attention="sdpa") for _ in range(2)],
        [bench.tokenizer(text)["input_ids"] for text in prompt_texts(bench)],
        lora_config(LORA, task="CAUSAL_LM"),
    )
    clock = Clock(bench, 1)
    trainer.add_callback(clock)
    trainer.train()
    return bench.measured(clock.seconds)


# ---------------------------------------------------------------- sampling and long rows


def sampling(bench: Bench, *, fixed_shapes: bool = True) -> dict[str, Any]:
    """Decoding of a batch by a policy in training, with fixed shapes: on a GPU as a CUDA graph.

    ``seconds`` are those of the second half of the responses; ``start_seconds`` are those of prompts and graph.
    """
    load, policy = bench.load, trainable(bench.model(), LORA, task="CAUSAL_LM")
    prompts = [bench.ids(load.sampled_prompt, i) for i in range(load.sampled)]

    def sample(n: int) -> None:
        params = SamplingParams(n, batch_size=load.sampled, stop_token_ids=[-1], fixed_shapes=fixed_shapes)
        sample_responses(policy, bench.tokenizer, prompts, lambda i, k: (i, k), params, dtype=BF16)

    REFUSED.clear()
    sample(load.new_tokens)
    half = bench.timed(lambda: sample(load.new_tokens))
    whole = bench.timed(lambda: sample(2 * load.new_tokens))
    return {
        **bench.measured(whole - half),
        "whole_seconds": round(whole, 4),
        "start_seconds": round(2 * half - whole, 4),
        "refused": bool(REFUSED),  # then the log says why
    }


def sampling_growing(bench: Bench) -> dict[str, Any]:
    """The same with tensors that grow by a token at a time."""
    return sampling(bench, fixed_shapes=False)


def rows(bench: Bench) -> dict[str, Any]:
    """Long rows under a tree's mask, without and with gradients, beside the same tokens as one causal text."""
    model = trainable(bench.model(attention="sdpa" if bench.device.type == "cuda" else ""), LORA, task="CAUSAL_LM")
    engine = Engine(model, bench.pad_id, dtype=BF16)
    return {"rows": [{"tokens": n} | of_row(bench, engine, n) for n in bench.load.rows]}


def of_row(bench: Bench, engine: Engine, n: int) -> dict[str, Any]:
    """A prompt of half the row and four responses; memory is what came on top of the model, in GiB."""
    model = engine.model
    tree = Tree(bench.ids(n // 2, 0), [bench.ids(n // 8, k) for k in range(1, 5)])
    text = torch.tensor([bench.ids(n, 9)], device=bench.device)

    def forward() -> None:
        engine.logps([tree])

    def training() -> None:
        with precision(bench.device, BF16):
            logps, _ = engine.token_logps(engine.pack([tree]))
        logps.sum().backward()
        model.zero_grad()

    @torch.no_grad()
    def causal() -> None:
        with precision(bench.device, BF16):
            backbone(model)(input_ids=text, use_cache=False)

    def causal_training() -> None:
        with precision(bench.device, BF16):
            states = backbone(model)(input_ids=text, use_cache=False).last_hidden_state
        states.float().sum().backward()
        model.zero_grad()

    figures: dict[str, Any] = {}
    for name, work in {
        "tree": forward,
        "causal": causal,
        "tree_training": training,
        "causal_training": causal_training,
    }.items():
        figures[name] = of_pass(bench, work)
    return figures


def of_pass(bench: Bench, work: Callable[[], None]) -> dict[str, Any]:
    """Seconds and memory of a second call; the first may measure kernels, or a new mask."""
    try:
        work()
        before = torch.cuda.memory_allocated() / 2**30 if bench.device.type == "cuda" else harness.memory("VmRSS")
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = bench.timed(work)
        return {"seconds": round(seconds, 5), "gib": round(bench.peak_gib() - before, 3)}
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
