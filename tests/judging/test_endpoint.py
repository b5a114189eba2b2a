"""A language-model judge over HTTP against a server that fails in every way a server can."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from support.running import command, duel, environment

from toolkit.errors import ModelError, RecipeError
from toolkit.files import write_table
from toolkit.judging import endpoint, llm
from toolkit.judging.answers import Answer, Memory
from toolkit.judging.options import JudgeOptions
from toolkit.judging.records import Judgement
from toolkit.judging.responses import PolicyResponses
from toolkit.judging.win_rates import win_rates, winrate_report
from toolkit.progress import Reporter
from toolkit.recipe.schema import JudgeSettings
from toolkit.recipe.training import ModelSection

pytestmark = pytest.mark.fault

# The scripted judge prefers the response with the larger number in it.
N = 12
PROMPTS = [f"prompt {i}" for i in range(N)]
TEXTS = {"good": [[f"answer {i + 100}"] for i in range(N)], "bad": [[f"answer {i}"] for i in range(N)]}
Script = Callable[[int, str, str], tuple[int, dict[str, str], bytes] | None]


def completion(text: str, finish: str = "stop", logprobs: Any = None) -> bytes:
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
    choice["logprobs"] = logprobs
    usage = {"prompt_tokens": 30, "completion_tokens": 5, "total_tokens": 35}
    body = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}
    return json.dumps(body).encode()


def ok(body: bytes) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, body


def honest(a: int, b: int) -> tuple[int, dict[str, str], bytes]:
    return ok(completion(f"I compare {a} and {b}. [[{'A' if a > b else 'B' if b > a else 'C'}]]"))


class Server(ThreadingHTTPServer):
    """``script(how often this question was asked before, user's message, prompt)`` answers, or None for honesty."""

    daemon_threads = True

    def __init__(self, script: Script) -> None:
        self.asked: Counter[str] = Counter()
        self.times: list[tuple[str, float]] = []
        self.bodies: list[dict[str, Any]] = []
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                user = body["messages"][-1]["content"]
                with outer.lock:
                    before = outer.asked[user]
                    outer.asked[user] += 1
                    outer.times.append((user, time.monotonic()))
                    outer.bodies.append(body)
                    outer.busy += 1
                    outer.most_busy = max(outer.most_busy, outer.busy)
                time.sleep(0.01)
                prompt = re.search(r"prompt \d+", user)
                assert prompt is not None
                answer = script(before, user, prompt[0])
                if answer is None:
                    numbers = [int(n) for n in re.findall(r"answer (\d+)", user)]
                    answer = honest(numbers[0], numbers[-1])
                with outer.lock:
                    outer.busy -= 1
                status, headers, payload = answer
                if status == 0:  # hang up
                    self.close_connection = True
                    self.connection.close()
                    return
                self.send_response(status)
                length = headers.pop("Content-Length", str(len(payload)))
                for name, value in {**headers, "Content-Length": length}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(payload)
                if int(length) > len(payload):
                    self.close_connection = True

            def log_message(self, *args: Any) -> None: ...

        super().__init__(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    @property
    def spec(self) -> str:
        return f"openai:m@http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, *args: Any) -> None: ...


@pytest.fixture
def serve(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Script], Server]]:
    monkeypatch.setenv("DUEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    open_: list[Server] = []

    def start(script: Script = lambda *_: None) -> Server:
        open_.append(Server(script))
        return open_[-1]

    yield start
    for server in open_:
        server.shutdown()
        server.server_close()


def ask(spec: str, **settings: Any) -> tuple[list[Judgement], llm.Usage]:
    options = JudgeOptions(ModelSection(), JudgeSettings(**({"timeout_s": 2.0} | settings)))
    responses = PolicyResponses([f"p{i}" for i in range(N)], PROMPTS, TEXTS)
    return llm.judge_pairs(spec, [("good", "bad")], responses, options, Reporter(quiet=True))


def judge(spec: str, **settings: Any) -> list[Judgement]:
    return ask(spec, **settings)[0]


def test_both_orders_are_asked_and_nothing_is_asked_twice(serve: Any) -> None:
    server = serve()
    judgements = judge(server.spec)
    assert len(judgements) == 2 * N and all(j.preference == 1.0 for j in judgements)
    assert Counter(j.order for j in judgements) == {0: N, 1: N}
    assert set(server.asked.values()) == {1} and len(server.asked) == 2 * N
    assert judge(server.spec) == judgements
    assert sum(server.asked.values()) == 2 * N  # the second run asked nothing
    [row] = win_rates(judgements)
    assert row.win_rate == 1.0 and row.position_consistency == 1.0 and row.n_failed == 0


def test_a_judge_that_takes_the_first_is_found_out(serve: Any) -> None:
    server = serve(lambda *_: ok(completion("[[A]]")))
    [row] = win_rates(judge(server.spec))
    assert row.win_rate == 0.5 and row.position_consistency == 0.0 and row.first_slot_rate == 1.0


def test_concurrency_is_bounded(serve: Any) -> None:
    server = serve()
    judge(server.spec, concurrency=3)
    assert 2 <= server.most_busy <= 3


def test_what_passes_is_tried_again(serve: Any) -> None:
    """429 with Retry-After, 500s, a lost connection, a body that breaks off, a timeout: each once, then an answer."""

    def script(before: int, user: str, prompt: str) -> Any:
        if before:
            return None
        json_type = {"Content-Type": "application/json"}
        troubles: list[Any] = [
            (429, {**json_type, "Retry-After": "1"}, b'{"error": {"message": "slow down"}}'),
            (500, json_type, b'{"error": {"message": "oops"}}'),
            (503, {"Content-Type": "text/html"}, b"<html>busy</html>"),
            (0, {}, b""),
            (200, {**json_type, "Content-Length": "9999"}, completion("[[A]]")[:40]),
            "late",
        ]
        trouble = troubles[int(prompt.split()[1]) % len(troubles)]
        if trouble == "late":
            time.sleep(2.0)
            return None
        return trouble

    server = serve(script)
    judgements = judge(server.spec, timeout_s=1.0)
    assert [j.error for j in judgements if j.preference is None] == []
    assert all(j.preference == 1.0 for j in judgements)
    assert set(server.asked.values()) == {2}
    slow = [t for user, t in server.times if "prompt 0\n" in user and "answer 100\n[End of response A " in user]
    assert slow[1] - slow[0] >= 1.0  # as Retry-After said


def test_what_stays_wrong_is_a_failure_with_its_raw_text_and_is_asked_again_next_time(serve: Any) -> None:
    broken = True

    def script(before: int, user: str, prompt: str) -> Any:
        number = int(prompt.split()[1])
        if not broken or number >= 6:
            return None
        return [
            ok(completion("A is the better one.")),
            ok(completion("[[A]] or rather [[B]]")),
            ok(completion("Let me think about it at length", finish="length")),
            (200, {"Content-Type": "text/html"}, b"<html>hello</html>"),
            ok(b'{"id": "x", "choices": []}'),
            (400, {"Content-Type": "application/json"}, b'{"error": {"message": "context too long"}}'),
        ][number]

    server = serve(script)
    judgements = judge(server.spec)
    failed = [j for j in judgements if j.preference is None]
    assert len(failed) == 12 and [j.prompt_id for j in failed[::2]] == [f"p{i}" for i in range(6)]
    errors = [j.error for j in failed[::2]]
    assert errors[0] == "no verdict in double brackets: 'A is the better one.'"
    assert errors[1].startswith("2 different verdicts") and "or rather" in errors[1]
    assert errors[2].startswith("cut at 512 tokens")
    assert "no chat completion" in errors[3] and "hello" in errors[3]
    assert "no chat completion" in errors[4]
    assert "context too long" in errors[5]
    [row] = win_rates(judgements)
    assert (row.n_judged, row.n_failed, row.tie) == (6, 12, 0.0) and row.win_rate == 1.0

    asked = server.asked.copy()
    broken = False
    again = judge(server.spec)
    assert all(j.preference == 1.0 for j in again)
    new = server.asked - asked
    assert sum(new.values()) == 12 and all(re.search(r"prompt [0-5]\n", user) for user in new)


def test_a_server_that_dies_midway_loses_nothing(serve: Any) -> None:
    dead = False

    def script(before: int, user: str, prompt: str) -> Any:
        return (0, {}, b"") if dead else None

    server = serve(script)
    real = Memory.keep
    n_answered = 0

    def counting(self: Any, question: Any, answer: Any) -> None:
        nonlocal n_answered, dead
        real(self, question, answer)
        n_answered += answer.value is not None
        dead = dead or n_answered >= 5

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Memory, "keep", counting)
        patch.setattr(endpoint, "RETRIES", 0)
        with pytest.raises(ModelError, match="does not answer any more"):
            judge(server.spec, concurrency=2)
    assert n_answered >= 5
    dead = False
    answered = server.asked.copy()
    assert all(j.preference == 1.0 for j in judge(server.spec))
    assert sum((server.asked - answered).values()) == 2 * N - n_answered


def test_a_wrong_key_or_name_stops_at_once(serve: Any) -> None:
    for status in (401, 404):
        server = serve(
            lambda *_, status=status: (status, {"Content-Type": "application/json"}, b'{"error": {"message": "no"}}')
        )
        with pytest.raises(ModelError, match="refuses"):
            judge(server.spec, concurrency=1)
        assert sum(server.asked.values()) == 1


def test_scores_are_asked_once_for_each_response(serve: Any) -> None:
    def script(before: int, user: str, prompt: str) -> Any:
        [number] = re.findall(r"answer (\d+)", user)
        return ok(completion(f"Fine. [[{9 if int(number) >= 100 else 4}]]"))

    server = serve(script)
    judgements = judge(server.spec, template="score")
    assert len(judgements) == N and all(j.preference == 1.0 and j.order is None for j in judgements)
    assert sum(server.asked.values()) == 2 * N


def test_log_probabilities_weigh_the_choice(serve: Any) -> None:
    def script(before: int, user: str, prompt: str) -> Any:
        numbers = [int(n) for n in re.findall(r"answer (\d+)", user)]
        first = -0.5 if numbers[0] > numbers[1] else -1.5
        tops = [{"token": t, "logprob": p, "bytes": None} for t, p in (("A", first), ("B", -1.0), ("x", -0.1))]
        content = [{"token": "A", "logprob": first, "bytes": None, "top_logprobs": tops}]
        return ok(completion("A", logprobs={"content": content}))

    server = serve(script)
    judgements = judge(server.spec, template="logprob")
    expected = 1 / (1 + 2.718281828459045**-0.5)
    assert {round(j.preference or 0, 9) for j in judgements} == {round(expected, 9)}
    assert server.bodies[0]["max_tokens"] == 1 and server.bodies[0]["top_logprobs"] == 20


def test_an_endpoint_without_log_probabilities_says_what_to_do(serve: Any) -> None:
    judgements = judge(serve().spec, template="logprob")
    assert all(j.preference is None and "take the template choice" in j.error for j in judgements)


def test_a_template_of_ones_own(serve: Any, tmp_path: Any) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("kind: choice\nuser: 'MINE {{ prompt }}\n\n  {{ response_a }} | {{ response_b }}'\n")
    server = serve()
    judge(server.spec, template=str(mine))
    assert all(user.startswith("MINE prompt") for user in server.asked)
    mine.write_text("kind: choice\nuser: '{{ prompt }} {{ response_a }}'\n")
    with pytest.raises(RecipeError, match="response_b"):
        judge(server.spec, template=str(mine))


def asked_of(spec: str, **settings: Any) -> llm.Usage:
    return ask(spec, **settings)[1]


def test_tokens_and_money_are_counted_once_and_failures_with_them(serve: Any) -> None:
    broken = True

    def script(before: int, user: str, prompt: str) -> Any:
        return ok(completion("no idea")) if broken and prompt == "prompt 0" else None

    server = serve(script)
    prices = {"prompt_price_usd": 2.0, "completion_price_usd": 10.0}
    first = asked_of(server.spec, **prices)
    assert (first.n_questions, first.n_remembered, first.n_failed) == (24, 0, 2)
    assert (first.prompt_tokens, first.completion_tokens) == (24 * 30, 24 * 5)
    assert first.cost_usd == first.new_cost_usd == pytest.approx((720 * 2 + 120 * 10) / 1e6)
    broken = False
    second = asked_of(server.spec, **prices)
    # two were asked again: what their failures took is not forgotten, and nothing is counted twice
    assert (second.n_remembered, second.n_failed, second.new_prompt_tokens) == (22, 0, 60)
    assert (second.prompt_tokens, second.completion_tokens) == (26 * 30, 26 * 5)
    third = asked_of(server.spec)
    assert (third.prompt_tokens, third.new_prompt_tokens, third.cost_usd) == (26 * 30, 0, None)


def test_ctrl_c_and_rerun_ask_the_rest(serve: Any, tmp_path: Any) -> None:
    """The command itself: interrupted with 130 after some answers, then finished without asking anything again."""

    def script(before: int, user: str, prompt: str) -> Any:
        time.sleep(0.1)
        return None

    server = serve(script)
    rows = [
        {"prompt_id": f"p{i}", "policy": name, "sample_index": 0, "prompt": PROMPTS[i], "response": TEXTS[name][i][0]}
        for name in TEXTS
        for i in range(N)
    ]
    write_table(rows, tmp_path / "samples.parquet")
    out = tmp_path / "judged.parquet"
    arguments = ["judge", str(tmp_path / "samples.parquet"), "--policy", "good", "--baseline", "bad"]
    arguments += ["--judge", server.spec, "--concurrency", "1", "--out", str(out), "--json"]
    arguments += ["--annotations", str(tmp_path / "annotations.json"), "--price", "1", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command(*arguments), env=environment(), **pipes) as process:
        deadline = time.monotonic() + 120
        while sum(server.asked.values()) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and stdout == "" and "run the same command again" in stderr, stderr
    assert not out.exists() and 4 <= sum(server.asked.values()) < 2 * N
    results = json.loads(duel(*arguments).stdout)
    [usage] = results["judge_usage"]
    # at most the request that was under way when Ctrl-C came is asked a second time
    assert len(server.asked) == 2 * N and sum(server.asked.values()) <= 2 * N + 1
    assert usage["n_remembered"] >= 3 and usage["n_failed"] == 0 and usage["prompt_tokens"] == 2 * N * 30
    assert usage["cost_usd"] == pytest.approx((2 * N * 30 * 1 + 2 * N * 5 * 2) / 1e6)
    [row] = results["win_rates"]
    assert (row["win_rate"], row["n_judged"], row["position_consistency"]) == (1.0, N, 1.0)
    [again] = winrate_report([tmp_path / "annotations.json"])["win_rates"]
    assert (again["win_rate"], again["policy"], again["judge"]) == (1.0, "good", server.spec)


def test_equal_texts_are_a_tie_that_nobody_is_asked_about(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TEXTS, "bad", TEXTS["good"])
    server = serve()
    assert {j.preference for j in judge(server.spec)} == {0.5}
    assert not server.asked


def test_questions_wait_on_disk_until_they_are_sent(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, as many wait for their answers as requests may be open."""
    tasks: list[int] = []

    async def reply(*_: Any) -> Answer:
        await asyncio.sleep(0.001)
        tasks.append(len(asyncio.all_tasks()))
        return Answer(1.0)

    monkeypatch.setattr(endpoint, "_reply", reply)
    assert len(judge(serve().spec, concurrency=3)) == len(tasks) == 2 * N
    assert max(tasks) <= 3 + 2  # one that starts them, and one of the loop's thread
