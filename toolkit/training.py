"""What every training stage shares: arguments, progress, checkpoints, resume, gradients across processes."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks
from transformers.trainer_pt_utils import get_length_grouped_indices

from toolkit.models import precision
from toolkit.preferences import splits
from toolkit.preferences.encoding import encode, is_conversation, response_end
from toolkit.preferences.rows import PreferenceRow
from toolkit.processes import all_sum, launched, reduce_gradients
from toolkit.progress import Reporter
from toolkit.recipe import Arm, Training
from toolkit.scoring import Engine
from toolkit.tree_batch import Tree, TreeBatch

LossFunction = Callable[[Any], tuple[torch.Tensor, dict[str, torch.Tensor]]]
# An interrupted stage loses at most this share of its steps.
RESUME_POINTS = 6


def step_size(section: Training) -> int:
    """Prompts of an optimiser step: those of all processes."""
    return section.per_device_train_batch_size * section.gradient_accumulation_steps * launched()


def total_steps(section: Training, n_items: int) -> int:
    """Optimiser steps of a stage that goes over ``n_items`` prompts."""
    if section.max_steps > 0:
        return section.max_steps
    return max(1, math.ceil(math.ceil(n_items / step_size(section)) * section.num_train_epochs))


def arguments(section: Training, out: Path, *, seed: int, dtype: str, steps: int) -> dict[str, Any]:
    """Keyword arguments of ``TrainingArguments``; precision and schedule come from here for every stage."""
    warmup = math.ceil(section.warmup_ratio * steps)
    # Named only where it is on: newer transformers has another name for it, and says so.
    checkpointing = {"gradient_checkpointing": True} if section.gradient_checkpointing else {}
    return {
        **checkpointing,
        "output_dir": str(out / "trainer"),
        "per_device_train_batch_size": section.per_device_train_batch_size,
        "gradient_accumulation_steps": section.gradient_accumulation_steps,
        "learning_rate": section.learning_rate,
        "lr_scheduler_type": section.lr_scheduler_type,
        "warmup_steps": warmup,
        "weight_decay": section.weight_decay,
        "max_grad_norm": section.max_grad_norm,
        "adam_epsilon": section.adam_epsilon,
        "max_steps": steps,
        "bf16": dtype == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": section.logging_steps,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": max(1, math.ceil(steps / RESUME_POINTS)),
        "save_total_limit": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": seed,
        "data_seed": seed,
    }


def last_checkpoint(out: Path) -> str | None:
    """The newest whole checkpoint of an interrupted stage. The trainer's state is the last file that it writes."""
    whole = [path for path in (out / "trainer").glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None


def milestones(section: Arm, steps: int) -> list[int]:
    """Steps at which an arm's policy is kept for evaluation, evenly spaced, the last included."""
    n = min(section.num_checkpoints, steps)
    return sorted({round(steps * (i + 1) / n) for i in range(n)})


def policy_folder(out: Path, step: int, *, final: bool) -> Path:
    """Where an arm's policy of this step is kept."""
    return out / "model" if final else out / "checkpoints" / f"step-{step}"


class Watch(TrainerCallback):
    """Progress and metrics of a stage."""

    def __init__(self, reporter: Reporter, stage: str, steps: int) -> None:
        self.reporter, self.stage, self.steps = reporter, stage, steps
        self.history: list[dict[str, float]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        self.trackers = trackers(self.reporter, self.stage, args)
        for tracker in self.trackers:
            tracker.on_train_begin(args, state, control, **more)
        self.context = self.reporter.task(self.stage, self.steps)
        self.task = self.context.__enter__()
        self.history = [entry for entry in state.log_history if "loss" in entry]
        if state.global_step:
            self.task.resume_at(state.global_step)
            self.reporter.line(f"{self.stage}: resumed at step {state.global_step} of {self.steps}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.task.advance(state.global_step - self.task.done)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if not logs or "train_runtime" in logs:
            return
        entry = {"step": state.global_step, **{k: v for k, v in logs.items() if isinstance(v, int | float)}}
        self.history.append(entry)
        self.reporter.log(self.stage, entry)
        for tracker in self.trackers:
            tracker.on_log(args, state, control, logs=dict(logs))
        shown = ("rewards/accuracies", "objective/score", "objective/kl")
        note = " ".join(f"{name.split('/')[-1]} {logs[name]:.3g}" for name in ("loss", *shown) if name in logs)
        self.task.advance(0, note=note, tokens=int(logs.get("tokens", 0)))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.context.__exit__(None, None, None)
        for tracker in self.trackers:
            tracker.on_train_end(args, state, control)
        if "wandb" in self.reporter.trackers:
            import wandb

            wandb.finish()  # its callback leaves the run open, and the next stage would write into it


def trackers(reporter: Reporter, stage: str, args: TrainingArguments) -> list[TrainerCallback]:
    """transformers' own reports to wandb, trackio and tensorboard (RUN/tensorboard/STAGE), a run for each stage."""
    args.run_name, args.project = f"{reporter.run_name}-{stage}", "duel"
    os.environ.setdefault("WANDB_PROJECT", "duel")
    found = [make() for make in get_reporting_integration_callbacks(list(reporter.trackers))]
    for tracker in found:
        if isinstance(tracker, TensorBoardCallback) and reporter.metrics is not None:
            tracker.logging_dir = str(reporter.metrics.parent / "tensorboard" / stage)
    return found


class KeepPolicies(TrainerCallback):
    """Calls ``keep(step)`` at an arm's milestones, before the trainer's own checkpoint of that step is written."""

    def __init__(self, steps: Sequence[int], keep: Callable[[int], None]) -> None:
        self.steps, self.keep = set(steps), keep

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step in self.steps and state.is_world_process_zero:
            self.keep(state.global_step)


class KeepAtKl(TrainerCallback):
    """Calls ``keep(step)`` when the KL to the policy before training first passes each of ``milestones``.

    ``measure(step)``, called every ``logging_steps`` and at the end: [R] log pi / pi_ref in nats of this process's
    share of fresh samples. Their mean goes into the log as ``objective/kl`` (through ``values``, those of an
    :class:`EngineTrainer`), from which a resumed run knows what it has passed.
    """

    def __init__(
        self,
        milestones: Sequence[float],
        measure: Callable[[int], torch.Tensor],
        keep: Callable[[int], None],
        values: dict[str, list[torch.Tensor]],
    ) -> None:
        self.milestones, self.measure, self.keep, self.values = milestones, measure, keep, values

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        self.highest = max((entry.get("objective/kl", -math.inf) for entry in state.log_history), default=-math.inf)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        if state.global_step % int(args.logging_steps) and state.global_step < state.max_steps:
            return
        ratio_R = self.measure(state.global_step)
        self.values["objective/kl"].append(ratio_R)
        total, n = all_sum(torch.tensor([ratio_R.double().sum(), ratio_R.numel()], device=args.device)).tolist()
        if any(self.highest < milestone <= total / n for milestone in self.milestones) and state.is_world_process_zero:
            self.keep(state.global_step)
        self.highest = max(self.highest, total / n)


@dataclass(frozen=True)
class Example:
    """One prompt for a comparison loss. ``pairs`` are (i, j, share of the weight that prefers i, weight).

    ``margins``: for each pair, by how much the preferred reward should be higher; none where the data has none.
    """

    tree: Tree
    pairs: list[tuple[int, int, float, float]]
    margins: tuple[float, ...] = ()


def trained_tokens(section: Training, steps: int, examples: Sequence[Example]) -> int:
    """Tokens that ``steps`` optimiser steps saw, prompts included, of examples as long as these in the mean."""
    mean = sum(len(example.tree) for example in examples) / len(examples)
    return round(steps * step_size(section) * mean)


@dataclass(frozen=True)
class PairBatch:
    """Packed prompts with all their comparisons, P in all: a batch, or a part of one that is computed at once. Each
    prompt's weights add up to 1 / prompts of the whole batch, so that weighted sums, added over the parts, are the mean
    over prompts of the mean over comparisons (Ouyang et al. 2022, equation 1)."""

    trees: TreeBatch
    first: torch.Tensor  # [P] response i
    second: torch.Tensor  # [P] response j
    prefer_first: torch.Tensor  # [P] in [0, 1]
    weight: torch.Tensor  # [P]
    margin: torch.Tensor  # [P] by how much the preferred reward should be higher
    example: torch.Tensor  # [n_prompts] which of the stage's examples each prompt is
    token_share: torch.Tensor  # [] this part's share of the whole batch's response tokens

    def to(self, device: torch.device) -> PairBatch:
        return PairBatch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def examples_of(
    rows: Sequence[PreferenceRow], tokenizer: PreTrainedTokenizerBase, max_response_tokens: int
) -> list[Example]:
    """Rows as token ids, those without any comparison left out."""
    end_id = response_end(tokenizer, is_conversation(rows[0].prompt)) if rows else 0
    out = []
    for row in rows:
        found = splits.pairs(row)
        if found:
            encoded = encode(
                tokenizer, row.prompt, row.responses, end_id=end_id, max_response_tokens=max_response_tokens
            )
            pairs = [(pair.i, pair.j, pair.p, pair.weight) for pair in found]
            out.append(Example(encoded.tree, pairs, tuple(splits.margins(row))))
    return out


def collate(engine: Engine, examples: Sequence[tuple[int, Example]]) -> dict[str, list[PairBatch]]:
    """Pack numbered examples into one batch on the engine's device, under the key ``batch``: the parts of it that fit
    the engine's token budget. How many prompts make a step is statistics, how many are computed at once is hardware:
    the gradients are the same, and the memory is that of a part.
    """
    n_tokens = sum(len(ids) for _, example in examples for ids in example.tree.response_ids)
    parts = []
    for indices in engine.batches([example.tree for _, example in examples]):
        chosen = [examples[i] for i in sorted(indices)]
        parts.append(_pair_batch(engine, chosen, len(examples), n_tokens).to(engine.device))
    return {"batch": parts}


def _pair_batch(engine: Engine, examples: Sequence[tuple[int, Example]], n_prompts: int, n_tokens: int) -> PairBatch:
    """A part of a batch of ``n_prompts`` prompts with ``n_tokens`` response tokens."""
    first, second, prefer, weight, margin = [], [], [], [], []
    offset = 0
    for _, example in examples:
        total = sum(w for *_, w in example.pairs)
        for i, j, p, w in example.pairs:
            first.append(offset + i)
            second.append(offset + j)
            prefer.append(p)
            weight.append(w / total / n_prompts)
        margin += example.margins or (0.0,) * len(example.pairs)
        offset += len(example.tree.response_ids)
    trees = engine.pack([example.tree for _, example in examples])
    return PairBatch(
        trees=trees,
        first=torch.tensor(first, dtype=torch.long),
        second=torch.tensor(second, dtype=torch.long),
        prefer_first=torch.tensor(prefer),
        weight=torch.tensor(weight),
        margin=torch.tensor(margin),
        example=torch.tensor([index for index, _ in examples]),
        token_share=torch.tensor(trees.target.numel() / n_tokens),
    )


class ByLength(Sampler[int]):
    """Random order with trees of like lengths together, a function of seed and epoch alone (so that a resumed run
    goes on as it would have). A row is as wide as its batch's longest tree; this spares padding."""

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


class EngineTrainer(Trainer):
    """A transformers Trainer whose loss is a function of one collated batch, with averaged metrics in its log.

    ``engine`` holds the model, made trainable before. ``loss_fn(part) -> (loss, metrics)``: losses add up over the
    parts of a batch to a mean over its prompts; a metric is a tensor of values (of comparisons, of responses), and the
    log has the mean of all since the last entry, and ``tokens``, how many went through the model since then.
    """

    def __init__(
        self,
        engine: Engine,
        arguments: dict[str, Any],
        examples: Sequence[Example],
        loss_fn: LossFunction,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        super().__init__(
            model=engine.model,
            args=TrainingArguments(**arguments),
            train_dataset=list(enumerate(examples)),
            data_collator=partial(collate, engine),
            callbacks=callbacks,
        )
        self.loss_fn = loss_fn
        self.values: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.tokens = 0
        # Our loss is already a mean, so the trainer must divide it by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, train_dataset: Any = None) -> ByLength:
        lengths = [len(example.tree) for _, example in self.train_dataset]
        size = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return ByLength(lengths, size, self.args.data_seed)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # transformers leaves autocast to the model's wrapped forward, which the engine does not go through.
        with precision(self.args.device, torch.bfloat16 if self.args.bf16 else torch.float32):
            loss, metrics = self.loss_fn(inputs["batch"])
        for name, value in metrics.items():
            self.values[name].append(value.detach().flatten())
        return (loss, None) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        losses = [super(EngineTrainer, self).training_step(model, {"batch": part}) for part in inputs["batch"]]
        self.tokens += sum(len(tree) for part in inputs["batch"] for tree in part.trees.trees)
        if self.accelerator.sync_gradients:
            reduce_gradients(self.accelerator.unwrap_model(self.model))
        return torch.stack(losses).sum()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.values:
            # Sums and counts over all processes: means of the whole batches, not of this process's share.
            found = [torch.cat(values).double() for values in self.values.values()]
            parts = [self.tokens, *(x for values in found for x in (values.sum().item(), values.numel()))]
            tokens, *sums = all_sum(torch.tensor(parts, dtype=torch.float64, device=self.args.device)).tolist()
            means = zip(self.values, sums[::2], sums[1::2], strict=True)
            logs |= {name: total / n for name, total, n in means if n} | {"tokens": int(tokens)}
            self.values.clear()
            self.tokens = 0
        super().log(logs, start_time)


def seed_everything(seed: int) -> None:
    """Python, numpy and torch; each stage seeds anew, so that a cached stage before it changes nothing."""
    set_seed(seed)
