"""Policy, reference and critic of PPO behind one interface.

With LoRA they are one set of weights in memory: policy and critic (and a reward model that was trained so) are
adapters on one base, and the base itself is the reference. With full fine-tuning each is a model. With ``share_trunk``
the critic is a head on the policy's hidden states. Leave-one-out advantages need no critic, and none is made.
``assembly.py`` builds them.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from toolkit.engine.engine import Engine
from toolkit.engine.fast import adapters, speedups
from toolkit.engine.logps import apply_head, hidden_states, state_logps
from toolkit.engine.process import by_tokens, response_places
from toolkit.engine.tree import TreeBatch
from toolkit.models.encoding import Tree
from toolkit.models.inspect import inner
from toolkit.models.load import adapter_weights, refuse_incomplete
from toolkit.models.resolve import ModelRef
from toolkit.models.reward_head import RewardHead
from toolkit.models.save import name_base, write_as_it_is
from toolkit.models.sharding import full_state, gathered, is_sharded, placed, shards, through_root, written_elsewhere
from toolkit.ppo.averaging import WeightAverage

POLICY, CRITIC, REWARD, REFERENCE = "default", "critic", "reward", "reference"
VALUE_HEAD_FILE = "value_head.safetensors"
OF_BASE = "base_model.model."  # what peft writes before the name of a weight of the model
SCORE_WEIGHT = f"{OF_BASE}score.weight"
Part = Literal["policy", "critic", "reference", "reward"]


class PPOModels(nn.Module, ABC):
    """Policy, reference and critic: all that PPO asks of its models. Shapes as in ``engine/logps.py``; fp32 results."""

    policy: Any
    base: ModelRef | None = None  # what the policy's adapter is on, where that is known
    engine: Engine
    has_critic: bool
    shares_trunk: bool
    value_head: nn.Linear  # only with a critic
    value_shift: float = 0.0  # what is subtracted from the head's product with a state
    averaged_reference: WeightAverage | None = None  # the reference of the KL penalty, where it moves

    @property
    def sharded(self) -> bool:
        """Whether each process has shards of the models that train, and of the reference."""
        return is_sharded(self.policy)

    def whole(self, *parts: Part) -> AbstractContextManager[None]:
        """Inside it these models are whole in every process, and compute without the others. Not for training.

        All processes enter and leave it together. Outside it each model computes equally often in all of them.
        """
        return nullcontext()

    def try_layouts(self, trees: Sequence[Tree]) -> None:
        """Let the engines of sharded models try how they take such trees, before passes in which all take part."""

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
        """[N] the critic's value of the state before each response token, with gradients. Only with a critic."""

    @abstractmethod
    def use_policy(self) -> None:
        """Let ``self.policy`` compute as the policy when it is called directly."""

    @abstractmethod
    def policy_parameters(self) -> list[nn.Parameter]: ...

    @abstractmethod
    def critic_parameters(self) -> list[nn.Parameter]:
        """Empty without a critic."""

    @abstractmethod
    def save_policy(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write the policy as a model of transformers or an adapter of peft, with its tokenizer."""

    @abstractmethod
    def save_critic(self, folder: Path) -> None:
        """Write the critic's weights, where there is a critic."""

    def logps_and_values(
        self, batch: TreeBatch, temperature: float, *, with_entropy: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """[N] log-probabilities, [N] entropies and [N] values. Only where the trunk is shared.

        One forward pass of a tree gives them all. In rows of their own the model itself makes the logits, in a second
        one: it may scale them in a way that its configuration does not tell.
        """
        self.use_policy()

        def compute() -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
            states_Nd = hidden_states(self.policy, batch)[batch.predictor]
            if batch.attention_mask.dim() == 4:
                logps_N, entropy_N = state_logps(
                    self.policy, states_Nd, batch.target, temperature=temperature, with_entropy=with_entropy
                )
            else:
                logps_N, entropy_N = self.engine.token_logps(batch, temperature=temperature, with_entropy=with_entropy)
            return logps_N, entropy_N, states_Nd

        logps_N, entropy_N, states_Nd = through_root(self.policy, compute)
        return logps_N, entropy_N, self._head_values(states_Nd)

    def _head_values(self, states_Nd: torch.Tensor) -> torch.Tensor:
        """[N] values of [N, d] hidden states of the critic's trunk."""
        return through_root(self.value_head, lambda: apply_head(self.value_head, states_Nd) - self.value_shift)

    def _name_base(self, folder: Path) -> None:
        if isinstance(self.policy, PeftModel) and self.base is not None:
            name_base(folder, self.base)

    def _save_value_head(self, folder: Path) -> None:
        state = full_state(self.value_head)
        if written_elsewhere(self.value_head):
            return
        head = {"weight": state["weight"].detach().cpu().contiguous(), "shift": torch.tensor(self.value_shift)}
        save_file({f"value_head.{name}": tensor for name, tensor in head.items()}, folder / VALUE_HEAD_FILE)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **more: Any
    ) -> None:
        """Transformers' Trainer calls this where ``gradient_checkpointing`` is on; it is for policy and critic."""
        kwargs = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        for model in self.trained_models():
            inner(model).activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs, **more)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **more: Any
    ) -> None:
        """The same, under its name in transformers 5.17 to 5.20."""
        kwargs = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        for model in self.trained_models():
            inner(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs, **more)

    def trained_models(self) -> list[Any]:
        return [self.policy]

    def trained_module(self) -> nn.Module:
        """What trains, as a module without the rest."""
        return nn.ModuleList([*self.trained_models(), *([self.value_head] if self.shares_trunk else [])])

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
    """A head in fp32, with an output for each row of its weights."""
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        head.weight.copy_(weight.float())
    return head


def zero_head(policy: Any) -> nn.Linear:
    width = inner(policy).config.get_text_config().hidden_size
    return linear_head(torch.zeros(1, width)).to(next(policy.parameters()).device)


class AdapterModels(PPOModels):
    """Policy, critic and reward model as LoRA adapters on one base, which is the reference.

    ``rewards`` are reward models on that base, LoRA with a head ``score`` and nothing else: one, or the members of an
    ensemble. The critic's adapter starts as a copy of the first, or as a copy of the policy's where there is none. With
    ``value_head_init="reward_model"`` its head is the mean of that adapter's outputs, and ``value_shift`` is subtracted
    from its values. A policy that comes with a trained adapter keeps a frozen copy of it as the reference: the base
    alone is not the policy that training started from. With ``base_is_reference`` it is: training goes on from an
    earlier policy, and the reference stays what that one started from. Without ``with_critic`` there is no critic.
    """

    def __init__(
        self,
        policy: PeftModel,
        *,
        engine: Engine,
        rewards: Sequence[ModelRef] = (),
        value_shift: float = 0.0,
        value_head_init: str = "zero",
        share_trunk: bool = False,
        with_critic: bool = True,
        base_is_reference: bool = False,
    ) -> None:
        super().__init__()
        self.policy, self.engine, self.has_critic, self.shares_trunk = policy, engine, with_critic, share_trunk
        has_adapter = with_critic and not share_trunk  # the critic
        initial = get_peft_model_state_dict(policy, adapter_name=POLICY)
        comes_trained = adapters.is_trained(initial) and not base_is_reference
        self.reference_adapter = REFERENCE if comes_trained else None
        if self.reference_adapter is not None:
            self._add_adapter(REFERENCE, policy.peft_config[POLICY], initial)
        if with_critic:
            self.value_head = zero_head(policy)
        self.reward_heads: dict[str, nn.Linear] = {}  # by adapter
        critic_config: PeftConfig = policy.peft_config[POLICY]
        critic_weights = initial
        for number, reward in reversed([*enumerate(rewards)]):  # the first one last: the critic starts from it
            saved = adapter_weights(reward)
            head = saved[SCORE_WEIGHT]
            critic_weights = {name: weight for name, weight in saved.items() if adapters.is_adapter_weight(name)}
            critic_config = LoraConfig.from_pretrained(reward.path)
            adapter = f"{REWARD}-{number}"
            self._add_adapter(adapter, critic_config, critic_weights)
            self._check_complete(adapter, saved, reward)
            self.reward_heads[adapter] = linear_head(head).requires_grad_(False).to(engine.device)
        if rewards and value_head_init == "reward_model" and has_adapter:
            self.value_head, self.value_shift = linear_head(head.mean(0, keepdim=True)).to(engine.device), value_shift
        self.reward_heads = dict(reversed(self.reward_heads.items()))
        if has_adapter:
            self._add_adapter(CRITIC, critic_config, critic_weights)
        speedups.install(policy)
        self.lora_layers = adapters.lora_layers(policy)
        self.adapter_weights = {
            name: adapters.adapter_parameters(policy, name) for name in (POLICY, CRITIC, REFERENCE, *self.reward_heads)
        }
        self._activate(POLICY)

    def _add_adapter(self, name: str, like: PeftConfig, weights: dict[str, torch.Tensor]) -> None:
        config: Any = copy.deepcopy(like)
        config.lora_dropout, config.task_type, config.inference_mode = 0.0, "CAUSAL_LM", False
        config.modules_to_save = None  # this class holds the heads; the adapter is of the trunk's layers
        config.layer_replication = None  # the base has the replicated layers already
        config.init_lora_weights = True  # weights are loaded next, and some ways to start change the base
        self.policy.add_adapter(name, config)
        for weight in adapters.adapter_parameters(self.policy, name):
            weight.data = weight.data.float()  # peft before 0.19 leaves them in the base's precision
        set_peft_model_state_dict(self.policy, weights, adapter_name=name)

    def _check_complete(self, adapter: str, saved: Collection[str], reward: ModelRef) -> None:
        """Raises ModelError where a reward model's files lack weights. It has no unembedding, which the policy has."""
        trunk = f"{OF_BASE}{inner(self.policy).base_model_prefix}."
        names = get_peft_model_state_dict(self.policy, adapter_name=adapter)
        refuse_incomplete({name for name in names if name.startswith(trunk)} - set(saved), reward)

    def _activate(self, adapter: str | None) -> None:
        """Let ``self.policy`` compute with this adapter, or with none."""
        adapters.activate(self.lora_layers, adapter)
        # peft freezes what is not active; both trained adapters keep their gradients, the others have none.
        for name, weights in self.adapter_weights.items():
            for weight in weights:
                weight.requires_grad_(name in (POLICY, CRITIC))

    def use_policy(self) -> None:
        self._activate(POLICY)

    def policy_logps(
        self, batch: TreeBatch, temperature: float, *, with_entropy: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        self._activate(POLICY)
        return self.engine.token_logps(batch, temperature=temperature, with_entropy=with_entropy)

    @torch.no_grad()
    def reference_logps(self, batch: TreeBatch, temperature: float) -> torch.Tensor:
        self._activate(self.reference_adapter)
        logps_N, _ = self.engine.token_logps(batch, temperature=temperature)
        self._activate(POLICY)
        return logps_N

    def values(self, batch: TreeBatch) -> torch.Tensor:
        self._activate(POLICY if self.shares_trunk else CRITIC)
        return self._head_values(hidden_states(self.policy, batch)[batch.predictor])

    @torch.no_grad()
    def reward_outputs(self, trees: list[Tree]) -> list[NDArray[np.float64]]:
        """For each tree [K, M] outputs of the reward adapters for its responses, before centring.

        Each batch is packed once and computed with every adapter, under the caller's autocast.
        """

        def outputs_of(batch: TreeBatch) -> list[list[float]]:
            assert batch.last is not None
            columns = []
            for adapter, head in self.reward_heads.items():
                self._activate(adapter)
                states = hidden_states(self.policy, batch)[batch.last]
                columns.append(apply_head(head, states).reshape(len(states), -1))
            outputs: list[list[float]] = torch.cat(columns, dim=1).tolist()
            return outputs

        per_tree = self.engine.map_responses(trees, outputs_of, last_tokens=True)
        self._activate(POLICY)
        return [np.array(outputs, dtype=np.float64) for outputs in per_tree]

    @torch.no_grad()
    def reward_by_token(self, trees: list[Tree]) -> list[list[torch.Tensor]]:
        """For each tree, of each response, the score of the only reward adapter at every token."""
        [(adapter, head)] = self.reward_heads.items()

        def scores_of(batch: TreeBatch) -> list[torch.Tensor]:
            states = hidden_states(self.policy, batch)[response_places(batch)]
            return by_tokens(apply_head(head, states), batch)

        self._activate(adapter)
        per_tree = self.engine.map_responses(trees, scores_of, last_tokens=True)
        self._activate(POLICY)
        return per_tree

    def policy_parameters(self) -> list[nn.Parameter]:
        return list(self.adapter_weights[POLICY])

    def critic_parameters(self) -> list[nn.Parameter]:
        return [*self.adapter_weights[CRITIC], *self.value_head.parameters()] if self.has_critic else []

    def save_policy(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self.policy.save_pretrained(folder, selected_adapters=[POLICY])
        self._name_base(folder)
        tokenizer.save_pretrained(folder)

    def save_critic(self, folder: Path) -> None:
        if not self.has_critic:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if not self.shares_trunk:
            self.policy.save_pretrained(folder, selected_adapters=[CRITIC])  # peft makes a folder of this name in it
            for file in (folder / CRITIC).iterdir():
                file.replace(folder / file.name)
            (folder / CRITIC).rmdir()
        self._save_value_head(folder)


class SeparateModels(PPOModels):
    """Policy, reference and critic with weights of their own, for full fine-tuning and where adapters do not suffice.

    ``critic`` is a sequence classifier with one output, of any precision; None shares the policy's trunk, or is no
    critic at all without ``with_critic``. With ``value_head_init="reward_model"`` it keeps its head, and
    ``value_shift`` is subtracted from its values.

    Inside :func:`toolkit.models.sharding.sharded_training` all are sharded, and so are those of ``reward_engines``.
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
        with_critic: bool = True,
        reward_engines: Sequence[Engine] = (),
    ) -> None:
        super().__init__()
        self.policy, self.reward_engines = policy, reward_engines
        self.has_critic = with_critic
        self.reference = reference.requires_grad_(False)
        self.shares_trunk = with_critic and critic is None
        self.critic = None if critic is None else critic.float().requires_grad_(True)
        if with_critic:
            self.value_head = zero_head(policy) if critic is None else critic.score
            if value_head_init == "zero":
                nn.init.zeros_(self.value_head.weight)
            elif critic is not None:
                self.value_shift = value_shift
        if shards():
            for model in (policy, reference, *self._of_critic()):
                placed(model)
            for engine in reward_engines:
                engine.shard()
        self.engine = Engine(policy, pad_id, dtype=dtype)
        self.reference_engine = Engine(reference, pad_id, dtype=dtype)
        self.critic_engine = self.engine if critic is None else Engine(self.critic, pad_id, dtype=dtype)

    def _of_critic(self) -> list[Any]:
        """What trains for the values alone."""
        if not self.has_critic:
            return []
        return [self.value_head if self.critic is None else self.critic]

    def whole(self, *parts: Part) -> AbstractContextManager[None]:
        on_trunk = self._of_critic() if self.shares_trunk else []
        models = {
            "policy": [self.policy, *on_trunk],
            "critic": [self.policy, *on_trunk] if self.shares_trunk else self._of_critic(),
            "reference": [self.reference],
            "reward": [engine.model for engine in self.reward_engines],
        }
        return gathered(*(model for part in parts for model in models[part]))

    def try_layouts(self, trees: Sequence[Tree]) -> None:
        with self.whole("policy", "critic"):
            self.engine.batches(trees)
            self.critic_engine.batches(trees)

    def use_policy(self) -> None:
        """Nothing to do: no other model shares the policy's weights."""

    def policy_logps(
        self, batch: TreeBatch, temperature: float, *, with_entropy: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return through_root(
            self.policy,
            lambda: self.engine.token_logps(batch, temperature=temperature, with_entropy=with_entropy),
        )

    @torch.no_grad()
    def reference_logps(self, batch: TreeBatch, temperature: float) -> torch.Tensor:
        return self.reference_engine.token_logps(self.reference_engine.adopt(batch), temperature=temperature)[0]

    def values(self, batch: TreeBatch) -> torch.Tensor:
        batch = self.critic_engine.adopt(batch)
        trunk = self.policy if self.critic is None else self.critic

        def states_Nd() -> torch.Tensor:
            return hidden_states(trunk, batch)[batch.predictor]

        if self.critic is None:
            return self._head_values(through_root(trunk, states_Nd))
        return through_root(trunk, lambda: self._head_values(states_Nd()))

    def policy_parameters(self) -> list[nn.Parameter]:
        return [weight for weight in self.policy.parameters() if weight.requires_grad]

    def critic_parameters(self) -> list[nn.Parameter]:
        return [weight for model in self._of_critic() for weight in model.parameters()]

    def trained_models(self) -> list[Any]:
        return [self.policy] if self.critic is None else [self.policy, self.critic]

    def save_policy(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        write_as_it_is(self.policy, folder)
        if not written_elsewhere(self.policy):
            self._name_base(folder)
            tokenizer.save_pretrained(folder)

    def save_critic(self, folder: Path) -> None:
        if not self.has_critic:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if self.critic is None:
            self._save_value_head(folder)
        else:
            write_as_it_is(self.critic, folder)
            if not written_elsewhere(self.critic):
                RewardHead(mean=self.value_shift).write(folder)
