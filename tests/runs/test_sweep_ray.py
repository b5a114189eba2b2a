"""A sweep on Ray computes what the same sweep computes here."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from support.running import SMALL, duel_process

# By a mark, which counts before a fixture makes a whole run.
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
]


def test_ray_computes_what_local_runs_do(small_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    grid = ["--grid", "dpo.beta=0.1,0.5", "--out", str(out), *SMALL]
    done = duel_process("sweep", "smoke", *grid, "--engine", "ray", "--json")
    rows = json.loads(done.stdout)["runs"]
    assert [row["settings"] for row in rows] == [{"dpo.beta": "0.1"}, {"dpo.beta": "0.5"}]
    for name, n in (("data", 1), ("sft", 1), ("reward_model", 1), ("ppo", 1), ("dpo", 2), ("evaluate", 2)):
        assert f"{name}: {n} of 2 runs compute it" in done.stderr
    first = json.loads((out / "dpo.beta=0.1" / "results.json").read_text())
    alone = json.loads((small_run / "results.json").read_text())
    for key in ("policies", "win_rates", "implicit_vs_explicit", "frontier", "hacking", "rm_quality"):
        assert first[key] == alone[key], key


def test_what_a_user_can_mend_comes_back_from_a_task(tmp_path: Path) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text('{"prompt": "a", "chosen": "b"}\n')
    grid = ["--grid", "dpo.beta=0.1,0.5", "--out", str(tmp_path / "sweep"), f"--set=data.source={data}"]
    done = duel_process("sweep", "smoke", *grid, "--engine", "ray", check=2)
    assert "bad.jsonl" in done.stderr and "Traceback" not in done.stderr
