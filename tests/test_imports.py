"""Imports go one way, from the command line down to the statistics: ``LAYERS`` has the order."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from toolkit.files import imported_modules

PACKAGE = Path(__file__).parents[1] / "toolkit"
# A component may import those of the layers below its own.
LAYERS = [
    {"cli"},
    {"api"},
    {"runs"},
    {"stages"},
    {"ppo", "measure"},
    {"training", "judging", "report"},
    {"engine"},
    {"models", "stages.contexts", "runs.kinds"},
    {"preferences", "recipe", "metrics", "runs.store"},
    {"evals", "engine.fast"},
    {"progress", "storage"},
    {"files"},
    {"errors"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
# The page that asks people stands on the server of the report's pages.
SIDEWAYS = {"judging": {"report"}}
# Parts of a folder that stand lower than the rest of it: the kernels, which know torch and no more, the layout of a run
# folder, which whoever reads one needs, and what the stages read of a recipe.
LOWER = ("engine.fast", "runs.kinds", "runs.store", "stages.contexts")
TORCH = {"torch", "transformers", "trl", "peft", "accelerate"}


def component(module: str) -> str:
    name = module.partition(".")[2]
    return next((part for part in LOWER if f"{name}.".startswith(f"{part}.")), name.split(".")[0])


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
        ("toolkit.models.load", "from toolkit.engine.engine import Engine"),
        ("toolkit.recipe.schema", "from toolkit import models"),
        ("toolkit.engine.tree", "def f():\n    import toolkit.training.batch"),
        ("toolkit.engine.fast.adapters", "from toolkit.engine.tree import TreeBatch"),
        ("toolkit.stages.ppo", "from toolkit.stages.dpo import run"),
        ("toolkit.stages.ppo", "from . import dpo"),
        ("toolkit.evals.winrate", "import torch.nn as nn"),
        ("toolkit.evals.winrate", "from ..report import html"),
        ("toolkit.report.page", "from toolkit.judging import records"),
        ("toolkit.runs.store", "from toolkit.recipe.schema import Recipe"),
        ("toolkit.runs.pipeline", "import toolkit.cli"),
        ("toolkit.cli.main", "from toolkit.unheard_of import x"),
    ],
)
def test_a_back_edge_is_found(module, source):
    assert len(back_edges(module, source)) == 1


def test_modules_have_no_circle():
    graph = {module: set(imported_modules(module)) for module, _ in modules()}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_few_modules_stand_outside_the_folders():
    assert len(list(PACKAGE.glob("*.py"))) <= 6


def test_allowed_imports_pass():
    source = "import torch\nfrom toolkit import models\nfrom toolkit.engine.logps import x\nfrom . import objective"
    assert back_edges("toolkit.ppo.trainer", source) == []
    source = "from toolkit.runs.pipeline import run\nfrom toolkit.recipe.schema import Recipe"
    assert back_edges("toolkit.cli.main", source) == []
    assert back_edges("toolkit.models.load", "from toolkit.engine.fast import adapters") == []


def test_the_package_itself_is_lazy():
    code = "import sys, toolkit; print(sorted({'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert done.stdout.strip() == "[]"


IMPORTS = (ast.Import, ast.ImportFrom)


def at_start(module: str, met: set[str]) -> set[str]:
    """The modules that importing one imports: the package's own, and those of libraries that these name.

    What stands inside functions, or is for the type checker, is not imported then. ``met`` has the modules so far.
    """
    path = PACKAGE.joinpath(*module.split(".")[1:])
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if module in met or not file.is_file():
        return met
    met.add(module)
    body = ast.Module([n for n in ast.parse(file.read_text(encoding="utf-8")).body if type(n) in IMPORTS], [])
    for name in imports(ast.unparse(body), module.rpartition(".")[0]):
        if name.startswith("toolkit."):
            at_start(name, met)
            at_start(name.rpartition(".")[0], met)
        else:
            parts = name.split(".")
            met |= {".".join(parts[: n + 1]) for n in range(len(parts))}
    return met


@pytest.mark.parametrize(
    ("module", "waits"),
    [
        ("toolkit.runs.pipeline", TORCH | {"scipy.stats"}),  # of a run whose stages are there, or are launched
        ("toolkit.runs.dry_run", TORCH - {"transformers"} | {"scipy.stats"}),
        ("toolkit.measure.check.check", TORCH - {"transformers"} | {"scipy.stats"}),
        ("toolkit.measure.judge", TORCH | {"scipy.stats", "openai"}),  # until a model in this process judges
        ("toolkit.measure.label", TORCH | {"scipy.stats", "openai"}),  # and no policy is sampled
        ("toolkit.measure.simulate", TORCH | {"scipy.stats"}),
        ("toolkit.runs.listing", TORCH | {"scipy.stats"}),
        ("toolkit.cli.tables", TORCH | {"scipy.stats"}),
        ("toolkit.stages.dpo", {"trl", "datasets", "torch.distributed.checkpoint"}),  # until trainer: trl, or shards
        ("toolkit.stages.reward_model", {"trl", "datasets", "torch.distributed.checkpoint"}),
    ],
)
def test_what_takes_long_to_import_waits_until_it_is_used(module, waits):
    met = at_start(module, set())
    assert module in met and met & waits == set()
    assert "torch" in at_start("toolkit.stages.dpo", set())  # which this would find
