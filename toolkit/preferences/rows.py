"""The one shape of preference data: one prompt, K >= 2 responses, comparisons between them."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import Any, NamedTuple

from toolkit.files import written_whole

Prompt = str | list[dict[str, str]]
"""Plain text, or chat messages ``[{"role", "content"}...]`` that end before the assistant's turn."""
Record = Mapping[str, Any]


class Comparison(NamedTuple):
    """``responses[winner]`` was preferred over ``responses[loser]``, with this weight, by this annotator.

    ``margin`` is the least difference that their rewards should have (Touvron et al. 2023, equation 2). 0 where the
    data does not say.
    """

    winner: int
    loser: int
    weight: float = 1.0
    annotator: str = ""
    margin: float = 0.0


@dataclass(frozen=True)
class PreferenceRow:
    """One prompt with K >= 2 distinct responses. ``gold`` is the true reward of each, in simulation only.

    ``source_row`` is the 1-based row (of JSON lines the line) where the prompt first appears in the source. Rows of one
    ``group`` are much alike, and are held out together; "" for a row that is a group by itself.
    """

    prompt_id: str
    prompt: Prompt
    responses: list[str]
    comparisons: list[Comparison]
    gold: list[float] | None = None
    source_row: int = 0
    group: str = ""


def canonical_prompt(prompt: Prompt) -> str:
    """The JSON text that identifies a prompt: sorted keys, no spaces, ASCII."""
    if isinstance(prompt, str):
        return encode_basestring_ascii(prompt)
    # by hand: the JSON of a text alone takes a fraction of the time of json.dumps of a list of objects
    parts = [
        f'{{"content":{encode_basestring_ascii(m["content"])},"role":{encode_basestring_ascii(m["role"])}}}'
        for m in prompt
    ]
    return f"[{','.join(parts)}]"


def readable(prompt: Prompt) -> str:
    """A prompt as a person reads it."""
    return prompt if isinstance(prompt, str) else "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def prompt_id(prompt: Prompt) -> str:
    """First 16 hex digits of the sha256 of the prompt's canonical JSON."""
    return hashlib.sha256(canonical_prompt(prompt).encode()).hexdigest()[:16]


def soft_comparisons(i: int, j: int, p: float, annotator: str = "") -> list[Comparison]:
    """``P(i preferred over j) = p`` as comparisons: one for p of 0 or 1, else two with weights p and 1 - p.

    >>> soft_comparisons(0, 1, 0.5) == [Comparison(0, 1, weight=0.5), Comparison(1, 0, weight=0.5)]
    True
    """
    if p == 1.0:
        return [Comparison(i, j, 1.0, annotator)]
    if 1.0 - p == 1.0:  # 0, or too small for the other weight to differ from 1
        return [Comparison(j, i, 1.0, annotator)]
    return [Comparison(i, j, p, annotator), Comparison(j, i, 1.0 - p, annotator)]


def row_to_dict(row: PreferenceRow) -> dict[str, Any]:
    """The native format of a row."""
    record: dict[str, Any] = {
        "prompt": row.prompt,
        "responses": row.responses,
        "comparisons": [
            {"winner": c.winner, "loser": c.loser, "weight": c.weight, "annotator": c.annotator}
            | ({"margin": c.margin} if c.margin else {})
            for c in row.comparisons
        ],
    }
    if row.gold is not None:
        record["gold"] = row.gold
    if row.source_row:
        record["source_row"] = row.source_row
    if row.group:
        record["group"] = row.group
    return record


def write_native(rows: Iterable[PreferenceRow], path: str | Path, source: str = "") -> None:
    """Write gzipped JSON lines in the native format. The file is whole or absent. ``source`` is where rows are from.

    Equal rows give equal bytes: there is no time and no file name inside.
    """
    with written_whole(Path(path)) as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as out:
        for row in rows:
            record = row_to_dict(row) | ({"source_file": source} if source and row.source_row else {})
            out.write(json.dumps(record).encode() + b"\n")
