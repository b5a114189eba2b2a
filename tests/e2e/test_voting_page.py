"""The page for people in a real browser: blind, random places, votes kept, resumed and exported."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from toolkit.judging import people
from toolkit.judging.memory import remembering

N = 8
HOSTILE = "<script>window.hacked = 1</script></script>{{ 7 * 7 }}"
TEXTS = {
    "secret-ppo": [[f"from the first, {i} {HOSTILE}"] for i in range(N)],
    "secret-sft": [[f"from the second, {i}"] for i in range(N)],
}


def pairs() -> list[people.Pair]:
    ids = [f"p{i}" for i in range(N)]
    prompts = [f"prompt {i}" for i in range(N)]
    return people.blind_pairs("secret-ppo", "secret-sft", ids, prompts, TEXTS, annotator="ann", seed=3)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[], str]]:
    """Starts the page over one memory; each call is another sitting."""
    servers: list[Any] = []
    threads: list[threading.Thread] = []

    def start() -> str:
        ready = threading.Event()

        def run() -> None:
            with people.serving(pairs(), tmp_path / "votes.sqlite") as server:
                servers.append(server)
                ready.set()
                server.serve_forever(poll_interval=0.01)

        threads.append(threading.Thread(target=run, daemon=True))
        threads[-1].start()
        assert ready.wait(10)
        return f"http://127.0.0.1:{servers[-1].server_address[1]}/"

    yield start
    for server in servers:
        server.shutdown()
    for thread in threads:
        thread.join(10)


def test_vote_reload_resume_export(serve: Callable[[], str], browser: Any, tmp_path: Path) -> None:
    address = serve()
    page = browser.new_page()
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

    page = browser.new_page()  # another sitting, on another server, goes on where the first stopped
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
        assert [vote.preference for vote in people.votes(pairs(), memory)] == [v["preference"] for v in exported]


def test_the_page_answers_nobody_else(serve: Callable[[], str]) -> None:
    address = serve()

    def status(path: str, *, body: bytes | None = None, **headers: str) -> int:
        request = urllib.request.Request(address + path, data=body, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as reply:
                return int(reply.status)
        except urllib.error.HTTPError as error:
            return error.code

    vote = json.dumps({"id": pairs()[0].question.key, "verdict": "A"}).encode()
    assert status("next", Host="evil.example") == 403  # a name that was made to point here
    assert status("vote", body=vote, **{"Content-Type": "text/plain"}) == 400  # what a foreign form could send
    json_type = {"Content-Type": "application/json"}
    assert status("vote", body=b"[]", **json_type) == 400
    assert status("vote", body=b'{"id": "x", "verdict": "A"}', **json_type) == 400
    assert status("../../etc/passwd") == 404
    assert status("vote", body=vote, **json_type) == 200
