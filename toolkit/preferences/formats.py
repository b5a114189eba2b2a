"""The known formats of preference data, and how the columns of some data tell which one it is.

:func:`recognise` looks at the columns and returns the :class:`Format` that reads the records. Files and the hub are
read by :mod:`toolkit.preferences.loading`, single records by :mod:`toolkit.preferences.parsing`, and rows of one prompt
are merged by :mod:`toolkit.preferences.merging`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial

from toolkit.preferences import layouts, parsing
from toolkit.preferences.cells import RecordError
from toolkit.preferences.columns import (
    CONTEXTS,
    LABELS,
    ONE_HOT,
    PAIRS,
    PROMPT_LIKE,
    SCORE_PAIRS,
    SHP_PAIR,
    SIDES,
    VALUE_COLUMNS,
    Columns,
    Format,
    is_known_column,
)
from toolkit.preferences.parsing import (
    ANNOTATOR_COLUMN,
    ASSISTANT_TURN,
    CHOICES,
    PROBABILITIES,
    SIGNED,
    NoSharedPromptError,
)
from toolkit.preferences.rows import Record

FORMATS = {
    "native": "prompt, responses, comparisons [{winner, loser, weight?, annotator?, margin?}], gold?, group?",
    "chosen/rejected": "prompt?, chosen, rejected (text, messages, or Human:/Assistant: transcripts), margin?, system?",
    "chosen/rejected lists": "prompt, chosen [text, ...], rejected [text, ...]",
    "ranked": "prompt, responses, ranks (1 = best, equal = tie) or ranking (indices, best first); or prompt, answers "
    "[{answer, rank}]",
    "scored": "prompt, responses, scores; or instruction, completions [{response, overall_score}]; or prompt, "
    "response, score in several rows of a prompt",
    "labelled pair": "prompt, response_a/_b or response_1/_2 or output_1/_2 or conversation_a/_b, and label, "
    "preference, winner, choice, probability, preference_strength (-3 to 3, negative: the first), score_a/_b or "
    "annotator1..n",
    "labelled list": "prompt, responses or numbered responses, and labels or preference: one label for each of the "
    "pairs 1v2 1v3 ... 2v3 ...",
    "summaries": "info {post}, summaries [{text}, {text}], choice",
}


def recognise(names: Iterable[str], sample: Sequence[Record], *, text_only: bool = False) -> Format | None:
    """The :class:`Format` that reads data with these columns, or None. ``sample`` are the first 100 records or so.

    System texts and earlier turns in columns of their own become messages before the prompt, unless ``text_only``.
    """
    columns = Columns(tuple(names), sample)
    # the first one that fits wins: data may have the columns of several formats
    recognisers = (_native, layouts.json_turns, _chosen_rejected_lists, _chosen_rejected, layouts.messages_and_rejected)
    more = (_summaries, _completions, layouts.valued_answers, _scored, _labelled_list, _labelled_pair)
    for recogniser in (*recognisers, *more, _compared_pair, layouts.scored_rows):
        recognised = recogniser(columns)
        if recognised is not None:
            recognised = layouts.with_margin(layouts.with_ties(recognised, columns), columns)
            return recognised if text_only else layouts.in_context(recognised, columns)
    return None


def _native(columns: Columns) -> Format | None:
    if not columns.has("prompt", "responses", "comparisons"):
        return None
    used = ["prompt", "responses", "comparisons", *columns.present("gold", "source_row", "source_file")]
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
    sides = columns.first_pair(SIDES)
    if sides is None:
        return None
    prompts = columns.prompts or layouts.conversation_before(columns, sides)
    used = frozenset([*sides, *prompts, *columns.present("annotator", "margin")])
    if prompts or columns.holds_list(sides[0]):
        return Format("chosen/rejected", used, partial(parsing.chosen_rejected, prompts=prompts, sides=sides))
    if sides != SIDES[0]:  # the other names are known beside a prompt only
        return None
    for record in columns.sample:
        texts = [record.get(name) for name in sides]
        if all(isinstance(text, str) and ASSISTANT_TURN in text and "Human:" in text for text in texts):
            return Format("chosen/rejected transcripts", used, parsing.transcripts)
    if unnamed_prompts(columns):
        return None
    return Format("chosen/rejected, implicit prompt", used, parsing.implicit_prompt)


def unnamed_prompts(columns: Columns) -> list[str]:
    """Columns that could hold the prompts of texts in ``chosen`` and ``rejected``, where no column has a known name.

    They hold a text in every row, mostly distinct ones, and have the name of a prompt, or hold texts of several words.
    There are none where chosen and rejected begin with prompts: most rows share a beginning, and most of these differ.
    """
    if not columns.has(*SIDES[0]) or columns.prompts or any(map(columns.holds_list, SIDES[0])):
        return []
    names = [name for name in columns.names if name in PROMPT_LIKE or not is_known_column(name)]
    texts = {name: [text for cell in columns.cells(name) if isinstance(cell, str) and (text := cell.strip())]
             for name in names}  # fmt: skip
    n = len(columns.sample)
    distinct = {name: of for name, of in texts.items() if len(of) == n and 2 * len({*of}) > n}
    if not distinct or _share_prompts(columns.sample):
        return []
    named = [name for name in distinct if name.lower() in PROMPT_LIKE]
    return named or [name for name, of in distinct.items() if 2 * sum(len(text.split()) >= 3 for text in of) > n]


def _share_prompts(sample: Sequence[Record]) -> bool:
    """Whether most chosen and rejected texts begin with a prompt, and most of these differ."""
    prompts = []
    for record in sample:
        with suppress(NoSharedPromptError, RecordError):
            prompts.append(parsing.implicit_prompt(record).prompt)
    return 2 * len(prompts) > len(sample) and 2 * len({*map(str, prompts)}) > len(prompts)


def _summaries(columns: Columns) -> Format | None:
    if not columns.has("info", "summaries", "choice"):
        return None
    return Format("summaries", frozenset(["info", "summaries", "choice", "worker"]), parsing.summaries)


def _completions(columns: Columns) -> Format | None:
    prompts = columns.prompts
    if not prompts or not columns.holds_list("completions") or columns.holds_texts("completions"):
        return None
    if layouts.valued_answers(columns) is not None:
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
    prompts, pair = pair_of(columns)
    labels = label_columns(columns, pair)
    if pair is None or not labels:
        return None
    turn = columns.present("turn") if pair[0].startswith("conversation") else []
    used = frozenset([*prompts, *pair, *labels, *turn, *columns.present("annotator")])
    parse = partial(parsing.labelled_pair, prompts=prompts, pair=pair, labels=labels)
    counted_from_1 = not {*labels} & {*PROBABILITIES, *CHOICES, *SIGNED, "labels"}
    return Format("labelled pair", used, parse, labels if counted_from_1 else ())


def pair_of(columns: Columns) -> tuple[tuple[str, ...], tuple[str, str] | None]:
    """The columns of the prompt and of two responses. Without a prompt two conversations are a pair."""
    context = columns.first(CONTEXTS)
    prompts = columns.prompts or ((context,) if context else ())
    pair = columns.first_pair(PAIRS)
    if not prompts and pair is not None and not all(map(columns.holds_list, pair)):
        pair = columns.first_pair([("conversation_a", "conversation_b")])
    return prompts, pair


def label_columns(columns: Columns, pair: tuple[str, str] | None) -> tuple[str, ...]:
    """The columns that say which of two responses is preferred, each by itself."""
    if pair == SHP_PAIR and columns.has("labels"):
        return ("labels",)
    labels = tuple(sorted(name for name in columns.names if ANNOTATOR_COLUMN.fullmatch(name)))
    one = columns.first((*PROBABILITIES, *LABELS, *CHOICES, *SIGNED))
    return labels or ((one,) if one else ())


def _compared_pair(columns: Columns) -> Format | None:
    """Two responses, and several columns that say together which is preferred: one for each outcome, or two scores."""
    prompts, pair = pair_of(columns)
    if pair is None or not prompts:
        return None
    verdict = ONE_HOT if columns.has(*ONE_HOT[:2]) else columns.first_pair(SCORE_PAIRS)
    if verdict is None:
        return None
    used = frozenset([*prompts, *pair, *verdict])
    parse = partial(parsing.compared_pair, prompts=prompts, pair=pair, verdict=verdict)
    return Format("labelled pair" if verdict == ONE_HOT else "scored pair", used, parse)
