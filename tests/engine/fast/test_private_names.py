"""The private names of libraries that this package uses: each is there, and no other is used outside the fast room."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import pkgutil
import re
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import ModulesToSaveWrapper
from support.running import ROOT
from transformers import DynamicCache, LlamaConfig, LlamaForSequenceClassification, Trainer, TrainingArguments
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import toolkit
from toolkit.engine.fast.private import CHECKED_AGAINST, PRIVATE, PrivateNames

PACKAGE = Path(toolkit.__file__).parent
LIBRARIES = tuple(CHECKED_AGAINST)
# Where private names may be used: the fast room, and what builds TRL's trainers.
ROOM = re.compile(r"engine/fast/.*|training/trl\.py")
# The modules that the libraries' documentation imports from.
PUBLIC_MODULES = {
    "torch",
    "torch.autograd.function",
    "torch.distributed",
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.checkpoint.state_dict_loader",
    "torch.distributed.checkpoint.state_dict_saver",
    "torch.distributed.device_mesh",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.nn",
    "torch.nn.functional",
    "torch.utils.checkpoint",
    "torch.utils.data",
    "transformers",
    "transformers.integrations",
    "transformers.utils.logging",
    "peft",
    "trl",
}
# Documented, in spite of the underscore.
PUBLIC_NAMES = {"_replace", "_make", "_asdict", "_fields", "_exit"}  # of a named tuple, and of os
# What stays outside the room, with its reason.
ALLOWED = {
    "training/budget.py imports transformers.trainer_callback.ExportableState": "documented, and exported nowhere else",
    "ppo/loop.py overrides Trainer._load_from_checkpoint": "the Trainer has no other hook for several models",
    "training/shards.py overrides Trainer._load_from_checkpoint": "each process has shards of the weights",
    "training/shards.py overrides Trainer._load_optimizer_and_scheduler": "and of the optimiser's state",
    "training/shards.py overrides Trainer._save_optimizer_and_scheduler": "and of the optimiser's state",
}


# ---------------------------------------------------------------- they are there


@cache
def instances() -> dict[str, Any]:
    """Objects of the classes that make their attributes when they are made."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1, num_labels=1
    )
    lora = LoraConfig(task_type="SEQ_CLS", r=1, target_modules=["q_proj"])
    model = get_peft_model(LlamaForSequenceClassification(config), lora)
    modules = list(model.modules())
    linear = next(module for module in modules if hasattr(module, "lora_A"))
    arguments = TrainingArguments(use_cpu=True, report_to="none")
    return {
        "torch.nn.Module": torch.nn.Linear(1, 1),
        "transformers.PreTrainedConfig": config,
        "transformers.DynamicCache": DynamicCache(config=config),
        "transformers.cache_utils.DynamicLayer": DynamicLayer(),
        "transformers.cache_utils.DynamicSlidingWindowLayer": DynamicSlidingWindowLayer(sliding_window=4),
        "transformers.Trainer": Trainer(model=torch.nn.Linear(1, 1), args=arguments),
        "peft.tuners.lora.Linear": linear,
        "peft.tuners.lora.LoraLayer": linear,
        "peft.utils.ModulesToSaveWrapper": next(m for m in modules if isinstance(m, ModulesToSaveWrapper)),
    }


def owner(path: str) -> Any:
    """The module, or what stands in it, that an import path names."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        parent, _, name = path.rpartition(".")
        return getattr(owner(parent), name)


def has(where: Any, name: str) -> bool:
    return name in inspect.signature(where).parameters if inspect.isfunction(where) else hasattr(where, name)


@pytest.mark.parametrize(
    ("names", "name"), [(names, name) for names in PRIVATE for name in names.names], ids=lambda value: str(value)[:40]
)
def test_a_private_name_is_there(names: PrivateNames, name: str) -> None:
    version = importlib.metadata.version(names.library)
    broken = (
        f"{names.library} {version} has no {names.owner}.{name} (it was there in "
        f"{', '.join(CHECKED_AGAINST[names.library])}): toolkit/{names.used_in} needs it, for {names.purpose}"
    )
    try:
        is_there = has(instances().get(names.owner) or owner(names.owner), name)
    except AttributeError as error:
        pytest.fail(f"{broken} ({error})")
    assert is_there, broken


def test_the_oldest_and_the_pinned_versions_were_checked() -> None:
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "scripts/constraints.txt").read_text(), flags=re.M))
    oldest = dict(re.findall(r'^  "([\w-]+)>=([\d.]+)', (ROOT / "pyproject.toml").read_text(), flags=re.M))
    oldest["torch"] = pinned["torch"]  # as scripts/setup --lowest has it
    for library, versions in CHECKED_AGAINST.items():
        for version in (pinned[library], oldest[library]):
            assert any(f"{known}.".startswith(f"{version}.") for known in versions), (
                f"{library} {version}: run this file with it, then name it in CHECKED_AGAINST"
            )


@pytest.mark.parametrize("names", PRIVATE, ids=lambda names: names.owner)
def test_a_listed_name_is_used(names: PrivateNames) -> None:
    source = (PACKAGE / names.used_in).read_text(encoding="utf-8")
    assert [name for name in names.names if not re.search(rf"\b{name}\b", source)] == []


# ---------------------------------------------------------------- and no other room uses one


def sources() -> list[tuple[str, ast.Module]]:
    paths = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
    return [(name, ast.parse(path.read_text(encoding="utf-8"))) for name, path in paths.items()]


def defined_names(trees: list[ast.Module]) -> set[str]:
    """Private names that this package defines itself."""
    names: set[str] = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
    return names


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC_NAMES


def private_uses(tree: ast.Module, defined_here: set[str]) -> Iterator[str]:
    """Imports from modules that are not public, and private attributes that this package does not define."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported = [(node.module or "", alias.name) for alias in node.names]
        else:
            imported = []
        for module, name in imported:
            if module.partition(".")[0] in LIBRARIES and (module not in PUBLIC_MODULES or is_private(name)):
                yield f"imports {module}.{name}".rstrip(".")
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in defined_here:
            yield f"uses .{node.attr}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(str(name.value)):
                yield f"uses .{name.value}"


def overridden() -> Iterator[str]:
    """Private methods of the libraries' classes that a class of this package overrides."""
    for info in pkgutil.walk_packages([str(PACKAGE)], "toolkit."):
        if info.name.endswith("__main__"):
            continue
        module = importlib.import_module(info.name)
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if cls.__module__ != info.name:
                continue
            bases = [base for base in cls.__mro__ if base.__module__.partition(".")[0] in LIBRARIES]
            file = f"{info.name.partition('.')[2].replace('.', '/')}.py"
            methods = [name for name, value in vars(cls).items() if is_private(name) and inspect.isfunction(value)]
            for name, base in product(methods, bases):
                if name in vars(base):
                    yield f"{file} overrides {base.__name__}.{name}"


def test_other_rooms_use_no_private_name() -> None:
    trees = sources()
    defined_here = defined_names([tree for _, tree in trees])
    uses = {
        f"{file} {use}" for file, tree in trees if not ROOM.fullmatch(file) for use in private_uses(tree, defined_here)
    }
    uses |= {use for use in overridden() if not ROOM.match(use)}
    assert uses - ALLOWED.keys() == set(), "move this into engine/fast/ or training/trl.py, or give a reason in ALLOWED"
    assert ALLOWED.keys() - uses == set(), "these are gone: take them out of ALLOWED"


@pytest.mark.parametrize(
    ("source", "use"),
    [
        ("from transformers.cache_utils import DynamicLayer", "imports transformers.cache_utils.DynamicLayer"),
        ("import peft.tuners.lora", "imports peft.tuners.lora"),
        ("from torch import _C", "imports torch._C"),
        ("x = model.config._attn_implementation", "uses ._attn_implementation"),
        ("x = getattr(config, '_attn_implementation', None)", "uses ._attn_implementation"),
    ],
)
def test_a_private_use_is_found(source: str, use: str) -> None:
    assert list(private_uses(ast.parse(source), set())) == [use]
    assert list(private_uses(ast.parse("from torch import nn\nself._x, row._replace(a=1), f.__name__"), {"_x"})) == []
