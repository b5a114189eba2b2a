"""The comparison of the arms at ``evaluate.temperatures``, beside the one that the verdict rests on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from toolkit.engine.distributed import main_process
from toolkit.evals.intervals import BootstrapOptions
from toolkit.evals.temperatures import COMPARED, side_by_side, temperature_entry
from toolkit.evals.verdict import Judging
from toolkit.judging import win_rates
from toolkit.judging.llm import Usage
from toolkit.judging.records import POOLED, Judgement, write_judgements
from toolkit.measure.judged_policies import judge_all
from toolkit.measure.policies import EvaluationSettings, Policy, samples_of
from toolkit.measure.scores import with_kl
from toolkit.models.resolve import ModelRef
from toolkit.preferences.samples import SAMPLES_FILE, Sample, write_samples
from toolkit.progress import Reporter

NO_JUDGE = "at further temperatures no judge was asked: none that decides can judge new samples"


def temperature_folder(out: Path, temperature: float) -> Path:
    """Where ``samples.parquet`` and ``judgements.parquet`` of a further temperature go."""
    return out / "temperatures" / f"{temperature}"


def further_samples(
    policies: Sequence[Policy],
    settings: EvaluationSettings,
    sft: ModelRef,
    out: Path,
    has_gold: bool,
    reporter: Reporter,
) -> dict[float, list[Sample]]:
    """Samples of SFT and both arms at each of ``evaluate.temperatures``, with their KL at that temperature.

    Writes the table of each temperature. What an interrupted evaluation has drawn is not drawn again.
    """
    n = settings.section.samples_per_prompt
    compared = [replace(policy, n_samples=n) for policy in policies if policy.name in COMPARED]
    sampled = {}
    for temperature in settings.section.temperatures:
        at, folder = settings.at_further(temperature), temperature_folder(out, temperature)
        drawn = [sample for policy in compared for sample in samples_of(policy, at, folder / "policies", reporter)]
        sampled[temperature] = with_kl(drawn, at, sft, has_gold, reporter)
        if main_process():
            write_samples(sampled[temperature], folder / SAMPLES_FILE)
    return sampled


def deciding_judges(judges: Sequence[str], judging: Judging) -> tuple[list[str], list[str]]:
    """The judges that decide and can judge new samples, and warnings about those that cannot.

    The primary judge decides alone where it may decide. Recorded judgements are of other responses.
    """
    files = [judge for judge in judges if judge.startswith("file:")]
    deciding = [judge for judge in judges if judge not in judging.refused and judge not in files]
    primary = judging.primary_judge
    if primary is not None and primary not in judging.refused:
        deciding = [judge for judge in deciding if judge == primary]
    warnings = [f"{file} has no judgements of further temperatures: it is left out there" for file in files]
    return deciding, warnings if deciding else [*warnings, NO_JUDGE]


@dataclass(frozen=True)
class JudgedSamples:
    """Samples of one temperature, and what the judges said about them."""

    samples: Sequence[Sample]
    judgements: Sequence[Judgement]


@dataclass(frozen=True)
class ComparedTemperatures:
    """``temperatures`` of ``evaluation.json``, what the language models took, and the warnings."""

    entries: list[dict[str, Any]]
    usages: list[Usage]
    warnings: list[str]


def compare_temperatures(
    main: JudgedSamples,
    further: Mapping[float, Sequence[Sample]],
    judges: Sequence[str],
    judging: Judging,
    settings: EvaluationSettings,
    out: Path,
    bootstrap: BootstrapOptions,
    reporter: Reporter,
) -> ComparedTemperatures:
    """Ask the judges that decide about the ``further`` samples, and put all temperatures side by side.

    ``main`` has the verdict's temperature. Writes the judgements of each further temperature.
    """
    deciding, warnings = deciding_judges(judges, judging)
    usages = []
    entries = [_entry(settings.section.temperature, main, deciding, bootstrap)]
    for temperature, drawn in further.items():
        asked = judge_all(deciding, drawn, COMPARED, settings.at_further(temperature), reporter)
        write_judgements(asked.judgements, temperature_folder(out, temperature) / "judgements.parquet", bootstrap)
        usages += asked.usages
        entries.append(_entry(temperature, JudgedSamples(drawn, asked.judgements), deciding, bootstrap))
    judge = deciding[0] if len(deciding) == 1 else POOLED
    compared, changes = side_by_side(entries, settings.section.temperature, judge)
    return ComparedTemperatures(compared, usages, [*warnings, *changes])


def _entry(
    temperature: float, judged: JudgedSamples, judges: Sequence[str], bootstrap: BootstrapOptions
) -> dict[str, Any]:
    members = [j for j in judged.judgements if j.judge in judges and {j.policy, j.baseline} <= set(COMPARED)]
    rows = win_rates.win_rates(members, win_rates.RECORDED_CONTROLS, **bootstrap)
    pooled = win_rates.pooled_win_rate(members, judges, **bootstrap) if len(judges) > 1 else None
    rows = sorted([*rows, *([pooled] if pooled is not None else [])], key=lambda row: row.baseline == "sft")
    drawn = [vars(sample) for sample in judged.samples if sample.policy in COMPARED]
    return temperature_entry(temperature, drawn, [row.as_dict() for row in rows], bootstrap)
