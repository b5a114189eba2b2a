"""Prompts from any data, and samples of any policy for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from toolkit.engine.sampling import SamplingParams, sample_responses
from toolkit.errors import DataError
from toolkit.measure.options import PromptSelection
from toolkit.models.encoding import text_encoder
from toolkit.models.inspect import DTYPES, best_device
from toolkit.models.load import load_policy
from toolkit.models.resolve import ModelRef, resolve
from toolkit.models.tokenizer import check_vocabulary, load_tokenizer
from toolkit.preferences import splits
from toolkit.preferences.reading import read_preferences
from toolkit.preferences.rows import Prompt, prompt_id
from toolkit.preferences.samples import Sample
from toolkit.progress import Reporter
from toolkit.recipe.schema import ModelSection

PROMPT_COLUMNS = ("prompt", "instruction", "question", "messages")
# What :func:`sample` knows of a response.
SAMPLE_COLUMNS = ("prompt_id", "policy", "sample_index", "response", "response_ids", "n_tokens", "truncated")


def read_prompts(selection: PromptSelection) -> list[tuple[str, Prompt]]:
    """(prompt id, prompt) of preference data, of a ``.jsonl`` with a prompt column, or of a ``.txt`` with one a line.

    Raises DataError where there is no prompt.
    """
    path = Path(selection.data).expanduser()
    if path.suffix == ".txt" and path.is_file():
        prompts: list[Prompt] = [line for line in _lines(path) if line.strip()]
    elif path.suffix == ".jsonl" and path.is_file() and (column := _prompt_column(path)):
        prompts = [json.loads(line)[column] for line in _lines(path) if line.strip()]
    else:
        data = read_preferences(selection.data, split=selection.split)
        return [(row.prompt_id, row.prompt) for row in splits.limit(data.rows, selection.limit, selection.seed)]
    distinct = {prompt_id(prompt): prompt for prompt in prompts}
    if not distinct:
        raise DataError("there is no prompt", where=selection.data, fix="put one prompt on each line")
    return list(distinct.items())[: selection.limit]


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _prompt_column(path: Path) -> str | None:
    """The prompt column of a file that holds prompts alone; None for preference data, which has its own reader."""
    with path.open(encoding="utf-8") as lines:
        try:
            first = json.loads(next(lines, ""))
        except json.JSONDecodeError as error:
            raise DataError(f"not valid JSON: {error.msg}", where=f"{path}, line 1") from error
    if not isinstance(first, dict) or {"chosen", "responses", "response_a", "output_1"} & first.keys():
        return None
    return next((name for name in PROMPT_COLUMNS if name in first and len(first.keys() - {name, "id"}) == 0), None)


@dataclass(frozen=True)
class PolicySampler:
    """A policy by its name, with the settings of its model and of its sampling."""

    policy: str
    model: ModelSection
    params: SamplingParams

    @cached_property
    def ref(self) -> ModelRef:
        """Raises ModelError where there is no such policy."""
        return resolve(self.policy)


def sample(
    sampler: PolicySampler, prompts: Sequence[tuple[str, Prompt]], *, seed: int, purpose: str, reporter: Reporter
) -> list[list[Sample]]:
    """The policy's responses to each prompt, with ``SAMPLE_COLUMNS``.

    A response is a function of seed, purpose, prompt and its number.
    """
    ref = sampler.ref
    tokenizer = load_tokenizer(ref)
    encoder = text_encoder(tokenizer, prompts[0][1], ref.spec)
    model: Any = load_policy(ref, sampler.model)
    model.to(best_device())
    check_vocabulary(model.get_input_embeddings().weight.shape[0], tokenizer, ref.spec)
    encoded = [encoder.prompt(prompt) for _, prompt in prompts]
    with reporter.task(f"sample {ref.spec}", len(prompts) * sampler.params.n) as task:
        responses = sample_responses(
            model,
            tokenizer,
            encoded,
            lambda i, k: (seed, purpose, prompts[i][0], k),
            sampler.params,
            dtype=DTYPES[sampler.model.dtype],
            advance=task.advance,
        )
    return [
        [
            Sample(
                prompt_id=key,
                policy=sampler.policy,
                sample_index=k,
                response=encoder.decode(response.ids),
                response_ids=response.ids,
                n_tokens=len(response.ids),
                truncated=response.truncated,
            )
            for k, response in enumerate(of_prompt)
        ]
        for (key, _), of_prompt in zip(prompts, responses, strict=True)
    ]
