"""The four models of PPO behind one interface: policy, reference, reward model, critic.

With LoRA all four are one set of weights in memory: policy, critic and reward model are adapters on one base,
and the base itself is the reference. With full fine-tuning they are four models.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from toolkit import models
from toolkit.locating import ModelRef, resolve_base
from toolkit.recipe import ModelSection
from toolkit.scoring import Engine, TreeBatch, apply_head, hidden_states

POLICY, CRITIC, REWARD = "default", "critic", "reward"


class Actors(nn.Module, ABC):
    """Everything the PPO loop asks of its models. Shapes as in ``scoring.py``; fp32 results."""

    policy: Any
    engine: Engine

    @abstractmethod
    def policy_logps(
        self, batch: TreeBatch, temperature: float, *, with_entropy: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[N] log-probabilities under the policy, with gradients, and [N] entropies."""

    @abstractmethod
    def reference_logps(self, batch: TreeBatch, temperature: float) -> torch.Tensor:
        """[N] log-probabilities under the policy that training started from."""

    @abstractmethod
    def values(self, batch: TreeBatch) -> torch.Tensor:
        """[N] the critic's value of the state before each response token, with gradients."""

    @abstractmethod
    def scores(self, batch: TreeBatch) -> torch.Tensor:
        """[R] the reward model's score of each response, centred."""

    @abstractmethod
    def use_policy(self) -> None:
        """Make a plain call of ``self.policy`` mean the policy."""

    @abstractmethod
    def policy_parameters(self) -> list[nn.Parameter]: ...

    @abstractmethod
    def critic_parameters(self) -> list[nn.Parameter]: ...

    @abstractmethod
    def save_policy(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write the policy as a plain model or adapter."""

    @abstractmethod
    def save_critic(self, folder: Path) -> None:
        """Write the critic's weights."""

    def trained_state(self) -> dict[str, torch.Tensor]:
        """The weights that training changes, by name."""
        return {name: weight.detach() for name, weight in self.named_parameters() if weight.requires_grad}

    def load_trained_state(self, state: dict[str, torch.Tensor]) -> None:
        """Raises RuntimeError where names do not match exactly."""
        weights = {name: weight for name, weight in self.named_parameters() if weight.requires_grad}
        if weights.keys() != state.keys():
            raise RuntimeError(f"the checkpoint's weights differ in {sorted(weights.keys() ^ state.keys())[:3]}")
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(state[name])


def linear_head(weight: torch.Tensor) -> nn.Linear:
    """A scalar head in fp32."""
    head = nn.Linear(weight.shape[1], 1, bias=False)
    with torch.no_grad():
        head.weight.copy_(weight.float())
    return head


class SharedBase(Actors):
    """Policy, critic and reward model as LoRA adapters on one base, which is the reference."""

    def __init__(
        self, policy: PeftModel, reward: ModelRef, *, engine: Engine, value_head_init: str, mean: float
    ) -> None:
        super().__init__()
        self.policy, self.engine, self.mean = policy, engine, mean
        self.value_shift = mean if value_head_init == "reward_model" else 0.0
        saved = load_file(Path(reward.path) / "adapter_model.safetensors")
        lora = {name: weight for name, weight in saved.items() if ".lora_" in name}
        head = next(weight for name, weight in saved.items() if "score" in name)
        rank = LoraConfig.from_pretrained(reward.path)
        for name in (CRITIC, REWARD):
            # The heads are ours, so the adapters need to know about the layers of the trunk alone.
            config = LoraConfig(
                r=rank.r,
                lora_alpha=rank.lora_alpha,
                lora_dropout=0.0,
                target_modules=rank.target_modules,
                task_type="CAUSAL_LM",
            )
            policy.add_adapter(name, config)
            set_peft_model_state_dict(policy, lora, adapter_name=name)
        device = next(policy.parameters()).device
        self.reward_head = linear_head(head).requires_grad_(False).to(device)
        self.value_head = linear_head(head if value_head_init == "reward_model" else torch.zeros_like(head)).to(device)
        self.layers = [module for module in policy.modules() if isinstance(module, LoraLayer)]
        named = dict(policy.named_parameters())
        self.by_adapter = {
            adapter: [weight for name, weight in named.items() if f".{adapter}." in name and ".lora_" in name]
            for adapter in (POLICY, CRITIC, REWARD)
        }
        self._use(POLICY)

    def _use(self, adapter: str | None) -> None:
        for layer in self.layers:
            layer.enable_adapters(adapter is not None)
            if adapter is not None:
                layer.set_adapter(adapter)
        # peft freezes what is not active; both trained adapters keep their gradients, the reward model has none.
        for name, weights in self.by_adapter.items():
            for weight in weights:
                weight.requires_grad_(name != REWARD)

    def use_policy(self) -> None:
        self._use(POLICY)

    def policy_logps(
        self, batch: TreeBatch, temperature: float, *, with_entropy: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        self._use(POLICY)
        return self.engine.token_logps(batch, temperature=temperature, with_entropy=with_entropy)

    @torch.no_grad()
    def reference_logps(self, batch: TreeBatch, temperature: float) -> torch.Tensor:
        self._use(None)
        logps, _ = self.engine.token_logps(batch, temperature=temperature)
        self._use(POLICY)
        return logps

    def values(self, batch: TreeBatch) -> torch.Tensor:
        self._use(CRITIC)
        return apply_head(self.value_head, hidden_states(self.policy, batch)[batch.predictor]) - self.value_shift

    @torch.no_grad()
    def scores(self, batch: TreeBatch) -> torch.Tensor:
        self._use(REWARD)
        scores = apply_head(self.reward_head, hidden_states(self.policy, batch)[batch.last]) - self.mean
        self._use(POLICY)
        return scores

    def policy_parameters(self) -> list[nn.Parameter]:
        return list(self.by_adapter[POLICY])

    def critic_parameters(self) -> list[nn.Parameter]:
        return [*self.by_adapter[CRITIC], self.value_head.weight]

    def save_policy(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self.policy.save_pretrained(folder, selected_adapters=[POLICY])
        tokenizer.save_pretrained(folder)

    def save_critic(self, folder: Path) -> None:
        self.policy.save_pretrained(folder, selected_adapters=[CRITIC])
        save_file({"value_head.weight": self.value_head.weight.detach().cpu()}, folder / "value_head.safetensors")


class SeparateModels(Actors):
    """Four models: for full fine-tuning, and for a reward model that is not an adapter on the policy's base."""

    def __init__(
        self,
        policy: Any,
        reference: Any,
        reward_model: Any,
        *,
        pad_id: int,
        dtype: torch.dtype,
        value_head_init: str,
        mean: float,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.reference = reference.requires_grad_(False)
        self.critic = copy.deepcopy(reward_model).float().requires_grad_(True)
        self.reward_model = reward_model.requires_grad_(False)
        self.mean = mean
        self.value_shift = mean if value_head_init == "reward_model" else 0.0
        if value_head_init == "zero":
            nn.init.zeros_(self.critic.score.weight)
        self.engine = Engine(policy, pad_id, dtype=dtype)
        self.reference_engine = Engine(reference, pad_id, dtype=dtype)
        self.reward_engine = Engine(reward_model, pad_id, dtype=dtype)

    def use_policy(self) -> None:
        return None

    def policy_logps(
        self, batch: TreeBatch, temperature: float, *, with_entropy: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.engine.token_logps(batch, temperature=temperature, with_entropy=with_entropy)

    @torch.no_grad()
    def reference_logps(self, batch: TreeBatch, temperature: float) -> torch.Tensor:
        return self.reference_engine.token_logps(batch, temperature=temperature)[0]

    def values(self, batch: TreeBatch) -> torch.Tensor:
        batch = self.reward_engine.suited(batch)
        return apply_head(self.critic.score, hidden_states(self.critic, batch)[batch.predictor]) - self.value_shift

    @torch.no_grad()
    def scores(self, batch: TreeBatch) -> torch.Tensor:
        return self.reward_engine.branch_scores(self.reward_engine.suited(batch)) - self.mean

    def policy_parameters(self) -> list[nn.Parameter]:
        return list(self.policy.parameters())

    def critic_parameters(self) -> list[nn.Parameter]:
        return list(self.critic.parameters())

    def save_policy(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self.policy.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def save_critic(self, folder: Path) -> None:
        self.critic.save_pretrained(folder)


def build(
    sft: ModelRef, reward: ModelRef, section: ModelSection, tokenizer: PreTrainedTokenizerBase, *, value_head_init: str
) -> Actors:
    """The four models for a run: one shared base where all are adapters on it, four models otherwise."""
    pad_id, dtype = int(tokenizer.pad_token_id), models.DTYPES[section.dtype]
    device = models.best_device()
    mean = models.reward_mean(reward.path)
    policy = models.load_policy(sft, section, dtype=None if section.lora else torch.float32).to(device)
    policy = models.trainable(policy, section.lora, task="CAUSAL_LM")
    on_base = reward.kind == "adapter" and resolve_base(Path(reward.path)).fingerprint == sft.fingerprint
    if section.lora is not None and on_base:
        engine = Engine(policy, pad_id, dtype=dtype)
        return SharedBase(policy, reward, engine=engine, value_head_init=value_head_init, mean=mean)
    # In the policy's own precision, so that the KL between two equal models is 0.
    reference = models.load_policy(sft, section, dtype=None if section.lora else torch.float32).to(device)
    reward_model = models.load_reward_model(reward, section).to(device)
    if section.lora is not None:
        reward_model = reward_model.merge_and_unload() if isinstance(reward_model, PeftModel) else reward_model
    return SeparateModels(
        policy, reference, reward_model, pad_id=pad_id, dtype=dtype, value_head_init=value_head_init, mean=mean
    )
