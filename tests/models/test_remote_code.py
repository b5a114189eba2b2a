"""Models whose folders bring code, or pickles that would run some: nothing of them runs, and nobody is asked."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from toolkit.errors import ModelError
from toolkit.models.load import load_policy, load_reward_model
from toolkit.models.remote_code import remote_code
from toolkit.models.resolve import resolve
from toolkit.models.tokenizer import load_tokenizer
from toolkit.recipe.training import ModelSection
from toolkit.runs.dry_run import model_config

pytestmark = pytest.mark.fault

PACKAGE = Path(__file__).parents[2] / "toolkit"
SECTION = ModelSection(dtype="float32")
# What would run code while it is read, or reads what would.
READS_PICKLES = (
    r"\b(pickle|marshal)\.(load|loads|Unpickler)\b|import (dill|joblib|shelve)\b",
    r"allow_pickle=True",
    r"weights_only=False",
    r"torch\.load\((?!.*\bweights_only=True\))",  # torch's own reader of tensors and plain values
    r"read_pickle",
    r"yaml\.(unsafe_|full_)?load\(",
    r"trust_remote_code=True",
    r"\b(eval|exec)\(",
)
CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
import pathlib
pathlib.Path({marker!r}).write_text("ran")
class OddConfig(LlamaConfig):
    model_type = "odd"
class OddModel(LlamaForCausalLM):
    config_class = OddConfig
"""


@pytest.fixture
def odd(tmp_path: Path) -> tuple[Path, Path]:
    """A model of a kind that transformers does not know, with code that leaves a mark; and the mark."""
    folder, marker = tmp_path / "odd", tmp_path / "ran"
    shutil.copytree(resolve("tiny").path, folder)
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddModel"}
    config |= {"model_type": "odd", "auto_map": auto}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "odd.py").write_text(CODE.format(marker=str(marker)))
    return folder, marker


def test_code_in_a_models_folder_runs_only_where_it_is_allowed(
    odd: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, marker = odd
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    ref = resolve(str(folder))
    for load in (load_policy, load_reward_model):
        with pytest.raises(ModelError, match="brings Python code of its own, and it was not run") as caught:
            load(ref, SECTION)
        assert "model.trust_remote_code=true" in str(caught.value)
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    del tokenizer_config["tokenizer_class"]
    auto = {"auto_map": {"AutoTokenizer": ["odd.OddTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config | auto))
    with pytest.raises(ModelError, match="Python code"):
        load_tokenizer(ref)
    with pytest.raises(Exception, match="trust_remote_code|Python code"):
        model_config(ref)
    assert not marker.exists()
    with remote_code(True):
        assert type(load_policy(ref, SECTION)).__name__ == "OddModel"
    assert marker.exists()


def test_the_code_is_part_of_the_model(odd: tuple[Path, Path]) -> None:
    folder, _ = odd
    before = resolve(str(folder)).identity
    (folder / "odd.py").write_text("# edited")
    assert resolve(str(folder)).identity != before


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.marker, "ran"))


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_a_pickle_in_the_place_of_weights_is_refused(tmp_path: Path, protocol: str) -> None:
    folder, marker = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(resolve("tiny").path, folder)
    (folder / "model.safetensors").unlink()
    weights = folder / "pytorch_model.bin"
    bomb = {"model.norm.weight": Bomb(marker)}
    torch.save(bomb, weights) if protocol == "torch" else weights.write_bytes(pickle.dumps(bomb))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_policy(resolve(str(folder)), SECTION)
    assert not marker.exists()
    assert load_file(Path(resolve("tiny").path) / "model.safetensors")  # what is shipped is no pickle


def test_no_module_reads_pickles_or_runs_text() -> None:
    hits = [
        f"{file.relative_to(PACKAGE)}: {match[0]}"
        for file in sorted(PACKAGE.rglob("*.py"))
        for pattern in READS_PICKLES
        for match in re.finditer(pattern, file.read_text(encoding="utf-8"))
        # torch's module.eval() and the help's trust_remote_code=true are other words
        if not re.search(rf"[.\w]{re.escape(match[0])}", file.read_text(encoding="utf-8"))
    ]
    assert hits == []
