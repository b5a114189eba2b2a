"""Rows of the same prompt become one, and what is odd about them is counted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from toolkit.preferences import splits
from toolkit.preferences.columns import GROUP
from toolkit.preferences.loading import SourceRecords
from toolkit.preferences.parsing import ASSISTANT_TURN, Datum
from toolkit.preferences.refusals import check_unicode, prompt_texts, row_error
from toolkit.preferences.rows import Comparison, PreferenceRow, Prompt, canonical_prompt

FIRST_ROWS = 5  # row numbers that a report lists for what was left out


@dataclass
class _PromptEntry:
    """One prompt while its rows are collected."""

    prompt: Prompt
    source_row: int
    group: str = ""
    position: dict[str, int] = field(default_factory=dict)  # of each response
    response_rows: list[int] = field(default_factory=list)  # where each response is first
    comparisons: list[Comparison] = field(default_factory=list)
    comparison_rows: list[int] = field(default_factory=list)
    gold: dict[str, float] = field(default_factory=dict)

    def add(self, number: int, datum: Datum) -> int:
        """Add the responses and comparisons of a record. Returns how many judgements compare a text with itself."""
        at = [self.position.setdefault(text, len(self.position)) for text in datum.responses]
        self.response_rows += [number] * (len(self.position) - len(self.response_rows))
        identical = []
        for c in datum.comparisons:
            if at[c.winner] == at[c.loser]:
                identical.append(c)
            else:
                self.comparisons.append(Comparison(at[c.winner], at[c.loser], c.weight, c.annotator, c.margin))
                self.comparison_rows.append(number)
        return len(splits.labelled_pairs(identical))

    def row(self, key: str) -> PreferenceRow:
        gold = [self.gold[text] for text in self.position] if len(self.gold) == len(self.position) else None
        prompt_id = hashlib.sha256(key.encode()).hexdigest()[:16]  # as rows.prompt_id, whose JSON the key is
        return PreferenceRow(
            prompt_id, self.prompt, list(self.position), self.comparisons, gold, self.source_row, self.group
        )


@dataclass(frozen=True)
class Merged:
    """Rows, one for each prompt in order of first appearance, and counts of
    :class:`toolkit.preferences.reading.DataReport`.

    ``response_rows`` has, by a prompt's id, the row of the source where each of its responses is first.
    """

    rows: list[PreferenceRow]
    response_rows: dict[str, list[int]]
    counts: dict[str, Any]


def merge(loaded: SourceRecords, data: Iterable[tuple[int, Datum]]) -> Merged:
    """Rows of one prompt become one. Raises DataError for one that contradicts an earlier row."""
    entries: dict[str, _PromptEntry] = {}
    seen: set[object] = set()
    empty: list[int] = []
    identical: list[int] = []
    n = dict.fromkeys(("n_duplicates", "n_unlabelled", "n_multi_turn", "n_prompt_repeated"), 0)
    for number, datum in data:
        prompt, responses = datum.prompt, datum.responses
        last = prompt if isinstance(prompt, str) else prompt[-1]["content"] if prompt else ""
        check_unicode(loaded, number, prompt_texts(prompt), "prompt")
        check_unicode(loaded, number, responses, "responses")
        if not last.strip() or not all(map(str.strip, responses)):
            empty.append(number)
            continue
        key = canonical_prompt(prompt)
        entry = entries.setdefault(key, _PromptEntry(prompt, number, datum.group))
        if datum.group != entry.group:
            what = f"group {datum.group!r} here and {entry.group!r} earlier for the same prompt"
            raise row_error(loaded, number, what, column=GROUP, fix="the same group in all rows of a prompt")
        whole = (key, tuple(responses), tuple(datum.comparisons))
        n["n_duplicates"] += whole in seen
        seen.add(whole)
        n["n_unlabelled"] += datum.n_unlabelled
        n["n_multi_turn"] += any("\n\nHuman:" in text or ASSISTANT_TURN in text for text in responses)
        n["n_prompt_repeated"] += all(text.startswith(last) for text in responses)
        identical += [number] * entry.add(number, datum)
        for text, gold in zip(responses, datum.gold or (), strict=False):
            if entry.gold.setdefault(text, gold) != gold:
                what = f"gold is {gold} here and {entry.gold[text]} earlier for the same prompt and response"
                raise row_error(loaded, number, what, column="gold", fix="one gold reward for each response")
    usable = {key: entry for key, entry in entries.items() if len(entry.position) > 1}
    pairs = [(splits.labelled_pairs(entry.comparisons), entry.comparison_rows) for entry in usable.values()]
    counts: dict[str, Any] = {
        **n,
        "n_comparisons": sum(len(labelled) for labelled, _ in pairs),
        "n_ties": sum(pair.p == 0.5 for labelled, _ in pairs for pair in labelled),
        "n_contradictions": sum(splits.contradictions(labelled, rows) for labelled, rows in pairs),
        "n_unjudged": sum(not labelled for labelled, _ in pairs),
        "n_empty": len(empty),
        "empty_rows": tuple(empty[:FIRST_ROWS]),
        "n_identical": len(identical),
        "identical_rows": tuple(dict.fromkeys(identical))[:FIRST_ROWS],
    }
    rows = [entry.row(key) for key, entry in usable.items()]
    response_rows = [entry.response_rows for entry in usable.values()]
    return Merged(rows, {row.prompt_id: of_row for row, of_row in zip(rows, response_rows, strict=True)}, counts)
