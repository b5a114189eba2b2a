"""The verdict of a study: best against best, at equal KL, at equal compute, and the sentence on top.

An arm wins where all three comparisons find it better: each by its interval and its t test over seeds and prompts, with
at least ``MIN_PROMPTS`` test prompts and two seeds in each arm. The
t test stands where a single run's verdict has a permutation test over prompts. Seeds cannot be permuted instead: with
three of each arm, no permutation of seeds has a p-value below 0.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from toolkit.evals.study.comparing import win_row
from toolkit.evals.study.crossed import CrossedMean
from toolkit.evals.study.matching import AXES, Axis, Comparing, Matched, amount, match
from toolkit.evals.study.needed import CONTAINS_HALF, POWER, needed
from toolkit.evals.study.selection import Candidates, mean_or_none
from toolkit.evals.verdict import ARMS, NAMES, Decision
from toolkit.evals.winrate import exact_ties

Means = dict[str, CrossedMean | None]
COMPARISONS = {"best": "best against best", "matched_kl": "at equal KL", "matched_compute": "at equal training tokens"}


def verdict(
    compared: Comparing,
    by_judge: Mapping[str, Comparing],
    effort: Sequence[Mapping[str, Any]],
    kl_grid: Sequence[float] | None = None,
    not_deciding: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """The ``verdict`` of ``study.json``. ``by_judge`` has each judge's own comparison, ``kl_grid`` the curve's KLs.

    Judges in ``not_deciding`` (with the reason) stand beside the others.
    """
    on, least = {axis: match(compared.arms, axis) for axis in AXES}, compared.smallest_effect
    means, of_judges = three_means(compared, on), {name: three_means(one, on) for name, one in by_judge.items()}
    neutral = {name: of_judge for name, of_judge in of_judges.items() if name not in not_deciding}
    lacking = _lacking(on)
    decisions = {
        name: _agreed(compared.decision(mean, lacking[name]), [of_judge[name] for of_judge in neutral.values()], least)
        for name, mean in means.items()
    }
    winner, finding = winner_of(means, decisions, neutral)
    kl, tokens, wall = (on[axis] for axis in AXES)
    entries = {
        name: {
            **win_row(mean),
            "finding": decisions[name].finding,
            "finding_reason": decisions[name].reason,
            "n_prompts": mean.n_prompts if mean is not None else 0,
        }
        for name, mean in means.items()
    }
    said = (
        _lead(winner, finding)
        + _basis(compared, means, decisions, on)
        + _of_judges(of_judges, not_deciding)
        + _turn(effort)
    )
    several = of_judges if len(of_judges) > 1 else {}
    return {
        "winner": winner,
        "finding": finding,
        "sentence": said,
        "probability": _least_sure(means),
        "n_seeds": min(len(arm.test.seeds) for arm in compared.arms),
        "n_prompts": _n_prompts(means),
        "best": entries["best"],
        "matched_kl": {
            **entries["matched_kl"],
            "kl_low": kl.ends[0],
            "kl_high": kl.ends[1],
            "reason": kl.reason,
            "curve": compared.curve(kl, kl_grid),
        },
        "matched_compute": {
            **entries["matched_compute"],
            "train_tokens_low": tokens.ends[0],
            "train_tokens_high": tokens.ends[1],
            "reason": tokens.reason,
            "curve": compared.curve(tokens),
            "wall_s": {
                **win_row(compared.over(wall)),
                "wall_s_low": wall.ends[0],
                "wall_s_high": wall.ends[1],
                "reason": wall.reason,
            },
        },
        "judges": [
            {
                "judge": judge,
                "not_deciding": not_deciding.get(judge),
                **{name: win_row(mean) for name, mean in of_judge.items()},
            }
            for judge, of_judge in several.items()
        ],
        "needed": {
            "power": POWER,
            **{
                name: needed(mean, decisions[name], lacking[name], smallest_effect=least)
                for name, mean in means.items()
            },
        },
    }


def three_means(compared: Comparing, on: Mapping[Axis, Matched]) -> Means:
    """The win rates that decide: best against best, at equal KL, at equal training tokens."""
    return {
        "best": compared.best(),
        "matched_kl": compared.over(on["kl_nats"]),
        "matched_compute": compared.over(on["train_tokens"]),
    }


def _lacking(on: Mapping[Axis, Matched]) -> dict[str, str | None]:
    """Why a comparison is not there, beside the prompts."""
    return {"best": None, "matched_kl": on["kl_nats"].reason, "matched_compute": on["train_tokens"].reason}


def _n_prompts(means: Means) -> int:
    """The prompts that every comparison is on, at least: those of the one with the fewest."""
    return min((mean.n_prompts for mean in means.values() if mean is not None), default=0)


def _agreed(decision: Decision, of_judges: Sequence[CrossedMean | None], least: float) -> Decision:
    """The decision, without a finding of equality that judges who contradict each other average to."""
    sides = {mean.value > 0.5 for mean in of_judges if mean is not None and abs(mean.value - 0.5) > least}
    if decision.finding != "no practical difference" or len(sides) < 2:
        return decision
    return Decision("undecided", "the judges disagree on which arm is ahead", "judges disagree")


def winner_of(means: Means, decisions: Mapping[str, Decision], neutral: Mapping[str, Means]) -> tuple[str, str]:
    """The winner and the finding: better, no practical difference, or undecided. ``neutral`` are judges' means.

    All three comparisons must find the same arm better. With several judges each of them must see that arm ahead in all
    three. No practical difference is a finding of all three comparisons, too.
    """
    findings = {decision.finding for decision in decisions.values()}
    if not neutral:
        return "undecided", "undecided"
    if findings == {"no practical difference"}:
        return "undecided", "no practical difference"
    sides = {_side(mean) for one in (means, *neutral.values()) for mean in one.values()}
    if findings != {"better"} or len(sides) != 1:
        return "undecided", "undecided"
    return sides.pop(), "better"


def _side(mean: CrossedMean | None) -> str:
    value = 0.5 if mean is None else float(exact_ties(mean.value))
    return "" if value == 0.5 else ARMS[0] if value > 0.5 else ARMS[1]


def _least_sure(means: Means) -> float | None:
    """P(RM + PPO is better) where it is nearest to one half; None where a comparison has none."""
    known = [None if mean is None else mean.probability_above(0.5) for mean in means.values()]
    sure = [value for value in known if value is not None]
    return min(sure, key=lambda p: abs(p - 0.5)) if len(sure) == len(known) else None


# ---------------------------------------------------------------- words


def _lead(winner: str, finding: str) -> str:
    if finding == "better":
        return f"{NAMES[winner]} is better: "
    return "No practical difference: " if finding == "no practical difference" else "Undecided: "


def _basis(compared: Comparing, means: Means, decisions: Mapping[str, Decision], on: Mapping[Axis, Matched]) -> str:
    """What each comparison says, from how much data, and where the chosen policies stand."""
    ranges = {"best": "", "matched_kl": _range(on["kl_nats"]), "matched_compute": _range(on["train_tokens"])}
    lacking = _lacking(on)
    parts, doubts = [], list[str]()
    for name, mean in means.items():
        decision = decisions[name]
        if mean is None:
            doubts.append(f"there is no comparison {COMPARISONS[name]}: {lacking[name] or decision.reason}")
            continue
        low, high = mean.interval(bounds=(0.0, 1.0))
        bounds = "no interval" if low is None or high is None else f"{low:.1%} to {high:.1%}"
        parts.append(f"{mean.value:.1%} {COMPARISONS[name]}{ranges[name]} ({bounds}, says {_says(decision, mean)})")
        # What judges say is a sentence of its own.
        if decision.finding == "undecided" and decision.reason != CONTAINS_HALF and decision.doubt is None:
            doubts.append(decision.reason)
    why = "".join(f" {text[0].upper()}{text[1:]}." for text in dict.fromkeys(doubts))
    return f"RM + PPO wins {', '.join(parts)}, from {_data(compared, means)}.{why} {_places(compared.arms)}"


def _data(compared: Comparing, means: Means) -> str:
    seeds = _both([str(len(arm.test.seeds)) for arm in compared.arms])
    trials = _both([str(len(arm.trials)) for arm in compared.arms])
    n_prompts = _n_prompts(means)
    return f"{_count(seeds, 'seed')}, {n_prompts} test prompts and {_count(trials, 'trial')} an arm"


def _both(numbers: Sequence[str]) -> str:
    """The numbers of both arms, once where they are equal."""
    return " and ".join(dict.fromkeys(numbers))


def _count(number: str, noun: str) -> str:
    return f"{number} {noun}{'' if number == '1' else 's'}"


def _says(decision: Decision, mean: CrossedMean) -> str:
    """The arm that a comparison finds better, in a word or two."""
    if decision.finding == "better":
        return NAMES[_side(mean)]
    return "neither arm" if decision.finding == "undecided" else decision.finding


def _places(arms: tuple[Candidates, Candidates]) -> str:
    """KL and cost of the two chosen policies."""
    texts = []
    for arm, name in zip(arms, ARMS, strict=True):
        point = arm.chosen
        kl, tokens = mean_or_none(arm.test.kl[point]), mean_or_none(arm.test.tokens[point])
        texts.append(f"{NAMES[name]} stands at {amount('kl_nats', kl)} after {amount('train_tokens', tokens)} tokens")
    return f"As chosen, {' and '.join(texts)}."


def _range(matched: Matched) -> str:
    low, high = matched.ends
    if low is None:
        return ""
    if low == high:
        return f" of {amount(matched.axis, low)}"
    return f" of {amount(matched.axis, low).removesuffix(' nats')} to {amount(matched.axis, high)}"


def _of_judges(of_judges: Mapping[str, Means], not_deciding: Mapping[str, str]) -> str:
    """Each judge's three win rates, where there are several judges; and the judges that do not decide."""
    texts = []
    for judge, means in of_judges.items():
        shares = ", ".join("-" if mean is None else f"{mean.value:.1%}" for mean in means.values())
        texts.append(f"{judge} {shares}")
    neutral = {judge: means for judge, means in of_judges.items() if judge not in not_deciding}
    apart = {_side(mean) for means in neutral.values() for mean in means.values() if mean is not None}
    word = "The judges disagree on which arm is ahead" if len(apart) > 1 else "By judge, in this order"
    said = f" {word}: {'; '.join(texts)}." if len(texts) > 1 else ""
    return said + "".join(f" Judge {judge} does not decide: {why}." for judge, why in not_deciding.items())


def _turn(effort: Sequence[Mapping[str, Any]]) -> str:
    """A sentence where the order of the arms turns with the number of trials, beyond both intervals."""
    rows = [row for row in effort if row["ci_low"] is not None]
    if len(rows) < 2:
        return ""
    first, last = rows[0], rows[-1]
    low, high = sorted((first, last), key=lambda row: float(row["win_rate"]))
    if not (low["ci_high"] < 0.5 < high["ci_low"]):
        return ""
    ahead = {True: NAMES[ARMS[0]], False: NAMES[ARMS[1]]}
    return (
        f" The order turns with tuning: with {_count(str(first['n_trials']), 'trial')} each "
        f"{ahead[first['win_rate'] > 0.5]} is ahead (RM + PPO wins {first['win_rate']:.1%}), with {last['n_trials']} "
        f"{ahead[last['win_rate'] > 0.5]} is ({last['win_rate']:.1%})."
    )
