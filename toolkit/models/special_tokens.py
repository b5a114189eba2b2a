"""Special tokens that stand in data are text: they open no turn and end no response.

A tokenizer turns the characters of ``<|im_end|>`` into the token that ends a turn, whoever wrote them. Only the chat
template may write such tokens here, and text that was rendered before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from toolkit.models.batches import ids_of_texts
from toolkit.models.rendering import Markers, rendered

# Some models' turns are opened by added tokens that are not marked as special. They are written like this.
_LIKE_A_TURN = re.compile(r"<[|\uff5c].*[|\uff5c]>|</?(start|end)_of_\w+>")
_PLACE = "duelspecialtoken"
Item = TypeVar("Item")


def mostly_together(
    items: Sequence[Item],
    is_marked: Callable[[Item], bool],
    alone: Callable[[Item], list[int]],
    together: Callable[[list[Item]], Sequence[list[int]]],
    *,
    clean: bool = False,
) -> list[list[int]]:
    """The ids of items in their order: of the marked ones one by one, of the others from one call.

    ``clean``: none is marked, which is known before.
    """
    if clean:
        return list(together(list(items)) if items else ())
    marks = [is_marked(item) for item in items]
    others = [item for item, marked in zip(items, marks, strict=True) if not marked]
    ids = iter(together(others) if others else ())
    return [alone(item) if marked else next(ids) for item, marked in zip(items, marks, strict=True)]


@dataclass(frozen=True)
class SpecialTokens:
    """The tokens of a tokenizer that text must not become."""

    tokenizer: PreTrainedTokenizerBase

    @property
    def end_id(self) -> int | None:
        """The EOS."""
        end: int | None = self.tokenizer.eos_token_id
        return end

    @cached_property
    def names(self) -> dict[str, int]:
        """How each of them is written -> its id."""
        added = self.tokenizer.added_tokens_decoder
        special = set(self.tokenizer.all_special_ids) | {self.end_id}
        members = [
            i for i, token in added.items() if token.special or i in special or _LIKE_A_TURN.match(token.content)
        ]
        return {added[i].content: i for i in members if added[i].content.strip()}

    @cached_property
    def _written(self) -> re.Pattern[str]:
        longest_first = sorted(self.names, key=len, reverse=True)
        # A tokenizer without any has a pattern that matches nowhere.
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @cached_property
    def _first_characters(self) -> tuple[str, ...]:
        return tuple({name[0] for name in self.names})

    def stand_in(self, text: str) -> bool:
        """Whether a text has one of them."""
        # Most texts have none of the characters that they begin with, which is known faster than a pattern fails.
        return any(map(text.__contains__, self._first_characters)) and self._written.search(text) is not None

    def stand_in_any(self, texts: Sequence[str]) -> bool:
        """Whether one of the texts may have one of them: they are looked through as one text, which is fast."""
        return self.stand_in("\n".join(texts))

    def stand_in_messages(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        """Whether a text of a conversation has one of them."""
        return any(self.stand_in(value) for m in messages for value in m.values() if isinstance(value, str))

    def opens(self, text: str) -> bool:
        """Whether a text was rendered before: it begins with the BOS, or with a token that the chat template writes."""
        match = self._written.match(text.lstrip())
        if match is None or self.names[match[0]] == self.end_id:
            return False
        return match[0] == self.tokenizer.bos_token or match[0] in str(self.tokenizer.chat_template or "")

    @cached_property
    def ends(self) -> tuple[str, ...]:
        """How the tokens are written that end a response: the EOS, and the one that the chat template puts there."""
        return tuple(end for end in Markers(self.tokenizer).ends if end in self.names)

    def ends_stand_in(self, texts: Sequence[str]) -> bool:
        """Whether one of the texts may hold an end: they are looked through as one text, which is fast."""
        together = "\n".join(texts)
        return any(end in together for end in self.ends)

    def without_end(self, text: str) -> str:
        """A response without the ends that it ends with: some templates write their own, and then the EOS."""
        while (end := next((end for end in self.ends if text.rstrip().endswith(end)), None)) is not None:
            text = text.rstrip().removesuffix(end)
        return text

    def text_ids(self, text: str, *, opening: bool = False) -> list[int]:
        """Ids of a text in which special tokens are text. ``opening``: with what the tokenizer puts before a text."""
        ids = self.tokenizer(text, add_special_tokens=opening, split_special_tokens=True)["input_ids"]
        if not self.stand_in(text):
            return list(ids)
        bare = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if not set(bare) & set(self.names.values()):
            return list(ids)
        # Added tokens that are not marked as special stay tokens: each is cut behind its first character.
        pieces = [piece for piece in re.split(f"({self._written.pattern})", text) if piece]
        cut = [part for p in pieces for part in ((p[:1], p[1:]) if self.stand_in(p) else (p,)) if part]
        around = self.tokenizer("", add_special_tokens=opening)["input_ids"]
        return [*around, *(i for part in cut for i in self.tokenizer(part, add_special_tokens=False)["input_ids"])]

    def texts_ids(self, texts: Sequence[str], *, opening: bool = False) -> list[list[int]]:
        """:meth:`text_ids` of many texts, those without special tokens in one call of the tokenizer."""
        return mostly_together(
            texts,
            self.stand_in,
            lambda marked: self.text_ids(marked, opening=opening),
            lambda others: ids_of_texts(self.tokenizer, others, add_special_tokens=opening, split_special_tokens=True),
            clean=not self.stand_in_any(texts),
        )

    def conversation_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of a conversation up to the response: the chat template's special tokens are tokens, the others text."""
        literals: list[str] = []

        def place(match: re.Match[str]) -> str:
            literals.append(match[0])
            return f"{mark}{len(literals) - 1}x"

        if not self.stand_in_messages(messages):
            return self._template_ids(self._rendered(messages))
        texts = [value for message in messages for value in message.values() if isinstance(value, str)]
        mark = _PLACE
        while any(mark in text for text in texts):
            mark += "x"
        safe = [
            {name: self._written.sub(place, value) if isinstance(value, str) else value for name, value in m.items()}
            for m in messages
        ]
        pieces = re.split(f"{mark}(\\d+)x", self._rendered(safe))
        ids = self._template_ids(pieces[0])
        for number, text in zip(pieces[1::2], pieces[2::2], strict=True):
            ids += self.text_ids(literals[int(number)]) + self._template_ids(text)
        return ids

    def conversations_ids(
        self, conversations: Sequence[Sequence[Mapping[str, Any]]], rendered: Sequence[str]
    ) -> list[list[int]]:
        """:meth:`conversation_ids` of many conversations, of which ``rendered`` has what the template writes.

        Those without special tokens are read in one call of the tokenizer.
        """
        return mostly_together(
            list(zip(conversations, rendered, strict=True)),
            lambda item: not item[1] or self.stand_in_messages(item[0]),
            lambda item: self.conversation_ids(item[0]),
            lambda items: ids_of_texts(self.tokenizer, [text for _, text in items]),
        )

    def _rendered(self, messages: Sequence[Mapping[str, Any]]) -> str:
        return rendered(self.tokenizer, messages)

    def _template_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []
