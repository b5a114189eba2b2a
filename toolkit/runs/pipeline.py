"""Which stages, in what order, and what is already there."""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import RecipeError, StoreError, nearest
from toolkit.files import (
    code_fingerprint,
    copy_whole,
    file_fingerprint,
    fingerprint,
    folder_fingerprint,
    read_json,
    write_json,
    write_text,
)
from toolkit.models.resolve import resolve
from toolkit.progress import Reporter, duration
from toolkit.recipe.checks import LoadedRecipe, arm_differences, resolved_yaml
from toolkit.recipe.schema import Recipe
from toolkit.runs.launch import accelerate_launch
from toolkit.runs.store import MANIFEST_FILE, RECIPE_FILE, RESULTS_FILE, SCHEMA_VERSION, RunFolder, StageState
from toolkit.stages.contexts import Context, context_of, settings_of, to_json

# Runs a stage by its name: with its context and inputs, in its work folder.
Runner = Callable[[str, Context, dict[str, Path], Path, Reporter], dict[str, Any]]
LAUNCHED = ("sft", "reward_model", "ppo", "dpo")


@dataclass(frozen=True)
class StageSpec:
    """A stage: what it reads, and whose cost it is. Its key changes with its context, its inputs and its code.

    ``inputs`` are stages, ``documents`` files of the run.
    """

    name: str
    arm: str
    inputs: tuple[str, ...] = ()
    documents: tuple[str, ...] = ()


STAGES = (
    StageSpec("data", "shared"),
    StageSpec("sft", "shared", ("data",)),
    StageSpec("reward_model", "rm_ppo", ("data", "sft")),
    StageSpec("ppo", "rm_ppo", ("data", "sft", "reward_model")),
    StageSpec("dpo", "dpo", ("data", "sft")),
    StageSpec("evaluate", "shared", ("data", "sft", "reward_model", "ppo", "dpo")),
    StageSpec(
        "report",
        "shared",
        ("data", "sft", "reward_model", "ppo", "dpo", "evaluate"),
        (RESULTS_FILE, MANIFEST_FILE, RECIPE_FILE),
    ),
)
STAGE_NAMES = tuple(stage.name for stage in STAGES)


@dataclass(frozen=True)
class Plan:
    """A stage with its context, its key, the fields behind the key, and what is on disk."""

    spec: StageSpec
    context: Context
    key: str
    fields: dict[str, Any]
    state: StageState


def plan(loaded: LoadedRecipe, folder: RunFolder) -> list[Plan]:
    """Every stage's key and state. Raises ModelError and DataError for inputs that are not there."""
    keys: dict[str, str] = {}
    out = []
    for spec in STAGES:
        context = context_of(spec.name, loaded.recipe)
        fields: dict[str, Any] = settings_of(context)
        fields["code"] = code_fingerprint(f"toolkit.stages.{spec.name}")
        fields |= {f"input {name}": keys[name] for name in spec.inputs}
        if RECIPE_FILE in spec.documents:  # the other documents say what the stages and the recipe make of them
            fields[f"input {RECIPE_FILE}"] = fingerprint(resolved_yaml(loaded))
        fields |= external(spec, loaded.recipe)
        keys[spec.name] = fingerprint(fields)
        out.append(Plan(spec, context, keys[spec.name], fields, folder.state(spec.name, keys[spec.name], fields)))
    return out


def external(spec: StageSpec, recipe: Recipe) -> dict[str, str]:
    """Fingerprints of what a stage reads from outside the run: data, models, files of judgements."""
    if spec.name == "data":
        found = {"data.source (content)": source_fingerprint(recipe.data.source, recipe.data.revision)}
        if recipe.data.eval_source:
            found["data.eval_source (content)"] = source_fingerprint(recipe.data.eval_source, recipe.data.revision)
        return found
    if spec.name == "sft":
        return {"model (weights)": resolve(recipe.model.name, recipe.model.revision).fingerprint}
    if spec.name == "evaluate":
        found = {}
        for judge in recipe.evaluate.judges:
            kind, _, rest = judge.partition(":")
            if kind == "file":
                found[f"{judge} (content)"] = source_fingerprint(rest, None)
            elif kind in ("rm", "implicit") and rest:
                found[f"{judge} (weights)"] = fingerprint(
                    [resolve(name.strip()).fingerprint for name in rest.split(",")]
                )
        return found
    return {}


def source_fingerprint(source: str, revision: str | None) -> str:
    """Content hash of a file or folder; the commit of a hub data set, where the hub can be asked."""
    from toolkit.preferences.loading import shipped_path

    path = shipped_path(source) or Path(source).expanduser()
    if path.is_file():
        return file_fingerprint(path)
    if path.is_dir():
        return folder_fingerprint(path, ["**/*"])
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) is None or re.search(r"\.(jsonl?|csv|parquet)(\.gz)?$", source):
        return "missing"  # the data stage says so, with the nearest name
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(source, revision=revision).sha)
    except Exception:  # the hub's client raises what its HTTP library does; without an answer the pin has to do
        return revision or "unpinned"


# ---------------------------------------------------------------- running


def run(
    loaded: LoadedRecipe,
    out: Path,
    reporter: Reporter,
    *,
    only: str | None = None,
    until: str | None = None,
    force: bool = False,
    reuse: Sequence[Path] = (),
    launch: Sequence[str] = (),
    command: Sequence[str] = (),
    before_stage: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Run what is not there yet; returns the manifest.

    ``reuse`` are other run folders whose equal stages are taken over; ``launch`` are arguments of ``accelerate launch``
    for the stages in ``LAUNCHED``; ``before_stage`` is called before a stage is imported (a run that is all cached
    imports none). Raises a DuelError for what the user can mend.
    """
    recipe = loaded.recipe
    check_trackers(recipe.report_to)
    reporter.trackers, reporter.run_name = tuple(recipe.report_to), recipe.name
    folder = RunFolder(out)
    with folder.lock():
        if (earlier := folder.earlier_version()) is not None:
            reporter.line(
                f"an earlier duel wrote this run folder (layout {earlier}, now {SCHEMA_VERSION}): its stages run "
                f"again, and their earlier results are kept in {folder.root / '.shelf'}"
            )
        write_text(out / RECIPE_FILE, resolved_yaml(loaded))
        reporter.metrics = out / "metrics.jsonl"
        plans = plan(loaded, folder)
        manifest = new_manifest(loaded, plans, command)
        wanted = select(plans, only, until)
        status = "failed"
        write_json(out / MANIFEST_FILE, manifest)
        try:
            for number, item in enumerate(plans, start=1):
                name = item.spec.name
                reporter.overall = f"{number}/{len(plans)} {name}"
                if name in wanted:
                    runner = launched(launch, recipe) if launch and name in LAUNCHED else here(before_stage)
                    obtain(item, folder, reporter, runner, force=force, reuse=reuse)
                elif only is None:
                    break
                if (record := folder.record(name)) is not None and record["key"] == item.key:
                    manifest["stages"][name] = {k: v for k, v in record.items() if k != "metrics"}
                if name == "evaluate" and name in manifest["stages"]:
                    publish(folder, loaded, manifest)
                if name == "report" and name in manifest["stages"]:
                    copy_whole(folder.stage_dir("report") / "report.html", out / "report.html")
                write_json(out / MANIFEST_FILE, {**manifest, "status": "running"})
            status = "done" if len(manifest["stages"]) == len(plans) else "partial"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            reporter.overall = ""
            manifest["status"] = status
            manifest["finished"] = time.time()
            if shutil.disk_usage(out).free > 1 << 20:  # on a full disk the first error is the one to tell
                write_json(out / MANIFEST_FILE, manifest)
    return manifest


def check_trackers(names: Sequence[str]) -> None:
    """Raises RecipeError where a tracker's package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise RecipeError(f"{name} is not installed", where="report_to", fix=f"pip install 'rlhf-duel[{name}]'")


def select(plans: Sequence[Plan], only: str | None, until: str | None) -> list[str]:
    """Names of the stages to run. Raises RecipeError for unknown names, StoreError where an input is missing."""
    for option, name in (("--only", only), ("--until", until)):
        if name is not None and name not in STAGE_NAMES:
            raise RecipeError(f"there is no stage {name!r}", where=option, fix=nearest(name, STAGE_NAMES))
    if only is not None:
        states = {item.spec.name: item.state.status for item in plans}
        inputs = next(item.spec.inputs for item in plans if item.spec.name == only)
        missing = [name for name in inputs if states[name] not in ("cached", "shelved")]
        if missing:
            raise StoreError(
                f"stage {only!r} needs {', '.join(missing)}, which this recipe has not run yet",
                where="--only",
                fix=f"run with --until {missing[-1]} first",
            )
        return [only, *(name for name in inputs if states[name] == "shelved")]
    return list(STAGE_NAMES[: STAGE_NAMES.index(until) + 1]) if until else list(STAGE_NAMES)


def obtain(
    item: Plan,
    folder: RunFolder,
    reporter: Reporter,
    runner: Runner,
    *,
    force: bool,
    reuse: Sequence[Path],
) -> None:
    """Make one stage be there: cached, from the shelf, from another run, or by running it."""
    name, key = item.spec.name, item.key
    state = folder.state(name, key, item.fields)
    if not force:
        if state.status == "cached":
            reporter.line("cached")
            return
        if state.status == "shelved":
            folder.unshelve(name, key)
            reporter.line("cached (an earlier result with these settings)")
            return
        if folder.adopt(name, key, list(reuse)):
            reporter.line("taken from another run with the same settings")
            return
    if state.changed:
        shown = [field for field in state.changed if not field.startswith("input ")] or list(state.changed)
        reporter.line("runs again, changed: " + ", ".join(shown))
    work = folder.work_dir(name, key)
    if force:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    attempts = work / "attempts.json"
    before = read_json(attempts)["wall_s"] if attempts.is_file() else 0.0
    inputs = {stage: folder.stage_dir(stage) for stage in item.spec.inputs}
    inputs |= {document: folder.root / document for document in item.spec.documents}
    started, clock = time.time(), time.monotonic()
    with peak_memory() as peak:
        try:
            metrics = runner(name, item.context, inputs, work, reporter)
        except BaseException:
            if work.is_dir() and shutil.disk_usage(work).free > 1 << 20:
                write_json(attempts, {"wall_s": before + time.monotonic() - clock})
            raise
    attempts.unlink(missing_ok=True)
    shutil.rmtree(work / "trainer", ignore_errors=True)  # the trainer's checkpoints served resuming alone
    wall = before + time.monotonic() - clock
    record = {
        "fields": item.fields,
        "arm": item.spec.arm,
        "started": started,
        "wall_s": round(wall, 3),
        "peak_gib": round(peak[0], 3),
        "tokens": int(metrics.pop("tokens", 0)),
        "versions": versions(),
        "metrics": metrics,
    }
    folder.finish(name, key, record)
    reporter.line(f"done in {duration(wall)}, peak {peak[0]:.2f} GiB")


def here(before_stage: Callable[[], None]) -> Runner:
    """Run a stage in this process."""

    def run_here(
        stage: str, context: Context, inputs: dict[str, Path], work: Path, reporter: Reporter
    ) -> dict[str, Any]:
        before_stage()
        metrics = importlib.import_module(f"toolkit.stages.{stage}").run(context, inputs, work, reporter)
        return dict(metrics)

    return run_here


def launched(arguments: Sequence[str], recipe: Recipe) -> Runner:
    """Run a stage under ``accelerate launch``, its processes sharing the work; ``recipe`` names run and trackers."""

    def run_launched(
        stage: str, context: Context, inputs: dict[str, Path], work: Path, reporter: Reporter
    ) -> dict[str, Any]:
        request = work / "request.json"
        asked = {
            "stage": stage,
            "context": to_json(context),
            "inputs": {name: str(path.resolve()) for name, path in inputs.items()},
            "run_name": recipe.name,
            "trackers": list(recipe.report_to),
        }
        write_json(request, asked)
        code = accelerate_launch(arguments, "toolkit.stages", [str(request.resolve())])
        answer = work / "answer.json"
        if code or not answer.is_file():
            raise StoreError(
                f"accelerate launch ended with exit code {code}",
                where=" ".join([*arguments, stage]),
                fix="see its messages above",
            )
        metrics = read_json(answer)
        request.unlink()
        answer.unlink()
        return dict(metrics)

    return run_launched


def publish(folder: RunFolder, loaded: LoadedRecipe, manifest: Mapping[str, Any]) -> None:
    """Put the evaluation's tables and ``results.json`` at the top of the run folder."""
    evaluated = folder.stage_dir("evaluate")
    for table in ("samples.parquet", "rewards.parquet", "judgements.parquet"):
        copy_whole(evaluated / table, folder.root / table)
    results = {"schema_version": SCHEMA_VERSION, **read_json(evaluated / "evaluation.json")}
    differences = [
        f"the arms differ in {name}: PPO {a}, DPO {b}" for name, (a, b) in arm_differences(loaded.recipe).items()
    ]
    results["warnings"] = [*results["warnings"], *differences]
    results["recipe"] = loaded.recipe.model_dump(mode="json")
    results["cost"] = cost(manifest["stages"]) | {"judges": results.pop("judge_usage", [])}
    write_json(folder.root / RESULTS_FILE, results)


def cost(stages: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Seconds, tokens and peak memory by stage, and by arm (an arm's own stages; shared ones apart)."""
    rows = [
        {"stage": name, "arm": s["arm"], "wall_s": s["wall_s"], "tokens": s["tokens"], "peak_gib": s["peak_gib"]}
        for name, s in stages.items()
        if name != "report"
    ]
    arms = {}
    for arm in ("shared", "rm_ppo", "dpo"):
        own = [row for row in rows if row["arm"] == arm]
        arms[arm] = {
            "wall_s": round(sum(row["wall_s"] for row in own), 3),
            "tokens": sum(row["tokens"] for row in own),
            "peak_gib": max((row["peak_gib"] for row in own), default=0.0),
        }
    return {"stages": rows, "arms": arms}


# ---------------------------------------------------------------- facts about this run


def versions() -> dict[str, str]:
    """What the numbers depend on, as installed."""
    names = ("rlhf-duel", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy", "scipy")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def new_manifest(loaded: LoadedRecipe, plans: Sequence[Plan], command: Sequence[str]) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "name": loaded.recipe.name,
        "status": "running",
        "command": list(command),
        "recipe": loaded.recipe.model_dump(mode="json"),
        "origins": {key: origin for key, origin in loaded.origins.items() if origin != "default"},
        "keys": {item.spec.name: item.key for item in plans},
        "seed": loaded.recipe.seed,
        "versions": versions(),
        "machine": {"system": platform.platform(), "processor": platform.processor(), "cpus": os.cpu_count()},
        "started": time.time(),
        "stages": {},
    }


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Peak memory in GiB of what runs inside, in a list of one that is filled at the end.

    The process's resident set on a CPU (Linux lets a process reset its high-water mark; elsewhere the peak is the
    process's so far), the allocator's peak on an accelerator.
    """
    gc.collect()
    cuda = "torch" in sys.modules and sys.modules["torch"].cuda.is_available()
    if cuda:
        sys.modules["torch"].cuda.reset_peak_memory_stats()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    peak = [0.0]
    try:
        yield peak
    finally:
        if cuda:
            peak[0] = sys.modules["torch"].cuda.max_memory_allocated() / 2**30
        elif sys.platform == "linux":
            status = Path("/proc/self/status").read_text()
            peak[0] = int(status.split("VmHWM:")[1].split()[0]) / 2**20
        else:
            import resource

            peak[0] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30
