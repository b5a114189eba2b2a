"""A model's forward passes over all responses, stored on disk in blocks: nothing is computed twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.engine import cache
from toolkit.engine.engine import Engine
from toolkit.engine.reward_model import RewardModel, load_scorer
from toolkit.measure.options import ScoringOptions
from toolkit.models.encoding import Tree
from toolkit.models.inspect import best_device, torch_dtype
from toolkit.models.load import attention, load_policy
from toolkit.models.resolve import ModelRef
from toolkit.models.reward_head import reward_head
from toolkit.models.tokenizer import check_vocabulary
from toolkit.progress import Reporter


@dataclass
class StoredPass:
    """One model over ``trees``, its results in ``folder``. ``n_computed`` counts the responses that were not there.

    The model is loaded where a block is missing, and not before. ``label`` names the pass on its progress bar.
    """

    ref: ModelRef
    label: str
    trees: Sequence[Tree]
    tokenizer: Any
    folder: Path
    options: ScoringOptions
    n_computed: int = 0

    def logps(self, reporter: Reporter) -> Iterator[list[cache.Values]]:
        """For each block, for each of its trees, for each response: [n_tokens] fp32 log-probabilities."""
        return self._blocks(self._engine, cache.ResponseCache.logps, reporter)

    def stored_logps(self, reporter: Reporter) -> Iterator[list[cache.Values]]:
        """:meth:`logps`, of which all are computed now, and each block is read when it is asked for."""
        for _ in self.logps(reporter):
            pass
        return self._cache(self._engine).stored_logps(self.trees)

    def scores(self, reporter: Reporter) -> Iterator[list[NDArray[np.float64]]]:
        """For each block, for each of its trees: [K] centred scores of a reward model."""
        head = reward_head(self.ref.path)
        compute = partial(cache.ResponseCache.outputs, n_outputs=head.n_outputs)
        for block in self._blocks(self._reward_model, compute, reporter):
            yield [head.scores(np.stack(of_tree).astype(np.float64)) for of_tree in block]

    def _engine(self) -> Engine:
        section = self.options.model
        model = load_policy(self.ref, section)
        check_vocabulary(model.get_input_embeddings().weight.shape[0], self.tokenizer, self.ref.spec)
        pad_id, dtype = int(self.tokenizer.pad_token_id), torch_dtype(section.dtype)
        return Engine(model.to(best_device()), pad_id, dtype=dtype, token_budget=self.options.batch_tokens)

    def _reward_model(self) -> RewardModel:
        return load_scorer(self.ref, self.options.model, self.tokenizer, token_budget=self.options.batch_tokens)

    def _cache(self, load: Callable[[], Any]) -> cache.ResponseCache:
        section = self.options.model
        key = cache.identity(self.ref, dtype=section.dtype, attention=attention(section))
        return cache.ResponseCache(self.folder, key, load)

    def _blocks(
        self, load: Callable[[], Any], compute: Callable[..., Iterator[list[cache.Values]]], reporter: Reporter
    ) -> Iterator[list[cache.Values]]:
        results = self._cache(load)
        with reporter.task(self.label, sum(len(tree.response_ids) for tree in self.trees)) as task:

            def advance(n: int) -> None:
                self.n_computed += n
                task.advance(n)

            def skip(n: int) -> None:
                task.resume_at(task.done + n)

            yield from compute(results, self.trees, advance=advance, skip=skip)
