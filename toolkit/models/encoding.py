"""From preference rows to token ids: prompt and response apart, joined as ids, an EOS at the end of a response."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from toolkit.errors import ModelError
from toolkit.models.batches import encodings_of_texts, ids_in, ids_of_texts
from toolkit.models.joining import Joiner
from toolkit.models.rendering import LAST_CHARACTERS, Markers, answers_after_blank, render_prompt, rendered_prompts
from toolkit.models.special_tokens import SpecialTokens, mostly_together
from toolkit.models.tokenizer import require_chat_template, response_end
from toolkit.preferences.rows import Prompt, readable

NOT_WHOLE = "\ufffd"  # what a decoder writes for bytes that are no whole character


@dataclass(frozen=True)
class Tree:
    """One prompt and its responses, as token ids. A response ends with an EOS unless it was truncated."""

    prompt_ids: list[int]
    response_ids: list[list[int]]

    def __len__(self) -> int:
        return len(self.prompt_ids) + sum(len(ids) for ids in self.response_ids)

    @property
    def depth(self) -> int:
        """Tokens of the prompt and its longest response: how far positions go."""
        return len(self.prompt_ids) + max(map(len, self.response_ids), default=0)

    def inputs(self, last_tokens: bool) -> Tree:
        """What a model reads of it. Nothing is predicted from the last token of a response: only rewards need it."""
        return self if last_tokens else Tree(self.prompt_ids, [ids[:-1] for ids in self.response_ids])


@dataclass(frozen=True)
class Encoded:
    """A row as token ids. ``truncated[k]`` says that response k was cut at the limit and has no EOS."""

    tree: Tree
    truncated: list[bool]


def is_conversation(prompt: Prompt) -> bool:
    return not isinstance(prompt, str)


@dataclass(frozen=True)
class PairMarks:
    """The special tokens of an encoder around a pair of texts: before the first, between them, behind the second."""

    opening: list[int]
    middle: list[int]
    end: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> PairMarks:
        """Those of a tokenizer. Raises ModelError where it puts none behind the second text."""
        word = list(tokenizer("word", add_special_tokens=False)["input_ids"])
        ids, n = list(tokenizer("word", "word")["input_ids"]), len(word)
        starts = [i for i in range(len(ids)) if ids[i : i + n] == word]
        if len(starts) < 2 or starts[-1] + n == len(ids):
            raise ModelError(
                "the tokenizer of this encoder marks no end of a pair of texts", where=str(tokenizer.name_or_path)
            )
        first, second = starts[0], starts[-1]
        return cls(ids[:first], ids[first + n : second], ids[second + n])


def plain_text(prompt: Prompt) -> str:
    """A prompt for a model without turns. A single question stands without its role."""
    if not isinstance(prompt, str) and len(prompt) == 1:
        return str(prompt[0]["content"])
    return readable(prompt)


@dataclass(frozen=True)
class CountedResponses:
    """The ids of responses, with an end and cut at ``max_tokens``, of which mostly the number is asked for."""

    encodings: Sequence[list[int] | Encoding]
    end_id: int
    max_tokens: int

    @cached_property
    def lengths(self) -> list[int]:
        """Ids of each, with its end, at most ``max_tokens``."""
        return [min(len(encoding) + 1, self.max_tokens) for encoding in self.encodings]

    @property
    def n_cut(self) -> int:
        """Responses that do not fit with their end."""
        return sum(len(encoding) + 1 > self.max_tokens for encoding in self.encodings)

    def equal(self, first: int, second: int) -> bool:
        """Whether two of them have the same ids."""
        if self.lengths[first] != self.lengths[second]:
            return False
        one, other = (ids_in(self.encodings[k]) for k in (first, second))
        return ended(one, self.end_id, self.max_tokens) == ended(other, self.end_id, self.max_tokens)


def ended(response: list[int], end_id: int, max_tokens: int) -> list[int]:
    """The ids of a response with its end, or cut at ``max_tokens`` without one."""
    return [*response, end_id] if len(response) < max_tokens else response[:max_tokens]


@dataclass(frozen=True)
class TextEncoder:
    """Turns the text of a data set into token ids, and ids into text; made by :func:`text_encoder`.

    Prompt and response are tokenised apart and joined as ids, so that no token crosses the border between them. A
    response is read as what follows a prompt (:mod:`toolkit.models.joining`). With ``pair`` an encoder reads them as a
    pair of texts. ``example`` is a text prompt of the data set, which shows whether that was rendered before.
    """

    tokenizer: PreTrainedTokenizerBase
    conversational: bool
    pair: PairMarks | None = None
    example: str = ""

    @cached_property
    def end_id(self) -> int:
        """The id that ends a response. Text that the chat template rendered before ends as a message does.

        Raises ModelError where the tokenizer has none.
        """
        if self.pair is not None:
            return self.pair.end
        return response_end(self.tokenizer, self.conversational or self._was_rendered)

    @cached_property
    def _was_rendered(self) -> bool:
        """Whether the chat template wrote the turns of the example. A BOS alone can stand before any text."""
        if not self.tokenizer.chat_template or not self.special_tokens.opens(self.example):
            return False
        return any(turn in self.example for turn in Markers(self.tokenizer).turns)

    @cached_property
    def special_tokens(self) -> SpecialTokens:
        return SpecialTokens(self.tokenizer)

    @cached_property
    def _joiner(self) -> Joiner:
        return Joiner(self.tokenizer)

    @cached_property
    def lead(self) -> str:
        """The blank that the template writes before an answer, where the tokenizer would not add it by itself.

        Llama 2's template is an example. Other tokenizers begin a response with its own first character.
        """
        if self.pair is not None:
            return ""
        return " " if self.conversational and self._joiner.adds_blank and answers_after_blank(self.tokenizer) else ""

    def prompt(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt, with one BOS: the tokenizer's for text, the template's for messages.

        Special tokens that the data has are text, except in a text prompt that was rendered before. An encoder reads
        the prompt as the first text of a pair: a question by itself, or the turns of a conversation with their roles.
        """
        if self.pair is not None:
            return [*self.pair.opening, *self.special_tokens.text_ids(plain_text(prompt)), *self.pair.middle]
        if isinstance(prompt, str):
            rendered = self.special_tokens.opens(prompt)
            text_ids = self.special_tokens.text_ids
            return self._without_end(self._rendered_ids(prompt) if rendered else text_ids(prompt, opening=True))
        return self._with_one_bos(self.special_tokens.conversation_ids(prompt))

    def written(self, prompts: Sequence[Prompt]) -> list[str]:
        """Prompts as the model reads them: text as it is, conversations as the chat template writes them.

        Raises TemplateRefusesError for the first conversation that the template refuses.
        """
        conversations = [prompt for prompt in prompts if not isinstance(prompt, str)]
        rendered = iter(rendered_prompts(self.tokenizer, conversations) if conversations else ())
        return [prompt if isinstance(prompt, str) else next(rendered) for prompt in prompts]

    def prompts(self, prompts: Sequence[Prompt], written: Sequence[str]) -> list[list[int]]:
        """:meth:`prompt` of many prompts, in as few calls of the tokenizer as possible. ``written``: as it gives them.

        Prompts of text and conversations may stand together.
        """
        special = self.special_tokens
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        conversations = [
            (prompt, text) for prompt, text in zip(prompts, written, strict=True) if not isinstance(prompt, str)
        ]
        of_texts = iter(
            mostly_together(
                texts,
                special.opens,
                self.prompt,
                lambda others: [self._without_end(ids) for ids in special.texts_ids(others, opening=True)],
                clean=not special.stand_in_any(texts),
            )
        )
        of_conversations = iter(
            special.conversations_ids([prompt for prompt, _ in conversations], [text for _, text in conversations])
        )
        return [
            next(of_texts) if isinstance(prompt, str) else self._with_one_bos(next(of_conversations))
            for prompt in prompts
        ]

    def prompt_lengths(self, prompts: Sequence[Prompt], written: Sequence[str]) -> list[int]:
        """How many ids :meth:`prompts` gives for each, in less time than it takes to have them as lists."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if len(texts) < len(prompts) or not self._closes_no_text or self.special_tokens.stand_in_any(texts):
            return list(map(len, self.prompts(prompts, written)))
        encodings = encodings_of_texts(self.tokenizer, texts, add_special_tokens=True, split_special_tokens=True)
        return list(map(len, encodings))

    @cached_property
    def _closes_no_text(self) -> bool:
        """Whether a text without special tokens never ends with an id that :meth:`_without_end` takes away."""
        ends, named = {*self._ends_of_text} - {None}, {*self.special_tokens.names.values()}
        # A normalizer could make such an id of other characters.
        plain = isinstance(self.tokenizer, PreTrainedTokenizerFast) and not self.tokenizer.backend_tokenizer.normalizer
        last = self.special_tokens.text_ids("a", opening=True)[-1:]
        return plain and ends <= named and not ends & {self.tokenizer.unk_token_id, *last}

    def end_of_prompt(self, prompt: Prompt) -> str:
        """The last characters before the response, with the template's."""
        if isinstance(prompt, str):
            return prompt[-LAST_CHARACTERS:]
        return render_prompt(self.tokenizer, prompt)[-LAST_CHARACTERS:]

    def _rendered_ids(self, prompt: str) -> list[int]:
        """Ids of a text prompt that was rendered before: its special tokens are tokens, and its BOS is the only one."""
        return self._with_one_bos(list(self.tokenizer(prompt)["input_ids"]))

    def _without_end(self, ids: list[int]) -> list[int]:
        """Some tokenizers close every text; the response is still to come."""
        while len(ids) > 1 and ids[-1] in self._ends_of_text:
            ids = ids[:-1]
        return ids

    @cached_property
    def _bos(self) -> int | None:
        bos: int | None = self.tokenizer.bos_token_id
        return bos

    @cached_property
    def _ends_of_text(self) -> tuple[int | None, int | None]:
        return self.tokenizer.eos_token_id, self.tokenizer.sep_token_id

    def _with_one_bos(self, ids: list[int]) -> list[int]:
        bos = self._bos
        while bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        return ids

    def responses(self, texts: Sequence[str], max_tokens: int) -> tuple[list[list[int]], list[bool]]:
        """Ids of responses with their end, cut at ``max_tokens``, and which of them were cut.

        Special tokens in them are text. Only where the data is text, an end that stands at the end, the EOS or the chat
        template's, is the end.
        """
        encoded = self.continuations(texts)
        ids = [ended(response, self.end_id, max_tokens) for response in encoded]
        return ids, [len(response) + 1 > max_tokens for response in encoded]

    def continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts that follow a prompt, without an end."""
        special = self.special_tokens
        has_end = not self.conversational and special.ends_stand_in(texts)
        whole = [special.without_end(text) for text in texts] if has_end else list(texts)
        if self.lead:
            whole = [self.lead + text for text in whole]
        return self._joiner.encode(whole, self._ids_of_texts)

    def counted_responses(self, texts: Sequence[str], max_tokens: int) -> CountedResponses:
        """How many ids :meth:`responses` gives for each text, in less time than it takes to have them as lists."""
        alone = not self.lead and not self._joiner.adds_blank and not self.special_tokens.stand_in_any(texts)
        encodings = encodings_of_texts(self.tokenizer, texts) if alone else self.continuations(texts)
        return CountedResponses(encodings, self.end_id, max_tokens)

    def _ids_of_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts by themselves, in which special tokens are text."""
        special = self.special_tokens
        return mostly_together(
            texts,
            special.stand_in,
            special.text_ids,
            lambda others: ids_of_texts(self.tokenizer, others),
            clean=not special.stand_in_any(texts),
        )

    def encode(self, prompt: Prompt, responses: Sequence[str], max_response_tokens: int) -> Encoded:
        """One prompt and its responses, each cut at ``max_response_tokens``."""
        ids, truncated = self.responses(responses, max_response_tokens)
        return Encoded(Tree(self.prompt(prompt), ids), truncated)

    def encode_samples(
        self,
        prompt: Prompt,
        responses: Sequence[str],
        truncated: Sequence[bool],
        max_response_tokens: int = sys.maxsize,
    ) -> Tree:
        """One prompt and what a model sampled for it, cut at ``max_response_tokens``.

        A truncated response gets no end.
        """
        ids, without_end = self.responses(responses, max_response_tokens)
        # An empty response has no token to be read at, so it keeps its end even if it was cut.
        samples = [
            (response[:-1] or response) if cut and not at_limit else response
            for response, cut, at_limit in zip(ids, truncated, without_end, strict=True)
        ]
        return Tree(self.prompt(prompt), samples)

    def as_sampled(
        self, prompt: Prompt, responses: Sequence[str], ids: Sequence[Sequence[int]], truncated: Sequence[bool]
    ) -> Tree:
        """One prompt and what a model sampled for it: the sampled ids where this tokenizer reads them as these texts.

        Otherwise the texts in its own ids (:meth:`encode_samples`).
        """
        if all(self.decode(sampled) == text for sampled, text in zip(ids, responses, strict=True)):
            return Tree(self.prompt(prompt), [list(sampled) for sampled in ids])
        return self.encode_samples(prompt, responses, truncated)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a response, without its end and other special tokens."""
        return self._joiner.decode(ids).removeprefix(self.lead)

    def rendered(self, encoded: Encoded) -> list[dict[str, Any]]:
        """For people: the tokens of the prompt and the first response, each with whether the loss sees it.

        A token that ends inside a character has no text: the next one has the character.
        """
        return [
            {"id": i, "text": text, "response": response}
            for ids, response in ((encoded.tree.prompt_ids, False), (encoded.tree.response_ids[0], True))
            for i, text in zip(ids, self._token_texts(ids), strict=True)
        ]

    def _token_texts(self, ids: Sequence[int]) -> list[str]:
        texts, begun = list[str](), 0  # where the character begins that is not whole
        for end in range(1, len(ids) + 1):
            text = self._joiner.decode(ids[begun:end], skip_special_tokens=False)
            inside = text.endswith(NOT_WHOLE) and end < len(ids)
            texts.append("" if inside else text)
            begun = begun if inside else end
        return texts


def text_encoder(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, name: str = "", *, pair: bool = False
) -> TextEncoder:
    """The encoder of a data set that ``prompt`` belongs to; ``name`` is what an error calls the model.

    ``pair``: the model reads prompt and response as a pair of texts, as BERT does. Raises ModelError where the prompt
    is a conversation and the tokenizer of another model has no chat template.
    """
    conversational = is_conversation(prompt)
    if pair:
        return TextEncoder(tokenizer, conversational, PairMarks.of(tokenizer))
    if conversational:
        require_chat_template(tokenizer, name or str(tokenizer.name_or_path))
    return TextEncoder(tokenizer, conversational, example=prompt if isinstance(prompt, str) else "")
