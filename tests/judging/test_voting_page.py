"""The page for people in a real browser: blind, random places, votes stored, resumed and exported."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from toolkit.judging import human
from toolkit.judging.answers import remembering
from toolkit.judging.responses import PolicyResponses

pytestmark = pytest.mark.e2e

N = 8
HOSTILE = "<script>window.hacked = 1</script></script>{{ 7 * 7 }}"
TEXTS = {
    "secret-ppo": [[f"from the first, {i} {HOSTILE}"] for i in range(N)],
    "secret-sft": [[f"from the second, {i}"] for i in range(N)],
}


RESPONSES = PolicyResponses([f"p{i}" for i in range(N)], [f"prompt {i}" for i in range(N)], TEXTS)
BALLOTS = human.Ballots("secret-ppo", "secret-sft", RESPONSES, seed=3)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[], str]]:
    """Starts the page over one memory; each call is another sitting."""
    servers: list[Any] = []
    threads: list[threading.Thread] = []

    def start() -> str:
        ready = threading.Event()

        def run() -> None:
            with human.serving(BALLOTS, tmp_path / "votes.sqlite", annotator="ann") as server:
                servers.append(server)
                ready.set()
                server.serve_forever(poll_interval=0.01)

        threads.append(threading.Thread(target=run, daemon=True))
        threads[-1].start()
        assert ready.wait(10)
        return servers[-1].address

    yield start
    for server in servers:
        server.shutdown()
    for thread in threads:
        thread.join(10)


def test_vote_reload_resume_export(serve: Callable[[], str], browser: Any, tmp_path: Path) -> None:
    address = serve()
    page = browser.new_page(bypass_csp=True)
    problems: list[str] = []
    page.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    sent = []  # all that the page is given to know
    page.goto(address)

    def progress(voted: int) -> None:
        page.wait_for_function(f"document.getElementById('progress').textContent === '{voted} of {N}'")

    def prefer_the_first() -> None:
        """Votes for whichever place shows the policy's text."""
        page.click("[data-vote=A]" if "from the first" in page.inner_text("#a") else "[data-vote=B]")

    progress(0)
    assert HOSTILE in page.inner_text("#a") + page.inner_text("#b")
    prefer_the_first()
    progress(1)
    page.keyboard.press("t")
    progress(2)
    page.reload()
    progress(2)
    shown = page.inner_text("#prompt")
    page.close()

    page = browser.new_page(bypass_csp=True)  # another sitting, on another server, goes on where the first stopped
    address = serve()
    page.goto(address)
    progress(2)
    assert page.inner_text("#prompt") == shown
    for voted in range(2, N):
        with urllib.request.urlopen(address + "next", timeout=10) as reply:
            sent.append(reply.read().decode())
        sent.append(page.content())
        prefer_the_first()
        progress(voted + 1)
    assert page.is_visible("#done") and not page.is_visible("#pair")
    assert page.evaluate("window.hacked") is None and problems == []
    with page.expect_download() as download:
        page.click("text=Export votes")
    exported = [json.loads(line) for line in Path(download.value.path()).read_text().splitlines()]
    assert [vote["preference"] for vote in exported].count(1.0) == N - 1
    assert [vote["preference"] for vote in exported].count(0.5) == 1
    assert {vote["judge"] for vote in exported} == {"human:ann"}
    assert {vote["order"] for vote in exported} == {0, 1}
    assert all("from the" in text and "secret" not in text for text in sent)
    with remembering(tmp_path / "votes.sqlite") as memory:
        assert [vote.preference for vote in human.votes(BALLOTS, memory)] == [v["preference"] for v in exported]


def get(address: str) -> Any:
    with urllib.request.urlopen(address, timeout=10) as reply:
        return json.loads(reply.read())


def vote(address: str, **body: str) -> Any:
    request = urllib.request.Request(
        address + "vote", data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10) as reply:
        return json.loads(reply.read())


def test_two_annotators_at_once(serve: Callable[[], str], browser: Any) -> None:
    address = serve()
    anna, bob = browser.new_page(bypass_csp=True), browser.new_page(bypass_csp=True)
    anna.goto(address)
    bob.goto(address + "?annotator=bob")
    anna.wait_for_function("document.getElementById('annotator').value === 'ann'")
    anna.fill("#annotator", "anna b")  # the letters are also the keys of votes
    anna.press("#annotator", "Enter")
    anna.wait_for_function("location.search === '?annotator=anna%20b'")
    for page, clicks in ((anna, 3), (bob, 2), (anna, 1)):
        page.wait_for_selector("[data-vote=A]", state="visible")
        for _ in range(clicks):
            before = page.inner_text("#progress")
            page.click("[data-vote=A]")
            page.wait_for_function(f"document.getElementById('progress').textContent !== '{before}'")
    anna.reload()
    anna.wait_for_function(f"document.getElementById('progress').textContent === '4 of {N}'")
    assert bob.inner_text("#progress") == f"2 of {N}"
    with urllib.request.urlopen(address + "export", timeout=10) as reply:
        exported = [json.loads(line) for line in reply.read().decode().splitlines()]
    assert sorted(row["judge"] for row in exported) == ["human:anna b"] * 4 + ["human:bob"] * 2


def test_requests_of_many_annotators_lose_no_vote(serve: Callable[[], str], tmp_path: Path) -> None:
    address = serve()

    def sit(name: str) -> None:
        state = get(f"{address}next?annotator={name}")
        while state["pair"]:
            state = vote(address, id=state["pair"]["id"], verdict="B", annotator=name)

    people_voting = [threading.Thread(target=sit, args=(f"w{k}",)) for k in range(5)]
    for thread in people_voting:
        thread.start()
    for thread in people_voting:
        thread.join(60)
    with remembering(tmp_path / "votes.sqlite") as memory:
        judgements = human.votes(BALLOTS, memory)
    assert Counter(row.judge for row in judgements) == {f"human:w{k}": N for k in range(5)}
    # each sees an order of their own
    assert len({tuple(pair.blank.prompt_id for pair in BALLOTS.of(f"w{k}")) for k in range(5)}) > 1


def test_the_page_answers_nobody_else(serve: Callable[[], str]) -> None:
    address = serve()

    def status(path: str, *, body: bytes | None = None, **headers: str) -> int:
        request = urllib.request.Request(address + path, data=body, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as reply:
                return int(reply.status)
        except urllib.error.HTTPError as error:
            return error.code

    body = json.dumps({"id": BALLOTS.of("ann")[0].question.key, "verdict": "A"}).encode()
    assert status("next", Host="evil.example") == 403  # a name that was made to point here
    assert status("vote", body=body, **{"Content-Type": "text/plain"}) == 400  # what a foreign form could send
    json_type = {"Content-Type": "application/json"}
    assert status("vote", body=b"[]", **json_type) == 400
    assert status("vote", body=b'{"id": "x", "verdict": "A"}', **json_type) == 400
    assert status("../../etc/passwd") == 404
    assert status("vote", body=body, **json_type) == 200
    assert status("vote", body=body, **json_type) == 409  # the first vote counts
    too_long = {**json_type, "Content-Length": str(2**30)}
    assert status("vote", body=body, **too_long) == 400
    assert status("vote", body=b"[" * 60_000, **json_type) == 400
    root = address.rstrip("/").rpartition("/")[0] + "/"
    for path in ("", "next", "export", "A" * 22 + "/next", address.split("/")[3], "%2e%2e/next"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(root + path, timeout=10)
        assert caught.value.code == (404 if path == address.split("/")[3] else 403)


def test_its_scripts_run_under_its_policy_and_no_others(serve: Callable[[], str], browser: Any) -> None:
    page = browser.new_page()  # the policy holds, so that nothing may be evaluated from here
    refused: list[str] = []
    page.on("console", lambda message: refused.append(message.text))
    page.goto(serve())
    page.locator("#progress", has_text=f"0 of {N}").wait_for()
    page.locator("[data-vote=A]").click()
    page.locator("#progress", has_text=f"1 of {N}").wait_for()
    assert refused == []
    page.close()


def test_a_silent_connection_blocks_nobody(serve: Callable[[], str]) -> None:
    address = serve()
    port = int(address.split(":")[2].split("/")[0])
    with socket.create_connection(("127.0.0.1", port)) as silent:
        silent.sendall(b"GET /")
        started = time.monotonic()
        assert get(address + "next")["total"] == N
        assert time.monotonic() - started < 5
