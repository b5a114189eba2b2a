"""``-q``, ``--debug`` and ``--json`` before and behind a command; what ``--until reward_model`` ends with."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from support.running import SMALL, duel

from toolkit.cli.examples import EXAMPLES
from toolkit.cli.main import cli
from toolkit.cli.options import WITHOUT_JSON
from toolkit.errors import ModelError
from toolkit.judging.options import JudgeOptions
from toolkit.judging.principles import Labelling
from toolkit.measure.label import check_labelling
from toolkit.models.resolve import resolve
from toolkit.recipe.training import ModelSection

pytestmark = pytest.mark.e2e
GLOBAL = {"json": False, "quiet": False, "debug": False}


def test_json_before_and_behind_a_command() -> None:
    before, behind = duel("--json", "recipes", "list"), duel("recipes", "list", "--json")
    assert before.stdout == behind.stdout and {"name", "summary"} == json.loads(before.stdout)[0].keys()
    assert duel("--json", "schema").stdout == duel("schema", "--json").stdout == duel("schema").stdout
    for words in (("--json", "recipes", "show", "smoke"), ("recipes", "show", "smoke", "--json")):
        assert "recipes show has no --json: what it prints is the file of the recipe" in duel(*words, check=2).stderr
    assert "leave out --markdown or --json" in duel("--json", "schema", "--markdown", check=2).stderr


def test_every_command_takes_json_or_says_why_not() -> None:
    def without_json(group: click.Group) -> Iterator[str | None]:
        for command in group.commands.values():
            if isinstance(command, click.Group):
                yield from without_json(command)
            elif all(parameter.name != "as_json" for parameter in command.params):
                yield command.name

    assert set(without_json(cli)) == set(WITHOUT_JSON)


@pytest.mark.parametrize("example", [example for examples in EXAMPLES.values() for example in examples])
def test_an_example_of_the_help_parses(example: str) -> None:
    words, command = shlex.split(example)[1:], cli
    while isinstance(command, click.Group):
        name, *words = words
        command = command.commands[name]
    context = command.make_context(name, words, obj=dict(GLOBAL))
    assert example in EXAMPLES[name]
    shown = command.get_help(context)
    assert example in " ".join(shown.replace("\\\n", " ").split()) and max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("example", [example for examples in EXAMPLES.values() for example in examples])
def test_the_models_in_an_example_of_the_help_are_there_after_a_run(example: str, small_run: Path) -> None:
    models = [Path(word) for word in shlex.split(example) if re.fullmatch(r"runs/smoke/.+", word)]
    for model in models:
        assert resolve(str(small_run / model.relative_to("runs/smoke"))).fingerprint


def test_an_example_of_a_label_is_one_that_can_be_made() -> None:
    for example in EXAMPLES["label"]:
        context = cli.commands["label"].make_context("label", shlex.split(example)[2:], obj=dict(GLOBAL))
        principles = [] if context.params["principles"] is None else [context.params["principles"]]
        options = JudgeOptions(ModelSection())
        check_labelling(Labelling(context.params["judge"], principles, options))


def test_a_folder_of_a_stage_says_where_its_model_is(small_run: Path) -> None:
    with pytest.raises(ModelError) as caught:
        resolve(str(small_run / "dpo"))
    assert caught.value.fix == f"name {small_run / 'dpo' / 'model'}"


def test_debug_and_quiet_before_and_behind_a_command(tmp_path: Path) -> None:
    for words in (("--debug", "validate", "nosuch"), ("validate", "nosuch", "--debug")):
        assert "Traceback" in duel(*words, check=2).stderr
    assert "Traceback" not in duel("validate", "nosuch", check=2).stderr
    command = ["simulate", "--data", "reviews", "--policy", "tiny", "--limit", "2", "--k", "2", "--max-new-tokens", "4"]
    for number, words in enumerate((["-q", *command], [*command, "-q"])):
        done = duel(*words, "--out", str(tmp_path / f"{number}.jsonl.gz"))
        assert done.stderr == "" and "Simulated labels" in done.stdout
    assert duel(*command, "--out", str(tmp_path / "0.jsonl.gz")).stderr  # says that it is there already


def test_a_run_until_the_reward_model_ends_with_its_accuracy(small_run: Path, tmp_path: Path) -> None:
    out = shutil.copytree(small_run, tmp_path / "run")
    evaluated = json.loads((out / "results.json").read_text())["rm_quality"]["explicit"]
    command = ["run", "smoke", "--out", str(out), *SMALL, "--until", "reward_model"]
    document = json.loads(duel(*command, "--json").stdout)
    assert document["reward_model"]["accuracy"] == pytest.approx(evaluated["accuracy"]["value"])
    assert document["reward_model"]["n_comparisons"] == evaluated["n_pairs"]
    said = " ".join(duel(*command).stdout.split())
    assert said.startswith(f"The reward model is right in {evaluated['accuracy']['value']:.1%} of ")
    assert document["status"] == "done" and "verdict" not in document
    [row] = json.loads(duel("runs", str(out), "--json").stdout)["runs"]
    assert row["status"] == "done" and row["win_rate"] is not None  # the evaluation is still the run's
