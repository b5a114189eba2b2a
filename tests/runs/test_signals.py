"""Runs that are told to end, and processes that share a stage of a run which is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.running import ROOT, SMALL, command, duel, duel_process, environment

from toolkit.cli import main
from toolkit.runs.store import WORKERS_LOCK, RunFolder

pytestmark = [pytest.mark.fault, pytest.mark.e2e]


def wait_for(out: Path, pattern: str, process: subprocess.Popen[str]) -> None:
    while process.poll() is None and not list(out.glob(pattern)):
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
@pytest.mark.parametrize("moment", [".work/sft-*", ".work/dpo-*/trainer/*"])
def test_a_signal_ends_a_run_in_words(
    number: int, code: int, word: str, moment: str, small_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    if "dpo" in moment:  # the stages before are there; DPO runs again, for longer
        shutil.copytree(small_run, out)
    words = command("run", "smoke", "--out", str(out), "--until", "dpo", *SMALL, "--set=dpo.num_train_epochs=40")
    with subprocess.Popen(words, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        wait_for(out, moment, process)
        process.send_signal(number)
        told = time.monotonic()
        _, stderr = process.communicate(timeout=30)
    assert time.monotonic() - told < 15
    assert process.returncode == code
    assert stderr.splitlines()[-1] == f"{word}; run the same command again to continue" and "Traceback" not in stderr
    assert json.loads((out / "manifest.json").read_text(encoding="utf-8"))["status"] == "interrupted"


def test_an_interrupted_force_goes_on_without_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With it, the same command would remove its work."""
    for words, said in (
        (["run", "smoke", "--force"], "run the same command without --force to continue"),
        (["run", "smoke", "--", "--force"], "run the same command again to continue"),
        (["report", "run", "--force"], "run the same command again to continue"),
    ):
        monkeypatch.setattr(sys, "argv", ["duel", *words])
        assert main._interruption(KeyboardInterrupt()) == 130
        assert capsys.readouterr().err == f"\ninterrupted; {said}\n"


IN_A_DESTRUCTOR = """
import os, sys, time
from toolkit.cli import main

class Held:
    def __del__(self):
        os.kill(os.getpid(), int(sys.argv[1]))
        time.sleep(1)

def command(**_):
    held = Held()
    del held
    time.sleep(20)

main.cli.main = command
main.main()
"""


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_in_a_destructor_ends_the_command(number: int, code: int, word: str) -> None:
    """Python ignores exceptions there, among them the one of a signal that came in a long computation before."""
    words = [sys.executable, "-c", IN_A_DESTRUCTOR, str(int(number))]
    began = time.monotonic()
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == code and time.monotonic() - began < 15
    assert done.stderr.splitlines()[-1] == f"{word}; run the same command again to continue"


def processes_with(word: str) -> list[int]:
    """Ids of the processes whose command line has this word."""
    ids = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                line = (folder / "cmdline").read_bytes().decode(errors="replace")
            except OSError:  # it has ended
                continue
            if word in line and int(folder.name) != os.getpid():
                ids.append(int(folder.name))
    return ids


def test_launched_processes_share_a_stage_die_with_a_killed_run_and_hold_its_folder_until_then(tmp_path: Path) -> None:
    out = tmp_path / "run"
    more = ["--set=sft.num_train_epochs=40", "--set=sft.per_device_train_batch_size=4"]
    words = ["run", "smoke", "--out", str(out), "--until", "sft", *SMALL, *more, "--", "--num_processes", "2"]
    pipe = {"stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command("-q", *words), cwd=ROOT, env=environment(), **pipe) as process:
        wait_for(out, ".work/sft-*/trainer/*", process)
        process.terminate()
        told = time.monotonic()
        assert process.wait(timeout=30) == 143 and time.monotonic() - told < 5
        _, stderr = process.communicate(timeout=30)  # the launched processes have ended as well
    assert "Traceback" not in stderr and stderr.splitlines()[-1].startswith("terminated; run the same command again")
    with subprocess.Popen(command(*words), cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL) as process:
        wait_for(out, ".work/sft-*/trainer/checkpoint-*", process)
        process.kill()
    killed = time.monotonic()
    while processes_with(str(out / ".work")) and time.monotonic() - killed < 20:
        time.sleep(0.1)
    assert not processes_with(str(out / ".work")) and time.monotonic() - killed < 10
    done = duel_process(*words)
    assert "resumed at step" in done.stderr
    record = json.loads((out / "sft" / "stage.json").read_text(encoding="utf-8"))
    assert record["metrics"]["processes"] == record["fields"]["processes"] == 2
    assert record["compute"]["threads"] >= 1 and record["compute"]["attention"] == ["grouped"]


def test_a_run_is_refused_while_processes_of_another_live(tmp_path: Path) -> None:
    out = tmp_path / "run"
    RunFolder(out).create()
    with RunFolder(out).as_worker(), RunFolder(out).as_worker():
        done = duel("run", "smoke", "--out", str(out), *SMALL, check=2)
    assert "another process is working on this run" in done.stderr and (out / WORKERS_LOCK).is_file()
