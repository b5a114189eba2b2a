"""Malformed run folders: the JSON files, tables and recipes that a run leaves behind, damaged."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from faults.malformed import READ, Malformed, parquet
from faults.malformed_data import DEEP
from support.run_folder import write_run

CONTENTS = {
    "empty": b"",
    "not_json": b"{oops",
    "list": b"[]",
    "null": b"null",
    "number": b"5",
    "text": b'"x"',
    "empty_object": b"{}",
    "deep": b"[" * DEEP,
    "latin_1": b'{"a": "\xe9"}',
    "nul": b"\0" * 64,
    "version_unknown": b'{"schema_version": 99}',
    "version_alone": b'{"schema_version": 2}',
    "long_number": b'{"schema_version": ' + b"9" * 5000 + b"}",
}
COMMANDS = {
    "report": "report|r|--out|out",
    "diff": "diff|r|s",
    "push": "push|r|--to|out",
}


@functools.cache
def _whole() -> Path:
    return write_run(Path(tempfile.mkdtemp(prefix="duel-malformed-")) / "r", n_prompts=6, checkpoints=1)


def _folders(change: Callable[[Path], None]) -> Callable[[Path], None]:
    """Two runs, ``r`` changed and ``s`` whole, in the folder and again below ``runs``."""

    def make(folder: Path) -> None:
        for name in ("r", "s"):
            shutil.copytree(_whole(), folder / name)
        change(folder / "r")

    return make


def _replaced(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: folder.joinpath(name).write_bytes(content) and None


def _edited(file: str, /, **values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        document = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(document | values))

    return change


def folder_cases() -> Iterator[Malformed]:
    for name, content in CONTENTS.items():
        for command, words in COMMANDS.items():
            file = "manifest.json" if command == "diff" else "results.json"
            change = _folders(_replaced(file, content))
            yield Malformed(f"folder/{file}/{name}/{command}", words, make=change)
        change = _folders(_replaced("manifest.json", content))
        yield Malformed(f"folder/manifest.json/{name}/report", COMMANDS["report"], make=change)
        yield Malformed(f"folder/manifest.json/{name}/runs", "runs|.", make=change, code=READ)
        yield Malformed(
            f"folder/results.json/{name}/runs", "runs|.", make=_folders(_replaced("results.json", content)), code=READ
        )
    for name in ("not_json", "list", "deep", "empty"):
        for file in ("data/report.json", "ppo/stage.json"):
            change = _folders(_replaced(file, CONTENTS[name]))
            yield Malformed(f"folder/{file}/{name}/report", COMMANDS["report"], make=change)
    for name in ("not_json", "list", "number", "deep", "empty_object"):
        for file in ("study.json", "trials.json"):
            change = _folders(lambda folder, file=file, name=name: (folder / file).write_bytes(CONTENTS[name]) and None)
            yield Malformed(f"folder/{file}/{name}/runs", "runs|.", make=change, code=READ)
            if file == "study.json":  # the page of a run does not look at trials
                yield Malformed(f"folder/{file}/{name}/report", COMMANDS["report"], make=change)
    yield from _fields()
    yield from _tables()


def _fields() -> Iterator[Malformed]:
    """Fields of a manifest or of results that have the wrong type or are gone."""
    wrong: dict[str, tuple[str, dict[str, object]]] = {
        "stages_list": ("manifest.json", {"stages": []}),
        "stages_text": ("manifest.json", {"stages": {"evaluate": "x"}}),
        "stages_null": ("manifest.json", {"stages": None}),
        "keys_null": ("manifest.json", {"keys": None}),
        "started_text": ("manifest.json", {"started": "yesterday"}),
        "started_null": ("manifest.json", {"started": None}),
        "name_list": ("manifest.json", {"name": ["x"]}),
        "recipe_text": ("manifest.json", {"recipe": "x"}),
        "versions_null": ("manifest.json", {"versions": None}),
        "verdict_null": ("results.json", {"verdict": None}),
        "verdict_text": ("results.json", {"verdict": "DPO"}),
        "policies_null": ("results.json", {"policies": None}),
        "policies_numbers": ("results.json", {"policies": [1]}),
        "win_rates_object": ("results.json", {"win_rates": {"a": 1}}),
        "win_rates_texts": ("results.json", {"win_rates": ["x"]}),
    }
    for name, (file, values) in wrong.items():
        change = _folders(_edited(file, **values))
        yield Malformed(f"folder/fields/{name}/runs", "runs|.", make=change, code=READ)
        for command in ("report", "diff"):
            read_by_diff = name.split("_")[0] in ("keys", "recipe", "versions", "policies", "win", "cost")
            if command == "report" and name in (
                "started_text",
                "name_list",
                "keys_null",
                "stages_list",
                "started_null",
            ):
                continue  # shown as they are: the page does not compute with them
            if command == "diff" and not read_by_diff:
                continue
            yield Malformed(f"folder/fields/{name}/{command}", COMMANDS[command], make=change)


def _tables() -> Iterator[Malformed]:
    tables = {
        "samples_empty": ("samples.parquet", b""),
        "samples_columns": ("samples.parquet", parquet({"a": 1})),
        "rewards_foreign": ("rewards.parquet", b"x" * 50),
        "judgements_columns": ("judgements.parquet", parquet({"a": 1})),
    }
    for name, (file, content) in tables.items():
        yield Malformed(f"folder/tables/{name}", COMMANDS["report"], make=_folders(_replaced(file, content)))
    yield Malformed(
        "folder/recipe/latin_1", COMMANDS["report"], make=_folders(_replaced("recipe.resolved.yaml", b"\xe9"))
    )
    yield Malformed("folder/place/missing", "report|no|--out|out")
    yield Malformed("folder/place/file", "report|f|--out|out", {"f": b"x"})
    yield Malformed("folder/place/runs_missing", "runs|no")
    yield Malformed("folder/place/runs_file", "runs|f", {"f": b"x"})
    yield Malformed("folder/place/diff_missing", "diff|no|no")
    yield Malformed("folder/place/push_missing", "push|no|--to|out")
