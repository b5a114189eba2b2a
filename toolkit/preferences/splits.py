"""Held-out splits and subsets of preference rows, and the compared pairs of a row.

A hash of the prompt alone decides where a row belongs, so membership depends neither on order nor on other rows. Rows
that name a group are held out by whole groups.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import NamedTuple

from toolkit.preferences.rows import Comparison, PreferenceRow
from toolkit.preferences.views import prompt_id_of

NEAR_ENOUGH = 0.95  # of the share of rows to hold out: no further groups are looked for then


class Pair(NamedTuple):
    """Responses i < j of a row with all their comparisons: ``p`` is the share of ``weight`` that prefers i."""

    i: int
    j: int
    p: float
    weight: float


class LabelledPair(NamedTuple):
    """One judgement of a pair i < j: one comparison, or the two of a soft label or tie.

    ``p`` is the probability that i is preferred. ``first`` is the index of the judgement's first comparison.
    """

    i: int
    j: int
    p: float
    weight: float
    annotator: str
    first: int


def _uniform(*parts: object) -> float:
    """A hash of ``parts`` as a number in [0, 1)."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2.0**64


def split_rows(
    rows: Sequence[PreferenceRow], eval_fraction: float, seed: int, *, purpose: str = "split"
) -> tuple[list[PreferenceRow], list[PreferenceRow]]:
    """``(train, eval)``: about ``eval_fraction`` of the prompts are held out, by the hash of (seed, prompt).

    A prompt is never on both sides, and adding or removing rows moves no other row. Where rows name groups, whole
    groups are held out, in the order of the hash of (seed, group), as long as that brings the share of held-out rows
    nearer to ``eval_fraction``. A row without a group is a group by itself. A group is never on both sides either.
    Splits with another ``purpose`` do not depend on each other.
    """
    train, held_out = split_places([(row.prompt_id, row.group) for row in rows], eval_fraction, seed, purpose=purpose)
    return [rows[k] for k in train], [rows[k] for k in held_out]


def split_places(
    keys: Iterable[tuple[str, str]], eval_fraction: float, seed: int, *, purpose: str = "split"
) -> tuple[Sequence[int], Sequence[int]]:
    """:func:`split_rows` of rows with these (prompt_id, group): the places of the rows of both sides."""
    if not 0.0 <= eval_fraction <= 1.0:
        raise ValueError(f"eval_fraction must be in [0, 1], not {eval_fraction}")
    keys = list(keys)
    if any(group for _, group in keys):
        names = [group or prompt_id for prompt_id, group in keys]
        groups_held_out = _groups_held_out(names, eval_fraction, seed, purpose)
        is_out = [name in groups_held_out for name in names]
    else:
        is_out = [_uniform(purpose, seed, prompt_id) < eval_fraction for prompt_id, _ in keys]
    sides = array("q"), array("q")
    for k, side in enumerate(is_out):
        sides[side].append(k)
    return sides


def _groups_held_out(names: Sequence[str], eval_fraction: float, seed: int, purpose: str) -> set[str]:
    """``names`` has the group of each row."""
    sizes = Counter(names)
    target = eval_fraction * len(names)
    held_out: set[str] = set()
    n, left_out = 0, False
    for group in sorted(sizes, key=lambda group: (_uniform(purpose, seed, group), group)):
        nearer = abs(n + sizes[group] - target) <= abs(n - target)
        if nearer and (n + sizes[group] <= target or not left_out):
            held_out.add(group)
            n += sizes[group]
        else:  # too large: training keeps it, and smaller ones fill what is left
            left_out = True
        if left_out and n >= NEAR_ENOUGH * target:
            break
    return held_out


def overlap(train: Sequence[PreferenceRow], held_out: Sequence[PreferenceRow]) -> tuple[list[PreferenceRow], int]:
    """``(train without the prompts and groups of held_out, number of rows removed)``. For data from another source."""
    keys = ([(row.prompt_id, row.group) for row in rows] for rows in (train, held_out))
    remaining = places_apart(*keys)
    return [train[k] for k in remaining], len(train) - len(remaining)


def places_apart(train: Iterable[tuple[str, str]], held_out: Iterable[tuple[str, str]]) -> Sequence[int]:
    """Where rows stand that share neither prompt nor group with ``held_out``; both are (prompt_id, group) of rows."""
    prompt_ids, groups = set[str](), set[str]()
    for prompt_id, group in held_out:
        prompt_ids.add(prompt_id)
        groups |= {group} if group else set()
    apart = (k for k, (name, group) in enumerate(train) if name not in prompt_ids and group not in groups)
    return array("q", apart)


def limit(
    rows: Sequence[PreferenceRow],
    n: int | None,
    seed: int,
    fits: Callable[[PreferenceRow], bool] = lambda _: True,
) -> list[PreferenceRow]:
    """Of the rows that fit, the ``n`` with the lowest hash of (seed, prompt), in their order; all if n is None.

    Subsets are nested: the 100 rows of n = 100 are among the 200 rows of n = 200. ``fits`` is asked for rows by their
    hash, until n rows fit: a limit counts what is left after the filters.
    """
    return [rows[k] for k in sorted(islice((k for k in limit_order(rows, n, seed) if fits(rows[k])), n))]


def limit_order(rows: Sequence[PreferenceRow], n: int | None, seed: int) -> Sequence[int]:
    """The places of rows in the order in which :func:`limit` asks for them."""
    if n is not None and n < 0:
        raise ValueError(f"n must not be negative, not {n}")
    if n is None or n >= len(rows):
        return range(len(rows))
    return sorted(range(len(rows)), key=lambda k: _uniform("limit", seed, prompt_id_of(rows, k)))


def pairs(row: PreferenceRow) -> list[Pair]:
    """Every compared pair of responses once, all its comparisons aggregated, in order of (i, j).

    >>> row = PreferenceRow("", "", ["a", "b"], [Comparison(0, 1), Comparison(0, 1), Comparison(1, 0)])
    >>> pairs(row)
    [Pair(i=0, j=1, p=0.6666666666666666, weight=3.0)]
    """
    if len(row.comparisons) == 1:  # as below, in a fraction of the time
        [c] = row.comparisons
        i, j, p = (c.winner, c.loser, 1.0) if c.winner < c.loser else (c.loser, c.winner, 0.0)
        return [Pair(i, j, p, c.weight)]
    for_i: dict[tuple[int, int], float] = defaultdict(float)
    total: dict[tuple[int, int], float] = defaultdict(float)
    for c in row.comparisons:
        key = (min(c.winner, c.loser), max(c.winner, c.loser))
        total[key] += c.weight
        for_i[key] += c.weight if c.winner < c.loser else 0.0
    return [Pair(i, j, _exact_tie(for_i[i, j] / total[i, j]), total[i, j]) for i, j in sorted(total)]


def _exact_tie(p: float) -> float:
    """A share that should be one half, and misses it by the rounding of a sum of weights, as one half.

    >>> sum([0.4, 0.8, 0.1, 0.8, 0.4]) / 5, _exact_tie(sum([0.4, 0.8, 0.1, 0.8, 0.4]) / 5)
    (0.5000000000000001, 0.5)
    """
    return 0.5 if abs(p - 0.5) <= 1e-12 else p


def margins(row: PreferenceRow) -> list[float]:
    """For each of :func:`pairs`, the weighted mean of its comparisons' margins.

    >>> margins(PreferenceRow("", "", ["a", "b"], [Comparison(0, 1, margin=3.0), Comparison(1, 0, 2.0)]))
    [1.0]
    """
    sums: dict[tuple[int, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for c in row.comparisons:
        entry = sums[min(c.winner, c.loser), max(c.winner, c.loser)]
        entry[0] += c.weight * c.margin
        entry[1] += c.weight
    return [sums[key][0] / sums[key][1] for key in sorted(sums)]


def labelled_pairs(comparisons: Sequence[Comparison]) -> list[LabelledPair]:
    """The judgements behind comparisons.

    Two opposite comparisons by one annotator whose weights add up to 1 are one judgement: a soft label or a tie.

    >>> [pair.p for pair in labelled_pairs([Comparison(0, 1, 0.5), Comparison(1, 0, 0.5), Comparison(0, 1)])]
    [0.5, 1.0]
    """
    if len(comparisons) == 1:  # as below, in a fraction of the time
        [c] = comparisons
        i, j, p = (c.winner, c.loser, 1.0) if c.winner <= c.loser else (c.loser, c.winner, 0.0)
        return [LabelledPair(i, j, p, c.weight, c.annotator, 0)]
    labelled: list[LabelledPair] = []
    open_at: dict[tuple[int, int, str], list[int]] = defaultdict(list)  # halves that wait for their other half
    for index, c in enumerate(comparisons):
        waiting = open_at[c.loser, c.winner, c.annotator] if c.weight < 1.0 else []
        half = next((k for k in waiting if abs(labelled[k].weight + c.weight - 1.0) < 1e-9), None)
        if half is not None:
            waiting.remove(half)
            p = labelled[half].weight if labelled[half].p == 1.0 else c.weight
            labelled[half] = labelled[half]._replace(p=p, weight=1.0)
            continue
        if c.weight < 1.0:
            open_at[c.winner, c.loser, c.annotator].append(len(labelled))
        i, j = min(c.winner, c.loser), max(c.winner, c.loser)
        labelled.append(LabelledPair(i, j, 1.0 if c.winner == i else 0.0, c.weight, c.annotator, index))
    return labelled


def by_annotator(row: PreferenceRow) -> list[tuple[int, int, dict[str, float]]]:
    """(i, j, who compared them -> whom they prefer) of each compared pair i < j: 1 for i, 0 for j, 1/2 for neither.

    >>> row = PreferenceRow("", "", ["a", "b"], [Comparison(0, 1, annotator="x"), Comparison(1, 0, annotator="y")])
    >>> by_annotator(row)
    [(0, 1, {'x': 1.0, 'y': 0.0})]
    """
    votes: dict[tuple[int, int], dict[str, list[float]]] = {}
    for pair in labelled_pairs(row.comparisons):
        if pair.annotator:
            votes.setdefault((pair.i, pair.j), {}).setdefault(pair.annotator, []).append(pair.p)
    means = {key: {name: _exact_tie(sum(p) / len(p)) for name, p in of_pair.items()} for key, of_pair in votes.items()}
    return [
        (i, j, {name: 0.5 if p == 0.5 else float(p > 0.5) for name, p in of_pair.items()})
        for (i, j), of_pair in sorted(means.items())
    ]


def contradictions(labelled: Sequence[LabelledPair], source_rows: Sequence[int]) -> int:
    """Pairs of one prompt on which one annotator, or two rows that name no annotator, prefer opposite responses.

    ``source_rows[k]`` is the row of comparison k. One row without annotators may sum up several people, so it cannot
    contradict itself.
    """
    sides: dict[tuple[int, int, str], tuple[set[int], set[int]]] = defaultdict(lambda: (set(), set()))
    for pair in labelled:
        if pair.p != 0.5:
            sides[pair.i, pair.j, pair.annotator][int(pair.p < 0.5)].add(source_rows[pair.first])
    return sum(
        1
        for (_, _, annotator), (for_i, for_j) in sides.items()
        if for_i and for_j and (annotator or len(for_i | for_j) > 1)
    )


def imitated(row: PreferenceRow, train_on: str) -> list[int]:
    """Indices of the responses that SFT imitates: all, or the one with the most wins (of equal ones, the first).

    None of a prompt that nobody compared the responses of is preferred.

    >>> imitated(PreferenceRow("", "", ["a", "b"], []), "preferred")
    []
    """
    if train_on == "all":
        return list(range(len(row.responses)))
    if not row.comparisons:
        return []
    wins = [0.0] * len(row.responses)
    for pair in pairs(row):
        wins[pair.i] += pair.p * pair.weight
        wins[pair.j] += (1 - pair.p) * pair.weight
    return [max(range(len(wins)), key=lambda i: (wins[i], -i))]
