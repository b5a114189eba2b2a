"""Each name outside the public interfaces of torch, transformers, peft and TRL that this package uses, and what for.

Such names belong in the fast room and in ``training/trl.py``. ``tests/engine/fast/test_private_names.py`` looks each
one up in the installed versions, and fails where another room uses one.
"""

from __future__ import annotations

from dataclasses import dataclass

# The versions of each library that the names were looked up in: the oldest that ``scripts/test --lowest`` installs, and
# the pinned one of scripts/constraints.txt.
CHECKED_AGAINST = {
    "torch": ("2.13.0",),
    "transformers": ("5.17.0", "5.23.0"),
    "peft": ("0.18.0", "0.21.2"),
    "trl": ("1.12.0", "1.16.0"),
}


@dataclass(frozen=True)
class PrivateNames:
    """Names that ``owner`` has: attributes of a module, a class or its instances, or parameters of a function."""

    owner: str
    names: tuple[str, ...]
    used_in: str
    purpose: str

    @property
    def library(self) -> str:
        return self.owner.partition(".")[0]


PRIVATE = (
    PrivateNames(
        "torch.cpu",
        ("_is_avx512_bf16_supported",),
        "engine/fast/processor.py",
        "whether a processor has instructions for bfloat16",
    ),
    PrivateNames(
        "torch.ops.mkldnn",
        ("_is_mkldnn_bf16_supported",),
        "engine/fast/processor.py",
        "the same of processors other than x86",
    ),
    PrivateNames(
        "torch._C",
        ("_are_functorch_transforms_active",),
        "engine/fast/adapters.py",
        "torch.func takes torch's own operations",
    ),
    PrivateNames(
        "transformers.models.auto.modeling_auto",
        ("MODEL_FOR_MASKED_LM_MAPPING_NAMES",),
        "engine/fast/architectures.py",
        "a reward model on an encoder reads prompt and response as a pair of texts",
    ),
    PrivateNames(
        "torch.nn.Module",
        ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
        "engine/fast/adapters.py",
        "a layer with hooks keeps peft's forward pass",
    ),
    PrivateNames(
        "transformers.PreTrainedModel",
        ("_supports_sdpa", "is_backend_compatible"),
        "engine/fast/attention.py",
        "which models can have another attention",
    ),
    PrivateNames(
        "transformers.PreTrainedModel",
        ("_is_stateful",),
        "engine/fast/architectures.py",
        "which models carry a state along a row, whatever its mask says",
    ),
    PrivateNames(
        "transformers.PreTrainedConfig",
        ("_attn_implementation",),
        "engine/fast/attention.py",
        "which attention a model has",
    ),
    PrivateNames(
        "transformers.integrations.sdpa_attention",
        ("sdpa_attention_forward",),
        "engine/fast/attention.py",
        "the attention of calls that ours has no answer to",
    ),
    PrivateNames(
        "transformers.masking_utils",
        ("eager_mask",),
        "engine/fast/attention.py",
        "additive masks for our attention where the model makes the mask",
    ),
    PrivateNames(
        "transformers.cache_utils",
        ("DynamicLayer",),
        "engine/fast/speedups.py",
        "which caches consist of keys and values of each row alone",
    ),
    PrivateNames(
        "transformers.cache_utils",
        ("DynamicLayer", "DynamicSlidingWindowLayer"),
        "engine/fast/fixed_cache.py",
        "keys and values in room that is there from the start, written in place",
    ),
    PrivateNames(
        "transformers.cache_utils.DynamicSlidingWindowLayer",
        ("sliding_window",),
        "engine/fast/fixed_cache.py",
        "whether a window is as long as the rows",
    ),
    PrivateNames(
        "transformers.cache_utils.DynamicLayer",
        ("keys", "values", "is_initialized", "update"),
        "engine/fast/fixed_cache.py",
        "the same",
    ),
    PrivateNames(
        "transformers.cache_utils",
        ("DynamicLayer",),
        "engine/fast/growing_cache.py",
        "keys and values that are not copied for each new token",
    ),
    PrivateNames(
        "transformers.cache_utils.DynamicLayer",
        ("keys", "values", "is_initialized", "update", "get_seq_length", "batch_select_indices"),
        "engine/fast/growing_cache.py",
        "the same",
    ),
    PrivateNames(
        "transformers.DynamicCache",
        ("layers",),
        "engine/fast/fixed_cache.py",
        "the same",
    ),
    PrivateNames(
        "transformers.DynamicCache",
        ("layers", "batch_select_indices"),
        "engine/fast/speedups.py",
        "rows that have ended leave a cache",
    ),
    PrivateNames(
        "transformers.Trainer",
        ("model_accepts_loss_kwargs",),
        "training/trainer.py",
        "the Trainer does not divide the loss by the accumulation steps",
    ),
    PrivateNames(
        "transformers.Trainer",
        ("_save_optimizer_and_scheduler", "_load_optimizer_and_scheduler", "_load_from_checkpoint"),
        "training/shards.py",
        "each process saves and loads its shards of a sharded model",
    ),
    PrivateNames(
        "transformers.Trainer.save_model",
        ("_internal_call",),
        "training/trainer.py",
        "the same",
    ),
    PrivateNames(
        "transformers.Trainer",
        ("_load_from_checkpoint", "model_accepts_loss_kwargs"),
        "ppo/loop.py",
        "a checkpoint holds what PPO trains, of several models",
    ),
    PrivateNames(
        "transformers.Trainer.save_model",
        ("_internal_call",),
        "ppo/loop.py",
        "tells a checkpoint from an export",
    ),
    PrivateNames(
        "peft.tuners.lora",
        ("Linear", "LoraLayer"),
        "engine/fast/adapters.py",
        "which layers have adapters, and which of them are linear",
    ),
    PrivateNames(
        "peft.tuners.lora.Linear",
        (
            *("base_layer", "get_base_layer", "lora_A", "lora_B", "lora_embedding_A", "lora_dropout", "scaling"),
            *("use_dora", "lora_bias", "lora_variant", "merged"),
        ),
        "engine/fast/adapters.py",
        "the low-rank product, and what a layer does beyond it",
    ),
    PrivateNames(
        "peft.tuners.lora.LoraLayer",
        ("active_adapters", "disable_adapters", "enable_adapters", "set_adapter"),
        "engine/fast/adapters.py",
        "which adapter is active, changed without a walk through the model",
    ),
    PrivateNames(
        "peft.tuners.tuners_utils",
        ("BaseTunerLayer",),
        "engine/fast/adapters.py",
        "a layer of any kind that peft did not merge",
    ),
    PrivateNames(
        "peft.tuners.tuners_utils",
        ("BaseTunerLayer",),
        "training/trl.py",
        "whether the output layer has an adapter, which TRL's DPOTrainer refuses",
    ),
    PrivateNames(
        "peft.utils",
        ("ModulesToSaveWrapper",),
        "engine/fast/adapters.py",
        "a head that an adapter trains in full",
    ),
    PrivateNames(
        "peft.utils.ModulesToSaveWrapper",
        ("modules_to_save", "active_adapters"),
        "engine/fast/adapters.py",
        "the trained copy of such a head",
    ),
    PrivateNames(
        "trl.trainer.dpo_trainer",
        ("DataCollatorForPreference",),
        "training/trl.py",
        "makes a batch of the columns prompt_ids, chosen_ids, rejected_ids, ref_chosen_logps and ref_rejected_logps",
    ),
    PrivateNames(
        "trl.trainer.reward_trainer",
        ("DataCollatorForPreference",),
        "training/trl.py",
        "makes a batch of the columns chosen_ids, rejected_ids and margin",
    ),
)
