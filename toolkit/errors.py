"""The errors a user can cause. Each says what is wrong, where, and the likely fix.

The command line prints them as one message and exits with code 2; anything that is not a
:class:`DuelError` is a defect of ours and exits with code 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Names the file that a launched process writes its exit code to: its launcher's own is 1 for every error.
EXIT_CODE_FILE = "DUEL_EXIT_CODE_FILE"


class DuelError(Exception):
    """Base of every error that is the input's fault and not ours."""

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(self.render())

    def render(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(lines)


class RecipeError(DuelError):
    """A recipe, or a ``--set``, that cannot be run."""


class DataError(DuelError):
    """Preference data that cannot be read as prompts with K >= 2 responses."""


class ModelError(DuelError):
    """A model, adapter or tokenizer that is missing or does not fit its use."""


class StoreError(DuelError):
    """A run folder that cannot be written, read or continued."""


def nearest(word: str, known: Iterable[str]) -> str:
    """``"did you mean 'x'?"`` for the nearest of ``known``, or the list of them, or ``""``."""
    known = sorted(set(known))
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known: " + ", ".join(known[:20]) if known else ""


def first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
