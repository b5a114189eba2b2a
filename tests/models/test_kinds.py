"""What a model is, is known before it is used: a reward model is no policy, and the files of a folder are its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from toolkit.errors import ModelError
from toolkit.models.files import check_config, check_weights
from toolkit.models.load import load_policy
from toolkit.models.resolve import ModelRef, require_policy, resolve
from toolkit.recipe.training import ModelSection

pytestmark = pytest.mark.fault

FP32 = ModelSection(name="tiny", dtype="float32", lora=None)


@pytest.fixture
def model(tmp_path: Path, tiny_ref: ModelRef) -> Path:
    return Path(shutil.copytree(tiny_ref.path, tmp_path / "model"))


def edited(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("LlamaForSequenceClassification", "is a reward model, not a policy"),
        ("LlamaForTokenClassification", "is no policy"),
    ],
)
def test_a_reward_model_is_no_policy(model: Path, architecture: str, words: str) -> None:
    edited(model / "config.json", architectures=[architecture])
    ref = resolve(str(model))
    for act in (lambda: require_policy(ref), lambda: load_policy(ref, FP32)):
        with pytest.raises(ModelError, match=words):
            act()


def test_an_adapter_of_a_reward_model_is_no_policy(model: Path) -> None:
    adapter = model.parent / "adapter"
    adapter.mkdir()
    config = {"base_model_name_or_path": str(model), "task_type": "SEQ_CLS"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="is a reward model, not a policy"):
        require_policy(resolve(str(adapter)))


def test_an_adapter_is_not_its_own_base(tmp_path: Path) -> None:
    for name, base in (("a", "b"), ("b", "a"), ("c", "c")):
        (tmp_path / name).mkdir()
        config = {"base_model_name_or_path": str(tmp_path / base)}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    for name in "abc":
        with pytest.raises(ModelError, match="is its own base"):
            resolve(str(tmp_path / name))


@pytest.mark.parametrize("target", ["../other.safetensors", "/etc/passwd", "missing.safetensors", 5])
def test_an_index_stays_in_its_folder(tmp_path: Path, target: object) -> None:
    (tmp_path / "other.safetensors").write_bytes(b"")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": target}}))
    with pytest.raises(ModelError, match="index of the weights|the weights lack"):
        check_weights(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": 10**400},
        {"num_hidden_layers": "x"},
        {"hidden_size": 0},
        {"text_config": {"vocab_size": -1}},
        {"architectures": 5},
        {"architectures": [5]},
    ],
)
def test_sizes_that_no_model_has(values: dict[str, object]) -> None:
    with pytest.raises(ModelError):
        check_config(values, "config.json")
    check_config(
        {"num_hidden_layers": 2, "intermediate_size": [8, 16], "text_config": {"vocab_size": 9}}, "config.json"
    )
