"""Policy, reference and critic of PPO behind one interface.

With LoRA they are one set of weights in memory: policy and critic (and a reward model that was trained so) are
adapters on one base, and the base itself is the reference. With full fine-tuning they are models of their own. With
``share_trunk`` the critic is no more than a head on the policy's states.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from toolkit.engine.engine import Engine
from toolkit.engine.fast import adapters, speedups
from toolkit.engine.logps import apply_head, hidden_states, state_logps
from toolkit.engine.tree import TreeBatch
from toolkit.errors import ModelError
from toolkit.models.encoding import Tree
from toolkit.models.inspect import DTYPES, backbone, best_device, disable_dropout, inner
from toolkit.models.load import load_policy, load_reward_model, trainable
from toolkit.models.resolve import ModelRef, resolve_base
from toolkit.models.save import reward_mean, write_reward_mean
from toolkit.recipe.schema import ModelSection

POLICY, CRITIC, REWARD, REFERENCE = "default", "critic", "reward", "reference"
VALUE_HEAD_FILE = "value_head.safetensors"


class Actors(nn.Module, ABC):
    """Everything the PPO loop asks of its models. Shapes as in ``engine/logps.py``; fp32 results."""

    policy: Any
    engine: Engine
    shares_trunk: bool = False

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

    def logps_and_values(
        self, batch: TreeBatch, temperature: float, *, with_entropy: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """[N] log-probabilities, [N] entropies and [N] values; of one forward pass where the trunk is shared."""
        logps_N, entropy_N = self.policy_logps(batch, temperature, with_entropy=with_entropy)
        return logps_N, entropy_N, self.values(batch)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **more: Any
    ) -> None:
        """What transformers' Trainer calls where ``gradient_checkpointing`` is on: for policy and critic."""
        how = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        for model in self.trained_models():
            inner(model).activation_checkpointing_enable(activation_checkpointing_kwargs=how, **more)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **more: Any
    ) -> None:
        """The same under the name that transformers 5.17 to 5.20 have for it."""
        how = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        for model in self.trained_models():
            inner(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs=how, **more)

    def trained_models(self) -> list[Any]:
        return [self.policy]

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


def zero_head(policy: Any) -> nn.Linear:
    width = inner(policy).config.get_text_config().hidden_size
    return linear_head(torch.zeros(1, width)).to(next(policy.parameters()).device)


def _trunk_pass(
    actors: Any, batch: TreeBatch, temperature: float, with_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Log-probabilities, entropies and values from one pass through the policy's trunk."""
    states_Nd = hidden_states(actors.policy, batch)[batch.predictor]
    logps_N, entropy_N = state_logps(
        actors.policy, states_Nd, batch.target, temperature=temperature, with_entropy=with_entropy
    )
    return logps_N, entropy_N, apply_head(actors.value_head, states_Nd)


class SharedBase(Actors):
    """Policy, critic and reward model as LoRA adapters on one base, which is the reference.

    ``reward`` is a reward model's adapter on that base; the critic's trunk is then a copy of it, and of the policy
    otherwise. A policy that comes with a trained adapter keeps a frozen copy of it as the reference: without the
    adapter it would be another policy than the one that training started from.
    """

    def __init__(
        self,
        policy: PeftModel,
        *,
        engine: Engine,
        reward: ModelRef | None = None,
        value_head_init: str = "zero",
        mean: float = 0.0,
        share_trunk: bool = False,
    ) -> None:
        super().__init__()
        self.policy, self.engine, self.mean, self.shares_trunk = policy, engine, mean, share_trunk
        self.value_shift = 0.0
        started = get_peft_model_state_dict(policy, adapter_name=POLICY)
        self.reference_adapter = REFERENCE if adapters.is_trained(started) else None
        if self.reference_adapter is not None:
            self._add(REFERENCE, policy.peft_config[POLICY], started)
        self.value_head = zero_head(policy)
        self.reward_head: nn.Linear | None = None
        critic_config, critic_state = policy.peft_config[POLICY], started
        if reward is not None:
            saved = load_file(Path(reward.path) / "adapter_model.safetensors")
            lora = {name: weight for name, weight in saved.items() if adapters.is_adapter_weight(name)}
            head = next(weight for name, weight in saved.items() if "score" in name)
            critic_config, critic_state = LoraConfig.from_pretrained(reward.path), lora
            self._add(REWARD, critic_config, lora)
            self.reward_head = linear_head(head).requires_grad_(False).to(engine.device)
            if value_head_init == "reward_model" and not share_trunk:
                self.value_head, self.value_shift = linear_head(head).to(engine.device), mean
        if not share_trunk:
            self._add(CRITIC, critic_config, critic_state)
        speedups.install(policy)
        self.layers = adapters.lora_layers(policy)
        self.by_adapter = {
            name: adapters.adapter_parameters(policy, name) for name in (POLICY, CRITIC, REWARD, REFERENCE)
        }
        self._use(POLICY)

    def _add(self, name: str, like: Any, state: dict[str, torch.Tensor]) -> None:
        config = copy.deepcopy(like)
        config.lora_dropout, config.task_type, config.inference_mode = 0.0, "CAUSAL_LM", False
        config.modules_to_save = None  # the heads are ours, so an adapter needs to know about the trunk's layers alone
        config.layer_replication = None  # the base has its layers
        config.init_lora_weights = True  # the state is loaded; some kinds of start would change the base
        self.policy.add_adapter(name, config)
        set_peft_model_state_dict(self.policy, state, adapter_name=name)

    def _use(self, adapter: str | None) -> None:
        adapters.activate(self.layers, adapter)
        # peft freezes what is not active; both trained adapters keep their gradients, the others have none.
        for name, weights in self.by_adapter.items():
            for weight in weights:
                weight.requires_grad_(name in (POLICY, CRITIC))

    def use_policy(self) -> None:
        self._use(POLICY)

    def policy_logps(
        self, batch: TreeBatch, temperature: float, *, with_entropy: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        self._use(POLICY)
        return self.engine.token_logps(batch, temperature=temperature, with_entropy=with_entropy)

    @torch.no_grad()
    def reference_logps(self, batch: TreeBatch, temperature: float) -> torch.Tensor:
        self._use(self.reference_adapter)
        logps, _ = self.engine.token_logps(batch, temperature=temperature)
        self._use(POLICY)
        return logps

    def values(self, batch: TreeBatch) -> torch.Tensor:
        self._use(POLICY if self.shares_trunk else CRITIC)
        return apply_head(self.value_head, hidden_states(self.policy, batch)[batch.predictor]) - self.value_shift

    def logps_and_values(
        self, batch: TreeBatch, temperature: float, *, with_entropy: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        if not self.shares_trunk:
            return super().logps_and_values(batch, temperature, with_entropy=with_entropy)
        self._use(POLICY)
        return _trunk_pass(self, batch, temperature, with_entropy)

    @torch.no_grad()
    def reward_scores(self, trees: list[Tree]) -> list[float]:
        """The reward adapter's centred score of each response of the trees, under the caller's autocast."""
        assert self.reward_head is not None
        self._use(REWARD)
        head, policy = self.reward_head, self.policy

        def run(batch: TreeBatch) -> list[float]:
            assert batch.last is not None
            return apply_head(head, hidden_states(policy, batch)[batch.last]).tolist()  # type: ignore[no-any-return]

        scores = [
            value - self.mean for values in self.engine.map_responses(trees, run, last_tokens=True) for value in values
        ]
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
        folder.mkdir(parents=True, exist_ok=True)
        if not self.shares_trunk:
            self.policy.save_pretrained(folder, selected_adapters=[CRITIC])  # peft makes a folder of this name in it
            for file in (folder / CRITIC).iterdir():
                file.replace(folder / file.name)
            (folder / CRITIC).rmdir()
        _save_head(self, folder)


class SeparateModels(Actors):
    """Models of their own: for full fine-tuning, and for a critic that is not an adapter on the policy's base.

    ``critic`` is a sequence classifier with one output, of any precision; None shares the policy's trunk.
    ``value_shift`` is subtracted from its values.
    """

    def __init__(
        self,
        policy: Any,
        reference: Any,
        critic: Any | None,
        *,
        pad_id: int,
        dtype: torch.dtype,
        value_head_init: str = "zero",
        value_shift: float = 0.0,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.reference = reference.requires_grad_(False)
        self.shares_trunk = critic is None
        self.critic = critic.float().requires_grad_(True) if critic is not None else None
        self.value_head: nn.Linear = zero_head(policy) if critic is None else self.critic.score
        if value_head_init == "zero":
            nn.init.zeros_(self.value_head.weight)
        self.value_shift = value_shift if value_head_init == "reward_model" else 0.0
        self.engine = Engine(policy, pad_id, dtype=dtype)
        self.reference_engine = Engine(reference, pad_id, dtype=dtype)
        self.critic_engine = Engine(self.critic, pad_id, dtype=dtype) if critic is not None else self.engine

    def use_policy(self) -> None:
        return None

    def policy_logps(
        self, batch: TreeBatch, temperature: float, *, with_entropy: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.engine.token_logps(batch, temperature=temperature, with_entropy=with_entropy)

    @torch.no_grad()
    def reference_logps(self, batch: TreeBatch, temperature: float) -> torch.Tensor:
        return self.reference_engine.token_logps(self.reference_engine.adopt(batch), temperature=temperature)[0]

    def values(self, batch: TreeBatch) -> torch.Tensor:
        batch = self.critic_engine.adopt(batch)
        trunk = self.policy if self.critic is None else self.critic
        return apply_head(self.value_head, hidden_states(trunk, batch)[batch.predictor]) - self.value_shift

    def logps_and_values(
        self, batch: TreeBatch, temperature: float, *, with_entropy: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        if not self.shares_trunk:
            return super().logps_and_values(batch, temperature, with_entropy=with_entropy)
        return _trunk_pass(self, batch, temperature, with_entropy)

    def policy_parameters(self) -> list[nn.Parameter]:
        return [weight for weight in self.policy.parameters() if weight.requires_grad]

    def critic_parameters(self) -> list[nn.Parameter]:
        return [self.value_head.weight] if self.critic is None else list(self.critic.parameters())

    def trained_models(self) -> list[Any]:
        return [self.policy] if self.critic is None else [self.policy, self.critic]

    def save_policy(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self.policy.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def save_critic(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if self.critic is None:
            _save_head(self, folder)
        else:
            self.critic.save_pretrained(folder)
            write_reward_mean(folder, self.value_shift)


def _save_head(actors: Any, folder: Path) -> None:
    """A value is the head's product with a state, minus ``value_shift``."""
    head = {"weight": actors.value_head.weight.detach().cpu().contiguous(), "shift": torch.tensor(actors.value_shift)}
    save_file({f"value_head.{name}": tensor for name, tensor in head.items()}, folder / VALUE_HEAD_FILE)


def new_critic(policy: Any) -> Any:
    """A sequence classifier with one output on a copy of the policy's trunk. Its head is random.

    Raises ModelError where transformers has none for this architecture.
    """
    whole = policy.merge_and_unload() if isinstance(policy, PeftModel) else policy
    config = copy.deepcopy(whole.config)
    config.num_labels = 1
    try:
        critic = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise ModelError(
            f"transformers has no sequence classifier for {type(whole).__name__}, which the critic would be",
            where="value_model",
            fix="give a value_model, or share_trunk=True",
        ) from error
    device = next(whole.parameters()).device
    critic = disable_dropout(critic.float().to(device))
    backbone(critic).load_state_dict(backbone(whole).state_dict())
    return critic


def is_on(base: ModelRef, adapter: ModelRef) -> bool:
    """Whether an adapter was trained on exactly these weights."""
    return adapter.kind == "adapter" and resolve_base(Path(adapter.path)).fingerprint == base.fingerprint


def build(
    sft: ModelRef,
    reward: ModelRef,
    section: ModelSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    value_head_init: str,
    share_trunk: bool = False,
) -> tuple[Actors, Any]:
    """The models for a run: one shared base where all are adapters on it, separate models otherwise; and the reward
    model where it is none of these adapters (None otherwise)."""
    pad_id, dtype = int(tokenizer.pad_token_id), DTYPES[section.dtype]
    device = best_device()
    mean = reward_mean(reward.path)
    policy = load_policy(sft, section, dtype=None if section.lora else torch.float32).to(device)
    policy = trainable(policy, section.lora, task="CAUSAL_LM")
    if section.lora is not None and is_on(sft, reward):
        engine = Engine(policy, pad_id, dtype=dtype)
        shared = SharedBase(
            policy, reward=reward, engine=engine, value_head_init=value_head_init, mean=mean, share_trunk=share_trunk
        )
        return shared, None
    # In the policy's own precision, so that the KL between two equal models is 0.
    reference = load_policy(sft, section, dtype=None if section.lora else torch.float32).to(device)
    reward_model = load_reward_model(reward, section).to(device)
    if section.lora is not None:
        reward_model = reward_model.merge_and_unload() if isinstance(reward_model, PeftModel) else reward_model
    actors = SeparateModels(
        policy,
        reference,
        None if share_trunk else copy.deepcopy(reward_model),
        pad_id=pad_id,
        dtype=dtype,
        value_head_init=value_head_init,
        value_shift=mean,
    )
    return actors, reward_model.requires_grad_(False)
