"""A run that goes on, as ``duel watch`` shows it: stages, curves so far, and nothing of an earlier recipe."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import pytest
from support.run_folder import write_run

from toolkit.errors import StoreError
from toolkit.files import write_json
from toolkit.progress import PROGRESS_FILE, Reporter, RunLog
from toolkit.report import reading
from toolkit.report.page import build_live
from toolkit.report.watch import version
from toolkit.runs.store import RunFolder


@pytest.fixture
def going(tmp_path: Path) -> Path:
    """A folder whose evaluation is of an earlier recipe, and whose PPO has logged ten steps of a second attempt."""
    folder = write_run(tmp_path / "run")
    manifest = json.loads((folder / "manifest.json").read_text())
    done = {name: manifest["stages"][name] for name in ("data", "sft", "reward_model")}
    write_json(folder / "manifest.json", manifest | {"stages": done, "status": "running", "started": time.time() - 60})
    RunFolder(folder).work_dir("ppo", manifest["keys"]["ppo"]).mkdir(parents=True)
    lines = [{"stage": "ppo", "step": step, "objective/kl": 100.0 + step} for step in (1, 2, 3, 4)]
    lines += [{"stage": "ppo", "step": step, "objective/kl": float(step)} for step in range(3, 11)]
    text = "".join(json.dumps(line) + "\n" for line in [{"stage": "sft", "step": 1, "loss": 1.0}, *lines])
    (folder / "metrics.jsonl").write_text(text + '{"stage": "ppo", "st')
    reporter = Reporter(quiet=True, stage="ppo", log=RunLog(folder))
    with reporter.task("ppo", 40) as task:
        task.advance(10, note="loss 0.5")
    return folder


def test_what_is_known_so_far(going: Path) -> None:
    with RunFolder(going).lock():
        run = reading.read_live(going)
        html = build_live(going, version="v", max_samples=10)
    assert [row["state"] for row in run.progress] == ["done", "done", "done", "running", "waiting", "waiting"]
    now = run.progress[3]
    assert (now["label"], now["done"], now["total"], now["note"]) == ("ppo", 10, 40, "loss 0.5")
    assert run.histories["ppo"][:3] == [
        {"stage": "ppo", "step": 1, "objective/kl": 101.0},
        {"stage": "ppo", "step": 2, "objective/kl": 102.0},
        {"stage": "ppo", "step": 3, "objective/kl": 3.0},  # the second attempt's
    ]
    assert [entry["step"] for entry in run.histories["ppo"]] == list(range(1, 11))
    assert "dpo" not in run.histories and run.results["policies"] == [] and run.samples == []
    shown = re.findall(r'<section id="([^"]+)"', html)
    assert shown == ["progress", "training", "settings", "reproduction"]
    assert 'data-live="v"' in html and '<script src="plotly.js">' in html and len(html) < 200_000
    assert re.search(r'<progress value="0.25"', html) and "ppo 10/40" in html


def test_the_last_completions_of_ppo_are_shown(going: Path) -> None:
    """While PPO trains they are in its trainer's folder, and then in the stage's."""
    row = {"prompt": "The <b>film", "completion": "was good", "score": 1.5, "kl_nats": 0.25, "n_tokens": 3}
    records = [{"step": step, **row, "truncated": step == 4, "completion": f"at {step}"} for step in (0, 4, 4)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    keys = json.loads((going / "manifest.json").read_text())["keys"]
    trainer = RunFolder(going).work_dir("ppo", keys["ppo"]) / "trainer"
    trainer.mkdir()
    (trainer / "completions.jsonl").write_text(lines)
    assert reading.read_live(going).completions == records[1:]
    html = build_live(going, version="v", max_samples=10)
    assert "What PPO sampled before step 5" in html and html.count("at 4 …") == 2 and "at 0" not in html
    assert "The &lt;b&gt;film" in html
    finished = write_run(going.parent / "finished")
    assert reading.read_run(finished).completions == []
    (finished / "ppo").mkdir(exist_ok=True)
    (finished / "ppo" / "completions.jsonl").write_text(lines)
    assert reading.read_run(finished).completions == records[1:]


def test_a_killed_run_is_interrupted(going: Path) -> None:
    assert [row["state"] for row in reading.read_live(going).progress][3] == "interrupted"


def test_progress_of_an_earlier_attempt_is_not_shown(going: Path) -> None:
    manifest = json.loads((going / "manifest.json").read_text())
    write_json(going / "manifest.json", manifest | {"started": time.time() + 5})
    with RunFolder(going).lock():
        assert "total" not in reading.read_live(going).progress[3]


def test_a_finished_run_is_its_report(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    html = build_live(folder, version="v", max_samples=10)
    assert re.findall(r'<section id="([^"]+)"', html)[:2] == ["progress", "verdict"]
    assert "sample-data" in html and len(reading.read_live(folder).samples) > 0


def test_the_version_changes_with_the_page(going: Path) -> None:
    seen = [version(going)]
    with RunFolder(going).lock():
        seen.append(version(going))
        (going / "metrics.jsonl").open("a").write("ep\n")
        seen.append(version(going))
        (going / PROGRESS_FILE).unlink()
        seen.append(version(going))
    assert len(set(seen)) == 4 and version(going) == version(going)


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no run"):
        build_live(tmp_path, version="", max_samples=1)
    folder = write_run(tmp_path / "run")
    shutil.rmtree(folder)
    with pytest.raises(StoreError, match="there is no run"):
        build_live(folder, version="", max_samples=1)
