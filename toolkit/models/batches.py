"""The ids of many texts in one call of the tokenizer's Rust part, on all cores."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from toolkit.models.tokenizer_threads import threads


def ids_of_texts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    add_special_tokens: bool = False,
    split_special_tokens: bool | None = None,
) -> list[list[int]]:
    """What the tokenizer's call gives as ``input_ids`` of these texts.

    The call also makes masks and warnings for each text, in Python, which takes half of its time. They are left out
    where the class of the tokenizer changes nothing about the call.
    """
    encodings = encodings_of_texts(
        tokenizer, texts, add_special_tokens=add_special_tokens, split_special_tokens=split_special_tokens
    )
    return [ids_in(encoding) for encoding in encodings]


def encodings_of_texts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    add_special_tokens: bool = False,
    split_special_tokens: bool | None = None,
) -> Sequence[list[int] | Encoding]:
    """The ids of :func:`ids_of_texts`, where possible as the Rust part has them.

    Their number is known without a list of them in Python, which takes a quarter of the time of tokenising.
    """
    if not texts:
        return []
    settings = {"add_special_tokens": add_special_tokens}
    if split_special_tokens is not None:  # else the tokenizer's own
        settings["split_special_tokens"] = split_special_tokens
    with threads():
        if not _is_plain(type(tokenizer)):
            ids: list[list[int]] = tokenizer(list(texts), **settings)["input_ids"]
            return ids
        # Sets what the Rust part does about special tokens, and takes away a truncation or padding that a file sets.
        tokenizer(texts[0], **settings)
        encodings: list[Encoding] = tokenizer.backend_tokenizer.encode_batch_fast(
            list(texts), add_special_tokens=add_special_tokens
        )
    return encodings


def ids_in(encoding: list[int] | Encoding) -> list[int]:
    """The ids of a text as a list."""
    return encoding if isinstance(encoding, list) else encoding.ids


def _is_plain(kind: type) -> bool:
    """Whether a class of tokenizers has the call of transformers' base class: it adds data alone."""
    if not issubclass(kind, PreTrainedTokenizerFast):
        return False
    own = kind.__mro__[: kind.__mro__.index(PreTrainedTokenizerFast)]
    return not any(inspect.isfunction(value) and name != "__init__" for cls in own for name, value in vars(cls).items())
