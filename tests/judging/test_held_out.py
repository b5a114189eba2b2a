"""Judges are asked about held-out pairs: which pairs, in which orders, and what recorded judgements say of them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from toolkit.errors import RecipeError
from toolkit.evals.intervals import BootstrapOptions
from toolkit.files import write_table
from toolkit.judging.held_out import examine_judges, held_out_pairs
from toolkit.judging.options import JudgeOptions
from toolkit.judging.records import Judgement, check_recorded_names, response_hash
from toolkit.preferences.rows import Comparison, PreferenceRow
from toolkit.progress import Reporter
from toolkit.recipe.training import ModelSection

QUIET = Reporter(quiet=True)
OPTIONS = JudgeOptions(ModelSection(dtype="float32"))
BOOTSTRAP: BootstrapOptions = {"n_resamples": 200, "confidence": 0.95, "seed": 0}


def longest(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def rows(n: int = 30) -> list[PreferenceRow]:
    """Rows with three responses, of which the longer one is always preferred."""
    texts = [" fine", " quite fine", " a very long answer"]
    wins = [Comparison(1, 0), Comparison(2, 0), Comparison(2, 1)]
    return [PreferenceRow(f"p{k}", f"Prompt {k}:", texts, wins, [0.0, 1.0, 2.0]) for k in range(n)]


def test_one_pair_of_every_prompt_comes_first_and_the_order_of_rows_changes_nothing() -> None:
    def names(of: list[PreferenceRow], most: int | None) -> list[tuple[str, int, int]]:
        return [(pair.row.prompt_id, pair.i, pair.j) for pair in held_out_pairs(of, most)]

    chosen = names(rows(8), 10)
    assert len({prompt for prompt, _, _ in chosen[:8]}) == 8 and len(set(chosen)) == 10
    assert names(rows(8)[::-1], 10) == chosen
    assert names(rows(8), 5) == chosen[:5]
    assert len(names(rows(8), None)) == 24


def test_scores_at_hand_functions_and_language_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUEL_CACHE", str(tmp_path))
    judges = ["gold", "rm", f"python:{__name__}:longest", "llm:tiny"]
    known = {"gold": [row.gold or [] for row in rows()], "rm": [[2.0, 1.0, 0.0]] * 30}
    tests, usages = examine_judges(judges, rows(), 10, OPTIONS, QUIET, known_scores=known, bootstrap=BOOTSTRAP)
    gold, reward, function, model = (tests[judge] for judge in judges)
    assert (gold.accuracy["value"], gold.n_pairs, gold.passed) == (1.0, 90, True)
    assert (reward.accuracy["value"], reward.passed) == (0.0, False)
    assert (function.accuracy["value"], function.n_pairs) == (1.0, 10)
    assert model.n_pairs == 10 and model.position_consistency["value"] is not None
    [usage] = usages
    assert usage.judge == "llm:tiny, tested on held-out pairs" and usage.n_questions == 20


def test_a_file_is_tested_where_it_covers_held_out_pairs(tmp_path: Path) -> None:
    def judgement(row: PreferenceRow, judge: str, policy: int, baseline: int, preference: float) -> Judgement:
        texts = [response_hash(row.responses[k]) for k in (policy, baseline)]
        return Judgement(row.prompt_id, "x", "y", judge, preference, policy_hash=texts[0], baseline_hash=texts[1])

    recorded = [judgement(row, "ann", 2, 0, 1.0) for row in rows()]
    recorded += [judgement(row, "ann", 0, 1, 0.0) for row in rows()]  # the other way round, and as right
    recorded += [Judgement("p0", "rm_ppo", "dpo", "bob", 1.0)]
    write_table([asdict(one) for one in recorded], tmp_path / "votes.parquet")
    spec = f"file:{tmp_path / 'votes.parquet'}"
    tests, _ = examine_judges([spec], rows(), 10, OPTIONS, QUIET, known_scores={}, bootstrap=BOOTSTRAP)
    assert (tests["ann"].accuracy["value"], tests["ann"].n_pairs) == (1.0, 60)
    assert tests["bob"].passed is None and "no held-out pair" in tests["bob"].reason


def test_one_judge_in_two_files_is_tested_on_both_in_any_order(tmp_path: Path) -> None:
    specs = []
    for name, preference in [("right", 1.0), ("wrong", 0.0)]:
        recorded = [
            Judgement(
                row.prompt_id,
                "x",
                "y",
                "ann",
                preference,
                policy_hash=response_hash(row.responses[2]),
                baseline_hash=response_hash(row.responses[int(name == "wrong")]),
            )
            for row in rows()
        ]
        write_table([asdict(one) for one in recorded], tmp_path / f"{name}.parquet")
        specs.append(f"file:{tmp_path / name}.parquet")
    for order in (specs, specs[::-1]):
        tests, _ = examine_judges(order, rows(), 10, OPTIONS, QUIET, known_scores={}, bootstrap=BOOTSTRAP)
        assert (tests["ann"].accuracy["value"], tests["ann"].n_pairs) == (0.5, 60)


@pytest.mark.parametrize("name", ["gold", "all judges"])
def test_a_judge_in_a_file_has_a_name_of_its_own(tmp_path: Path, name: str) -> None:
    file = tmp_path / "votes.parquet"
    write_table([asdict(Judgement("p0", "rm_ppo", "dpo", name, 1.0))], file)
    for judges in (["gold", f"file:{file}"], [f"file:{file}", "gold"]):
        with pytest.raises(RecipeError, match=f"{name}.*would be mixed") as raised:
            check_recorded_names(judges)
        assert "rename" in str(raised.value)
    check_recorded_names(["gold"])


def test_no_pairs_and_no_test() -> None:
    none, _ = examine_judges(["gold"], rows(), 0, OPTIONS, QUIET, known_scores={}, bootstrap=BOOTSTRAP)
    assert none["gold"].passed is None and "judge_test_pairs is 0" in none["gold"].reason
    unlabelled = [PreferenceRow("p", "Prompt:", ["a", "b"], [])]
    empty, _ = examine_judges(["gold"], unlabelled, 9, OPTIONS, QUIET, known_scores={}, bootstrap=BOOTSTRAP)
    assert "no labelled pair" in empty["gold"].reason
