"""Checks of what is compared: lengths, repeated and contradicting rows, ties, annotators, prompts on both sides."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from toolkit.evals.near_duplicates import near_duplicates
from toolkit.evals.odd_annotators import odd_annotators
from toolkit.evals.two_sides import length_bias
from toolkit.evals.words import counted
from toolkit.measure.check.findings import Collector, excerpt
from toolkit.measure.check.rows import CheckedRow
from toolkit.measure.check.tokens import winners
from toolkit.preferences import splits
from toolkit.preferences.rows import readable

Pair = tuple[str, str, str]
"""A prompt and two responses in alphabetical order, each with its white space made equal."""


def check_length(rows: Sequence[CheckedRow], collector: Collector) -> None:
    pairs = winners(rows)
    prompts = [rows[pair.row].key for pair in pairs]
    differences = [
        len(rows[pair.row].responses[pair.chosen]) - len(rows[pair.row].responses[pair.rejected]) for pair in pairs
    ]
    bias = length_bias(prompts, differences)
    if bias is None:
        return
    longer_wins = bias.accuracy > 0.5
    word, accuracy = ("longer", bias.accuracy) if longer_wins else ("shorter", 1.0 - bias.accuracy)
    low, high = (bias.ci_low, bias.ci_high) if longer_wins else (1.0 - bias.ci_high, 1.0 - bias.ci_low)
    concerned = [
        rows[pair.row].number
        for pair, difference in zip(pairs, differences, strict=True)
        if difference and (difference > 0) == longer_wins
    ]
    collector.add_all(
        "length_bias",
        concerned,
        f"preferring the {word} response is right in {accuracy:.1%} of the pairs that differ in length (95% interval "
        f"{low:.1%} to {high:.1%}, {counted(bias.n_prompts, 'prompt')}); the preferred one is "
        f"{abs(bias.difference):.1f} characters {'longer' if bias.difference > 0 else 'shorter'} in the mean",
    )


def check_repeats(rows: Sequence[CheckedRow], unit: str, collector: Collector) -> None:
    """``duplicates``, ``contradictions`` and ``ties``."""
    first_row: dict[int, int] = {}  # by a hash of what a row says: the texts of many rows would fill the memory
    for row in rows:
        prompt, responses = _same_blanks(readable(row.prompt)), [_same_blanks(t) for t in row.responses]
        labelled = splits.labelled_pairs(row.comparisons)
        judged = frozenset((responses[pair.i], responses[pair.j], pair.p, pair.annotator) for pair in labelled)
        judged |= {(j, i, 1.0 - p, who) for i, j, p, who in judged}
        first = first_row.setdefault(hash((prompt, frozenset(responses), judged)), row.number)
        if first != row.number:
            collector.add("duplicates", row.number, f"the same as {unit} {first}: {excerpt(readable(row.prompt))}")
        for pair in labelled:
            if pair.p == 0.5:
                collector.add("ties", row.number, f"{excerpt(responses[pair.i])} and {excerpt(responses[pair.j])} tie")
    _check_contradictions(rows, unit, collector)


def _check_contradictions(rows: Sequence[CheckedRow], unit: str, collector: Collector) -> None:
    winners_of: dict[int, int] = defaultdict(int)  # by a hash of a pair and its annotator: 1, 2, or 3 for both won
    for row in rows:
        for pair, winner in _decided(row):
            winners_of[hash(pair)] |= 1 if winner == pair[0][1] else 2
    both_won = {key for key, sides in winners_of.items() if sides == 3}
    sides: dict[tuple[Pair, str], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for row in rows if both_won else ():
        for pair, winner in _decided(row):
            if hash(pair) in both_won:
                sides[pair][winner].append(row.number)
    for (_, annotator), by_winner in sides.items():
        numbers = sorted({number for numbers in by_winner.values() for number in numbers})
        # A row without annotators may sum up several people, so it cannot contradict itself.
        if len(by_winner) == 2 and (annotator or len(numbers) > 1):
            winner = next(iter(by_winner))
            who = f" by {annotator}" if annotator else ""
            detail = f"{excerpt(winner)} wins and loses{who} ({unit} {', '.join(map(str, numbers[:5]))})"
            for number in numbers:
                collector.add("contradictions", number, detail)


def _decided(row: CheckedRow) -> Iterator[tuple[tuple[Pair, str], str]]:
    """Each judgement of a row that is no tie: the pair and who judged it, and the response that won."""
    prompt, responses = _same_blanks(readable(row.prompt)), [_same_blanks(t) for t in row.responses]
    for judged in splits.labelled_pairs(row.comparisons):
        if judged.p != 0.5:
            one, two = sorted((responses[judged.i], responses[judged.j]))
            yield ((prompt, one, two), judged.annotator), responses[judged.i if judged.p > 0.5 else judged.j]


def _same_blanks(text: str) -> str:
    return " ".join(text.split())


def check_annotators(rows: Sequence[CheckedRow], collector: Collector) -> None:
    units: dict[Pair, dict[str, float]] = defaultdict(dict)
    places: dict[tuple[Pair, str], int] = {}
    for row in rows:
        if not any(c.annotator for c in row.comparisons):
            continue
        for pair in splits.labelled_pairs(row.comparisons):
            one, two = row.responses[pair.i], row.responses[pair.j]
            unit = (row.key, min(one, two), max(one, two))
            if pair.annotator:
                units[unit][pair.annotator] = pair.p if one <= two else 1.0 - pair.p
                places[unit, pair.annotator] = row.number
    odd = odd_annotators([judged for judged in units.values() if len(judged) > 1])
    numbers = []
    for annotator in odd:
        for unit, judged in units.items():
            others = [value for name, value in judged.items() if name != annotator.name]
            if annotator.name in judged and others and judged[annotator.name] not in others:
                numbers.append(places[unit, annotator.name])
    if odd:
        words = [
            f"{a.name} agrees with the others on {a.agreement:.0%} of {counted(a.n, 'pair')}, and they agree with each "
            f"other on {a.others_agreement:.0%} (p = {a.p_value:.2g})"
            for a in odd
        ]
        collector.add_all("annotator", numbers, "; ".join(words))


def check_leak(
    rows: Sequence[CheckedRow], held_out: Sequence[CheckedRow] | None, unit: str, collector: Collector
) -> None:
    """Prompts that are nearly the same as a held-out one; without held-out rows, as one that could be held out."""
    if held_out is None:
        _check_alike(_first_rows(rows), unit, collector)
        return
    held, training = _first_rows(held_out), _first_rows(rows)
    by_key = {row.key: row for row in held}
    twins = {row.key: (by_key[row.key], "is also") for row in training if row.key in by_key}
    # The held-out texts come first: texts with the same words pair with the first of them.
    for pair in near_duplicates([readable(row.prompt) for row in [*held, *training]]):
        if pair.second < len(held):
            continue
        row = training[pair.second - len(held)]
        if pair.first < len(held):
            twins.setdefault(row.key, (held[pair.first], "is nearly"))
        elif pair.similarity == 1.0 and (near := twins.get(training[pair.first - len(held)].key)) is not None:
            twins.setdefault(row.key, (near[0], "is nearly"))
    for row in rows:
        if row.key in twins:
            twin, word = twins[row.key]
            detail = f"the prompt {word} that of held-out {unit} {twin.number}: {excerpt(readable(row.prompt))}"
            collector.add("leak", row.number, detail)


def _check_alike(rows: Sequence[CheckedRow], unit: str, collector: Collector) -> None:
    """Prompts that a split by the hash of the prompt can put on different sides."""
    for pair in near_duplicates([readable(row.prompt) for row in rows]):
        first, second = rows[pair.first], rows[pair.second]
        if first.group and first.group == second.group:
            continue
        for row, twin in ((first, second), (second, first)):
            if collector.has("leak", row.number):
                continue
            detail = (
                f"a split can separate it from {unit} {twin.number}: {excerpt(readable(row.prompt))} and "
                f"{excerpt(readable(twin.prompt))}"
            )
            collector.add("leak", row.number, detail)


def _first_rows(rows: Sequence[CheckedRow]) -> list[CheckedRow]:
    """The first row of each distinct prompt."""
    first: dict[str, CheckedRow] = {}
    for row in rows:
        first.setdefault(row.key, row)
    return list(first.values())
