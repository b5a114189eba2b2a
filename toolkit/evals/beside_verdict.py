"""What stands beside a verdict: the win rate without unfinished responses, and what to do next."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from toolkit.evals.hacking import FEATURE_NAMES
from toolkit.evals.judge_tests import MIN_COVERAGE
from toolkit.evals.overoptimization import STILL_NATS
from toolkit.evals.verdict import ARMS, MIN_PROMPTS, NAMES, Judging
from toolkit.evals.winrate import power_prompts
from toolkit.evals.words import counted

Row = Mapping[str, Any]
MOST_STEPS = 2


def complete_verdict(result: dict[str, Any], ended: Sequence[Row], judging: Judging) -> None:
    """Add ``both_ended`` and ``next_step`` to the verdict of ``evaluation.json``, and what they say to its sentence.

    ``ended`` are the win rates on the pairs in which both arms ended their responses.
    """
    verdict = result["verdict"]
    verdict["both_ended"] = list(ended)
    verdict["sentence"] += on_ended_responses(verdict, ended)
    verdict["next_step"] = " ".join(islice(_steps(result, judging), MOST_STEPS))


def _steps(result: Row, judging: Judging) -> Iterator[str]:
    """What to do next, what matters most first."""
    verdict = result["verdict"]
    if verdict["broken_arms"]:
        arms = " and ".join(NAMES[arm] for arm in verdict["broken_arms"])
        yield f"Train {arms} again, with another learning rate or a larger weight of the KL, and read its samples."
        return
    if not verdict["judges"]:
        yield (
            "Name an independent judge in evaluate.judges: llm:MODEL, rm:MODEL, votes of people (duel judge RUN "
            "--human) as file:PATH, or gold where the data has it."
        )
        return
    if judging.demonstration:
        yield "Take a recipe that is made to compare, such as quickstart, and your own data."
        return
    if verdict["n_judged"] < MIN_COVERAGE * verdict["n_prompts"]:
        yield _for_more_judged(result)
    elif verdict["finding"] == "undecided":
        yield _for_a_decision(verdict)
    yield from _for_equal_kl(verdict.get("kl_nats", {}))
    if verdict["winner"] in ARMS:
        changed = [row["feature"] for row in result["hacking"].get(verdict["winner"], ()) if row["flagged"]]
        if changed:
            names = ", ".join(FEATURE_NAMES.get(name, name) for name in changed[:MOST_STEPS])
            check = f"Check that {NAMES[verdict['winner']]} did not win by form ({names} changed)"
            of_arms = (row for row in result["win_rates"] if (row["policy"], row["baseline"]) == ARMS)
            controlled = any(row["lc_win_rate"] is not None for row in of_arms)
            yield f"{check}: read its samples{', and its win rate at equal length' if controlled else ''}."
    # On a terminal the line with the study's command follows (`next_study`): both say the same.
    yield "Repeat it over seeds and settings (duel study): this is one run."


def _for_more_judged(result: Row) -> str:
    verdict = result["verdict"]
    of_arms = [row for row in result["win_rates"] if {row["policy"], row["baseline"]} == set(ARMS)]
    if any(row["n_failed"] for row in of_arms if row["judge"] in verdict["judges"]):
        return "Run again with --force --only evaluate: it asks what failed once more."
    # Recorded judgements are of some prompts alone, and a further run finds no more of them.
    judged = f"{verdict['n_judged']} of {counted(verdict['n_prompts'], 'prompt')}"
    return f"Judge more of the prompts: the recorded judgements are of {judged}."


def _for_a_decision(verdict: Row) -> str:
    n, visible = verdict["n_judged"], verdict.get("detectable_effect")
    if verdict["doubt"] == "judges disagree":
        return "Read the prompts on which the judges disagree, and name the one to trust as evaluate.primary_judge."
    if verdict["doubt"] == "primary judge":
        return "Name another evaluate.primary_judge, or none: the judges then decide together."
    if n < MIN_PROMPTS or visible is None:
        return f"Raise data.eval_prompts: {power_prompts(0.6)} prompts see a win rate of 60%."
    return f"Raise data.eval_prompts: {4 * n:,} judged prompts see a difference of {visible * 50:.1f} points."


def _for_equal_kl(kl_nats: Mapping[str, float | None]) -> Iterator[str]:
    ppo, dpo = (kl_nats.get(arm) for arm in ARMS)
    if ppo is None or dpo is None or abs(ppo - dpo) <= 0.1 * max(abs(ppo), abs(dpo)):
        return
    nearer, kl = min(((NAMES[arm], kl) for arm, kl in zip(ARMS, (ppo, dpo), strict=True)), key=lambda pair: pair[1])
    if kl < STILL_NATS:  # it has hardly moved: there is nothing to match
        yield f"Train {nearer} further: it is {kl:.2f} nats from SFT, so the arms cannot be compared at equal KL."
    else:
        steps = 10.0 if kl >= 0.1 else 100.0
        reached = math.floor(steps * kl) / steps  # not rounded up to a KL that this arm never had
        yield (
            "Compare the arms at equal KL: keep policies with ppo.kl_milestones and dpo.kl_milestones at "
            f"[{reached:g}], and read both there on the frontier."
        )


def on_ended_responses(verdict: Row, rows: Sequence[Row]) -> str:
    """The win rate on the pairs in which both arms ended their responses, by the judge that decided.

    ``rows`` are the win rates on these pairs. Empty where they change nothing, or where no judge decided.
    """
    if not verdict["judges"] or not verdict["n_judged"]:
        return ""
    row = next((row for row in rows if row["judge"] == verdict["judge"]), None)
    if row is None or not row["n_judged"]:
        return f" In no pair on the {counted(verdict['n_judged'], 'judged prompt')} did both arms end their responses."
    of_all_prompts = row["n_judged"] >= verdict["n_judged"]
    if of_all_prompts and row["win_rate"] == verdict["win_rate"]:
        return ""
    interval = "no interval" if row["ci_low"] is None else f"{row['ci_low']:.1%} to {row['ci_high']:.1%}"
    # A prompt counts with those of its pairs of samples that are left.
    on = "all" if of_all_prompts else f"{row['n_judged']} of"
    prompts = f"on {on} {counted(verdict['n_judged'], 'judged prompt')}"
    wins = f"RM + PPO wins {row['win_rate']:.1%} ({interval}, {prompts})"
    return f" Where both responses of a pair ended, {wins}."
