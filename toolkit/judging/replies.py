"""What an OpenAI-compatible endpoint replied, read with suspicion: a reply that breaks the format is a failure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.judging.answers import Answer
from toolkit.judging.secrets import Redactor
from toolkit.judging.templates import Template

# Characters of a reply that are stored for people to read.
LONGEST_RAW = 4000
LONGEST_REASON = 300
# No reply takes as many tokens.
MOST_TOKENS = 10**9
# Rounding puts the likeliest token's log-probability a little above 0.
LARGEST_LOGPROB = 1e-3


class BadReplyError(ValueError):
    """A reply that is no chat completion, or one that contradicts its own format."""


@dataclass(frozen=True)
class Completion:
    """A reply that keeps to the format. ``top`` are the first token's alternatives; empty where they are missing."""

    text: str
    finish_reason: str
    top: Sequence[tuple[str, float]]
    prompt_tokens: int
    completion_tokens: int


def read_reply(body: bytes, template: Template, redact: Redactor) -> Answer:
    """The answer in an endpoint's reply; with an ``error`` where there is none. Keys in it are redacted.

    A reply that breaks the format counts as failed, whatever verdict it holds: nothing is guessed.
    """
    raw = readable(body.decode("utf-8", "replace"), redact)
    try:
        completion = _completion(_document(body, redact))
    except BadReplyError as error:
        return Answer(None, raw[:LONGEST_RAW], str(error)[:LONGEST_REASON])
    raw = completion.text[:LONGEST_RAW]
    tokens = (completion.prompt_tokens, completion.completion_tokens)
    if template.kind == "logprob":
        if not completion.top:
            reason = "the endpoint gives no log-probabilities: take the template choice"
            return Answer(None, raw, reason, *tokens)
        value, reason = weighted_choice(completion.top)
        return Answer(value, raw, reason, *tokens)
    value, reason = template.verdict(completion.text, cut=completion.finish_reason == "length")
    return Answer(value, raw, reason[:LONGEST_REASON], *tokens)


def error_message(body: bytes, redact: Redactor) -> str:
    """One line of an error reply's body, redacted."""
    try:
        text = _reported(_document(body, redact))
    except BadReplyError:
        text = readable(body.decode("utf-8", "replace"), redact)
    return " ".join(text.split())[:LONGEST_REASON]


def readable(text: str, redact: Redactor) -> str:
    """Text from outside that can be stored: without keys and halves of characters."""
    return redact(text).encode("utf-8", "replace").decode("utf-8")


def _document(body: bytes, redact: Redactor) -> object:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, a number of 5,000 digits; nested too deep
        raise BadReplyError("the answer is no chat completion, it is not JSON") from error
    try:
        return redact.of_document(document)
    except RecursionError as error:
        raise BadReplyError("the answer is no chat completion, it is nested too deep") from error


def _reported(document: object) -> str:
    """The message of an error reply."""
    error = document.get("error", document) if isinstance(document, dict) else document
    message = error.get("message", error) if isinstance(error, dict) else error
    return message if isinstance(message, str) else json.dumps(message)


def _completion(document: object) -> Completion:
    """Raises BadReplyError."""
    if not isinstance(document, dict):
        raise BadReplyError("the answer is no chat completion, it is no JSON object")
    choices = document.get("choices")
    if not choices and document.get("error"):
        raise BadReplyError(f"the endpoint reports an error: {_writable(_reported(document), 'its message')}")
    if not isinstance(choices, list) or not choices:
        raise BadReplyError("the answer is no chat completion, it has no choices")
    choice = _object(choices[0], "the choice")
    message, usage = _object(choice.get("message"), "the message"), document.get("usage")
    content, finish = message.get("content"), choice.get("finish_reason")
    if content is not None and not isinstance(content, str):
        raise BadReplyError(f"the content is no text, it is a {type(content).__name__}")
    counts = [_count(usage, name) for name in ("prompt_tokens", "completion_tokens")]
    text = _writable(content or "", "the content")
    return Completion(text, str(finish), _alternatives(choice.get("logprobs")), counts[0], counts[1])


def _object(value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise BadReplyError(f"the answer is no chat completion, {name} is no object")
    return value


def _writable(text: str, name: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadReplyError(f"{name} has half of a character (a lone surrogate)") from error
    return text


def _count(usage: object, name: str) -> int:
    """A number of tokens; 0 where the endpoint does not count."""
    value = None if usage is None else _object(usage, "the usage").get(name)
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST_TOKENS:
        raise BadReplyError(f"the usage has no number of tokens as {name}")
    return value


def _alternatives(logprobs: object) -> list[tuple[str, float]]:
    """(token, log-probability) of the first token's alternatives; none where the endpoint gives none."""
    listed = None if logprobs is None else _object(logprobs, "the log-probabilities").get("content")
    if not listed:
        return []
    if not isinstance(listed, list):
        raise BadReplyError("the log-probabilities are no list")
    tops = _object(listed[0], "the first token").get("top_logprobs") or []
    if not isinstance(tops, list):
        raise BadReplyError("the alternatives of the first token are no list")
    return [_alternative(_object(top, "an alternative")) for top in tops]


def _alternative(top: Mapping[str, Any]) -> tuple[str, float]:
    token, logprob = top.get("token"), top.get("logprob")
    is_number = isinstance(logprob, int | float) and not isinstance(logprob, bool)
    if not isinstance(token, str) or logprob is None or not is_number or not logprob <= LARGEST_LOGPROB:  # NaN is not
        raise BadReplyError("a log-probability is no number below 0, or has no token")
    return token, float(max(logprob, -1e9))


def weighted_choice(top: Sequence[tuple[str, float]]) -> tuple[float | None, str]:
    """P(A) / (P(A) + P(B)) from the first token's alternatives, whatever spaces surround the letters.

    >>> value, _ = weighted_choice([("A", math.log(0.6)), (" B", math.log(0.2)), ("The", math.log(0.1))])
    >>> round(value, 6)
    0.75
    """
    mass = {"A": 0.0, "B": 0.0}
    for token, logprob in top:
        if token.strip() in mass:
            mass[token.strip()] += math.exp(logprob)
    total = mass["A"] + mass["B"]
    return (mass["A"] / total, "") if total > 0 else (None, "neither A nor B is among the likeliest tokens")
