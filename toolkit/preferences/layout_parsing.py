"""How one record of a published layout becomes a prompt with responses and comparisons."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from toolkit.evals.distinct import equals
from toolkit.preferences import parsing
from toolkit.preferences.cells import (
    RecordError,
    cell,
    json_texts,
    list_cell,
    messages_from,
    name_cell,
    odd_one,
    prompt_cell,
    score_of,
    signed_margin,
    text_cell,
    two_groups,
)
from toolkit.preferences.columns import Format
from toolkit.preferences.parsing import Datum, NoSharedPromptError, is_empty
from toolkit.preferences.rows import Prompt, Record, canonical_prompt, soft_comparisons
from toolkit.storage.spilled import Spill

ANSWER_TEXTS = ("answer", "text", "response", "content", "completion")
ANSWER_VALUES = ("rank", "pm_score", "score")  # a rank is better where it is lower
Message = dict[str, str]


def json_turns(record: Record, *, verdict: tuple[str, ...]) -> Datum:
    """The prompts of all turns and both models' answers, as lists of texts or as JSON of such lists."""
    prompts, *answers = (_texts(record, name) for name in ("prompt", "response_a", "response_b"))
    if any(len(side) != len(prompts) for side in answers):
        raise RecordError(f"{len(prompts)} prompts, {len(answers[0])} and {len(answers[1])} answers", column="prompt")
    conversations = [
        [
            {"role": role, "content": text}
            for turn in zip(prompts, side, strict=True)
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        for side in answers
    ]
    pair = dict(zip(("conversation_a", "conversation_b"), conversations, strict=True))
    names = ("conversation_a", "conversation_b")
    if len(verdict) == 1:
        return parsing.labelled_pair({**record, **pair}, prompts=(), pair=names, labels=verdict)
    return parsing.compared_pair({**record, **pair}, prompts=(), pair=names, verdict=verdict)


def _texts(record: Record, column: str) -> list[str]:
    texts = json_texts(cell(record, column))
    if texts is None:
        raise RecordError(f"{column!r} is no list of texts", column=column)
    return texts


def messages_and_rejected(record: Record, *, rejected: str) -> Datum:
    """A conversation that ends with the chosen response, and the rejected one as a text or as a conversation."""
    chosen = messages_from(list_cell(record, "messages"), "messages")
    if not chosen or chosen[-1]["role"] != "assistant":
        fix = "its last message is the chosen response"
        raise RecordError("'messages' does not end with an assistant's message", column="messages", fix=fix)
    other = record.get(rejected)
    if not isinstance(other, list):
        other = [*chosen[:-1], {"role": "assistant", "content": text_cell(record, rejected)}]
    sides = {"chosen": chosen, "rejected": other}
    return parsing.chosen_rejected({**record, **sides}, prompts=(), sides=("chosen", "rejected"))


def valued_answers(record: Record, *, prompts: Sequence[str], column: str, text: str, value: str) -> Datum:
    """Objects with a response and its rank or score."""
    items = list_cell(record, column)
    if not all(isinstance(item, Mapping) for item in items):
        raise RecordError(f"{column!r} must hold objects with {text!r} and {value!r}", column=column)
    texts = [text_cell(item, text) for item in items]
    sign = -1.0 if value == "rank" else 1.0
    scores = [score_of(item.get(value), column) for item in items]
    values = [None if score is None else sign * score for score in scores]
    return parsing.by_value(prompt_cell(record, prompts), texts, values, name_cell(record, "annotator"))


def scored_row(record: Record, *, prompts: Sequence[str], score: str) -> Datum:
    """One response with its score, which is higher for a better one."""
    value = score_of(record.get(score), score)
    return Datum(prompt_cell(record, prompts), [text_cell(record, "response")], [], score=value)


class Joined(NamedTuple):
    """Records of one response each as one for each prompt, at the place of its first, all responses compared.

    ``single`` has the numbers of the records whose prompt has no other response, ``empty`` those of the records whose
    prompt or response is blank: they are left out before.
    """

    data: Iterator[tuple[int, Datum]]
    single: Sequence[int]
    empty: Sequence[int]


def joined(data: Iterable[tuple[int, Datum]], refused: Callable[[int, RecordError], Exception]) -> Joined:
    """The records, which wait on disk, joined by their prompts.

    Raises what ``refused`` makes of a record's number and error, for a prompt in two groups.
    """
    stored, numbers, keys, empty = Spill(), array("q"), array("q"), array("q")
    for number, datum in data:
        if is_empty(datum):
            empty.append(number)
            continue
        stored.append((datum.prompt, datum.responses[0], datum.score, datum.group))
        numbers.append(number)
        keys.append(hash(canonical_prompt(datum.prompt)))
    key_of = np.frombuffer(keys, np.int64)
    single = array("q", (numbers[places[0]] for places in equals(key_of) if len(places) == 1))

    def compared() -> Iterator[tuple[int, Datum]]:
        for places in equals(key_of):
            if len(places) > 1:
                records = [stored[place] for place in places.tolist()]
                groups = [record[3] for record in records]
                if (k := odd_one(groups)) is not None:
                    raise refused(numbers[places[k]], two_groups(groups[k], groups[0]))
                yield numbers[places[0]], _compared(records)

    return Joined(compared(), single, empty)


def _compared(records: Sequence[tuple[Prompt, str, float | None, str]]) -> Datum:
    """The responses to one prompt, each compared with each by its score."""
    prompt, _, _, group = records[0]
    compared = parsing.by_value(prompt, [record[1] for record in records], [record[2] for record in records], "")
    return compared._replace(group=group)


def in_context(record: Record, *, recognised: Format, system: str | None, history: str | None) -> Datum:
    """What the format reads, with the system text and the earlier turns of these columns before the prompt."""
    datum = recognised.parse(record)
    prompt, responses = datum.prompt, datum.responses
    if isinstance(prompt, str) and recognised.name.endswith("transcripts"):
        messages = parsing.parse_transcript(prompt)
        if messages is None:
            raise NoSharedPromptError("the transcript cannot be read as messages")
        prompt, responses = messages, [text.strip() for text in responses]
    elif isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    n_system = int(bool(prompt) and prompt[0]["role"] == "system")
    prompt = [*prompt[:n_system], *_turns(record, history), *prompt[n_system:]]
    text = text_cell(record, system) if system and system in record else ""
    first = prompt[0] if prompt else {}
    if text.strip() and first.get("role") != "system":
        prompt = [{"role": "system", "content": text}, *prompt]
    elif text.strip() and first["content"].strip() != text.strip():
        raise RecordError("another system message than the prompt's own", column=system or "", fix="keep one of them")
    return datum._replace(prompt=prompt, responses=responses)


def with_ties(record: Record, *, recognised: Format) -> Datum:
    """What the format reads; a pair whose ``status`` is a tie is a tie."""
    datum = recognised.parse(record)
    if record.get("status") != "tie":
        return datum
    comparisons = [tied for c in datum.comparisons for tied in soft_comparisons(c.winner, c.loser, 0.5, c.annotator)]
    return datum._replace(comparisons=comparisons)


def with_margin(record: Record, *, recognised: Format) -> Datum:
    """What the format reads, with the size of ``margin`` where one of the two responses is preferred.

    The margin may be the first response's score minus the second's. Raises RecordError for one below 0 where the first
    is preferred.
    """
    datum = recognised.parse(record)
    orders = {(c.winner, c.loser) for c in datum.comparisons}
    if len(orders) != 1:  # a tie or a soft label has both
        return datum
    margin = signed_margin(record)
    if margin < 0 and orders == {(0, 1)}:
        what = f"margin {margin} says that the second response is better, but the first one is preferred"
        fix = "the difference first minus second, or its size alone"
        raise RecordError(what, column="margin", fix=fix)
    return datum._replace(comparisons=[c._replace(margin=abs(margin)) for c in datum.comparisons])


def _turns(record: Record, history: str | None) -> list[Message]:
    """Earlier turns: pairs of a question and an answer."""
    turns: list[Message] = []
    for pair in (record.get(history) or ()) if history else ():
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise RecordError("'history' holds something else than [question, answer]", column="history")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns
