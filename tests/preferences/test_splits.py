"""Splits depend on the prompt and the seed alone; soft preferences and judgements against hand-worked rows."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.preferences.rows import Comparison, PreferenceRow, prompt_id, soft_comparisons
from toolkit.preferences.splits import by_annotator, contradictions, labelled_pairs, limit, overlap, pairs, split_rows


def rows_of(prompts: list[str]) -> list[PreferenceRow]:
    return [PreferenceRow(prompt_id(p), p, ["a", "b"], [Comparison(0, 1)]) for p in prompts]


MANY = rows_of([f"prompt {k}" for k in range(2000)])
prompts = st.lists(st.text(max_size=5), unique=True, max_size=30)


@given(prompts, prompts, st.floats(0, 1), st.integers(0, 5))
def test_membership_does_not_depend_on_the_other_rows(
    first: list[str], second: list[str], share: float, seed: int
) -> None:
    both = list(dict.fromkeys(first + second))
    train, held_out = split_rows(rows_of(first), share, seed)
    train_all, held_out_all = split_rows(list(reversed(rows_of(both))), share, seed)
    assert {r.prompt_id for r in train}.isdisjoint(r.prompt_id for r in held_out)
    assert len(train) + len(held_out) == len(first)
    assert {r.prompt_id for r in train} <= {r.prompt_id for r in train_all}
    assert {r.prompt_id for r in held_out} <= {r.prompt_id for r in held_out_all}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.35, 1.0])
def test_share_and_order(share: float) -> None:
    train, held_out = split_rows(MANY, share, 0)
    # four standard deviations of a binomial share of 2000
    assert len(held_out) / len(MANY) == pytest.approx(share, abs=4 * (share * (1 - share) / len(MANY)) ** 0.5)
    assert train == [row for row in MANY if row in train]


def test_a_larger_share_contains_the_smaller_one_and_seeds_differ() -> None:
    small, large = (split_rows(MANY, share, 0)[1] for share in (0.1, 0.3))
    assert {r.prompt_id for r in small} < {r.prompt_id for r in large}
    other = {r.prompt_id for r in split_rows(MANY, 0.1, 1)[1]}
    assert len(other & {r.prompt_id for r in small}) < len(small) / 2


@pytest.mark.parametrize("share", [0.0, 0.2, 0.35, 0.9, 1.0])
def test_groups_are_held_out_whole_and_near_the_share(share: float) -> None:
    rows = [replace(row, group=f"group {k % 37}" if k < 1850 else "") for k, row in enumerate(MANY)]
    train, held_out = split_rows(rows, share, 0)
    assert not {row.group for row in train if row.group} & {row.group for row in held_out}
    assert sorted(train + held_out, key=rows.index) == rows
    assert abs(len(held_out) - share * len(rows)) <= 25  # half of a group of 50
    larger = split_rows(rows, min(1.0, share + 0.1), 0)[1]
    assert {row.prompt_id for row in held_out} <= {row.prompt_id for row in larger}
    assert split_rows(list(reversed(rows)), share, 0)[1] == held_out[::-1]


def test_a_group_that_is_too_large_does_not_end_the_choice() -> None:
    rows = [replace(row, group="large" if k < 100 else f"group {k}") for k, row in enumerate(MANY[:200])]
    for seed in range(12):
        assert 38 <= len(split_rows(rows, 0.2, seed)[1]) <= 40


def test_groups_of_other_held_out_data_leave_training_whole() -> None:
    rows = [replace(row, group=f"group {k % 5}") for k, row in enumerate(MANY[:20])]
    train, n = overlap(rows[:10], [rows[12]])
    assert n == 2 and {row.group for row in train} == {f"group {k}" for k in (0, 1, 3, 4)}


def test_overlap_leaves_training_and_is_counted() -> None:
    train, n = overlap(MANY[:10], MANY[7:20])
    assert (train, n) == (MANY[:7], 3)


def test_limit_is_nested_ordered_and_deterministic() -> None:
    hundred, two_hundred = limit(MANY, 100, 3), limit(list(reversed(MANY)), 200, 3)
    assert len(hundred) == 100
    assert {r.prompt_id for r in hundred} < {r.prompt_id for r in two_hundred}
    assert hundred == sorted(hundred, key=MANY.index)
    assert hundred != MANY[:100]
    assert limit(MANY, None, 0) == MANY == limit(MANY, 5000, 0)
    assert limit(MANY, 0, 0) == []
    # the subset must not be the part of the split's hash: else a limit would bias what is held out
    held_out = {r.prompt_id for r in split_rows(MANY, 0.1, 3)[1]}
    assert 2 <= sum(r.prompt_id in held_out for r in hundred) <= 22


def test_limit_counts_the_rows_that_fit() -> None:
    def fits(row: PreferenceRow) -> bool:
        return len(str(row.prompt)) < len("prompt 1000")

    fitting = [row for row in MANY if fits(row)]
    assert len(fitting) == 1000
    subsets = [limit(MANY, n, 3, fits) for n in (100, 300, 999)]
    assert [len(subset) for subset in subsets] == [100, 300, 999]
    for small, large in pairwise([*subsets, fitting]):
        assert small == [row for row in large if row in small]
    assert subsets[0] == limit(fitting, 100, 3)  # the order of the hash, among those that fit
    assert limit(MANY, None, 3, fits) == limit(MANY, 5000, 3, fits) == limit(MANY, 1500, 3, fits) == fitting
    asked: list[PreferenceRow] = []
    limit(MANY, 10, 3, lambda row: asked.append(row) is None)
    assert len(asked) == 10  # no more than are needed


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="eval_fraction"):
        split_rows(MANY, 1.5, 0)
    with pytest.raises(ValueError, match="negative"):
        limit(MANY, -1, 0)


def row_with(comparisons: list[Comparison]) -> PreferenceRow:
    return PreferenceRow("id", "p", ["a", "b", "c"], comparisons)


def test_pairs_by_hand() -> None:
    row = row_with([Comparison(1, 0), Comparison(0, 1, 0.5), Comparison(2, 0, 0.25), Comparison(0, 2, 0.75)])
    assert [tuple(pair) for pair in pairs(row)] == [(0, 1, 0.5 / 1.5, 1.5), (0, 2, 0.75, 1.0)]
    assert pairs(row_with([])) == []


ends = st.tuples(st.integers(0, 2), st.integers(0, 2)).filter(lambda e: e[0] != e[1])
some = st.lists(st.builds(lambda e, w: Comparison(*e, w), ends, st.floats(0.01, 5)), max_size=8)


@given(some)
def test_pairs_of_reversed_comparisons_are_complements(comparisons: list[Comparison]) -> None:
    result = pairs(row_with(comparisons))
    mirrored = pairs(row_with([Comparison(c.loser, c.winner, c.weight) for c in comparisons]))
    assert [(p.i, p.j) for p in result] == [(p.i, p.j) for p in mirrored] == sorted({(p.i, p.j) for p in result})
    assert [p.p for p in result] == pytest.approx([1 - p.p for p in mirrored], abs=1e-12)
    assert sum(p.weight for p in result) == pytest.approx(sum(c.weight for c in comparisons))


labels = st.lists(st.tuples(st.sampled_from([(0, 1), (0, 2), (1, 2)]), st.sampled_from([0, 0.25, 0.5, 0.9, 1])))


@given(labels)
def test_judgements_undo_soft_comparisons(given_labels: list[tuple[tuple[int, int], float]]) -> None:
    comparisons = [c for k, ((i, j), p) in enumerate(given_labels) for c in soft_comparisons(i, j, p, str(k))]
    result = labelled_pairs(comparisons)
    assert [(g.i, g.j) for g in result] == [pair for pair, _ in given_labels]
    assert [g.p for g in result] == pytest.approx([p for _, p in given_labels])
    assert [g.weight for g in result] == [1.0] * len(given_labels)


def test_soft_labels_with_a_mean_of_one_half_are_a_tie() -> None:
    """In floats the weights for the first response add up to 2.5000000000000004 of 5."""
    shares = [0.4, 0.8, 0.1, 0.8, 0.4]
    by_five = [c for k, p in enumerate(shares) for c in soft_comparisons(0, 1, p, f"ann {k}")]
    assert [pair.p for pair in pairs(PreferenceRow("", "", ["a", "b"], by_five))] == [0.5]
    by_one = [c for p in shares for c in soft_comparisons(0, 1, p, "ann")]
    assert by_annotator(PreferenceRow("", "", ["a", "b"], by_one)) == [(0, 1, {"ann": 0.5})]


def test_judgements_by_hand() -> None:
    tie_then_win = [Comparison(0, 1, 0.5), Comparison(1, 0, 0.5), Comparison(1, 0, 1.0)]
    assert [(g.p, g.first) for g in labelled_pairs(tie_then_win)] == [(0.5, 0), (0.0, 2)]
    two_people = [Comparison(0, 1, 0.5, "x"), Comparison(1, 0, 0.5, "y")]  # halves of two people are no tie
    assert [g.p for g in labelled_pairs(two_people)] == [1.0, 0.0]
    opposite = [Comparison(0, 1, 1.0), Comparison(1, 0, 1.0)]
    assert [g.p for g in labelled_pairs(opposite)] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("comparisons", "source_rows", "n"),
    [
        ([Comparison(0, 1), Comparison(1, 0)], [1, 2], 1),  # two rows that name nobody
        ([Comparison(0, 1), Comparison(1, 0)], [1, 1], 0),  # one row may sum up two people
        ([Comparison(0, 1, 1.0, "x"), Comparison(1, 0, 1.0, "x")], [1, 1], 1),
        ([Comparison(0, 1, 1.0, "x"), Comparison(1, 0, 1.0, "y")], [1, 2], 0),
        ([Comparison(0, 1), Comparison(1, 0), Comparison(1, 0)], [1, 2, 3], 1),  # a pair counts once
        ([Comparison(0, 1), *soft_comparisons(0, 1, 0.5)], [1, 2, 2], 0),  # a tie contradicts nothing
        ([Comparison(0, 1), *soft_comparisons(0, 1, 0.25)], [1, 2, 2], 1),
        ([Comparison(0, 1), Comparison(2, 0)], [1, 2], 0),
    ],
)
def test_contradictions(comparisons: list[Comparison], source_rows: list[int], n: int) -> None:
    assert contradictions(labelled_pairs(comparisons), source_rows) == n
