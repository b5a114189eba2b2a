"""Texts whose likelihood PPO mixes into its loss, in a run: those that SFT imitated, or a source that a key names."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from toolkit.errors import DataError
from toolkit.models.encoding import TextEncoder, Tree
from toolkit.models.rendering import refusals_at
from toolkit.preferences import formats
from toolkit.preferences.cells import RecordError, messages_from, name_cell, text_cell
from toolkit.preferences.columns import GROUP, Columns, Format
from toolkit.preferences.loading import SourceRecords, decoded, load, local_path
from toolkit.preferences.parsing import last_turn
from toolkit.preferences.prompts import of_kind
from toolkit.preferences.reading import SAMPLE, column_names, parse_record, read_preferences
from toolkit.preferences.refusals import check_unicode, prompt_texts, row_error
from toolkit.preferences.rows import PreferenceRow, Prompt, Record, prompt_id
from toolkit.preferences.single_rows import prompt_rows
from toolkit.preferences.splits import imitated

TEXT, PROMPT, COMPLETION = "text", "prompt", "completion"


def imitated_texts(
    rows: Sequence[PreferenceRow], train_on: str, encoder: TextEncoder, max_response_tokens: int, seed: int
) -> list[Tree]:
    """A prompt with one response for each response that SFT imitates, in a random order.

    Raises DataError where it imitates none.
    """
    trees = [
        encoder.encode(row.prompt, [row.responses[i]], max_response_tokens).tree
        for row in rows
        for i in imitated(row, train_on)
    ]
    if not trees:
        fix = "sft.train_on: all, or name ppo.ptx_texts"
        raise DataError("no training prompt has a preferred response to mix in", where="ppo.ptx_coef", fix=fix)
    random.Random(f"{seed}/ptx").shuffle(trees)
    return trees


class _Text(NamedTuple):
    """A text as ids (None where its prompt has no preferred response), and its prompt's id and group, "" for none."""

    tree: Tree | None
    prompt: str = ""
    group: str = ""


def texts_of_source(
    source: str,
    held_out: Sequence[PreferenceRow],
    encoder: TextEncoder,
    limits: tuple[int, int],
    seed: int,
) -> tuple[list[Tree], str]:
    """The texts of ``source`` in a random order, and a line that counts them and those that are left out: rows with a
    ``text``, rows with ``prompt`` and ``completion``, preference data (each prompt's preferred response), or a .txt
    file with a text in each line. Prompts are of the training data's kind, as
    :func:`toolkit.preferences.prompts.of_kind` makes them.

    A text without a prompt counts from its second token on (from its first behind a BOS), and ends with the
    tokenizer's EOS. ``limits``: most tokens of a prompt and of a response; a text may have both together, and what is
    longer is cut, but a longer prompt is left out. So are blank texts, held-out prompts and their groups.

    Raises DataError for a source that cannot be read, messages where the training data is text, or no text left.
    """
    max_prompt, max_response = limits
    names, groups = {row.prompt_id for row in held_out}, {row.group for row in held_out if row.group}
    trees, left_out = [], Counter[str]()
    for tree, name, group in _texts(source, encoder, max_prompt + max_response, max_response):
        if name in names or group in groups:
            left_out["held out"] += 1
        elif tree is None:
            left_out["without a preferred response"] += 1
        elif len(tree.prompt_ids) > max_prompt:
            left_out[f"with more than {max_prompt} tokens in the prompt"] += 1
        elif not (tree.prompt_ids and tree.response_ids[0]):
            left_out["of a single token"] += 1
        else:
            trees.append(tree)
    counts = ", ".join(f"{n} {reason}" for reason, n in left_out.items()) or "none"
    if not trees:
        fix = f"texts that are not blank, whose prompts are neither held out nor too long; left out: {counts}"
        raise DataError("no text is left to mix in", where=f"ppo.ptx_texts: {source}", fix=fix)
    random.Random(f"{seed}/ptx").shuffle(trees)
    return trees, f"{len(trees)} texts of {source}; left out: {counts}"


def _texts(source: str, encoder: TextEncoder, max_text: int, max_response: int) -> Iterator[_Text]:
    """Each text that is not blank."""
    path = local_path(source)
    if path.suffix.lower() == ".txt" and path.is_file():
        for line in decoded(path.read_bytes(), str(path)).split("\n"):
            if line.strip():
                yield _Text(_alone(line.strip(), encoder, max_text))
        return
    loaded = load(source, split="train", config=None, revision=None)
    names = column_names(loaded)
    recognised = formats.recognise(names, [record for _, record in loaded.records[:SAMPLE]])
    if recognised is None:
        if TEXT not in names and not {PROMPT, COMPLETION} <= set(names):
            fix = "rows with text, rows with prompt and completion, preference data, or a .txt file"
            raise DataError(f"the columns are {sorted(names)}", where=f"ppo.ptx_texts: {source}", fix=fix)
        columns = Columns(names, [record for _, record in loaded.records[:SAMPLE]])
        asked = prompt_rows(columns, text_only=not encoder.conversational)
        yield from _of_records(loaded, asked, encoder, max_text, max_response)
        return
    # Transcripts stay text beside training data that is text; other data is what it is.
    leave = False if recognised.name.endswith("transcripts") else None
    for row in read_preferences(source, conversational=encoder.conversational or leave).rows:
        place, preferred = loaded.place(row.source_row), imitated(row, "preferred")
        prompt = of_kind(row.prompt, encoder.conversational, place)
        tree = _continued(prompt, row.responses[preferred[0]], encoder, max_response, place) if preferred else None
        yield _Text(tree, row.prompt_id, row.group)


def _of_records(
    loaded: SourceRecords, asked: Format | None, encoder: TextEncoder, max_text: int, max_response: int
) -> Iterator[_Text]:
    for number, record in loaded.records:
        try:
            prompt = parse_record(asked, record).prompt if asked is not None and COMPLETION in record else ""
            text = _completion(record) if COMPLETION in record else text_cell(record, TEXT)
            group = name_cell(record, GROUP)
        except RecordError as error:
            raise row_error(loaded, number, error.what, column=error.column, fix=error.fix) from error
        check_unicode(loaded, number, [*prompt_texts(prompt), text], COMPLETION if COMPLETION in record else TEXT)
        if not text.strip():
            continue
        if not last_turn(prompt):
            yield _Text(_alone(text, encoder, max_text), group=group)
            continue
        place = loaded.place(number)
        own = of_kind(prompt, encoder.conversational, place)
        if own is not prompt:  # a message has no blank before its text
            text = text.strip()
        yield _Text(_continued(own, text, encoder, max_response, place), prompt_id(own), group)


def _continued(prompt: Prompt, text: str, encoder: TextEncoder, max_response: int, place: str) -> Tree:
    with refusals_at(place):
        return encoder.encode(prompt, [text], max_response).tree


def _completion(record: Record) -> str:
    """A completion as text; of messages the last one, which is the assistant's."""
    value = record[COMPLETION]
    if not isinstance(value, list):
        return text_cell(record, COMPLETION)
    messages = messages_from(value, COMPLETION)
    if not messages or messages[-1]["role"] != "assistant":
        raise RecordError("the completion does not end with an assistant message", column=COMPLETION)
    return messages[-1]["content"]


def _alone(text: str, encoder: TextEncoder, max_tokens: int) -> Tree:
    """A text by itself: its first id is what the others follow."""
    ids = encoder.special_tokens.text_ids(text, opening=True)
    eos = encoder.tokenizer.eos_token_id
    if eos is not None and ids[-1:] != [eos]:
        ids = [*ids, int(eos)]
    return Tree(ids[:1], [ids[1:max_tokens]])
