"""Which prompt a file means: the ids under which duel, files of battles and AlpacaEval have a prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from toolkit.preferences.rows import Prompt, prompt_id, readable


def plain_prompt(prompt: Prompt) -> Prompt:
    """A prompt of one user's message as its text, so that a text and a message of it are one prompt."""
    single = not isinstance(prompt, str) and len(prompt) == 1 and prompt[0]["role"] == "user"
    return prompt[0]["content"] if single and not isinstance(prompt, str) else prompt


def other_ids(prompt: Prompt) -> list[str]:
    """Under which ids files of others have a prompt: that of its text alone, and AlpacaEval's of an instruction.

    >>> other_ids("Why?") == other_ids([{"role": "user", "content": "Why?"}])[:2]
    True
    """
    text = plain_prompt(prompt)
    return [prompt_id(text), *dict.fromkeys(map(alpaca_eval_id, (readable(text), readable(prompt))))]


def ids_of_prompts(prompts: Iterable[tuple[str, Prompt]]) -> dict[str, str]:
    """The id of each of these (id, prompt), by that id and by each other that files have it under.

    Another id that two of the prompts have names neither.
    """
    own: dict[str, str] = {}
    others: dict[str, set[str]] = {}
    for key, prompt in prompts:
        own[key] = key
        for name in other_ids(prompt):
            others.setdefault(name, set()).add(key)
    return {name: key for name, keys in others.items() if len(keys) == 1 for key in keys} | own


def alpaca_eval_id(instruction: str) -> str:
    """AlpacaEval's id of an instruction."""
    return hashlib.sha1(instruction.encode(), usedforsecurity=False).hexdigest()[:12]
