from __future__ import annotations

import gzip
import hashlib
import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from toolkit.errors import DataError
from toolkit.evals.length_control import load_length_table
from toolkit.judging.records import read_judgements
from toolkit.judging.win_rates import Controls, winrate_report

BASE = {"policy": "ppo", "baseline": "sft", "judge": "gold"}


def win_rates_of(files: list[Path], **options: Any) -> list[dict[str, Any]]:
    return list(winrate_report(files, **options)["win_rates"])


def jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def judgement(prompt: str, preference: float | None, **more: object) -> dict[str, object]:
    return {**BASE, "prompt_id": prompt, "preference": preference, **more}


def test_orders_and_seeds_are_averaged_inside_the_prompt(tmp_path: Path) -> None:
    rows = [
        judgement("p", 1.0, order=0, seed=1), judgement("p", 1.0, order=0, seed=2), judgement("p", 0.0, order=1),
        judgement("q", 1.0, order=0), judgement("q", 1.0, order=1),
        judgement("r", 0.0, order=0), judgement("r", 0.5, order=1),
    ]  # fmt: skip
    (row,) = win_rates_of([jsonl(tmp_path / "j.jsonl", rows)], n_resamples=50)
    assert row["win_rate"] == pytest.approx(
        (0.5 + 1.0 + 0.25) / 3
    )  # p: orders weigh alike though order 0 was seen twice
    assert (row["win"], row["tie"], row["loss"]) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert row["position_consistency"] == pytest.approx(1 / 3)  # q alone
    assert row["first_slot_rate"] == pytest.approx(((1 + 1) / 2 + (1 + 0) / 2 + (0 + 0.5) / 2) / 3)
    assert (row["n_prompts"], row["n_judged"], row["n_failed"]) == (3, 3, 0)


def test_failed_judgements_are_counted_and_never_ties(tmp_path: Path) -> None:
    rows = [
        judgement("a", 1.0),
        judgement("b", None, error="timeout"),
        judgement("c", 0.5, error="unparsed"),
        {**BASE, "prompt_id": "d", "preference": math.nan},
        judgement("e", 0.0, order=0),
        judgement("e", None, order=1, error="timeout"),
    ]
    (row,) = win_rates_of([jsonl(tmp_path / "j.jsonl", rows)], n_resamples=50)
    assert (row["n_prompts"], row["n_judged"], row["n_failed"]) == (5, 1, 4)  # "e" failed in one of its two orders
    assert (row["win_rate"], row["tie"]) == (1.0, 0.0) and row["position_consistency"] is None


def test_parquet_equals_jsonl_and_files_are_joined(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [judgement(f"p{k}", float(rng.choice([0, 0.5, 1])), order=int(k % 2)) for k in range(40)]
    rows[3]["preference"] = None
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "j.parquet")
    text = jsonl(tmp_path / "j.jsonl", rows)
    assert win_rates_of([tmp_path / "j.parquet"], n_resamples=50) == win_rates_of([text], n_resamples=50)
    halves = [jsonl(tmp_path / "1.jsonl", rows[:20]), jsonl(tmp_path / "2.jsonl", rows[20:])]
    assert win_rates_of(halves, n_resamples=50) == win_rates_of([text], n_resamples=50)


def test_holm_over_the_rows_and_one_row_per_policy_and_judge(tmp_path: Path) -> None:
    rows = [judgement(f"p{k}", 1.0) for k in range(8)]
    rows += [{**judgement(f"p{k}", k % 2), "policy": "dpo"} for k in range(8)]
    first, second = win_rates_of([jsonl(tmp_path / "j.jsonl", rows)], n_resamples=50)
    assert (first["policy"], second["policy"]) == ("ppo", "dpo")
    assert first["p_value"] == pytest.approx(2 / 2**8) and first["holm_p"] == pytest.approx(4 / 2**8)
    assert second["holm_p"] == pytest.approx(1.0)


def annotation(instruction: str, preference: float | None, output: str = "short") -> dict[str, object]:
    return {
        "instruction": instruction, "output_1": "a baseline", "generator_1": "base", "output_2": output,
        "generator_2": "model", "annotator": "gpt", "preference": preference,
    }  # fmt: skip


def test_alpaca_eval_annotations(tmp_path: Path) -> None:
    rows = [annotation("x", 2.0), annotation("y", 0), annotation("z", 1.25), annotation("w", None)]
    path = tmp_path / "annotations.json.gz"
    path.write_bytes(gzip.compress(json.dumps(rows).encode()))
    read = read_judgements([path])
    assert [j.preference for j in read] == [1.0, 0.5, 0.25, None]
    assert (read[0].policy, read[0].baseline, read[0].judge, read[0].order) == ("model", "base", "gpt", None)
    assert (read[0].policy_length, read[0].baseline_length) == (5, 10)
    assert read[0].prompt_id == hashlib.sha1(b"x").hexdigest()[:12]
    (row,) = win_rates_of([path], n_resamples=50)
    assert row["win_rate"] == pytest.approx((1 + 0.5 + 0.25) / 3) and row["n_failed"] == 1


def test_reduced_alpaca_eval_file_names_its_model(tmp_path: Path) -> None:
    rows = [
        {"index": k, "instruction_id": f"i{k}", "preference": 1.5, "len_model": 10, "len_baseline": 20,
         "generator_1": "base", "generator_2": "example", "swapped": s} for k, s in enumerate([True, False, None])
    ]  # fmt: skip
    path = tmp_path / "some-model.json"
    path.write_text(json.dumps(rows))
    read = read_judgements([path])
    assert {j.policy for j in read} == {"some-model"} and [j.order for j in read] == [0, 1, None]


def test_length_control_without_a_table_and_without_lengths(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows = [judgement(f"p{k}", float(rng.random() < 0.7), policy_length=int(rng.integers(50, 90)), baseline_length=60)
            for k in range(60)]  # fmt: skip
    path = jsonl(tmp_path / "j.jsonl", rows)
    (uncontrolled,) = win_rates_of([path], n_resamples=50)
    (controlled,) = win_rates_of([path], controls=Controls(length=True), n_resamples=50)
    assert uncontrolled["lc_win_rate"] is None
    assert controlled["lc_ci_low"] < controlled["lc_win_rate"] < controlled["lc_ci_high"]  # type: ignore[operator]
    assert {k: v for k, v in uncontrolled.items() if not k.startswith("lc_")}.items() <= controlled.items()
    bare = jsonl(tmp_path / "bare.jsonl", [judgement("p", 1.0)])
    with pytest.raises(DataError, match="records lengths"):
        win_rates_of([bare], controls=Controls(length=True))


def test_difficulty_is_found_by_place_or_by_instruction(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(2)
    table = tmp_path / "table"
    table.mkdir()
    lines = [f"{k},id{k},set,100,{v}" for k, v in enumerate(rng.normal(size=100))]
    header = "index,instruction_id,dataset,len_baseline,instruction_difficulty"
    (table / "instruction_difficulty.csv").write_text("\n".join([header, *lines]))
    gamed = [f"m,{k},{v}" for k, v in enumerate(rng.uniform(-1, 1, 100))]
    (table / "gamed_features.csv").write_text("\n".join(["model,index,tanh_std_delta_len", *gamed]))
    stats = {"tanh_std_delta_len": -1.0, "instruction_difficulty": 2.0, "row_weight": 0.1}
    (table / "gamed_sufficient_stats.json").write_text(json.dumps(stats))
    rows = [
        {"instruction_id": f"id{k}", "preference": 1 + rng.random(), "len_model": int(rng.integers(50, 200)),
         "len_baseline": 100, "generator_1": "base", "generator_2": "m"} for k in range(100) if k != 10
    ]  # fmt: skip
    whole = tmp_path / "m.json"
    whole.write_text(json.dumps(rows))
    controls = Controls(length=True, table=load_length_table(table))
    with caplog.at_level(logging.WARNING):
        (by_place,) = win_rates_of([whole], controls=controls, n_resamples=20)
    assert "89 of 99 rows" in caplog.text
    (by_id,) = win_rates_of([whole], controls=replace(controls, alignment="instruction"), n_resamples=20)
    assert by_place["lc_win_rate"] != by_id["lc_win_rate"]
    shuffled = tmp_path / "part.json"
    shuffled.write_text(json.dumps(rows[50:]))
    assert win_rates_of([shuffled], controls=controls, n_resamples=20)[0]["lc_win_rate"] is not None
    rows[60]["instruction_id"] = "unknown"
    shuffled.write_text(json.dumps(rows[50:]))
    with pytest.raises(DataError, match="does not know 1 of 49 prompts"):
        win_rates_of([shuffled], controls=controls, n_resamples=20)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "no such file"),
        ("notes.txt", "x", "ending that is not known"),
        ("broken.jsonl", '{"a": 1}\n{"b"', "invalid JSON"),
        ("empty.jsonl", "", "holds no judgements"),
        ("numbers.json", "[1, 2]", "expected an object"),
        ("scalar.json", "3", "expected a list"),
        ("lacks.jsonl", '{"prompt_id": "p", "preference": 1}', "lacks policy, baseline, judge"),
        ("outputs.json", '[{"instruction": "p", "output": "r", "generator": "m"}]', "ask a judge first: duel judge"),
        ("range.jsonl", json.dumps(judgement("p", 1.7)), "outside"),
        ("text.jsonl", json.dumps({**judgement("p", 1.0), "preference": "win"}), "not a number"),
        ("order.jsonl", json.dumps(judgement("p", 1.0, order=2)), "neither 0 nor 1"),
        ("alpaca.json", json.dumps([annotation("x", 3.0)]), "neither 0 nor in"),
        ("fake.parquet", "no parquet", "cannot read the Parquet file"),
        ("fake.json.gz", "no gzip", "not a whole gzip file"),
    ],
)
def test_bad_files_are_the_users_error(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message) as error:
        win_rates_of([path])
    assert name in error.value.where


def test_a_folder_and_no_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="folder"):
        read_judgements([tmp_path])
    with pytest.raises(DataError, match="no file"):
        read_judgements([])


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"policy_length": 10**400}, "policy_length is infinite"),
        ({"prompt_id": None}, "prompt_id is None"),
        ({"judge": None}, "judge is None"),
        ({"prompt_id": ["a"]}, "prompt_id is"),
    ],
)
def test_values_that_are_no_names_or_numbers_are_refused(tmp_path: Path, more: dict[str, Any], match: str) -> None:
    with pytest.raises(DataError, match=match):
        win_rates_of([jsonl(tmp_path / "j.jsonl", [{**judgement("a", 1.0), **more}])])


def test_an_empty_cell_is_a_missing_value(tmp_path: Path) -> None:
    """In CSV as null is in JSONL: a judgement that failed, and a prompt without a slice."""
    header = "prompt_id,policy,baseline,judge,preference,order,topic\n"
    (tmp_path / "j.csv").write_text(header + "p,a,b,j,1,,cars\nq,a,b,j,,,cars\n")
    [row] = win_rates_of([tmp_path / "j.csv"], n_resamples=50)
    assert (row["n_prompts"], row["n_judged"], row["n_failed"]) == (2, 1, 1)
    assert [r["slice"] for r in win_rates_of([tmp_path / "j.csv"], by="topic", n_resamples=50)] == [None, "topic=cars"]
    (tmp_path / "j.csv").write_text(header + "p,a,b,j,1,,cars\nq,a,b,j,0,,\n")
    null = jsonl(tmp_path / "j.jsonl", [judgement("p", 1.0, topic="cars"), judgement("q", 0.0, topic=None)])
    for file in (tmp_path / "j.csv", null):
        with pytest.raises(DataError, match="the column 'topic' is empty"):
            win_rates_of([file], by="topic", n_resamples=50)
    (tmp_path / "topics.csv").write_text("prompt_id,topic\np,cars\nq,\n")
    with pytest.raises(DataError, match="a row needs its prompt and 'topic'"):
        win_rates_of([tmp_path / "j.csv"], by="topic", attributes=tmp_path / "topics.csv", n_resamples=50)
