"""Options that the measuring commands share, in groups that belong together."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

from toolkit.recipe.training import ModelSection

T = TypeVar("T")


@dataclass(frozen=True)
class PromptSelection:
    """Which prompts of which data. ``seed`` fixes the subset that ``limit`` leaves, and everything drawn after it."""

    data: str
    split: str = "train"  # of a data set on the hub
    limit: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class ScoringOptions:
    """Precision of the forward passes, and tokens at once (None: the device's default)."""

    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    batch_tokens: int | None = None

    @property
    def model(self) -> ModelSection:
        return ModelSection(dtype=self.dtype)


def take(kind: type[T], options: dict[str, Any]) -> T:
    """A ``kind`` (a dataclass) from those options that its fields name; they leave ``options``.

    >>> options = {"limit": 3, "data": "reviews", "judge": "gold"}
    >>> take(PromptSelection, options), options
    (PromptSelection(data='reviews', split='train', limit=3, seed=0), {'judge': 'gold'})
    """
    names = [field.name for field in fields(kind) if field.name in options]  # type: ignore[arg-type]
    return kind(**{name: options.pop(name) for name in names})
