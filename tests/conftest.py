"""Fixtures that tests share: the shipped model, a trained model where the real data is, trees of random tokens."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging

# Before torch looks for a GPU: the tests are of the paths on a CPU, but for those of the GPU (test_gpu.py).
if "DUEL_TEST_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

from toolkit.models.encoding import Tree
from toolkit.models.load import load_policy
from toolkit.models.resolve import ModelRef, resolve
from toolkit.models.tokenizer import load_tokenizer
from toolkit.recipe.training import ModelSection

pytest_plugins = ["support.ppo_fixtures", "support.finished_run", "support.finished_study", "support.browser"]

# The files that take longest, longest first: a worker that began one of them last would end alone with it.
LONG = (
    "runs/study/test_run_study.py",
    "test_docs.py",
    "runs/study/test_study_ray.py",
    "cli/test_main.py",
    "report/test_browser.py",
    "ppo/test_trainer.py",
    "runs/test_signals.py",
    "training/test_trajectories_trl.py",
    "runs/test_sweep_ray.py",
    "stages/test_budget.py",
    "measure/test_rewards.py",
    "ppo/test_processes.py",
    "faults/test_kill.py",
    "runs/test_pipeline.py",
    "training/test_accumulation.py",
    "ppo/test_bandit.py",
    "training/test_trainer.py",
    "report/test_study_browser.py",
    "ppo/test_loop.py",
    "stages/test_online_dpo.py",
    "runs/test_rounds.py",
    "report/test_watch_browser.py",
    "ppo/test_export.py",
    "cli/test_measure.py",
    "training/test_processes.py",
    "runs/test_push.py",
    "training/test_divergence.py",
    "stages/test_process.py",
)

# A shell's background jobs ignore Ctrl-C, and so would the commands that a test starts from one and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

FP32 = ModelSection(name="tiny", dtype="float32", lora=None)
# The shipped tokenizer's special ids; random trees hold none of them.
N_SPECIAL = 3

logging.set_verbosity_error()
logging.disable_progress_bar()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {Path(__file__).parent / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


def leave_imports_out() -> None:
    """The collector of garbage then passes over what was imported: half a million objects, which the stages of a run
    have it look through again and again, for half of the time of a small run."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    leave_imports_out()


@pytest.fixture(scope="module", autouse=True)
def _imports_left_out() -> None:
    """What the file before imported in its tests."""
    leave_imports_out()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # These models are so small that threads cost more than they give; on a busy machine ten times more.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_ref() -> ModelRef:
    return resolve("tiny")


@pytest.fixture(scope="session")
def tokenizer(tiny_ref: ModelRef) -> Any:
    return load_tokenizer(tiny_ref)


@pytest.fixture(scope="session")
def tiny(tiny_ref: ModelRef) -> Any:
    """The shipped model in fp32, for tests that leave its weights alone."""
    return load_policy(tiny_ref, FP32).requires_grad_(False)


@pytest.fixture
def new_tiny(tiny_ref: ModelRef) -> Callable[[], Any]:
    """Makes fresh copies of the shipped model, to change at will."""
    return lambda: load_policy(tiny_ref, FP32)


@pytest.fixture(scope="session")
def stories_folder() -> Path:
    """stories260K, a trained 260 k parameter Llama that lies beside the real data."""
    data = os.environ.get("DUEL_REAL_DATA")
    if not data:
        pytest.skip("DUEL_REAL_DATA is not set")
    folder = Path(data).parent / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"there is no {folder}")
    return folder


@pytest.fixture(scope="session")
def stories(stories_folder: Path) -> Any:
    section = FP32.model_copy(update={"name": str(stories_folder)})
    return load_policy(resolve(str(stories_folder)), section).requires_grad_(False)


@pytest.fixture(scope="session")
def make_trees() -> Callable[..., list[Tree]]:
    """``make_trees(n, vocabulary, seed=, k=, longest=)``: trees of random tokens whose responses end with id 2."""

    def make(
        n: int, vocabulary: int = 512, *, seed: int = 0, k: int = 3, shortest: int = 1, longest: int = 14
    ) -> list[Tree]:
        generator = torch.Generator().manual_seed(seed)

        def length() -> int:
            return int(torch.randint(shortest, longest, (1,), generator=generator))

        def ids() -> list[int]:
            return torch.randint(N_SPECIAL, vocabulary, (length(),), generator=generator).tolist()

        return [Tree(ids(), [[*ids(), 2] for _ in range(k)]) for _ in range(n)]

    return make
