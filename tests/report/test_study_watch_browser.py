"""``duel watch`` of a study that goes on: trials with their states, curves, the verdict at its end."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.begun_study import begin, entry, finish, write_begun_study
from support.running import duel
from support.study_documents import CASES

from toolkit import progress
from toolkit.errors import StoreError
from toolkit.files import write_json
from toolkit.progress import Reporter, RunLog
from toolkit.report.study_progress import study_progress
from toolkit.report.watch import serving, version
from toolkit.runs.store import RunFolder

pytestmark = pytest.mark.e2e


@pytest.fixture
def going(tmp_path: Path) -> Path:
    return write_begun_study(tmp_path / "study")


@pytest.fixture
def address(going: Path) -> Iterator[str]:
    with serving(going, port=0, max_samples=20) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server.address
        server.shutdown()
        thread.join(10)


def states(folder: Path) -> dict[str, tuple[str, str]]:
    return {trial.name: (trial.state, trial.note) for trial in study_progress(folder).trials}


def test_every_trial_has_the_state_that_its_folder_shows(going: Path) -> None:
    now = states(going)
    assert now["rm_ppo-1-seed0"] == ("measured", "dev and test") and now["sft-seed0"] == ("trained", "")
    assert now["rm_ppo-1-seed1"] == ("trained", "dev 1 of 2")
    assert now["rm_ppo-2-seed0"] == ("begun", "sft is there")
    assert now["rm_ppo-2-seed1"][0] == "failed" and "not finite" in now["rm_ppo-2-seed1"][1]
    assert now["dpo-1-seed0"] == ("waiting", "")
    with RunFolder(going / "trials" / "rm_ppo-2-seed1").lock():  # it is tried again
        assert states(going)["rm_ppo-2-seed1"][0] == "training"
    finish(going, "rm_ppo-2-seed1", "ppo")
    assert states(going)["rm_ppo-2-seed1"][0] == "trained"
    # the recipe was changed: what is there is of the earlier one
    manifest = going / "trials" / "rm_ppo-1-seed0" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("key of ppo", "another key"))
    assert states(going)["rm_ppo-1-seed0"][0] == "begun"


def test_a_failure_of_a_stage_that_another_trial_ran_is_one(going: Path) -> None:
    folder = going / "trials" / "dpo-1-seed0"
    folder.mkdir()
    (folder / "failed.json").write_text(json.dumps({"kind": "died", "reason": "killed", "key": "x"}))
    assert states(going)["dpo-1-seed0"] == ("failed", "killed")


def test_the_page_follows_the_study(open_page, going: Path, address: str, monkeypatch) -> None:
    monkeypatch.setattr(progress, "PROGRESS_EVERY_S", 0.0)
    begin(going, "dpo-1-seed0", "dpo")
    trial = going / "trials" / "dpo-1-seed0"
    of_study = Reporter(quiet=True, stage="study", log=RunLog(going))
    of_trial = Reporter(quiet=True, stage="dpo", log=RunLog(trial))
    with (
        RunFolder(going).lock(),
        RunFolder(trial).lock(),
        of_study.task("dpo", 4) as trials,
        of_trial.task("dpo (response tokens)", 3000) as tokens,
    ):
        trials.advance(1, note="dpo (beta=0.05), seed 0")
        tokens.advance(600, note="loss 0.5")
        view = open_page(address)
        text = view.page.locator("#progress").inner_text()
        assert "The study runs: 4 of 10 trials are trained, 1 of them measured on all dev prompts, 1 failed." in text
        assert "study: dpo" in text and "1 of 4" in text and "dpo: response tokens" in text and "600 of 3,000" in text
        assert view.page.locator(".state.training").inner_text() == "training 20%"
        assert view.run("[...document.querySelectorAll('section')].map(n => n.id)") == ["progress", "training"]
        # texts of settings and errors are text
        assert "beta=0.2 <b>bold</b>" in text and "<script>alert(1)</script> is not finite" in text
        drawn, wanted = view.draw_everything()
        assert drawn == wanted == 4
        last = "window.report.figures['study-dpo-loss'].traces.map(t => t.x.length)"
        assert view.run(last) == [3, 0, 0, 0]
        view.run("window.mark = 'the same page'")
        of_trial.log("dpo", entry("dpo", 4))
        tokens.advance(900)
        view.page.wait_for_function(f"{last}[0] === 4", timeout=10_000)
        assert view.page.locator(".state.training").inner_text() == "training 50%"
        assert view.run("window.mark") == "the same page"
        assert view.run("document.documentElement.scrollWidth <= innerWidth")
    # The study ends: its verdict is there, by a page that is new.
    write_json(going / "study.json", CASES["better"]())
    view.page.wait_for_selector("#verdict", timeout=15_000)
    assert view.run("window.mark") is None and view.problems == [] and view.requests == []
    # Something in the folder changes, and nothing on the page.
    view.run("window.mark = 'before'")
    (going / ".progress.json").touch()
    view.page.wait_for_function("window.mark === undefined", timeout=10_000)
    assert "follows the run" in view.page.locator("#live").inner_text()
    # Another call begins: progress again.
    with RunFolder(going).lock():
        view.page.wait_for_selector("#progress", timeout=15_000)
    assert view.problems == [] and view.requests == []


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_it_fits_a_phone_and_says_that_nobody_works(open_page, address: str, width: int, scheme: str) -> None:
    view = open_page(address, width=width, scheme=scheme)
    assert "No process works on this study" in view.page.locator("#progress").inner_text()
    assert view.run("document.documentElement.scrollWidth") == width
    drawn, wanted = view.draw_everything()
    assert drawn == wanted == 2 and view.problems == []


def test_the_version_changes_with_each_file_of_a_trial(going: Path) -> None:
    seen = {version(going)}
    trial = going / "trials" / "rm_ppo-2-seed0"
    for name in ("manifest.json", "metrics.jsonl", ".progress.json", "failed.json"):
        with (trial / name).open("a") as file:
            file.write("\n")
        seen.add(version(going))
    (trial / "scores").mkdir()
    seen.add(version(going))
    with RunFolder(trial).lock():
        seen.add(version(going))
    assert len(seen) == 7


def test_what_is_no_study_is_told_in_words(tmp_path: Path, going: Path) -> None:
    with pytest.raises(StoreError, match="there is no study"):
        study_progress(tmp_path)
    assert "there is no run" in duel("watch", str(tmp_path / "nothing"), check=2).stderr
    (going / "trials.json").write_text("{")
    assert "fix:" in duel("watch", str(going), check=2).stderr
