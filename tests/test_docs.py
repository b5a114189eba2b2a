"""README and docs: commands and examples run, links lead somewhere, what is named exists, pages keep to their rules."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from support.finished_study import SMALL_STUDY_SETS
from support.running import ROOT, duel, duel_process

import toolkit
from toolkit.cli.main import cli
from toolkit.preferences.reading import read_preferences
from toolkit.recipe.files import load_recipe, resolved_yaml, shipped_recipes
from toolkit.recipe.reference import reference

README, INDEX, GUIDE = ROOT / "README.md", ROOT / "docs" / "index.md", ROOT / "CONTRIBUTING.md"
REAL_DATA = Path(os.environ["DUEL_REAL_DATA"]).resolve() if "DUEL_REAL_DATA" in os.environ else None
HH = "pairs.jsonl.gz"
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", flags=re.S | re.M)
# What a page says behind a command that cannot run here.
NOT_HERE = re.compile(r"#\s*(needs .+|serves a page until Ctrl-C)$")
# The recipes that pages run, with few prompts and steps. A page's own settings count before these; of two
# sizes the smaller one counts.
SMALLER_RUN: dict[str, dict[str, Any]] = {
    "data": {"train_prompts": 24, "eval_prompts": 16, "max_prompt_tokens": 128, "max_response_tokens": 16},
    "reward_model": {"num_train_epochs": 1},
    "ppo": {"total_episodes": 32, "per_device_train_batch_size": 16},
    "dpo": {"num_train_epochs": 1},
    "evaluate": {"best_of_n": 2, "bootstrap": 200},
}
SIZE = re.compile(r"^(data|ppo)\.(train_prompts|eval_prompts|total_episodes)=(\d+)$")
SMALLER = ("smoke", "process", "hh-harmless")
STUDY = "study-tiny"  # of the size of the study that tests share


def linked(page: Path) -> list[Path]:
    """The pages that a page links to, in its order."""
    targets = [target.partition("#")[0] for target in LINK.findall(page.read_text(encoding="utf-8"))]
    return list(dict.fromkeys((page.parent / target).resolve() for target in targets if target.endswith(".md")))


# The commands run in this order: a page takes what those before it made.
PAGES = [README, *(page for page in linked(INDEX) if page.parent == INDEX.parent)]
ALL_PAGES = [*PAGES, INDEX, GUIDE, ROOT / "CHANGELOG.md"]


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """(name of the file that the block is, or "", its text)."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [(name, text) for kind, name, text in found if kind == language]


def commands(page: Path) -> list[str]:
    lines = [line for _, text in blocks(page, "bash") for line in text.replace("\\\n", " ").splitlines()]
    return [" ".join(line.split()) for line in lines if line.strip()]


def examples(page: Path) -> str:
    return "\n".join(text for name, text in blocks(page, "python") if not name)


def arguments_of(command: str) -> list[str]:
    """What follows the word duel."""
    words = shlex.split(command, comments=True)
    return words[words.index("duel") + 1 :]


def at_small_size(arguments: list[str]) -> list[str]:
    """The arguments of a command, with no size above that of ``SMALLER_RUN``."""

    def smaller(found: re.Match[str]) -> str:
        section, name, size = found.groups()
        return f"{section}.{name}={min(int(size), SMALLER_RUN[section][name])}"

    return [SIZE.sub(smaller, word) for word in arguments]


def is_duel(command: str) -> bool:
    return re.match(r"(\w+=\S+ )*duel ", command) is not None


# ---------------------------------------------------------------- what runs

RUNNABLE = {c: page.name for page in reversed(PAGES) for c in commands(page) if is_duel(c) and not NOT_HERE.search(c)}


def in_order() -> Iterator[str]:
    yield from dict.fromkeys(c for page in PAGES for c in commands(page) if c in RUNNABLE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all commands, with the files that pages tell a reader to write.

    A file there named as a shipped recipe is taken in its place, by the commands and by the examples in Python.
    """
    out = tmp_path_factory.mktemp("reader")
    for recipe in SMALLER:
        settings = yaml.safe_load(shipped_recipes()[recipe].read_text(encoding="utf-8"))
        for section, values in SMALLER_RUN.items():
            settings[section] |= values
        (out / recipe).write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    (out / STUDY).write_text(resolved_yaml(load_recipe(STUDY, SMALL_STUDY_SETS)), encoding="utf-8")
    for page in PAGES:
        for language in ("json", "python", "text"):
            for name, text in blocks(page, language):
                if name:
                    (out / name).parent.mkdir(exist_ok=True)
                    (out / name).write_text(text, encoding="utf-8")
    return out


@pytest.fixture
def folder_with_study(folder: Path, small_study: Path) -> Path:
    """The examples take this study, and train none."""
    study = folder / "runs" / STUDY
    return folder if study.exists() else shutil.copytree(small_study, study).parents[1]


def with_lanes() -> list[Any]:
    """The study of a reader's own data takes minutes; study-tiny alone and its pages run in each case."""
    slow = re.compile(r"duel study study-tiny .*data\.source=")
    return [pytest.param(c, marks=[pytest.mark.slow] if slow.search(c) else []) for c in in_order()]


@pytest.mark.e2e
@pytest.mark.parametrize("command", with_lanes(), ids=lambda command: f"{RUNNABLE[command]}: {command[:60]}")
def test_every_duel_command_runs(command: str, folder: Path) -> None:
    if HH in command:
        if REAL_DATA is None:
            pytest.skip("DUEL_REAL_DATA is not set")
        if not (folder / HH).exists():
            (folder / HH).symlink_to(REAL_DATA / "hh_harmless" / HH)
    environment = dict(word.split("=", 1) for word in command.partition("duel ")[0].split())
    if "PYTHONPATH" in environment:
        environment["PYTHONPATH"] += os.pathsep + str(ROOT)
    start = duel_process if environment else duel
    done = start(*at_small_size(arguments_of(command)), cwd=folder, check=None, env=environment)
    assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
    assert done.stdout or "--until" in command, command  # a run that stops on the way has no result to print


@pytest.mark.slow
@pytest.mark.e2e
def test_the_runs_of_the_readme_at_their_full_size(tmp_path: Path) -> None:
    runs = [arguments for c in commands(README) if c in RUNNABLE and (arguments := arguments_of(c))[0] == "run"]
    assert len(runs) >= 3
    for arguments in runs:
        assert duel(*arguments, cwd=tmp_path).stdout


def test_what_a_page_shows_of_a_command_is_what_it_prints() -> None:
    shown = re.compile(r"```bash\n(duel validate [^\n]*)\n```\n\n```text\n(.*?)```", flags=re.S)
    found = [pair for page in PAGES for pair in shown.findall(page.read_text(encoding="utf-8"))]
    assert found
    for command, output in found:
        assert duel(*shlex.split(command)[1:]).stdout == output


@pytest.mark.e2e
@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)], ids=lambda page: page.name)
def test_the_examples_in_python_run(page: Path, folder_with_study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the commands, whose files they read; a page's examples one after another."""
    script = folder_with_study / f"{page.stem}_examples.py"
    script.write_text(examples(page), encoding="utf-8")
    monkeypatch.chdir(script.parent)
    monkeypatch.syspath_prepend(str(script.parent))
    runpy.run_path(script.name, run_name="__main__")


def test_every_command_and_every_function_is_in_an_example() -> None:
    """Commands among those that run here, but for the one that serves a page; its function is in an example."""
    words = [[word for word in arguments_of(command) if not word.startswith("-")] for command in RUNNABLE]
    run_here = {" ".join(given[:2]) if given[0] == "recipes" else given[0] for given in words}
    named = {f"recipes {name}" for name in cli.commands["recipes"].commands} | set(cli.commands) - {"recipes"}
    assert named - run_here == {"watch", "rerun"}  # duel rerun is as long as a run
    called = "\n".join(map(examples, PAGES))
    calls = [node.func for node in ast.walk(ast.parse(called)) if isinstance(node, ast.Call)]
    names = {function.id for function in calls if isinstance(function, ast.Name)}
    assert set(toolkit.__all__) - names == {"watch"} and "Thread(target=watch" in called


@pytest.mark.e2e
def test_the_page_on_ppo_names_what_is_logged(folder: Path) -> None:
    """Behind the examples, whose log this is."""
    state = max((folder / "ppo").glob("checkpoint-*/trainer_state.json"))
    logged = {
        name for entry in json.loads(state.read_text())["log_history"] for name in entry if not name.startswith("eval")
    }
    text = (ROOT / "docs" / "ppo.md").read_text(encoding="utf-8")
    assert {name for name in logged if "/" in name} <= set(expanded(text))
    table = text.partition("## Watch it train")[2].partition("## ")[0]
    assert set(expanded(table)) - {"loss/ptx"} <= logged


def expanded(text: str) -> Iterator[str]:
    """Names of metrics in backticks; one without a group is of the group before it."""
    group = ""
    for name in re.findall(r"`([a-z_0-9]+(?:/[a-z_0-9]+)?)`", text):
        if "/" in name:
            group = name.partition("/")[0]
            yield name
        elif name in ("eos_rate",):
            yield name
        elif name.startswith("score_q"):
            yield f"{group}/{name}"


# ---------------------------------------------------------------- what is said


def test_the_readme_opens_with_its_two_commands() -> None:
    assert commands(README)[:2] == ["scripts/quickstart", "scripts/test"]


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").split()) <= 1000
    assert (ROOT / "docs" / "images" / "report.png").stat().st_size <= 300_000


@pytest.mark.parametrize("command", dict.fromkeys(c for page in ALL_PAGES for c in commands(page) if not is_duel(c)))
def test_scripts_are_there_and_take_their_options(command: str) -> None:
    """They make environments or run this very suite: they are read here, and not run."""
    words = [word for word in shlex.split(command, comments=True) if "=" not in word]
    if words[0] == "python":
        assert (ROOT / words[1]).is_file()
    elif words[0].startswith("scripts/"):
        script = ROOT / words[0]
        assert script.stat().st_mode & 0o111
        subprocess.run(["bash", "-n", str(script)], check=True)
        for word in words[1:]:
            assert not word.startswith("-") or word in script.read_text(encoding="utf-8"), f"{words[0]} has no {word}"


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text(encoding="utf-8")), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_index_links_every_page() -> None:
    assert set(INDEX.parent.glob("*.md")) - {INDEX} <= set(linked(INDEX))


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page: Path) -> None:
    """Files of the repository, settings of a recipe and options of the command line, in backticks or in commands."""
    text = page.read_text(encoding="utf-8")
    code = " ".join([*re.findall(r"`([^`\n]+)`", BLOCK.sub("", text)), *commands(page)])
    for path in re.findall(r"(?<![\w/.])(?:toolkit|tests|scripts|docs|recipes)/[\w./*-]+", code):
        assert any(ROOT.glob(path.rstrip("/."))), f"there is no {path}"
    if page.name == "CHANGELOG.md":  # of earlier versions too
        return
    known = {row.name for row in reference()}
    for setting in re.findall(rf"\b(?:{'|'.join(SECTIONS)})\.[a-z_]+(?:\.[a-z_]+)*\b(?!/)", code):
        name = setting.removesuffix(".")
        is_file = re.search(r"\.(html|parquet|jsonl?|png|py|yaml)$", name) is not None
        assert is_file or name in known or any(row.startswith(f"{name}.") for row in known), f"no setting {name}"
    files = [path for path in (ROOT / "scripts").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    scripts = "".join(path.read_text(encoding="utf-8") for path in files)
    for option in re.findall(r"(?<![\w-])--[a-z][a-z_-]+", code):
        assert option in OPTIONS or option in scripts or option in OF_OTHERS, f"there is no option {option}"


SECTIONS = ("model", "data", "sft", "reward_model", "ppo", "dpo", "evaluate", "report", "rounds", "rft")
OF_OTHERS = (
    "--num_processes",
    "--config_file",
    "--use_fsdp",
    "--fsdp_version",
    "--num_machines",
    "--machine_rank",
    "--main_process_ip",
    "--main_process_port",
    "--write",
    "--kills",
    "--light",
)


def options(command: click.Command) -> Iterator[str]:
    for parameter in command.params:
        yield from parameter.opts
    for below in command.commands.values() if isinstance(command, click.Group) else ():
        yield from options(below)


OPTIONS = {"--help", *options(cli)}


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.name)
def test_pages_keep_to_their_rules(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.])/(work|tmp)/", text)
    if page.name not in ("benchmarks.md", "CHANGELOG.md"):  # measured numbers have a date, instructions have none
        assert not re.search(r"\b20\d\d-\d\d\b", text)
    if page.parent == INDEX.parent and page.name not in ("index.md", "recipe-reference.md"):
        assert text.startswith("# ")
        assert re.match(r"(After this page you|Every measured number)", text.split("\n\n", 2)[1])


def test_the_recipe_reference_is_what_the_command_prints() -> None:
    printed = duel("schema", "--markdown").stdout
    assert (ROOT / "docs" / "recipe-reference.md").read_text(encoding="utf-8") == printed, (
        "run: duel schema --markdown > docs/recipe-reference.md"
    )


def test_the_files_of_the_page_on_data_are_read(folder: Path) -> None:
    pairs, native = (read_preferences(str(folder / name)) for name in ("pairs.jsonl", "native.json"))
    assert (pairs.report.format, pairs.report.n_prompts, pairs.report.n_comparisons) == ("chosen/rejected", 6, 6)
    assert (native.report.format, native.report.n_responses, native.report.n_comparisons) == ("native", 3, 2)
