"""The tables and sentences of a study's page, from ``study.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.evals.study.matching import Axis, amount
from toolkit.progress import duration
from toolkit.report.names import ARM_NAMES, arm_name, arm_of
from toolkit.report.numbers import count, percent

Row = Mapping[str, Any]
COMPARISONS = {"best": "Best against best", "matched_kl": "At equal KL", "matched_compute": "At equal training tokens"}
_AXES: dict[str, Axis] = {"matched_kl": "kl_nats", "matched_compute": "train_tokens", "wall_s": "wall_s"}
_ENDS = {"matched_kl": "kl", "matched_compute": "train_tokens", "wall_s": "wall_s"}


# ---------------------------------------------------------------- the decision


@dataclass(frozen=True)
class Comparison:
    """One of the comparisons with its words. ``range`` is what it is over; ``arm`` gives the colour.

    ``says`` is the finding in words, and ``lacking`` why there is no number, or no interval.
    """

    key: str
    label: str
    range: str
    arm: str
    rate: Row
    says: str
    lacking: str

    @property
    def is_point(self) -> bool:
        """Whether the range is a single KL or budget."""
        return bool(self.rate[f"{_ENDS[self.key]}_low"] == self.rate[f"{_ENDS[self.key]}_high"])


def comparisons(document: Row) -> dict[str, Comparison]:
    """The three comparisons that decide."""
    verdict = document["verdict"]
    return {key: _comparison(key, label, verdict[key]) for key, label in COMPARISONS.items()}


def _comparison(key: str, label: str, row: Row) -> Comparison:
    rate, finding = row["win_rate"], row["finding"]
    ahead = "other" if rate is None or rate == 0.5 else "rm_ppo" if rate > 0.5 else "dpo"
    if finding == "better":
        says = f"{ARM_NAMES[ahead]} is better"
    else:
        says = finding if rate is None else f"{finding}: {row['finding_reason']}"
    no_interval = "" if row["ci_low"] is not None else "no interval"
    lacking = str(row.get("reason") or "") if rate is None else no_interval
    return Comparison(key, label, range_of(key, row), ahead if finding == "better" else "other", row, says, lacking)


def range_of(key: str, row: Row) -> str:
    """The range of KL, tokens or seconds that a comparison is over; empty where it has none."""
    if key not in _AXES or row[f"{_ENDS[key]}_low"] is None:
        return ""
    unit = " tokens" if key == "matched_compute" else ""
    low, high = (amount(_AXES[key], row[f"{_ENDS[key]}_{end}"]) for end in ("low", "high"))
    return f"{low}{unit}" if low == high else f"{low.removesuffix(' nats').removesuffix(' s')} to {high}{unit}"


@dataclass(frozen=True)
class JudgeRow:
    """One judge's three comparisons. ``signal`` is empty for a judge that may decide."""

    judge: str
    signal: str
    cells: list[Comparison]


def judges(document: Row) -> list[JudgeRow]:
    """Each judge's own win rates, where there are several judges."""
    rows = document["verdict"]["judges"]
    return [
        JudgeRow(
            row["judge"],
            (row.get("not_deciding") or "").removeprefix("it is "),
            [Comparison(key, label, "", _ahead(row[key]), row[key], "", "") for key, label in COMPARISONS.items()],
        )
        for row in rows
    ]


def _ahead(row: Row) -> str:
    """The arm whose side the whole interval is on."""
    if row["ci_low"] is None or row["ci_low"] <= 0.5 <= row["ci_high"]:
        return "other"
    return "rm_ppo" if row["win_rate"] > 0.5 else "dpo"


# ---------------------------------------------------------------- what would change the verdict


def needed(document: Row) -> list[tuple[str, str]]:
    """(comparison, sentence): the prompts or seeds that it lacks, or how far it is from another finding."""
    verdict = document["verdict"]
    return [
        (label, _needed_words(verdict["needed"][key], verdict[key], int(verdict["n_prompts"]), int(verdict["n_seeds"])))
        for key, label in COMPARISONS.items()
    ]


def is_planned(document: Row) -> bool:
    """Whether some comparison has a number of prompts or seeds that would decide it."""
    rows = [document["verdict"]["needed"][key] for key in COMPARISONS]
    return any(row[name] is not None for row in rows for name in ("n_prompts", "n_seeds"))


def _needed_words(row: Row, compared: Row, n_prompts: int, n_seeds: int) -> str:
    bound = row["nearest_bound"]
    if row["finding"] == "better":
        return f"Decided. The end of its interval that is nearest to one half is {percent(bound)}."
    if bound is not None:
        return f"No practical difference. The end of its interval that is farthest from one half is {percent(bound)}."
    if row["n_prompts"] is None and row["n_seeds"] is None and row["n_prompts_reason"] == row["n_seeds_reason"]:
        return f"Undecided: {row['n_prompts_reason']}."
    ways = []
    if row["n_prompts"] is not None:
        ways.append(f"about {count(row['n_prompts'])} test prompts in place of {count(n_prompts)}, with the same seeds")
    if row["n_seeds"] is not None:
        seeds = f"about {row['n_seeds']} seeds of each arm in place of {n_seeds}"
        ways.append(f"{seeds}, with the same prompts")
    reasons = [reason for reason in (row["n_prompts_reason"], row["n_seeds_reason"]) if reason]
    lacking = "".join(f" {reason[0].upper()}{reason[1:]}." for reason in reasons)
    if not ways:
        return f"Undecided.{lacking}"
    return f"Undecided at {percent(compared['win_rate'])}. It would take {', or '.join(ways)}.{lacking}"


# ---------------------------------------------------------------- trials and the chosen


@dataclass(frozen=True)
class TrialRow:
    """A trial at its best checkpoint on dev prompts; ``budget`` is all that it spent. Scores are by judge."""

    arm: str
    name: str
    setting: str
    chosen: bool
    checkpoint: int
    kl_nats: float | None
    tokens: str
    seconds: str
    budget: str
    dev: list[float | None]
    test: list[float | None]
    n_diverged: int


def trials(document: Row) -> list[TrialRow]:
    """Every trial, RM + PPO first, and the best on dev prompts first within an arm."""
    rows = [(trial, _best(trial)) for trial in document["trials"]]
    judges = document["selection"]["judges"]

    def rank(row: tuple[Row, Row]) -> tuple[bool, bool, float]:
        trial, best = row
        scores = [best["dev_score"][judge] for judge in judges]
        by = float("inf") if None in scores else -sum(scores)
        return trial["arm"] == "dpo", not trial["chosen"], by

    return [
        TrialRow(
            arm=trial["arm"],
            name=ARM_NAMES[trial["arm"]],
            setting=trial["setting"],
            chosen=trial["chosen"],
            checkpoint=trial["best_checkpoint"],
            kl_nats=best["kl_nats"],
            tokens=amount("train_tokens", best["train_tokens"]),
            seconds=_time(best["wall_s"]),
            budget=_budget(trial),
            dev=list(best["dev_score"].values()),
            test=list(best["test_score"].values()),
            n_diverged=trial["n_diverged"],
        )
        for trial, best in sorted(rows, key=rank)
    ]


def _best(trial: Row) -> Row:
    """The row of the checkpoint that is best on dev."""
    return next(row for row in trial["checkpoints"] if row["checkpoint"] == trial["best_checkpoint"])


def _budget(trial: Row) -> str:
    spent = [row["train_tokens"] for row in trial["checkpoints"] if row["train_tokens"] is not None]
    return amount("train_tokens", max(spent, default=None))


def _time(seconds: float | None) -> str:
    return "unknown" if seconds is None else duration(seconds)


@dataclass(frozen=True)
class ChosenRow:
    """The policy that was chosen in an arm, by one judge: dev, test, and the optimism between them."""

    color: str
    name: str
    judge: str
    row: Row
    tokens: str
    time: str
    dev: float | None
    test: float | None
    optimism: float | None


def chosen(document: Row) -> list[ChosenRow]:
    """Both arms' and every control's chosen policy, a row for each judge."""
    arms = [*document["chosen"].items(), *((row["arm"], row["chosen"]) for row in document["controls"])]
    return [
        ChosenRow(
            color=arm_of(arm),
            name=arm_name(arm),
            judge=judge,
            row=row,
            tokens=amount("train_tokens", row["train_tokens"]),
            time=_time(row["wall_s"]),
            dev=row["dev_score"][judge],
            test=row["test_score"][judge],
            optimism=row["optimism"][judge],
        )
        for arm, row in arms
        for judge in row["dev_score"]
    ]


def splits_sentence(document: Row) -> str:
    """How many prompts each split has, and what for."""
    uses = {"train": "to train on", "dev": "to choose on", "test": "for the verdict"}
    parts = [
        f"{count(split['n_prompts'])} {name} prompts {uses.get(name, '')}".rstrip()
        for name, split in sorted(document["splits"].items(), key=lambda item: [*uses, item[0]].index(item[0]))
    ]
    return f"A prompt is in one split only: {', '.join(parts[:-1])} and {parts[-1]}."


def selection_sentence(document: Row) -> str:
    """The rule that chose each arm's setting and checkpoint."""
    names, limit = document["selection"]["judges"], document["selection"]["kl_limit"]
    by = "mean score" if len(names) == 1 else f"mean of the standardised scores by {', '.join(names)}"
    within = "" if limit is None else f", among those with a KL of at most {limit:g} nats there"
    return (
        f"In each arm, the setting and checkpoint with the highest {by} on dev prompts, over all seeds, is "
        f"chosen{within}. The rule is the same for both arms."
    )


# ---------------------------------------------------------------- controls


@dataclass(frozen=True)
class GapBar:
    """A step of the gap. ``start``, ``end``, ``low`` and ``high`` are places on a scale of 0 to 100."""

    row: Row
    label: str
    color: str
    start: float
    end: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class GapTable:
    """The steps in one measure. ``zero`` is the place of no difference; ``percent``: differences are of win rates."""

    title: str
    percent: bool
    zero: float
    bars: list[GapBar]
    n_prompts: int


def gaps(document: Row) -> list[GapTable]:
    """The gap between the arms by win rate, and by each judge's mean score."""
    tables = []
    for measure, judge in dict.fromkeys((row["measure"], row["judge"]) for row in document["gap"]):
        rows = [row for row in document["gap"] if (row["measure"], row["judge"]) == (measure, judge)]
        by = "" if judge in (None, "score") else f" by {judge}"
        title = "Win rate over DPO's chosen policy" if measure == "win_rate" else f"Mean score{by}"
        tables.append(_gap_table(title, measure == "win_rate", rows))
    return tables


def _gap_table(title: str, in_percent: bool, rows: Sequence[Row]) -> GapTable:
    """The bars of the steps start where the one before ended; all others start at no difference."""
    starts, at = [], 0.0
    for row in rows:
        starts.append(at if row["kind"] == "step" else 0.0)
        at += row["difference"] if row["kind"] == "step" else 0.0
    ends = [0.0]
    for row, start in zip(rows, starts, strict=True):
        ends += [start, start + row["difference"]]
        ends += [start + row[end] for end in ("ci_low", "ci_high") if row[end] is not None]
    low, span = min(ends), (max(ends) - min(ends)) or 1.0

    def place(value: float) -> float:
        return round(2 + 96 * (value - low) / span, 2)

    bars = [
        GapBar(
            row=row,
            label=f"{arm_name(row['from'])} → {arm_name(row['to'])}",
            color="other" if row["ci_low"] is None or row["ci_low"] <= 0 <= row["ci_high"] else _side(row),
            start=place(start),
            end=place(start + row["difference"]),
            low=None if row["ci_low"] is None else place(start + row["ci_low"]),
            high=None if row["ci_high"] is None else place(start + row["ci_high"]),
        )
        for row, start in zip(rows, starts, strict=True)
    ]
    return GapTable(title, in_percent, place(0.0), bars, rows[0]["n_prompts"])


def _side(row: Row) -> str:
    return "rm_ppo" if row["difference"] > 0 else "dpo"


@dataclass(frozen=True)
class ControlRow:
    """The win rate of an arm over a control, best against best."""

    name: str
    control: str
    arm: str
    rate: Row


def controls(document: Row) -> list[ControlRow]:
    return [
        ControlRow(ARM_NAMES[arm], arm_name(row["arm"]), arm, row["win_rate_of"][arm])
        for row in document["controls"]
        for arm in ARM_NAMES
        if arm in row["win_rate_of"]
    ]
