"""Judges on held-out comparisons: their answers on pairs whose labels are known, and what these say of the judges."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from toolkit.evals.intervals import BootstrapOptions
from toolkit.evals.judge_tests import JudgeTest, LabelledPair, Preferences, judge_test, not_tested
from toolkit.files import fingerprint
from toolkit.judging import llm, scorers
from toolkit.judging.options import JudgeOptions
from toolkit.judging.prompt_ids import ids_of_prompts
from toolkit.judging.records import Judgement, mean_of_all, preference_by_score, read_judgements, response_hash
from toolkit.judging.responses import PolicyResponses
from toolkit.preferences import splits
from toolkit.preferences.rows import PreferenceRow
from toolkit.progress import Reporter

FIRST, SECOND = "first response", "second response"
RowScores = Sequence[Sequence[float]]
"""For each held-out row, the scores of its responses."""


class HeldOutPair(NamedTuple):
    """Responses i < j of a row, and the share ``p`` of the labels' ``weight`` that prefers i."""

    row: PreferenceRow
    row_index: int
    i: int
    j: int
    p: float
    weight: float

    @property
    def texts(self) -> tuple[str, str]:
        return self.row.responses[self.i], self.row.responses[self.j]

    @property
    def labelled(self) -> LabelledPair:
        # by number, as the statistics of rewards count prompts: both draw the same resamples
        return LabelledPair(self.row_index, self.p, self.weight)


def held_out_pairs(rows: Sequence[PreferenceRow], most: int | None = None) -> list[HeldOutPair]:
    """The labelled pairs of held-out rows: all of them, or ``most``, with one of every prompt before a second of any.

    Hashes of prompts and responses decide which, so the same pairs are taken each time.
    """
    ranked: list[tuple[int, str, HeldOutPair]] = []
    for index, row in enumerate(rows):
        pairs = [HeldOutPair(row, index, *pair) for pair in splits.pairs(row)]
        if most is not None:
            pairs.sort(key=lambda pair: fingerprint([pair.row.prompt_id, *pair.texts]))
        ranked += [(place, fingerprint(row.prompt_id), pair) for place, pair in enumerate(pairs)]
    if most is None:
        return [pair for _, _, pair in ranked]
    return [pair for _, _, pair in sorted(ranked, key=lambda entry: entry[:2])[:most]]


def examine_judges(
    judges: Sequence[str],
    rows: Sequence[PreferenceRow],
    most: int,
    options: JudgeOptions,
    reporter: Reporter,
    *,
    known_scores: Mapping[str, RowScores],
    bootstrap: BootstrapOptions,
) -> tuple[dict[str, JudgeTest], list[llm.Usage]]:
    """The test of every judge by its name, and what language models took for it.

    A judge with ``known_scores`` of the held-out responses, or with recorded judgements, is tested on all labelled
    pairs, another one on at most ``most`` of them. With 0 none is tested. A file may hold several judges.
    """
    every, few = held_out_pairs(rows), held_out_pairs(rows, most)
    untested = "" if few else "the held-out data has no labelled pair" if most else "evaluate.judge_test_pairs is 0"
    tests: dict[str, JudgeTest] = {}
    usages = []
    recorded: dict[str, list[Judgement]] = defaultdict(list)  # by judge: several files may have the same one
    for spec in judges:
        kind, _, file = spec.partition(":")
        for judgement in read_judgements([file]) if kind == "file" else []:
            recorded[judgement.judge].append(judgement)

    def add(judge: str, pairs: Sequence[HeldOutPair], answers: Sequence[Preferences]) -> None:
        tests[judge] = judge_test(judge, [pair.labelled for pair in pairs], answers, **bootstrap)

    for judge, judgements in recorded.items():
        if untested:
            tests[judge] = not_tested(judge, untested)
        else:
            add(judge, every, _recorded(judgements, every))
    for spec in [judge for judge in judges if not judge.startswith("file:")]:
        if untested:
            tests[spec] = not_tested(spec, untested)
        elif spec in known_scores:
            scores = known_scores[spec]
            add(spec, every, [(_preference(scores[p.row_index][p.i], scores[p.row_index][p.j]),) for p in every])
        else:
            answers, usage = _ask(spec, few, options, reporter)
            usages += [replace(usage, judge=f"{spec}, tested on held-out pairs")] if usage is not None else []
            add(spec, few, answers)
    return tests, usages


def _ask(
    judge: str, pairs: Sequence[HeldOutPair], options: JudgeOptions, reporter: Reporter
) -> tuple[list[Preferences], llm.Usage | None]:
    if llm.is_language_model(judge):
        responses = PolicyResponses(
            [pair.row.prompt_id for pair in pairs],
            [pair.row.prompt for pair in pairs],
            {FIRST: [[pair.texts[0]] for pair in pairs], SECOND: [[pair.texts[1]] for pair in pairs]},
        )
        judgements, usage = llm.judge_pairs(judge, [(FIRST, SECOND)], responses, options, reporter)
        return _recorded(judgements, pairs), usage
    reporter.line(f"judge {judge}: {len(pairs)} held-out pairs")
    prompts = [pair.row.prompt for pair in pairs]
    scores = scorers.score(judge, prompts, [list(pair.texts) for pair in pairs], options)
    return [(_preference(*of_pair),) for of_pair in scores], None


def _preference(first: float, second: float) -> float | None:
    return None if math.isnan(first) or math.isnan(second) else preference_by_score(first, second)


def _recorded(judgements: Sequence[Judgement], pairs: Sequence[HeldOutPair]) -> list[Preferences]:
    """The judgements of each pair, by the hashes of its two responses; whichever of them a judgement calls the policy.

    Judgements in the same order of presentation are averaged.
    """
    names = ids_of_prompts((pair.row.prompt_id, pair.row.prompt) for pair in pairs)
    by_texts: dict[tuple[str, str, str], list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        prompt = names.get(judgement.prompt_id, judgement.prompt_id)
        by_texts[prompt, judgement.policy_hash, judgement.baseline_hash].append(judgement)
    out: list[Preferences] = []
    for pair in pairs:
        first, second = (response_hash(text) for text in pair.texts)
        by_order: dict[int | None, list[float | None]] = defaultdict(list)
        for j in by_texts[pair.row.prompt_id, first, second]:
            by_order[j.order].append(j.preference)
        for j in by_texts[pair.row.prompt_id, second, first]:
            order = None if j.order is None else 1 - j.order
            by_order[order].append(None if j.preference is None else 1.0 - j.preference)
        out.append(tuple(mean_of_all(values) for values in by_order.values()))
    return out
