"""What ``duel check`` can say of data: the kinds of findings, what each means, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from toolkit.evals.words import counted

FIRST_ROWS = 10  # of each finding, that the result lists
FURTHER_DETAILS = 3  # kinds of detail that an example names beside its own; of more it names none
MOST_DETAILS = FURTHER_DETAILS + 2  # distinct ones of a kind that are kept: with more, an example names its own alone
EXCERPT = 60  # characters of a text in an example


@dataclass(frozen=True)
class Kind:
    """What a kind of finding means, as a heading, and what to do about it."""

    meaning: str
    fix: str


KINDS = {
    "unreadable": Kind(
        "These rows cannot be read",
        "correct them, or leave them out; where the columns have other names, map them (--column, data.columns)",
    ),
    "template_raises": Kind(
        "The chat template refuses these rows",
        "correct the rows (roles, their order, system turns), or set another model.chat_template; duel run stops here",
    ),
    "think_block_open": Kind(
        "A think block is still open where the response begins",
        "close the block in the template (enable_thinking=false, or <think></think> in the generation prompt), or "
        "begin each response with the thoughts and </think>",
    ),
    "bos_twice": Kind(
        "The prompt begins with BOS, and the tokenizer or the template adds another",
        "remove the BOS text from the prompts; duel trains on one BOS, other tools on two",
    ),
    "bos_missing": Kind(
        "The chat template writes no BOS, and the tokenizer opens every other text with one",
        "begin the chat template with {{ bos_token }}, or set model.chat_template to one that does",
    ),
    "eos_missing": Kind(
        "Nothing marks the end of these responses",
        "end each assistant turn of the template with {{ eos_token }}, set eos_token in tokenizer_config.json, or "
        "repair the responses that lost their end",
    ),
    "eos_twice": Kind(
        "The response ends with the text of EOS, and another EOS follows it",
        "remove the EOS text from the end of the responses; duel adds the end itself",
    ),
    "boundary": Kind(
        "Prompt and response have other tokens apart than together",
        "end prompts without a blank or line break and begin responses with it, or the other way round, as the model "
        "was trained; separate the two where words run together",
    ),
    "prerendered": Kind(
        "The text was rendered by a chat template already",
        "use the raw messages: [{role, content}...] as the prompt and the answer alone as the response",
    ),
    "ends_with_assistant": Kind(
        "The prompt ends with an assistant turn",
        "move the last assistant turn into the responses, or add the user's next turn; duel run refuses such messages",
    ),
    "system_dropped": Kind(
        "The chat template leaves out the system turn",
        "write the instruction into the first user turn, or set a model.chat_template that renders system turns",
    ),
    "unseen_parts": Kind(
        "The models will not see parts of these rows",
        "write what matters (system prompt, tools, tool calls) into the messages' text; leave out rows that need "
        "images",
    ),
    "text_and_messages": Kind(
        "Some rows are text and the others are chat messages",
        "write all prompts in one way, or set data.conversational=true: text becomes a user's message",
    ),
    "cut": Kind(
        "Responses are longer than the limit, so training sees no end of them",
        "raise data.max_response_tokens (duel check: --max-response-tokens), or leave out the longest responses",
    ),
    "cut_unevenly": Kind(
        "One side of the pairs is cut more often than the other",
        "raise data.max_response_tokens, or leave out pairs with one cut response: training would learn from the cut",
    ),
    "identical_when_cut": Kind(
        "Both responses of a pair are the same tokens once cut",
        "leave these pairs out, or raise data.max_response_tokens: there is nothing to learn from them",
    ),
    "length_bias": Kind(
        "The length alone tells which response is preferred",
        "balance the lengths, use evaluate's length-controlled win rate, and compare with the length as the reward",
    ),
    "duplicates": Kind(
        "Rows repeat an earlier row",
        "keep one of each; a repeated row counts twice in training",
    ),
    "contradictions": Kind(
        "The same pair is judged both ways",
        "keep the judgement that is right, leave the pair out, or name the annotators",
    ),
    "ties": Kind(
        "The preference is a tie",
        "leave ties out if they only mean that nobody looked; the reward model and DPO pull both responses together",
    ),
    "leak": Kind(
        "Prompts of training and of the held-out data are nearly the same",
        "leave them out on one side, or give rows that are alike the same `group`: a group is held out as a whole",
    ),
    "annotator": Kind(
        "An annotator disagrees with the others",
        "look at these rows (labels may be swapped), or leave the annotator out with data.annotators",
    ),
    "encoding": Kind(
        "Characters were damaged or cannot be seen",
        "read the source again as UTF-8, and remove control and zero-width characters",
    ),
    "off_policy": Kind(
        "The responses are unlikely under the model",
        "train SFT on the chosen responses first (sft.enabled=true), or prefer responses that the model sampled",
    ),
}


@dataclass(frozen=True)
class Finding:
    """One kind of finding. ``rows`` are the first places in the source: 1-based lines of JSON lines, else rows.

    ``example`` says what is there in the first row, or the numbers behind a finding about all rows.
    """

    kind: str
    n_rows: int
    rows: tuple[int, ...]
    example: str
    fix: str

    @property
    def meaning(self) -> str:
        return KINDS[self.kind].meaning

    def as_dict(self) -> dict[str, Any]:
        """As in ``duel check --json``."""
        return asdict(self) | {"rows": list(self.rows)}


class RowNumbers:
    """A set of numbers of rows, a byte for each row up to the last of them."""

    def __init__(self) -> None:
        self._marks = bytearray()
        self._n = 0

    def add(self, row: int) -> bool:
        """Whether it was not there yet."""
        if row >= len(self._marks):
            self._marks.extend(bytes(row + 1 - len(self._marks)))
        if self._marks[row]:
            return False
        self._marks[row] = 1
        self._n += 1
        return True

    def __len__(self) -> int:
        return self._n

    def lowest(self, n: int) -> tuple[int, ...]:
        """The ``n`` lowest numbers, or all of them where there are fewer, in order."""
        numbers: list[int] = []
        while len(numbers) < n and (row := self._marks.find(1, numbers[-1] + 1 if numbers else 0)) >= 0:
            numbers.append(row)
        return tuple(numbers)


@dataclass
class _Found:
    """The rows of one kind. Of their details those that an example may name are kept: the first row's, and as many
    distinct ones as tell whether there are too many to be named.
    """

    rows: RowNumbers = field(default_factory=RowNumbers)
    first: int = 0
    detail_of_first: str = ""
    details: dict[str, None] = field(default_factory=dict)

    def add(self, row: int, detail: str | Callable[[], str]) -> None:
        if not self.rows.add(row):
            return
        is_first = len(self.rows) == 1 or row < self.first
        if not is_first and len(self.details) >= MOST_DETAILS:
            return
        text = detail if isinstance(detail, str) else detail()
        if is_first:
            self.first, self.detail_of_first = row, text
        if len(self.details) < MOST_DETAILS:
            self.details[text] = None

    def example(self, unit: str) -> str:
        others = [detail for detail in self.details if detail != self.detail_of_first]
        further = f" (other rows: {'; '.join(others)})" if 0 < len(others) <= FURTHER_DETAILS else ""
        return f"{unit} {self.first}: {self.detail_of_first}{further}"


@dataclass
class Collector:
    """Collects rows for each kind while the checks run, a byte for a row. ``unit`` is what the source calls a row.

    ``refused`` are the rows for which a run refuses the whole data.
    """

    unit: str
    numbers: dict[str, str] = field(default_factory=dict)
    refused: RowNumbers = field(default_factory=RowNumbers)
    _found: dict[str, _Found] = field(default_factory=dict)

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds that were found."""
        return frozenset(self._found)

    def add(self, kind: str, row: int, detail: str | Callable[[], str]) -> None:
        """A row of this kind; ``detail`` says what is there, or is asked to say it. The first detail of a row stays."""
        if (found := self._found.get(kind)) is None:
            found = self._found[kind] = _Found()
        found.add(row, detail)

    def refuse(self, kind: str, row: int, detail: str) -> None:
        """A row of this kind that a run refuses."""
        self.add(kind, row, detail)
        self.refused.add(row)

    def add_all(self, kind: str, rows: Iterable[int], numbers: str) -> None:
        """Rows of a kind that is about all of them together; ``numbers`` say how much."""
        for row in rows:
            self.add(kind, row, "")
        self.numbers[kind] = numbers

    def findings(self) -> tuple[Finding, ...]:
        """The findings in the order of :data:`KINDS`."""
        return tuple(self._finding(kind, self._found[kind]) for kind in KINDS if kind in self._found)

    def _finding(self, kind: str, found: _Found) -> Finding:
        example = self.numbers.get(kind) or found.example(self.unit)
        return Finding(kind, len(found.rows), found.rows.lowest(FIRST_ROWS), example, KINDS[kind].fix)


def excerpt(text: str, *, end: bool = False) -> str:
    """The start of a text, or its end, in quotes, with what cannot be seen escaped.

    >>> excerpt("one two"), excerpt("a" * 99, end=True)[:6]
    ("'one two'", "...'aa")
    """
    if len(text) <= EXCERPT:
        return repr(text)
    return f"...{text[-EXCERPT:]!r}" if end else f"{text[:EXCERPT]!r}..."


def render(n_rows: int, findings: Sequence[Finding], notes: Sequence[str], unit: str) -> str:
    """The findings for people: each with its rows, an example and what to do."""
    lines = [f"{counted(n_rows, 'row')}, {counted(len(findings), 'finding')}", *(f"  {note}" for note in notes)]
    for finding in findings:
        places = ", ".join(map(str, finding.rows)) + (", ..." if finding.n_rows > len(finding.rows) else "")
        lines += [
            "",
            f"{finding.kind}: {counted(finding.n_rows, 'row')} ({unit} {places})",
            f"  {finding.meaning}.",
            f"  {finding.example}",
            f"  fix: {finding.fix}",
        ]
    return "\n".join(lines)
