"""An explicit reward model in memory, of any kind: the outputs of its heads or members, and the score they make."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from toolkit.engine.engine import Engine
from toolkit.engine.process import StepEnds, StepProbabilities, scores_by_token
from toolkit.engine.tree import TreeBatch
from toolkit.evals.process import solution_score
from toolkit.models.encoding import TextEncoder, Tree
from toolkit.models.inspect import best_device, torch_dtype
from toolkit.models.load import load_reward_model, load_shared_members
from toolkit.models.resolve import ModelRef, resolve
from toolkit.models.reward_head import RewardHead, reward_head
from toolkit.models.tokenizer import check_vocabulary
from toolkit.preferences.rows import Prompt
from toolkit.recipe.training import ModelSection

Outputs = list[NDArray[np.float64]]  # for each tree: [K, M], of each response the outputs as the model gives them


@dataclass(frozen=True)
class RewardModel:
    """One model, one with several heads, or an ensemble, with the ``head`` that makes one score of the outputs.

    ``engines`` has one engine for each model. ``adapters`` are the members that share one base, in the single engine
    of this base: each batch is packed once and computed with every adapter. ``step_ends`` finds the steps of a process
    reward model's responses, and is None for other kinds.
    """

    engines: Sequence[Engine]
    head: RewardHead
    adapters: Sequence[str] = ()
    step_ends: StepEnds | None = None

    @property
    def positions(self) -> int | None:
        """Tokens of a prompt and its response that every model can read; None where positions are computed."""
        return min((engine.positions for engine in self.engines if engine.positions is not None), default=None)

    @property
    def reads_pairs(self) -> bool:
        """Whether it is an encoder, which reads prompt and response as a pair of texts."""
        return all(engine.reads_pairs for engine in self.engines)

    def read(self, encoder: TextEncoder, prompt: Prompt, responses: Sequence[str], truncated: Sequence[bool]) -> Tree:
        """A prompt and what another model sampled for it, in this model's tokens. ``encoder`` is its tokenizer's.

        Responses are cut where its positions end, as encoders have few.
        """
        tree = encoder.encode_samples(prompt, responses, truncated)
        if self.positions is None or tree.depth <= self.positions:
            return tree
        room = max(1, self.positions - len(tree.prompt_ids))
        return Tree(tree.prompt_ids, [ids[:room] for ids in tree.response_ids])

    def outputs(self, trees: Sequence[Tree], *, advance: Callable[[int], None] | None = None) -> Outputs:
        """For each tree [K, M] outputs of its responses, before centring."""
        if self.head.process is not None:
            rule = self.head.process.solution_score
            return [
                np.array([[solution_score([p for _, p in steps], rule)] for steps in of_tree])
                for of_tree in self.step_probabilities(trees, advance=advance)
            ]
        if self.adapters:
            [engine] = self.engines
            parts = [engine.map_responses(trees, self._of_adapters, advance)]
        else:
            # Progress counts each response once, with the last model.
            last = len(self.engines) - 1
            parts = [
                engine.outputs(trees, advance=advance if number == last else None)
                for number, engine in enumerate(self.engines)
            ]
        return [
            np.concatenate([np.array(part, dtype=np.float64).reshape(len(part), -1) for part in of_tree], axis=-1)
            for of_tree in zip(*parts, strict=True)
        ]

    def step_probabilities(
        self, trees: Sequence[Tree], *, advance: Callable[[int], None] | None = None
    ) -> list[list[StepProbabilities]]:
        """For each tree, of each response, a process reward model's probabilities that its steps are right."""
        assert self.step_ends is not None
        [engine] = self.engines
        return [
            [self.step_ends.probabilities(ids, scores) for ids, scores in zip(tree.response_ids, of_tree, strict=True)]
            for tree, of_tree in zip(trees, scores_by_token(engine, trees, advance), strict=True)
        ]

    def scores(self, trees: Sequence[Tree], *, advance: Callable[[int], None] | None = None) -> list[list[float]]:
        """For each tree, the score of each response: its outputs combined, and centred."""
        return [self.head.scores(outputs).tolist() for outputs in self.outputs(trees, advance=advance)]

    def _of_adapters(self, batch: TreeBatch) -> list[list[float]]:
        [engine] = self.engines
        columns = []
        for adapter in self.adapters:
            with _active(engine.model, adapter):
                columns.append(engine.branch_scores(batch).reshape(batch.n_responses, -1))
        outputs: list[list[float]] = torch.cat(columns, dim=1).tolist()
        return outputs


@contextmanager
def _active(model: Any, adapter: str) -> Iterator[None]:
    """Inside it the model computes with this adapter and its head; nothing of it trains."""
    model.set_adapter(adapter, inference_mode=True)
    yield


def load_scorer(
    ref: ModelRef,
    section: ModelSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    token_budget: int | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> RewardModel:
    """Load a reward model of any kind with the head that its folder has. ``tokenizer`` is its own.

    Raises ModelError where it cannot be read or is no reward model.
    """
    head = reward_head(ref.path)
    adapters: Sequence[str] = ()
    if head.members:
        members = [resolve(str(Path(ref.path) / name)) for name in head.members]
        shared = load_shared_members(members, section, dtype=dtype)
        if shared is not None:
            models, adapters = [shared], head.members
        else:
            models = [load_reward_model(member, section, dtype=dtype) for member in members]
    else:
        models = [load_reward_model(ref, section, dtype=dtype)]
    pad_id, products = int(tokenizer.pad_token_id), torch_dtype(section.dtype)
    engines = []
    for model in models:
        check_vocabulary(model.get_input_embeddings().weight.shape[0], tokenizer, ref.spec)
        engines.append(Engine(model.to(device or best_device()), pad_id, dtype=products, token_budget=token_budget))
    return RewardModel(engines, head, adapters, step_ends_of(head, tokenizer))


def step_ends_of(head: RewardHead, tokenizer: PreTrainedTokenizerBase) -> StepEnds | None:
    """What finds the steps of a process reward model's responses; None for other kinds."""
    return None if head.process is None else StepEnds(TextEncoder(tokenizer, False), head.process.separator)
