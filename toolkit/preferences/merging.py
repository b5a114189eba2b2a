"""Rows of the same prompt become one, and what is odd about them is counted."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from toolkit.preferences import splits
from toolkit.preferences.cells import two_groups
from toolkit.preferences.loading import SourceRecords
from toolkit.preferences.parsing import ASSISTANT_TURN, Datum, is_empty, last_turn
from toolkit.preferences.refusals import check_unicode, prompt_texts, refused, row_error
from toolkit.preferences.rows import Comparison, PreferenceRow, Prompt, canonical_prompt
from toolkit.preferences.stored import StoredRows
from toolkit.storage.spilled import Spill

_TURNS_END = "\n\n"  # stands before each turn of a transcript
FIRST_ROWS = 5  # row numbers that a report lists for what was left out


@dataclass
class _PromptEntry:
    """One prompt while its rows are put together."""

    prompt: Prompt
    source_row: int
    group: str
    position: dict[str, int] = field(default_factory=dict)  # of each response
    response_rows: list[int] = field(default_factory=list)  # where each response is first
    comparisons: list[Comparison] = field(default_factory=list)
    comparison_rows: list[int] = field(default_factory=list)
    gold: dict[str, float] = field(default_factory=dict)

    def add(
        self, number: int, responses: Sequence[str], comparisons: Iterable[Sequence[Any]], gold: Sequence[float] | None
    ) -> None:
        at = [self.position.setdefault(text, len(self.position)) for text in responses]
        self.response_rows += [number] * (len(self.position) - len(self.response_rows))
        for winner, loser, *rest in comparisons:
            if at[winner] != at[loser]:
                self.comparisons.append(Comparison(at[winner], at[loser], *rest))
                self.comparison_rows.append(number)
        for text, value in zip(responses, gold or (), strict=False):
            self.gold.setdefault(text, value)

    def row(self, prompt_id: str) -> PreferenceRow:
        gold = [self.gold[text] for text in self.position] if len(self.gold) == len(self.position) else None
        return PreferenceRow(
            prompt_id, self.prompt, list(self.position), self.comparisons, gold, self.source_row, self.group
        )


@dataclass(frozen=True)
class Merged:
    """Rows, one for each prompt in order of first appearance, and counts of
    :class:`toolkit.preferences.reading.DataReport`.
    """

    rows: StoredRows
    counts: dict[str, Any]


class _Judged(NamedTuple):
    """Of a prompt: its distinct responses, the judgements of them, and how many of these tie or contradict others."""

    n_responses: int
    n_comparisons: int
    n_ties: int
    n_contradictions: int

    @classmethod
    def of(cls, n_responses: int, comparisons: Sequence[Comparison], comparison_rows: Sequence[int]) -> _Judged:
        labelled = splits.labelled_pairs(comparisons)
        n_ties = sum(pair.p == 0.5 for pair in labelled)
        n_contradictions = splits.contradictions(labelled, comparison_rows) if len(labelled) > 1 else 0
        return cls(n_responses, len(labelled), n_ties, n_contradictions)


_REPEATS_A_RESPONSE = _Judged(-1, 0, 0, 0)


@dataclass
class _Records:
    """What the records say, on disk, and of each the place of its prompt among the prompts; in memory are numbers."""

    spilled: Spill = field(default_factory=Spill)
    prompt_of: array[int] = field(default_factory=lambda: array("q"))
    ids: dict[int, int] = field(default_factory=dict)  # a prompt's id -> its place
    groups: dict[str, int] = field(default_factory=dict)
    group_of: array[int] = field(default_factory=lambda: array("q"))  # of each prompt
    contents: array[int] = field(default_factory=lambda: array("q"))  # a hash of each record
    judged: array[int] = field(default_factory=lambda: array("i"))  # the numbers of a _Judged of each record by itself
    annotators: set[str] = field(default_factory=set)
    gold: dict[tuple[int, bytes], float] = field(default_factory=dict)

    def add(self, loaded: SourceRecords, number: int, datum: Datum) -> None:
        """Raises DataError for a record that contradicts an earlier one of its prompt."""
        responses, comparisons = datum.responses, datum.comparisons
        key = canonical_prompt(datum.prompt).encode()
        place = self.ids.setdefault(int.from_bytes(hashlib.sha256(key).digest()[:8], "big"), len(self.ids))
        group = self.groups.setdefault(datum.group, len(self.groups))
        if place == len(self.group_of):
            self.group_of.append(group)
        elif self.group_of[place] != group:
            earlier = list(self.groups)[self.group_of[place]]
            raise refused(loaded, number, two_groups(datum.group, earlier))
        self.contents.append(hash((place, *responses, *comparisons)))
        for text, gold in zip(responses, datum.gold, strict=False) if datum.gold else ():
            known = self.gold.setdefault((place, hashlib.sha256(text.encode()).digest()[:16]), gold)
            if known != gold:
                what = f"gold is {gold} here and {known} earlier for the same prompt and response"
                raise row_error(loaded, number, what, column="gold", fix="one gold reward for each response")
        self.prompt_of.append(place)
        # JSON of plain tuples takes a third of the time of that of named ones.
        self.spilled.append((number, datum.prompt, responses, list(map(tuple, comparisons)), datum.gold))
        n = len(responses)
        if n < 2 or (responses[0] == responses[1] if n == 2 else len(set(responses)) < n):
            self.judged.extend(_REPEATS_A_RESPONSE)
            return
        # One comparison is one judgement, and neither a tie nor a contradiction.
        one = len(comparisons) == 1
        self.judged.extend((n, 1, 0, 0) if one else _Judged.of(n, comparisons, [number] * len(comparisons)))
        for c in comparisons:
            if c.annotator:
                self.annotators.add(c.annotator)

    def n_duplicates(self) -> int:
        return len(self.contents) - len(np.unique(np.array(self.contents)))

    def merged(self) -> tuple[StoredRows, Counter[str]]:
        """A row for each prompt with two responses, in order of first appearance, and counts of their judgements.

        A record whose prompt no other one has is a row as it is.
        """
        rows, n = StoredRows(self.spilled), Counter[str]()
        prompt_of = np.array(self.prompt_of)
        by_prompt = np.argsort(prompt_of, kind="stable")
        sizes = np.bincount(prompt_of, minlength=len(self.ids))
        starts = np.cumsum(sizes) - sizes
        judged = np.array(self.judged).reshape(-1, len(_Judged._fields))[by_prompt[starts]]
        is_row = (sizes == 1) & (judged[:, 0] > 0)
        n.update(dict(zip(_Judged._fields, judged[is_row].sum(axis=0).tolist(), strict=True)))
        n["n_unjudged"] += int(np.count_nonzero(judged[is_row, 1] == 0))
        names = list(self.groups)
        sums, n_unjudged = [0] * len(_Judged._fields), 0
        firsts = by_prompt[starts].tolist()
        prompts = zip(self.ids, self.group_of, firsts, starts.tolist(), sizes.tolist(), is_row.tolist(), strict=True)
        for prompt_id, group, first, start, size, alone in prompts:
            if alone:
                rows.add_record(prompt_id, names[group], first)
                continue
            entry = self._entry(by_prompt[start : start + size].tolist(), names[group])
            if len(entry.position) < 2:
                continue
            of_entry = _Judged.of(len(entry.position), entry.comparisons, entry.comparison_rows)
            sums = [total + value for total, value in zip(sums, of_entry, strict=True)]
            n_unjudged += not of_entry.n_comparisons
            self.annotators.update([c.annotator for c in entry.comparisons if c.annotator])
            rows.add(entry.row(f"{prompt_id:016x}"), entry.response_rows)
        n.update(dict(zip(_Judged._fields, sums, strict=True)), n_unjudged=n_unjudged)
        return rows, n

    def _entry(self, places: Sequence[int], group: str) -> _PromptEntry:
        """What these records of one prompt say together."""
        number, prompt, *_ = first = self.spilled[places[0]]
        entry = _PromptEntry(prompt, number, group)
        for number, _, responses, comparisons, gold in (first, *map(self.spilled.__getitem__, places[1:])):
            entry.add(number, responses, comparisons, gold)
        return entry


def merge(loaded: SourceRecords, data: Iterable[tuple[int, Datum]]) -> Merged:
    """Rows of one prompt become one. Raises DataError for one that contradicts an earlier row."""
    records = _Records()
    empty, identical = _Numbers(), _Numbers()
    n_unlabelled = n_multi_turn = n_prompt_repeated = 0
    for number, datum in data:
        prompt, responses = datum.prompt, datum.responses
        last = last_turn(prompt)
        together = "\n".join(responses)  # what it has not, no response has
        check_unicode(loaded, number, prompt_texts(prompt), "prompt")
        if not together.isascii():
            check_unicode(loaded, number, responses, "responses")
        if is_empty(datum):
            empty.add(number)
            continue
        records.add(loaded, number, datum)
        n_unlabelled += datum.n_unlabelled
        if _TURNS_END in together:
            n_multi_turn += any("\n\nHuman:" in text or ASSISTANT_TURN in text for text in responses)
        if together.startswith(last):
            n_prompt_repeated += all(text.startswith(last) for text in responses)
        for c in datum.comparisons:
            if responses[c.winner] == responses[c.loser]:
                same = [c for c in datum.comparisons if responses[c.winner] == responses[c.loser]]
                identical.add(number, len(splits.labelled_pairs(same)))
                break
    rows, n = records.merged()
    counts: dict[str, Any] = {
        "n_unlabelled": n_unlabelled,
        "n_multi_turn": n_multi_turn,
        "n_prompt_repeated": n_prompt_repeated,
        **{name: n[name] for name in ("n_comparisons", "n_ties", "n_contradictions", "n_unjudged", "n_responses")},
        "n_annotators": len(records.annotators),
        "n_duplicates": records.n_duplicates(),
        "n_empty": empty.n,
        "empty_rows": tuple(empty.first),
        "n_identical": identical.n,
        "identical_rows": tuple(dict.fromkeys(identical.first)),
    }
    return Merged(rows, counts)


@dataclass
class _Numbers:
    """A count of what is wrong with rows, and the first of the rows' numbers."""

    n: int = 0
    first: list[int] = field(default_factory=list)

    def add(self, number: int, times: int = 1) -> None:
        self.n += times
        if times and len(self.first) < FIRST_ROWS and number not in self.first:
            self.first.append(number)
