"""``duel rm-card``: functions and models on simulated labels, its files, its reruns, and wrong input."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.running import duel

import toolkit
from toolkit.errors import DuelError
from toolkit.measure.options import ScoringOptions
from toolkit.measure.reading import ReadingOptions
from toolkit.measure.rm_card import CardOptions, rm_card
from toolkit.preferences import splits
from toolkit.preferences.reading import read_preferences
from toolkit.progress import Reporter

SCORERS = """
def characters(prompts, completions, **columns):
    return [float(len(text)) for text in completions]

def silent(prompts, completions, **columns):
    return [None for text in completions]
"""
BIASED = '[{"name": "wordy", "noise": 0.2, "bias": "length", "weight": 0.5}]'
UNBIASED = '[{"name": "careful", "noise": 0.2}]'


@pytest.fixture
def scorers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "card_scorers.py").write_text(SCORERS)
    monkeypatch.syspath_prepend(str(tmp_path))


def labels(folder: Path, annotators: str) -> str:
    """The responses of ``reviews``, labelled anew."""
    (folder / "annotators.json").write_text(annotators)
    out = folder / "labels.parquet"
    duel("simulate", "--annotators", str(folder / "annotators.json"), "--data", "reviews", "--limit", "80",
         "--out", str(out), "--force")  # fmt: skip
    return str(out)


def card(*words: str) -> dict[str, Any]:
    return dict(json.loads(duel("rm-card", *words, "--json").stdout))


@pytest.mark.usefixtures("scorers")
def test_a_length_scorer_is_found_biased_by_labels_of_a_biased_annotator(tmp_path: Path) -> None:
    made = card("python:card_scorers:characters", "--data", labels(tmp_path, BIASED))
    assert [(flag["reward"], flag["topic"], flag["direction"]) for flag in made["flags"]] == [
        ("explicit", "length", "more")
    ]
    section = made["explicit"]["length"]
    assert section["spearman"]["value"] == pytest.approx(1.0) and section["preferred_rate"]["value"] == 1.0
    assert made["explicit"]["sycophancy"]["probe"]["shift"]["value"] == 0.0  # an opinion does not change a length
    assert section["labels_rate"]["ci_low"] > 0.5 and made["reference"] == "gold" and made["implicit"] is None


def test_gold_has_no_flag_on_unbiased_labels(tmp_path: Path) -> None:
    data = labels(tmp_path, UNBIASED)
    made = card("gold", "--data", data)
    assert made["flags"] == [] and list(made["explicit"])[0] == "accuracy"
    assert made["explicit"]["gold"]["accuracy"]["value"] == 1.0
    of_labels = made["explicit"]["gold"]["labels_accuracy"]["value"]  # by the file's gold rewards, which are rounded
    assert made["explicit"]["accuracy"]["value"] == pytest.approx(of_labels, abs=2e-3)
    probe = made["explicit"]["sycophancy"]["probe"]
    assert probe["shift"]["value"] == pytest.approx(probe["gold"]["shift"]["value"], abs=1e-3)
    assert probe["excess"]["value"] == pytest.approx(0.0, abs=1e-3)
    page = duel("rm-card", "gold", "--data", data).stdout
    assert "Accuracy on the labels" in page and "no flag" in page and "Best of n" in page


@pytest.mark.e2e
def test_a_reward_model_and_a_policy_stand_side_by_side(small_run: Path, tmp_path: Path) -> None:
    policy, reference, rm = (str(small_run / name / "model") for name in ("dpo", "sft", "reward_model"))
    shared = ["--data", "reviews", "--limit", "12"]
    out = tmp_path / "card"
    words = [rm, "--implicit", f"{policy},{reference}", *shared, "--out", str(out)]
    made = card(*words)
    assert json.loads((out / "card.json").read_text()) == made == card(*words)  # again, from what is stored
    rows = pq.read_table(out / "scores.parquet").to_pylist()
    assert len(rows) == made["n_responses"] == 72
    table = tmp_path / "rewards.parquet"
    summary = json.loads(
        duel("rewards", "--policy", policy, "--reference", reference, "--rm", rm, *shared, "--out", str(table),
             "--json").stdout
    )  # fmt: skip
    for row, other in zip(rows, pq.read_table(table).to_pylist(), strict=True):
        for column in ("prompt_id", "response_index"):
            assert row[column] == other[column]
        for column in ("explicit_reward", "implicit_reward"):
            assert row[column] == pytest.approx(other[column], abs=1e-5)
    check = summary["implicit_vs_explicit"]
    for name in ("explicit", "implicit"):
        assert made[name]["accuracy"]["value"] == pytest.approx(check[f"accuracy_{name}"]["value"])
    assert made["implicit"]["variance"]["share_within"] is None and made["explicit"]["variance"]["share_within"]
    refused = duel("rm-card", "gold", *shared, "--out", str(out), check=2)
    assert "the card of another model" in refused.stderr
    assert card("gold", *shared, "--out", str(out), "--force")["model"] == "gold"


def test_the_card_of_a_folder_of_data_is_of_what_it_holds(tmp_path: Path) -> None:
    records = [{"prompt": f"Hotel {k} was", "chosen": " clean.", "rejected": " bad."} for k in range(6)]
    file = tmp_path / "hotels" / "data" / "train-0.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    words = ["gold", "--data", str(tmp_path / "hotels"), "--out", str(tmp_path / "card")]
    assert card(*words) == card(*words)
    file.write_text("".join(json.dumps(record) + "\n" for record in records[:5]))
    assert "other data" in duel("rm-card", *words, check=2).stderr
    assert card(*words, "--force")["n_prompts"] == 5


def test_sources_come_from_a_column_and_labels_from_gold(tmp_path: Path) -> None:
    records = [
        {"prompt": f"Hotel {k} was", "responses": [" clean and quiet.", " bad.", f" by lake {k}."], "comparisons": [],
         "gold": [1.0, -1.0, 0.0], "domain": "ab"[k % 2]}
        for k in range(12)
    ]  # fmt: skip
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(records))
    made = card("gold", "--data", str(data))
    assert made["labels"] == "gold" and made["n_pairs"] == 36
    assert [row["source"] for row in made["explicit"]["by_source"]] == ["a", "b"]
    wrong = duel("rm-card", "gold", "--data", str(data), "--by", "domian", check=2)
    assert "did you mean 'domain'?" in wrong.stderr
    data.write_text(json.dumps([{name: v for name, v in record.items() if name != "gold"} for record in records]))
    assert "neither comparisons nor gold rewards" in duel("rm-card", "gold", "--data", str(data), check=2).stderr


def test_a_column_of_many_values_is_no_source(tmp_path: Path) -> None:
    """And a missing value is none."""
    records = [
        {"prompt": f"Hotel {k} was", "chosen": " clean.", "rejected": " bad.", "source": f"https://site/{k}"}
        | {"domain": None if k % 3 == 0 else "", "category": None if k % 3 == 0 else f"c{k % 3}"}
        for k in range(60)
    ]
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(records))
    by_source = card("gold", "--data", str(data), "--by", "category")["explicit"]["by_source"]
    assert [(row["source"], row["accuracy"]["n"]) for row in by_source] == [("c1", 20), ("c2", 20)]
    assert [row["accuracy_without"]["n"] for row in by_source] == [40, 40]
    wrong = duel("rm-card", "gold", "--data", str(data), "--by", "source", check=2).stderr
    assert "it has 60" in wrong and "column with 1 to 50 values" in wrong
    assert "it has 0" in duel("rm-card", "gold", "--data", str(data), "--by", "domain", check=2).stderr
    assert card("gold", "--data", str(data))["explicit"]["by_source"] == by_source  # of the first column with sources
    assert len(card("gold", "--data", str(data), "--limit", "20")["explicit"]["by_source"]) == 20


@pytest.mark.usefixtures("scorers")
@pytest.mark.parametrize(
    "words",
    [("--by", "domian"), ("--judge", "llm:tiny"), ("--judge", "rm:nothing"), ("--judge", "rm"), ("--best-of", "7"),
     ("--judge", "python:card_scorers:silent"), ("--best-of", "2", "--data", "pairs.jsonl")],
)  # fmt: skip
def test_what_is_wrong_shows_before_anything_is_scored(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [{"prompt": f"p{k}", "chosen": "good", "rejected": "bad"} for k in range(3)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    def scored(*args: Any) -> None:
        raise AssertionError("the model scored")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("toolkit.measure.rm_card.card_rewards", scored)
    given = dict(zip(words[::2], words[1::2], strict=True))
    best_of = int(given["--best-of"]) if "--best-of" in given else None
    options = CardOptions(by=given.get("--by"), judge=given.get("--judge"), best_of=best_of)
    data, reading = given.get("--data", "reviews"), ReadingOptions(limit=3)
    with pytest.raises(DuelError):
        rm_card("gold", data, options, reading, ScoringOptions(), reporter=Reporter(quiet=True))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--data", "reviews", "--beta", "0.5"), "--beta"),
        (("--data", "reviews", "--any-reference"), "--any-reference"),
        (("--steps", "steps.jsonl", "--beta", "0.5"), "--beta"),
        (("--steps", "steps.jsonl", "--judge", "gold"), "--judge"),
        (("--steps", "steps.jsonl", "--best-of", "2"), "--best-of"),
        (("--steps", "steps.jsonl", "--plain"), "--plain"),
        (("--steps", "steps.jsonl", "--by", "source"), "--by"),
    ],
)
def test_options_without_effect_are_refused(words: tuple[str, ...], message: str) -> None:
    assert f"where: {message}\n" in duel("rm-card", "gold", *words, check=2).stderr


@pytest.mark.usefixtures("scorers")
def test_wrong_scorers_are_named(tmp_path: Path) -> None:
    shared = ["--data", "reviews", "--limit", "3"]
    assert "18 of 18 scores" in duel("rm-card", "python:card_scorers:silent", *shared, check=2).stderr
    assert "no function 'word'" in duel("rm-card", "python:card_scorers:word", *shared, check=2).stderr
    assert "POLICY,REFERENCE" in duel("rm-card", "gold", *shared, "--implicit", "tiny", check=2).stderr


def test_records_and_python_give_the_same_card(tmp_path: Path) -> None:
    records = [
        {"prompt": f"Hotel {k} was", "responses": [" clean and quiet.", " bad.", f" by lake {k}."], "scores": [3, 1, 2]}
        for k in range(12)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(records))
    made = toolkit.rm_card("gold", records)
    by_command = card("gold", "--data", str(tmp_path / "rows.json"))
    assert dict(made) | {"data": ""} == by_command | {"data": ""}
    assert "Accuracy on the labels" in str(made) and made["reference"] == "labels"


@pytest.mark.usefixtures("scorers")
def test_rm_bench_has_its_matrix_and_lists_of_texts_are_preferences(tmp_path: Path) -> None:
    """A length scorer prefers the longer style whichever is right: all easy pairs, half of the normal, none hard."""
    plain, detailed, marked = "yes", "yes, in more words", "**yes**, in more words, with a mark"
    records = [
        {
            "id": k, "prompt": f"Is {k} even?", "domain": "math",
            "chosen": [f"{text} {k}" for text in (plain, detailed, marked)],
            "rejected": [f"{text} {k}".replace("yes", "not") for text in (plain, detailed, marked)],
        }
        for k in range(6)
    ]  # fmt: skip
    data = tmp_path / "total_dataset.json"
    data.write_text(json.dumps(records))
    made = card("python:card_scorers:characters", "--data", str(data))
    styles = made["explicit"]["styles"]
    assert [[cell["value"] for cell in row] for row in styles["matrix"]] == [[0.5, 0, 0], [1, 0.5, 0], [1, 1, 0.5]]
    assert [styles[level]["value"] for level in ("easy", "normal", "hard")] == [1.0, 0.5, 0.0]
    assert made["n_pairs"] == 6 * 9 and made["explicit"]["by_source"][0]["source"] == "math"
    assert "RM-Bench" in duel("rm-card", "python:card_scorers:characters", "--data", str(data)).stdout
    best_of_four = [{**record, "chosen": record["chosen"][:1]} for record in records]  # RewardBench 2: one and three
    data.write_text(json.dumps(best_of_four))
    made = card("python:card_scorers:characters", "--data", str(data))
    assert made["explicit"]["styles"] is None and made["explicit"]["best_of_4"]["accuracy"]["value"] == 0.0


@pytest.mark.usefixtures("scorers")
def test_the_best_of_n_by_a_judge(tmp_path: Path) -> None:
    """By one that is the picking function: its gain is all that there is to gain, and it is what a plain loop gives."""
    shared = ["--data", "reviews", "--limit", "12", "--judge", "python:card_scorers:characters"]
    made = card("python:card_scorers:characters", *shared)["explicit"]
    rows = made["best_of_n_judged"]
    assert [row["n_responses"] for row in rows] == [1, 2, 4, 6] and "gold" not in rows[0]
    lengths = [sorted(map(len, row.responses)) for row in splits.limit(read_preferences("reviews").rows, 12, 0)]
    for row in rows:
        best = [mean(map(max, combinations(of_prompt, row["n_responses"]))) for of_prompt in lengths]
        assert row["judge"]["value"] == pytest.approx(mean(best))
        assert row["share_of_best_gain"]["value"] == (None if row["n_responses"] == 1 else pytest.approx(1.0))
    assert "gold" in made["best_of_n"][0] and "judge" not in made["best_of_n"][0]
    page = duel("rm-card", "gold", *shared, "--best-of", "4").stdout
    assert "Best of n by the explicit reward, by the judge" in page
    few = card("gold", *shared, "--best-of", "3")["explicit"]
    assert [row["n_responses"] for row in few["best_of_n"]] == [1, 2, 3]
    assert card("gold", "--data", "reviews", "--limit", "12")["explicit"]["best_of_n_judged"] is None


@pytest.mark.usefixtures("scorers")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--best-of", "7"), "fewer than 7 responses to pick from; the first has 6"),
        (("--best-of", "65"), "n is between 1 and 64"),
        (("--judge", "python:card_scorers:silent"), "scores are no finite numbers"),
        (("--judge", "llm:tiny"), "llm:tiny"),
    ],
)
def test_what_cannot_be_the_best_of_n(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    refused = duel("rm-card", "gold", "--data", "reviews", "--limit", "5", *words, check=2).stderr
    assert message in refused and "Traceback" not in refused


def test_without_gold_a_judge_measures_the_best_of_n(tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": f"p{k}", "chosen": "good " * (k + 1), "rejected": "bad"} for k in range(6)]
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    refused = duel("rm-card", "gold", "--data", str(data), "--best-of", "2", check=2).stderr
    assert "no gold rewards to measure the best of n by" in refused and "--judge" in refused
