"""Text that follows other text. SentencePiece tokenizers put a blank before a text that they read alone.

Behind a prompt that blank is wrong: " there was" would have a bare blank in front, and a sampled " there" would lose
its own. So such a tokenizer reads a response behind an anchor, whose ids are taken away again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from toolkit.models.batches import ids_of_texts

Tokenise = Callable[[Sequence[str]], list[list[int]]]
# A text is read behind the first of these that does not melt into it.
ANCHORS = ("\n", "|", "a")
LETTER = "a"  # ids are decoded behind a letter: a byte in front could become part of a character


@dataclass(frozen=True)
class Joiner:
    """Tokenises and decodes text as what follows a prompt."""

    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def adds_blank(self) -> bool:
        """Whether this tokenizer reads a text alone otherwise than behind another."""
        return self._behind(ANCHORS[0], LETTER, self._ids) not in (None, self._ids([LETTER])[0])

    def encode(self, texts: Sequence[str], tokenise: Tokenise | None = None) -> list[list[int]]:
        """The ids of each text behind a prompt. ``tokenise`` gives those of texts that are read alone."""
        tokenise = tokenise or self._ids
        if not texts or not self.adds_blank:
            return tokenise(texts)
        anchor = ANCHORS[0]
        [opening] = self._ids([anchor])
        behind = tokenise([anchor + text for text in texts])
        return [
            ids[len(opening) :] if ids[: len(opening)] == opening else self._behind_another(text, tokenise)
            for ids, text in zip(behind, texts, strict=True)
        ]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids behind a prompt, with the blank that it begins with."""
        if not self.adds_blank:
            return str(self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))
        [opening] = self._ids([LETTER])
        head = str(self.tokenizer.decode(opening))
        text = str(self.tokenizer.decode([*opening, *ids], skip_special_tokens=skip_special_tokens))
        return text.removeprefix(head)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return ids_of_texts(self.tokenizer, texts)

    def _behind(self, anchor: str, text: str, tokenise: Tokenise) -> list[int] | None:
        """The ids of a text behind an anchor; None where they melt."""
        opening, both = tokenise([anchor, anchor + text])
        return both[len(opening) :] if both[: len(opening)] == opening else None

    def _behind_another(self, text: str, tokenise: Tokenise) -> list[int]:
        """The ids of a text that melts into the first anchor; those that it has alone where it melts into all."""
        separate = (self._behind(anchor, text, tokenise) for anchor in ANCHORS[1:])
        return next((ids for ids in separate if ids is not None), tokenise([text])[0])
