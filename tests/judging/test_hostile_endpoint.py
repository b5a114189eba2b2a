"""Endpoints that misbehave: each reply is an answer or one failure with its reason; keys in it are never recorded."""

from __future__ import annotations

import base64
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from toolkit.cli.main import exit_code
from toolkit.errors import ModelError, RecipeError, shown
from toolkit.files import write_table
from toolkit.judging import endpoint, llm
from toolkit.judging.judge import check_judge
from toolkit.judging.options import JudgeOptions
from toolkit.judging.replies import read_reply
from toolkit.judging.responses import PolicyResponses
from toolkit.judging.secrets import Redactor
from toolkit.judging.templates import load_template
from toolkit.progress import Reporter
from toolkit.recipe.judge_specs import judge_problem
from toolkit.recipe.schema import JudgeSettings
from toolkit.recipe.training import ModelSection

pytestmark = pytest.mark.fault

KEY = 'sk-Canary+4/"2\\x'
CHOICE, LOGPROB = load_template("choice"), load_template("logprob")


def body(content: Any = "[[A]]", **changes: Any) -> bytes:
    choice = {"finish_reason": "stop", "message": {"role": "assistant", "content": content}}
    usage = {"prompt_tokens": 3, "completion_tokens": 1}
    document = {"choices": [{**choice, **changes.pop("choice", {})}], "usage": usage, **changes}
    return json.dumps(document).encode()


def tops(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {"logprobs": {"content": [{"token": "A", "top_logprobs": [{"token": t, "logprob": p} for t, p in pairs]}]}}


GOOD = [(body(), CHOICE, 1.0), (body(usage=None), CHOICE, 1.0), (body("", choice=tops(("A", 0.0))), LOGPROB, 1.0)]
BAD = [
    (b"", CHOICE, "not JSON"),
    (b"<html><h1>502</h1></html>", CHOICE, "not JSON"),
    (b'{"choices": [{"mess', CHOICE, "not JSON"),
    (b"\xff\xfe\x00[[A]]", CHOICE, "not JSON"),
    (b"[" * 200_000, CHOICE, "not JSON"),
    (b'{"choices": ' + b"9" * 5000 + b"}", CHOICE, "not JSON"),
    (b'"[[A]]"', CHOICE, "no JSON object"),
    (b"[]", CHOICE, "no JSON object"),
    (b"null", CHOICE, "no JSON object"),
    (b"{}", CHOICE, "no choices"),
    (b'{"choices": []}', CHOICE, "no choices"),
    (b'{"choices": {"0": 1}}', CHOICE, "no choices"),
    (b'{"choices": [null]}', CHOICE, "the choice is no object"),
    (b'{"choices": [{"message": null}]}', CHOICE, "the message is no object"),
    (b'{"error": {"message": "out of credit", "code": 7}}', CHOICE, "reports an error: out of credit"),
    (b'{"error": "overloaded", "choices": null}', CHOICE, "reports an error: overloaded"),
    (body(None), CHOICE, "no verdict"),
    (body([{"type": "text", "text": "[[A]]"}]), CHOICE, "the content is no text, it is a list"),
    (body(7), CHOICE, "the content is no text"),
    (body("[[A]] \ud800"), CHOICE, "lone surrogate"),
    (body(usage={"prompt_tokens": 10**30, "completion_tokens": 1}), CHOICE, "no number of tokens"),
    (body(usage={"prompt_tokens": -1}), CHOICE, "no number of tokens"),
    (body(usage={"prompt_tokens": "many"}), CHOICE, "no number of tokens"),
    (body(usage=[1, 2]), CHOICE, "the usage is no object"),
    (body(), LOGPROB, "no log-probabilities"),
    (body(choice={"logprobs": {"content": []}}), LOGPROB, "no log-probabilities"),
    (body(choice={"logprobs": {"content": [{}]}}), LOGPROB, "no log-probabilities"),
    (body(choice={"logprobs": [1]}), LOGPROB, "no object"),
    (body(choice=tops(("A", "high"))), LOGPROB, "no number"),
    (body(choice=tops(("A", 1000.0))), LOGPROB, "no number"),
    (body(choice=tops(("A", float("nan")))), LOGPROB, "no number"),
    (body(choice=tops((None, -1.0))), LOGPROB, "no number"),
    (body(choice=tops(("A", True))), LOGPROB, "no number"),
    (body(choice=tops(("A", -1e300), ("B", -1e300))), LOGPROB, "neither A nor B"),
]


@pytest.mark.parametrize(("content", "template", "value"), GOOD)
def test_a_good_reply_is_an_answer(content: bytes, template: Any, value: float) -> None:
    answer = read_reply(content, template, Redactor(KEY))
    assert (answer.value, answer.error) == (value, "")


@pytest.mark.parametrize(("content", "template", "reason"), BAD)
def test_a_reply_that_breaks_the_format_is_a_failure_with_its_reason(
    content: bytes, template: Any, reason: str
) -> None:
    answer = read_reply(content, template, Redactor(KEY))
    assert answer.value is None and reason in answer.error
    assert len(answer.raw) <= 4000 and len(answer.error) <= 300
    (answer.raw + answer.error).encode("utf-8")  # can be stored


SPELLINGS = {
    "as it is": KEY,
    "in a header": f"Authorization: Bearer {KEY}",
    "in capitals": KEY.upper(),
    "in an address": f"https://h/?key={quote(KEY, safe='')}",
    "in base64": base64.b64encode(f"user:{KEY}".encode()).decode(),
    "in JSON": json.dumps({"key": KEY}),
    "as a repr": repr({"key": KEY}),
    "in hex": KEY.encode().hex(),
    "behind 290 others, where reasons are cut": "x" * 290 + KEY,
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=list(SPELLINGS))
def test_a_key_is_redacted_wherever_it_stands_in_a_reply(spelling: str) -> None:
    pieces = {KEY[:8].lower(), quote(KEY, safe="")[:8].lower(), KEY.encode().hex()[:12]}
    pieces |= {base64.b64encode(b"\0" * k + KEY.encode()).decode()[3:11].lower() for k in range(3)}
    replies = [body(spelling), spelling.encode(), json.dumps({"error": {"message": spelling}}).encode()]
    replies.append(json.dumps({"choices": [], "error": {spelling: spelling}}).encode())
    for content in replies:
        answer = read_reply(content, CHOICE, Redactor(KEY))
        stored = (answer.raw + answer.error).lower()
        assert "[redacted]" in stored or "no verdict" in stored or "xxx" in stored
        assert [piece for piece in pieces if piece in stored] == []


@pytest.mark.parametrize(
    "address",
    ["http://user:pw@host/v1", "http://pw@host", "http://host/v1?api_key=pw", "http://host/#pw", "http://a\\@host"],
)
def test_an_address_with_a_secret_is_no_judge_and_is_not_repeated(address: str) -> None:
    assert judge_problem(f"openai:m@{address}") is not None
    with pytest.raises(RecipeError) as caught:
        check_judge(f"openai:m@{address}")
    assert "pw" not in str(caught.value) and "OPENAI_API_KEY" in str(caught.value)


def test_what_a_terminal_would_obey_is_written_out() -> None:
    assert shown("a\x1b]0;title\x07b\x9b31m\u202ec\rd") == "a\\x1b]0;title\\x07b\\x9b31m\\u202ec\\rd"
    assert str(ModelError("\x1b[2J", where="http://user:pw@host/")) == "\\x1b[2J\n  where: http://...@host/"


# ---------------------------------------------------------------- over HTTP

Behave = Callable[[BaseHTTPRequestHandler, str], None]


def reply(handler: BaseHTTPRequestHandler, content: bytes, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content_Type": "application/json", "Content_Length": str(len(content)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(content)


class Hostile(ThreadingHTTPServer):
    """Behaves as it is told to each request; ``seen`` are the requests' headers."""

    daemon_threads = True
    behave: Behave

    def __init__(self, behave: Behave) -> None:
        self.behave, self.seen = behave, list[dict[str, str]]()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                sent = self.rfile.read(int(self.headers["Content-Length"])).decode()
                outer.seen.append({name.lower(): value for name, value in self.headers.items()})
                outer.behave(self, sent)

            def log_message(self, *args: Any) -> None: ...

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def spec(self) -> str:
        return f"openai:m@http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, *args: Any) -> None: ...


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Behave], Hostile]]:
    monkeypatch.setenv("DUEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(endpoint, "RETRIES", 0)
    started: list[Hostile] = []

    def start(behave: Behave) -> Hostile:
        started.append(Hostile(behave))
        return started[-1]

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def ask(spec: str) -> tuple[list[Any], llm.Usage]:
    options = JudgeOptions(ModelSection(), JudgeSettings(timeout_s=0.5))
    responses = PolicyResponses(["p0", "p1"], ["alpha", "omega"], {"a": [["x"], ["y"]], "b": [["z"], ["w"]]})
    return llm.judge_pairs(spec, [("a", "b")], responses, options, Reporter(quiet=True))


def drip(handler: BaseHTTPRequestHandler, sent: str) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(40):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


def redirect(handler: BaseHTTPRequestHandler, sent: str) -> None:
    reply(handler, b"", 307, Location=f"http://127.0.0.1:9/{quote(KEY, safe='')}")


MODES: dict[str, tuple[Behave, str]] = {
    "redirect": (redirect, "redirects to http://127.0.0.1:9/[redacted]"),
    "slow drip": (drip, "not complete in time"),
    "a year": (lambda h, _: reply(h, b'{"error": {"message": "slow"}}', 429, Retry_After="31536000"), "429: slow"),
    "gigantic": (lambda h, _: reply(h, b" " * (5 * 2**20)), "larger than 4 MiB"),
    "broken off": (lambda h, _: reply(h, b'{"cho', Content_Length="999"), "broke off"),
    "echo in an error": (lambda h, _: reply(h, h.headers["Authorization"].encode(), 400), "400: Bearer [redacted]"),
    "unknown charset": (lambda h, _: reply(h, body("?"), Content_Type="text/plain; charset=x-no"), "no verdict"),
    "bad gzip": (lambda h, _: reply(h, b"no gzip", Content_Encoding="gzip"), "broke off"),
}


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_is_a_failure_and_the_next_run_asks_again(mode: str, serve: Any) -> None:
    behave, reason = MODES[mode]
    server = serve(behave)
    judgements, usage = ask(server.spec)
    assert [j.preference for j in judgements] == [None] * 4 and usage.silent
    [(said, times)] = usage.failures.items()
    assert reason in said and times == 4 and KEY not in said
    assert all(seen["authorization"] == f"Bearer {KEY}" for seen in server.seen)
    server.behave = lambda handler, _: reply(handler, body())
    judgements, usage = ask(server.spec)
    assert usage.n_failed == usage.n_remembered == 0 and all(j.preference is not None for j in judgements)


def test_one_bad_reply_spoils_no_other(serve: Any) -> None:
    server = serve(lambda h, sent: reply(h, body("[[A]] \udfff") if "alpha" in sent else body()))
    judgements, usage = ask(server.spec)
    assert [j.preference is None for j in judgements] == [True, True, False, False] and usage.n_failed == 2


def test_a_proxy_gets_nothing_that_is_for_this_machine(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = serve(lambda h, _: reply(h, body("[[B]]")))
    server = serve(lambda h, _: reply(h, body()))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.server_address[1]}")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    judgements, _ = ask(server.spec)
    assert proxy.seen == [] and len(server.seen) == 4 and all(j.preference is not None for j in judgements)


def test_a_key_that_no_header_can_hold_is_not_repeated(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-Kanarien\nvogel")
    with pytest.raises(ModelError) as caught:
        ask(serve(lambda h, _: reply(h, body())).spec)
    assert "Kanarien" not in str(caught.value)


def files_with(folder: Path, needles: list[bytes]) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and any(n in p.read_bytes().lower() for n in needles)]


def test_no_file_and_no_line_of_a_command_has_the_key(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``duel judge`` before an endpoint that repeats the key: first in every answer, then in errors alone."""

    def echo(handler: BaseHTTPRequestHandler, sent: str) -> None:
        said = f"{handler.headers['Authorization']} {quote(KEY, safe='')}"
        reply(handler, body(f"{said} [[A]]") if "alpha" in sent else said.encode(), 200 if "alpha" in sent else 400)

    server = serve(echo)
    rows = [
        {"prompt_id": p, "policy": name, "sample_index": 0, "prompt": p, "response": name}
        for p in ("alpha", "omega")
        for name in ("a", "b")
    ]
    write_table(rows, tmp_path / "samples.parquet")
    work = tmp_path / "work"
    work.mkdir()
    arguments = [str(tmp_path / "samples.parquet"), "--policy", "a", "--baseline", "b", "--judge", server.spec]
    arguments += ["--out", str(work / "judged.parquet"), "--annotations", str(work / "annotations.json")]
    needles = [KEY[:9].lower().encode(), quote(KEY, safe="")[:9].lower().encode()]
    monkeypatch.setenv("DUEL_CACHE", str(work / "cache"))

    def judge(*more: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["duel", "--debug", "judge", *arguments, *more])
        code = exit_code()
        out, err = capsys.readouterr()
        assert not any(needle in (out + err).encode().lower() for needle in needles), err
        assert files_with(work, needles) == []
        return code, out, err

    code, out, err = judge("--json")
    assert code == 0, err
    assert json.loads(out)["judge_usage"][0]["failures"] == {"BadRequestError 400: Bearer [redacted] [redacted]": 2}
    assert "failed 2 x: BadRequestError 400" in err
    server.behave = lambda handler, _: reply(handler, handler.headers["Authorization"].encode(), 400)
    (work / "cache" / "judgements.sqlite").unlink()
    code, _, err = judge()
    assert code == 2 and "all 4 questions failed: 4 x BadRequestError 400" in err
    assert "Traceback" in err  # --debug shows it, without the reply as it came
    server.behave = lambda handler, _: reply(handler, handler.headers["Authorization"].encode(), 401)
    code, _, err = judge()
    assert code == 2 and "refuses (401)" in err


@pytest.mark.parametrize("address", ["http://user:sk-Canary@127.0.0.1:1/v1", "http://127.0.0.1:1/v1?key=sk-Canary"])
def test_no_error_about_a_setting_repeats_an_address_with_a_secret(
    address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for judges in (
        f'["openai:m@{address}"]',
        f"openai:m@{address}",
        f'["openai:m@{address}", "openai:m@{address}", 7]',
    ):
        monkeypatch.setattr(sys, "argv", ["duel", "validate", "smoke", "--set", f"evaluate.judges={judges}"])
        assert exit_code() == 2
        out, err = capsys.readouterr()
        assert "Canary" not in out + err and "judges" in err
