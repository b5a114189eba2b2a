"""Imports go one way: cli -> pipeline -> stages -> {ppo, judging, ...} -> models -> {store, recipe, errors, ...}."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "toolkit"
LAYERS = [
    {"cli", "api", "__main__"},
    {"pipeline", "rewards", "comparing", "rejudging", "simulating", "labelling", "sweep", "dry_run", "tables"}
    | {"runs", "watching", "pushing"},
    {"stages"},
    {
        "ppo",
        "training",
        "trl_trainers",
        "logp_cache",
        "judging",
        "evals",
        "generation",
        "scoring",
        "preferences",
        "report",
        "metrics",
    },
    {"models"},
    {"store", "progress", "recipe", "errors", "local_server", "waiting", "processes"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
SIDEWAYS = {
    "ppo": {"scoring", "generation", "training", "preferences"},
    "training": {"scoring", "preferences"},
    "trl_trainers": {"training"},
    "logp_cache": {"scoring"},
    "preferences": {"scoring"},
    "rewards": {"comparing"},
    "simulating": {"comparing"},
    "labelling": {"comparing"},
    "pushing": {"tables"},
    "sweep": {"pipeline"},
    "dry_run": {"pipeline"},
    "judging": {"scoring", "generation", "evals", "preferences"},
    "metrics": {"evals"},
    "report": {"evals"},
    "recipe": {"errors"},
    "store": {"errors"},
    "progress": {"errors"},
    "local_server": {"errors"},
}
# One component in several files.
HALVES = {
    "adapters": "models",
    "attention": "models",
    "locating": "models",
    "norms": "models",
    "tree_batch": "scoring",
}
HALVES |= {"launching": "pipeline", "recipe_loading": "recipe", "recipe_reference": "recipe", "scored_data": "rewards"}
HALVES |= {"cli_options": "cli", "cli_runs": "cli", "cli_measures": "cli"}
TORCH = {"torch", "transformers", "trl", "peft", "accelerate"}


def component(module: str) -> str:
    name = module.split(".")[1] if "." in module else ""
    return HALVES.get(name, name)


def imports(source: str, package: str) -> Iterator[str]:
    """Every module that the source imports, inside functions too, as an absolute name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def back_edges(module: str, source: str) -> list[str]:
    """The imports of a module that go up or sideways where they may not."""
    here, found = component(module), []
    for target in imports(source, module.rpartition(".")[0]):
        there = component(target) if target.startswith("toolkit.") else ""
        if here == "evals" and target.split(".")[0] in TORCH:
            found.append(f"{module} imports {target}: evals is numpy and scipy")
        elif here == there == "stages" and target.split(".")[2:3] != module.split(".")[2:3]:
            found.append(f"{module} imports {target}: stages speak through files")
        elif there and there not in RANK:
            found.append(f"{module} imports {target}, which has no layer in this test")
        elif there and there != here and RANK[there] <= RANK[here] and there not in SIDEWAYS.get(here, ()):
            found.append(f"{module} imports {target}: imports go one way")
    return found


def modules() -> list[tuple[str, Path]]:
    files = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
    return [(".".join(("toolkit", *path.relative_to(PACKAGE).with_suffix("").parts)), path) for path in files]


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_go_one_way(module, path):
    assert component(module) in RANK, f"{module} has no layer in this test: give it one"
    assert back_edges(module, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("toolkit.models", "from toolkit.scoring import Engine"),
        ("toolkit.recipe", "from toolkit import models"),
        ("toolkit.scoring", "def f():\n    import toolkit.generation"),
        ("toolkit.stages.ppo", "from toolkit.stages.dpo import run"),
        ("toolkit.stages.ppo", "from . import dpo"),
        ("toolkit.evals.winrate", "import torch.nn as nn"),
        ("toolkit.evals.winrate", "from ..report import html"),
        ("toolkit.report.html", "from toolkit.preferences import formats"),
        ("toolkit.store", "from toolkit.recipe import Recipe"),
        ("toolkit.pipeline", "import toolkit.cli"),
        ("toolkit.cli", "from toolkit.unheard_of import x"),
    ],
)
def test_a_back_edge_is_found(module, source):
    assert len(back_edges(module, source)) == 1


def test_what_may_go_sideways_has_no_cycle():
    order = list(TopologicalSorter(SIDEWAYS).static_order())  # raises CycleError
    assert order.index("scoring") < order.index("ppo") and set(order) <= set(RANK)


def test_allowed_imports_pass():
    source = "import torch\nfrom toolkit import models\nfrom toolkit.scoring import x\nfrom . import objective"
    assert back_edges("toolkit.ppo.trainer", source) == []
    assert back_edges("toolkit.cli", "from toolkit.pipeline import run\nfrom toolkit.recipe import Recipe") == []


def test_the_package_itself_is_lazy():
    code = "import sys, toolkit; print(sorted({'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert done.stdout.strip() == "[]"
