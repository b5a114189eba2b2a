"""The names of columns that formats of preference data have, and a view of the columns of some data."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from toolkit.preferences.parsing import ANNOTATOR_COLUMN, CHOICES, PROBABILITIES, SIGNED, Datum
from toolkit.preferences.rows import Record

PROMPTS = ("prompt", "instruction", "question", "input", "query")
# Names that the prompt's column has in data where no format reads it.
PROMPT_LIKE = frozenset(
    ("problem", "task", "request", "post", "user", "message", "context", "history", "dialogue", "dialog", "article")
    + ("input_text", "source_text", "prompt_text", "text_prompt", "question_text", "query_text", "instruction_text")
    + ("user_input", "user_prompt", "user_query", "user_message", "document", "prompt_str", "questions", "prompts")
)
# The prompt of two responses or more, where none of PROMPTS is there: SHP's and HelpSteer3's.
CONTEXTS = ("history", "context")
# The messages before the two responses, where those are no whole conversations.
CONVERSATIONS = ("messages", "conversations", "conversation")
SYSTEMS = ("system", "system_prompt", "system_message")
# The preferred response and the other one.
SIDES = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("response_j", "response_k"),
    ("response", "rejected_response"),
)
# Beside ``messages`` that end with the preferred response: the other one.
REJECTED = ("rejected_messages", "rejected_response")
SHP_PAIR = ("human_ref_A", "human_ref_B")
# Two responses of which a label says which is preferred.
PAIRS = (
    ("response_a", "response_b"),
    ("response_1", "response_2"),
    ("response1", "response2"),
    ("response_0", "response_1"),
    ("output_1", "output_2"),
    ("output_a", "output_b"),
    ("conversation_a", "conversation_b"),
    SHP_PAIR,
    ("answer_0", "answer_1"),
    ("answer_a", "answer_b"),
)
# The scores of two responses.
SCORE_PAIRS = (
    ("score_a", "score_b"),
    ("score_A", "score_B"),
    ("score_0", "score_1"),
    ("score_1", "score_2"),
    ("score1", "score2"),
)
ONE_HOT = ("winner_model_a", "winner_model_b", "winner_tie")
GROUP = "group"  # of every format: rows of one group are held out together
LABELS = ("label", "preference", "winner")
# The columns that give each response a value, with the format's name.
VALUE_COLUMNS = {"ranks": "ranked", "ranking": "ranked", "scores": "scored"}
# Lists of objects, one for each response, with its text and its rank or score.
ANSWERS = ("answers", "completions", "responses")
# The score of the one response in each row.
ROW_SCORES = ("score", "helpfulness")
KNOWN_COLUMNS = frozenset(
    (*PROMPTS, *CONTEXTS, *CONVERSATIONS, *REJECTED, *SYSTEMS, *ROW_SCORES)
    + tuple(name for pair in (*PAIRS, *SIDES, *SCORE_PAIRS) for name in pair)
    + (*PROBABILITIES, *LABELS, *CHOICES, *SIGNED, *ONE_HOT, *VALUE_COLUMNS, *ANSWERS)
    + ("comparisons", "gold", "labels", "info", "summaries", "annotator", "worker", "margin", "turn", "status", GROUP)
)
_NUMBERED = re.compile(r"(prediction|response|output|completion|answer)[ _]?([1-9]\d?)")


@dataclass(frozen=True)
class Format:
    """A recognised format: its name, the columns that it reads, and the function that reads one record.

    ``labels`` are the columns that :func:`toolkit.preferences.cells.read_label` reads. ``one_response``: a record holds
    one response with its score, and the records of a prompt are compared with each other.
    """

    name: str
    columns: frozenset[str]
    parse: Callable[[Record], Datum]
    labels: tuple[str, ...] = ()
    one_response: bool = False


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

    def first_pair(self, pairs: Iterable[tuple[str, str]]) -> tuple[str, str] | None:
        return next((pair for pair in pairs if self.has(*pair)), None)

    def cells(self, column: str) -> list[object]:
        """The cells of a column in the sample that are not null."""
        return [cell for record in self.sample if (cell := record.get(column)) is not None]

    def holds_list(self, column: str | None) -> bool:
        return column is not None and any(isinstance(record.get(column), list) for record in self.sample)

    def holds_texts(self, column: str) -> bool:
        """Whether the column holds lists of texts; lists of messages are none."""
        cells = [cell for cell in self.cells(column) if isinstance(cell, list) and cell]
        return bool(cells) and all(isinstance(item, str) for cell in cells for item in cell)

    def holds_objects(self, column: str) -> bool:
        """Whether the column holds lists of objects."""
        cells = [cell for cell in self.cells(column) if isinstance(cell, list) and cell]
        return bool(cells) and all(isinstance(item, Mapping) for cell in cells for item in cell)

    def holds(self, column: str, kind: type) -> bool:
        """Whether all cells of the column are of this type; there has to be one."""
        cells = self.cells(column)
        return bool(cells) and all(isinstance(cell, kind) for cell in cells)

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
