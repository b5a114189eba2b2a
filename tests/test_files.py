"""Files are whole or absent, fingerprints see what they should, and a stage's code is what it can reach."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.errors import StoreError
from toolkit.files import (
    PACKAGE,
    atomic_write,
    code_fingerprint,
    copy_whole,
    file_fingerprint,
    fingerprint,
    flat,
    folder_fingerprint,
    imported_modules,
    is_hub_id,
    is_locked,
    locked,
    package_code_fingerprint,
    parse_json,
    read_json,
    write_json,
    write_table,
)

# ---------------------------------------------------------------- locks


def test_one_that_only_asks_refuses_nobody(tmp_path: Path) -> None:
    """It has the lock for an instant: duel watch asks every two seconds."""
    path = tmp_path / ".lock"
    with path.open("a") as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        timer = threading.Timer(0.02, fcntl.flock, [asking, fcntl.LOCK_UN])
        timer.start()
        with locked(path):
            assert is_locked(path)
        timer.join()
        fcntl.flock(asking, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError), locked(path):
            pass


# ---------------------------------------------------------------- fingerprints

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=3), values, max_size=4))
def test_a_fingerprint_does_not_see_the_order_of_keys(value: dict[str, object]) -> None:
    turned = dict(reversed(list(value.items())))
    assert fingerprint(value) == fingerprint(turned) == fingerprint(json.loads(json.dumps(value)))
    assert len(fingerprint(value)) == 16
    assert fingerprint(value) != fingerprint({**value, "more": 1, "x" * 9: 2})


def test_fingerprints_see_every_byte_and_name(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\x00\x01")
    (tmp_path / "b.txt").write_text("ignored")
    first = folder_fingerprint(tmp_path, ["*.bin", "a.*"])
    (tmp_path / "b.txt").write_text("still ignored")
    assert folder_fingerprint(tmp_path, ["*.bin"]) == first
    (tmp_path / "a.bin").write_bytes(b"\x00\x02")
    assert folder_fingerprint(tmp_path, ["*.bin"]) != first
    (tmp_path / "a.bin").write_bytes(b"\x00\x01")
    (tmp_path / "a.bin").rename(tmp_path / "c.bin")
    assert folder_fingerprint(tmp_path, ["*.bin"]) != first
    # sha256 of the two bytes, by hand
    assert file_fingerprint(tmp_path / "c.bin") == "b413f47d13ee2fe6"


@given(st.dictionaries(st.text("ab", min_size=1), st.dictionaries(st.text("cd", min_size=1), st.integers())))
def test_flat(value: dict[str, dict[str, int]]) -> None:
    expected = {f"{a}.{b}": n for a, inner in value.items() for b, n in inner.items()}
    assert flat(value) == expected | {a: {} for a, inner in value.items() if not inner}


# ---------------------------------------------------------------- whole or absent


def test_json_comes_back_and_nan_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.json"
    write_json(path, {"a": [1, 2.5, None], "b": "ü"})
    assert read_json(path) == {"a": [1, 2.5, None], "b": "ü"}
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError):
            write_json(path, {"a": bad})
    assert read_json(path) == {"a": [1, 2.5, None], "b": "ü"}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


@given(st.text(st.sampled_from('{}[]":,\\u0d83e -.1Einfalsetrun\x00\n\ud83d\u00e9'), max_size=12))
def test_json_has_the_values_that_python_reads(text: str) -> None:
    """A faster reader is asked first: it must never give another value, nor refuse what Python's takes."""
    try:
        expected = json.loads(text)
    except ValueError:
        with pytest.raises(ValueError):
            parse_json(text)
    else:
        assert repr(parse_json(text)) == repr(expected)


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a": NaN}', "-Infinity", '"\\ud83d"', "1e999", "-0.0", "[" * 300 + "]" * 300]
)
def test_odd_json_is_read_as_python_reads_it(text: str) -> None:
    assert repr(parse_json(text)) == repr(json.loads(text))


def test_a_table_has_the_columns_of_all_rows(tmp_path: Path) -> None:
    write_table([{"a": 1}, {"a": 2, "label": "chosen"}], tmp_path / "t.parquet")
    expected = [{"a": 1, "label": None}, {"a": 2, "label": "chosen"}]
    assert pq.read_table(tmp_path / "t.parquet").to_pylist() == expected


@pytest.mark.parametrize("content", [b"{", b"", b'{"a": "\xff"}'])
def test_damaged_json_says_where_it_is(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(StoreError, match="damaged") as caught:
        read_json(tmp_path / "x.json")
    assert caught.value.where == str(tmp_path / "x.json") and caught.value.fix


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, fails, full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"new": 2})
    assert read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_copy_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_text("new")
    target.write_text("old")

    def broken(source: Path, target: Path) -> None:
        target.write_text("ne")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", broken)
        with pytest.raises(OSError, match="No space"):
            copy_whole(source, target)
    assert target.read_text() == "old" and len(list(tmp_path.iterdir())) == 2
    copy_whole(source, target)
    assert target.read_text() == "new" and len(list(tmp_path.iterdir())) == 2


WRITER = """
import sys
from pathlib import Path
from toolkit.files import write_json
path = Path(sys.argv[1])
n = 0
while True:
    n += 1
    write_json(path, {"n": n, "filling": "x" * 200_000, "again": n})
    if n == 1:
        print("started", flush=True)
"""


def test_a_kill_in_the_middle_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout is not None and writer.stdout.readline() == "started\n"
        time.sleep(0.1)
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        writer.stdout.close()  # type: ignore[union-attr]
    value = read_json(path)
    assert value["n"] == value["again"] >= 1 and len(value["filling"]) == 200_000


def test_a_partial_file_of_a_killed_process_is_written_anew(tmp_path: Path) -> None:
    partial = tmp_path / f".x.{os.getpid()}.partial"
    partial.mkdir()
    (partial / "half").write_text("a half")
    with atomic_write(tmp_path / "x") as path:
        assert path == partial and not path.exists()
        path.mkdir()
        (path / "whole").write_text("whole")
    assert [p.name for p in tmp_path.rglob("*")] == ["x", "whole"]


def test_a_folder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_write(tmp_path / "x") as partial:
            partial.mkdir()
            (partial / "half").write_text("a half")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("Anthropic/hh-rlhf", True),
        ("a-b/c.d_e", True),
        ("tiny", False),
        ("./model", False),
        ("../model", False),
        ("/a/b", False),
        ("~/model", False),
        ("a/b/c", False),
        ("a b/c", False),
    ],
)
def test_the_form_of_a_hub_id(name: str, is_one: bool) -> None:
    assert is_hub_id(name) is is_one


# ---------------------------------------------------------------- code

STAGES = ("data", "sft", "reward_model", "ppo", "dpo", "evaluate", "report")


def codes(package: Path) -> dict[str, str]:
    return {stage: package_code_fingerprint(f"toolkit.stages.{stage}", package) for stage in STAGES}


@pytest.fixture(scope="module")
def before() -> dict[str, str]:
    return codes(PACKAGE)


def copied(tmp_path: Path) -> Path:
    return shutil.copytree(PACKAGE, tmp_path / "toolkit", ignore=shutil.ignore_patterns("__pycache__"))


def test_a_process_has_one_fingerprint_of_a_module_which_is_that_of_the_package(before: dict[str, str]) -> None:
    assert {stage: code_fingerprint(f"toolkit.stages.{stage}") for stage in STAGES} == before
    code_fingerprint.cache_clear()
    assert [code_fingerprint("toolkit.stages.sft") for _ in range(3)] == [before["sft"]] * 3
    assert code_fingerprint.cache_info().misses == 1


def append(file: Path, text: str) -> None:
    with file.open("ab") as out:
        out.write(text.encode())


def test_equal_code_has_equal_fingerprints(before: dict[str, str], tmp_path: Path) -> None:
    assert codes(copied(tmp_path)) == before and len(set(before.values())) == len(STAGES)


LATER = {"sft", "reward_model", "ppo", "dpo", "evaluate"}


@pytest.mark.parametrize(
    ("file", "stages"),
    [
        ("preferences/assets/words.txt.gz", set(STAGES)),  # what the gold reward knows of English
        ("preferences/of_a_new_kind.py", set(STAGES)),
        ("preferences/great.py", set(STAGES)),
        ("models/tokenizer.py", {"data", *LATER}),
        ("engine/sampling.py", LATER),
        ("training/trainer.py", LATER - {"evaluate"}),
        ("ppo/objective.py", {"ppo", "dpo"}),  # online DPO labels its samples with what PPO scores them with
        ("judging/templates.py", {"dpo", "evaluate"}),  # or with a judge
        ("stages/dpo.py", {"dpo"}),
        ("stages/contexts.py", set(STAGES)),
        ("files.py", set(STAGES)),
        ("report/page.css", {"report"}),
        ("report/tables.py", {"report"}),
        ("runs/pipeline.py", set()),
        ("measure/compare.py", set()),
        ("cli/main.py", set()),
        ("api.py", set()),
    ],
)
def test_a_change_reaches_the_stages_that_depend_on_it(
    before: dict[str, str], tmp_path: Path, file: str, stages: set[str]
) -> None:
    package = copied(tmp_path)
    append(package / file, "\n# a change\n")
    after = codes(package)
    assert {stage for stage in STAGES if after[stage] != before[stage]} == stages


def test_an_import_inside_a_function_brings_its_folder(tmp_path: Path) -> None:
    assert "toolkit.judging.answers" not in imported_modules("toolkit.stages.sft")
    package = copied(tmp_path)
    append(package / "stages" / "sft.py", "\ndef later():\n    from toolkit.judging import answers\n")
    assert "toolkit.judging.answers" in imported_modules("toolkit.stages.sft", package)
    first = package_code_fingerprint("toolkit.stages.sft", package)
    append(package / "judging" / "templates.py", "\n# a change\n")
    assert package_code_fingerprint("toolkit.stages.sft", package) != first
