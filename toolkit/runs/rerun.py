"""``duel rerun``: a run again from its manifest, and what differs: versions, machine, inputs, weights, results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from toolkit.errors import RecipeError, StoreError
from toolkit.files import flat
from toolkit.progress import Reporter
from toolkit.recipe.checks import check
from toolkit.recipe.files import LoadedRecipe
from toolkit.recipe.schema import Recipe, leaves
from toolkit.runs.facts import machine, versions
from toolkit.runs.launch import launch_of
from toolkit.runs.listing import compare_outputs, differences, estimates_of
from toolkit.runs.pipeline import RunOptions, run
from toolkit.runs.plan import PlannedStage, plan_stages, with_inputs
from toolkit.runs.store import MANIFEST_FILE, RESULTS_FILE, RunFolder, read_document, refuse_study

# The fields of a manifest that are read here, and their types.
FORMS: dict[str, type] = {
    **dict.fromkeys(("recipe", "origins", "keys", "stages", "versions", "machine"), dict),
    "command": list,
    "name": str,
}
# Of the machine, what may change the bits of a result.
MACHINE = ("processor", "instructions")


def rerun(original: Path, out: Path | None, reporter: Reporter, options: RunOptions) -> dict[str, Any]:
    """Run what a manifest describes into another folder, ``runs/NAME-rerun`` by default, and compare the two.

    ``original`` is the manifest, or its run folder. A manifest alone is enough: it has the settings, and hashes of the
    weights and tables. Data, models and judges are read from where the recipe names them.

    Returns ``run`` (the new folder), ``original``, ``equal`` (whether all weights and tables that both have are; None
    where the original has no hashes), ``versions``, ``machine`` and ``compute`` (what differs, as two values),
    ``inputs`` (stage -> what it depends on that has changed), ``stages`` (stage -> ``equal`` and ``files_that_differ``)
    and ``results`` (rows {name, first, second}, where the original's results lie beside its manifest).

    Raises StoreError where there is no run's manifest, RecipeError where this version cannot run its settings.
    """
    path = original / MANIFEST_FILE if original.is_dir() else original
    manifest = _manifest(path)
    loaded = recipe_of(manifest, path)
    target = out or Path("runs") / f"{loaded.recipe.name}-rerun"
    if target.resolve() == path.parent.resolve():
        raise StoreError("this is the original's folder", where=str(target), fix="name another one with --out")
    launch = options.launch or _launch(manifest)
    processes, sharded = int(manifest.get("processes") or 1), launch_of(launch).sharding is not None
    planned = plan_stages(loaded, RunFolder(target), processes, sharded=sharded)
    before = {
        "versions": differences(manifest["versions"], versions()),
        "machine": {k: v for k, v in differences(manifest["machine"], machine()).items() if k in MACHINE},
        "inputs": changed_inputs(manifest, planned),
    }
    for line in in_words(before):
        reporter.line(line)
    until, one_stage = _asked(manifest, planned)
    again = run(loaded, target, reporter, replace(options, launch=launch, until=until, target=one_stage))
    stages = compare_outputs(manifest["stages"], again["stages"])
    known = [stage["equal"] for stage in stages.values() if stage["equal"] is not None]
    return {
        "run": str(target),
        "original": str(path),
        "equal": all(known) if known else None,
        **before,
        "compute": _compute(manifest["stages"], again["stages"]),
        "stages": stages,
        "results": _results(path.parent, target),
    }


def _manifest(path: Path) -> dict[str, Any]:
    refuse_study(path.parent, "rerun one of its trials, or run it again with duel study")
    if not path.is_file():
        raise StoreError(
            "there is no manifest of a run", where=str(path), fix="name a manifest.json, or its run folder"
        )
    manifest = read_document(path)
    fix = "name the manifest.json that duel run wrote"
    if missing := FORMS.keys() - manifest.keys():
        what = f"this is not the manifest of a run: it has no {', '.join(sorted(missing))}"
        raise StoreError(what, where=str(path), fix=fix)
    if wrong := next(_of_another_form(manifest), None):
        raise StoreError(f"this manifest is damaged: {wrong} is of another form", where=str(path), fix=fix)
    return manifest


def _of_another_form(manifest: Mapping[str, Any]) -> Iterator[str]:
    """The fields that are not of the type that is computed with here. A copy of a manifest can have any name."""
    yield from (name for name, kind in FORMS.items() if not isinstance(manifest[name], kind))
    for name in ("command", "launch"):
        words = manifest.get(name, [])
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            yield name
    processes = manifest.get("processes") or 1
    if not isinstance(processes, int) or processes < 1:
        yield "processes"
    for stage, record in manifest["stages"].items():
        parts = [record.get(part) or {} for part in ("outputs", "compute")] if isinstance(record, dict) else [None]
        if not all(isinstance(part, dict) for part in parts) or not isinstance(record.get("fields"), dict):
            yield f"the stage {stage!r}"


def recipe_of(manifest: Mapping[str, Any], path: Path) -> LoadedRecipe:
    """The recipe of a manifest, with the origins that its values had."""
    try:
        recipe = Recipe.model_validate(manifest["recipe"])
    except ValidationError as error:
        wrong = error.errors()[0]
        raise RecipeError(
            f"this version cannot run {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}",
            where=str(path),
            fix=f"take the version that wrote it: rlhf-duel {manifest['versions'].get('rlhf-duel', '')}",
        ) from None
    origins = {".".join(keys): "default" for keys, _ in leaves(recipe)} | dict(manifest["origins"])
    check(recipe, origins)
    return LoadedRecipe(recipe, origins, path)


def _launch(manifest: Mapping[str, Any]) -> Sequence[str]:
    """The arguments of ``accelerate launch`` that the original had. Earlier versions have them in the command alone."""
    if "launch" in manifest:
        return list(manifest["launch"])
    command = list(manifest["command"])
    return command[command.index("--") + 1 :] if "--" in command else ()


def _asked(manifest: Mapping[str, Any], stages: Sequence[PlannedStage]) -> tuple[str | None, str | None]:
    """(``until``, ``target``) for the stages that the original finished: one of them, or none for all stages.

    A study's trial has one arm: the last stage that it finished, and what that reads.
    """
    finished = [stage for stage in manifest["keys"] if stage in manifest["stages"]]
    if not finished or len(finished) == len(manifest["keys"]):
        return None, None
    alone = set(finished) == set(with_inputs(stages, finished[-1]))
    return (None, finished[-1]) if alone else (finished[-1], None)


def changed_inputs(manifest: Mapping[str, Any], stages: Sequence[PlannedStage]) -> dict[str, list[str]]:
    """Stage -> what its key holds that differs now: code, data, models, templates. A stage's inputs do not count."""
    changed = {}
    for planned in stages:
        record = manifest["stages"].get(planned.spec.name)
        if record is not None:
            names = differences(flat(record["fields"]), flat(planned.fields))
            if outside := sorted(name for name in names if not name.startswith("input ")):
                changed[planned.spec.name] = outside
    return changed


def in_words(before: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What differs before the first stage runs, a line each."""
    lines = [f"{name}: {old} then, {new} now" for name, (old, new) in before["versions"].items()]
    lines += [f"{name}: {old} then, {new} now" for name, (old, new) in before["machine"].items()]
    lines += [f"stage {stage}: changed since: {', '.join(names)}" for stage, names in before["inputs"].items()]
    return lines or ["versions, processor, code, data and models are those of the original"]


def _compute(
    first: Mapping[str, Mapping[str, Any]], second: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, list[Any]]]:
    """Stage -> what it computed with that differs."""
    differing = {}
    for stage in first:
        then, now = (side.get(stage, {}).get("compute") for side in (first, second))
        if then and now and (facts := differences(then, now)):
            differing[stage] = facts
    return differing


def _results(original: Path, again: Path) -> list[dict[str, Any]]:
    """The estimates that differ; none where the original's results are not beside its manifest. Times do not count."""
    files = [folder / RESULTS_FILE for folder in (original, again)]
    if not all(file.is_file() for file in files):
        return []
    rows = estimates_of(*map(read_document, files))
    return [row for row in rows if row["first"] != row["second"] and not row["name"].endswith(": wall_s")]
