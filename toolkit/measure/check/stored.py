"""The rows that are checked, which wait on disk: as many as a source holds need little memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from toolkit.evals.distinct import first_of_equals
from toolkit.preferences.rows import Comparison, PreferenceRow, Prompt, canonical_prompt
from toolkit.preferences.splits import Pair, pairs
from toolkit.storage.lazy import LazySequence
from toolkit.storage.spilled import Spill

ROWS_AT_ONCE = 4096  # that are in memory
CHARACTERS_AT_ONCE = 1 << 21  # of the rows that are in memory


@dataclass(frozen=True)
class CheckedRow:
    """One row of the source, the ``place``-th of those that are checked. ``texts`` are its prompt's and its
    responses', as they are in the source.

    In ``prompt`` and ``responses`` halves of surrogate pairs are replaced, because no tokenizer takes them.
    """

    place: int
    number: int
    prompt: Prompt
    responses: list[str]
    comparisons: list[Comparison]
    texts: list[str]

    @property
    def last_turn(self) -> str:
        """The text that the responses answer."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[-1]["content"] if self.prompt else ""

    @cached_property
    def pairs(self) -> list[Pair]:
        """Every compared pair of responses once, all its comparisons aggregated."""
        return pairs(PreferenceRow("", "", [], self.comparisons))


def texts_of(prompt: Prompt, responses: Sequence[str]) -> list[str]:
    """The texts of a prompt and of its responses."""
    return [*([prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]), *responses]


class CheckedRows(LazySequence[CheckedRow]):
    """Rows in the order of the source. They wait on disk; numbers are in memory.

    ``numbers`` are those of the rows in the source. ``keys`` and ``groups`` have a hash of each row's prompt and of its
    group, 0 for none.
    """

    def __init__(self) -> None:
        self._stored = Spill()
        self._numbers, self._keys, self._groups = array("q"), array("q"), array("q")
        self._conversational = bytearray()

    def add(self, row: CheckedRow, group: str) -> None:
        changed = row.texts if row.texts != texts_of(row.prompt, row.responses) else None
        self._stored.append((row.prompt, row.responses, row.comparisons, changed))
        self._numbers.append(row.number)
        self._keys.append(hash(canonical_prompt(row.prompt)))
        self._groups.append(hash(group) if group else 0)
        self._conversational.append(isinstance(row.prompt, list))

    @property
    def numbers(self) -> NDArray[np.int64]:
        return np.frombuffer(self._numbers, np.int64)

    @property
    def keys(self) -> NDArray[np.int64]:
        return np.frombuffer(self._keys, np.int64)

    @property
    def groups(self) -> NDArray[np.int64]:
        return np.frombuffer(self._groups, np.int64)

    def places(self, *, conversational: bool) -> NDArray[np.int64]:
        """Where the rows of messages are, or those of text."""
        return np.flatnonzero(np.frombuffer(self._conversational, np.uint8) == conversational)

    def first_of_prompts(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The place of the first row of each distinct prompt, in order, and of each row which of these has its prompt.

        Both are (n_prompts,) and (n_rows,).
        """
        return first_of_equals(self.keys)

    def __len__(self) -> int:
        return len(self._numbers)

    def item(self, at: int) -> CheckedRow:
        prompt, responses, comparisons, changed = self._stored[at]
        texts = texts_of(prompt, responses) if changed is None else changed
        judged = list(map(Comparison._make, comparisons))
        return CheckedRow(at, self._numbers[at], prompt, responses, judged, texts)

    def prompt(self, at: int) -> Prompt:
        """The prompt of a row."""
        prompt: Prompt = self._stored[at][0]
        return prompt

    def chunks(self, places: Iterable[int]) -> Iterator[list[CheckedRow]]:
        """The rows at these places, as many at once as memory should hold."""
        rows: list[CheckedRow] = []
        n_characters = 0
        for place in places:
            rows.append(row := self.item(place))
            n_characters += sum(map(len, row.texts))
            if len(rows) == ROWS_AT_ONCE or n_characters >= CHARACTERS_AT_ONCE:
                yield rows
                rows, n_characters = [], 0
        if rows:
            yield rows
