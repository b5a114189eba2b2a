"""Checks of what is compared: lengths, repeated and contradicting rows, ties, annotators."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from toolkit.evals.distinct import equals, first_of_equals
from toolkit.evals.odd_annotators import odd_annotators
from toolkit.evals.two_sides import length_bias
from toolkit.evals.words import counted
from toolkit.measure.check.findings import Collector, excerpt
from toolkit.measure.check.stored import CheckedRow, CheckedRows
from toolkit.measure.check.tokens import winners
from toolkit.preferences import splits
from toolkit.preferences.rows import canonical_prompt, readable
from toolkit.storage.lazy import LazySequence

FIRST, SECOND, NAMED = 1, 2, 4  # of a judgement: which of the two texts won, in their order; who judged has a name


class Lengths:
    """``length_bias``."""

    def __init__(self) -> None:
        self.places, self.differences = array("q"), array("q")  # of each pair with a winner, in characters

    def take(self, rows: Sequence[CheckedRow]) -> None:
        """These rows, which come after the ones before."""
        for row in rows:
            for chosen, rejected in winners(row):
                self.places.append(row.place)
                self.differences.append(len(chosen) - len(rejected))

    def check(self, rows: CheckedRows, collector: Collector) -> None:
        places, differences = np.frombuffer(self.places, np.int64), np.frombuffer(self.differences, np.int64)
        bias = length_bias(rows.keys[places], differences)
        if bias is None:
            return
        longer_wins = bias.accuracy > 0.5
        word, accuracy = ("longer", bias.accuracy) if longer_wins else ("shorter", 1.0 - bias.accuracy)
        low, high = (bias.ci_low, bias.ci_high) if longer_wins else (1.0 - bias.ci_high, 1.0 - bias.ci_low)
        concerned = places[(differences != 0) & ((differences > 0) == longer_wins)]
        collector.add_all(
            "length_bias",
            rows.numbers[concerned].tolist(),
            f"preferring the {word} response is right in {accuracy:.1%} of the pairs that differ in length (95% "
            f"interval {low:.1%} to {high:.1%}, {counted(bias.n_prompts, 'prompt')}); the preferred one is "
            f"{abs(bias.difference):.1f} characters {'longer' if bias.difference > 0 else 'shorter'} in the mean",
        )


class Repeats:
    """``duplicates``, ``contradictions`` and ``ties``. Of each row and each judgement a hash is kept, not its texts."""

    def __init__(self, unit: str, collector: Collector) -> None:
        self.unit, self.collector = unit, collector
        self.contents = array("q")  # of each row
        # Of each judgement that is no tie: a hash of the two texts and of who judged, the place of its row, who won.
        self.judged, self.places, self.sides = array("q"), array("q"), bytearray()

    def take(self, rows: Sequence[CheckedRow]) -> None:
        """These rows, which come after the ones before."""
        for row in rows:
            prompt, responses = _same_blanks(readable(row.prompt)), [_same_blanks(t) for t in row.responses]
            labelled = splits.labelled_pairs(row.comparisons)
            judged = frozenset((responses[pair.i], responses[pair.j], pair.p, pair.annotator) for pair in labelled)
            judged |= {(j, i, 1.0 - p, who) for i, j, p, who in judged}
            self.contents.append(hash((prompt, frozenset(responses), judged)))
            for pair in labelled:
                one, two = responses[pair.i], responses[pair.j]
                if pair.p == 0.5:
                    self.collector.add("ties", row.number, f"{excerpt(one)} and {excerpt(two)} tie")
                    continue
                winner = one if pair.p > 0.5 else two
                one, two = sorted((one, two))
                self.judged.append(hash((prompt, one, two, pair.annotator)))
                self.places.append(row.place)
                self.sides.append((FIRST if winner == one else SECOND) | (NAMED if pair.annotator else 0))

    def check(self, rows: CheckedRows) -> None:
        firsts, which = first_of_equals(np.frombuffer(self.contents, np.int64))
        first_of = firsts[which]
        for place in np.flatnonzero(first_of != np.arange(len(first_of))).tolist():
            detail = partial(self._duplicate, rows, place, int(rows.numbers[first_of[place]]))
            self.collector.add("duplicates", int(rows.numbers[place]), detail)
        self._check_contradictions(rows)

    def _duplicate(self, rows: CheckedRows, place: int, first: int) -> str:
        return f"the same as {self.unit} {first}: {excerpt(readable(rows.prompt(place)))}"

    def _check_contradictions(self, rows: CheckedRows) -> None:
        judged, sides = np.frombuffer(self.judged, np.int64), np.frombuffer(self.sides, np.uint8)
        both_won = np.intersect1d(judged[(sides & FIRST) > 0], judged[(sides & SECOND) > 0])
        concerned = np.flatnonzero(np.isin(judged, both_won))
        row_of = np.frombuffer(self.places, np.int64)[concerned]
        for members in equals(judged[concerned]):
            places = row_of[members]
            numbers = np.unique(rows.numbers[places]).tolist()
            # A row without annotators may sum up several people, so it cannot contradict itself.
            if sides[concerned[members[0]]] & NAMED or len(numbers) > 1:
                judgement = int(judged[concerned[members[0]]])
                detail = partial(self._contradiction, rows, int(places[0]), judgement, numbers[:5])
                for number in numbers:
                    self.collector.add("contradictions", number, detail)

    def _contradiction(self, rows: CheckedRows, place: int, judgement: int, numbers: Sequence[int]) -> str:
        row = rows[place]
        prompt, responses = _same_blanks(readable(row.prompt)), [_same_blanks(t) for t in row.responses]
        for pair in splits.labelled_pairs(row.comparisons):
            winner, loser = (pair.i, pair.j) if pair.p > 0.5 else (pair.j, pair.i)
            one, two = sorted((responses[winner], responses[loser]))
            if pair.p != 0.5 and hash((prompt, one, two, pair.annotator)) == judgement:
                who = f" by {pair.annotator}" if pair.annotator else ""
                where = ", ".join(map(str, numbers))
                return f"{excerpt(responses[winner])} wins and loses{who} ({self.unit} {where})"
        raise AssertionError("the row has this judgement")


def _same_blanks(text: str) -> str:
    return " ".join(text.split())


class Annotators:
    """``annotator``. Of each judgement by somebody with a name numbers are kept."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        # A hash of the prompt and the two texts, the place of the name, the preference for the first text, and the
        # place of the row.
        self.units, self.named = array("q"), array("q")
        self.preferences, self.places = array("d"), array("q")

    def take(self, rows: Sequence[CheckedRow]) -> None:
        """These rows, which come after the ones before."""
        for row in rows:
            if not any(c.annotator for c in row.comparisons):
                continue
            prompt = canonical_prompt(row.prompt)
            for pair in splits.labelled_pairs(row.comparisons):
                one, two = row.responses[pair.i], row.responses[pair.j]
                if pair.annotator:
                    self.units.append(hash((prompt, min(one, two), max(one, two))))
                    self.named.append(self.names.setdefault(pair.annotator, len(self.names)))
                    self.preferences.append(pair.p if one <= two else 1.0 - pair.p)
                    self.places.append(row.place)

    def check(self, rows: CheckedRows, collector: Collector) -> None:
        units = self._units()
        first_places = np.frombuffer(units.places, np.int64)[np.frombuffer(units.ends, np.int64)[:-1]]
        odd = odd_annotators(units, rows.keys[first_places])
        numbers = array("q")
        for annotator in odd:
            for k, judged in enumerate(units):
                others = [value for name, value in judged.items() if name != annotator.name]
                if annotator.name in judged and judged[annotator.name] not in others:
                    numbers.append(int(rows.numbers[units.place(k, annotator.name)]))
        if odd:
            words = [
                f"{a.name} agrees with the others on {a.agreement:.0%} of {counted(a.n, 'pair')}, and they agree with "
                f"each other on {a.others_agreement:.0%} (p = {a.p_value:.2g})"
                for a in odd
            ]
            collector.add_all("annotator", numbers, "; ".join(words))

    def _units(self) -> _Units:
        """The pairs that several annotators judged, in the order in which they are first."""
        named = np.frombuffer(self.named, np.int64)
        _, unit_of = first_of_equals(np.frombuffer(self.units, np.int64))
        firsts, which = first_of_equals(unit_of * len(self.names) + named)
        lasts = np.zeros_like(firsts)
        np.maximum.at(lasts, which, np.arange(len(which)))  # of what an annotator says of a pair, the last counts
        order = np.argsort(unit_of[firsts], kind="stable")
        n_judged = np.bincount(unit_of[firsts])
        shared = n_judged[unit_of[firsts[order]]] > 1
        lasts = lasts[order[shared]]
        ends = np.cumsum(n_judged[n_judged > 1])
        return _Units(
            list(self.names),
            array("q", named[lasts].tobytes()),
            array("d", np.frombuffer(self.preferences)[lasts].tobytes()),
            array("q", np.frombuffer(self.places, np.int64)[lasts].tobytes()),
            array("q", [0, *ends.tolist()]),
        )


@dataclass(frozen=True)
class _Units(LazySequence[Mapping[str, float]]):
    """Of each pair every annotator's preference for the first of its texts, one pair after the other.

    ``ends`` are those of the pairs among the judgements, with 0 before them.
    """

    names: list[str]
    named: array[int]
    preferences: array[float]
    places: array[int]
    ends: array[int]

    def __len__(self) -> int:
        return len(self.ends) - 1

    def item(self, at: int) -> Mapping[str, float]:
        start, end = self.ends[at], self.ends[at + 1]
        named = [self.names[k] for k in self.named[start:end]]
        return dict(zip(named, self.preferences[start:end], strict=True))

    def place(self, at: int, name: str) -> int:
        """The place of the row in which an annotator judged a pair."""
        return self.places[self.ends[at] + list(self[at]).index(name)]
