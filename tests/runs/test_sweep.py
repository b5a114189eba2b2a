"""The jobs of a sweep."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolkit.cli.main import cli
from toolkit.errors import RecipeError
from toolkit.runs.precision import load_for_run
from toolkit.runs.sweep import Job, Sweep, others_of, parse_grid


def jobs(*grid: str, seeds: int | None = None, sets: tuple[str, ...] = (), out: Path = Path("out")) -> list[Job]:
    return Sweep("smoke", sets, parse_grid(grid), seeds, out).jobs()


def test_a_grid() -> None:
    assert parse_grid([" dpo.beta = 0.1, 0.5,", "seed=3"]) == [("dpo.beta", ["0.1", "0.5"]), ("seed", ["3"])]
    for wrong in ("dpo.beta", "=1,2", "dpo.beta=", "dpo.beta=,"):
        with pytest.raises(RecipeError, match="is no grid"):
            parse_grid([wrong])


def test_grids_are_crossed_and_each_point_has_every_seed() -> None:
    found = jobs("dpo.beta=0.1,0.5", "ppo.kl_coef=0.2", seeds=2, sets=("dpo.beta=9", "sft.weight_decay=0.5"))
    assert [job.label for job in found] == [
        f"dpo.beta={beta},ppo.kl_coef=0.2,seed={seed}" for beta in ("0.1", "0.5") for seed in (0, 1)
    ]
    assert [job.folder for job in found] == [Path("out") / job.label for job in found]
    last = found[-1].loaded.recipe
    assert (last.dpo.beta, last.ppo.kl_coef, last.seed, last.sft.weight_decay) == (0.5, 0.2, 1, 0.5)
    assert found[-1].settings == {"dpo.beta": "0.5", "ppo.kl_coef": "0.2", "seed": "1"}


def test_without_a_number_of_seeds_the_seed_is_the_recipes_own() -> None:
    [job] = jobs(sets=("seed=5",))
    assert (job.label, job.settings, job.loaded.recipe.seed) == ("default", {}, 5)
    [job] = jobs(seeds=1)
    assert (job.label, job.loaded.recipe.seed) == ("seed=0", 0)


def test_a_grid_can_hold_lists() -> None:
    found = jobs("evaluate.judges=[gold, rm],[gold]", "report.title='a, b',c")
    assert [job.loaded.recipe.evaluate.judges for job in found] == [["gold", "rm"]] * 2 + [["gold"]] * 2
    assert [job.loaded.recipe.report.title for job in found[:2]] == ["a, b", "c"]
    assert parse_grid(["model.lora={r: 4, alpha: 8},null"]) == [("model.lora", ["{r: 4, alpha: 8}", "null"])]
    assert parse_grid(["report.title=it's,its"]) == [("report.title", ["it's", "its"])]


@pytest.mark.parametrize(
    ("grid", "seeds", "sets", "said"),
    [
        (["seed=5,6"], 2, (), "the seed is given, and 2 seeds are asked for"),
        ([], 2, ("seed=7",), "the seed is given, and 2 seeds are asked for"),
        ([], 0, (), "0 seeds are no run"),
        (["dpo.beta=0.1", "dpo.beta=0.5"], None, (), "dpo.beta has two grids"),
        (["dpo.beta=0.1,0.5,0.10"], None, (), "the same recipe: dpo.beta=0.1 and dpo.beta=0.10"),
    ],
)
def test_what_would_be_dropped_in_silence_is_refused(
    grid: list[str], seeds: int | None, sets: tuple[str, ...], said: str
) -> None:
    with pytest.raises(RecipeError, match=said) as refused:
        jobs(*grid, seeds=seeds, sets=sets)
    assert refused.value.fix


def test_a_setting_without_values_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"the grid of dpo\.beta has no values"):
        Sweep("smoke", (), [("dpo.beta", [])], None, Path("out")).jobs()


def test_folders_are_names_that_a_disk_takes() -> None:
    [job] = jobs("data.source=/a/b.jsonl")
    assert job.folder == Path("out") / "data.source=_a_b.jsonl"
    first, second = jobs(f"data.source={'x' * 200},{'y' * 200}")
    assert len(first.folder.name) == 16 and first.folder != second.folder


def test_a_point_that_is_no_recipe_is_told_before_anything_runs() -> None:
    with pytest.raises(RecipeError, match=r"dpo\.beta must be"):
        jobs("dpo.beta=0.1,-1")


def test_others_are_those_that_have_begun(tmp_path: Path) -> None:
    found = jobs("dpo.beta=0.1,0.2,0.3", out=tmp_path)
    for job in found[:2]:
        job.folder.mkdir()
    assert others_of(found[0], found) == [found[1].folder]
    assert others_of(found[2], found) == [found[0].folder, found[1].folder]


def test_each_run_records_the_command_that_makes_it_alone() -> None:
    """Its recipe, as the command line reads it, is the job's."""
    for job in jobs("dpo.beta=0.1,0.5", "data.source=a b.jsonl", seeds=2, sets=("sft.weight_decay=0.5",)):
        program, name, *words = job.command
        given = cli.commands[name].make_context(name, words, obj={"json": False, "quiet": False, "debug": False}).params
        assert (program, name) == ("duel", "run")
        assert given["out"] == job.folder and load_for_run(given["recipe"], given["sets"]).recipe == job.loaded.recipe
