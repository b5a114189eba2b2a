"""How one record of each format becomes a prompt with responses and comparisons."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from toolkit.preferences.cells import (
    RecordError,
    cell,
    excerpt,
    list_cell,
    margin_cell,
    messages_from,
    name_cell,
    numbers_cell,
    parsed_number,
    prompt_cell,
    read_choice,
    read_flag,
    read_index,
    read_label,
    read_number,
    read_probability,
    read_signed,
    score_of,
    text_cell,
    texts_cell,
    type_name,
)
from toolkit.preferences.rows import Comparison, Prompt, Record, soft_comparisons

PROBABILITIES = ("probability", "label_probability")
CHOICES = ("choice", "better_response_id")
SIGNED = ("preference_strength", "overall_preference")  # HelpSteer2's and HelpSteer3's
ANNOTATOR_COLUMN = re.compile(r"annotator_?\d+")
ASSISTANT_TURN = "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant|System):")


class Datum(NamedTuple):
    """What one record says, before rows of the same prompt are merged. ``n_unlabelled`` counts missing judgements.

    ``score`` is that of the one response of a record that is compared with others.
    """

    prompt: Prompt
    responses: list[str]
    comparisons: list[Comparison]
    gold: list[float] | None = None
    n_unlabelled: int = 0
    group: str = ""
    score: float | None = None


def last_turn(prompt: Prompt) -> str:
    """The text that the responses answer: the prompt, or the content of its last message."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"] if prompt else ""


def is_empty(datum: Datum) -> bool:
    """Whether the end of the prompt, or a response, is blank. Such a record is left out and counted."""
    return not last_turn(datum.prompt).strip() or not all(map(str.strip, datum.responses))


class NoSharedPromptError(Exception):
    """A record without a prompt that its responses share. It is left out and counted."""


# ---------------------------------------------------------------------------------------------------- K responses
def native(record: Record) -> Datum:
    prompt, responses = prompt_cell(record, ["prompt"]), texts_cell(record, "responses")
    comparisons = [
        _native_comparison(item, f"comparisons[{k}]", len(responses))
        for k, item in enumerate(list_cell(record, "comparisons"), start=1)
    ]
    if record.get("gold") is None:
        return Datum(prompt, responses, comparisons)
    gold = numbers_cell(record, "gold", len(responses))
    if None in gold:
        fix = "a number for every response, or leave 'gold' out"
        raise RecordError("'gold' has a null: give a number for every response, or none at all", column="gold", fix=fix)
    return Datum(prompt, responses, comparisons, [g for g in gold if g is not None])


def _native_comparison(item: object, where: str, n_responses: int) -> Comparison:
    if not isinstance(item, Mapping):
        raise RecordError(f"{where} is {type_name(item)}, expected an object", column="comparisons")
    winner, loser = (read_index(item.get(end), n_responses, f"{where}: {end}") for end in ("winner", "loser"))
    if winner == loser:
        fix = "two different indices of responses, or leave the comparison out"
        raise RecordError(f"{where} compares response {winner} with itself", column="comparisons", fix=fix)
    weight = item.get("weight")
    weight = 1.0 if weight is None else read_number(weight, "comparisons")
    if weight <= 0:
        fix = "a weight over 0, or leave the comparison out"
        raise RecordError(f"{where}: weight {weight} is not positive", column="comparisons", fix=fix)
    return Comparison(winner, loser, weight, name_cell(item, "annotator"), margin_cell(item, "comparisons"))


def scored(record: Record, *, prompts: Sequence[str], column: str) -> Datum:
    """Responses with ``ranks``, a ``ranking`` or ``scores``, as ``column`` says."""
    responses = texts_cell(record, "responses")
    if column == "ranking":
        listed = list_cell(record, column)
        ranking = [number for item in listed if (number := parsed_number(item)) is not None]  # "2" is 2
        if len(ranking) < len(listed) or sorted(ranking) != list(range(len(responses))):
            fix = f"each of 0..{len(responses) - 1} once, the best response's index first"
            what = f"ranking {excerpt(listed)} is not an order of {len(responses)} responses"
            raise RecordError(what, column=column, fix=fix)
        values: list[float | None] = [-float(ranking.index(k)) for k in range(len(responses))]
    else:
        sign = -1.0 if column == "ranks" else 1.0
        values = [None if v is None else sign * v for v in numbers_cell(record, column, len(responses))]
    return by_value(prompt_cell(record, prompts), responses, values, name_cell(record, "annotator"))


def scored_completions(record: Record, *, prompts: Sequence[str]) -> Datum:
    """openbmb/UltraFeedback. A row is compared by one of two scores for all of its completions: their scales differ."""
    items = list_cell(record, "completions")
    if not all(isinstance(item, Mapping) for item in items):
        raise RecordError("'completions' must hold objects with a response and a score", column="completions")
    responses = [text_cell(item, "response") for item in items]
    columns = [[score_of(item.get(name), name) for item in items] for name in ("overall_score", "fine-grained_score")]
    values = next((column for column in columns if None not in column), [None] * len(items))
    return by_value(prompt_cell(record, prompts), responses, values, "")


def by_value(prompt: Prompt, responses: list[str], values: Sequence[float | None], annotator: str) -> Datum:
    """All C(K,2) comparisons of responses by a value: higher is better, and equal values tie."""
    comparisons: list[Comparison] = []
    n_unlabelled = 0
    for i, j in combinations(range(len(responses)), 2):
        left, right = values[i], values[j]
        if left is None or right is None:
            n_unlabelled += 1
        else:
            comparisons += soft_comparisons(i, j, 1.0 if left > right else 0.5 if left == right else 0.0, annotator)
    return Datum(prompt, responses, comparisons, n_unlabelled=n_unlabelled)


def labelled_list(record: Record, *, prompts: Sequence[str], responses: Sequence[str], column: str) -> Datum:
    """Responses in one column ``responses`` or in several, and a list with one label for each pair 1v2, 1v3, ..."""
    texts = (
        texts_cell(record, "responses")
        if responses == ("responses",)
        else [text_cell(record, name) for name in responses]
    )
    labels, pairs = list_cell(record, column), list(combinations(range(len(texts)), 2))
    if len(labels) != len(pairs):
        fix = "one label for each of 1v2, 1v3, ... 2v3, ..."
        what = f"{len(texts)} responses have {len(pairs)} pairs, but {column!r} has {len(labels)} labels"
        raise RecordError(what, column=column, fix=fix)
    annotator = name_cell(record, "annotator")
    comparisons: list[Comparison] = []
    n_unlabelled = 0
    for (i, j), value in zip(pairs, labels, strict=True):
        p = read_label(value, column)
        if p is None:
            n_unlabelled += 1
        else:
            comparisons += soft_comparisons(i, j, p, annotator)
    return Datum(prompt_cell(record, prompts), texts, comparisons, n_unlabelled=n_unlabelled)


# ---------------------------------------------------------------------------------------------------- two responses
def labelled_pair(record: Record, *, prompts: Sequence[str], pair: tuple[str, str], labels: Sequence[str]) -> Datum:
    """Two responses in the columns ``pair``, and one label in each of the columns ``labels``."""
    prompt, responses = _prompt_and_two(record, prompts, pair)
    comparisons: list[Comparison] = []
    n_unlabelled = 0
    for column in labels:
        p = label_reader(column)(cell(record, column), column)
        if p is None:
            n_unlabelled += 1
        else:
            annotator = column if ANNOTATOR_COLUMN.fullmatch(column) else name_cell(record, "annotator")
            comparisons += soft_comparisons(0, 1, p, annotator)
    return Datum(prompt, responses, comparisons, n_unlabelled=n_unlabelled)


def label_reader(column: str) -> Callable[[object, str], float | None]:
    """The function that reads P(first preferred) from a cell of this label column."""
    if column in (*PROBABILITIES, "labels"):  # SHP's labels are 1 where the first is preferred, else 0
        return read_probability
    return read_choice if column in CHOICES else read_signed if column in SIGNED else read_label


def compared_pair(record: Record, *, prompts: Sequence[str], pair: tuple[str, str], verdict: tuple[str, ...]) -> Datum:
    """Two responses, and their scores in two columns, or 1 in one of three columns: first, second, tie."""
    prompt, responses = _prompt_and_two(record, prompts, pair)
    p = verdict_of(record, verdict)
    comparisons = [] if p is None else soft_comparisons(0, 1, p, name_cell(record, "annotator"))
    return Datum(prompt, responses, comparisons, n_unlabelled=int(p is None))


def verdict_of(record: Record, columns: tuple[str, ...]) -> float | None:
    """P(first preferred) of two scores, or of three columns (first, second, tie) of which one is 1. None: no label."""
    if len(columns) == 3:
        first, second, tie = (read_flag(record.get(name), name) for name in columns)
        if first + second + tie > 1:
            what = f"more than one of {', '.join(columns)} is 1"
            raise RecordError(what, column=columns[0], fix="1 in one of them, 0 in the others")
        return 0.5 + 0.5 * (first - second) if first or second or tie else None
    left, right = (score_of(record.get(name), name) for name in columns)
    return None if left is None or right is None else 1.0 if left > right else 0.5 if left == right else 0.0


def chosen_rejected(record: Record, *, prompts: Sequence[str], sides: tuple[str, str]) -> Datum:
    prompt, responses = _prompt_and_two(record, prompts, sides)
    return Datum(prompt, responses, [_chosen_over_rejected(record)])


def chosen_rejected_lists(record: Record, *, prompts: Sequence[str]) -> Datum:
    """Every chosen text is preferred to every rejected one; nothing is said of two on one side."""
    chosen, rejected = texts_cell(record, "chosen"), texts_cell(record, "rejected")
    annotator = name_cell(record, "annotator")
    comparisons = [
        Comparison(i, len(chosen) + j, 1.0, annotator) for i in range(len(chosen)) for j in range(len(rejected))
    ]
    return Datum(prompt_cell(record, prompts), [*chosen, *rejected], comparisons)


def _chosen_over_rejected(record: Record) -> Comparison:
    return Comparison(0, 1, 1.0, name_cell(record, "annotator"), margin_cell(record))


def _prompt_and_two(record: Record, prompts: Sequence[str], pair: tuple[str, str]) -> tuple[Prompt, list[str]]:
    """The prompt and two responses, which may be texts or messages that repeat the prompt (TRL, UltraFeedback)."""
    texts = [record.get(column) for column in pair]
    if prompts and not any([isinstance(value, list) or _is_message(value) for value in texts]):
        return prompt_cell(record, prompts), [text_cell(record, column) for column in pair]
    first, second = (_conversation(record, column) for column in pair)
    prompt = prompt_cell(record, prompts) if prompts else ""
    if isinstance(prompt, list) and first[: len(prompt)] == prompt == second[: len(prompt)]:
        n = len(prompt)
    else:
        n = _shared_messages(first, second)
        if n and isinstance(prompt, list):
            what = f"{pair[0]!r} and {pair[1]!r} do not start with the prompt's messages"
            raise RecordError(what, column=pair[0], fix="leave out 'prompt', or repeat its messages in both")
        prompt = first[:n] or (prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}])
    rests = (first[n:], second[n:])
    if any(len(rest) != 1 or rest[0]["role"] != "assistant" for rest in rests) or not (n or prompts):
        raise NoSharedPromptError("the two conversations must share all but one last assistant message")
    return prompt, [rest[0]["content"] for rest in rests]


def _is_message(value: object) -> bool:
    # A test against text comes first: one against Mapping takes much longer.
    return not isinstance(value, str) and isinstance(value, Mapping) and ("role" in value or "from" in value)


def _conversation(record: Record, column: str) -> list[dict[str, str]]:
    """The messages of a column; one message may stand without a list.

    A column ``turn`` (MT-bench, Chatbot Arena) says which answer of a longer conversation was judged: it is the last.
    """
    value = cell(record, column)
    messages = messages_from([value] if _is_message(value) else list_cell(record, column), column)
    turn = int(parsed_number(record.get("turn")) or 0)
    if column.startswith("conversation") and turn > 0:
        answers = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        return messages[: answers[turn - 1] + 1] if len(answers) > turn else messages
    return messages


def _shared_messages(first: list[dict[str, str]], second: list[dict[str, str]]) -> int:
    """How many messages two conversations share at their start, cut back to end before an assistant's turn."""
    n = 0
    while n < min(len(first), len(second)) - 1 and first[n] == second[n]:
        n += 1
    while n and first[n - 1]["role"] == "assistant":
        n -= 1
    return n


def transcripts(record: Record) -> Datum:
    """Anthropic's HH: the prompt ends with the last "Assistant:" that both transcripts share. It stays a text here."""
    chosen, rejected = text_cell(record, "chosen"), text_cell(record, "rejected")
    start = chosen.rfind(ASSISTANT_TURN, 0, common_prefix_length(chosen, rejected))
    if start < 0:
        raise NoSharedPromptError("the two transcripts share no turn that ends in 'Assistant:'")
    cut = start + len(ASSISTANT_TURN)
    return Datum(chosen[:cut], [chosen[cut:], rejected[cut:]], [_chosen_over_rejected(record)])


def implicit_prompt(record: Record) -> Datum:
    """Texts without a prompt column. The prompt is their common start, cut back to a whole word before both ends."""
    chosen, rejected = text_cell(record, "chosen"), text_cell(record, "rejected")
    cut = common_prefix_length(chosen, rejected)
    if not (chosen[cut : cut + 1].isspace() and rejected[cut : cut + 1].isspace()):
        cut = max((m.start() for m in re.finditer(r"\s", chosen[:cut])), default=0)
    cut = len(chosen[:cut].rstrip())
    while cut and not (chosen[cut:].strip() and rejected[cut:].strip()):  # one text is the start of the other
        cut = max((m.start() for m in re.finditer(r"\s", chosen[:cut].rstrip())), default=0)
        cut = len(chosen[:cut].rstrip())
    if not cut:
        raise NoSharedPromptError("the two texts share no first word")
    return Datum(chosen[:cut], [chosen[cut:], rejected[cut:]], [_chosen_over_rejected(record)])


def common_prefix_length(a: str, b: str) -> int:
    """Characters that two texts share at their start, by bisection over slices, which is fast on long texts.

    >>> common_prefix_length("the film was slow", "the film was odd")
    13
    """
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def parse_transcript(text: str) -> list[dict[str, str]] | None:
    r"""Messages of a "Human:/Assistant:" transcript that ends in an open "Assistant:". None where it is not one.

    Two turns in a row of one speaker (HH has some) become one message: chat templates want the speakers to alternate.

    >>> parse_transcript("Human: Hello!\n\nAssistant:")
    [{'role': 'user', 'content': 'Hello!'}]
    """
    parts = _TURN.split(text if text.startswith("\n\n") else "\n\n" + text)
    turns = list(zip(parts[1::2], parts[2::2], strict=True))
    if parts[0].strip() or len(turns) < 2 or turns[0][0] == "Assistant" or turns[-1][0] != "Assistant":
        return None
    if turns[-1][1].strip():  # an answer; Nectar's open turn ends in a space
        return None
    messages: list[dict[str, str]] = []
    for speaker, content in turns[:-1]:
        role = {"Human": "user", "Assistant": "assistant", "System": "system"}[speaker]
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + content.strip()
        else:
            messages.append({"role": role, "content": content.strip()})
    return messages if messages[-1]["role"] == "user" else None


def summaries(record: Record) -> Datum:
    """openai/summarize_from_feedback. As in the code of the paper (arXiv 2009.01325), the prompt ends in "TL;DR:"."""
    info, items = cell(record, "info"), list_cell(record, "summaries")
    if not isinstance(info, Mapping) or not all(isinstance(item, Mapping) for item in items):
        raise RecordError("'info' and each of 'summaries' must be objects", column="info")
    if info.get("post"):
        head = f"SUBREDDIT: r/{info['subreddit']}\n\n" if info.get("subreddit") else ""
        title = f"TITLE: {info['title']}\n\n" if info.get("title") else ""
        prompt = f"{head}{title}POST: {text_cell(info, 'post')}\n\nTL;DR:"
    else:
        prompt = f"Article:\n\n{article}\n\nTL;DR:" if (article := text_cell(info, "article")) else ""
    texts = [text_cell(item, "text") for item in items]
    texts = [text if not text or text[0].isspace() else " " + text for text in texts]  # it continues "TL;DR:"
    if len(texts) > 2:
        raise RecordError(f"{len(texts)} summaries, but 'choice' is between two", column="summaries")
    p = read_choice(cell(record, "choice"), "choice")
    comparisons = [] if p is None or len(texts) != 2 else soft_comparisons(0, 1, p, name_cell(record, "worker"))
    return Datum(prompt, texts, comparisons, n_unlabelled=int(p is None))
