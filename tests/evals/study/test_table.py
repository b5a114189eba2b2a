"""Reading a study's table: what is refused, what counts as the worst, and what the arrays hold."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.study_tables import Columns, columns, study_rows

from toolkit.errors import DataError
from toolkit.evals.study.table import study_data

pytestmark = pytest.mark.fault
Rows = list[dict[str, Any]]


def table(change: Callable[[Rows], Rows | None] = lambda rows: rows, **options: Any) -> Columns:
    rows = list(study_rows(prompts=6, settings=2, **options))
    changed = change(rows)
    return columns(rows if changed is None else changed)


def test_the_arrays_hold_the_rows() -> None:
    rows = list(study_rows(prompts=6, settings=2))
    np.random.default_rng(0).shuffle(rows)  # type: ignore[arg-type]
    data = study_data(columns(rows))
    assert data.judges == ("score",) and data.n_prompts == {"dev": 6, "test": 6} and not data.warnings
    prompts = sorted(f"test-{i}" for i in range(6))
    for row in rows:
        if row["split"] == "test":
            arm = data.arms[row["arm"]]["test"]
            p, k = arm.points.index((row["setting"], row["checkpoint"])), arm.seeds.index(row["seed"])
            assert arm.scores[0, p, k, prompts.index(row["prompt_id"])] == row["score"]
            assert arm.kl[p, k] == pytest.approx(row["kl_nats"])
            assert (arm.tokens[p, k], arm.seconds[p, k]) == (row["train_tokens"], row["wall_s"])


def without(name: str) -> Callable[[Rows], None]:
    def change(rows: Rows) -> None:
        for row in rows:
            del row[name]

    return change


def every(**values: Any) -> Callable[[Rows], None]:
    return lambda rows: [row.update(values) for row in rows] and None


def first(**values: Any) -> Callable[[Rows], None]:
    return lambda rows: rows[0].update(values)


def only(name: str, value: Any) -> Callable[[Rows], Rows]:
    return lambda rows: [row for row in rows if row[name] == value]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("kl_nats"), "lacks columns: kl_nats"),
        (without("score"), "lacks columns: score (or baseline and preference)"),
        (lambda rows: [row.update(sed=row.pop("seed")) for row in rows] and None, "did you mean 'sed'?"),
        (every(baseline="sft", preference=0.5), "both score and preference"),
        (first(arm=None), "column arm is empty in 1 rows"),
        (every(checkpoint="last"), "column checkpoint has no whole numbers"),
        (every(score="good"), "column score has values that are no numbers"),
        (first(split="train"), "unknown split 'train'"),
        (only("arm", "dpo"), "no arm rm_ppo"),
        (every(arm="ppo"), "no arm rm_ppo and no arm dpo (it has 'ppo'"),
        (only("split", "test"), "no dev rows"),
        (only("split", "dev"), "no test rows"),
        (first(prompt_id="test-0"), "1 prompts are in dev and in test, prompt 'test-0' among them"),
        (lambda rows: [*rows, dict(rows[0])], "several rows of arm rm_ppo, setting setting 0, seed 0"),
        (first(score=float("inf")), "a score is infinite"),
        (first(kl_nats=None), "a score and no kl_nats"),
        (first(train_tokens=None), "column train_tokens is empty or negative"),
        (first(wall_s=-1.0), "column wall_s is empty or negative"),
        (
            lambda rows: [r for r in rows if (r["arm"], r["setting"], r["seed"]) != ("dpo", "setting 1", 2)],
            "setting 'setting 1' of arm dpo has no rows of seed 2",
        ),
    ],
)
def test_bad_tables_are_refused_in_words(change: Callable[[Rows], Rows | None], said: str) -> None:
    with pytest.raises(DataError) as error:
        study_data(table(change))
    assert said in error.value.render()


def test_an_empty_table_is_refused() -> None:
    empty = {name: [] for name in table()}
    with pytest.raises(DataError, match="no rows"):
        study_data(empty)


def test_preferences_are_averaged_over_baselines() -> None:
    def pairwise(rows: Rows) -> Rows:
        out = []
        for i, row in enumerate(rows):
            del row["score"]
            out += [{**row, "baseline": name, "preference": (i * n % 5) / 4} for n, name in ((1, "sft"), (3, "gpt"))]
        return out

    filled = table(pairwise)
    data = study_data(filled)
    arm = data.arms["dpo"]["test"]
    for i in range(0, len(filled["arm"]), 2):
        if (filled["arm"][i], filled["split"][i]) == ("dpo", "test"):
            p = arm.points.index((filled["setting"][i], filled["checkpoint"][i]))
            n = sorted(f"test-{j}" for j in range(6)).index(filled["prompt_id"][i])
            expected = (filled["preference"][i] + filled["preference"][i + 1]) / 2
            assert arm.scores[0, p, arm.seeds.index(filled["seed"][i]), n] == pytest.approx(expected)
    filled["preference"][0] = 1.5
    with pytest.raises(DataError, match=re.escape("outside [0, 1]")):
        study_data(filled)


def of_trial(rows: Rows) -> Rows:
    return [r for r in rows if (r["arm"], r["setting"], r["seed"]) == ("rm_ppo", "setting 0", 1)]


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: [r.update(score=float("nan")) for r in of_trial(rows)] and None,
        lambda rows: [r.update(score=None) for r in of_trial(rows)] and None,
        lambda rows: [r.update(kl_nats=float("inf")) for r in of_trial(rows)] and None,
        lambda rows: (
            [r.update(score=None, kl_nats=None, train_tokens=None, wall_s=None) for r in of_trial(rows)] and None
        ),
    ],
    ids=["nan", "null", "infinite KL", "nothing known"],
)
def test_a_trial_that_diverged_is_worse_than_any_other(change: Callable[[Rows], None]) -> None:
    data = study_data(table(change))
    arm = data.arms["rm_ppo"]["test"]
    lost = [p for p, (setting, _) in enumerate(arm.points) if setting == "setting 0"]
    assert arm.diverged[lost, 1].all() and arm.diverged.sum() == len(lost)
    others = [a.scores[:, ~a.diverged] for splits in data.arms.values() for a in splits.values()]
    assert arm.scores[:, lost, 1].max() < min(scores.min() for scores in others)
    assert np.isfinite(arm.scores).all() and np.isnan(arm.kl[lost, 1]).all()
    checkpoints = ", ".join(str(arm.points[p][1]) for p in lost)
    trial = f"rm_ppo, setting setting 0, checkpoints {checkpoints}, seed 1 diverged or has no"
    assert [text[: len(trial)] for text in data.warnings if "diverged" in text] == [trial] * 2  # of dev and of test


def test_a_checkpoint_that_a_seed_did_not_reach_is_its_worst() -> None:
    data = study_data(table(lambda rows: [r for r in rows if r not in of_trial(rows) or r["checkpoint"] == 100]))
    arm = data.arms["rm_ppo"]["test"]
    assert arm.diverged.sum() == 1 and arm.diverged[arm.points.index(("setting 0", 200)), 1]


def test_single_scores_that_are_missing_count_as_lost() -> None:
    data = study_data(table(first(score=None)))
    arm = data.arms["rm_ppo"]["dev"]
    assert not arm.diverged.any() and arm.scores[0, 0, 0, 0] == np.nanmin(arm.scores)
    assert "1 rows have no score" in data.warnings[0]


def test_judges_that_score_and_judges_that_prefer_stand_in_one_table() -> None:
    rows = []
    for row in study_rows():
        rows.append(row | {"judge": "gold", "baseline": None, "preference": None})
        preference = 1.0 / (1.0 + np.exp(-row["score"]))
        rows.append(row | {"judge": "llm:x", "baseline": "sft", "preference": preference, "score": None})
    both = study_data(columns(rows))
    alone = study_data(columns(list(study_rows())))
    assert both.judges == ("gold", "llm:x") and both.warnings == ()
    for arm in ("rm_ppo", "dpo"):
        scores = both.arms[arm]["test"].scores
        assert np.array_equal(scores[0], alone.arms[arm]["test"].scores[0])
        assert np.allclose(scores[1], 1 / (1 + np.exp(-scores[0])))
    twice = [row | {"judge": "gold"} for row in rows]
    with pytest.raises(DataError, match="judge gold has scores and preferences"):
        study_data(columns(twice))
    two_baselines = [row | ({"baseline": "base"} if row["baseline"] and row["seed"] else {}) for row in rows]
    with pytest.raises(DataError, match="several baselines"):
        study_data(columns(two_baselines))
