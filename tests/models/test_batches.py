"""Many texts in one call of the tokenizer: the ids are those of its own call, and threads run inside it alone."""

from __future__ import annotations

import os

import pytest
from transformers import PreTrainedTokenizerFast

from toolkit.models import batches, tokenizer_threads
from toolkit.models.resolve import resolve
from toolkit.models.tokenizer import load_tokenizer

TEXTS = ["A film.", "", "caf\u00e9 \u2028 \U0001f600", "<|im_start|>user", " two  blanks ", "x" * 300] * 8


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return load_tokenizer(resolve("tiny"))


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_the_ids_are_those_of_the_tokenizers_call(
    tokenizer: PreTrainedTokenizerFast, special: bool, split: bool
) -> None:
    expected = tokenizer(TEXTS, add_special_tokens=special, split_special_tokens=split)["input_ids"]
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)  # leaves both set in the Rust part
    tokenizer("a", split_special_tokens=not split)
    ids = batches.ids_of_texts(tokenizer, TEXTS, add_special_tokens=special, split_special_tokens=split)
    assert ids == expected
    assert batches.ids_of_texts(tokenizer, []) == []


def test_a_tokenizer_that_reads_texts_in_its_own_way_is_called(tokenizer: PreTrainedTokenizerFast) -> None:
    class Lower(PreTrainedTokenizerFast):
        def __call__(self, text, **settings):  # type: ignore[no-untyped-def]
            return super().__call__([item.lower() for item in text], **settings)

    lower = Lower(tokenizer_object=tokenizer.backend_tokenizer)
    texts = ["A Film", "a film"]
    first, second = batches.ids_of_texts(lower, texts)
    assert first == second
    first, second = batches.ids_of_texts(tokenizer, texts)
    assert first != second


def test_threads_run_inside_alone_and_as_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def seen() -> tuple[str | None, str | None]:
        with tokenizer_threads.threads():
            inside = os.environ.get(tokenizer_threads.VARIABLE)
        return inside, os.environ.get(tokenizer_threads.VARIABLE)

    monkeypatch.delenv(tokenizer_threads._OURS, raising=False)  # of a command that another test ran
    monkeypatch.setenv(tokenizer_threads.VARIABLE, "false")
    tokenizer_threads.off_by_default()
    assert seen() == ("false", "false")
    monkeypatch.delenv(tokenizer_threads.VARIABLE)
    assert seen() == (None, None)
    tokenizer_threads.off_by_default()
    try:
        assert seen() == ("true", "false")
        if hasattr(os, "fork"):  # a fork has none of the threads that would do the work
            child = os.fork()
            if child == 0:
                os._exit(0 if seen() == ("false", "false") else 1)
            assert os.waitpid(child, 0)[1] == 0
        assert seen() == ("true", "false")
    finally:
        del os.environ[tokenizer_threads._OURS]
