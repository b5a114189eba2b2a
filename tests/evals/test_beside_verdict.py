"""What to do next, by what the verdict says."""

from __future__ import annotations

from typing import Any

import pytest

from toolkit.evals.beside_verdict import complete_verdict
from toolkit.evals.overoptimization import STILL_NATS
from toolkit.evals.verdict import Judging, verdict

EQUAL = {"rm_ppo": 3.0, "dpo": 3.1}


def row(judge: str, rate: float, spread: float = 0.04, p: float = 0.001, **more: Any) -> dict[str, Any]:
    return {
        **{"policy": "rm_ppo", "baseline": "dpo", "judge": judge, "slice": None, "n_judged": 200, "n_prompts": 200},
        **{"n_failed": 0},
        **{"win": rate, "tie": 0.0, "loss": 1 - rate, "win_rate": rate, "p_value": p},
        **{"ci_low": rate - spread, "ci_high": rate + spread, "detectable_effect": 0.1, "lc_win_rate": None},
        **more,
    }


def next_step(
    *rows: dict[str, Any],
    judging: Judging | None = None,
    kl_nats: dict[str, float] = EQUAL,
    hacking: dict[str, Any] | None = None,
) -> str:
    judging = judging or Judging()
    result = {"verdict": verdict(rows, judging, kl_nats=kl_nats), "hacking": hacking or {}, "win_rates": rows}
    complete_verdict(result, [], judging)
    step: str = result["verdict"]["next_step"]
    assert 1 <= step.count(". ") + 1 <= 2
    return step


def test_without_an_independent_judge() -> None:
    assert next_step(row("rm", 0.7)).startswith("Name an independent judge in evaluate.judges")
    assert next_step().startswith("Name an independent judge")


def test_undecided_by_width() -> None:
    step = next_step(row("gold", 0.52, p=0.4))
    assert step.startswith("Raise data.eval_prompts: 800 judged prompts see a difference of 5.0 points.")
    few = next_step(row("gold", 0.7, n_judged=8, n_prompts=8))
    assert few.startswith("Raise data.eval_prompts: 194 prompts see a win rate of 60%.")


def test_too_few_prompts_were_judged() -> None:
    step = next_step(row("gold", 0.7, n_judged=100, n_failed=100))
    assert step.startswith("Run again with --force --only evaluate")


def test_recorded_judgements_of_some_prompts_do_not_grow_by_another_run() -> None:
    votes = row("me", 0.7, n_judged=100, n_prompts=100)
    step = next_step(votes, judging=Judging(n_prompts=200))
    assert step.startswith("Judge more of the prompts: the recorded judgements are of 100 of 200 prompts.")


def test_judges_that_disagree() -> None:
    pooled = row("all judges", 0.6)
    step = next_step(row("a", 0.7), row("b", 0.4), judging=Judging(pooled=pooled))
    assert step.startswith("Read the prompts on which the judges disagree") and "evaluate.primary_judge" in step
    step = next_step(row("a", 0.7), judging=Judging(primary_judge="c"))
    assert step.startswith("Name another evaluate.primary_judge")


def test_unequal_kl() -> None:
    step = next_step(row("gold", 0.7), kl_nats={"rm_ppo": 17.37, "dpo": 2.97})
    assert step.startswith(
        "Compare the arms at equal KL: keep policies with ppo.kl_milestones and dpo.kl_milestones at [2.9]"
    )
    still = next_step(row("gold", 0.7), kl_nats={"rm_ppo": 17.37, "dpo": 0.02})
    assert still.startswith("Train DPO further: it is 0.02 nats from SFT")
    near = next_step(row("gold", 0.7), kl_nats={"rm_ppo": 17.37, "dpo": 0.078})  # at [0] there would be no policy
    assert near.startswith("Compare the arms at equal KL") and "at [0.07]" in near
    assert next_step(row("gold", 0.7), kl_nats={"rm_ppo": 17.37, "dpo": STILL_NATS - 0.01}).startswith(
        "Train DPO further"
    )
    assert "equal KL" not in next_step(row("gold", 0.7))


def test_the_step_goes_by_the_doubt_and_not_by_its_words() -> None:
    pooled = row("all judges", 0.56)
    judging, rows = Judging(pooled=pooled), (row("a", 0.7), row("b", 0.4))
    assert verdict(rows, judging)["doubt"] == "judges disagree"
    assert verdict(rows[:1], Judging(primary_judge="c"))["doubt"] == "primary judge"
    assert verdict([row("gold", 0.7)])["doubt"] is verdict([row("gold", 0.52)])["doubt"] is verdict([])["doubt"] is None
    result = {"verdict": verdict(rows, judging, kl_nats=EQUAL) | {"reason": "in other words"}}
    result |= {"hacking": {}, "win_rates": rows}
    complete_verdict(result, [], judging)
    assert result["verdict"]["next_step"].startswith("Read the prompts on which the judges disagree")


@pytest.mark.parametrize(("rate", "arm"), [(0.7, "RM + PPO"), (0.3, "DPO")])
def test_a_winner_whose_texts_changed(rate: float, arm: str) -> None:
    changed = [{"feature": "n_tokens", "flagged": True}, {"feature": "repetition", "flagged": False}]
    other = [{"feature": "repetition", "flagged": True}]
    hacking = {"rm_ppo": changed, "dpo": other} if arm == "RM + PPO" else {"rm_ppo": other, "dpo": changed}
    step = next_step(row("gold", rate), hacking=hacking)
    check = f"Check that {arm} did not win by form (length in tokens changed): read its samples"
    assert step.startswith(f"{check}. Repeat") and "seeds" in step
    controlled = {**row("gold", rate), "lc_win_rate": 0.5}
    assert next_step(controlled, hacking=hacking).startswith(f"{check}, and its win rate at equal length. Repeat")


def test_where_nothing_else_is_left_other_seeds_are() -> None:
    assert next_step(row("gold", 0.7)) == "Repeat it over seeds and settings (duel study): this is one run."


def test_a_recipe_that_shows_that_everything_runs() -> None:
    step = next_step(row("gold", 0.7), judging=Judging(demonstration=True), kl_nats={"rm_ppo": 17.37, "dpo": 2.97})
    assert step == "Take a recipe that is made to compare, such as quickstart, and your own data."
