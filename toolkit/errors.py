"""The errors a user can cause. Each says what is wrong, where, and the likely fix.

The command line prints them as one message and exits with code 2. An error that is no :class:`DuelError` is a defect
of ours, with exit code 1.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

# Environment variable with the file to which a launched process writes its exit code. The launcher's is always 1.
EXIT_CODE_FILE = "DUEL_EXIT_CODE_FILE"
# Environment variable with a file that the launcher of several processes holds locked for as long as it lives.
LAUNCHER_FILE = "DUEL_LAUNCHER_FILE"


# A terminal obeys control characters, and some characters turn the direction of the text around them. Data has both.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_USERINFO = re.compile(r"(?<=://)[^\s/@]*@")
_QUERY = re.compile(r"(://[^\s?#\"']*)[?#][^\s\"'\]]+")


def shown(text: str) -> str:
    """Text as a terminal may get it: control characters are written out, and addresses have no password and no query.

    >>> shown("\\x1b[31mred\\x07 http://user:pw@host/?key=x two\\nlines")
    '\\\\x1b[31mred\\\\x07 http://...@host/?... two\\nlines'
    """
    harmless = _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
    without_secrets = _QUERY.sub(r"\1?...", _USERINFO.sub("...@", harmless))
    return without_secrets.encode("utf-8", "backslashreplace").decode("utf-8")


class Terminated(KeyboardInterrupt):
    """SIGTERM asks a command to end. It ends as with Ctrl-C, with another exit code."""


class DuelError(Exception):
    """Base of every error that is the input's fault and not ours."""

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(self.render())

    def rename(self, names: Mapping[str, str]) -> None:
        """Call what the message names by other names.

        >>> error = DuelError("no column", where="/tmp/x.jsonl, line 3")
        >>> error.rename({"/tmp/x.jsonl": "records"})
        >>> error.where
        'records, line 3'
        """
        for name, other in names.items():
            self.what, self.where, self.fix = (text.replace(name, other) for text in (self.what, self.where, self.fix))
        self.args = (self.render(),)

    def render(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return shown("\n".join(lines))

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in a notebook in place of a traceback, which would be of this package's own lines.

        >>> print(*DuelError("no column", where="records", fix="name one")._render_traceback_())
        DuelError: no column
          where: records
          fix:   name one
        """
        return [f"{type(self).__name__}: {self.render()}"]


class RecipeError(DuelError):
    """A recipe, or a ``--set``, that cannot be run."""


class DataError(DuelError):
    """Preference data that cannot be read as prompts with K >= 2 responses."""


class ModelError(DuelError):
    """A model, adapter or tokenizer that is missing or does not fit its use."""


class DivergedError(ModelError):
    """A training whose loss says that the policy knows less than nothing."""


class NotFiniteError(DivergedError):
    """A training that diverged: its loss, gradients, weights or rewards are NaN or infinite."""


class StoreError(DuelError):
    """A run folder that cannot be written, read or continued."""


class BusyError(StoreError):
    """A run folder that another process holds."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The nearest known word, or the list of them.

    >>> nearest("smok", ["smoke", "quickstart"]), nearest("x", ["smoke", "quickstart"]), nearest("x", [])
    ("did you mean 'smoke'?", 'known: quickstart, smoke', '')
    """
    known = sorted(set(known))
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known: " + ", ".join(known[:20]) if known else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
