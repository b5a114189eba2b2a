"""What every training stage shares: arguments, progress, checkpoints, resume, gradients across processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from toolkit.engine.distributed import all_items, all_max, all_sum, reduce_gradients
from toolkit.engine.engine import Engine
from toolkit.errors import DataError
from toolkit.models.encoding import Tree
from toolkit.models.inspect import precision, torch_dtype
from toolkit.models.resolve import resolve, training_record
from toolkit.models.sharding import gathered, is_sharded, local, through_root
from toolkit.recipe.training import Arm, DpoSection, RewardModelSection, Training
from toolkit.training.batch import Example, PairBatch, StepTotals, collate
from toolkit.training.budget import RESUME_POINTS, VIRTUAL_STEPS, Budget, Spending
from toolkit.training.callbacks import SaveAtSteps, StageProgress, diverged
from toolkit.training.checkpoints import CHECKPOINTS_KEPT, CheckpointFiles, last_checkpoint
from toolkit.training.length import limit_of, step_size
from toolkit.training.shards import ShardsTrainer
from toolkit.training.unlogged import Unlogged

LossFunction = Callable[[Any], tuple[torch.Tensor, dict[str, torch.Tensor]]]


def trained_tokens(section: Training, steps: int, examples: Sequence[Example]) -> int:
    """About how many tokens ``steps`` optimiser steps saw, prompts included: by these examples' mean length."""
    mean = sum(len(example.tree) for example in examples) / len(examples)
    return round(steps * step_size(section) * mean)


def items_of(section: DpoSection | RewardModelSection, examples: Sequence[Example]) -> int:
    """How many items an epoch has: prompts with all their responses, or for TRL's trainer pairs with a winner.

    Raises DataError where it has none.
    """
    n = sum(example.n_with_winner for example in examples) if section.trainer == "trl" else len(examples)
    if not n:
        what = (
            "every comparison is a tie, of which TRL's trainer learns nothing" if examples else "there is no comparison"
        )
        raise DataError(f"{what} to train on", where="the training data", fix="train on data with preferences")
    return n


def prompts_seen(section: DpoSection | RewardModelSection, steps: int, examples: Sequence[Example]) -> int:
    """How many different prompts ``steps`` optimiser steps trained on."""
    n_prompts = sum(bool(example.n_with_winner) or section.trainer == "engine" for example in examples)
    return min(n_prompts, prompts_trained(section, steps, items_of(section, examples)))


def prompts_trained(section: Training, steps: int, n_items: int) -> int:
    """How many items ``steps`` optimiser steps trained on, each once for every pass over it."""
    size = step_size(section)
    epochs, rest = divmod(steps, math.ceil(n_items / size))  # the last batch of an epoch may be smaller
    return epochs * n_items + min(rest * size, n_items)


def training_arguments(section: Training, out: Path, *, seed: int, dtype: str, steps: int) -> dict[str, Any]:
    """Keyword arguments of ``TrainingArguments`` for every stage: precision, schedule, logging and checkpoints.

    Under a budget the schedule has ``VIRTUAL_STEPS``, and :class:`Budget` says when to save.
    """
    budgeted = limit_of(section) is not None
    warmup = math.ceil(section.warmup_ratio * (VIRTUAL_STEPS if budgeted else steps))
    # Set only where it is on: newer versions of transformers warn of the argument, which they have renamed.
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
        "bf16": torch_dtype(dtype) == torch.bfloat16,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": section.logging_steps,
        "logging_nan_inf_filter": False,
        "save_strategy": "no" if budgeted else "steps",
        "save_steps": max(1, math.ceil(steps / RESUME_POINTS)),
        "save_total_limit": CHECKPOINTS_KEPT,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": seed,
        "data_seed": seed,
    }


def milestone_steps(section: Arm, steps: int) -> list[int]:
    """Steps at which an arm's policy is saved for evaluation: evenly spaced, the last among them."""
    n = min(section.num_checkpoints, steps)
    return sorted({round(steps * (i + 1) / n) for i in range(n)})


def keep_along(
    section: Arm,
    spending: Spending,
    steps: int,
    save: Callable[[int], None],
    *,
    unit_steps: int = 1,
    cap: float | None = None,
) -> tuple[Budget | None, list[TrainerCallback]]:
    """The arm's budget, if it has one, and callbacks: together they call ``save`` for the policies along training.

    Policies fall on the ends of units of ``unit_steps`` steps. ``cap``: as :class:`Budget` has it.
    """
    if (limit := limit_of(section)) is not None:
        return Budget(limit, spending, section.num_checkpoints, save, unit_steps=unit_steps, cap=cap), []
    units = milestone_steps(section, steps // unit_steps)
    return None, [SaveAtSteps([n * unit_steps for n in units], save)]


def record_before(inputs: Mapping[str, Path]) -> dict[str, Any]:
    """The training record of the policy that a further round goes on from; empty in the first round."""
    return training_record(resolve(str(inputs["previous"] / "model"))) if "previous" in inputs else {}


def policy_folder(out: Path, step: int, *, final: bool) -> Path:
    """Where an arm's policy of this step is saved."""
    return out / "model" if final else checkpoint(out, f"step-{step}")


def checkpoint(out: Path, name: str) -> Path:
    """Where an arm's policy from along its training is saved: ``step-N``, or ``kl-X`` for a milestone."""
    return out / "checkpoints" / name


class SimilarLengths(Sampler[int]):
    """A random order with trees of similar lengths together, which spares padding.

    It is a function of seed and epoch alone, so that a resumed run goes on as it would have.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        # Sorted inside groups of up to 50 batches, so that batches of like lengths still differ from epoch to epoch.
        size = self.batch_size * max(1, min(50, len(order) // (4 * self.batch_size)))
        groups = [
            sorted(order[start : start + size], key=lambda i: -self.lengths[i]) for start in range(0, len(order), size)
        ]
        # The longest of all comes first, so that a lack of memory shows at the first step.
        longest = max(groups, key=lambda group: self.lengths[group[0]])
        groups[0][0], longest[0] = longest[0], groups[0][0]
        return (i for group in groups for i in group)


class ProcessBatches(Sampler[list[int]]):
    """This process's batches of an order that all processes share. They take turns, a batch each.

    Each process gets the same number of batches, and no item comes twice: at the end of an epoch a batch may be
    smaller, or empty.
    """

    def __init__(self, order: SimilarLengths, batch_size: int, rank: int, n_processes: int) -> None:
        self.order, self.batch_size, self.rank, self.n_processes = order, batch_size, rank, n_processes

    def set_epoch(self, epoch: int) -> None:
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return math.ceil(len(self.order) / (self.batch_size * self.n_processes))

    def __iter__(self) -> Iterator[list[int]]:
        order, size = list(self.order), self.batch_size
        starts = range(self.rank * size, len(self) * self.n_processes * size, self.n_processes * size)
        return (order[start : start + size] for start in starts)


class EpochLoader(DataLoader[Any]):
    """A DataLoader that hands the number of the epoch to its :class:`ProcessBatches`, when the Trainer names it."""

    batch_sampler: ProcessBatches

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


class EngineTrainer(ShardsTrainer):
    """A transformers Trainer whose loss is a function of one collated batch, with averaged metrics in its log.

    ``engine`` has the model, which is trainable already. ``loss_fn(microbatch)`` gives (loss, metrics). The losses of
    a step's microbatches, over all accumulated batches and processes, add up to its loss: their weights are made for
    the whole step (:class:`toolkit.training.batch.PairBatch`), so that no split of it changes the gradient.

    A metric is a tensor of values, one for each comparison or response. The log has their mean since its last entry,
    and under ``tokens`` how many went through the model. ``spending`` counts the response tokens that were trained on,
    and ``budget`` ends training.
    """

    def __init__(
        self,
        engine: Engine,
        arguments: dict[str, Any],
        examples: Sequence[Example],
        loss_fn: LossFunction,
        callbacks: list[TrainerCallback] | None = None,
        spending: Spending | None = None,
        budget: Budget | None = None,
    ) -> None:
        self.spending, self.budget, self.unlogged = spending or Spending(), budget, Unlogged()
        counters = [self.spending, *([budget] if budget else []), self.unlogged]
        self.numbered: Any = list(enumerate(examples))  # a list is a data set, by protocol
        super().__init__(
            model=engine.model,
            args=TrainingArguments(**arguments),
            train_dataset=self.numbered,
            data_collator=lambda numbered: {"batch": numbered},
            callbacks=[*counters, *(callbacks or []), CheckpointFiles()],
        )
        self.engine, self.examples, self.loss_fn = engine, examples, loss_fn
        self.values = self.unlogged.values
        # Our losses are divided by the totals of the step, so the Trainer must not divide them by its batches.
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)
        if self.sharded is not None:
            self.keep_out_of_ddp()
            with gathered(engine.model):  # the engine tries the longest tree here, in all processes alike
                engine.batches([example.tree for example in examples])

    @property
    def sharded(self) -> nn.Module | None:
        return self.engine.model if is_sharded(self.engine.model) else None

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Numbered examples, in batches of similar lengths: this process's share of them."""
        args = self.args
        step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        order = SimilarLengths([len(example.tree) for example in self.examples], step, int(args.data_seed or 0))
        batches = ProcessBatches(order, args.per_device_train_batch_size, args.process_index, args.world_size)
        return EpochLoader(self.numbered, batch_sampler=batches, collate_fn=self.data_collator)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, list[PairBatch]]], int]:
        """The batches of an optimiser step, packed for a loss over all of it, and its prompts over all processes."""
        inputs, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = self.step_examples([each["batch"] for each in inputs])
        totals = StepTotals.of(item for batch in batches for item in batch).over_processes(self.args.device)
        return [collate(self.engine, batch, totals) for batch in batches], totals.n_prompts

    def step_examples(self, batches: list[list[tuple[int, Example]]]) -> list[list[tuple[int, Example]]]:
        """What an optimiser step trains on, made of the data set's items in its batches."""
        return batches

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if self.budget is None:
            return super().create_scheduler(num_training_steps, optimizer)
        self.budget.follow(super().create_scheduler(VIRTUAL_STEPS, optimizer))
        return self.lr_scheduler

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # transformers leaves autocast to the model's wrapped forward, which the engine does not go through.
        with precision(self.args.device, torch.bfloat16 if self.args.bf16 else torch.float32):
            loss, metrics = through_root(self.engine.model, partial(self.loss_fn, inputs["batch"]))
        for name, value in metrics.items():
            self.values[name].append(value.detach().flatten())
        return (loss, None) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        microbatches = inputs["batch"]
        n_beside = 0  # of microbatches that another process has and this one has not
        if self.sharded is not None:
            n_beside = all_max(len(microbatches), self.args.device) - len(microbatches)
        step: Any = partial(super().training_step, model, num_items_in_batch=num_items_in_batch)
        losses = [step({"batch": each}) for each in microbatches]
        for _ in range(n_beside):
            self.take_part()
        trees = [tree for microbatch in microbatches for tree in microbatch.trees.trees]
        self.unlogged.tokens += sum(map(len, trees))
        self.spending.add(sum(len(ids) for tree in trees for ids in tree.response_ids))
        if self.accelerator.sync_gradients:
            reduce_gradients(self.accelerator.unwrap_model(self.model))
        loss = torch.stack(losses).sum() if losses else torch.zeros((), device=self.args.device)
        loss = loss * float(self.args.world_size)  # the log averages over the processes
        self.unlogged.add_loss(loss)
        return loss

    def take_part(self) -> None:
        """Compute a gradient of zero beside processes that have a microbatch more: they need this one's shards."""
        ids = self.examples[0].tree.prompt_ids[:1]
        batch = self.engine.pack([Tree(ids, [ids])])

        def nothing() -> torch.Tensor:
            values = self.engine.branch_scores(batch) if self.engine.classifier else self.engine.token_logps(batch)[0]
            return 0.0 * values.sum()

        with precision(self.args.device, torch.bfloat16 if self.args.bf16 else torch.float32):
            self.accelerator.backward(through_root(self.engine.model, nothing))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What a checkpoint has of the model. Of a sharded one each process writes its shards."""
        if self.sharded is not None:
            self.save_shards(str(output_dir))
        else:
            super().save_model(output_dir, _internal_call)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["loss"] = self.unlogged.mean_loss(self.state.global_step)
        # A process whose batches were empty at the end of an epoch has no values of its own.
        if names := list(dict.fromkeys(all_items(list(self.values)))):
            # Sums and counts over all processes: means of the whole batches, not of this process's share.
            metrics = [torch.cat(self.values[name] or [torch.empty(0)]).double() for name in names]
            totals = [self.unlogged.tokens, *(x for values in metrics for x in (values.sum().item(), values.numel()))]
            tokens, *sums = all_sum(torch.tensor(totals, dtype=torch.float64, device=self.args.device)).tolist()
            means = zip(names, sums[::2], sums[1::2], strict=True)
            logs |= {name: total / n for name, total, n in means if n} | {"tokens": int(tokens)}
            self.values.clear()
            self.unlogged.tokens = 0
        super().log(logs, start_time)


def train_to_end(trainer: Trainer, progress: StageProgress, out: Path) -> None:
    """Train with progress shown, from the newest whole checkpoint in the stage's folder where there is one.

    A line tells how much of a budget was spent. Raises NotFiniteError where training diverged.
    """
    with progress.shown():
        newest = last_checkpoint(out, lambda text: progress.reporter.line(f"{progress.stage}: {text}"))
        trainer.train(resume_from_checkpoint=newest)
    assert trainer.model is not None
    if not all(torch.isfinite(local(weight)).all() for weight in trainer.model.parameters() if weight.requires_grad):
        step = trainer.state.global_step
        raise diverged(f"weights are not finite after step {step}", progress.stage, trainer.args)
    if progress.budget is not None:
        progress.reporter.line(f"{progress.stage}: {progress.budget}")


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch. Each stage does so, and a cached stage before it changes nothing."""
    set_seed(seed)
