"""The known formats of preference data, and how the columns of some data tell which one it is.

:func:`recognise` looks at the columns and returns the :class:`Format` that reads the records. Files and the hub are
read by :mod:`toolkit.preferences.loading`, single records by :mod:`toolkit.preferences.parsing`, and rows of one prompt
are merged by :mod:`toolkit.preferences.reading`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from toolkit.preferences import parsing
from toolkit.preferences.parsing import ANNOTATOR_COLUMN, ASSISTANT_TURN, CHOICES, PROBABILITIES, Datum
from toolkit.preferences.rows import Record


@dataclass(frozen=True)
class Format:
    """A recognised format: its name, the columns that it reads, and the function that reads one record."""

    name: str
    columns: frozenset[str]
    parse: Callable[[Record], Datum]
    labels: tuple[str, ...] = ()  # the columns that :func:`toolkit.preferences.cells.read_label` reads


FORMATS = {
    "native": "prompt, responses, comparisons [{winner, loser, weight?, annotator?, margin?}], gold?, group?",
    "chosen/rejected": "prompt?, chosen, rejected (text, messages, or Human:/Assistant: transcripts), margin?",
    "chosen/rejected lists": "prompt, chosen [text, ...], rejected [text, ...]",
    "ranked": "prompt, responses, ranks (1 = best, equal = tie) or ranking (indices, best first)",
    "scored": "prompt, responses, scores; or instruction, completions [{response, overall_score}]",
    "labelled pair": "prompt, response_a/_b or response_1/_2 or output_1/_2 or conversation_a/_b, and label, "
    "preference, winner, choice, probability or annotator1..n",
    "labelled list": "prompt, responses or numbered responses, and labels or preference: one label for each of the "
    "pairs 1v2 1v3 ... 2v3 ...",
    "summaries": "info {post}, summaries [{text}, {text}], choice",
}
PROMPTS = ("prompt", "instruction", "question", "input", "query")
PAIRS = (
    ("response_a", "response_b"),
    ("response_1", "response_2"),
    ("response1", "response2"),
    ("response_0", "response_1"),
    ("output_1", "output_2"),
    ("output_a", "output_b"),
    ("conversation_a", "conversation_b"),
)
GROUP = "group"  # of every format: rows of one group are held out together
LABELS = ("label", "preference", "winner")
# The columns that give each response a value, with the format's name.
VALUE_COLUMNS = {"ranks": "ranked", "ranking": "ranked", "scores": "scored"}
KNOWN_COLUMNS = frozenset(
    (*PROMPTS, *(name for pair in PAIRS for name in pair), *PROBABILITIES, *LABELS, *CHOICES, *VALUE_COLUMNS)
    + ("chosen", "rejected", "responses", "comparisons", "gold", "labels", "completions", "info", "summaries")
    + ("annotator", "worker", GROUP)
)
_NUMBERED = re.compile(r"(prediction|response|output|completion|answer)[ _]?([1-9]\d?)")


def is_known_column(name: str) -> bool:
    """Whether some format reads a column of this name."""
    return name in KNOWN_COLUMNS or bool(_NUMBERED.fullmatch(name) or ANNOTATOR_COLUMN.fullmatch(name))


@dataclass(frozen=True)
class Columns:
    """The columns of the data, and some records to look into."""

    names: tuple[str, ...]
    sample: Sequence[Record] = field(default=())

    def has(self, *names: str) -> bool:
        return all(name in self.names for name in names)

    def first(self, names: Iterable[str]) -> str | None:
        return next((name for name in names if name in self.names), None)

    def holds_list(self, column: str | None) -> bool:
        return column is not None and any(isinstance(record.get(column), list) for record in self.sample)

    def holds_texts(self, column: str) -> bool:
        """Whether the column holds lists of texts; lists of messages are none."""
        cells = [cell for record in self.sample if isinstance(cell := record.get(column), list) and cell]
        return bool(cells) and all(isinstance(item, str) for cell in cells for item in cell)

    def present(self, *names: str) -> list[str]:
        return [name for name in names if name in self.names]

    @property
    def prompts(self) -> tuple[str, ...]:
        """The columns that make up the prompt; () where there is none."""
        name = self.first(PROMPTS)
        if name is None:
            return ()
        return ("instruction", "input") if name == "instruction" and self.has("input") else (name,)

    @property
    def label_list(self) -> str | None:
        """The column that holds a list with one label for each pair of responses."""
        return self.first(name for name in ("labels", *LABELS) if self.holds_list(name))

    @property
    def numbered(self) -> tuple[str, ...]:
        """Columns of one stem such as "prediction 1".."prediction 4", in order; () where there are fewer than two."""
        stems: dict[str, dict[int, str]] = {}
        for name in self.names:
            if match := _NUMBERED.fullmatch(name):
                stems.setdefault(match[1], {})[int(match[2])] = name
        for by_number in stems.values():
            if len(by_number) >= 2 and sorted(by_number) == list(range(1, len(by_number) + 1)):
                return tuple(by_number[k] for k in sorted(by_number))
        return ()


def recognise(names: Iterable[str], sample: Sequence[Record]) -> Format | None:
    """The :class:`Format` that reads data with these columns, or None. ``sample`` are the first 100 records or so."""
    columns = Columns(tuple(names), sample)
    # the first one that fits wins: data may have the columns of several formats
    recognisers = (_native, _chosen_rejected_lists, _chosen_rejected, _summaries)
    for recogniser in (*recognisers, _completions, _scored, _labelled_list, _labelled_pair):
        recognised = recogniser(columns)
        if recognised is not None:
            return recognised
    return None


def _native(columns: Columns) -> Format | None:
    if not columns.has("prompt", "responses", "comparisons"):
        return None
    used = ["prompt", "responses", "comparisons", *columns.present("gold", "source_row")]
    return Format("native", frozenset(used), parsing.native)


def _chosen_rejected_lists(columns: Columns) -> Format | None:
    """RM-Bench and RewardBench 2: several texts on either side."""
    sides = ("chosen", "rejected")
    prompts = columns.prompts
    if not columns.has(*sides) or not prompts or not all(map(columns.holds_texts, sides)):
        return None
    used = frozenset([*sides, *prompts, *columns.present("annotator")])
    return Format("chosen/rejected lists", used, partial(parsing.chosen_rejected_lists, prompts=prompts))


def _chosen_rejected(columns: Columns) -> Format | None:
    if not columns.has("chosen", "rejected"):
        return None
    prompts = columns.prompts
    used = frozenset(["chosen", "rejected", *prompts, *columns.present("annotator", "margin")])
    if prompts or columns.holds_list("chosen"):
        return Format("chosen/rejected", used, partial(parsing.chosen_rejected, prompts=prompts))
    for record in columns.sample:
        texts = [record.get(name) for name in ("chosen", "rejected")]
        if all(isinstance(text, str) and ASSISTANT_TURN in text and "Human:" in text for text in texts):
            return Format("chosen/rejected transcripts", used, parsing.transcripts)
    return Format("chosen/rejected, implicit prompt", used, parsing.implicit_prompt)


def _summaries(columns: Columns) -> Format | None:
    if not columns.has("info", "summaries", "choice"):
        return None
    return Format("summaries", frozenset(["info", "summaries", "choice", "worker"]), parsing.summaries)


def _completions(columns: Columns) -> Format | None:
    prompts = columns.prompts
    if not prompts or not columns.holds_list("completions"):
        return None
    parse = partial(parsing.scored_completions, prompts=prompts)
    return Format("scored completions", frozenset([*prompts, "completions"]), parse)


def _scored(columns: Columns) -> Format | None:
    prompts, column = columns.prompts, columns.first(VALUE_COLUMNS)
    if not prompts or not columns.has("responses") or column is None:
        return None
    used = frozenset([*prompts, "responses", column, *columns.present("annotator")])
    return Format(VALUE_COLUMNS[column], used, partial(parsing.scored, prompts=prompts, column=column))


def _labelled_list(columns: Columns) -> Format | None:
    prompts, column = columns.prompts, columns.label_list
    responses = ("responses",) if columns.has("responses") else columns.numbered
    if not prompts or not responses or column is None:
        return None
    used = frozenset([*prompts, *responses, column, *columns.present("annotator")])
    parse = partial(parsing.labelled_list, prompts=prompts, responses=responses, column=column)
    return Format("labelled list", used, parse, (column,))


def _labelled_pair(columns: Columns) -> Format | None:
    prompts = columns.prompts
    if not prompts and not columns.has("conversation_a", "conversation_b"):
        return None
    pair = next((pair for pair in PAIRS if columns.has(*pair)), None)
    labels = tuple(sorted(name for name in columns.names if ANNOTATOR_COLUMN.fullmatch(name)))
    if not labels and (one := columns.first((*PROBABILITIES, *LABELS, *CHOICES))):
        labels = (one,)
    if pair is None or not labels:
        return None
    used = frozenset([*prompts, *pair, *labels, *columns.present("annotator")])
    parse = partial(parsing.labelled_pair, prompts=prompts, pair=pair, labels=labels)
    return Format("labelled pair", used, parse, () if labels[0] in (*PROBABILITIES, *CHOICES) else labels)
