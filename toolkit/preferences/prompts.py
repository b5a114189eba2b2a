"""Prompts without labels, from preference data of any format, from rows with a prompt, or from lines of text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from toolkit.errors import DataError
from toolkit.preferences import formats
from toolkit.preferences.cells import RecordError, name_cell, prompt_cell
from toolkit.preferences.loading import load
from toolkit.preferences.parsing import parse_transcript
from toolkit.preferences.reading import read_preferences
from toolkit.preferences.rows import Prompt, canonical_prompt


@dataclass(frozen=True)
class UnlabelledPrompt:
    """A prompt; ``group`` names others that are much like it, "" for none."""

    prompt: Prompt
    group: str = ""


def read_prompts(source: str, *, conversational: bool) -> list[UnlabelledPrompt]:
    """The prompts of a file, each once, in their order.

    ``source`` is preference data as :func:`toolkit.preferences.reading.read_preferences` takes it, data whose rows have
    a ``prompt`` and no preferences, or a ``.txt`` file with a prompt in each line. ``conversational`` says what the
    prompts have to be: chat messages, or text. A text becomes the user's message.

    Raises:
        DataError: no such source, no prompt in it, a wrong row, or messages where text is needed.
    """
    prompts: dict[str, UnlabelledPrompt] = {}
    for number, item in _of_source(source):
        prompt = item.prompt
        if conversational and isinstance(prompt, str):
            prompt = parse_transcript(prompt) or [{"role": "user", "content": prompt}]
        elif not conversational and not isinstance(prompt, str):
            raise DataError(
                "the prompt is chat messages, and those of the training data are text",
                where=f"{source}, row {number}",
                fix="write it as text, or set data.conversational: true",
            )
        prompts.setdefault(canonical_prompt(prompt), UnlabelledPrompt(prompt, item.group))
    if not prompts:
        raise DataError("there is no prompt", where=source)
    return list(prompts.values())


def _of_source(source: str) -> list[tuple[int, UnlabelledPrompt]]:
    """Numbered prompts, without those that are blank."""
    path = Path(source).expanduser()
    if path.suffix.lower() == ".txt" and path.is_file():
        lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        return [(number, UnlabelledPrompt(line.strip())) for number, line in lines if line.strip()]
    loaded = load(source, split="train", config=None, revision=None)
    sample = [record for _, record in loaded.records[:100]]
    names = tuple(dict.fromkeys(str(name) for record in sample for name in record))
    if "prompt" not in names or formats.recognise(names, sample) is not None:
        return [(row.source_row, UnlabelledPrompt(row.prompt, row.group)) for row in read_preferences(source).rows]
    prompts = []
    for number, record in loaded.records:
        try:
            prompt = prompt_cell(record, ["prompt"])
        except RecordError as error:
            where = f"{loaded.name}, {loaded.unit} {number}, column {error.column!r}"
            raise DataError(error.what, where=where, fix=error.fix) from error
        if not isinstance(prompt, str) or prompt.strip():
            prompts.append((number, UnlabelledPrompt(prompt, name_cell(record, formats.GROUP))))
    return prompts
