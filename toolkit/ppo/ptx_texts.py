"""Texts whose likelihood PPO mixes into its loss, in a run: those that SFT imitated, or a source that a key names."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from toolkit.errors import DataError
from toolkit.models.encoding import TextEncoder, Tree, text_encoder
from toolkit.models.rendering import refusals_at
from toolkit.preferences import formats
from toolkit.preferences.cells import RecordError, messages_from, prompt_cell, text_cell
from toolkit.preferences.loading import SourceRecords, decoded, load, local_path
from toolkit.preferences.reading import column_names, read_preferences
from toolkit.preferences.refusals import check_unicode, prompt_texts, row_error
from toolkit.preferences.rows import PreferenceRow, Record, prompt_id
from toolkit.preferences.splits import imitated

TEXT, PROMPT, COMPLETION = "text", "prompt", "completion"


def imitated_texts(
    rows: Sequence[PreferenceRow], train_on: str, encoder: TextEncoder, max_response_tokens: int, seed: int
) -> list[Tree]:
    """A prompt with one response for each response that SFT imitates, in a random order."""
    trees = [
        encoder.encode(row.prompt, [row.responses[i]], max_response_tokens).tree
        for row in rows
        for i in imitated(row, train_on)
    ]
    random.Random(f"{seed}/ptx").shuffle(trees)
    return trees


def texts_of_source(
    source: str,
    held_out: Sequence[PreferenceRow],
    encoder: TextEncoder,
    limits: tuple[int, int],
    seed: int,
) -> list[Tree]:
    """The texts of ``source`` in a random order: rows with a ``text``, rows with ``prompt`` and ``completion``,
    preference data (each prompt's preferred response), or a .txt file with a text in each line.

    A text without a prompt counts from its second token on (from its first behind a BOS), and ends with the
    tokenizer's EOS. ``limits``: most tokens of a prompt and of a response; a text may have both together, and what is
    longer is cut, but a longer prompt is left out. Blank texts and held-out prompts are left out.

    Raises DataError for a source that cannot be read, or has no text that is left.
    """
    max_prompt, max_response = limits
    names = {row.prompt_id for row in held_out}
    trees = [
        tree
        for tree, prompt in _trees(source, encoder, max_prompt + max_response, max_response)
        if prompt not in names and 0 < len(tree.prompt_ids) <= max_prompt and tree.response_ids[0]
    ]
    if not trees:
        fix = "texts that are not blank, whose prompts are not held out and not longer than data.max_prompt_tokens"
        raise DataError("no text is left to mix in", where=f"ppo.ptx_texts: {source}", fix=fix)
    random.Random(f"{seed}/ptx").shuffle(trees)
    return trees


def _trees(source: str, encoder: TextEncoder, max_text: int, max_response: int) -> Iterator[tuple[Tree, str]]:
    """Each text that is not blank as ids, with the id of its prompt ("" for none)."""
    path = local_path(source)
    if path.suffix.lower() == ".txt" and path.is_file():
        for line in decoded(path.read_bytes(), str(path)).split("\n"):
            if line.strip():
                yield _text(line.strip(), encoder, max_text), ""
        return
    loaded = load(source, split="train", config=None, revision=None)
    names = column_names(loaded)
    if formats.recognise(names, [record for _, record in loaded.records[:100]]) is None:
        if TEXT not in names and not {PROMPT, COMPLETION} <= set(names):
            fix = "rows with text, rows with prompt and completion, preference data, or a .txt file"
            raise DataError(f"the columns are {sorted(names)}", where=f"ppo.ptx_texts: {source}", fix=fix)
        yield from _of_records(loaded, encoder, max_text, max_response)
        return
    for row in read_preferences(source).rows:
        [best] = imitated(row, "preferred")
        with refusals_at(loaded.place(row.source_row)):
            own = text_encoder(encoder.tokenizer, row.prompt)
            yield own.encode(row.prompt, [row.responses[best]], max_response).tree, row.prompt_id


def _of_records(
    loaded: SourceRecords, encoder: TextEncoder, max_text: int, max_response: int
) -> Iterator[tuple[Tree, str]]:
    for number, record in loaded.records:
        try:
            prompt = prompt_cell(record, [PROMPT]) if COMPLETION in record else ""
            text = _completion(record) if COMPLETION in record else text_cell(record, TEXT)
        except RecordError as error:
            raise row_error(loaded, number, error.what, column=error.column, fix=error.fix) from error
        check_unicode(loaded, number, [*prompt_texts(prompt), text], COMPLETION if COMPLETION in record else TEXT)
        if not text.strip():
            continue
        if not prompt:
            yield _text(text, encoder, max_text), ""
            continue
        with refusals_at(loaded.place(number)):
            own = text_encoder(encoder.tokenizer, prompt)
            yield own.encode(prompt, [text], max_response).tree, prompt_id(prompt)


def _completion(record: Record) -> str:
    """A completion as text; of messages the last one, which is the assistant's."""
    value = record[COMPLETION]
    if not isinstance(value, list):
        return text_cell(record, COMPLETION)
    messages = messages_from(value, COMPLETION)
    if not messages or messages[-1]["role"] != "assistant":
        raise RecordError("the completion does not end with an assistant message", column=COMPLETION)
    return messages[-1]["content"]


def _text(text: str, encoder: TextEncoder, max_tokens: int) -> Tree:
    """A text by itself: its first id is what the others follow."""
    ids = encoder.special_tokens.text_ids(text, opening=True)
    eos = encoder.tokenizer.eos_token_id
    if eos is not None and ids[-1:] != [eos]:
        ids = [*ids, int(eos)]
    return Tree(ids[:1], [ids[1:max_tokens]])
