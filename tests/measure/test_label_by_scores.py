"""``duel label`` with a judge that scores, and what ``label`` and ``simulate`` print."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from support.running import duel

from toolkit.judging import score_labels
from toolkit.judging.options import JudgeOptions
from toolkit.judging.principles import Labelling
from toolkit.judging.score_labels import label_by_scores
from toolkit.measure.label import label_data
from toolkit.measure.options import PromptSelection
from toolkit.models.load import new_reward_model
from toolkit.models.resolve import resolve
from toolkit.models.tokenizer import load_tokenizer
from toolkit.preferences.reading import read_preferences
from toolkit.preferences.splits import pairs
from toolkit.progress import Reporter
from toolkit.recipe.training import ModelSection

JUDGE = "def size(prompts, completions, **_):\n    return [None if 'lost' in t else len(t) for t in completions]\n"
ROWS = [
    {"prompt": "The film was", "responses": [" long", " good", " lost in time"]},
    {"prompt": "The food was", "responses": [" warm and good", " cold", " cold"]},
]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "label_judge.py").write_text(JUDGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("DUEL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def test_a_function_labels_by_which_score_is_higher(data: str, tmp_path: Path) -> None:
    out = tmp_path / "labels.jsonl.gz"
    arguments = ("label", f"--data={data}", "--judge=python:label_judge:size", f"--out={out}")
    made = json.loads(duel(*arguments, "--json").stdout)
    assert (made["n_comparisons"], made["n_failed"], made["n_tied"], made["judge_usage"]) == (2, 2, 1, None)
    rows = read_preferences(str(out)).rows
    assert [[pair[:3] for pair in pairs(row)] for row in rows] == [[(0, 1, 0.5)], [(0, 1, 1.0)]]
    assert {c.annotator for row in rows for c in row.comparisons} == {"python:label_judge:size"}
    shown = duel(*arguments, "--force").stdout
    assert "comparisons" in shown and "of them ties" in shown and f"written: {out}\nNext: a recipe with" in shown


@pytest.mark.e2e
def test_a_reward_model_labels_with_its_probabilities(data: str, tmp_path: Path) -> None:
    ref = resolve("tiny")
    tokenizer = load_tokenizer(ref)
    section = ModelSection(name="tiny", dtype="float32", lora=None)
    new_reward_model(ref, section, tokenizer.pad_token_id, 0).save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    judge = f"rm:{tmp_path / 'rm'}"
    values: dict[str, Any] = {}
    for labels in ("soft", "hard"):
        out = tmp_path / f"{labels}.jsonl.gz"
        duel("label", f"--data={data}", f"--judge={judge}", f"--labels={labels}", f"--out={out}")
        values[labels] = [pair.p for row in read_preferences(str(out)).rows for pair in pairs(row)]
    scored = tmp_path / "scores.parquet"
    pairs_file = tmp_path / "pairs.jsonl"
    flat = [{"prompt": row["prompt"], "response": text} for row in ROWS for text in dict.fromkeys(row["responses"])]
    pairs_file.write_text("".join(json.dumps(row) + "\n" for row in flat))
    duel("score", f"--rm={tmp_path / 'rm'}", f"--data={pairs_file}", f"--out={scored}", "--with-text")
    import pyarrow.parquet as pq

    of = {(row["prompt"], row["response"]): row["explicit_reward"] for row in pq.read_table(scored).to_pylist()}
    expected = []
    for row in ROWS:
        texts = list(dict.fromkeys(row["responses"]))
        expected += [
            1 / (1 + math.exp(of[row["prompt"], b] - of[row["prompt"], a]))
            for i, a in enumerate(texts)
            for b in texts[i + 1 :]
        ]
    assert values["soft"] == pytest.approx(expected, abs=1e-4)
    assert values["hard"] == [float(p > 0.5) for p in expected]


def test_soft_labels_are_for_log_odds_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_labels, "score", lambda *_: [[2.0, 0.0, math.nan]])
    options = JudgeOptions(ModelSection())
    for judge, p in (("rm:x", 1 / (1 + math.exp(-2))), ("implicit:x,y", 1 / (1 + math.exp(-2))), ("gold", 1.0)):
        labelled = label_by_scores(judge, [("p", ["a", "b", "c"])], options, "soft")
        assert [pair.p for pair in pairs(labelled.rows[0])] == [pytest.approx(p)]
        assert (labelled.n_comparisons, labelled.n_failed) == (3, 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--judge=llm:tiny"], "needs a principle"),
        (["--judge=gold", "--principles=hhh"], "cannot read a principle"),
        (["--judge=file:votes.parquet"], "cannot label other responses"),
    ],
)
def test_judges_that_cannot_label(data: str, tmp_path: Path, arguments: list[str], words: str) -> None:
    refused = duel("label", f"--data={data}", *arguments, f"--out={tmp_path / 'l.jsonl.gz'}", check=2)
    assert words in refused.stderr


def test_simulate_prints_a_table(data: str, tmp_path: Path) -> None:
    people = tmp_path / "people.json"
    people.write_text(json.dumps([{"name": "ann", "noise": 0.1}, {"name": "bob", "noise": 0.2}]))
    out = tmp_path / "simulated.jsonl.gz"
    shown = duel("simulate", f"--annotators={people}", f"--data={data}", f"--out={out}").stdout
    assert "ann, bob" in shown and "gold rewards" in shown and f"written: {out}" in shown
    assert all(len(line) <= 80 for line in shown.splitlines() if str(out) not in line)


def test_responses_and_labels_do_not_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt with two responses of 2,000 characters takes less than 1,000 bytes."""
    monkeypatch.setattr("toolkit.preferences.loading.HELD_BYTES", 0)
    monkeypatch.setattr("toolkit.storage.spilled.BUFFER", 1 << 12)
    # Gold reads the same texts in the same way, in a hundred times the time.
    lengths = lambda judge, prompts, responses, options: [[float(len(text)) for text in of] for of in responses]  # noqa: E731
    monkeypatch.setattr("toolkit.judging.score_labels.score", lengths)
    peaks, counts = [], (300, 1_500)
    for n in counts:
        rows = [{"prompt": f"Film {i} was", "responses": [f" {i}".ljust(2_000, c) for c in "xy"]} for i in range(n)]
        path = tmp_path / f"{n}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        del rows
        selection, out = PromptSelection(str(path)), tmp_path / f"{n}.jsonl.gz"
        labelling = Labelling("gold", (), JudgeOptions(ModelSection()))
        tracemalloc.start()
        assert label_data(labelling, selection, out=out, reporter=Reporter(quiet=True))["n_prompts"] == n
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / (counts[1] - counts[0]) < 1_000
