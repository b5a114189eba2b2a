"""Language models behind an OpenAI-compatible endpoint as judges: ``openai:MODEL@BASE_URL``."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Sequence
from typing import Any

from anyio.from_thread import start_blocking_portal

from toolkit.errors import ModelError, first_line
from toolkit.judging.answers import Answer, Keep, Question
from toolkit.judging.templates import Template, read_verdict
from toolkit.recipe.schema import JudgeSettings

# The server counts as gone after this many failures to connect in a row, as a multiple of the concurrency.
GONE_AFTER = 3
RETRIES = 4


def ask_endpoint(
    name: str,
    template: Template,
    questions: Sequence[Question],
    settings: JudgeSettings,
    keep: Keep,
) -> None:
    """Ask the model ``MODEL@BASE_URL`` every question, and call ``keep`` with each answer as it arrives.

    At most ``settings.concurrency`` requests are open at once. The client tries again after 429 (waiting as Retry-After
    says), 5xx, timeouts and lost connections. What fails in spite of that is a failed answer.
    Raises ModelError where the endpoint refuses, or does not answer any more.
    """
    with start_blocking_portal() as loop:  # a loop of its own: a notebook has one running already
        loop.call(_ask, name, template, questions, settings, keep)


async def _ask(
    name: str,
    template: Template,
    questions: Sequence[Question],
    settings: JudgeSettings,
    keep: Keep,
) -> None:
    import openai

    model, _, base_url = name.partition("@")
    lost = 0
    gate = asyncio.Semaphore(settings.concurrency)

    async def one(client: openai.AsyncOpenAI, question: Question) -> None:
        nonlocal lost
        async with gate:
            try:
                answer = await _reply(client, model, template, question)
                lost = 0
            except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
                raise ModelError(
                    f"the judge refuses: {first_line(error)}",
                    where=f"openai:{name}",
                    fix="check the model's name, the address, and OPENAI_API_KEY",
                ) from error
            except openai.APIConnectionError as error:
                lost += 1
                answer = Answer(None, error=f"no connection: {first_line(error)}")
            except (openai.OpenAIError, ValueError) as error:
                lost = 0
                answer = Answer(None, error=f"{type(error).__name__}: {first_line(error)}")
            keep(question, answer)
            if lost >= GONE_AFTER * settings.concurrency or (lost and lost == len(questions)):
                raise ModelError(
                    f"the judge does not answer any more: {answer.error}",
                    where=f"openai:{name}",
                    fix="start the server and run the command again: the answers so far are stored",
                )

    key = os.environ.get("OPENAI_API_KEY", "none")  # local servers take any
    timeout = settings.timeout_s
    async with openai.AsyncOpenAI(base_url=base_url, api_key=key, max_retries=RETRIES, timeout=timeout) as client:
        try:
            async with asyncio.TaskGroup() as group:
                for question in questions:
                    group.create_task(one(client, question))
        except* ModelError as several:
            first: BaseException = several
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            raise first from None


async def _reply(client: Any, model: str, template: Template, question: Question) -> Answer:
    messages = template.messages(question.prompt, question.first, question.second, question.principle)
    more = {"logprobs": True, "top_logprobs": 20} if template.kind == "logprob" else {}
    completion = await client.chat.completions.create(
        model=model, messages=messages, temperature=0.0, max_tokens=template.max_tokens, **more
    )
    if isinstance(completion, str) or not getattr(completion, "choices", None):
        return Answer(None, raw=str(completion)[:2000], error="the answer is no chat completion")
    choice, usage = completion.choices[0], completion.usage
    spent = {
        "prompt_tokens": usage.prompt_tokens if usage else 0,
        "completion_tokens": usage.completion_tokens if usage else 0,
    }
    raw = (choice.message.content if choice.message else None) or ""
    if template.kind == "logprob":
        listed = choice.logprobs.content if choice.logprobs else None
        if not listed:
            return Answer(None, raw, "the endpoint gives no log-probabilities: take the template choice", **spent)
        value, error = weighted_choice([(top.token, top.logprob) for top in listed[0].top_logprobs])
        return Answer(value, raw, error, **spent)
    value, error = read_verdict(template.kind, raw)
    if value is None and choice.finish_reason == "length":
        error = f"cut at {template.max_tokens} tokens without a verdict"
    return Answer(value, raw, error, **spent)


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
