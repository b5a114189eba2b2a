"""Tokenizers: padding, chat template, BOS and EOS, in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from toolkit.errors import ModelError
from toolkit.models.remote_code import remote_code_allowed, unreadable
from toolkit.models.rendering import rendered
from toolkit.models.resolve import ModelRef, resolve_base

# Tokens that model families reserve and that no text contains. The first that a vocabulary has becomes its padding.
PAD_CANDIDATES = (
    "<|endoftext|>",
    "<pad>",
    "[PAD]",
    "<|padding|>",
    "<|finetune_right_pad_id|>",
    "<|vision_pad|>",
    "<unk>",
)


def load_tokenizer(ref: ModelRef, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. Its padding token is not the end of text, where the vocabulary has another.

    ``chat_template`` is a Jinja file that replaces the tokenizer's own. Raises ModelError where one cannot be read.
    """
    path = ref.path
    if ref.kind == "adapter" and not (Path(path) / "tokenizer_config.json").is_file():
        return load_tokenizer(resolve_base(Path(path)), chat_template)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=ref.revision, trust_remote_code=remote_code_allowed())
    except Exception as error:  # the tokenizers library raises bare exceptions for files that it cannot read
        raise unreadable(f"the tokenizer of {ref.spec!r} cannot be read", ref.spec, path, error) from error
    _separate_pad(tokenizer)
    if chat_template:
        template = Path(chat_template)
        if not template.is_file():
            raise ModelError("there is no such chat template", where=chat_template, fix="correct model.chat_template")
        tokenizer.chat_template = _template_text(template)
    return tokenizer


def _template_text(file: Path) -> str:
    """The text of a chat template. Raises ModelError where it is no text; its code is run when messages come."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ModelError(f"the chat template is no UTF-8 text: {error}", where=str(file)) from error


def _separate_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    """Sequence-classification heads pool the last token that is not padding, so padding must not be the EOS."""
    if tokenizer.pad_token is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    known = tokenizer.get_vocab()
    for token in PAD_CANDIDATES:
        if token in known and token != tokenizer.eos_token:
            tokenizer.pad_token = token
            return
    # Our own code never infers padding from ids, so the EOS can pad where there is nothing else.
    tokenizer.pad_token = tokenizer.eos_token


def require_chat_template(tokenizer: PreTrainedTokenizerBase, spec: str) -> None:
    """Raises ModelError when conversations meet a tokenizer that has no template for them."""
    if tokenizer.chat_template is None:
        raise ModelError(
            f"the data holds conversations, and the tokenizer of {spec!r} has no chat template",
            where="model.name",
            fix="set model.chat_template to a Jinja file, or data.conversational=false to train on transcripts "
            "(duel rewards, duel score: --plain)",
        )


def response_end(tokenizer: PreTrainedTokenizerBase, conversational: bool) -> int:
    """The id that ends a response: what the chat template puts after an assistant turn, else the EOS.

    Raises ModelError where there is neither.
    """
    if conversational:
        marker = "duel-response-text"
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": marker}]
        after = rendered(tokenizer, turns, opening=False).rpartition(marker)[2]
        ids = tokenizer(after, add_special_tokens=False)["input_ids"]
        if ids and ids[0] in {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}:
            return int(ids[0])
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer names no end of text, and a response needs one",
            where=str(tokenizer.name_or_path),
            fix="set eos_token in tokenizer_config.json",
        )
    return int(tokenizer.eos_token_id)


def eos_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a response: the tokenizer's, the chat template's and the generation configuration's."""
    ids = set()
    if tokenizer.chat_template is not None:
        ids.add(response_end(tokenizer, True))
    if tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    configured = model.generation_config.eos_token_id
    ids.update(int(i) for i in (configured if isinstance(configured, list) else [configured]) if i is not None)
    if not ids:
        raise ModelError(
            "neither the tokenizer nor the generation configuration names an end of text", where="eos_token_id"
        )
    return sorted(ids)


def reads_the_same(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers turn a conversation into the same ids."""
    return tokenizer.get_vocab() == other.get_vocab() and tokenizer.chat_template == other.chat_template


def check_vocabulary(rows: int, tokenizer: PreTrainedTokenizerBase, spec: str) -> None:
    """Raises ModelError when the tokenizer can produce ids that the model has no embedding for."""
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        raise ModelError(
            f"the tokenizer of {spec!r} has ids up to {highest}, the model has {rows} embeddings",
            where="model.name",
            fix="use the tokenizer that the model was trained with, or resize the embeddings first",
        )
