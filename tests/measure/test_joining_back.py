"""What ``rewards``, ``score``, ``judge`` and ``label`` write names the file and row it is from; texts on request."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.running import duel

from toolkit.errors import DataError
from toolkit.measure.single_responses import read_single_responses
from toolkit.models.load import new_reward_model
from toolkit.models.resolve import resolve
from toolkit.models.tokenizer import load_tokenizer
from toolkit.preferences.reading import read_preferences
from toolkit.preferences.rows import prompt_id
from toolkit.preferences.samples import Sample, write_samples
from toolkit.recipe.training import ModelSection

# Row 3 has the prompt of row 1; rows count from 1, blank lines too.
PAIRS = [
    {"prompt": "The film was", "chosen": " good", "rejected": " bad"},
    {"prompt": "The food was", "chosen": " warm", "rejected": " cold"},
    {"prompt": "The film was", "chosen": " fine", "rejected": " bad"},
]
WHERE = {("The film was", " good"): 1, ("The film was", " bad"): 1, ("The film was", " fine"): 3,
         ("The food was", " warm"): 2, ("The food was", " cold"): 2}  # fmt: skip


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def rm(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("rm") / "model"
    ref = resolve("tiny")
    tokenizer = load_tokenizer(ref)
    section = ModelSection(name="tiny", dtype="float32", lora=None)
    new_reward_model(ref, section, tokenizer.pad_token_id, 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.e2e
@pytest.mark.parametrize("command", ["rewards", "score"])
def test_rewards_of_pairs(command: str, rm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUEL_CACHE", str(tmp_path / "cache"))
    data, out = jsonl(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "out.parquet"
    models = ("--policy=tiny", "--reference=none") if command == "rewards" else (f"--rm={rm}",)
    duel(command, *models, f"--data={data}", f"--out={out}", "--with-text")
    table = pq.read_table(out).to_pylist()
    assert {(row["prompt"], row["response"]): row["source_row"] for row in table} == WHERE
    assert {row["source_file"] for row in table} == {data}
    plain = tmp_path / "plain.parquet"
    duel(command, *models, f"--data={data}", f"--out={plain}")
    assert {*pq.read_table(out).column_names} - {*pq.read_table(plain).column_names} == {"prompt", "response"}


@pytest.mark.e2e
def test_score_takes_single_responses_and_samples(rm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUEL_CACHE", str(tmp_path / "cache"))
    singles = [
        {"prompt": row["prompt"], "response": row[side], "tag": k}
        for k, row in enumerate(PAIRS[:2])
        for side in ("chosen", "rejected")
    ]
    singles.append({"prompt": " ", "response": "x", "tag": 9})
    samples = tmp_path / "samples.parquet"
    write_samples(
        [Sample(prompt_id(row["prompt"]), name, prompt=row["prompt"], response=row[side])
         for name, side in (("dpo", "chosen"), ("sft", "rejected")) for row in PAIRS[:2]],
        samples,
    )  # fmt: skip
    scored = {}
    for name, source in (("pairs", jsonl(tmp_path / "p.jsonl", PAIRS[:2])),
                         ("singles", jsonl(tmp_path / "s.jsonl", singles)), ("samples", str(samples))):  # fmt: skip
        out = tmp_path / f"{name}-scored.parquet"
        summary = json.loads(
            duel("score", f"--rm={rm}", f"--data={source}", f"--out={out}", "--with-text", "--json").stdout
        )
        assert (summary["n_prompts"], summary["n_responses"]) == (2, 4)
        assert (summary["accuracy"] is None) == (name != "pairs")
        table = pq.read_table(out).to_pylist()
        scored[name] = {
            (row["prompt"], row["response"]): pytest.approx(row["explicit_reward"], abs=1e-5) for row in table
        }
        rows = {(row["prompt"], row["response"]): row["source_row"] for row in table}
        if name == "singles":
            assert rows == {(row["prompt"], row["response"]): k for k, row in enumerate(singles[:4], start=1)}
        if name == "samples":
            assert [row["source_row"] for row in sorted(table, key=lambda r: r["source_row"])] == [1, 2, 3, 4]
    assert scored["pairs"] == scored["singles"] == scored["samples"]


SCORED = [
    {"prompt": "The film was", "response": " good", "score": 3},
    {"prompt": "The film was", "response": " ", "score": 2},
    {"prompt": "The food was", "response": " warm", "score": 1},
    {"prompt": "The film was", "response": " bad", "score": 1},
    {"prompt": "The film was", "response": " good", "score": 3},
]


@pytest.mark.e2e
def test_a_column_of_scores_leaves_no_response_out(rm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row with a text has its reward. The scores of a prompt's responses compare them, except for equal texts."""
    monkeypatch.setenv("DUEL_CACHE", str(tmp_path / "cache"))
    data = jsonl(tmp_path / "scored.jsonl", SCORED)
    for command, models in (
        ("score", [f"--rm={rm}"]),
        ("rewards", ["--policy=tiny", "--reference=none", f"--rm={rm}"]),
    ):
        out = tmp_path / f"{command}.parquet"
        done = duel(command, *models, f"--data={data}", f"--out={out}", "--json")
        summary = json.loads(done.stdout)
        assert (summary["n_prompts"], summary["n_responses"], summary["n_rows_left_out"]) == (2, 4, 1)
        assert summary["n_comparisons"] == 2 and summary["accuracy"] in (0.0, 1.0)
        rows = pq.read_table(out).to_pylist()
        assert [(row["source_row"], row["response_index"]) for row in rows] == [(1, 0), (4, 1), (5, 2), (3, 0)]
        assert f"{data}: 1 row left out: a prompt or response is empty (first: 2)\n" in done.stderr
    assert summary["implicit_vs_explicit"]["n_pairs"] == 2


def test_a_card_is_of_compared_responses(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "scored.jsonl", SCORED)
    done = duel("rm-card", "gold", f"--data={data}", "--json")
    card = json.loads(done.stdout)
    assert (card["n_prompts"], card["n_responses"], card["n_rows_left_out"]) == (1, 2, 2)
    assert f"{data}: 1 row left out: a prompt or response is empty (first: 2); 1 row left out: no other" in done.stderr


def test_what_is_no_single_response(tmp_path: Path) -> None:
    assert read_single_responses(jsonl(tmp_path / "p.jsonl", PAIRS), "train") is None
    odd = jsonl(tmp_path / "o.jsonl", [{"prompt": "a", "response": 3}])
    with pytest.raises(DataError, match="expected text"):
        read_single_responses(odd, "train")
    blank = jsonl(tmp_path / "b.jsonl", [{"prompt": "a", "response": " "}])
    with pytest.raises(DataError, match="no usable row of 1"):
        read_single_responses(blank, "train")
    transcript = {"prompt": "\n\nHuman: Hi\n\nAssistant:", "response": " Hello"}
    read = read_single_responses(jsonl(tmp_path / "t.jsonl", [transcript]), "train")
    assert read is not None and read.rows[0].prompt == transcript["prompt"]  # as beside chosen and rejected


def test_rows_of_responses(tmp_path: Path) -> None:
    data = read_preferences(jsonl(tmp_path / "p.jsonl", PAIRS))
    found = {
        (row.prompt, text): number
        for k, row in enumerate(data.rows)
        for text, number in zip(row.responses, data.rows.response_rows(k), strict=True)
    }
    assert found == WHERE


@pytest.mark.e2e
def test_judgements_and_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUEL_CACHE", str(tmp_path / "cache"))
    a = jsonl(tmp_path / "a.jsonl", [{"prompt": row["prompt"], "response": row["chosen"]} for row in PAIRS[:2]])
    b = jsonl(tmp_path / "b.jsonl", [{"prompt": row["prompt"], "response": row["rejected"]} for row in PAIRS[1::-1]])
    out = tmp_path / "j.parquet"
    duel("judge", a, b, "--judge=gold", f"--out={out}", "--with-text")
    table = pq.read_table(out).to_pylist()
    assert [(row["policy_file"], row["policy_row"], row["baseline_file"], row["baseline_row"]) for row in table] == [
        (a, 1, b, 2), (a, 2, b, 1),
    ]  # fmt: skip
    assert [(row["prompt"], row["policy_response"], row["baseline_response"]) for row in table] == [
        ("The film was", " good", " bad"), ("The food was", " warm", " cold"),
    ]  # fmt: skip
    assert json.loads(duel("winrate", str(out), "--json").stdout)["win_rates"][0]["n_prompts"] == 2
    labels = tmp_path / "l.jsonl.gz"
    data = jsonl(tmp_path / "pairs.jsonl", PAIRS)
    duel("label", f"--data={data}", "--judge=llm:tiny", "--principles=hhh", f"--out={labels}")
    with gzip.open(labels, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    assert {(row["prompt"], row["source_row"], row["source_file"]) for row in rows} == {
        ("The film was", 1, data), ("The food was", 2, data),
    }  # fmt: skip
    assert read_preferences(str(labels)).report.ignored_columns == ()
