"""Runs from Python: the paired run, sweeps, studies, and what is there already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from toolkit.api.inputs import Data, Inputs, one_of, quiet_libraries, quietly
from toolkit.api.results import Result
from toolkit.progress import Reporter
from toolkit.report.sheets import result_sheets
from toolkit.report.study_sheets import study_sheets

Settings = Mapping[str, Any]
Engine = Literal["local", "ray"]
ENGINES = ("local", "ray")
RECORDS_FILE = "records.jsonl"


def run(
    recipe: str | Path,
    *,
    data: Data | None = None,
    out: str | Path | None = None,
    settings: Settings | None = None,
    until: str | None = None,
    only: str | None = None,
    force: bool = False,
    reporter: Reporter | None = None,
) -> Result:
    """``duel run``: the paired run of a recipe, or the rest of an interrupted one.

    Args:
        recipe: a file, or the name of a shipped recipe.
        data: replaces ``data.source``; records are written to ``out/records.jsonl``.
        out: the run folder; the default is ``runs/NAME``.
        settings: dotted names of the recipe to values, such as ``{"dpo.beta": 0.3}``.
        until: the stage to stop after.
        only: the one stage to run; those that it reads have to be there.
        force: run stages again that are there.
        reporter: shows the progress; ``Reporter(quiet=True)`` shows none.

    Returns ``results.json`` with ``out`` (the run folder) and ``status`` added; these two alone where the run has
    no evaluation yet. ``to_frame()`` has a row for each policy.

    Raises:
        DuelError: an input that the user can correct; it has ``what``, ``where`` and ``fix``.
    """
    from toolkit.files import read_json
    from toolkit.runs import pipeline
    from toolkit.runs.precision import load_for_run

    sets, folder = _sets_and_folder(recipe, settings, data, out)
    loaded = load_for_run(str(recipe), sets)
    given = {"data": _source(data, folder), "out": out, "settings": settings}
    command = _command("run", recipe, given | {"until": until, "only": only, "force": force})
    with quiet_libraries() as hush:
        options = pipeline.RunOptions(until=until, only=only, force=force, command=command, before_stage=hush)
        manifest = pipeline.run(loaded, folder, reporter or Reporter(), options)
    facts = {"out": str(folder), "status": manifest["status"]}
    if "evaluate" not in manifest["stages"]:
        return Result(facts, [])
    results = read_json(folder / "results.json")
    return Result({**results, **facts}, result_sheets(results), results["verdict"]["sentence"], main="policies")


@quietly
def study(
    recipe: str | Path,
    *,
    data: Data | None = None,
    out: str | Path | None = None,
    settings: Settings | None = None,
    engine: Engine = "local",
    resources: Mapping[str, float] | None = None,
    reporter: Reporter | None = None,
) -> Result:
    """``duel study``: both arms with equal tuning and an equal budget over seeds, or the rest of a study that began.

    Args:
        recipe: a recipe with a section ``study``: a file, or the name of a shipped one.
        data: replaces ``data.source``, as in :func:`run`.
        out: the study's folder; the default is ``runs/NAME``.
        settings: dotted names of the recipe to values; ``{"study.seeds": 5}`` sets the number of seeds.
        engine: local runs one task after the other, ray all at once.
        resources: what each task on Ray asks for: ``{"cpus": 4, "gpus": 1, "memory_gib": 16}``, or some of these.
        reporter: shows the progress.

    Returns ``study.json`` with ``out`` (the study's folder) added.

    Raises:
        DuelError: an input that the user can correct.
    """
    from toolkit.runs.engines import task_resources
    from toolkit.runs.study.run import run_study
    from toolkit.runs.study.trials import StudyPlan

    one_of("engine", engine, ENGINES)
    sets, folder = _sets_and_folder(recipe, settings, data, out)
    given = {"data": _source(data, folder), "out": out, "settings": settings, "resources": resources}
    command = _command("study", recipe, given | ({"engine": engine} if engine != "local" else {}))
    plan = StudyPlan(str(recipe), tuple(sets), folder)
    document = run_study(
        plan, reporter or Reporter(), engine=engine, resources=task_resources(resources or {}), command=command
    )
    return Result({**document, "out": str(folder)}, study_sheets(document), document["verdict"]["sentence"])


@quietly
def sweep(
    recipe: str | Path,
    grid: Mapping[str, Sequence[Any]],
    *,
    seeds: int | None = None,
    data: Data | None = None,
    out: str | Path | None = None,
    settings: Settings | None = None,
    engine: Engine = "local",
    resources: Mapping[str, float] | None = None,
    reporter: Reporter | None = None,
) -> Result:
    """``duel sweep``: run a recipe at every point of a grid. Runs share every stage that is equal.

    Args:
        recipe: a file, or the name of a shipped recipe.
        grid: dotted names of the recipe to lists of values, such as ``{"dpo.beta": [0.05, 0.1]}``.
        seeds: each point is run with the seeds 0 to ``seeds`` - 1, in place of the recipe's seed.
        data: replaces ``data.source``, as in :func:`run`.
        out: the folder of the runs; the default is ``runs/NAME-sweep``.
        settings: dotted names to values that hold at every point.
        engine: local runs one run after the other, ray all at once.
        resources: what each task on Ray asks for: ``{"cpus": 4, "gpus": 1, "memory_gib": 16}``, or some of these.
        reporter: shows the progress.

    Returns ``{"runs": [row, ...], "out": folder}``.

    Raises:
        DuelError: an input that the user can correct.
    """
    from toolkit.recipe.files import load_recipe
    from toolkit.recipe.yaml_values import one_line
    from toolkit.report.run_sheets import sweep_sheet
    from toolkit.runs.engines import task_resources
    from toolkit.runs.sweep import Sweep, run_sweep

    one_of("engine", engine, ENGINES)
    name = load_recipe(str(recipe), [f"{key}={one_line(value)}" for key, value in (settings or {}).items()]).recipe.name
    sets, folder = _sets_and_folder(recipe, settings, data, out or Path("runs") / f"{name}-sweep")
    points = [(key, [one_line(value) for value in values]) for key, values in grid.items()]
    planned, asked = Sweep(str(recipe), sets, points, seeds, folder), task_resources(resources or {})
    rows = run_sweep(planned, reporter or Reporter(), engine=engine, resources=asked)
    return Result({"runs": rows, "out": str(folder)}, [sweep_sheet(rows)], main="runs")


@quietly
def rerun(manifest: str | Path, *, out: str | Path | None = None, reporter: Reporter | None = None) -> Result:
    """``duel rerun``: run again what a manifest describes, and compare.

    Args:
        manifest: the ``manifest.json`` of a run, or its folder.
        out: the run folder; the default is ``runs/NAME-rerun``.
        reporter: shows the progress.

    Returns what ``duel rerun --json`` prints: versions, machine, inputs and results that differ, and ``equal``.

    Raises:
        DuelError: an input that the user can correct.
    """
    from toolkit.runs.pipeline import RunOptions
    from toolkit.runs.rerun import rerun as run_again

    options = RunOptions(command=_command("rerun", manifest, {"out": out}))
    return Result(run_again(Path(manifest), _path(out), reporter or Reporter(), options), [], main="results")


def validate(recipe: str | Path, *, settings: Settings | None = None) -> Result:
    """``duel validate``: check a recipe without data, model or network.

    Args:
        recipe: a file, or the name of a shipped recipe.
        settings: dotted names of the recipe to values.

    Returns ``valid``, ``name``, ``settings`` (dotted names to values) and ``arm_differences`` (a sentence each).

    Raises:
        RecipeError: a recipe that cannot be run.
    """
    from toolkit.recipe.arms import planned_differences
    from toolkit.recipe.files import load_recipe
    from toolkit.recipe.schema import flat
    from toolkit.recipe.yaml_values import one_line

    loaded = load_recipe(str(recipe), [f"{key}={one_line(value)}" for key, value in (settings or {}).items()])
    differences = [entry.sentence for entry in planned_differences(loaded.recipe) if entry.differs]
    values = {"valid": True, "name": loaded.recipe.name, "settings": flat(loaded.recipe)}
    return Result({**values, "arm_differences": differences}, [], f"{loaded.recipe.name}: valid")


def recipes() -> dict[str, str]:
    """``duel recipes list``: the names of the shipped recipes, and what each is for."""
    from toolkit.recipe.files import shipped_recipes, summary_of

    return {name: summary_of(path) for name, path in shipped_recipes().items()}


def schema() -> dict[str, Any]:
    """``duel schema``: the JSON schema of a recipe file."""
    from toolkit.recipe.reference import json_schema

    return json_schema()


def env() -> dict[str, Any]:
    """``duel env``: the facts that a bug report needs: versions, machine, devices, and the models that are here."""
    from toolkit.runs.facts import environment

    return environment()


def list_runs(folder: str | Path = "runs") -> Result:
    """``duel runs``: the runs and studies below a folder.

    Args:
        folder: where to look.

    Returns ``{"runs": [row, ...]}``; a row has the run's status and, where it is done, its verdict.
    """
    from toolkit.report.run_sheets import runs_sheet
    from toolkit.runs.listing import list_runs as rows_of

    rows = rows_of(Path(folder))
    return Result({"runs": rows}, [runs_sheet(rows)], main="runs")


def diff(first: str | Path, second: str | Path) -> Result:
    """``duel diff``: what differs between two runs.

    Args:
        first: a run folder.
        second: another one.

    Returns ``runs``, ``settings``, ``versions``, ``stages`` and ``results``, as ``duel diff --json`` prints them.
    """
    from toolkit.runs.listing import diff_runs

    return Result(diff_runs(Path(first), Path(second)), [], main="results")


def write_report(
    *folders: str | Path,
    out: str | Path | None = None,
    title: str | None = None,
    max_samples: int | None = None,
    force: bool = False,
) -> Path:
    """``duel report``: write the HTML report of a run, a sweep or a study; several runs share one page.

    Args:
        folders: folders of runs or sweeps, or the folder of one study.
        out: the file to write; the default is ``report.html`` in the folder, for several folders
            ``report-side-by-side.html`` in the first one.
        title: of the page.
        max_samples: the largest number of prompts whose samples are shown, by default the recipe's.
        force: overwrite a file that duel did not write.

    Returns the path of the page.
    """
    from toolkit.report.writing import write_page

    return write_page([Path(folder) for folder in folders], _path(out), title, max_samples, force)


def watch(
    folder: str | Path, *, port: int = 0, max_samples: int | None = None, reporter: Reporter | None = None
) -> None:
    """``duel watch``: serve the report of a run or a study while it goes on, until Ctrl-C.

    Args:
        folder: of the run or study.
        port: on 127.0.0.1; 0 takes a free one.
        max_samples: the largest number of prompts whose samples are shown, by default the recipe's.
        reporter: says the address.
    """
    from toolkit.report.watch import watch as serve

    serve(Path(folder), port=port, max_samples=max_samples, reporter=reporter or Reporter())


@quietly
def push(
    folder: str | Path,
    name: str | None = None,
    *,
    to: str | Path | None = None,
    artifacts: Sequence[str] = (),
    public: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, str]:
    """``duel push``: send the models and data of a run to the hub, or write them to a folder. Adapters are merged.

    Args:
        folder: the run's.
        name: USER/NAME on the hub.
        to: write the repositories into this folder instead.
        artifacts: push these alone: sft, ppo, dpo, reward-model or preferences.
        public: make the repositories public.
        reporter: shows the progress.

    Returns where each artifact is now.
    """
    from toolkit.runs.push import push_run

    quiet = reporter or Reporter(quiet=True)
    return push_run(Path(folder), name, to=_path(to), artifacts=artifacts, public=public, reporter=quiet)


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def _source(data: Data | None, folder: Path) -> str | None:
    """What ``data`` goes by: its name or path, or the file to which :func:`_sets_and_folder` writes records."""
    return None if data is None else str(data) if isinstance(data, str | Path) else str(folder / RECORDS_FILE)


def _command(function: str, first: str | Path, options: Mapping[str, Any]) -> list[str]:
    """The command that calls a function of this package, with those options that were given.

    >>> _command("run", "smoke", {"out": Path("here"), "settings": {"dpo.beta": 0.3}, "until": None})[-1]
    "from toolkit import run; run('smoke', out='here', settings={'dpo.beta': 0.3})"
    """
    import yaml

    from toolkit.recipe.yaml_values import one_line

    given = {name: value for name, value in options.items() if value not in (None, False, {})}
    plain = yaml.safe_load(one_line([str(first), given]))  # without paths, and numbers of other libraries
    words = [repr(plain[0]), *(f"{name}={value!r}" for name, value in plain[1].items())]
    return ["python", "-c", f"from toolkit import {function}; {function}({', '.join(words)})"]


def _sets_and_folder(
    recipe: str | Path, settings: Settings | None, data: Data | None, out: str | Path | None
) -> tuple[list[str], Path]:
    """The settings as the command line has them, and the folder of a run or study. Records are written to it."""
    from toolkit.recipe.files import load_recipe
    from toolkit.recipe.yaml_values import one_line

    sets = [f"{name}={one_line(value)}" for name, value in (settings or {}).items()]
    folder = Path(out) if out is not None else Path("runs") / load_recipe(str(recipe), sets).recipe.name
    if data is not None:
        sets.append(f"data.source={one_line(Inputs(folder).data(data, file=folder / RECORDS_FILE))}")
    return sets, folder
