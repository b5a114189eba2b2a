"""Log-probabilities and scores of responses under a frozen model, kept on disk: nothing is computed twice.

Trees are taken in blocks of ``BLOCK`` prompts. The file of a block is named by a hash over the model (its weights and
adapter), the precision, the code that computes, and the token ids themselves, which tokenizer, chat template and data
have led to. So whoever scores the same prompts under the same model finds the result, whatever their beta, run or arm,
and nobody else does. A file is written whole or not at all.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.engine.distributed import barrier, world
from toolkit.engine.engine import Engine
from toolkit.engine.reward_model import RewardModel
from toolkit.errors import ModelError, StoreError
from toolkit.files import code_fingerprint, fingerprint, write_bytes
from toolkit.models.encoding import Tree
from toolkit.models.resolve import ModelRef, cache_folder

# Prompts of a block: what an interrupted command computes again, at most.
BLOCK = 128
# Of the SHA-256 behind the numbers of a block's file.
SEAL_BYTES = 32
_log = logging.getLogger(__name__)
Values = list[NDArray[np.float32]]  # of each response: its tokens' log-probabilities, or its outputs
Count = Callable[[int], None]


def reference_folder() -> Path:
    """Where reference log-probabilities are kept for every run on this machine."""
    return cache_folder() / "logps"


def identity(ref: ModelRef, *, dtype: str, attention: str, weights: str | None = None) -> str:
    """A hash over all that a response's log-probability under a model depends on, except the response.

    ``dtype`` is the precision of the forward passes, ``weights`` that of the weights where it is another.
    """
    code = code_fingerprint("toolkit.engine.engine")
    versions = [importlib.metadata.version(name) for name in ("torch", "transformers", "peft")]
    return fingerprint([ref.fingerprint, dtype, weights or dtype, attention, code, versions])


@dataclass(frozen=True)
class ResponseCache:
    """Results of one model in ``folder``, under ``key`` (:func:`identity`).

    ``load`` makes the engine, or the reward model; it is called once, and only where a block is not there yet.
    """

    folder: Path
    key: str
    load: Callable[[], Any]

    def logps(self, trees: Sequence[Tree], *, advance: Count, skip: Count = lambda n: None) -> Iterator[list[Values]]:
        """For each block, for each of its trees, for each response: [n_tokens] fp32 log-probabilities.

        ``advance`` counts responses that are computed, ``skip`` those that were there. Raises ModelError for results
        that are not finite. A damaged file is named in the log and computed again.
        """
        sizes = [[len(ids) for ids in tree.response_ids] for tree in trees]

        def compute(engine: Engine, block: Sequence[Tree]) -> list[Values]:
            return [[logps.numpy() for logps in row] for row in engine.logps(block, advance=advance)]

        return self._blocks("logps", trees, sizes, compute, skip)

    def stored_logps(self, trees: Sequence[Tree]) -> Iterator[list[Values]]:
        """What :meth:`logps` has given before, read from the files, a block as it is asked for.

        Raises StoreError for a file that was damaged since.
        """
        for start in range(0, len(trees), BLOCK):
            block = trees[start : start + BLOCK]
            yield _read(self._path("logps", block), [[len(ids) for ids in tree.response_ids] for tree in block])

    def outputs(
        self, trees: Sequence[Tree], n_outputs: int, *, advance: Count, skip: Count = lambda n: None
    ) -> Iterator[list[Values]]:
        """:meth:`logps` for a reward model: its [n_outputs] outputs for each response, before centring."""
        sizes = [[n_outputs] * len(tree.response_ids) for tree in trees]

        def compute(model: RewardModel, block: Sequence[Tree]) -> list[Values]:
            return [list(of_tree.astype(np.float32)) for of_tree in model.outputs(block, advance=advance)]

        return self._blocks("outputs", trees, sizes, compute, skip)

    def _blocks(
        self,
        kind: str,
        trees: Sequence[Tree],
        sizes_of_all: Sequence[Sequence[int]],
        compute: Callable[[Any, Sequence[Tree]], list[Values]],
        skip: Count,
    ) -> Iterator[list[Values]]:
        """Read each block, and compute it first where its file is missing. ``sizes_of_all``: of the results."""
        engine: Any = None
        starts = range(0, len(trees), BLOCK)
        paths = [self._path(kind, trees[start : start + BLOCK]) for start in starts]

        def write(number: int) -> None:
            nonlocal engine
            engine = engine or self.load()
            start = starts[number]
            _write(paths[number], compute(engine, trees[start : start + BLOCK]), start)

        rank, size = world()
        if size > 1:
            for number in range(rank, len(paths), size):
                start = starts[number]
                if _stored(paths[number], sizes_of_all[start : start + BLOCK]) is None:
                    write(number)
            barrier()  # the others' blocks are there now; on a disk that is not shared each computes what it lacks
        for number, start in enumerate(starts):
            sizes_of_block = sizes_of_all[start : start + BLOCK]
            values = _stored(paths[number], sizes_of_block)
            if values is not None:
                skip(sum(map(len, sizes_of_block)))
            else:
                write(number)
                values = _read(paths[number], sizes_of_block)
            yield values

    def _path(self, kind: str, block: Sequence[Tree]) -> Path:
        ids = [[tree.prompt_ids, tree.response_ids] for tree in block]
        return self.folder / f"{fingerprint([f'{self.key}-{kind}', ids])}.npy"


def _write(path: Path, values: Sequence[Values], first_prompt: int) -> None:
    flat = np.concatenate([array for row in values for array in row]).astype(np.float32)
    if not np.isfinite(flat).all():
        raise ModelError(
            f"{int((~np.isfinite(flat)).sum())} results are not finite",
            where=f"prompts {first_prompt + 1} to {first_prompt + len(values)}",
            fix="check the model's weights, or score with --dtype float32",
        )
    content = io.BytesIO()
    np.save(content, flat)
    write_bytes(path, content.getvalue() + hashlib.sha256(content.getvalue()).digest())


def _stored(path: Path, sizes: Sequence[Sequence[int]]) -> list[Values] | None:
    """The results of a file; None where there is none, or a damaged one, which is removed."""
    try:
        return _read(path, sizes) if path.is_file() else None
    except StoreError as error:
        _log.warning("%s, and computed again: %s", error.what, path)
        path.unlink(missing_ok=True)
        return None


def _read(path: Path, sizes: Sequence[Sequence[int]]) -> list[Values]:
    content, seal = (raw := path.read_bytes())[:-SEAL_BYTES], raw[-SEAL_BYTES:]
    if hashlib.sha256(content).digest() != seal:
        raise _damaged(path)
    try:
        flat = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise _damaged(path) from error
    if flat.dtype != np.float32 or flat.shape != (sum(map(sum, sizes)),):
        raise _damaged(path)
    arrays = iter(np.split(flat, np.cumsum([n for row in sizes for n in row])[:-1]))
    return [[next(arrays) for _ in row] for row in sizes]


def _damaged(path: Path) -> StoreError:
    return StoreError("this file of log-probabilities is damaged", where=str(path), fix="remove it and run again")
