"""Runs the stages of a recipe that are not there yet, and keeps the run folder's own files up to date."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.engine.facts import PEAK_FILE, compute, peak_memory
from toolkit.errors import RecipeError, StoreError
from toolkit.evals.implicit_reward import defined_by
from toolkit.files import copy_whole, read_json, write_json, write_text
from toolkit.judging.records import check_recorded_names
from toolkit.judging.templates import check_template_of
from toolkit.models.remote_code import remote_code, remote_code_allowed
from toolkit.preferences.solutions import solutions_from_parquet
from toolkit.preferences.tables import from_parquet
from toolkit.progress import Reporter, RunLog, Trackers, duration
from toolkit.recipe.arms import planned_differences
from toolkit.recipe.files import LoadedRecipe, resolved_yaml
from toolkit.recipe.rounds import kind_of
from toolkit.recipe.schema import Recipe
from toolkit.runs.attempts import AttemptsClock
from toolkit.runs.facts import machine, versions
from toolkit.runs.kinds import RUN_FILES, refuse_others_folder
from toolkit.runs.launch import Launch, accelerate_launch, check_sharded, launch_of
from toolkit.runs.machines import announce, follow, leading
from toolkit.runs.plan import PlannedStage, plan_stages, stages_to_run
from toolkit.runs.precision import slow_precision
from toolkit.runs.reward_data import check_reward_data, needs_check
from toolkit.runs.rounds import check_labelled_data, check_labelling, labels_in_all, labels_spent
from toolkit.runs.store import (
    ATTEMPTS_FILE,
    MANIFEST_FILE,
    RECIPE_FILE,
    REPORT_FILE,
    RESULTS_FILE,
    SCHEMA_VERSION,
    TABLES,
    RunFolder,
)
from toolkit.stages.contexts import Context, to_json
from toolkit.storage.collecting import imports_left_out
from toolkit.storage.integrity import described, write_sealed

# Less than this is left on a full disk. Then the first error is the one to tell, and nothing more is written.
FULL_DISK_BYTES = 1 << 20
TRAINED = "response_tokens_trained"
# Runs a stage by its name, with its context and inputs, in its work folder, and returns its metrics.
Runner = Callable[[str, Context, dict[str, Path], Path, Reporter], dict[str, Any]]


@dataclass(frozen=True)
class RunOptions:
    """What a command asks of a run, beside the recipe.

    ``only`` and ``until`` name stages; ``target`` names one that runs with what it reads, and without the other arm.
    ``force`` runs stages again that are done; with ``only`` that one alone. ``reuse`` are other run folders whose equal
    stages are taken over. ``say_reused=False`` leaves out the lines about stages that are there. ``launch`` are
    arguments of ``accelerate launch`` for the stages that train, sample or score. ``command`` is recorded in the
    manifest. ``before_stage`` is called before a stage's code is imported, so that a run whose stages are all there
    imports none of it.
    """

    only: str | None = None
    until: str | None = None
    target: str | None = None
    force: bool = False
    reuse: Sequence[Path] = ()
    say_reused: bool = True
    launch: Sequence[str] = ()
    command: Sequence[str] = ()
    before_stage: Callable[[], None] = lambda: None


def run(loaded: LoadedRecipe, out: Path, reporter: Reporter, options: RunOptions | None = None) -> dict[str, Any]:
    """Run what is not there yet, and return the manifest. Raises a DuelError for what the user can mend.

    On another machine than the main one it joins the stages that run there.
    """
    options = options or RunOptions()
    launch = launch_of(options.launch)
    if launch.machine_rank:
        follow(out, options.launch, launch, reporter)
        return read_json(out / MANIFEST_FILE)
    with remote_code(loaded.recipe.model.trust_remote_code):
        return _run(loaded, out, reporter, options, launch)


def _run(loaded: LoadedRecipe, out: Path, reporter: Reporter, options: RunOptions, launch: Launch) -> dict[str, Any]:
    recipe, processes = loaded.recipe, launch.processes
    check_trackers(recipe.report_to)
    folder, log, trackers = RunFolder(out), RunLog(out), Trackers(tuple(recipe.report_to), recipe.name, out)
    refuse_others_folder(out, "run", RUN_FILES)
    with folder.lock(), leading(out, launch):
        note_earlier_layout(folder, reporter)
        write_text(out / RECIPE_FILE, resolved_yaml(loaded))
        stages = plan_stages(loaded, folder, processes, sharded=launch.sharding is not None)
        names = stages_to_run(stages, options.only, options.until, options.target)
        for name in names:  # before hours of training
            if lost := folder.set_aside_recordless(name):
                reporter.line(lost)
            folder.refuse_foreign(name)
        check_settings(loaded, stages, names, options, launch)
        if (slow := slow_precision(loaded)) and set(missing(stages, names, options)) - {"data", "report"}:
            reporter.once(slow)
        with recorded(out, new_manifest(loaded, stages, options.command, processes, options.launch)) as manifest:
            manifest["files"] = {RECIPE_FILE: described(out / RECIPE_FILE)}
            for number, planned in enumerate(stages, start=1):
                name, position = planned.spec.name, f"{number}/{len(stages)}"
                if name in names:
                    with reporter.in_stage(name, position=position, log=log, trackers=trackers) as stage_reporter:
                        complete(planned, folder, stage_reporter, options)
                enter(planned, folder, loaded, manifest)  # also one that was not asked for, and is there
                if name == "data":
                    check_data(recipe, folder.stage_dir("data"), stages_to_come(stages, names, options))
            manifest["status"] = "done" if len(manifest["stages"]) == len(stages) else "partial"
    return manifest


def check_settings(
    loaded: LoadedRecipe, stages: Sequence[PlannedStage], names: Sequence[str], options: RunOptions, launch: Launch
) -> None:
    """Raises RecipeError for what the stages that run would stumble over later, hours later perhaps."""
    recipe = loaded.recipe
    if "evaluate" in names:
        check_recorded_names(recipe.evaluate.judges)
        check_template_of(recipe.evaluate.judges, recipe.evaluate.judge.template)
    if recipe.rounds is not None and any(kind_of(name) == "labels" for name in names):
        check_labelling(recipe.rounds)
    if launch.sharding is not None:
        check_sharded(recipe, missing(stages, names, options))


def missing(stages: Sequence[PlannedStage], names: Sequence[str], options: RunOptions) -> list[str]:
    """Those of these stages that have no result, or have to run in any case."""
    return [stage.spec.name for stage in stages if stage.spec.name in names and will_run(stage, options)]


def will_run(planned: PlannedStage, options: RunOptions) -> bool:
    """Whether a stage that is asked for has to run."""
    return forced(planned.spec.name, options) or planned.state.status not in ("cached", "shelved")


def forced(name: str, options: RunOptions) -> bool:
    """Whether a stage runs although it is there: what a single named stage reads only comes from the shelf."""
    return options.force and options.only in (None, name)


def stages_to_come(stages: Sequence[PlannedStage], names: Sequence[str], options: RunOptions) -> set[str]:
    """Names of the stages without a result that run now, or behind ``until`` in a later run."""
    asked = names if options.only or options.target else [planned.spec.name for planned in stages]
    without = (planned.spec.name for planned in stages if planned.state.status not in ("cached", "shelved"))
    return {name for name in without if name in asked}


def check_data(recipe: Recipe, data: Path, to_come: Collection[str]) -> None:
    """Raises a DuelError where a stage ``to_come`` would refuse the training data, before the stages ahead of it train.

    ``data`` is the folder of the data stage.
    """
    if recipe.rounds is not None and any(kind_of(name) == "labels" for name in to_come):
        check_labelled_data(recipe.rounds, from_parquet(data / "train.parquet"))
    if "reward_model" in to_come and needs_check(recipe.reward_model):
        steps = recipe.reward_model.kind == "process"
        solutions = solutions_from_parquet(data / "train_steps.parquet") if steps else []
        check_reward_data(recipe, from_parquet(data / "train.parquet"), solutions)


def check_trackers(names: Sequence[str]) -> None:
    """Raises RecipeError where a tracker's package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise RecipeError(f"{name} is not installed", where="report_to", fix=f"pip install 'rlhf-duel[{name}]'")


def note_earlier_layout(folder: RunFolder, reporter: Reporter) -> None:
    """Say what happens to the stages of an earlier duel. Raises StoreError for a layout that is not known."""
    if (earlier := folder.earlier_version()) is not None:
        reporter.line(
            f"an earlier duel wrote this run folder (layout {earlier}, now {SCHEMA_VERSION}): its stages run "
            f"again, and their earlier results are kept in {folder.root / '.shelf'}"
        )


def new_manifest(
    loaded: LoadedRecipe,
    stages: Sequence[PlannedStage],
    command: Sequence[str],
    processes: int = 1,
    launch: Sequence[str] = (),
) -> dict[str, Any]:
    """The manifest of a run that begins, whose training stages ``processes`` share, started with ``launch``."""
    return {
        "schema_version": SCHEMA_VERSION,
        "name": loaded.recipe.name,
        "status": "running",
        "command": list(command),
        "recipe": loaded.recipe.model_dump(mode="json"),
        "origins": {key: origin for key, origin in loaded.origins.items() if origin != "default"},
        "keys": {planned.spec.name: planned.key for planned in stages},
        "seed": loaded.recipe.seed,
        "processes": processes,
        "launch": list(launch),
        "implicit_reward": defined_by({"loss_type": loaded.recipe.dpo.loss_type}, loaded.recipe.dpo.beta).words,
        "arm_differences": [difference.as_dict() for difference in planned_differences(loaded.recipe)],
        "versions": versions(),
        "machine": machine(),
        "started": time.time(),
        "stages": {},
    }


@contextmanager
def recorded(out: Path, manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Writes the manifest at the start, and at the end with the status: what is set inside, interrupted or failed."""
    write_sealed(out / MANIFEST_FILE, manifest)
    try:
        yield manifest
    except BaseException as error:
        manifest["status"] = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        raise
    finally:
        manifest["finished"] = time.time()
        if shutil.disk_usage(out).free > FULL_DISK_BYTES:
            write_sealed(out / MANIFEST_FILE, manifest)


# ---------------------------------------------------------------- one stage


def complete(planned: PlannedStage, folder: RunFolder, reporter: Reporter, options: RunOptions) -> None:
    """Leave the stage finished in the run folder: as it is, from the shelf, from another run, or by running it."""
    name, key = planned.spec.name, planned.key
    state = folder.state(name, key, planned.fields, folder.digests(planned.inputs))
    if state.damage:
        reporter.line(f"damaged, and computed again: {state.damage}")
    again = forced(name, options)
    if not again and (where := reused(planned, folder, state.status, options)):
        if options.say_reused:
            reporter.line(where)
        return
    if state.changed:
        settings = [field for field in state.changed if not field.startswith("input ")]
        reporter.line("runs again, changed: " + ", ".join(settings or state.changed))
    work = folder.work_dir(name, key)
    if again:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    record = run_and_measure(planned, folder, work, reporter, options)
    folder.finish(name, key, record, planned.inputs)
    several = f" (the largest of {n} processes)" if (n := record["metrics"].get("processes", 1)) > 1 else ""
    reporter.line(f"done in {duration(record['wall_s'])}, peak {record['peak_gib']:.2f} GiB{several}")


def reused(planned: PlannedStage, folder: RunFolder, status: str, options: RunOptions) -> str:
    """Put the stage into the run folder from wherever it is. Returns where it was; empty if it must run."""
    name, key = planned.spec.name, planned.key
    if status == "cached":
        folder.remove_to_resume(name)
        return "cached"
    if status == "shelved":
        folder.unshelve(name, key)
        return "cached (an earlier result with these settings)"
    if folder.take_finished(name, key, planned.inputs):
        return "cached (it had ended when the run was stopped)"
    taken = folder.adopt(name, key, list(options.reuse), planned.inputs)
    return "taken from another run with the same settings" if taken else ""


def run_and_measure(
    planned: PlannedStage, folder: RunFolder, work: Path, reporter: Reporter, options: RunOptions
) -> dict[str, Any]:
    """Run a stage in its work folder; returns its record. The time of attempts that were interrupted counts."""
    name = planned.spec.name
    shared = planned.spec.trains or planned.spec.shares
    runner = launched(options.launch) if options.launch and shared else in_this_process(options.before_stage)
    inputs = {role: folder.stage_dir(stage) for role, stage in planned.reads.items()}
    inputs |= {document: folder.root / document for document in planned.spec.documents}
    started = time.time()
    with peak_memory() as peak, AttemptsClock(work / ATTEMPTS_FILE) as clock:
        metrics = runner(name, planned.context, inputs, work, reporter)
    return {
        "fields": planned.fields,
        "arm": planned.spec.arm,
        "started": started,
        "wall_s": round(clock.seconds(), 3),
        "peak_gib": round(metrics.pop("peak_gib", peak.gib), 3),  # of launched processes, theirs
        "tokens": int(metrics.pop("tokens", 0)),
        "versions": versions(),
        "compute": metrics.pop("compute", {}),
        "metrics": metrics,
    }


def in_this_process(before_stage: Callable[[], None]) -> Runner:
    """Runs a stage here, its code imported after ``before_stage`` was called."""

    def run_here(
        stage: str, context: Context, inputs: dict[str, Path], work: Path, reporter: Reporter
    ) -> dict[str, Any]:
        before_stage()
        compute()  # what was loaded before is not this stage's
        module = importlib.import_module(f"toolkit.stages.{kind_of(stage)}")
        with imports_left_out():
            metrics = module.run(context, inputs, work, reporter)
        return {**metrics, "compute": compute()}

    return run_here


def launched(arguments: Sequence[str]) -> Runner:
    """Runs a stage under ``accelerate launch`` with these arguments, its processes sharing the work."""

    def run_launched(
        stage: str, context: Context, inputs: dict[str, Path], work: Path, reporter: Reporter
    ) -> dict[str, Any]:
        file, answer = work / "request.json", work / "answer.json"
        trackers, launch = reporter.trackers, launch_of(arguments)
        request = {
            "stage": stage,
            "context": to_json(context),
            "inputs": {name: str(path.resolve()) for name, path in inputs.items()},
            "trackers": {"names": trackers.names, "run_name": trackers.run_name},
            "processes": launch.processes,
            "sharding": launch.sharding,
            "trust_remote_code": remote_code_allowed(),
        }
        write_json(file, request)
        _peaks(work)  # those of an attempt that was killed
        announce(work.parents[1], file, launch)
        code = accelerate_launch(arguments, "toolkit.stages", [str(file.resolve())])
        if code or not answer.is_file():
            raise StoreError(
                f"accelerate launch ended with exit code {code}",
                where=" ".join([*arguments, stage]),
                fix="see its messages above",
            )
        metrics = read_json(answer)
        file.unlink()
        answer.unlink()
        peaks = _peaks(work)
        return {**metrics, "peak_gib": max(peaks)} if peaks else dict(metrics)

    return run_launched


def _peaks(work: Path) -> list[float]:
    """The peak memory of each launched process, in GiB; their files are removed."""
    files = list(work.glob(PEAK_FILE.format("*")))
    peaks = [float(read_json(file)["peak_gib"]) for file in files]
    for file in files:
        file.unlink()
    return peaks


# ---------------------------------------------------------------- the run folder's own files


def enter(planned: PlannedStage, folder: RunFolder, loaded: LoadedRecipe, manifest: dict[str, Any]) -> None:
    """Enter a stage that is there into the manifest, and put what the user looks for at the top of the run folder."""
    stage = planned.spec.name
    record = folder.record(stage)
    digests = folder.digests(planned.inputs)
    if record is not None and folder.state(stage, planned.key, planned.fields, digests).status == "cached":
        entry = {name: value for name, value in record.items() if name not in ("metrics", "inputs", "files")}
        if TRAINED in record["metrics"]:
            entry[TRAINED] = record["metrics"][TRAINED]
        if spent := labels_spent(record["metrics"]):
            entry["labels"] = spent
        entry["outputs"] = outputs(record)
        manifest["stages"][stage] = entry
        if stage == "evaluate":
            publish(folder, loaded, manifest)
            manifest["files"] |= {name: described(folder.root / name) for name in (*TABLES, RESULTS_FILE)}
        if stage == "report":
            copy_whole(folder.stage_dir("report") / REPORT_FILE, folder.root / REPORT_FILE)
    write_sealed(folder.root / MANIFEST_FILE, manifest)


def outputs(record: Mapping[str, Any]) -> dict[str, str]:
    """File -> SHA-256 of a stage's weights and tables: its other files hold times, too."""
    files = record.get("files") or {}
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith((".safetensors", ".parquet"))}


def publish(folder: RunFolder, loaded: LoadedRecipe, manifest: dict[str, Any]) -> None:
    """Put the evaluation's tables and ``results.json`` at the top of the run folder.

    The manifest gets the arms' differences as they were measured, in place of those that the recipe plans.
    """
    evaluated = folder.stage_dir("evaluate")
    for table in TABLES:
        copy_whole(evaluated / table, folder.root / table)
    results = {"schema_version": SCHEMA_VERSION, **read_json(evaluated / "evaluation.json")}
    manifest["arm_differences"] = results["arm_differences"]
    differences = [difference["sentence"] for difference in results["arm_differences"] if difference["differs"]]
    results["warnings"] = [*results["warnings"], *differences]
    results["recipe"] = loaded.recipe.model_dump(mode="json")
    results["cost"] = cost(manifest["stages"]) | {"judges": results.pop("judge_usage", [])}
    write_json(folder.root / RESULTS_FILE, results)


def cost(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Seconds, tokens and peak memory by stage, and by arm (an arm's own stages; shared ones apart).

    A stage counts in ``tokens`` what it works on, which differs from stage to stage: the sum of an arm says how much
    work was counted, and does not compare the arms. ``response_tokens_trained`` of an arm does: a response token counts
    once for each training pass over it. It is None where a stage has no record of it.
    """
    rows = [
        {"stage": name, "arm": s["arm"], "wall_s": s["wall_s"], "tokens": s["tokens"], "peak_gib": s["peak_gib"]}
        for name, s in stages.items()
        if name != "report"
    ]
    arms = {}
    for arm in ("shared", "rm_ppo", "dpo", "rft"):
        of_arm = [row for row in rows if row["arm"] == arm]
        if arm == "rft" and not of_arm:  # only a recipe with this baseline has it
            continue
        arms[arm] = {
            "wall_s": round(sum(row["wall_s"] for row in of_arm), 3),
            "tokens": sum(row["tokens"] for row in of_arm),
            "peak_gib": max((row["peak_gib"] for row in of_arm), default=0.0),
            TRAINED: _response_tokens_trained([stages[row["stage"]] for row in of_arm]),
        }
    labels = labels_in_all(stages)
    # "fields" has what a stage read: DPO reads the reward model where that labels its samples
    reads_rm = "input reward_model" in stages.get("dpo", {}).get("fields", {})
    sentence = cost_sentence(arms, dpo_reads_rm=reads_rm)
    return {"stages": rows, "arms": arms, "sentence": sentence} | ({"labels": labels} if labels else {})


def _response_tokens_trained(stages: Sequence[Mapping[str, Any]]) -> int | None:
    if not stages or any(TRAINED not in stage for stage in stages):
        return None
    return sum(int(stage[TRAINED]) for stage in stages)


def cost_sentence(arms: Mapping[str, Mapping[str, Any]], *, dpo_reads_rm: bool = False) -> str:
    """What the arms took, without what they share. The tokens are left out where those of an arm are not known.

    ``dpo_reads_rm``: the reward model, whose cost is counted with RM + PPO, labels DPO's samples.

    >>> ppo = {"wall_s": 230.0, "response_tokens_trained": 51_000}
    >>> dpo = {"wall_s": 40.0, "response_tokens_trained": 900}
    >>> seconds, tokens = cost_sentence({"rm_ppo": ppo, "dpo": dpo}).split(". ")
    >>> seconds
    'RM + PPO took 230 s (its reward model included), DPO 40 s'
    >>> tokens
    'They trained on 51,000 and 900 response tokens (each pass counts).'
    >>> cost_sentence({"rm_ppo": ppo | {"response_tokens_trained": None}, "dpo": dpo})
    'RM + PPO took 230 s (its reward model included), DPO 40 s.'
    >>> cost_sentence({"rm_ppo": ppo | {"response_tokens_trained": None}, "dpo": dpo}, dpo_reads_rm=True)
    'RM + PPO took 230 s (its reward model included), DPO 40 s beside the same reward model, which labels its samples.'
    """
    ppo, dpo = (arms[arm] for arm in ("rm_ppo", "dpo"))
    beside = " beside the same reward model, which labels its samples" if dpo_reads_rm else ""
    sentence = f"RM + PPO took {ppo['wall_s']:,.0f} s (its reward model included), DPO {dpo['wall_s']:,.0f} s{beside}."
    tokens = [arm[TRAINED] for arm in (ppo, dpo)]
    if None in tokens:
        return sentence
    return f"{sentence} They trained on {tokens[0]:,} and {tokens[1]:,} response tokens (each pass counts)."
