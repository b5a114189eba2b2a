"""Log-probabilities and scores of responses under a frozen model, kept on disk: nothing is computed twice.

Trees are taken in parts of ``PART`` prompts. A part's file is named by a hash over the model (its weights and adapter),
the precision, the code that computes, and the token ids themselves, which are what tokenizer, chat template and data
come to. So a result is found again by whoever scores the same prompts under the same model, whatever its beta, run or
arm, and never by anybody else. A file is written whole or not at all.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from toolkit.engine.distributed import wait, world
from toolkit.engine.engine import Engine
from toolkit.errors import ModelError, StoreError
from toolkit.files import code_fingerprint, fingerprint
from toolkit.models.encoding import Tree
from toolkit.models.resolve import ModelRef, cache_folder

# Prompts of a part: what an interrupted command computes again, at most.
PART = 128
Values = list[NDArray[np.float32]]  # of each response: its tokens' log-probabilities, or its one score


def reference_folder() -> Path:
    """Where reference log-probabilities are kept for every run on this machine."""
    return cache_folder() / "logps"


def identity(ref: ModelRef, *, dtype: str, attention: str, weights: str | None = None) -> str:
    """A hash over all that a response's log-probability under a model depends on, but for the response.

    ``dtype`` is the precision of the forward passes, ``weights`` that of the weights where it is another.
    """
    code = code_fingerprint("toolkit.engine.engine")
    versions = [importlib.metadata.version(name) for name in ("torch", "transformers", "peft")]
    return fingerprint([ref.fingerprint, dtype, weights or dtype, attention, code, versions])


def logps(
    trees: Sequence[Tree],
    folder: Path,
    key: str,
    load: Callable[[], Engine],
    *,
    advance: Callable[[int], None],
    skip: Callable[[int], None] = lambda n: None,
) -> Iterator[list[Values]]:
    """For each part, for each of its trees, for each response: [n_tokens] fp32 log-probabilities.

    ``load`` is called where a part is not in ``folder`` under ``key``, once; ``advance`` counts responses
    computed, ``skip`` those found. Raises ModelError for results that are not finite, StoreError for a damaged file.
    """
    sizes = [[len(ids) for ids in tree.response_ids] for tree in trees]

    def compute(engine: Engine, part: Sequence[Tree]) -> list[Values]:
        return [[t.numpy() for t in row] for row in engine.logps(part, advance=advance)]

    return _parts(trees, sizes, folder, f"{key}-logps", load, compute, skip)


def scores(
    trees: Sequence[Tree],
    folder: Path,
    key: str,
    load: Callable[[], Engine],
    *,
    advance: Callable[[int], None],
    skip: Callable[[int], None] = lambda n: None,
) -> Iterator[list[Values]]:
    """The same for the scalar rewards of a sequence classifier: [1] for each response."""
    sizes = [[1] * len(tree.response_ids) for tree in trees]

    def compute(engine: Engine, part: Sequence[Tree]) -> list[Values]:
        return [[np.array([value], np.float32) for value in row] for row in engine.scores(part, advance=advance)]

    return _parts(trees, sizes, folder, f"{key}-scores", load, compute, skip)


def _parts(
    trees: Sequence[Tree],
    sizes: Sequence[Sequence[int]],
    folder: Path,
    key: str,
    load: Callable[[], Engine],
    compute: Callable[[Engine, Sequence[Tree]], list[Values]],
    skip: Callable[[int], None],
) -> Iterator[list[Values]]:
    engine: Engine | None = None
    starts = range(0, len(trees), PART)
    paths = [
        folder / f"{fingerprint([key, [[t.prompt_ids, t.response_ids] for t in trees[s : s + PART]]])}.npy"
        for s in starts
    ]
    folder.mkdir(parents=True, exist_ok=True)

    def write(number: int) -> None:
        nonlocal engine
        engine = engine or load()
        start = starts[number]
        values = compute(engine, trees[start : start + PART])
        flat = np.concatenate([array for row in values for array in row]).astype(np.float32)
        if not np.isfinite(flat).all():
            raise ModelError(
                f"{int((~np.isfinite(flat)).sum())} results are not finite",
                where=f"prompts {start + 1} to {start + len(values)}",
                fix="check the model's weights, or score with --dtype float32",
            )
        partial = paths[number].with_name(f".{paths[number].name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as out:
                np.save(out, flat)
            os.replace(partial, paths[number])
        finally:
            partial.unlink(missing_ok=True)

    rank, size = world()
    if size > 1:
        for number in range(rank, len(paths), size):
            if not paths[number].is_file():
                write(number)
        wait()  # the others' parts are there now; on a disk that is not shared each computes what it lacks
    for number, start in enumerate(starts):
        of_part = sizes[start : start + PART]
        if paths[number].is_file():
            skip(sum(map(len, of_part)))
        else:
            write(number)
        yield _read(paths[number], of_part)


def _read(path: Path, sizes: Sequence[Sequence[int]]) -> list[Values]:
    try:
        flat = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise _damaged(path) from error
    if flat.dtype != np.float32 or flat.shape != (sum(map(sum, sizes)),):
        raise _damaged(path)
    arrays = iter(np.split(flat, np.cumsum([n for row in sizes for n in row])[:-1]))
    return [[next(arrays) for _ in row] for row in sizes]


def _damaged(path: Path) -> StoreError:
    return StoreError("this file of log-probabilities is damaged", where=str(path), fix="remove it and run again")
