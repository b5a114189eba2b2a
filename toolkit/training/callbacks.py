"""Callbacks of every training stage: progress, trackers, and policies that are saved along training."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback  # type: ignore[attr-defined]

from toolkit.engine.distributed import all_sum
from toolkit.errors import NotFiniteError
from toolkit.models.sharding import local, shards
from toolkit.progress import Reporter, Trackers
from toolkit.recipe.rounds import kind_of
from toolkit.training.budget import Budget
from toolkit.training.checkpoints import FILES_FILE, checkpoint_folder
from toolkit.training.milestones import KlMilestones

# Where a stage's numbers can go beside metrics.jsonl, by its name in a recipe's ``report_to``.
TRACKERS = {"wandb": WandbCallback, "trackio": TrackioCallback, "tensorboard": TensorBoardCallback}


class StageProgress(TrainerCallback):
    """Shows a stage's progress, and hands its numbers to ``metrics.jsonl`` and the trackers.

    ``stage`` begins with the stage's kind; inside a run the reporter knows its whole name, with the round. Progress is
    counted in steps, or in what ``budget`` counts.

    ``history`` has the log's entries, those from before a resume among them. A stage trains inside of :meth:`shown`
    (:func:`toolkit.training.trainer.train_to_end`).
    """

    def __init__(self, reporter: Reporter, stage: str, steps: int, budget: Budget | None = None) -> None:
        self.reporter, self.steps, self.budget = reporter, steps, budget
        self.stage = stage.replace(kind_of(reporter.stage), reporter.stage, 1) if reporter.stage else stage
        self.history: list[dict[str, float]] = []

    @contextmanager
    def shown(self) -> Iterator[None]:
        """A progress bar, or lines, until training ends or fails."""
        label, total = self.stage, self.steps
        if self.budget is not None:
            label, total = f"{self.stage} ({self.budget.limit.unit})", self.budget.progress()[1]
        with self.reporter.task(label, total) as self.task:
            yield

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        self.trackers = tracker_callbacks(self.reporter.trackers, self.stage, args)
        for tracker in self.trackers:
            tracker.on_train_begin(args, state, control, **more)
        self.history = [entry for entry in state.log_history if "loss" in entry]
        if state.global_step or self.budget is not None:
            self.task.resume_at(self.done(state))
        if state.global_step:
            of_steps = f" of {self.steps}" if self.budget is None else ""
            self.reporter.line(f"{self.stage}: resumed at step {state.global_step}{of_steps}")

    def done(self, state: TrainerState) -> int:
        """Of the total that is shown."""
        return state.global_step if self.budget is None else self.budget.progress()[0]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Raises NotFiniteError before a gradient that is NaN or infinite reaches the weights.

        A loss that is not finite has such a gradient, too. After :func:`torch.nn.utils.clip_grad_norm_` it is NaN.
        """
        gradients = [local(weight.grad) for weight in model.parameters() if weight.grad is not None]
        gradients = [gradient for gradient in gradients if gradient.numel()]  # a small weight may have no shard here
        if not torch.nn.utils.get_total_norm(gradients, norm_type=math.inf).isfinite():
            raise diverged(f"the loss or its gradient is not finite at step {state.global_step + 1}", self.stage, args)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.task.advance(self.done(state) - self.task.done)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if not logs or "train_runtime" in logs:
            return
        if not math.isfinite(logs.get("loss", 0.0)):
            raise diverged(f"the loss is {logs['loss']} at step {state.global_step}", self.stage, args)
        entry = {"step": state.global_step, **{k: v for k, v in logs.items() if isinstance(v, int | float)}}
        self.history.append(entry)
        self.reporter.log(self.stage, entry)
        for tracker in self.trackers:
            tracker.on_log(args, state, control, logs=dict(logs))
        shown = ("rewards/accuracies", "objective/score", "objective/kl")
        note = " ".join(f"{name.split('/')[-1]} {logs[name]:.3g}" for name in ("loss", *shown) if name in logs)
        self.task.advance(0, note=note, tokens=int(logs.get("tokens", 0)))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        for tracker in self.trackers:
            tracker.on_train_end(args, state, control)
        if "wandb" in self.reporter.trackers.names:
            import wandb

            wandb.finish()  # its callback leaves the run open, and the next stage would write into it


def diverged(what: str, stage: str, args: TrainingArguments) -> NotFiniteError:
    """The error of a training whose loss, gradients or weights are NaN or infinite."""
    folders = Path(str(args.output_dir)).glob("checkpoint-*")
    steps = sorted(int(folder.name.split("-")[1]) for folder in folders if (folder / FILES_FILE).is_file())
    before = f"; the last checkpoint before it is that of step {steps[-1]}" if steps else ""
    kind, _, _ = kind_of(stage).partition(",")
    fix = f"lower {kind}.learning_rate{before}"
    return NotFiniteError(f"training diverged: {what}", where=f"stage {stage}", fix=fix)


def tracker_callbacks(trackers: Trackers, stage: str, args: TrainingArguments) -> list[TrainerCallback]:
    """transformers' own reports to wandb, trackio and tensorboard (RUN/tensorboard/STAGE), a run for each stage."""
    args.run_name, args.project = f"{trackers.run_name}-{stage}", "duel"
    os.environ.setdefault("WANDB_PROJECT", "duel")
    made: list[TrainerCallback] = [TRACKERS[name]() for name in trackers.names]  # type: ignore[no-untyped-call]
    for tracker in made:
        if isinstance(tracker, TensorBoardCallback) and trackers.folder is not None:
            tracker.logging_dir = str(trackers.folder / "tensorboard" / stage)
    return made


def log_table(callbacks: Iterable[TrainerCallback], name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
    """Hand a table to the trackers among ``callbacks``, and to those of a :class:`StageProgress`."""
    columns, cells = list(rows[0]), [list(row.values()) for row in rows]
    for callback in callbacks:
        if isinstance(callback, StageProgress):
            log_table(callback.trackers, name, rows, step)
        elif isinstance(callback, WandbCallback):
            import wandb

            wandb.log({name: wandb.Table(columns=columns, data=cells), "train/global_step": step})
        elif isinstance(callback, TrackioCallback):
            import pandas
            import trackio

            trackio.log({name: trackio.Table(dataframe=pandas.DataFrame(cells, columns=columns))}, step=step)
        elif isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            lines = [columns, ["---"] * len(columns), *cells]
            text = "\n".join("| " + " | ".join(_in_a_cell(value) for value in line) + " |" for line in lines)
            callback.tb_writer.add_text(name, text, step)


def _in_a_cell(value: object) -> str:
    """A value in one cell of a Markdown table."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", "<br>")


class SaveAtSteps(TrainerCallback):
    """Calls ``save(step)`` at these steps, before the trainer's own checkpoint of that step is written.

    In the main process; in all of them where the model is sharded, since each has a part of it.
    """

    def __init__(self, steps: Sequence[int], save: Callable[[int], None]) -> None:
        self.steps, self.save = set(steps), save

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step in self.steps and (state.is_world_process_zero or shards()):
            self.save(state.global_step)


class SaveAtKl(TrainerCallback):
    """Logs the KL to the policy before training, and keeps policies at milestones of it.

    ``measure(step)`` is called every ``logging_steps`` and at the end. It gives [R] log pi / pi_ref in nats of this
    process's share of fresh samples. Their mean goes into the log as ``objective/kl``, through ``values``, those of an
    :class:`toolkit.training.trainer.EngineTrainer`, and tells ``milestones`` whether to look closer.
    """

    def __init__(
        self,
        milestones: KlMilestones,
        measure: Callable[[int], torch.Tensor],
        values: dict[str, list[torch.Tensor]],
    ) -> None:
        self.milestones, self.measure, self.values = milestones, measure, values

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        if state.global_step:
            self.milestones.load(checkpoint_folder(args, state))
        else:
            self.milestones.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step % int(args.logging_steps) == 0 or control.should_training_stop:
            ratio_R = self.measure(state.global_step)
            self.values["objective/kl"].append(ratio_R)
            total, n = all_sum(torch.tensor([ratio_R.double().sum(), ratio_R.numel()], device=args.device)).tolist()
            self.milestones.reach(state.global_step, total / n)
        if control.should_save and state.is_world_process_zero:  # before the trainer's own files make it whole
            self.milestones.save(checkpoint_folder(args, state))
