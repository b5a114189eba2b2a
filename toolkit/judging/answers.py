"""Questions to judges and their answers, in SQLite: no question is asked twice, no answer is lost."""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, KeysView
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

from toolkit.errors import StoreError
from toolkit.files import fingerprint
from toolkit.preferences.rows import Prompt, prompt_id
from toolkit.storage.lazy import LazySequence
from toolkit.storage.spilled import Spill

WAIT_S = 60.0  # for another process that writes
_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, judge TEXT, template TEXT, prompt_id TEXT, first TEXT, second TEXT,
    value REAL, raw TEXT, error TEXT, prompt_tokens INTEGER, completion_tokens INTEGER,
    answered_at TEXT DEFAULT CURRENT_TIMESTAMP, seal TEXT
)
"""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """Two responses in the order in which they are shown; ``second`` is "" where one is scored alone."""

    judge: str
    template: str  # its fingerprint
    prompt: Prompt
    first: str
    second: str = ""
    principle: str = ""  # what the judge shall go by, where its template shows a principle
    model: str = ""  # what computes the answers, where the judge's model lies on this machine

    @property
    def key(self) -> str:
        parts: list[object] = [self.judge, self.template, self.prompt, self.first, self.second]
        if self.model:
            parts.append({"model": self.model})
        return fingerprint([*parts, self.principle] if self.principle else parts)


class Questions(LazySequence[Question]):
    """Distinct questions, in the order in which they were first added. They wait on disk; memory has their keys."""

    def __init__(self, questions: Iterable[Question] = ()) -> None:
        self._stored = Spill()
        self._places: dict[str, int] = {}
        for question in questions:
            self.add(question)

    def add(self, question: Question) -> str:
        """Add a question, unless it is there. Returns its key."""
        key = question.key
        if key not in self._places:
            self._places[key] = self._stored.append([getattr(question, field.name) for field in fields(question)])
        return key

    @property
    def keys(self) -> KeysView[str]:
        """The keys of the questions, in their order."""
        return self._places.keys()

    def __len__(self) -> int:
        return len(self._stored)

    def item(self, at: int) -> Question:
        return Question(*self._stored[at])


@dataclass(frozen=True)
class Answer:
    """``value``: the preference for the first response, or the score of the only one; None with an ``error``.

    ``raw`` is the reply as it came. Tokens are those that the endpoint counted, 0 where it did not.
    """

    value: float | None
    raw: str = ""
    error: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


Keep = Callable[[Question, Answer], None]
"""Takes the answer to a question as it arrives."""


class Memory:
    """Answers by question. A failure is stored for people to see, and does not count as an answer."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection

    def answers(self, questions: Iterable[Question]) -> dict[str, Answer]:
        """The stored answers to these questions, by key; failures are not among them."""
        return dict(self.each_answer(questions))

    def each_answer(self, questions: Iterable[Question]) -> Iterator[tuple[str, Answer]]:
        """:meth:`answers`, one after the other."""
        damaged = 0
        for question in questions:
            row = self.connection.execute(
                "SELECT value, raw, error, prompt_tokens, completion_tokens, seal FROM answers "
                "WHERE key = ? AND value IS NOT NULL",
                (question.key,),
            ).fetchone()
            if row is None:
                continue
            answer, seal = Answer(*row[:-1]), row[-1]
            # An earlier version wrote no seal.
            if _has_types(answer) and (seal is None or seal == _seal(question, answer)):
                yield question.key, answer
            else:
                damaged += 1
                self.connection.execute("DELETE FROM answers WHERE key = ?", (question.key,))
        if damaged:
            self.connection.commit()
            _log.warning("%d stored answers are damaged and are asked for again", damaged)

    def tokens(self, questions: Iterable[Question]) -> tuple[int, int]:
        """Prompt and completion tokens behind the answers to these questions, failed attempts included."""
        prompt = completion = 0
        for question in questions:
            row = self.connection.execute(
                "SELECT prompt_tokens, completion_tokens FROM answers WHERE key = ?", (question.key,)
            ).fetchone()
            if row is not None and all(isinstance(n, int) for n in row):
                prompt, completion = prompt + row[0], completion + row[1]
        return prompt, completion

    def n_answers(self) -> int:
        """How many answers are stored, failures not counted."""
        [(n,)] = self.connection.execute("SELECT COUNT(*) FROM answers WHERE value IS NOT NULL").fetchall()
        return int(n)

    def judges(self) -> list[str]:
        """All judges with an answer or a failure."""
        return [name for (name,) in self.connection.execute("SELECT DISTINCT judge FROM answers ORDER BY judge")]

    def keep(self, question: Question, answer: Answer) -> None:
        """Store an answer at once. A failure never replaces an answer; the tokens of all attempts add up."""
        self.connection.execute(
            "INSERT INTO answers (key, judge, template, prompt_id, first, second, value, raw, error, prompt_tokens, "
            "completion_tokens, seal) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (key) DO UPDATE SET value = excluded.value, raw = excluded.raw, error = excluded.error, "
            "seal = excluded.seal, "
            "prompt_tokens = answers.prompt_tokens + excluded.prompt_tokens, "
            "completion_tokens = answers.completion_tokens + excluded.completion_tokens, "
            "answered_at = CURRENT_TIMESTAMP WHERE answers.value IS NULL",
            (
                question.key,
                question.judge,
                question.template,
                prompt_id(question.prompt),
                _storable(question.first),
                _storable(question.second),
                answer.value,
                _storable(answer.raw),
                _storable(answer.error),
                answer.prompt_tokens,
                answer.completion_tokens,
                _seal(question, answer),
            ),
        )
        self.connection.commit()


def _has_types(answer: Answer) -> bool:
    """Whether a row has values of the types that were stored: in a damaged file any value has any type."""
    texts, counts = (answer.raw, answer.error), (answer.prompt_tokens, answer.completion_tokens)
    return (
        isinstance(answer.value, float)
        and all(isinstance(text, str) for text in texts)
        and all(isinstance(count, int) for count in counts)
    )


def _seal(question: Question, answer: Answer) -> str:
    """A hash over an answer as it is stored. Tokens of several attempts add up, and are no part of it."""
    return fingerprint([question.key, answer.value, _storable(answer.raw), _storable(answer.error)])


def _storable(text: str) -> str:
    """Text without halves of characters, which SQLite cannot store."""
    return text.encode("utf-8", "replace").decode("utf-8")


@contextmanager
def remembering(path: Path) -> Iterator[Memory]:
    """Open the memory at ``path``, and create it where there is none.

    Raises StoreError where the file is no database, is damaged or cannot be written.
    """
    connection = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=WAIT_S, check_same_thread=False)  # callers hold a lock
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(_SCHEMA)
        columns = [row[1] for row in connection.execute("PRAGMA table_info(answers)")]
        if "seal" not in columns:
            connection.execute("ALTER TABLE answers ADD COLUMN seal TEXT")
    except (sqlite3.Error, OSError) as error:
        if connection is not None:
            connection.close()
        raise StoreError(
            f"the memory of judgements cannot be opened: {error}", where=str(path), fix="move the file away"
        ) from error
    try:
        yield Memory(connection)
    except sqlite3.DatabaseError as error:
        if "disk is full" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        fix = f"move it away with {path.name}-wal and {path.name}-shm: what it held is asked for again"
        raise StoreError(f"the memory of judgements is damaged: {error}", where=str(path), fix=fix) from error
    finally:
        connection.close()
