"""``duel study RECIPE``: train both arms' trials, choose on dev prompts, compare on test prompts.

The folder of a study has ``trials/``, a run folder for each trial with its policies' scores; ``table.parquet`` with all
scores; ``study.json`` and ``report.html`` with what they say. A second call goes on where the first one stopped.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from statistics import fmean
from typing import Any

from toolkit.errors import ModelError, RecipeError
from toolkit.evals.judge_tests import failed_tests
from toolkit.evals.study.selection import DevResult, on_dev, rule_of
from toolkit.evals.study.study import study
from toolkit.evals.study.table import read_study, study_data
from toolkit.evals.verdict import ARMS, NAMES
from toolkit.files import write_json, write_table, write_text
from toolkit.models.remote_code import remote_code
from toolkit.preferences.tables import from_parquet
from toolkit.progress import Reporter, RunLog
from toolkit.recipe.files import resolved_yaml
from toolkit.report.study_page import study_page, study_title
from toolkit.runs import pipeline
from toolkit.runs.engines import Engine, TaskResources, engine_of
from toolkit.runs.facts import machine, versions
from toolkit.runs.kinds import STUDY_FILES, refuse_others_folder
from toolkit.runs.pipeline import RunOptions
from toolkit.runs.store import RECIPE_FILE, REPORT_FILE, STUDY_FILE, TABLE_FILE, TRIALS_FILE, RunFolder
from toolkit.runs.study.measuring import Held, failed_rows, held_out, judge_tests, judges_of, tasks
from toolkit.runs.study.training import Failure, train
from toolkit.runs.study.trials import StudyPlan, Trial
from toolkit.storage.integrity import write_sealed

Row = dict[str, Any]


def run_study(
    plan: StudyPlan,
    reporter: Reporter,
    *,
    engine: str = "local",
    resources: TaskResources | None = None,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """Run what is not there yet, and return ``study.json``.

    Raises what a run raises; RecipeError where every trial of an arm failed; DataError where the held-out prompts do
    not make two splits.
    """
    with remote_code(plan.base.recipe.model.trust_remote_code):
        return _run_study(plan, reporter, engine, resources, command)


def _run_study(
    plan: StudyPlan,
    reporter: Reporter,
    engine: str,
    resources: TaskResources | None,
    command: Sequence[str],
) -> dict[str, Any]:
    started = time.time()
    trials, sft_trials = plan.trials(), plan.sft_trials()
    plan.control_trials({arm: next(trial for trial in trials if trial.arm == arm) for arm in ARMS})  # are they valid?
    refuse_others_folder(plan.out, "study", STUDY_FILES)
    with RunFolder(plan.out).lock(), engine_of(engine, resources) as running:
        write_text(plan.out / RECIPE_FILE, resolved_yaml(plan.base))
        _write_trials(plan, [*sft_trials, *trials], started)
        reporter = Reporter(stage="study", log=RunLog(plan.out), display=reporter.display)
        first = sft_trials[0]
        pipeline.run(first.loaded, first.folder, reporter, RunOptions(target="data", say_reused=False, command=command))
        held, rows = held_out(first.folder / "data", plan)
        judges = judges_of(plan, rows)
        measuring = Measuring(running, reporter, held, judges, sft_trials)
        failures = train([*sft_trials, *trials], running, reporter, retries=plan.section.retries, command=command)
        _refuse_without_policies(trials, failures)
        tests = judge_tests(first, judges, [row for row in rows if row.prompt_id in set(held.dev)], reporter)
        refused, evaluate = failed_tests(tests), plan.base.recipe.evaluate
        table = measuring.rows([(trial, None) for trial in [*sft_trials, *trials]], "dev", failures)
        on_both = study_data(_columns([row for row in table if row["arm"] in ARMS]), splits=("dev",))
        on_both = replace(on_both, refused=refused, primary_judge=evaluate.primary_judge)
        results = on_dev(on_both, ARMS, rule_of(on_both, plan.section.select_by, plan.section.kl_limit))
        chosen = {arm: _trial_of(trials, arm, results[arm].chosen[0]) for arm in ARMS}
        length = _length(table, chosen["rm_ppo"], results["rm_ppo"].chosen[1])
        controls = plan.control_trials(chosen, length)
        settings = {arm: trial.setting for arm, trial in chosen.items()}
        _write_trials(plan, [*sft_trials, *trials, *controls], started, chosen=settings, length=length)
        others = [*trials, *sft_trials]
        failures |= train(controls, running, reporter, retries=plan.section.retries, others=others, command=command)
        table += measuring.rows([(trial, None) for trial in controls], "dev", failures)
        whole: list[tuple[Trial, list[int] | None]] = [(trial, None) for trial in [*sft_trials, *controls]]
        table += measuring.rows(whole + _needed(trials, results), "test", failures)
    write_table(table, plan.out / TABLE_FILE)
    document = study(
        replace(read_study(plan.out / TABLE_FILE), refused=refused, primary_judge=evaluate.primary_judge),
        kl_limit=plan.section.kl_limit,
        select_by=plan.section.select_by,
        kl_grid=plan.section.kl_grid,
        smallest_effect=evaluate.smallest_effect,
        recipe=plan.base.recipe.model_dump(mode="json"),
    )
    document["judge_tests"] = [asdict(test) for test in tests.values()]
    n_train = len(from_parquet(first.folder / "data" / "train.parquet"))
    document["splits"] = {"train": {"n_prompts": n_train}} | document["splits"]
    failed = {trial.label: str(failures[trial.name]) for trial in [*trials, *controls] if trial.name in failures}
    shows = ["the recipe only shows that everything runs: its verdict means nothing"]
    document["warnings"] = [
        *(shows if plan.base.recipe.evaluate.demonstration else []),
        *(f"{label}: {why}; it counts as the worst policy" for label, why in failed.items()),
        *_broken(table),
        *measuring.warnings(),
        *document["warnings"],
    ]
    document["provenance"] = {
        "command": list(command),
        "engine": engine,
        "started": started,
        "finished": time.time(),
        "versions": versions(),
        "machine": machine(),
    }
    write_sealed(plan.out / STUDY_FILE, document)
    write_text(plan.out / REPORT_FILE, study_page(document, study_title(document, plan.out)))
    return document


def _broken(table: Sequence[Row]) -> list[str]:
    """A sentence for each policy whose samples are garbage."""
    policies = {(row["arm"], row["setting"], row["seed"], row["checkpoint"]): row["broken"] for row in table}
    return [
        f"{arm} {setting}, seed {seed}, checkpoint {checkpoint} {broken}; it counts as the worst policy"
        for (arm, setting, seed, checkpoint), broken in policies.items()
        if broken
    ]


def _write_trials(plan: StudyPlan, trials: Sequence[Trial], started: float, **chosen: Any) -> None:
    """For those who watch: what the study trains. Controls are known once the arms have their ``chosen`` settings."""
    facts = ("name", "arm", "setting", "seed", "stage", "n_checkpoints")
    rows = [{fact: getattr(trial, fact) for fact in facts} for trial in trials]
    write_json(plan.out / TRIALS_FILE, {"recipe": plan.base.recipe.name, "started": started, "trials": rows, **chosen})


class Measuring:
    """Rows of the table, measured by an engine's tasks."""

    def __init__(
        self, engine: Engine, reporter: Reporter, held: Held, judges: Sequence[str], sft_trials: Sequence[Trial]
    ) -> None:
        self.engine, self.reporter, self.held, self.judges, self.sft_trials = engine, reporter, held, judges, sft_trials
        self.n_asked = 0  # of each judge: a policy's responses to a prompt
        self.n_answered = dict.fromkeys(judges, 0)
        self.said: list[str] = []

    def rows(
        self, wanted: Sequence[tuple[Trial, Sequence[int] | None]], split: str, failures: Mapping[str, Failure]
    ) -> list[Row]:
        """The rows of these trials' policies at these checkpoints (None: all) on a split, those of failures too.

        The SFT policies come first: the others are compared with their samples.
        """
        table: list[Row] = []
        alive = [(trial, checkpoints) for trial, checkpoints in wanted if trial.name not in failures]
        of_sft = [item for item in alive if item[0] in self.sft_trials]
        others = [item for item in alive if item[0] not in self.sft_trials]
        for label, items in ((f"sft on {split} prompts", of_sft), (f"policies on {split} prompts", others)):
            work = tasks(items, split, self.held, self.judges, self.sft_trials)
            for task, outcome in zip(work, self.engine.run(label, work, self.reporter), strict=True):
                if outcome.died is not None:
                    raise RuntimeError(f"{task.label}, on {split} prompts: {outcome.died}")
                table += outcome.value
        self._count(alive, split, table)
        table += self._silent(alive, split, table)
        for trial, _ in wanted:
            if trial.name in failures:
                every = range(1, trial.n_checkpoints + 1)
                table += failed_rows(trial, split, self.held, self.judges, every)
        return table

    def _count(self, measured: Sequence[tuple[Trial, Sequence[int] | None]], split: str, table: Sequence[Row]) -> None:
        """Count what each judge was asked and answered. Raises ModelError for a judge that answered nothing."""
        n_policies = sum(t.n_checkpoints if checkpoints is None else len(checkpoints) for t, checkpoints in measured)
        self.n_asked += n_policies * len(self.held.of(split))
        for row in table:
            self.n_answered[row["judge"]] += 1
        for judge, n in self.n_answered.items():
            if n == 0 and self.n_asked:
                raise ModelError(
                    f"the judge {judge} gave no answer on any of {self.n_asked} responses",
                    where="evaluate.judges",
                    fix="mend it, or name another; everything that was trained and sampled is kept",
                )

    def _silent(
        self, measured: Sequence[tuple[Trial, Sequence[int] | None]], split: str, table: Sequence[Row]
    ) -> list[Row]:
        """Rows without scores of policies that a judge said nothing of, while it answered others: the worst, too."""
        answered = {(row["arm"], row["setting"], row["seed"], row["checkpoint"], row["judge"]) for row in table}
        rows: list[Row] = []
        for trial, checkpoints in measured:
            for checkpoint in checkpoints or range(1, trial.n_checkpoints + 1):
                for judge in self.judges:
                    if (trial.arm, trial.setting, trial.seed, checkpoint, judge) not in answered:
                        policy = f"{trial.label}, checkpoint {checkpoint}"
                        self.said.append(f"{policy}: the judge {judge} gave no answer on {split} prompts")
                        rows += failed_rows(trial, split, self.held, [judge], [checkpoint])
        return rows

    def warnings(self) -> list[str]:
        """What judges did not answer."""
        return [f"{text}; it counts as the worst policy" for text in self.said] + [
            f"the judge {judge} failed on {self.n_asked - n:,} of {self.n_asked:,} responses: they are asked again "
            "when you run the command again"
            for judge, n in self.n_answered.items()
            if n < self.n_asked
        ]


def _refuse_without_policies(trials: Sequence[Trial], failures: Mapping[str, Failure]) -> None:
    for arm in ARMS:
        of_arm = [trial for trial in trials if trial.arm == arm]
        if all(trial.name in failures for trial in of_arm):
            raise RecipeError(
                f"every trial of {NAMES[arm]} failed, so that there is nothing to compare: {failures[of_arm[0].name]}",
                where=f"{len(of_arm)} trials",
                fix="change the search space, lower learning rates for instance",
            )


def _trial_of(trials: Sequence[Trial], arm: str, setting: str) -> Trial:
    return next(trial for trial in trials if (trial.arm, trial.setting) == (arm, setting))


def _length(table: Sequence[Row], trial: Trial, checkpoint: int) -> float:
    """The mean number of tokens that a setting's policies of a checkpoint write on dev prompts."""
    of_policy = [row for row in table if (row["arm"], row["setting"]) == (trial.arm, trial.setting)]
    return fmean(row["n_tokens"] for row in of_policy if row["checkpoint"] == checkpoint and row["n_tokens"])


def _needed(trials: Sequence[Trial], results: Mapping[str, DevResult]) -> list[tuple[Trial, list[int] | None]]:
    """The trials with those checkpoints that the verdict needs on test prompts."""
    wanted = []
    for trial in trials:
        checkpoints = [checkpoint for setting, checkpoint in results[trial.arm].needed if setting == trial.setting]
        if checkpoints:
            wanted.append((trial, checkpoints))
    return list(wanted)


def _columns(table: Sequence[Row]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in table] for name in table[0]}
