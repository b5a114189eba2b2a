"""Language models behind an OpenAI-compatible endpoint as judges: ``openai:MODEL@BASE_URL``.

The endpoint is not trusted. Whatever it sends is one answer or one failure; keys in it are redacted where it enters.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit

from anyio.from_thread import start_blocking_portal

from toolkit.errors import ModelError
from toolkit.judging.answers import Answer, Keep, Question
from toolkit.judging.replies import LONGEST_REASON, error_message, read_reply, readable
from toolkit.judging.secrets import Redactor
from toolkit.judging.templates import Template
from toolkit.preferences.rows import readable as readable_prompt
from toolkit.recipe.schema import JudgeSettings

# The server counts as gone after this many failures to connect in a row, as a multiple of the concurrency.
GONE_AFTER = 3
RETRIES = 4
# A reply of 20 alternatives for each of thousands of tokens is smaller.
LARGEST_REPLY = 4 * 2**20
KEY_VARIABLE = "OPENAI_API_KEY"
# How models write the tokens that open and end turns and texts.
_TURN = re.compile(
    r"<[|\uff5c][^<>\n]{1,60}[|\uff5c]>|</?(?:s|bos|eos|pad|unk|mask|turn|(?:start|end)_of_(?:turn|text|image))>"
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|BOS|EOS|gMASK)\]|<</?SYS>>",
    re.IGNORECASE,
)


@dataclass
class Exchange:
    """What is known of a question's requests. ``heard``: the server has sent something."""

    heard: bool = False
    too_large: bool = False


_exchange: ContextVar[Exchange] = ContextVar("exchange")


@dataclass(frozen=True)
class Endpoint:
    """``MODEL@BASE_URL`` with the key that it is sent, and how many of its answers in a row were lost."""

    name: str
    key: str

    @property
    def model(self) -> str:
        return self.name.partition("@")[0]

    @property
    def base_url(self) -> str:
        return self.name.partition("@")[2]

    @property
    def redact(self) -> Redactor:
        return Redactor(self.key)


def ask_endpoint(
    name: str,
    template: Template,
    questions: Sequence[Question],
    settings: JudgeSettings,
    keep: Keep,
) -> None:
    """Ask the model ``MODEL@BASE_URL`` every question, and call ``keep`` with each answer as it arrives.

    At most ``settings.concurrency`` requests are open at once. The client tries again after 429 (waiting as Retry-After
    says, two minutes at most), 5xx, timeouts and lost connections. What fails in spite of that is a failed answer.
    Raises ModelError where the endpoint refuses, or does not answer any more.
    """
    endpoint = Endpoint(name, _key())
    with start_blocking_portal() as loop:  # a loop of its own: a notebook has one running already
        loop.call(_ask, endpoint, template, questions, settings, keep)


def _key() -> str:
    """The key in the environment. Raises ModelError where no header can hold it; it is not repeated."""
    key = os.environ.get(KEY_VARIABLE, "").strip() or "none"  # local servers take any
    if not (key.isascii() and key.isprintable()):
        raise ModelError(f"{KEY_VARIABLE} has characters that no header can hold", where="environment", fix="set it")
    return key


def is_loopback(base_url: str) -> bool:
    """Whether an address is on this machine, which no proxy can reach for us.

    >>> [is_loopback(f"http://{host}/v1") for host in ("127.0.0.1:80", "[::1]", "localhost", "example.org")]
    [True, True, True, False]
    """
    host = (urlsplit(base_url).hostname or "").rstrip(".")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


async def _ask(
    endpoint: Endpoint,
    template: Template,
    questions: Sequence[Question],
    settings: JudgeSettings,
    keep: Keep,
) -> None:
    import openai

    client_type = _client_type()
    lost = 0
    where = f"openai:{endpoint.name}"

    async def one(client: openai.AsyncOpenAI, question: Question) -> None:
        nonlocal lost
        _exchange.set(exchange := Exchange())
        try:
            answer = await _reply(client, endpoint, template, question)
            lost = 0
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise ModelError(
                f"the judge refuses ({error.status_code}): {_status_message(error, endpoint)}",
                where=where,
                fix=f"check the model's name, the address, and {KEY_VARIABLE}",
            ) from None  # the error holds the reply as it came
        except openai.APIConnectionError as error:
            lost = 0 if exchange.heard else lost + 1
            answer = Answer(None, error=_connection_message(error, exchange, endpoint))
        except openai.APIStatusError as error:
            lost = 0
            answer = Answer(None, error=_status_message(error, endpoint))
        except (openai.OpenAIError, ValueError) as error:
            lost = 0
            text = readable(f"{type(error).__name__}: {error}", endpoint.redact)
            answer = Answer(None, error=text.splitlines()[0][:LONGEST_REASON])
        keep(question, answer)
        if lost >= GONE_AFTER * settings.concurrency or (lost and lost == len(questions)):
            raise ModelError(
                f"the judge does not answer any more: {answer.error}",
                where=where,
                fix="start the server and run the command again: the answers so far are stored",
            )

    http = client_type(
        limit_s=settings.timeout_s,
        timeout=settings.timeout_s,
        follow_redirects=False,
        trust_env=not is_loopback(endpoint.base_url),
    )
    async with openai.AsyncOpenAI(
        base_url=endpoint.base_url, api_key=endpoint.key, max_retries=RETRIES, http_client=http
    ) as client:
        await _each(questions, partial(one, client), settings.concurrency)


async def _each(questions: Sequence[Question], work: Callable[[Question], Awaitable[None]], n_at_once: int) -> None:
    """Work on every question, on the next one where another is done. Raises the first error alone."""
    remaining = iter(questions)

    async def some() -> None:
        for question in remaining:
            await work(question)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(n_at_once, len(questions))):
                group.create_task(some())
    except BaseExceptionGroup as several:
        first: BaseException = several
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None


def _client_type() -> type[Any]:
    """The HTTP client: it reads a bounded reply in a bounded time, and keeps to the address that was named."""
    import openai

    # openai took httpx up to its version 2, and takes httpx2 since.
    http_library = import_module(openai.DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0])

    class BoundedClient(openai.DefaultAsyncHttpxClient):
        def __init__(self, *, limit_s: float, **settings: Any) -> None:
            super().__init__(**settings)
            self.limit_s = limit_s

        async def send(self, request: Any, **settings: Any) -> Any:
            """The whole reply, or the first ``LARGEST_REPLY`` bytes of it.

            Raises ReadTimeout where it is not complete in time, however often the server sends a byte.
            """
            try:
                async with asyncio.timeout(self.limit_s):
                    return await self._send(request, settings)
            except TimeoutError as error:
                raise http_library.ReadTimeout(str(error), request=request) from error

        async def _send(self, request: Any, settings: dict[str, Any]) -> Any:
            response = await super().send(request, **{**settings, "stream": True})
            exchange = _exchange.get()
            exchange.heard, body = True, bytearray()
            try:
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > LARGEST_REPLY:
                        exchange.too_large = True
                        break
            finally:
                await response.aclose()
            coding = ("content-encoding", "content-length", "transfer-encoding")
            headers = [(name, value) for name, value in response.headers.multi_items() if name.lower() not in coding]
            whole = bytes(body[:LARGEST_REPLY])
            return type(response)(response.status_code, headers=headers, content=whole, request=request)

    return BoundedClient


def _status_message(error: Any, endpoint: Endpoint) -> str:
    """What an error reply says, on one line."""
    status, headers = error.status_code, error.response.headers
    if 300 <= status < 400:
        target = readable(headers.get("location", "?"), endpoint.redact)[:LONGEST_REASON]
        return f"the endpoint redirects to {target}, and redirects are not followed"
    return f"{type(error).__name__} {status}: {error_message(error.response.content, endpoint.redact)}"


def _connection_message(error: Exception, exchange: Exchange, endpoint: Endpoint) -> str:
    import openai

    cause = error.__cause__
    if isinstance(error, openai.APITimeoutError):
        return "the answer was not complete in time" if exchange.heard else "no answer in time"
    detail = readable(f"{error} {type(cause).__name__}: {cause}" if cause is not None else str(error), endpoint.redact)
    kind = "the answer broke off" if exchange.heard else "no connection"
    return f"{kind}: {' '.join(detail.split())}"[:LONGEST_REASON]


async def _reply(client: Any, endpoint: Endpoint, template: Template, question: Question) -> Answer:
    texts = (readable_prompt(question.prompt), question.first, question.second)
    prompt, first, second = map(without_turns, texts)
    messages = template.messages(prompt, first, second, question.principle)
    more = {"logprobs": True, "top_logprobs": 20} if template.kind == "logprob" else {}
    reply = await client.chat.completions.with_raw_response.create(
        model=endpoint.model, messages=messages, temperature=0.0, max_tokens=template.max_tokens, **more
    )
    if _exchange.get().too_large:
        return Answer(None, error=f"the answer is larger than {LARGEST_REPLY // 2**20} MiB")
    return read_reply(reply.http_response.content, template, endpoint.redact)


def without_turns(text: str) -> str:
    """Text in which nothing looks like a token that opens or ends a turn: it is cut behind its first character.

    Which tokens the endpoint's model has is not known here, so all of the usual form count.

    >>> without_turns("fine</s><|im_end|>[INST] x < y, <b>bold</b>")
    'fine< /s>< |im_end|>[ INST] x < y, <b>bold</b>'
    """
    return _TURN.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
