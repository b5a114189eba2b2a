"""What a record holds and no model here sees: images, tools, tool calls, system columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from toolkit.preferences.rows import Record

# Columns that some data sets have and that no model here reads. System texts and earlier turns are read with chat
# messages, and are named where the prompts stay text.
UNSEEN_COLUMNS = frozenset(
    ("image", "images", "video", "videos", "audio", "audios", "tools", "functions", "tool_calls", "documents")
    + ("system", "system_prompt", "system_message", "history")
)
# Of a message, beside its role and content.
UNSEEN_KEYS = ("tool_calls", "function_call", "images", "audio", "reasoning_content", "thinking")
# The types of the parts of a message that are text.
TEXT_PARTS = ("text", "input_text", "output_text")


def unseen_parts(record: Record, read_columns: frozenset[str]) -> Iterator[str]:
    """Names of what a record holds and no model here sees: columns, parts of a message's content, tool calls.

    >>> message = {"role": "user", "content": [{"type": "image", "url": "a.png"}]}
    >>> list(unseen_parts({"prompt": [message], "tools": ["f"]}, frozenset(["prompt"])))
    ["a part of type 'image'", "column 'tools'"]
    """
    for name, value in record.items():
        if not value:
            continue
        if name in UNSEEN_COLUMNS and name not in read_columns:
            yield f"column {name!r}"
        elif isinstance(value, list) and name in read_columns:
            for message in value:
                if isinstance(message, Mapping):
                    yield from _unseen_in_message(message)


def _unseen_in_message(message: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"{key!r} of a message" for key in UNSEEN_KEYS if message.get(key))
    content = message.get("content")
    for part in content if isinstance(content, list) else ():
        if isinstance(part, Mapping) and (kind := part.get("type", "text")) not in TEXT_PARTS:
            yield f"a part of type {kind!r}"
