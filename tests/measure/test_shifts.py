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
from toolkit.measure import explicit
from toolkit.measure.reading import ReadingOptions, read
from toolkit.measure.shifts import TEXT_SHIFTS, shifts_of
from toolkit.models.load import new_reward_model
from toolkit.models.tokenizer import load_tokenizer
from toolkit.progress import Reporter
from toolkit.recipe.training import ModelSection

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
    longer = write(tmp_path / "longer.jsonl", [*translated, {**PAIRS[0], "prompt": "Und noch eins:"}])
    some = write(tmp_path / "some.jsonl", [*PAIRS[:2], *translated[2:]])
    german = write(tmp_path / "german.jsonl", translated)
    files = {"german": german, "others": others, "longer": longer, "some": some}
    data = write(tmp_path / "pairs.jsonl", PAIRS)
    words = ["--policy=tiny", "--reference=none", f"--data={data}", "--json", f"--out={tmp_path / 'r.parquet'}"]
    done = duel("rewards", *words, *(f"--shift={name}:{file}" for name, file in files.items()))
    by_row, apart, more, by_prompt = json.loads(done.stdout)["shifts"]
    assert (by_row["n"], by_row["n_paired_prompts"], by_row["paired_by"]) == (8, 8, "row")
    assert (apart["n"], apart["n_paired_prompts"], apart["paired_by"]) == (3, 0, None)
    assert (more["n"], more["n_paired_prompts"], more["paired_by"]) == (9, 0, None)
    assert (by_prompt["n"], by_prompt["n_paired_prompts"], by_prompt["paired_by"]) == (2, 2, "prompt")
    for line in (
        "shift german: 8 prompts, paired with the data by row\n",
        "shift longer: 9 prompts, not paired with the data",
        "shift some: 2 prompts, paired with the data by prompt; 6 are left out\n",
    ):
        assert line in done.stderr


def test_both_rewards_read_shifted_texts_as_they_read_the_data(tmp_path: Path, tiny_ref: Any) -> None:
    """Cut at the limit; what is in the data as a file has the same figures."""
    tokenizer = load_tokenizer(tiny_ref)
    model = new_reward_model(tiny_ref, ModelSection(dtype="float32"), int(tokenizer.pad_token_id), 0)
    model.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    upper = [{**row, "chosen": row["chosen"].upper(), "rejected": row["rejected"].upper()} for row in PAIRS]
    own = write(tmp_path / "upper.jsonl", upper)
    limit = ("--max-response-tokens=7", f"--rm={tmp_path / 'rm'}")
    case, mine = rewards(tmp_path, "--shift=case", f"--shift=mine:{own}", *limit)["shifts"]
    assert case["explicit"]["value"] is not None and {**case, "name": ""} == {**mine, "name": ""}


@pytest.mark.parametrize("name", TEXT_SHIFTS)
def test_policy_and_reward_model_read_the_same_shifted_text(name: str, tmp_path: Path, tiny_ref: Any) -> None:
    tokenizer = load_tokenizer(tiny_ref)
    options = ReadingOptions(max_response_tokens=7)
    reading = read(str(write(tmp_path / "pairs.jsonl", PAIRS)), tokenizer, "tiny", options)
    [shift] = shifts_of([name], reading, tokenizer, "tiny", options, Reporter(quiet=True))
    end = reading.encoder.end_id
    for row in shift.rows:
        tree = row.encoded.tree
        assert explicit._read_by(reading.encoder, row, 7) == tree
        assert all(len(ids) <= 7 for ids in tree.response_ids)
        if name == "truncated":
            assert all(ids[-1] != end for ids in tree.response_ids)


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
