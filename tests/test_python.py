"""The functions of ``toolkit``: one for every command, with the objects that people have in Python."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import transformers
from support.running import ROOT, SMALL

import toolkit
from toolkit import progress
from toolkit.api import Result
from toolkit.api.inputs import Inputs, quiet_libraries, records_of
from toolkit.cli.main import cli
from toolkit.errors import DataError, ModelError, RecipeError, StoreError
from toolkit.preferences.reading import read_preferences
from toolkit.progress import Reporter
from toolkit.report.sheets import Sheet

OTHER_NAMES = {"rewards": "implicit_rewards", "filter": "filter_rows", "rm-card": "rm_card"}
OTHER_NAMES |= {"runs": "list_runs", "report": "write_report"}  # toolkit.runs and toolkit.report are packages
OF_SHELLS = {"completion"}
PAIRS = [
    {"prompt": f"I thought that the film number {k} was", "chosen": " good fun.", "rejected": " a long bore."}
    for k in range(4)
]


def shortness(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    assert len(prompts) == len(completions)
    return [-float(len(text)) for text in completions]


def test_every_command_has_a_function_with_typed_and_documented_parameters() -> None:
    names = {OTHER_NAMES.get(name, name) for name in cli.commands} - OF_SHELLS
    assert names == set(toolkit.__all__)
    for name in names:
        function = getattr(toolkit, name)
        text = inspect.getdoc(function) or ""
        signature = inspect.signature(function)
        assert text and signature.return_annotation is not inspect.Signature.empty, name
        for parameter in signature.parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty, f"{name}({parameter.name})"
            assert parameter.kind is not inspect.Parameter.VAR_KEYWORD, f"{name}({parameter.name})"
            assert re.search(rf"^ *{parameter.name}: \S", text, flags=re.M), f"{name}({parameter.name})"


def test_help_names_the_functions() -> None:
    code = "import toolkit; help(toolkit)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert all(name in done.stdout for name in toolkit.__all__)


@pytest.mark.e2e
def test_data_frames_data_sets_lists_and_paths_are_the_same_data(small_run: Path, tmp_path: Path) -> None:
    rm = str(small_run / "reward_model" / "model")
    frame = pd.DataFrame(PAIRS)
    frame.to_json(tmp_path / "pairs.jsonl", orient="records", lines=True)
    sources = [PAIRS, frame, datasets.Dataset.from_list(PAIRS), tmp_path / "pairs.jsonl", iter(PAIRS)]
    tables = [toolkit.score(rm, data).to_frame().drop(columns="source_file") for data in sources]
    assert tables[0].shape == (8, 7)
    assert all(table.equals(tables[0]) for table in tables[1:])


def test_cells_of_frames_become_json() -> None:
    frame = pd.DataFrame({"prompt": ["a", "b"], "score": [1.5, None]})
    assert list(records_of(frame)) == [{"prompt": "a", "score": 1.5}, {"prompt": "b", "score": None}]
    assert list(records_of(["a"])) == [{"prompt": "a"}]
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(PAIRS))
    for data, what in ((splits, "several splits"), ({"prompt": ["a"]}, "no rows"), (3, "no rows"), ([3], "row 1")):
        with pytest.raises(DataError, match=what) as refused:
            list(records_of(data))
        assert refused.value.where == "data" and refused.value.fix


def test_missing_cells_of_every_type_are_null(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "string": pd.array(["a", None], "string"),
            "int": pd.array([1, None], "Int64"),
            "float": pd.array([1.5, None], "Float32"),
            "bool": pd.array([True, None], "boolean"),
            "time": pd.to_datetime(["2026-01-02", None]),
            "delta": pd.to_timedelta([3, None], unit="s"),
            "category": pd.Categorical(["x", None]),
            "arrow": pd.array(["a", None], "string[pyarrow]"),
            "object": [["a", pd.NA], pd.NA],
            "decimal": [Decimal("1.5"), Decimal("NaN")],
            "numpy": pd.Series([np.float32(2), np.float32("nan")], dtype=object),
        }
    )
    first, second = (json.loads(line) for line in Path(Inputs(tmp_path / "out").data(frame)).read_text().splitlines())
    assert second == dict.fromkeys(frame.columns)
    assert (first["string"], first["int"], first["float"], first["bool"]) == ("a", 1, 1.5, True)
    assert (first["category"], first["arrow"], first["object"], first["numpy"]) == ("x", "a", ["a", None], 2.0)
    records = [{name: frame.loc[1, name] for name in frame.columns}]  # a list of dicts with such cells
    assert list(records_of(records)) == [second]


def test_rows_with_a_missing_text_are_left_out(tmp_path: Path) -> None:
    frame = pd.DataFrame(PAIRS).astype("string")  # whose missing cells are pandas.NA
    frame.loc[1, "chosen"] = pd.NA
    report = read_preferences(Inputs(tmp_path / "out").data(frame)).report
    assert (report.n_empty, report.empty_rows) == (1, (2,))


def test_an_error_names_the_object_and_no_file_that_is_gone() -> None:
    with pytest.raises(DataError) as refused:
        toolkit.check([{"question": "What?"}], "tiny")
    assert refused.value.where == "records" and "columns" in refused.value.fix
    assert "where: records\n" in str(refused.value)


@pytest.mark.e2e
def test_a_model_in_memory_is_the_model_in_its_folder(small_run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, policy = str(small_run / "sft" / "model"), str(small_run / "dpo" / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    named = toolkit.implicit_rewards(policy, folder, PAIRS)
    for reference in (model, (model, AutoTokenizer.from_pretrained(folder))):
        handed_over = toolkit.implicit_rewards(policy, reference, PAIRS, any_reference=True)
        assert [row["implicit_reward"] for row in handed_over.rows] == [row["implicit_reward"] for row in named.rows]
    result = toolkit.compare(model, policy, data=["I thought that"], judge=["gold", shortness], max_new_tokens=4)
    assert {(row["policy"], row["judge"]) for row in result.win_rates} == {(folder, "gold"), (folder, "shortness")}
    with pytest.raises(ModelError, match="a int is no model"):
        toolkit.score(3, PAIRS)  # type: ignore[arg-type]


def test_win_rates_show_what_the_command_shows() -> None:
    rows = [
        {"prompt": f"p{k}", "model_a": a, "model_b": b, "judge": judge, "topic": f"t{k % 2}",
         "winner": "AB"[(k * (3 if judge == "x" else 7)) % 5 > 2]}
        for k in range(20) for a, b in ("mn", "mo", "no") for judge in "xy"
    ]  # fmt: skip
    result = toolkit.winrate(rows, by="topic", ranking=True, human=rows, confidence=0.9, bootstrap=100)
    text = str(result)
    assert "90% interval" in text and "95% interval" not in text and "m, topic=t0" in text
    for title in ("Bradley-Terry, judge x", "Judges", "Corrected by people's votes"):
        assert title in text, title
    assert "records: prompt = prompt" in text


def test_functions_judge_and_reward(tmp_path: Path) -> None:
    texts = {"short": "No.", "long": "Certainly not."}
    outputs = {name: [{"prompt": f"p{k}", "response": text} for k in range(3)] for name, text in texts.items()}
    result = toolkit.judge(outputs, shortness)
    assert [(row["policy"], row["judge"], row["win_rate"]) for row in result.win_rates] == [("short", "shortness", 1.0)]
    assert toolkit.judge(outputs, lambda prompts, completions: map(len, completions)).win_rates[0]["win_rate"] == 0.0
    rows = [{"prompt": f"p{k}", "response_a": "No.", "response_b": "Certainly not.", "label": 2} for k in range(3)]
    labelled = toolkit.label(rows, shortness, out=tmp_path / "l.jsonl.gz", labels="hard")
    assert (labelled.n_comparisons, labelled.n_tied) == (3, 0)
    assert toolkit.rm_card(shortness, PAIRS).explicit["accuracy"]["value"] == 1.0
    battles = pd.DataFrame({"prompt": ["p", "q"], "model_a": "x", "model_b": "y", "winner": ["model_a", "tie"]})
    assert toolkit.winrate(battles).to_frame()["win_rate"].tolist() == [0.75]
    with pytest.raises(RecipeError, match="dtype is 'half'"):
        toolkit.judge(outputs, shortness, dtype="half")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="is no judge"):
        toolkit.judge(outputs, 3)  # type: ignore[arg-type]


def test_a_changed_function_does_not_get_the_results_of_the_one_before(tmp_path: Path) -> None:
    def near(prompts: Sequence[Any], completions: Sequence[str], target: int = 3) -> list[int]:
        return [-abs(len(text) - target) for text in completions]

    rows = [{"prompt": f"p{k}", "response_a": "No.", "response_b": "Certainly not.", "label": 2} for k in range(3)]
    out = tmp_path / "near.jsonl.gz"
    first = toolkit.label(rows, near, out=out, labels="hard")
    assert toolkit.label(rows, near, out=out, labels="hard") == first
    near.__defaults__ = (14,)
    with pytest.raises(StoreError, match="exists"):
        toolkit.label(rows, near, out=out, labels="hard")


@pytest.mark.e2e
def test_a_run_as_frames(small_run: Path) -> None:
    settings = {name: int(value) for name, value in (text.removeprefix("--set=").split("=") for text in SMALL)}
    result = toolkit.run("smoke", out=small_run, settings=settings, reporter=Reporter(quiet=True))
    frame = result.to_frame()
    assert frame["policy"].tolist() == [row["policy"] for row in result["policies"]]
    assert frame["gold_reward.value"].tolist() == [row["gold_reward"]["value"] for row in result["policies"]]
    assert len(result.to_frame("win_rates")) == len(result["win_rates"])
    with pytest.raises(DataError, match="no table 'wins'"):
        result.to_frame("wins")


def test_a_result_is_a_dict_that_cannot_be_changed() -> None:
    result = Result({"n": 1, "rows": [{"a": {"b": 2}}]}, [Sheet("T", ["x"], [("1",)])], "It is so.", main="rows")
    assert result == {"n": 1, "rows": [{"a": {"b": 2}}]} and result.n == 1 and "n" in dir(result)
    assert (
        result.to_frame().to_dict("records") == [{"a.b": 2}] and {**result}["n"] == 1 and (result | {"m": 2})["m"] == 2
    )
    for change in (
        lambda: result.__setitem__("n", 2),
        lambda: result.update(n=2),
        lambda: result.pop("n"),
        lambda: setattr(result, "n", 2),
        lambda: result.__ior__({"n": 2}),
    ):
        with pytest.raises(TypeError, match="dict\(result\) is a copy"):
            change()
    for again in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
        assert again == result and str(again) == str(result) and isinstance(again, Result)
    with pytest.raises(AttributeError, match="has no 'm'"):
        _ = result.m
    assert "<td>7</td>" in Result({"n_prompts": 7}, [])._repr_html_()


def test_a_notebook_gets_one_line_that_is_written_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    monkeypatch.setattr(progress, "NOTEBOOK_LINE_EVERY_S", 0.0)
    reporter = Reporter()
    with reporter.task("sample", 2) as task:
        task.advance(1, note="a note that is long")
        task.advance(1, note="short")
        reporter.line("a line between")
    shown = capsys.readouterr()
    assert shown.err == "" and shown.out.count("\n") == 1
    first, second, blank, line = [part for part in shown.out.split("\r") if part]
    assert first.startswith("sample: 1/2") and second.startswith("sample: 2/2")
    assert len(second) >= len(first.rstrip()) and not blank.strip() and line == "a line between\n"


def test_libraries_are_as_loud_as_before_behind_a_run_of_several_stages() -> None:
    logs = transformers.utils.logging
    before = logs.get_verbosity()
    logs.set_verbosity(logs.INFO)
    try:
        with quiet_libraries() as hush:
            for _ in range(2):  # a run calls it before each stage
                hush()
                assert logs.get_verbosity() == logs.ERROR
        assert logs.get_verbosity() == logs.INFO
    finally:
        logs.set_verbosity(before)
