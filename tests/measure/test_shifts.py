"""``duel rewards --shift``: shifted comparisons are scored as the data is, and paired with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.running import duel

from toolkit.evals.agreement import pairwise_accuracy
from toolkit.measure.shifts import TEXT_SHIFTS

PAIRS = [
    {"prompt": f"The {noun} number {k} was", "chosen": f" {'very ' * k}good. I liked it.", "rejected": " bad. It hurt."}
    for k, noun in enumerate(("soup", "film", "bus", "book", "garden", "song", "ferry", "talk"))
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUEL_CACHE", str(tmp_path / "cache"))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rewards(folder: Path, *options: str, check: int = 0) -> Any:
    """Reference-free rewards of the pairs under the tiny model: its log-probabilities."""
    data = write(folder / "pairs.jsonl", PAIRS)
    common = ["--policy=tiny", "--reference=none", f"--data={data}", "--json", f"--out={folder / 'rewards.parquet'}"]
    done = duel("rewards", *common, *options, check=check, cwd=folder)
    return json.loads(done.stdout) if check == 0 else done.stderr


def changed(text: str) -> dict[str, str]:
    return {name: shift(text) for name, shift in TEXT_SHIFTS.items()}


def test_the_texts_of_the_built_in_shifts() -> None:
    texts = changed(" Good film. I liked it a lot!")
    assert texts["case"] == " GOOD FILM. I LIKED IT A LOT!"
    assert texts["whitespace"] == "  Good  film.  I  liked  it  a  lot!"
    assert texts["list"] == "\n- Good film.\n- I liked it a lot!"
    assert texts["courtesy"].startswith(" Good film. I liked it a lot!\n\nI hope this helps!")
    assert texts["truncated"] == " Good film. I liked"
    assert changed(" one")["truncated"] == " one"


def test_a_shifted_file_has_the_rewards_that_it_has_alone(tmp_path: Path) -> None:
    """A built-in shift equals the same texts in a file, and both equal the accuracy of that file's own table."""
    upper = [{**row, "chosen": row["chosen"].upper(), "rejected": row["rejected"].upper()} for row in PAIRS]
    own = write(tmp_path / "upper.jsonl", upper)
    summary = rewards(tmp_path, "--shift=case", f"--shift=mine:{own}", f"--shift=same:{tmp_path / 'pairs.jsonl'}")
    case, mine, same = summary["shifts"]
    assert {**case, "name": ""} == {**mine, "name": ""}
    assert (case["n"], case["n_paired_prompts"], case["explicit"]) == (8, 8, None)
    duel("rewards", "--policy=tiny", "--reference=none", f"--data={own}", f"--out={tmp_path / 'upper.parquet'}")
    table = pq.read_table(tmp_path / "upper.parquet").to_pylist()
    by_prompt: dict[str, list[float]] = {}
    for row in table:
        by_prompt.setdefault(row["prompt_id"], []).append(row["implicit_reward"])
    comparisons = [(p, 0, 1, 1.0, 1.0) for p in range(8)]
    alone = pairwise_accuracy(comparisons, [np.array(values) for values in by_prompt.values()])
    assert case["implicit"]["value"] == alone.value
    assert case["drop_implicit"]["value"] == pytest.approx(summary["accuracy"] - alone.value)
    assert same["drop_implicit"]["value"] == 0.0


def test_rows_of_other_prompts_are_paired_by_their_place_or_not_at_all(tmp_path: Path) -> None:
    translated = [{**row, "prompt": f"Das war {k}:"} for k, row in enumerate(PAIRS)]
    others = write(tmp_path / "others.jsonl", translated[:3])
    by_row, apart = rewards(
        tmp_path, f"--shift=german:{write(tmp_path / 'german.jsonl', translated)}", f"--shift=others:{others}"
    )["shifts"]
    assert (by_row["n"], by_row["n_paired_prompts"]) == (8, 8)
    assert (apart["n"], apart["n_paired_prompts"]) == (3, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shift=cas"], "did you mean 'case'"),
        (["--shift=case", "--shift=case"], "two shifts are called 'case'"),
        (["--shift=swapped"], "no samples with different gold rewards"),
        (["--shift=mine:"], "is not NAME:FILE"),
        (["--shift=mine:none.jsonl"], "no such file"),
    ],
)
def test_shifts_that_are_none_are_named(tmp_path: Path, options: list[str], message: str) -> None:
    assert message in rewards(tmp_path, *options, check=2)
