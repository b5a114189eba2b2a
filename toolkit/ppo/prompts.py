"""What PPO reads from data sets, as token ids: prompts to sample from, and text whose likelihood is mixed in."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from toolkit.errors import DataError
from toolkit.models.encoding import Tree, text_encoder
from toolkit.models.rendering import refusals_at
from toolkit.preferences.rows import Prompt

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptIds:
    """A prompt to sample from. ``prompt_id`` seeds its samples; ``columns`` are the data set's other columns."""

    prompt_id: str
    ids: list[int]
    prompt: Prompt = ""
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingData:
    """``ptx``: prompts with one completion each, whose likelihood ``ptx_coef`` weighs."""

    prompts: Sequence[PromptIds]
    eval_prompts: Sequence[PromptIds] = ()
    ptx: Sequence[Tree] = ()


def encode_prompts(
    dataset: Any, tokenizer: PreTrainedTokenizerBase, max_prompt_length: int | None, where: str
) -> list[PromptIds]:
    """The prompts of a data set as token ids; those over ``max_prompt_length`` are left out with a warning.

    Raises DataError for a missing column or a data set without prompts, and ModelError for messages that the tokenizer
    has no template for. ``where`` is what an error calls the data set.
    """
    rows = list(dataset)
    if rows and "prompt" not in rows[0]:
        raise DataError(
            "there is no column prompt", where=f"{where}, with the columns {sorted(rows[0])}", fix="rename one of them"
        )
    encoded, n_too_long = [], 0
    column_names = dict.fromkeys(name for row in rows for name in row if name != "prompt")
    for index, row in enumerate(rows):
        with refusals_at(f"{where}, row {index}"):
            ids = text_encoder(tokenizer, row["prompt"]).prompt(row["prompt"])
        if not ids:
            raise DataError("a prompt is empty", where=f"{where}, row {index}", fix="leave the row out")
        if max_prompt_length is not None and len(ids) > max_prompt_length:
            n_too_long += 1
            continue
        columns = {name: row.get(name) for name in column_names}
        encoded.append(PromptIds(str(row.get("prompt_id", index)), ids, row["prompt"], columns))
    if not encoded:
        raise DataError(
            "no prompt is left" if rows else "there is no prompt", where=where, fix="raise max_prompt_length"
        )
    if n_too_long:
        _log.warning("%s: %d of %d prompts have more than %d tokens", where, n_too_long, len(rows), max_prompt_length)
    return encoded


def encode_ptx(dataset: Any, tokenizer: PreTrainedTokenizerBase, max_response_tokens: int) -> list[Tree]:
    """Prompts with their one completion, cut at ``max_response_tokens``. Raises DataError for a missing column."""
    trees = []
    for row in dataset:
        if "prompt" not in row or "completion" not in row:
            raise DataError("a row needs prompt and completion", where="ptx_dataset", fix=f"it has {sorted(row)}")
        completion = row["completion"]
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        trees.append(text_encoder(tokenizer, row["prompt"]).encode(row["prompt"], [text], max_response_tokens).tree)
    return trees
