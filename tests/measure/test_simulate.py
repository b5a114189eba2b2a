"""``duel simulate --annotators``: whose responses are labelled, by which gold rewards, and the truth in the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.running import duel

import toolkit
from toolkit.measure.options import PromptSelection
from toolkit.measure.simulate import policy_to_sample, recorded_truth
from toolkit.preferences.gold import gold_reward
from toolkit.preferences.reading import read_preferences

EXACT = '[{"name": "exact", "bias": "length", "weight": 0.5}]'
PROMPTS = ["The hotel was", "The soup was"]
RESPONSES = [[" clean.", " quiet and near the lake.", " "], [" cold.", " warm and good."]]


@pytest.fixture
def annotators(tmp_path: Path) -> Path:
    (tmp_path / "exact.json").write_text(EXACT)
    return tmp_path / "exact.json"


def simulated(annotators: Path, data: Path, out: Path, *more: str) -> dict[str, object]:
    done = duel("simulate", "--annotators", str(annotators), "--data", str(data), "--out", str(out), "--json", *more)
    return dict(json.loads(done.stdout))


def rows(folder: Path, **columns: list[object]) -> Path:
    records = [
        {"prompt": prompt, "responses": texts, "group": "places"}
        for prompt, texts in zip(PROMPTS, RESPONSES, strict=True)
    ]
    lines = [record | {name: values[k] for name, values in columns.items()} for k, record in enumerate(records)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "rows.jsonl"


def test_responses_without_labels_are_labelled_by_the_shipped_gold_reward(annotators: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels.jsonl.gz"
    summary = simulated(annotators, rows(tmp_path), out)
    assert summary["gold"] == "function" and summary["n_prompts"] == 2 and summary["n_responses"] == 4
    read = read_preferences(str(out)).rows
    assert [row.responses for row in read] == [RESPONSES[0][:2], RESPONSES[1]]  # blank responses are left out
    assert [row.group for row in read] == ["places", "places"]
    assert read[0].gold == [round(gold_reward(PROMPTS[0], text), 4) for text in RESPONSES[0][:2]]
    truth = recorded_truth(out)
    assert truth is not None and truth["policy"] is None and truth["gold"] == "function"
    assert truth["annotators"] == [
        {"name": "exact", "noise_std": 0.0, "bias": "length", "bias_weight": 0.5, "flip_share": 0.0, "tie_below": 0.02}
    ]


def test_labels_follow_the_gold_rewards_that_the_data_has(annotators: Path, tmp_path: Path) -> None:
    comparisons = [[{"winner": 0, "loser": 1}], [{"winner": 0, "loser": 1}]]
    data = rows(tmp_path, gold=[[5.0, 0.0, 0.0], [0.0, 3.0]], comparisons=comparisons)
    data.write_text(data.read_text().replace(', " "', "").replace("5.0, 0.0, 0.0", "5.0, 0.0"))
    out = tmp_path / "labels.parquet"
    assert simulated(annotators, data, out)["gold"] == "data"
    read = read_preferences(str(out)).rows
    assert [[c.winner for c in row.comparisons] for row in read] == [[0], [1]]
    assert [row.gold for row in read] == [[5.0, 0.0], [0.0, 3.0]]
    assert (recorded_truth(out) or {})["gold"] == "data"


def test_prompts_alone_are_answered_by_a_policy(annotators: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    out = tmp_path / "labels.jsonl.gz"
    more = ["--policy", "tiny", "--k", "3", "--max-new-tokens", "6"]
    assert simulated(annotators, tmp_path / "prompts.txt", out, *more)["n_prompts"] == 2
    assert (recorded_truth(out) or {})["policy"] == "tiny"


def test_one_response_to_each_prompt_is_an_error(annotators: Path, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"prompt": "P", "responses": ["a", "a"]}\n')
    done = duel(
        "simulate", "--annotators", str(annotators), "--data", str(tmp_path / "one.jsonl"),
        "--out", str(tmp_path / "x.jsonl.gz"), check=2,
    )  # fmt: skip
    assert "no prompt has two different responses" in done.stderr


def test_a_file_of_the_users_in_the_truths_place_stays(annotators: Path, tmp_path: Path) -> None:
    out, truth = tmp_path / "labels.jsonl.gz", tmp_path / "labels.truth.json"
    truth.write_text("mine")
    words = ["simulate", "--annotators", str(annotators), "--data", str(rows(tmp_path)), "--out", str(out)]
    assert "labels.truth.json" in duel(*words, check=2).stderr
    assert truth.read_text() == "mine" and not out.exists()
    duel(*words, "--force")
    assert recorded_truth(out) is not None and "done already" in duel(*words).stderr


def test_annotators_who_tie_everywhere_have_no_agreement(tmp_path: Path) -> None:
    (tmp_path / "two.json").write_text('[{"name": "a"}, {"name": "b"}]')
    data = tmp_path / "tied.jsonl"
    row = {"prompt": "The soup was", "responses": [" cold.", " warm."], "gold": [1, 1]}
    data.write_text(json.dumps({**row, "comparisons": [{"winner": 0, "loser": 1}]}) + "\n")
    out = tmp_path / "labels.jsonl.gz"
    summary = simulated(tmp_path / "two.json", data, out)
    assert summary["agreement_of_two_annotators"] is None and summary["n_comparisons"] > 0


def test_who_writes_the_responses_where_no_policy_is_named(tmp_path: Path) -> None:
    selection = PromptSelection(str(rows(tmp_path)))
    assert policy_to_sample(None, selection, prefer_own=False) == "smollm2-135m"  # the command without --annotators
    assert policy_to_sample(None, selection, prefer_own=True) is None
    assert policy_to_sample("tiny", selection, prefer_own=True) == "tiny"
    assert toolkit.simulate(rows(tmp_path), out=tmp_path / "own.parquet").n_responses == 4
