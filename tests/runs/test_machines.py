"""A run over two machines: here two network namespaces, joined by a cable, over one file system."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.running import ROOT, SMALL, command, environment

from toolkit.errors import RecipeError, StoreError
from toolkit.files import read_json
from toolkit.progress import Reporter
from toolkit.runs import machines
from toolkit.runs.launch import Launch, launch_of
from toolkit.runs.machines import MACHINES_FILE, announce, follow, leading
from toolkit.runs.store import RunFolder

TWO = Launch(processes=2, machines=2)
OTHER = Launch(processes=2, machines=2, machine_rank=1)


def test_how_many_machines_the_arguments_name(tmp_path: Path) -> None:
    assert launch_of(["--num_machines", "2", "--machine_rank", "1", "--num_processes", "4"]) == Launch(4, 2, 1)
    config = tmp_path / "accelerate.yaml"
    config.write_text("distributed_type: MULTI_GPU\nnum_machines: 2\nmachine_rank: 1\nnum_processes: 2\n")
    assert launch_of(["--config_file", str(config)]) == OTHER
    assert launch_of(["--config_file", str(config), "--machine_rank", "0"]) == TWO
    for processes in ([], ["--num_processes", "3"]):
        with pytest.raises(RecipeError, match="2 machines share"):
            launch_of(["--num_machines", "2", *processes])


@pytest.mark.parametrize("fails", [False, True])
def test_another_machine_joins_each_stage_until_the_run_ends(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an earlier run left in the folder is not joined."""
    joined: list[str] = []
    more, first = threading.Event(), threading.Event()

    def launch(arguments: list[str], module: str, request: list[str]) -> int:
        joined.append(Path(request[0]).relative_to(tmp_path.resolve()).as_posix())
        (more if len(joined) == 2 else first).set()
        return 0

    monkeypatch.setattr(machines, "accelerate_launch", launch)
    monkeypatch.setattr(machines, "CHECK_S", 0.01)
    with RunFolder(tmp_path).lock(), leading(tmp_path, TWO):
        announce(tmp_path, tmp_path / "old.json", TWO)
    outcome: list[Exception | None] = []

    def other() -> None:
        try:
            follow(tmp_path, ["--machine_rank", "1"], OTHER, Reporter(quiet=True))
            outcome.append(None)
        except StoreError as error:
            outcome.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    try:
        with RunFolder(tmp_path).lock(), leading(tmp_path, TWO):
            announce(tmp_path, tmp_path / "sft.json", TWO)
            assert first.wait(10)
            announce(tmp_path, tmp_path / "dpo.json", TWO)
            assert more.wait(10)
            if fails:
                raise RuntimeError
    except RuntimeError:
        pass
    thread.join(10)
    assert joined == ["sft.json", "dpo.json"]
    assert [type(error) for error in outcome] == [StoreError if fails else type(None)]
    assert read_json(tmp_path / MACHINES_FILE)["ended"] == ("failed" if fails else "done")


def test_a_run_on_one_machine_leaves_no_file_for_others(tmp_path: Path) -> None:
    with leading(tmp_path, Launch(processes=2)):
        announce(tmp_path, tmp_path / "sft.json", Launch(processes=2))
    assert not (tmp_path / MACHINES_FILE).exists()


def ip(*words: str) -> int:
    return subprocess.run(["ip", *words], capture_output=True, check=False).returncode


@pytest.fixture
def two_nodes() -> Iterator[tuple[str, str]]:
    """Two network namespaces that reach each other, as 10.79.0.1 and 10.79.0.2, and nothing else."""
    names = (f"duel{os.getpid()}a", f"duel{os.getpid()}b")
    if shutil.which("ip") is None or ip("netns", "add", names[0]) != 0:
        pytest.skip("it takes iproute2 and the right to make network namespaces")
    try:
        assert ip("netns", "add", names[1]) == 0
        assert ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "cable", "netns", names[1]) == 0
        for number, name in enumerate(names, start=1):
            assert ip("-n", name, "addr", "add", f"10.79.0.{number}/24", "dev", "cable") == 0
            assert ip("-n", name, "link", "set", "cable", "up") == ip("-n", name, "link", "set", "lo", "up") == 0
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


@pytest.mark.slow
@pytest.mark.e2e
def test_two_nodes_share_a_run(two_nodes: tuple[str, str], tmp_path: Path) -> None:
    """The same command on both, but for the rank; accelerate's own rendezvous."""
    out = tmp_path / "run"
    words = ["run", "smoke", *SMALL, "--out", str(out), "--json", "--", "--num_machines", "2", "--num_processes", "2"]
    words += ["--main_process_ip", "10.79.0.1", "--main_process_port", "29501"]
    running = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, *command(*words, "--machine_rank", str(rank))],
            cwd=ROOT,
            env=environment(GLOO_SOCKET_IFNAME="cable"),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank, name in enumerate(two_nodes)
    ]
    done = [process.communicate(timeout=800) for process in running]
    assert [process.returncode for process in running] == [0, 0], [stderr[-3000:] for _, stderr in done]
    first, other = (json.loads(stdout) for stdout, _ in done)
    assert first["verdict"] == other["verdict"]
    for stage in ("sft", "reward_model", "ppo", "dpo", "evaluate"):
        assert read_json(out / stage / "stage.json")["metrics"]["processes"] == 2, stage
    assert "joins the stages" in done[1][1] and "joins" not in done[0][1]
