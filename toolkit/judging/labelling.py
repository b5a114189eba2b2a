"""Labels for pairs of sampled responses, by any judge that can be asked or by written principles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.judging.judge import judge_pairs
from toolkit.judging.llm import Usage
from toolkit.judging.options import JudgeOptions
from toolkit.judging.principles import Labelling, label_rows
from toolkit.judging.records import mean_of_all
from toolkit.judging.responses import PolicyResponses
from toolkit.preferences import splits
from toolkit.preferences.rows import Prompt
from toolkit.preferences.samples import Sample
from toolkit.progress import Reporter


@dataclass(frozen=True)
class SamplePair:
    """Two samples of one prompt, with different texts."""

    prompt: Prompt
    first: Sample
    second: Sample

    @property
    def texts(self) -> tuple[str, str]:
        return self.first.response, self.second.response


@dataclass(frozen=True)
class PairLabels:
    """Of each pair the preference for its first sample, in [0, 1]; None where the judge failed.

    ``usage``: what a language model took.
    """

    preferences: list[float | None]
    usage: Usage | None


def label_pairs(judge: str, pairs: Sequence[SamplePair], options: JudgeOptions, reporter: Reporter) -> PairLabels:
    """Ask a judge about each pair. A language model sees both orders, and its label is the mean preference of both.

    Raises what :func:`toolkit.judging.judge.judge_pairs` raises.
    """
    numbers = [str(number) for number in range(len(pairs))]
    sides = {"first": [pair.first for pair in pairs], "second": [pair.second for pair in pairs]}
    responses = PolicyResponses(
        numbers,
        [pair.prompt for pair in pairs],
        {name: [[sample.response] for sample in samples] for name, samples in sides.items()},
        ids={name: [[sample.response_ids] for sample in samples] for name, samples in sides.items()},
        truncated={name: [[sample.truncated] for sample in samples] for name, samples in sides.items()},
    )
    judgements, usage = judge_pairs(judge, [("first", "second")], responses, options, reporter)
    orders: dict[str, list[float | None]] = {number: [] for number in numbers}
    for judgement in judgements:
        orders[judgement.prompt_id].append(judgement.preference)
    return PairLabels([mean_of_all(of_pair) for of_pair in orders.values()], usage)


def label_by_principles(labelling: Labelling, pairs: Sequence[SamplePair], reporter: Reporter) -> PairLabels:
    """Ask a language model about each pair by the principles of ``labelling``.

    Raises what :func:`toolkit.judging.principles.label_rows` raises.
    """
    labelled = label_rows([(pair.prompt, pair.texts) for pair in pairs], labelling, reporter)
    # A row has the two texts of its pair in their order. Failed pairs have no row.
    known = {(row.prompt_id, *row.responses): pair.p for row in labelled.rows for pair in splits.pairs(row)}
    preferences = [known.get((pair.first.prompt_id, *pair.texts)) for pair in pairs]
    return PairLabels(preferences, labelled.usage)
