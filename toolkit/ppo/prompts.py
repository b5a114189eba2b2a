"""Prompts to sample from, as token ids."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from toolkit.preferences.rows import Prompt


@dataclass(frozen=True)
class PromptIds:
    """A prompt to sample from. ``prompt_id`` seeds its samples; ``columns`` are the data set's other columns."""

    prompt_id: str
    ids: list[int]
    prompt: Prompt = ""
    columns: dict[str, Any] = field(default_factory=dict)
