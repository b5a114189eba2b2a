"""The document of a study: its keys, its verdict, and what is said where something lacks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.study_tables import Mean, columns, equal_arms, study_rows

from toolkit.errors import DataError
from toolkit.evals.study.selection import Rule, on_dev
from toolkit.evals.study.study import study
from toolkit.evals.study.table import study_data


def studied(
    mean: Mean = equal_arms, change: Any = None, kl_limit: float | None = None, **options: Any
) -> dict[str, Any]:
    rows = list(study_rows(mean, **options))
    for row in rows if change else ():
        change(row)
    document = study(study_data(columns([row for row in rows if row])), kl_limit=kl_limit)
    json.dumps(document, allow_nan=False)
    return document


def better(by: float) -> Mean:
    return lambda arm, s, c: equal_arms(arm, s, c) + by * (arm == "rm_ppo")


def test_the_keys_are_those_that_readers_know() -> None:
    document = studied()
    assert list(document) == (
        [
            "schema_version",
            "recipe",
            "splits",
            "trials",
            "chosen",
            "verdict",
            "effort",
            "controls",
            "gap",
            "warnings",
            "selection",
        ]
    )
    verdict = document["verdict"]
    assert {"winner", "sentence", "probability", "n_seeds", "n_prompts"} <= verdict.keys()
    for name in ("best", "matched_kl", "matched_compute"):
        assert {"win_rate", "ci_low", "ci_high", "probability"} <= verdict[name].keys()
    assert {"kl_low", "kl_high", "curve"} <= verdict["matched_kl"].keys()
    assert document["recipe"] is None and document["chosen"].keys() == {"rm_ppo", "dpo"}
    assert (verdict["n_seeds"], verdict["n_prompts"], len(document["trials"])) == (3, 40, 6)


def test_a_better_arm_wins_with_place_cost_and_seeds_in_the_sentence() -> None:
    for by, winner, name in ((1.5, "rm_ppo", "RM + PPO is better"), (-1.5, "dpo", "DPO is better")):
        verdict = studied(better(by))["verdict"]
        assert verdict["winner"] == winner
        for words in (
            name,
            "3 seeds",
            "40 test prompts",
            "3 trials an arm",
            "nats",
            "200k tokens",
            "equal KL of 1.00 to 3.20 nats",
        ):
            assert words in verdict["sentence"], verdict["sentence"]
        assert (verdict["probability"] > 0.975) == (winner == "rm_ppo")


def test_equal_arms_are_undecided() -> None:
    verdict = studied(prompts=60)["verdict"]
    assert verdict["winner"] == "undecided" and verdict["sentence"].startswith("Undecided: RM + PPO wins ")
    assert verdict["best"]["ci_low"] < 0.5 < verdict["best"]["ci_high"]


def test_the_numbers_are_those_of_the_chosen_policies() -> None:
    rows = list(study_rows(better(0.4), noise=0.5))
    document = study(study_data(columns(rows)))
    scores: dict[Any, Any] = {}
    for row in rows:
        scores.setdefault((row["arm"], row["setting"], row["checkpoint"], row["split"]), {}).setdefault(
            row["seed"], {}
        )[row["prompt_id"]] = row["score"]
    mean = {key: np.mean([list(by.values()) for by in seeds.values()]) for key, seeds in scores.items()}
    best = {}
    for arm, chosen in document["chosen"].items():
        best[arm] = max((k for k in mean if k[0] == arm and k[3] == "dev"), key=lambda k: mean[k])
        assert (chosen["setting"], chosen["checkpoint"]) == best[arm][1:3]
        on_test = mean[(*best[arm][:3], "test")]
        assert chosen["optimism"]["score"] == pytest.approx(mean[best[arm]] - on_test)
    first, second = (scores[(*best[arm][:3], "test")] for arm in ("rm_ppo", "dpo"))
    wins = [
        (first[a][p] > second[b][p]) + 0.5 * (first[a][p] == second[b][p])
        for a in first
        for b in second
        for p in first[a]
    ]
    assert document["verdict"]["best"]["win_rate"] == pytest.approx(np.mean(wins))


def test_the_order_turns_with_tuning() -> None:
    """RM + PPO does well with any setting; DPO is bad with most, and better than it with the right one."""

    def mean(arm: str, setting: int, checkpoint: int) -> float:
        return 0.0 if arm == "rm_ppo" else 0.8 if setting == 5 else -0.8

    document = studied(mean, settings=8, checkpoints=1, prompts=100)
    first, last = document["effort"][0], document["effort"][-1]
    assert (first["n_trials"], last["n_trials"]) == (1, 8)
    assert first["ci_low"] > 0.5 > last["ci_high"]
    assert first["rm_ppo"]["score"] > first["dpo"]["score"] and last["rm_ppo"]["score"] < last["dpo"]["score"]
    assert "The order turns with tuning: with 1 trial each RM + PPO is ahead" in document["verdict"]["sentence"]
    assert "with 8 DPO is" in document["verdict"]["sentence"]


def test_a_trial_that_diverged_is_a_result_of_its_setting() -> None:
    """Setting 0 is the best on the seeds that live; one seed of it diverged, and so it is not chosen."""

    def diverge(row: dict[str, Any]) -> None:
        if (row["arm"], row["setting"], row["seed"]) == ("dpo", "setting 0", 0):
            row.update(score=math.nan, kl_nats=math.inf)

    document = studied(change=diverge)
    assert studied()["chosen"]["dpo"]["setting"] == "setting 0" != document["chosen"]["dpo"]["setting"]
    trial = next(row for row in document["trials"] if (row["arm"], row["setting"]) == ("dpo", "setting 0"))
    assert trial["n_diverged"] == 1 and trial["checkpoints"][0]["seeds"][0]["score"] == {"score": None}
    assert document["effort"][0]["dpo"]["score"] < studied()["effort"][0]["dpo"]["score"] - 0.1
    assert any("dpo, setting setting 0, checkpoints 100, 200, seed 0 diverged" in text for text in document["warnings"])


def test_one_seed_decides_nothing() -> None:
    document = studied(better(2.0), seeds=1)
    verdict = document["verdict"]
    assert verdict["winner"] == "undecided" and "An arm has one seed." in verdict["sentence"]
    for name in ("best", "matched_kl", "matched_compute"):
        assert verdict[name]["win_rate"] > 0.8
        assert (verdict[name]["ci_low"], verdict[name]["ci_high"], verdict[name]["probability"]) == (None, None, None)
    assert sum("has one seed" in text for text in document["warnings"]) == 2


def test_two_seeds_are_warned_of() -> None:
    assert sum("has 2 seeds" in text for text in studied(seeds=2)["warnings"]) == 2


def test_few_prompts_decide_nothing() -> None:
    verdict = studied(better(3.0), prompts=19)["verdict"]
    assert verdict["winner"] == "undecided" and "at least 20" in verdict["sentence"]


def far_away(row: dict[str, Any]) -> None:
    if row["arm"] == "dpo":
        row["kl_nats"] += 50.0


def test_without_a_common_range_of_kl_nothing_is_decided() -> None:
    verdict = studied(better(2.0), change=far_away)["verdict"]
    matched = verdict["matched_kl"]
    assert [matched[k] for k in ("win_rate", "ci_low", "ci_high", "probability", "kl_low", "kl_high")] == [None] * 6
    assert matched["curve"] == [] and "no range of KL" in matched["reason"]
    assert verdict["winner"] == "undecided" and verdict["probability"] is None
    assert "There is no comparison at equal KL" in verdict["sentence"]
    assert verdict["matched_compute"]["finding"] == "better"


def test_comparisons_that_disagree_are_named() -> None:
    """RM + PPO is better at its end, for three times the tokens; at equal tokens DPO is ahead."""

    def mean(arm: str, setting: int, checkpoint: int) -> float:
        return 1.5 * (checkpoint == 2) - 2.0 * (checkpoint == 0) if arm == "rm_ppo" else 0.0

    def costs(row: dict[str, Any]) -> None:
        row["train_tokens"] = row["checkpoint"] * (10.0 if row["arm"] == "rm_ppo" else 1.0) + 900 * (
            row["arm"] == "dpo"
        )

    verdict = studied(mean, change=costs, checkpoints=3, prompts=100)["verdict"]
    findings = {name: verdict[name]["win_rate"] > 0.5 for name in ("best", "matched_compute")}
    assert findings == {"best": True, "matched_compute": False}
    assert verdict["winner"] == "undecided"
    assert "says RM + PPO)" in verdict["sentence"] and "says DPO)" in verdict["sentence"]


def test_unequal_budgets_and_trials_are_warned_of() -> None:
    def dear(row: dict[str, Any]) -> None:
        row["train_tokens"] *= 1.06 if row["arm"] == "rm_ppo" else 1.0
        if (row["arm"], row["setting"]) == ("dpo", "setting 2"):
            row.clear()

    warnings = studied(change=dear)["warnings"]
    assert any("budgets differ by more than 5%: 212k" in text for text in warnings)
    assert any("unequal tuning: 3 trials of RM + PPO, 2 of DPO" in text for text in warnings)
    assert not studied()["warnings"]


def test_a_kl_limit_holds_for_both_arms() -> None:
    document = studied(kl_limit=1.5)
    assert all(chosen["kl_nats"] <= 1.5 for chosen in document["chosen"].values())
    with pytest.raises(DataError, match="at most 0.1 nats on dev prompts: the lowest is 1"):
        studied(kl_limit=0.1)


def test_what_is_chosen_needs_test_rows() -> None:
    def untested(row: dict[str, Any]) -> None:
        if (row["setting"], row["split"], row["arm"]) == ("setting 0", "test", "dpo"):
            row.clear()

    with pytest.raises(DataError, match="setting 0 at checkpoint 200 is chosen for arm dpo, and has no test rows"):
        studied(change=untested, seed_sd=0.0)


def test_a_prompt_that_a_policy_lacks_is_left_out_of_the_comparisons_with_that_policy() -> None:
    def lose(row: dict[str, Any]) -> None:
        if (row["arm"], row["setting"], row["seed"], row["prompt_id"]) == ("dpo", "setting 1", 0, "test-3"):
            row.clear()

    document, whole = studied(change=lose), studied()
    verdict = document["verdict"]
    assert whole["chosen"]["dpo"]["setting"] == "setting 0" and verdict["best"] == whole["verdict"]["best"]
    of_effort = [row["win_rate"] for row in document["effort"]], [row["win_rate"] for row in whole["effort"]]
    assert of_effort[0] != of_effort[1]
    assert document["splits"]["test"] == {"n_prompts": 40, "n_common": 39}
    assert any("1 of 40 test prompts lack rows of some policies" in text for text in document["warnings"])

    def lose_chosen(row: dict[str, Any]) -> None:
        if (row["arm"], row["setting"], row["seed"], row["prompt_id"]) == ("dpo", "setting 0", 0, "test-3"):
            row.clear()

    verdict = studied(change=lose_chosen)["verdict"]
    assert verdict["n_prompts"] == verdict["best"]["n_prompts"] == 39 and "39 test prompts" in verdict["sentence"]


def test_a_judge_that_fails_now_and_then_does_not_empty_the_study() -> None:
    """Each of 72 policies lacks 0.5% of the prompts: 70% of the prompts have all."""
    rng = np.random.default_rng(3)

    def fail(row: dict[str, Any]) -> None:
        if rng.random() < 0.005:
            row.clear()

    document = studied(better(1.5), change=fail, prompts=200, settings=6, checkpoints=2)
    assert document["splits"]["dev"]["n_common"] < 160
    assert document["verdict"]["winner"] == "rm_ppo" and document["verdict"]["best"]["n_prompts"] > 180
    assert {chosen["setting"] for chosen in document["chosen"].values()} == {"setting 0"}
    assert any("a score counts by its difference from its prompt's mean" in text for text in document["warnings"])


def test_a_policy_gains_nothing_by_missing_the_hard_prompts() -> None:
    """Setting 1 lacks a third of the prompts, on which every policy scores 50 less."""

    def lose(row: dict[str, Any]) -> None:
        if int(row["prompt_id"].split("-")[1]) % 3 == 0:
            row["score"] -= 50.0
            if row["setting"] == "setting 1" and row["seed"] != 2:
                row.clear()

    document = studied(change=lose, settings=5)
    assert {chosen["setting"] for chosen in document["chosen"].values()} == {"setting 0"}


def test_prompts_that_nearly_no_policy_has_are_an_error() -> None:
    def lose(row: dict[str, Any]) -> None:
        if row["split"] == "dev" and int(row["setting"][-1]) != int(row["prompt_id"].split("-")[1]) % 3:
            row.clear()

    with pytest.raises(DataError, match="no dev prompt has rows of 80% of the settings"):
        studied(change=lose)


def test_a_judge_that_does_not_decide_drops_no_prompt() -> None:
    rows = [row | {"judge": judge} for judge in ("gold", "rm") for row in study_rows(better(1.5))]
    few = [row for row in rows if row["judge"] == "gold" or int(row["prompt_id"].split("-")[1]) % 2]
    whole, beside = (study(study_data(columns(each)))["verdict"] for each in (rows, few))
    assert beside["n_prompts"] == 40 and beside["best"] == whole["best"] and beside["winner"] == "rm_ppo"
    assert beside["judges"][1]["best"]["win_rate"] is not None


def preferences(value: Callable[[dict[str, Any]], float], **options: Any) -> list[dict[str, Any]]:
    """Rows of a judge that compares each policy with the SFT policy."""
    rows = [{**row, "judge": "llm", "baseline": "sft", "preference": value(row)} for row in study_rows(**options)]
    for row in rows:
        del row["score"]
    return rows


def test_ties_that_no_judge_saw_are_no_finding_of_equality() -> None:
    """Both arms always beat SFT: which of them is better, nobody was asked."""
    verdict = study(study_data(columns(preferences(lambda row: 1.0, prompts=200))))["verdict"]
    assert verdict["best"]["win_rate"] == 0.5 and verdict["best"]["ci_low"] > 0.48
    assert verdict["finding"] == "undecided" and verdict["winner"] == "undecided"
    assert "100.0% of the comparisons are ties that no judge saw" in verdict["sentence"]
    scores = [{**row, "score": 1.0} for row in study_rows(prompts=200)]
    seen = study(study_data(columns(scores)))["verdict"]
    assert seen["finding"] == "no practical difference"


def test_a_few_ties_that_no_judge_saw_leave_a_finding() -> None:
    def value(row: dict[str, Any]) -> float:
        even = int(row["prompt_id"].split("-")[1]) % 2
        return 0.75 if (row["arm"] == "rm_ppo") == bool(even) else 0.25

    verdict = study(study_data(columns(preferences(value, prompts=4_000, settings=1, checkpoints=1, seeds=2))))
    assert verdict["verdict"]["best"]["finding"] == "no practical difference"
    ahead = study(study_data(columns(preferences(lambda row: 1.0 if row["arm"] == "dpo" else 0.5, prompts=60))))
    assert ahead["verdict"]["winner"] == "dpo"


def test_judges_that_contradict_each_other_are_no_finding_of_equality() -> None:
    rows = list(study_rows(better(1.5), prompts=200))
    opposite = [{**row, "judge": "b", "score": -row["score"]} for row in rows]
    verdict = study(study_data(columns([{**row, "judge": "a"} for row in rows] + opposite)))["verdict"]
    assert verdict["best"]["win_rate"] == 0.5 and verdict["best"]["ci_low"] > 0.48
    assert verdict["finding"] == "undecided" and verdict["best"]["finding"] == "undecided"
    assert verdict["sentence"].count("judges disagree on which arm is ahead") == 1


def test_the_primary_judge_decides_alone() -> None:
    rows = list(study_rows(better(1.5)))
    opposite = [{**row, "judge": "b", "score": -row["score"]} for row in rows]
    data = study_data(columns([{**row, "judge": "a"} for row in rows] + opposite))
    for judge, other, winner in (("a", "b", "rm_ppo"), ("b", "a", "dpo")):
        document = study(replace(data, primary_judge=judge))
        assert document["verdict"]["winner"] == winner and document["selection"]["judges"] == [judge]
        assert f"Judge {other} does not decide: {judge} is the primary judge." in document["verdict"]["sentence"]
    refused = study(replace(data, primary_judge="a", refused={"a": "no better than a coin"}))["verdict"]
    assert refused["winner"] == "undecided"


def test_the_smallest_effect_is_the_users() -> None:
    data = study_data(columns(list(study_rows(prompts=2_000, settings=1, seed_sd=0.0))))
    findings = [study(data, smallest_effect=least)["verdict"]["best"]["finding"] for least in (0.0, 0.02, 0.2)]
    assert findings[0] == "undecided" and findings[2] == "no practical difference"
    assert "20 points" in study(data, smallest_effect=0.2)["verdict"]["best"]["finding_reason"]


def test_controls_are_listed_and_do_not_decide() -> None:
    arms = ("rm_ppo", "dpo", "rloo")
    document = studied(lambda arm, s, c: 9.0 * (arm == "rloo") + equal_arms(arm, s, c), arms=arms)
    assert [row["arm"] for row in document["controls"]] == ["rloo"]
    control = document["controls"][0]
    assert control["win_rate_of"]["dpo"]["win_rate"] == 0.0 and control["chosen"]["setting"] == "setting 0"
    assert "rloo" not in document["verdict"]["sentence"] and len(document["trials"]) == 6


def test_several_judges_stand_side_by_side() -> None:
    rows = list(study_rows(better(1.5)))
    harsh = [{**row, "judge": "b", "score": -100 * row["score"]} for row in rows]
    both = study(study_data(columns([{**row, "judge": "a"} for row in rows] + harsh)))
    assert [row["judge"] for row in both["verdict"]["judges"]] == ["a", "b"]
    first, second = both["verdict"]["judges"]
    assert first["best"]["win_rate"] == pytest.approx(1 - second["best"]["win_rate"])
    assert both["verdict"]["winner"] == "undecided" and "The judges disagree" in both["verdict"]["sentence"]
    agreeing = [{**row, "judge": "b", "score": 100 * row["score"]} for row in rows]
    same = study(study_data(columns([{**row, "judge": "a"} for row in rows] + agreeing)))
    alone = study(study_data(columns(rows)))
    assert same["verdict"]["winner"] == "rm_ppo" and not alone["verdict"]["judges"]
    assert same["verdict"]["best"]["win_rate"] == pytest.approx(alone["verdict"]["best"]["win_rate"])


def test_judges_that_an_arm_was_trained_on_do_not_decide() -> None:
    rows = list(study_rows(better(1.5)))
    signal = [{**row, "judge": "rm", "score": -100 * row["score"]} for row in rows]
    alone = study(study_data(columns([{**row, "judge": "gold"} for row in rows])))
    beside = study(study_data(columns([{**row, "judge": "gold"} for row in rows] + signal)))
    assert beside["verdict"]["winner"] == "rm_ppo" and beside["verdict"]["best"] == alone["verdict"]["best"]
    assert [row["judge"] for row in beside["verdict"]["judges"]] == ["gold", "rm"]
    only = study(study_data(columns([{**row, "judge": "rm"} for row in rows])))["verdict"]
    assert only["best"]["finding"] == "better" and only["winner"] == "undecided"
    for verdict in (beside["verdict"], only):
        assert "Judge rm does not decide: it is the reward model that PPO was trained against." in verdict["sentence"]


@pytest.mark.invariant
def test_the_order_of_rows_and_names_of_prompts_change_nothing() -> None:
    rows = list(study_rows(better(0.3)))
    document = study(study_data(columns(rows)))
    shuffled = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
    assert study(study_data(columns(shuffled))) == document


@pytest.mark.invariant
def test_changing_sides_mirrors_the_verdict() -> None:
    rows = list(study_rows(better(0.3)))
    other = {"rm_ppo": "dpo", "dpo": "rm_ppo"}
    mirrored = study(study_data(columns([{**row, "arm": other[row["arm"]]} for row in rows])))["verdict"]
    verdict = study(study_data(columns(rows)))["verdict"]
    for name in ("best", "matched_kl", "matched_compute"):
        assert mirrored[name]["win_rate"] == pytest.approx(1 - verdict[name]["win_rate"])
        assert mirrored[name]["ci_low"] == pytest.approx(1 - verdict[name]["ci_high"])
        assert mirrored[name]["probability"] == pytest.approx(1 - verdict[name]["probability"])


def test_the_judge_that_selects_is_the_users_and_the_verdict_is_of_all() -> None:
    rows = [row | {"judge": judge} for judge in ("a", "b") for row in study_rows(noise=0.1)]
    for row in rows:  # judge b likes the third setting best, judge a the first
        if row["judge"] == "b":
            row["score"] += 2.0 * int(row["setting"][-1])
    for judge, setting in (("a", "setting 0"), ("b", "setting 2")):
        document = study(study_data(columns(rows)), select_by=judge)
        assert document["selection"] == {"judges": [judge], "kl_limit": None}
        assert {chosen["setting"] for chosen in document["chosen"].values()} == {setting}
        assert len(document["verdict"]["judges"]) == 2
    with pytest.raises(DataError, match="no judge 'c' to select by"):
        study(study_data(columns(rows)), select_by="c")


def test_the_curve_at_the_users_kls() -> None:
    data = study_data(columns(list(study_rows())))
    curve = study(data, kl_grid=[0.5, 2.0, 3.0, 9.0])["verdict"]["matched_kl"]["curve"]
    assert [row["kl_nats"] for row in curve] == [2.0, 3.0]
    fine = study(data)["verdict"]["matched_kl"]
    near = min(fine["curve"], key=lambda row: abs(row["kl_nats"] - 2.0))
    assert abs(curve[0]["win_rate"] - near["win_rate"]) < 0.02
    assert study(data, kl_grid=[9.0])["verdict"]["matched_kl"] == fine | {"curve": []}


def test_points_for_the_test_prompts_are_those_that_the_verdict_reads() -> None:
    """Without test rows of all other points the verdict is the same, and there is no warning."""
    rows = list(study_rows(settings=5, checkpoints=4))
    whole = study_data(columns(rows))
    dev = study_data(columns([row for row in rows if row["split"] == "dev"]), splits=("dev",))
    results = on_dev(dev, ("rm_ppo", "dpo"), Rule(dev.deciding))
    assert 0 < len(results["rm_ppo"].needed) < 20
    few = [r for r in rows if r["split"] == "dev" or (r["setting"], r["checkpoint"]) in results[r["arm"]].needed]
    document, complete = study(study_data(columns(few))), study(whole)
    for arm, chosen in complete["chosen"].items():
        assert (chosen["setting"], chosen["checkpoint"]) == results[arm].chosen
    for comparison in ("best", "matched_kl", "matched_compute"):
        assert document["verdict"][comparison] == complete["verdict"][comparison]
    assert document["effort"] == complete["effort"] and document["warnings"] == []


def test_a_judge_that_failed_its_test_stands_beside_and_does_not_decide() -> None:
    rows = [row | {"judge": judge} for judge in ("good", "coin") for row in study_rows(better(1.5))]
    for row in rows:
        if row["judge"] == "coin" and row["arm"] == "dpo":
            row["score"] += 5.0
    data = study_data(columns(rows))
    assert study(data)["verdict"]["winner"] == "undecided"
    refused = replace(data, refused={"coin": "it is not shown to be better than a coin"})
    verdict = study(refused)["verdict"]
    assert verdict["winner"] == "rm_ppo" and "Judge coin does not decide: it is not shown" in verdict["sentence"]
    assert [row["not_deciding"] for row in verdict["judges"]] == ["it is not shown to be better than a coin", None]
    none = replace(data, refused=dict.fromkeys(("good", "coin"), "it failed its test"))
    assert study(none)["verdict"]["winner"] == "undecided"


def test_seconds_do_not_choose_what_is_evaluated_on_test_prompts() -> None:
    rows = [row for row in study_rows(settings=5, checkpoints=4) if row["split"] == "dev"]
    slower = [row | {"wall_s": row["wall_s"] * (1.0 + int(row["setting"][-1]))} for row in rows]
    first, second = (study_data(columns(each), splits=("dev",)) for each in (rows, slower))
    arms = ("rm_ppo", "dpo")
    assert on_dev(first, arms, Rule(first.deciding)) == on_dev(second, arms, Rule(second.deciding))


def test_neither_controls_nor_test_prompts_move_what_is_chosen_on_dev() -> None:
    """A seed that diverged counts as just below the worst score of both arms on dev prompts, and of nothing else."""
    rows = [row for row in study_rows(settings=2, noise=0.3) if row["checkpoint"] == 100]
    for row in rows:
        if row["arm"] == "rm_ppo" and row["setting"] == "setting 0":
            row["score"] = None if row["seed"] == 0 else row["score"] + 1.5
    far = [row | {"score": -90.0} if row["split"] == "test" and row["arm"] == "dpo" else row for row in rows]
    control = [row | {"arm": "length_only", "score": -90.0} for row in rows if row["arm"] == "dpo"]
    chosen = [study(study_data(columns(each)))["chosen"] for each in (rows, far, [*rows, *control])]
    assert chosen[0]["rm_ppo"]["setting"] == chosen[1]["rm_ppo"]["setting"] == chosen[2]["rm_ppo"]["setting"]
    assert chosen[0]["rm_ppo"]["dev_score"] == chosen[1]["rm_ppo"]["dev_score"] == chosen[2]["rm_ppo"]["dev_score"]


def test_a_control_stands_beside_the_chosen_policies_whatever_prompts_it_lacks() -> None:
    rows = list(study_rows(better(0.05), settings=4, noise=1.0))
    control = [
        row | {"arm": "sft", "setting": "sft"} for row in rows if row["arm"] == "dpo" and row["setting"] == "setting 3"
    ]
    few = [row for row in control if not row["prompt_id"].endswith(("1", "2", "3", "4"))]
    needed = on_dev(
        study_data(columns([r for r in rows if r["split"] == "dev"]), splits=("dev",)), ("rm_ppo", "dpo"), Rule((0,))
    )
    measured = [r for r in rows if r["split"] == "dev" or (r["setting"], r["checkpoint"]) in needed[r["arm"]].needed]
    document = study(study_data(columns([*measured, *few])))
    [row] = document["controls"]
    assert row["arm"] == "sft" and row["win_rate_of"]["rm_ppo"]["n_prompts"] == 24
    assert document["chosen"] == study(study_data(columns(measured)))["chosen"]
