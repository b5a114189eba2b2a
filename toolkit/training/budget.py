"""What training has cost so far, and training until a budget of tokens or seconds is spent."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from toolkit.engine.distributed import all_sum
from toolkit.errors import RecipeError
from toolkit.models.sharding import shards
from toolkit.training.length import NOTHING, Cost, Limit

# An interrupted stage loses at most this share of its steps.
RESUME_POINTS = 6
# Steps of the learning rate's schedule under a budget, whose number of steps is not known.
VIRTUAL_STEPS = 10_000


def saved_attributes(callback: ExportableState, state: TrainerState) -> dict[str, Any]:
    """What a callback's ``state`` was in the checkpoint that training resumes from."""
    states: Any = state.stateful_callbacks
    attributes: dict[str, Any] = states[type(callback).__name__]["attributes"]
    return attributes


class Spending(TrainerCallback, ExportableState):
    """Counts what a stage has cost up to its last optimiser step: ``tokens`` of all processes, and ``seconds``.

    A trainer tells :meth:`add` what this process trains on. The clock starts when the object is made, and ``before`` is
    what other stages of the arm had cost. A resumed training goes on with the counts of its checkpoint: what it repeats
    counts once.
    """

    def __init__(self, before: Cost = NOTHING) -> None:
        self.before = before
        self.tokens, self.seconds = 0, 0.0
        self.started = time.monotonic()
        self.uncounted = 0  # this process's tokens since the last optimiser step

    def add(self, n_response_tokens: int) -> None:
        """This process trains on these many response tokens."""
        self.uncounted += n_response_tokens

    def cost(self) -> Cost:
        """The cost until now, that of earlier stages included."""
        return self.before + Cost(self.tokens, time.monotonic() - self.started)

    def facts(self) -> dict[str, object]:
        """The cost until now, for the record of a policy's training."""
        return self.cost().facts()

    def metrics(self) -> dict[str, Any]:
        """Of the stage, at its end."""
        return {"response_tokens_trained": self.tokens}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        if state.global_step:
            saved = saved_attributes(self, state)
            self.tokens, self.started = saved["tokens"], time.monotonic() - saved["seconds"]
        self._count(args, state)

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        # Before the Trainer steps the learning rate, which may follow the counts.
        self._count(args, state)

    def _count(self, args: TrainingArguments, state: TrainerState) -> None:
        """Add up over the processes. All take the main one's clock, so that they decide alike."""
        seconds = time.monotonic() - self.started if state.is_world_process_zero else 0.0
        totals = torch.tensor([self.uncounted, seconds], dtype=torch.float64, device=args.device)
        tokens, self.seconds = all_sum(totals).tolist()
        self.tokens, self.uncounted = self.tokens + int(tokens), 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, in ``trainer_state.json``."""
        return {"args": {}, "attributes": {"tokens": self.tokens, "seconds": time.monotonic() - self.started}}


class Budget(TrainerCallback, ExportableState):
    """Trains until ``limit`` is spent, in units: steps, or rollouts of ``unit_steps`` steps.

    Training stops at the end of the unit that comes nearest to the limit: the next one is taken to cost what the last
    one did. What is left at the beginning of training is divided into even shares. At the first unit's end at or behind
    one of ``n_policies`` shares :func:`keep` gets the step, but for the last policy, which the stage keeps. In the same
    way the Trainer's checkpoints fall on shares, and the learning rate follows the share (:meth:`follow`).

    A unit may become cheap, when responses shrink to a token. Then training stops after ``cap`` times the units that
    the limit would take at the price of the first one. None sets no cap.
    """

    def __init__(
        self,
        limit: Limit,
        spending: Spending,
        n_policies: int,
        keep: Callable[[int], None],
        *,
        unit_steps: int = 1,
        cap: float | None = None,
    ) -> None:
        self.limit, self.spending, self.n_policies, self.keep = limit, spending, n_policies, keep
        self.unit_steps, self.cap = unit_steps, cap
        self.start: float | None = None  # what was spent when training began
        self.last = 0.0  # what was spent at the end of the last unit
        self.first_unit: float | None = None
        self.ended = ""  # why it stopped training: "spent" or "capped"

    @property
    def spent(self) -> float:
        """What the arm has spent up to its last optimiser step, earlier stages included."""
        counted = Cost(self.spending.tokens, self.spending.seconds)
        return self.limit.of(self.spending.before + counted)

    def share(self, spent: float | None = None) -> float:
        """The spent share of what training had at its beginning, in [0, 1]."""
        if self.start is None:
            return 0.0
        spent = self.spent if spent is None else spent
        return min(1.0, (spent - self.start) / (self.limit.amount - self.start))

    def follow(self, scheduler: Any) -> None:
        """Let a schedule of ``VIRTUAL_STEPS`` steps follow the spent share, and not the number of steps."""
        lambdas = [partial(self._rate, of_step) for of_step in scheduler.lr_lambdas]
        scheduler.lr_lambdas = [lambda _, rate=rate: rate() for rate in lambdas]

    def _rate(self, of_step: Callable[[float], float]) -> float:
        return of_step(self.share() * VIRTUAL_STEPS)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        if state.global_step:
            for name, value in saved_attributes(self, state).items():
                setattr(self, name, value)
            return
        self.start = self.last = self.spent
        if self.start >= self.limit.amount:
            raise RecipeError(
                f"{self.limit.words(self.start)} were spent before training began",
                where=self.limit.key,
                fix=f"a larger budget than {self.limit.words(self.limit.amount)}",
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if control.should_training_stop or state.global_step % self.unit_steps:
            return
        spent = self.spent
        unit = spent - self.last
        self.first_unit = self.first_unit or unit
        if spent + unit / 2 > self.limit.amount:
            self.ended = "spent"
        elif self._too_many(state.global_step // self.unit_steps):
            self.ended = "capped"
        if self.ended:
            # No checkpoint of the Trainer is due: a training that resumed from it would go on.
            control.should_training_stop = True
        else:
            if self._crosses(self.n_policies, spent) and (state.is_world_process_zero or shards()):
                self.keep(state.global_step)
            if self._crosses(RESUME_POINTS, spent):
                control.should_save = True
        self.last = spent

    def _too_many(self, units: int) -> bool:
        if self.cap is None or not self.first_unit or self.start is None:
            return False
        return units >= self.cap * (self.limit.amount - self.start) / self.first_unit

    def _crosses(self, n: int, spent: float) -> bool:
        """Whether the last unit reached or passed one of n even shares."""
        return int(self.share(spent) * n + 1e-9) > int(self.share(self.last) * n + 1e-9)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, in ``trainer_state.json``."""
        return {"args": {}, "attributes": {name: getattr(self, name) for name in ("start", "last", "first_unit")}}

    def facts(self) -> dict[str, object]:
        """The cost until now and ``budget_spent``, its share of the limit, for the record of a policy's training."""
        return {**self.spending.facts(), "budget_spent": self.spent_share}

    def metrics(self) -> dict[str, Any]:
        """Of the stage, at its end."""
        return {**self.spending.metrics(), "budget_spent": self.spent_share}

    @property
    def spent_share(self) -> float:
        """The spent share of the limit, earlier stages included."""
        return round(self.spent / self.limit.amount, 4)

    def progress(self) -> tuple[int, int]:
        """How much of what this stage may spend is spent, and what it may spend, in the limit's unit."""
        before = self.limit.of(self.spending.before)
        total = max(1, round(self.limit.amount - before))
        return min(total, int(self.spent - before)), total

    def __str__(self) -> str:
        spent, amount = self.spent, self.limit.amount
        earlier = self.limit.of(self.spending.before)
        text = f"spent {spent / amount:.0%} of the budget, {self.limit.number(spent)} of {self.limit.words(amount)}"
        return f"{text} ({self.limit.number(earlier)} in earlier stages)" if earlier else text
