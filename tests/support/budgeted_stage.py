"""A run's stage under a budget: ``python -m support.budgeted_stage STAGE RUN OUT KILL_AT SET...``."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from support.running import SMALL
from toolkit.progress import Reporter
from toolkit.recipe.files import load_recipe
from toolkit.stages import dpo, ppo
from toolkit.stages.contexts import context_of


class KillsAt(Reporter):
    """Ends the process as SIGKILL does, at the first entry of the log from this step on. Collects the lines."""

    def __init__(self, step: int | None) -> None:
        super().__init__(quiet=True)
        self.step = step
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def log(self, stage: str, values: Mapping[str, Any]) -> None:
        if self.step is not None and values["step"] >= self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(stage: str, run: Path, out: Path, sets: list[str], kill_at: int | None = None) -> tuple[Any, list[str]]:
    """The stage's metrics, and the lines that it reported."""
    small = [setting.removeprefix("--set=") for setting in SMALL]
    context: Any = context_of(stage, load_recipe("smoke", [*small, *sets]).recipe)
    inputs = {name: run / name for name in ("data", "sft", "reward_model")}
    out.mkdir(parents=True, exist_ok=True)
    reporter = KillsAt(kill_at)
    metrics = {"ppo": ppo, "dpo": dpo}[stage].run(context, inputs, out, reporter)
    return json.loads(json.dumps(metrics)), reporter.lines


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[5:], int(sys.argv[4]))
