"""The command line, in this process or in one of its own, and the smallest settings of a run."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from toolkit.cli.main import main

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
Done = subprocess.CompletedProcess[str]


def duel(*args: str, cwd: Path = ROOT, check: int | None = 0, env: Mapping[str, str] | None = None) -> Done:
    """The command line in this process, which has its imports already: exit code, stdout and stderr of ``main``.

    What is read while modules are imported (HF_ENDPOINT, PYTHONPATH) and what other processes print is not seen here:
    :func:`duel_process` is for that.
    """
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        mock.patch.dict(os.environ, env or {}),
        warnings.catch_warnings(),
        redirect_stdout(stdout),
        redirect_stderr(stderr),
        pytest.raises(SystemExit) as stopped,
    ):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["duel", *args])
        for logger in ("toolkit", "py.warnings"):
            patch.setattr(logging.getLogger(logger), "handlers", [])
        try:
            main()
        finally:
            logging.captureWarnings(False)
    code = stopped.value.code
    assert isinstance(code, int)
    return checked(Done(["duel", *args], code, stdout.getvalue(), stderr.getvalue()), check)


def command(*args: str) -> list[str]:
    """The words that start the command line in a process of its own."""
    return [sys.executable, "-m", "toolkit.cli", *args]


def environment(**more: str) -> dict[str, str]:
    """Of a process that computes what this one does: one thread, and the packages of this folder."""
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def duel_process(
    *args: str, cwd: Path = ROOT, check: int | None = 0, env: Mapping[str, str] | None = None, **more: Any
) -> Done:
    """The command line in a process of its own, as a user starts it."""
    done = subprocess.run(
        command(*args), cwd=cwd, capture_output=True, text=True, env=environment(**(env or {})), check=False, **more
    )
    return checked(done, check)


def checked(done: Done, code: int | None) -> Done:
    if code is not None:
        assert done.returncode == code, done.stderr[-3000:]
    return done


def python(*arguments: str, check: int = 0) -> None:
    """Run Python in a process of its own."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment(), check=False, timeout=500
    )
    checked(done, check)


def in_two_processes(module: str, *arguments: str) -> None:
    """Run a module under `accelerate launch`.

    Without --multi_gpu it starts a single process where there is no GPU; the processes then take gloo.
    """
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    python(*launch, "-m", module, *arguments)
