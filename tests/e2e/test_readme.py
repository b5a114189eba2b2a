"""The README's commands run, and its two scripts are the ones that are there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT, duel

README = ROOT / "README.md"
BLOCKS = re.findall(r"```bash\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)
PYTHON = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)
COMMANDS = [line.strip() for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def runnable(command: str) -> bool:
    return command.startswith("duel ") and "  # not in the test" not in command


def test_the_readme_opens_with_its_two_commands() -> None:
    assert COMMANDS[:2] == ["scripts/quickstart", "scripts/test"]
    for script in COMMANDS[:2]:
        assert (ROOT / script).stat().st_mode & 0o111, script
        subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The README's commands run in order, in one folder, as a reader would type them."""
    return tmp_path_factory.mktemp("readme")


@pytest.mark.parametrize("command", [c for c in COMMANDS if runnable(c)])
def test_every_duel_command_runs(command: str, folder: Path) -> None:
    arguments = shlex.split(command, comments=True)[1:]
    done = duel(*arguments, cwd=folder, check=None)
    assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
    assert done.stdout, command


def test_the_python_block_runs(folder: Path) -> None:
    assert len(PYTHON) == 1
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PYTHON[0]]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
