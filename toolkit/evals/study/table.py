"""The recorded table of a study: one row for a policy, a prompt and a judge, read into arrays and checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import DataError, first_line, nearest
from toolkit.evals.intervals import Floats
from toolkit.evals.training_signals import TRAINING_SIGNALS, is_neutral
from toolkit.evals.verdict import ARMS

if TYPE_CHECKING:
    import pyarrow as pa

Integers = NDArray[np.int64]
SPLITS = ("dev", "test")
KEYS = ("arm", "setting", "seed", "checkpoint", "split", "prompt_id")
COSTS = ("kl_nats", "train_tokens", "wall_s")
BY_PREFERENCE = ("baseline", "preference")
VALUE = "value of a row"
WRITE = "docs/study.md describes the columns"


@dataclass(frozen=True)
class ArmScores:
    """One arm on one split. A point is a setting at a checkpoint; its policies are one for each seed.

    ``scores`` (judges, points, seeds, prompts) is NaN where the table has no row. Where it has a row without a score,
    the score is below every score of that judge for both arms on the split: a response that could not be judged lost.
    ``diverged`` (points, seeds): no score at all, an infinite KL, or no row though other seeds have some. ``kl``
    (points, seeds) is the mean over the split's prompts, NaN where the policy diverged. ``tokens`` and ``seconds``
    (points, seeds) are of both splits.
    """

    arm: str
    points: tuple[tuple[str, int], ...]
    seeds: tuple[Any, ...]
    scores: Floats
    diverged: NDArray[np.bool_]
    kl: Floats
    tokens: Floats
    seconds: Floats

    @property
    def measured(self) -> NDArray[np.bool_]:
        """Points (P,) that the split has rows of."""
        return np.asarray(np.isfinite(self.scores).any(axis=(0, 2, 3)))

    def on(self, prompts: NDArray[np.bool_]) -> Floats:
        """The scores on some of the prompts."""
        return self.scores[..., prompts]


@dataclass(frozen=True)
class StudyData:
    """A study's arms by split: ``arms[arm][split]``. All arms of a split have the same prompts, in the same order.

    ``indirect`` are the judges, by number, whose values are preferences over a baseline. ``refused`` says of judges
    that failed a test why they may not decide. A ``primary_judge`` decides alone.
    """

    judges: tuple[str, ...]
    arms: Mapping[str, Mapping[str, ArmScores]]
    n_prompts: Mapping[str, int]
    warnings: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    indirect: frozenset[int] = frozenset()
    primary_judge: str | None = None

    @property
    def not_deciding(self) -> dict[str, str]:
        """Judges that do not decide, with the reason: an arm was trained on them, they failed a test, or another one
        decides alone."""
        primary = self.primary_judge
        others = {judge: f"{primary} is the primary judge" for judge in self.judges if primary not in (None, judge)}
        signals = {judge: f"it is {TRAINING_SIGNALS[judge]}" for judge in self.judges if not is_neutral(judge)}
        return others | signals | {judge: self.refused[judge] for judge in self.judges if judge in self.refused}

    @property
    def deciding(self) -> tuple[int, ...]:
        """The judges that rank and decide, by number; all where none may, and then nothing is decided."""
        able = tuple(j for j, judge in enumerate(self.judges) if judge not in self.not_deciding)
        return able or tuple(range(len(self.judges)))


def read_study(path: Path) -> StudyData:
    """Read a study's table from a Parquet file.

    Raises:
        DataError: the file cannot be read, or it is no table of a study.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise DataError("there is no such table", where=str(path), fix="give a Parquet file")
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"this is no Parquet file: {first_line(error)}", where=str(path), fix=WRITE) from error
    return study_data(table, where=str(path))


def study_data(
    table: pa.Table | Mapping[str, Any], *, where: str = "the study's table", splits: Sequence[str] = SPLITS
) -> StudyData:
    """Check a table and put it into arrays. ``splits`` are those that it must have.

    Raises:
        DataError: missing columns, empty or unknown keys, a prompt in both splits, rows that contradict each other, an
            arm or a split that is missing, a trial that lacks a seed.
    """
    import pyarrow as pa

    columns = table if isinstance(table, pa.Table) else pa.table(dict(table))
    value_name = _check_columns(columns, where)
    codes = {name: _codes(columns, name, where) for name in KEYS}
    codes["judge"] = _codes(columns, "judge", where) if "judge" in columns.column_names else _constant(len(columns))
    columns, is_preference = _one_value(columns, value_name, codes["judge"], where)
    codes["baseline"] = _codes(columns, "baseline", where) if is_preference.any() else _constant(len(columns))
    _check_keys(codes, where, splits)
    numbers = {name: _numbers(columns, name, where) for name in COSTS}
    numbers[VALUE] = _numbers(columns, VALUE, where, called=value_name)
    values, diverged = _values(numbers, value_name, is_preference, where)
    _check_repeats(codes, where)
    warnings: list[str] = []
    missing = int(np.isnan(numbers[VALUE]).sum())
    if missing:
        warnings.append(
            f"{missing} rows have no {value_name}: each counts as a response that is worse than any other, and is not "
            "left out"
        )
    arms: dict[str, dict[str, ArmScores]] = {}
    for code, arm in enumerate(codes["arm"].names):
        of_arm = _Rows(codes, numbers, values, diverged, codes["arm"].code == code)
        arms[arm] = of_arm.by_split(arm, where, warnings)
    n_prompts = {split: arms[ARMS[0]][split].scores.shape[3] for split in SPLITS}
    indirect = frozenset(map(int, codes["judge"].code[is_preference]))
    return StudyData(tuple(codes["judge"].names), arms, n_prompts, tuple(warnings), indirect=indirect)


# ---------------------------------------------------------------- columns


@dataclass(frozen=True)
class _Codes:
    """A column as numbers: ``names[code]`` are its distinct values in order."""

    names: list[Any]
    code: Integers


def _check_columns(columns: pa.Table, where: str) -> str:
    """The name of the column with the scores. Raises DataError where columns are missing."""
    names = set(columns.column_names)
    absent = [name for name in (*KEYS, *COSTS) if name not in names]
    by_preference = set(BY_PREFERENCE) <= names
    if "score" not in names and not by_preference:
        absent.append("score (or baseline and preference)")
    if absent:
        hints = [nearest(name, names) for name in absent if nearest(name, names).startswith("did you")]
        fix = "; ".join([*hints, WRITE])
        raise DataError(f"the table lacks columns: {', '.join(absent)}", where=where, fix=fix)
    if "score" in names and by_preference and "judge" not in names:
        fix = "name the judge of each row in a column judge; a judge gives scores or preferences"
        raise DataError("the table has both score and preference", where=where, fix=fix)
    if len(columns) == 0:
        raise DataError("the table has no rows", where=where, fix=WRITE)
    return " or ".join(name for name in ("score", "preference") if name in names)


def _one_value(columns: pa.Table, value_name: str, judge: _Codes, where: str) -> tuple[pa.Table, NDArray[np.bool_]]:
    """The table with one column of values, and which rows are preferences over a baseline.

    Where it has scores and preferences, each judge gives one of them. A judge that scores gets the table's baseline.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if value_name != "score or preference":
        is_preference = np.full(len(columns), value_name == "preference")
        return columns.append_column(VALUE, columns[value_name]), is_preference
    given = {name: np.isfinite(_numbers(columns, name, where)) for name in ("score", "preference")}
    prefers = np.zeros(len(judge.names), dtype=bool)
    for code, name in enumerate(judge.names):
        kinds = [kind for kind, there in given.items() if there[judge.code == code].any()]
        if len(kinds) == 2:
            raise DataError(f"judge {name} has scores and preferences", where=where, fix="give it two names")
        prefers[code] = kinds == ["preference"]
    is_preference = prefers[judge.code]
    mask = pa.array(is_preference)
    values = pc.if_else(mask, *(pc.cast(columns[name], pa.float64()) for name in ("preference", "score")))
    columns = columns.append_column(VALUE, values)
    baselines = pc.unique(pc.filter(columns["baseline"].combine_chunks(), mask)).drop_null().to_pylist()
    if len(baselines) > 1:
        fix = "put the judges' scores and the pairwise preferences into two tables"
        raise DataError("the table has scores, and preferences over several baselines", where=where, fix=fix)
    if baselines:
        filled = pc.if_else(mask, columns["baseline"].combine_chunks(), pa.scalar(baselines[0]))
        columns = columns.set_column(columns.column_names.index("baseline"), "baseline", filled)
    return columns, is_preference


def _codes(columns: pa.Table, name: str, where: str) -> _Codes:
    import pyarrow as pa
    import pyarrow.compute as pc

    column = columns[name].combine_chunks()
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(f"column {name} is empty in {column.null_count} rows", where=f"{where}, row {row}", fix=WRITE)
    if name == "checkpoint":
        try:
            column = pc.cast(column, pa.int64())
        except pa.ArrowException as error:
            raise DataError(f"column checkpoint has no whole numbers: {first_line(error)}", where=where) from error
    elif name != "seed":
        column = pc.cast(column, pa.string())
    encoded = column if isinstance(column, pa.DictionaryArray) else column.dictionary_encode()
    values = encoded.dictionary.to_pylist()
    order = sorted(range(len(values)), key=lambda i: values[i])
    rank = np.empty(len(values), dtype=np.int64)
    rank[order] = np.arange(len(values))
    return _Codes([values[i] for i in order], rank[encoded.indices.to_numpy()])


def _constant(n: int) -> _Codes:
    return _Codes(["score"], np.zeros(n, dtype=np.int64))


def _numbers(columns: pa.Table, name: str, where: str, *, called: str | None = None) -> Floats:
    """A column as fp64; what is empty is NaN. An error calls it ``called``."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        column = pc.cast(columns[name].combine_chunks(), pa.float64())
    except pa.ArrowException as error:
        raise DataError(
            f"column {called or name} has values that are no numbers: {first_line(error)}", where=where
        ) from error
    return np.asarray(pc.fill_null(column, np.nan).to_numpy(zero_copy_only=False), dtype=np.float64)


def _check_keys(codes: Mapping[str, _Codes], where: str, needed: Sequence[str]) -> None:
    arms, splits = codes["arm"].names, codes["split"].names
    for split in splits:
        if split not in SPLITS:
            raise DataError(f"unknown split {split!r}", where=where, fix=f"use dev and test; {nearest(split, SPLITS)}")
    missing = [arm for arm in ARMS if arm not in arms]
    if missing:
        others = ", ".join(repr(arm) for arm in arms if arm not in ARMS)
        more = f" (it has {others}, which can be controls)" if others else ""
        fix = "column arm names the two arms rm_ppo and dpo; other arms stand beside them as controls"
        raise DataError(f"the table has no arm {' and no arm '.join(missing)}{more}", where=where, fix=fix)
    if "dev" not in splits:
        fix = "add rows of dev prompts for every setting and checkpoint; a choice on test prompts would flatter itself"
        raise DataError("the table has no dev rows, and settings are chosen on dev prompts", where=where, fix=fix)
    if "test" in needed and "test" not in splits:
        raise DataError("the table has no test rows", where=where, fix="add test rows, on other prompts")
    n_prompts = len(codes["prompt_id"].names)
    prompt, split = codes["prompt_id"].code, codes["split"].code
    on = [np.bincount(prompt[split == s], minlength=n_prompts) > 0 for s in range(len(splits))]
    both = np.flatnonzero(np.all(on, axis=0)) if len(splits) > 1 else np.zeros(0, np.int64)
    if len(both):
        what = f"{len(both)} prompts are in dev and in test, prompt {codes['prompt_id'].names[both[0]]!r} among them"
        raise DataError(what, where=where, fix="a prompt belongs to one split")


def _check_repeats(codes: Mapping[str, _Codes], where: str) -> None:
    flat = np.zeros(len(codes["arm"].code), dtype=np.int64)
    for name in (*KEYS, "judge", "baseline"):
        flat = flat * len(codes[name].names) + codes[name].code
    _, first, count = np.unique(flat, return_index=True, return_counts=True)
    if len(first) == len(flat):
        return
    row = first[count > 1][0]
    names = ", ".join(f"{name} {codes[name].names[codes[name].code[row]]}" for name in KEYS)
    fix = "give the mean of several samples or orders as one row"
    raise DataError(f"the table has several rows of {names}", where=f"{where}, row {int(row)}", fix=fix)


def _values(
    numbers: Mapping[str, Floats], value_name: str, is_preference: NDArray[np.bool_], where: str
) -> tuple[Floats, NDArray[np.bool_]]:
    """The scores with -inf where there is none, and which rows are of a policy with an infinite KL."""
    value, kl = numbers[VALUE], numbers["kl_nats"]
    infinite = np.isinf(kl)

    def refuse(bad: NDArray[np.bool_], what: str, fix: str) -> None:
        if bad.any():
            raise DataError(what, where=f"{where}, row {int(np.flatnonzero(bad)[0])}", fix=fix)

    refuse(value == np.inf, f"a {value_name} is infinite", "a diverged policy has the score NaN")
    outside = is_preference & ((value < 0) | (value > 1))
    refuse(outside, "a preference is outside [0, 1]", "1 means that the policy is preferred")
    refuse(np.isnan(kl) & ~np.isnan(value), "a row has a score and no kl_nats", "give the policy's KL in nats")
    for name in ("train_tokens", "wall_s"):
        lost = ~np.isfinite(numbers[name]) & ~np.isnan(value) & ~infinite
        refuse(lost | (numbers[name] < 0), f"column {name} is empty or negative", "give what was spent up to there")
    return np.where(np.isnan(value) | infinite, -np.inf, value), infinite


# ---------------------------------------------------------------- arrays


def _divergences(arm: ArmScores, split: str) -> Iterator[str]:
    """A sentence for each setting and seed that diverged, with all of its checkpoints."""
    trials: dict[tuple[str, Any], list[int]] = {}
    for p, k in zip(*np.nonzero(arm.diverged), strict=True):
        setting, checkpoint = arm.points[p]
        trials.setdefault((setting, arm.seeds[k]), []).append(checkpoint)
    for (setting, seed), checkpoints in trials.items():
        noun = "checkpoint" if len(checkpoints) == 1 else "checkpoints"
        trial = f"{arm.arm}, setting {setting}, {noun} {', '.join(map(str, checkpoints))}, seed {seed}"
        yield f"{trial} diverged or has no {split} rows: it counts as the worst policy there"


@dataclass(frozen=True)
class _Rows:
    """The rows of one arm, by number of row."""

    codes: Mapping[str, _Codes]
    numbers: Mapping[str, Floats]
    values: Floats
    infinite_kl: NDArray[np.bool_]
    chosen: NDArray[np.bool_]

    def by_split(self, arm: str, where: str, warnings: list[str]) -> dict[str, ArmScores]:
        columns = ("setting", "checkpoint", "seed")
        settings, checkpoints, seeds = (self.codes[name].code[self.chosen] for name in columns)
        n_checkpoints = len(self.codes["checkpoint"].names)
        points, point = np.unique(settings * n_checkpoints + checkpoints, return_inverse=True)
        seed_codes, seed = np.unique(seeds, return_inverse=True)
        trials = np.zeros((len(self.codes["setting"].names), len(seed_codes)), dtype=bool)
        trials[settings, seed] = True
        names = tuple(self.codes["seed"].names[i] for i in seed_codes)
        for setting in np.flatnonzero(trials.any(axis=1) & ~trials.all(axis=1)):
            absent = ", ".join(str(name) for name, there in zip(names, trials[setting], strict=True) if not there)
            what = f"setting {self.codes['setting'].names[setting]!r} of arm {arm} has no rows of seed {absent}"
            fix = "give every setting all seeds; a trial that diverged has rows with the score NaN"
            raise DataError(what, where=where, fix=fix)
        of_setting, of_checkpoint = self.codes["setting"].names, self.codes["checkpoint"].names
        labels = tuple((str(of_setting[p // n_checkpoints]), int(of_checkpoint[p % n_checkpoints])) for p in points)
        shape = (len(points), len(names))
        tokens, wall = (self._largest(name, point, seed, shape) for name in ("train_tokens", "wall_s"))
        out = {}
        for split_code, split in enumerate(SPLITS):
            here = self.codes["split"].code[self.chosen] == split_code
            scores, diverged, kl = self._arrays(here, point[here], seed[here], shape, split_code)
            out[split] = ArmScores(arm, labels, names, scores, diverged, kl, tokens, wall)
        warnings += [text for split, of_split in out.items() for text in _divergences(of_split, split)]
        return out

    def _largest(self, name: str, point: Integers, seed: Integers, shape: tuple[int, int]) -> Floats:
        """What a policy cost (points, seeds); NaN where no row says."""
        largest = np.full(shape, -np.inf)
        value = self.numbers[name][self.chosen]
        np.maximum.at(largest, (point, seed), np.where(np.isfinite(value), value, -np.inf))
        return np.where(np.isfinite(largest), largest, np.nan)

    def _arrays(
        self, here: NDArray[np.bool_], point: Integers, seed: Integers, shape: tuple[int, int], split: int
    ) -> tuple[Floats, NDArray[np.bool_], Floats]:
        rows = np.flatnonzero(self.chosen)[here]
        in_split = self.codes["split"].code == split
        prompts = np.unique(self.codes["prompt_id"].code[in_split])
        prompt = np.searchsorted(prompts, self.codes["prompt_id"].code[rows])
        judge, baseline = self.codes["judge"].code, self.codes["baseline"].code
        n_judges, n_baselines = len(self.codes["judge"].names), len(self.codes["baseline"].names)
        scores = np.full((n_judges, n_baselines, *shape, len(prompts)), np.nan)
        scores[judge[rows], baseline[rows], point, seed, prompt] = self.values[rows]

        there = ~np.isnan(scores).all(axis=(0, 1, 4))
        kl_sum, kl_count, infinite = (np.zeros(shape) for _ in range(3))
        kl = self.numbers["kl_nats"][rows]
        np.add.at(kl_sum, (point, seed), np.where(np.isfinite(kl), kl, 0.0))
        np.add.at(kl_count, (point, seed), np.isfinite(kl))
        np.add.at(infinite, (point, seed), self.infinite_kl[rows])
        scoreless = ~np.isfinite(scores).any(axis=(0, 1, 4))
        diverged = there.any(axis=1)[:, None] & (scoreless | (infinite > 0))
        scores = np.where(diverged[:, :, None], -np.inf, scores)
        # Below all scores of both arms on this split: neither controls nor test prompts may move a choice on dev.
        of_arms = np.isin(self.codes["arm"].code, [self.codes["arm"].names.index(arm) for arm in ARMS])
        known = np.isfinite(self.values) & in_split & (of_arms | self.chosen)
        for j in range(n_judges):
            finite = self.values[(judge == j) & known]
            floor = np.nextafter(finite.min(), -np.inf) if len(finite) else -1.0
            scores[j][scores[j] == -np.inf] = floor
        mean_kl = np.divide(kl_sum, kl_count, out=np.full(shape, np.nan), where=(kl_count > 0) & ~diverged)
        return scores.mean(axis=1), diverged, np.maximum(mean_kl, 0.0)
