"""``PPOTrainer``: PPO from models and data sets, used as any TRL trainer is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import PreTrainedTokenizerBase, TrainerCallback

from toolkit.models.inspect import inner, torch_dtype
from toolkit.models.save import write_training_record
from toolkit.models.tokenizer import eos_ids
from toolkit.ppo.assembly import TrainerModels, assemble
from toolkit.ppo.config import PPOConfig
from toolkit.ppo.loop import PPOLoop
from toolkit.ppo.prompts import PromptIds, TrainingData, encode_prompts, encode_ptx
from toolkit.ppo.sampling import SamplingSettings
from toolkit.recipe.other_names import explains_other_names
from toolkit.training.milestones import MilestonePolicy
from toolkit.training.trainer import seed_everything


@explains_other_names()
class PPOTrainer(PPOLoop):
    """PPO of a causal language model.

    ``model``: a model, or its name or folder. With ``peft_config`` (LoRA) it trains an adapter on frozen weights, which
    are then the reference; policy, critic and a reward model that is an adapter on the same weights share them. A
    ``PeftModel`` goes on training its adapter, against a frozen copy of it. Otherwise all weights train, in fp32.

    ``reward``: a sequence classifier with one output (or its name or folder), a :class:`toolkit.ppo.Ensemble`, a
    function ``f(prompts, completions, completion_ids, **columns)`` as TRL takes it (sync or async; a number, None, or a
    list of (token position, value) steps for each completion), or a list of these, weighted by ``reward_weights``.
    ``reward_processing_classes``: tokenizers of loaded reward models whose tokenizer is not the policy's.

    ``train_dataset``, ``eval_dataset``: rows with a ``prompt``, text or messages; their other columns go to reward
    functions. ``ptx_dataset``: rows with ``prompt`` and ``completion`` for ``ptx_coef``.

    ``value_model``: a sequence classifier (or its name or folder) to start the critic from; None takes the reward model
    where it can be the policy's critic (an adapter on the same weights, or a classifier of the same architecture and
    tokenizer), else the policy's trunk. ``reference``: a model, its name or folder; None is the policy as it is now.

    Raises RecipeError, ModelError or DataError for what cannot be trained; the message says why.
    """

    def __init__(
        self,
        model: Any,
        args: PPOConfig,
        reward: Any,
        train_dataset: Any,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        value_model: Any = None,
        reference: Any = None,
        peft_config: LoraConfig | None = None,
        ptx_dataset: Any = None,
        reward_processing_classes: Sequence[PreTrainedTokenizerBase | None] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        seed_everything(args.seed)
        inputs = TrainerModels(
            model, reward, processing_class, value_model, reference, peft_config, reward_processing_classes
        )
        assembled = assemble(inputs, args)
        tokenizer, longest = assembled.tokenizer, args.max_prompt_length
        data = TrainingData(
            encode_prompts(train_dataset, tokenizer, longest, "train_dataset"),
            encode_prompts(eval_dataset, tokenizer, longest, "eval_dataset") if eval_dataset is not None else (),
            encode_ptx(ptx_dataset, tokenizer, args.response_length) if ptx_dataset is not None else (),
        )
        stop_ids = args.stop_token_ids or eos_ids(inner(assembled.models.policy), tokenizer)
        dtype = torch_dtype("bfloat16" if args.bf16 else "float32")
        super().__init__(
            assembled.models,
            args,
            assembled.rewards,
            data,
            SamplingSettings(tokenizer, stop_ids, dtype, args.seed),
            keep_milestone=self._keep_milestone,
            callbacks=callbacks,
        )

    def _keep_milestone(self, kept: MilestonePolicy) -> None:
        """Write ``milestones/kl-X`` in the output folder: the policy (or average) for a KL milestone of X nats, and
        ``duel.json`` with its measured KL."""
        if self.is_world_process_zero():
            folder = Path(str(self.args.output_dir)) / "milestones" / kept.name
            self.export_as_it_is(folder)
            write_training_record(folder, **kept.facts())

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample each prompt of ``eval_dataset`` (or of the trainer's) once: score, KL, length, end-of-text rate."""
        prompts = eval_dataset
        if eval_dataset is not None and not all(isinstance(row, PromptIds) for row in eval_dataset):
            prompts = encode_prompts(eval_dataset, self.sampling.tokenizer, self.args.max_prompt_length, "eval_dataset")
        return super().evaluate(prompts, ignore_keys, metric_key_prefix)
