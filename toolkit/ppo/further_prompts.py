"""Prompts without labels that PPO samples from, beside those of the training data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from toolkit.errors import DataError
from toolkit.models.encoding import TextEncoder
from toolkit.models.rendering import refusals_at
from toolkit.ppo.prompts import PromptIds
from toolkit.preferences.prompts import read_prompts
from toolkit.preferences.rows import PreferenceRow, prompt_id


def further_prompts(
    source: str,
    train: Sequence[PreferenceRow],
    held_out: Sequence[PreferenceRow],
    encoder: TextEncoder,
    max_prompt_tokens: int,
) -> tuple[list[PromptIds], str]:
    """The prompts of ``source`` (:func:`toolkit.preferences.prompts.read_prompts`) that training may use, and a line
    that counts those that it may not: held-out ones and their groups, those of the training data, and long ones.

    Raises DataError where none is left.
    """
    held_out_ids, training_ids = ({row.prompt_id for row in rows} for rows in (held_out, train))
    held_out_groups = {row.group for row in held_out if row.group}
    prompts, left_out = [], Counter[str]()
    for item in read_prompts(source, conversational=encoder.conversational):
        name = prompt_id(item.prompt)
        with refusals_at(item.where):
            ids = encoder.prompt(item.prompt)
        if name in held_out_ids or item.group in held_out_groups:
            left_out["held out"] += 1
        elif name in training_ids:
            left_out["in the training data"] += 1
        elif not 0 < len(ids) <= max_prompt_tokens:
            left_out[f"with more than {max_prompt_tokens} tokens"] += 1
        else:
            prompts.append(PromptIds(name, ids, item.prompt))
    counts = ", ".join(f"{n} {reason}" for reason, n in left_out.items()) or "none"
    if not prompts:
        raise DataError("no further prompt is left", where=f"ppo.prompts: {source}", fix=f"left out: {counts}")
    return prompts, f"{len(prompts)} further prompts of {source}; left out: {counts}"
