"""Language models as judges: ``openai:MODEL@BASE_URL`` over HTTP, ``llm:MODEL`` in this process.

Every pair is shown in both orders. What was answered before is not asked again (``answers.py``); what failed is asked
again by the next run, and counts as a failure until then.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from anyio.from_thread import start_blocking_portal

from toolkit.errors import ModelError, RecipeError
from toolkit.judging.answers import Answer, Question, remembering
from toolkit.judging.records import Judgement, measured
from toolkit.judging.templates import Template, load_template, read_verdict
from toolkit.models.resolve import cache_folder
from toolkit.preferences.rows import Prompt
from toolkit.progress import Reporter
from toolkit.recipe.schema import JudgeSettings, ModelSection

KINDS = ("llm", "openai")
Keep = Callable[[Question, Answer], None]
# So many failures to connect in a row, as a multiple of the concurrency, mean that the server is gone.
GONE_AFTER = 3
RETRIES = 4


@dataclass(frozen=True)
class Usage:
    """What a judge's answers took: tokens as counted by the endpoint, USD where prices are set.

    Failed attempts count. ``new_*`` is what this call spent; the others, and ``n_questions``, cover remembered answers
    as well: the price of having them all.
    """

    judge: str
    template: str
    n_questions: int
    n_remembered: int
    n_failed: int
    prompt_tokens: int
    completion_tokens: int
    new_prompt_tokens: int
    new_completion_tokens: int
    wall_s: float
    cost_usd: float | None
    new_cost_usd: float | None


def asks(spec: str) -> bool:
    """Whether a judge is a language model that compares, and not a function that scores."""
    return spec.partition(":")[0] in KINDS


def memory_file() -> Path:
    """Where answers are kept, for all runs of one user."""
    return cache_folder() / "judgements.sqlite"


def judge_pairs(
    spec: str,
    pairs: Sequence[tuple[str, str]],
    prompt_ids: Sequence[str],
    prompts: Sequence[Prompt],
    texts: dict[str, Sequence[Sequence[str]]],
    settings: JudgeSettings,
    section: ModelSection,
    reporter: Reporter,
) -> tuple[list[Judgement], Usage]:
    """Judgements of ``(policy, baseline)`` pairs, the k-th sample of one against the k-th of the other, and their cost.

    ``texts[name][prompt]`` are a policy's samples. Two judgements, one for each order, of every pair of samples; one
    where the template scores responses alone. Two equal texts are a tie that nobody is asked about.
    Raises ModelError where the judge cannot be used at all: what was answered until then is kept.
    """
    template = load_template(settings.template or ("logprob" if spec.startswith("llm:") else "choice"))
    if template.principled:
        raise RecipeError(
            f"template {template.name!r} shows a principle, and none is given",
            where=spec,
            fix="label data with it (duel label --principles), or name another template",
        )
    shown: list[tuple[Judgement, list[Question]]] = []
    for policy, baseline in pairs:
        for row, (identity, prompt) in enumerate(zip(prompt_ids, prompts, strict=True)):
            for a, b in zip(texts[policy][row], texts[baseline][row], strict=True):
                for order in (None,) if template.kind == "score" else (0, 1):
                    blank = Judgement(identity, policy, baseline, spec, None, order, **measured(a, b))
                    first, second = (b, a) if order == 1 else (a, b)
                    if template.kind == "score":
                        questions = [Question(spec, template.fingerprint, prompt, text) for text in (a, b)]
                    else:
                        questions = [Question(spec, template.fingerprint, prompt, first, second)]
                    shown.append((blank, questions))
    wanted = [question for blank, questions in shown if not _same(blank, questions) for question in questions]
    answers, usage = ask_all(spec, template, wanted, settings, section, reporter)
    return [_judged(blank, questions, answers) for blank, questions in shown], usage


def ask_all(
    spec: str,
    template: Template,
    wanted: Sequence[Question],
    settings: JudgeSettings,
    section: ModelSection,
    reporter: Reporter,
) -> tuple[dict[str, Answer], Usage]:
    """The answer to every question by its key, failures among them; what was answered before is not asked.

    Raises ModelError where the judge cannot be used at all: what was answered until then is kept.
    """
    unique = {question.key: question for question in wanted}
    started = time.monotonic()
    with remembering(memory_file()) as memory:
        answers = memory.answers(unique.values())
        known = len(answers)
        new = [question for key, question in unique.items() if key not in answers]
        spent = [0, 0]
        with reporter.task(f"judge {spec}", len(new)) as task:

            def keep(question: Question, answer: Answer) -> None:
                memory.keep(question, answer)
                answers[question.key] = answer
                spent[0] += answer.prompt_tokens
                spent[1] += answer.completion_tokens
                task.advance()

            if new:
                _ask(spec, template, new, settings, section, keep)
        tokens = memory.tokens(unique.values())
    usage = Usage(
        judge=spec,
        template=template.name,
        n_questions=len(unique),
        n_remembered=known,
        n_failed=sum(answer.value is None for answer in answers.values()),
        prompt_tokens=tokens[0],
        completion_tokens=tokens[1],
        new_prompt_tokens=spent[0],
        new_completion_tokens=spent[1],
        wall_s=round(time.monotonic() - started, 3),
        cost_usd=_cost(tokens, settings),
        new_cost_usd=_cost((spent[0], spent[1]), settings),
    )
    money = "" if usage.new_cost_usd is None else f", {usage.new_cost_usd:.4f} USD"
    reporter.line(
        f"judge {spec}: {len(new)} asked, {known} remembered, {usage.n_failed} failed, "
        f"{spent[0]} + {spent[1]} tokens (prompt + completion){money}"
    )
    return answers, usage


def _cost(tokens: tuple[int, int], settings: JudgeSettings) -> float | None:
    if settings.prompt_price_usd is None or settings.completion_price_usd is None:
        return None
    return (tokens[0] * settings.prompt_price_usd + tokens[1] * settings.completion_price_usd) / 1e6


def _same(blank: Judgement, questions: Sequence[Question]) -> bool:
    if len(questions) == 2:
        return questions[0].first == questions[1].first
    return questions[0].first == questions[0].second


def _judged(blank: Judgement, questions: Sequence[Question], answers: dict[str, Answer]) -> Judgement:
    if _same(blank, questions):
        return replace(blank, preference=0.5)
    for question in questions:
        answer = answers[question.key]
        if answer.value is None:
            return replace(blank, error=f"{answer.error}: {answer.raw[:300]!r}" if answer.raw else answer.error)
    values = [answers[question.key].value for question in questions]
    if len(values) == 2:
        a, b = values
        assert a is not None and b is not None
        return replace(blank, preference=1.0 if a > b else 0.0 if a < b else 0.5)
    [value] = values
    assert value is not None
    return replace(blank, preference=1.0 - value if blank.order == 1 else value)


def _ask(
    spec: str,
    template: Template,
    questions: Sequence[Question],
    settings: JudgeSettings,
    section: ModelSection,
    keep: Keep,
) -> None:
    kind, _, rest = spec.partition(":")
    if kind == "openai":
        model, _, base_url = rest.partition("@")
        with start_blocking_portal() as loop:  # a loop of its own: a notebook has one running already
            loop.call(_ask_endpoint, model, base_url, template, questions, settings, keep)
    else:
        _ask_local(rest, template, questions, section, keep)


# ---------------------------------------------------------------- over HTTP


async def _ask_endpoint(
    model: str, base_url: str, template: Template, questions: Sequence[Question], settings: JudgeSettings, keep: Keep
) -> None:
    """Bounded concurrency; the client retries 429 (after what Retry-After says), 5xx, timeouts and lost connections."""
    import openai

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
                    f"the judge refuses: {_first_line(error)}",
                    where=f"openai:{model}@{base_url}",
                    fix="check the model's name, the address, and OPENAI_API_KEY",
                ) from error
            except openai.APIConnectionError as error:
                lost += 1
                answer = Answer(None, error=f"no connection: {_first_line(error)}")
            except (openai.OpenAIError, ValueError) as error:
                lost = 0
                answer = Answer(None, error=f"{type(error).__name__}: {_first_line(error)}")
            keep(question, answer)
            if lost >= GONE_AFTER * settings.concurrency or (lost and lost == len(questions)):
                raise ModelError(
                    f"the judge does not answer any more: {answer.error}",
                    where=f"openai:{model}@{base_url}",
                    fix="start the server and run the command again: what was answered is kept",
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
    """P(A) / (P(A) + P(B)) of the first token's alternatives, spaces around a letter aside.

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


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


# ---------------------------------------------------------------- in this process


def _ask_local(spec: str, template: Template, questions: Sequence[Question], section: ModelSection, keep: Keep) -> None:
    """Greedy replies in words, or the exact probabilities of A and B as two branches of one tree."""
    from toolkit.engine.engine import Engine
    from toolkit.engine.sampling import SamplingParams, sample_responses
    from toolkit.models.encoding import TextEncoder, Tree
    from toolkit.models.inspect import DTYPES, best_device
    from toolkit.models.load import load_policy
    from toolkit.models.resolve import resolve
    from toolkit.models.tokenizer import load_tokenizer, require_chat_template

    ref = resolve(spec)
    tokenizer = load_tokenizer(ref)
    require_chat_template(tokenizer, spec)
    encoder = TextEncoder(tokenizer, conversational=True)
    model = load_policy(ref, section).to(best_device())
    dtype, pad_id = DTYPES[section.dtype], int(tokenizer.pad_token_id)
    letters = [tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in "AB"]
    engine = Engine(model, pad_id, dtype=dtype)
    for start in range(0, len(questions), 32):  # what is answered is kept as it comes
        part = questions[start : start + 32]
        prompts = [encoder.prompt(template.messages(q.prompt, q.first, q.second, q.principle)) for q in part]
        if template.kind == "logprob":
            found = engine.logps([Tree(ids, letters) for ids in prompts])
            for question, ids, (a, b) in zip(part, prompts, found, strict=True):
                margin = float(a.double().sum() - b.double().sum())
                value = 1 / (1 + math.exp(-margin)) if margin > -700 else 0.0
                keep(question, Answer(value, prompt_tokens=len(ids)))
            continue
        # Nothing is drawn at temperature 0, so the key does not matter.
        params = SamplingParams(template.max_tokens, temperature=0.0)
        replies = sample_responses(model, tokenizer, prompts, lambda i, _: (i,), params, dtype=dtype)
        for question, ids, [reply] in zip(part, prompts, replies, strict=True):
            raw = encoder.decode(reply.ids)
            value, error = read_verdict(template.kind, raw)
            if value is None and reply.truncated:
                error = f"cut at {template.max_tokens} tokens without a verdict"
            keep(question, Answer(value, raw, error, len(ids), len(reply.ids)))
