"""``duel watch`` while a run goes on: the page follows it without a reload, keeps to this machine, and ends."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.run_folder import write_run
from support.running import ROOT, command, duel, environment

from toolkit import progress
from toolkit.files import write_json
from toolkit.progress import Reporter, RunLog
from toolkit.report.watch import serving
from toolkit.runs.store import RunFolder

pytestmark = pytest.mark.e2e


@pytest.fixture
def going(tmp_path: Path) -> Path:
    folder = write_run(tmp_path / "run")
    manifest = json.loads((folder / "manifest.json").read_text())
    write_json(tmp_path / "finished.json", manifest)
    done = {name: manifest["stages"][name] for name in ("data", "sft")}
    write_json(folder / "manifest.json", manifest | {"stages": done, "status": "running", "started": time.time()})
    RunFolder(folder).work_dir("reward_model", manifest["keys"]["reward_model"]).mkdir(parents=True)
    return folder


@pytest.fixture
def address(going: Path) -> Iterator[str]:
    with serving(going, port=0, max_samples=20) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server.address
        server.shutdown()
        thread.join(10)


def log(reporter: Reporter, task: Any, step: int) -> None:
    reporter.log("reward_model", {"step": step, "loss": 0.7 - step / 100, "rewards/accuracies": 0.5 + step / 100})
    task.advance(5, note=f"at {step}")


def test_the_page_follows_the_run(open_page, going: Path, address: str, monkeypatch) -> None:
    monkeypatch.setattr(progress, "PROGRESS_EVERY_S", 0.0)
    reporter = Reporter(quiet=True, stage="reward_model", log=RunLog(going))
    with RunFolder(going).lock(), reporter.task("reward_model", 40) as task:
        log(reporter, task, 5)
        log(reporter, task, 10)
        view = open_page(address)
        assert "at 10" in view.page.locator("#progress .running").inner_text()
        assert view.run("[...document.querySelectorAll('section')].map(n => n.id)") == [
            *("progress", "training", "settings", "reproduction")
        ]
        figure = view.page.locator("figure", has_text="accuracy of the reward model")
        figure.scroll_into_view_if_needed()
        points = (
            "document.querySelectorAll('[data-figure=\"run0-reward_model-rewards-accuracies\"] .points path').length"
        )
        view.page.wait_for_function(f"{points} === 2")
        view.run("window.mark = 'the same page'")
        log(reporter, task, 15)
        view.page.wait_for_function(f"{points} === 3", timeout=10_000)
        assert "at 15" in view.page.locator("#progress .running").inner_text()
        assert view.run("window.mark") == "the same page"
    # The run ends: the report is there, by a page that is new.
    write_json(going / "manifest.json", json.loads((going.parent / "finished.json").read_text()))
    view.page.wait_for_selector("#verdict", timeout=15_000)
    assert view.page.locator(".row").count() == 20
    assert view.run("window.mark") is None and view.problems == [] and view.requests == []
    drawn, wanted = view.draw_everything()
    assert drawn == wanted > 20


def test_its_scripts_run_under_its_policy(browser: Any, address: str) -> None:
    page = browser.new_page()
    refused: list[str] = []
    page.on("console", lambda message: refused.append(message.text))
    page.goto(address)
    page.locator("figure").first.scroll_into_view_if_needed()
    page.locator("[data-figure] .main-svg").first.wait_for(state="attached", timeout=10_000)
    page.locator("#live", has_text="follows the run").wait_for()
    assert refused == []
    page.close()


def test_without_the_token_nothing_is_answered_and_a_silent_client_blocks_nobody(address: str) -> None:
    root, token = address.rstrip("/").rsplit("/", 1)
    with socket.create_connection(("127.0.0.1", int(root.rsplit(":", 1)[1]))) as silent:
        silent.sendall(b"GET /")
        started = time.monotonic()
        for path in ("/", "/version", "/plotly.js", f"/{token[:-1]}/version"):
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(root + path, timeout=10)
            assert caught.value.code == 403
        with urllib.request.urlopen(address + "version", timeout=10) as reply:
            assert "script-src 'self' 'sha256-" in reply.headers["Content-Security-Policy"]
        assert time.monotonic() - started < 5


def test_it_says_when_the_server_is_gone(open_page, going: Path) -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command("watch", str(going)), cwd=ROOT, env=environment(), **pipes) as watching:
        assert watching.stdout is not None and watching.stderr is not None
        address = watching.stdout.readline().strip()
        view = open_page(address)
        assert "follows the run" in view.page.locator("#live").inner_text()
        watching.send_signal(signal.SIGINT)
        assert watching.wait(20) == 0
        assert "closing the page" in watching.stderr.read()
    view.page.wait_for_selector("#live.lost", timeout=15_000)


def test_other_hosts_and_paths_get_nothing(address: str, tmp_path: Path) -> None:
    for path, host, status in (("", "evil.example", 403), ("../manifest.json", None, 404)):
        request = urllib.request.Request(address + path, headers={"Host": host} if host else {})
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=10)
        assert caught.value.code == status
    assert "there is no run" in duel("watch", str(tmp_path / "nothing"), check=2).stderr
