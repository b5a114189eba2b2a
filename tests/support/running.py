"""The command line in a process of its own, and the smallest settings of a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Every stage in its smallest useful size; what is checked is behaviour, not quality.
SMALL = [
    "--set=data.train_prompts=24",
    "--set=data.eval_prompts=12",
    "--set=data.max_responses=3",
    "--set=data.max_response_tokens=12",
    "--set=reward_model.num_train_epochs=1",
    "--set=ppo.total_episodes=32",
    "--set=ppo.per_device_train_batch_size=16",
    "--set=dpo.num_train_epochs=1",
    "--set=evaluate.best_of_n=2",
    "--set=evaluate.bootstrap=200",
]


def duel(*args: str, cwd: Path = ROOT, check: int | None = 0, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "toolkit.cli", *args]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, **more.pop("env", {})}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, check=False, **more)
    if check is not None:
        assert done.returncode == check, done.stderr[-3000:]
    return done
