"""The README's commands run, and its two scripts are the ones that are there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.running import ROOT, duel

pytestmark = pytest.mark.e2e

REAL_DATA = Path(os.environ["DUEL_REAL_DATA"]).resolve() if "DUEL_REAL_DATA" in os.environ else None
HH = "pairs.jsonl.gz"
README = ROOT / "README.md"
BLOCKS = re.findall(r"```bash\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)
COMMANDS = [line.strip() for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line.strip()]


EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)


def runnable(command: str) -> bool:
    return command.startswith("duel ")


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
    if HH in command:
        if REAL_DATA is None:
            pytest.skip("DUEL_REAL_DATA is not set")
        (folder / HH).symlink_to(REAL_DATA / "hh_harmless" / HH)
    arguments = shlex.split(command, comments=True)[1:]
    done = duel(*arguments, cwd=folder, check=None)
    assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
    assert done.stdout or "--until" in command, command  # a run that stops on the way has no result to print


def test_the_examples_in_python_run(folder: Path) -> None:
    """Behind the commands, whose files they read; one after another, as a reader would."""
    script = folder / "examples.py"
    script.write_text("\n".join(EXAMPLES), encoding="utf-8")
    done = subprocess.run([sys.executable, script.name], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (folder / "ppo" / "policy" / "adapter_config.json").is_file()
