"""The verdict between the two arms: what has to hold before one of them is called better.

Each condition guards against a way in which a verdict has been wrong:

- The interval of the win rate and the permutation test agree. A bootstrap interval alone is too narrow for few prompts,
  and calls one of two equal arms better too often. The permutation test holds its level at any number of prompts.
- At least ``MIN_PROMPTS`` prompts are judged, and at least ``MIN_COVERAGE`` of the prompts. Prompts whose judgement
  failed are not a random part of all.
- The judge is tested on held-out comparisons with labels, where there are any. One that is not shown to be better than
  a coin there does not decide.
- Every independent judge sees the same arm ahead, or one judge was named as the primary one. With several judges and no
  primary one, the prompt's mean over the judges decides, and the order of the judges changes nothing.
- Neither arm is broken (``broken.py``): one that has lost the end of its texts, or never moved, loses or wins by that.
- The difference is one that counts: an interval within ``smallest_effect`` of one half means "no practical difference",
  however small its p value is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from toolkit.evals.judge_tests import MIN_COVERAGE, JudgeTest, failed_tests
from toolkit.evals.training_signals import TRAINING_SIGNALS, is_neutral
from toolkit.evals.winrate import power_prompts
from toolkit.evals.words import ARM_NAMES, counted

Row = Mapping[str, Any]
ARMS = ("rm_ppo", "dpo")
NAMES = {arm: ARM_NAMES[arm] for arm in ARMS}
MIN_PROMPTS = 20
SMALLEST_EFFECT = 0.02
ALPHA = 0.05
Finding = Literal["better", "no practical difference", "undecided"]
Doubt = Literal["judges disagree", "primary judge", "broken arm"]


@dataclass(frozen=True)
class Decision:
    """What a row of win rates says: ``better`` (the side is that of ``win_rate``), or why it does not.

    ``doubt`` is what speaks against a finding beside the row's numbers.
    """

    finding: Finding
    reason: str
    doubt: Doubt | None = None


def decide(
    *,
    win_rate: float | None,
    ci_low: float | None,
    ci_high: float | None,
    p_value: float | None,
    n_judged: int,
    n_prompts: int,
    smallest_effect: float = SMALLEST_EFFECT,
    alpha: float = ALPHA,
) -> Decision:
    """Whether a win rate between two arms is a finding. ``p_value`` is the permutation test's, corrected where it is
    one of several.

    >>> decide(win_rate=0.875, ci_low=0.625, ci_high=1.0, p_value=0.25, n_judged=4, n_prompts=4).finding
    'undecided'
    """
    if win_rate is None or n_judged == 0:
        return Decision("undecided", "no prompt was judged")
    if n_judged < MIN_PROMPTS:
        few = f"{counted(n_judged, 'judged prompt')} {'decides' if n_judged == 1 else 'decide'} nothing"
        return Decision("undecided", f"{few}: it takes at least {MIN_PROMPTS}")
    if n_judged < MIN_COVERAGE * n_prompts:
        share = f"{n_judged} of {n_prompts} prompts"
        return Decision("undecided", f"only {share} were judged, less than {MIN_COVERAGE:.0%}")
    if ci_low is None or ci_high is None or p_value is None:
        return Decision("undecided", "there is no interval")
    if max(0.5 - ci_low, ci_high - 0.5) <= smallest_effect + 1e-9:
        return Decision(
            "no practical difference", f"the interval lies within {smallest_effect * 100:g} points of one half"
        )
    if ci_low <= 0.5 <= ci_high:
        return Decision("undecided", "the interval contains one half")
    if p_value > alpha:
        return Decision("undecided", f"the permutation test does not reject equality (p = {p_value:.3f})")
    return Decision("better", "the interval and the permutation test agree")


def head_to_head(win_rates: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows that compare the two arms, all seen from RM + PPO, in order of the judges' names."""
    rows = [mirrored(row) for row in win_rates if {row["policy"], row["baseline"]} == set(ARMS)]
    return sorted((row for row in rows if row.get("slice") is None), key=lambda row: str(row["judge"]))


def mirrored(row: Row) -> dict[str, Any]:
    """The row as a comparison of RM + PPO with DPO, whichever of them it is the win rate of."""
    if row["policy"] == ARMS[0]:
        return dict(row)

    def other(name: str) -> float | None:
        return None if row[name] is None else 1.0 - row[name]

    low, high = other("ci_high"), other("ci_low")
    swapped = {"policy": row["baseline"], "baseline": row["policy"], "win": row["loss"], "loss": row["win"]}
    return {**row, **swapped, "win_rate": other("win_rate"), "ci_low": low, "ci_high": high}


@dataclass(frozen=True)
class Judging:
    """How the judges' comparisons of the two arms become a verdict.

    ``primary_judge`` decides alone, where one is named. ``pooled`` is the comparison by all independent judges
    together, averaged inside prompts; it is needed where there are several of them and no primary one.
    ``not_independent`` gives reasons against judges that look independent by their names. ``demonstration``: the recipe
    shows that everything runs, and its verdict says so. ``n_prompts`` are the prompts of the evaluation, of which a
    judge may have seen some alone; None takes those that the rows know of. ``tests`` are the judges' tests on held-out
    comparisons: a judge that did not pass does not decide, and the verdict says so of one that was not tested.
    ``unverified`` counts each judge's judgements of the arms that do not record which responses they are of: they may
    decide, and the verdict says so. ``broken_judges`` and ``broken_arms`` give reasons against judges and arms whose
    numbers say nothing.
    """

    primary_judge: str | None = None
    pooled: Row | None = None
    smallest_effect: float = SMALLEST_EFFECT
    not_independent: Mapping[str, str] = field(default_factory=dict)
    demonstration: bool = False
    n_prompts: int | None = None
    tests: Mapping[str, JudgeTest] = field(default_factory=dict)
    unverified: Mapping[str, int] = field(default_factory=dict)
    broken_judges: Mapping[str, str] = field(default_factory=dict)
    broken_arms: Mapping[str, str] = field(default_factory=dict)

    @property
    def refused(self) -> dict[str, str]:
        """Judge -> the reason why it does not decide: its answers, its test, or what it was trained on."""
        return {**self.broken_judges, **failed_tests(self.tests), **self.not_independent, **TRAINING_SIGNALS}


BY_DEFAULT = Judging()


def verdict(
    win_rates: Sequence[Row], judging: Judging = BY_DEFAULT, *, kl_nats: Mapping[str, float | None] | None = None
) -> dict[str, Any]:
    """Which arm is better in this run, in one sentence, with the reasons behind it.

    ``kl_nats`` are the policies' distances from SFT, in nats per response: the sentence has both arms', and says where
    they differ, since an arm that moved further paid more for its win rate.

    Returns ``winner`` (rm_ppo, dpo or undecided), ``finding``, ``sentence``, ``reason``, the numbers of the row that
    decided, ``judges`` (the win rate of RM + PPO by every independent judge), and ``broken_arms`` (the reason of each).
    """
    rows = [_over_all_prompts(row, judging) for row in head_to_head(win_rates)]
    if not rows:
        reason = "the two arms were not compared"
        return _undecided({"judge": None}, reason, f"Undecided: {reason}.", judging)
    refused = judging.refused
    independent = [row for row in rows if row["judge"] not in refused]
    if not independent:
        reason = _nobody_decides(rows, judging)
        signals = "; ".join(f"judge {r['judge']} is {refused[r['judge']]} and says {_share(r)}" for r in rows)
        sentence = f"Undecided: {reason} ({signals}). Name one in evaluate.judges."
        return _undecided(_facts(rows[0]), reason, sentence, judging)
    row = _deciding(independent, judging)
    decision = _decision(row, independent, judging)
    facts = {
        **_facts(row),
        "judges": {str(r["judge"]): r["win_rate"] for r in independent},
        "finding": decision.finding,
        "reason": decision.reason,
        "doubt": decision.doubt,
        "broken_arms": dict(judging.broken_arms),
        "winner": "undecided",
        "kl_nats": {arm: (kl_nats or {}).get(arm) for arm in ARMS},
    }
    basis = f"RM + PPO wins {_share(row)} against DPO ({_basis(row)}){_at_kl(facts['kl_nats'])}"
    if decision.finding == "better":
        facts["winner"] = ARMS[0] if row["win_rate"] > 0.5 else ARMS[1]
        sentence = f"{NAMES[facts['winner']]} is better in this run: {basis}."
    elif decision.finding == "undecided":
        sentence = f"Undecided: {basis}; {decision.reason}."
        if decision.doubt != "broken arm":
            sentence += _reach(row, judging.smallest_effect)
    else:
        sentence = f"No practical difference: {basis}; {decision.reason}."
    sentence += _on_tests(rows, judging) + _on_unverified(independent, judging)
    if judging.demonstration:
        sentence += " This recipe shows that everything runs; its models are too small to say which arm is better."
    return {**facts, "sentence": sentence}


def _decision(row: Row, independent: Sequence[Row], judging: Judging) -> Decision:
    """What the deciding row says, unless something speaks against it."""
    if judging.broken_arms:
        return Decision("undecided", _broken(judging), "broken arm")
    decision = decide(**{name: row[name] for name in _DECISIVE}, smallest_effect=judging.smallest_effect)
    if decision.finding == "undecided":
        return decision
    return _doubted(row, independent, judging, decision.finding) or decision


def _broken(judging: Judging) -> str:
    return "; ".join(f"{NAMES[arm]} {reason}" for arm, reason in judging.broken_arms.items())


def _nobody_decides(rows: Sequence[Row], judging: Judging) -> str:
    """Why none of the judges that compared the arms decides."""
    judges = {str(row["judge"]) for row in rows if is_neutral(row["judge"])}
    if judges & judging.broken_judges.keys():
        return "no judge that can decide compared the two arms"
    if judges & failed_tests(judging.tests).keys() - judging.not_independent.keys():
        return "every independent judge failed its test on held-out labels"
    return "no independent judge compared the two arms"


_DECISIVE = ("win_rate", "ci_low", "ci_high", "p_value", "n_judged", "n_prompts")


def _facts(row: Row) -> dict[str, Any]:
    return {name: row.get(name) for name in ("judge", *_DECISIVE, "detectable_effect")}


def _undecided(facts: dict[str, Any], reason: str, sentence: str, judging: Judging) -> dict[str, Any]:
    more: dict[str, Any] = {
        "winner": "undecided",
        "finding": "undecided",
        "reason": reason,
        "doubt": None,
        "judges": {},
        "broken_arms": dict(judging.broken_arms),
    }
    if judging.broken_arms:
        sentence += f" {_broken(judging)}."
    return {**facts, **more, "sentence": sentence}


def _deciding(independent: Sequence[Row], judging: Judging) -> Row:
    """The row that decides. Raises ValueError where several judges are neither pooled nor is one of them primary."""
    named = [row for row in independent if row["judge"] == judging.primary_judge]
    if named:
        return named[0]
    if len(independent) == 1:
        return independent[0]
    if judging.pooled is None:
        raise ValueError("several independent judges need a pooled row, or a primary judge")
    return _over_all_prompts(mirrored(judging.pooled), judging)


def _over_all_prompts(row: dict[str, Any], judging: Judging) -> dict[str, Any]:
    """The row over the prompts of the evaluation: those that the judge has no row of were not judged."""
    return row | {"n_prompts": max(row["n_prompts"], judging.n_prompts or 0)}


def _doubted(row: Row, independent: Sequence[Row], judging: Judging, finding: Finding) -> Decision | None:
    """The decision where something speaks against a finding beside the row's numbers; None where nothing does."""
    if judging.primary_judge is not None:
        if row["judge"] == judging.primary_judge:
            return None
        if (reason := judging.refused.get(judging.primary_judge)) is not None:
            return Decision("undecided", f"the primary judge {judging.primary_judge} is {reason}", "primary judge")
        reason = f"the primary judge {judging.primary_judge} did not compare the arms"
        return Decision("undecided", reason, "primary judge")
    least = judging.smallest_effect if finding == "no practical difference" else 0.0
    disagreement = _disagreement(independent, least)
    return None if disagreement is None else Decision("undecided", disagreement, "judges disagree")


def _on_tests(rows: Sequence[Row], judging: Judging) -> str:
    """A sentence for each judge that could have decided and did not pass a test, or had none."""
    said = ""
    for row in rows:
        judge, test = row["judge"], judging.tests.get(row["judge"])
        if test is None or test.passed or judge in judging.not_independent or not is_neutral(judge):
            continue
        if test.passed is None:
            said += f" Judge {judge} was not tested on held-out labels: {test.reason}."
        else:
            said += f" Judge {judge} does not decide: it is {test.reason}."
    return said


def _on_unverified(independent: Sequence[Row], judging: Judging) -> str:
    """A sentence for each judge that may decide and has judgements which may be of other responses."""
    counts = {row["judge"]: judging.unverified.get(row["judge"], 0) for row in independent}
    return "".join(
        f" Judge {judge}'s {counted(n, 'judgement')} {'carries' if n == 1 else 'carry'} no hashes: "
        f"that {'it is' if n == 1 else 'they are'} of these responses is not known."
        for judge, n in counts.items()
        if n
    )


def _at_kl(kl_nats: Mapping[str, float | None]) -> str:
    """The arms' distances from SFT; they are unequal where they differ by more than a tenth of the larger."""
    ppo, dpo = (kl_nats[arm] for arm in ARMS)
    if ppo is None or dpo is None:
        return ""
    word = "unequal" if abs(ppo - dpo) > 0.1 * max(abs(ppo), abs(dpo)) else "about equal"
    return f", at {word} KL (RM + PPO {ppo:.2f} nats, DPO {dpo:.2f})"


def _reach(row: Row, smallest_effect: float) -> str:
    """What these prompts can see, and how many the smallest effect that counts takes."""
    visible = row.get("detectable_effect")
    if visible is None or visible <= smallest_effect:
        return ""
    # Among more ties than this the smallest effect cannot occur.
    ties = min(row.get("tie") or 0.0, 0.99 - 2.0 * smallest_effect)
    needed = power_prompts(0.5 + smallest_effect, tie_share=ties) if smallest_effect > 0 and ties >= 0 else None
    more = f"; to see {smallest_effect * 100:g} points takes about {needed:,}" if needed else ""
    return f" {row['n_judged']} prompts see a difference of {visible * 100:.1f} points or more{more}."


def _disagreement(independent: Sequence[Row], least: float) -> str | None:
    """How the judges differ on which arm is ahead, by more than ``least``; None where they do not.

    Two opposite judges average to one half, which is no finding of equality.
    """
    known = [row for row in independent if row["win_rate"] is not None and _has_seen_enough(row)]
    sides = {row["win_rate"] > 0.5 for row in known if abs(row["win_rate"] - 0.5) > least}
    if len(sides) < 2:
        return None
    shares = ", ".join(f"{row['judge']} {_share(row)}" for row in known)
    return f"the judges disagree on which arm is ahead ({shares})"


def _has_seen_enough(row: Row) -> bool:
    return bool(row["n_judged"] >= max(MIN_PROMPTS, MIN_COVERAGE * row["n_prompts"]))


def _share(row: Row) -> str:
    return "an unknown share" if row["win_rate"] is None else f"{row['win_rate']:.1%}"


def _basis(row: Row) -> str:
    interval = "no interval" if row["ci_low"] is None else f"interval {row['ci_low']:.1%} to {row['ci_high']:.1%}"
    shown = "" if row["p_value"] is None else f"p = {row['p_value']:.3f}" if row["p_value"] >= 0.001 else "p < 0.001"
    p = f", {shown} (one planned comparison, no correction)" if shown else ""
    return f"{interval}{p}, {row['n_judged']} of {row['n_prompts']} prompts, judge {row['judge']}"
