"""From preference rows to token ids: prompt and response apart, joined as ids, an EOS at the end of a response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from toolkit.preferences.rows import Prompt


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

    def placed(self, ends: bool) -> Tree:
        """What a batch computes of it: without ``ends``, no response's last token, from which nothing is predicted."""
        return self if ends else Tree(self.prompt_ids, [ids[:-1] for ids in self.response_ids])


@dataclass(frozen=True)
class Encoded:
    """A row as token ids. ``truncated[k]`` says that response k was cut at the limit and has no EOS."""

    tree: Tree
    truncated: list[bool]


def is_conversation(prompt: Prompt) -> bool:
    return not isinstance(prompt, str)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Ids of a prompt; the BOS stands once, by the tokenizer for text and by the template for messages."""
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
        # Some tokenizers close every text; the response is still to come.
        while ids and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id) and len(ids) > 1:
            ids = ids[:-1]
        return list(ids)
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_responses(
    tokenizer: PreTrainedTokenizerBase, responses: Sequence[str], *, end_id: int, max_tokens: int
) -> tuple[list[list[int]], list[bool]]:
    """Ids of responses with their end, cut at ``max_tokens``, and which of them were cut."""
    encoded = tokenizer(list(responses), add_special_tokens=False)["input_ids"]
    ids = [[*response, end_id][:max_tokens] for response in encoded]
    return ids, [len(response) + 1 > max_tokens for response in encoded]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    responses: Sequence[str],
    *,
    end_id: int,
    max_response_tokens: int,
) -> Encoded:
    """One prompt and its responses."""
    ids, truncated = encode_responses(tokenizer, responses, end_id=end_id, max_tokens=max_response_tokens)
    return Encoded(Tree(encode_prompt(tokenizer, prompt), ids), truncated)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of a response without its end and other special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def rendered(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> list[dict[str, Any]]:
    """For people: the first response's tokens, each with whether the loss sees it."""
    tokens = [(i, False) for i in encoded.tree.prompt_ids] + [(i, True) for i in encoded.tree.response_ids[0]]
    return [{"id": i, "text": str(tokenizer.decode([i])), "response": flag} for i, flag in tokens]
