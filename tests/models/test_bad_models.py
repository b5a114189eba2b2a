"""Models that are missing, damaged or of the wrong kind: one message with what, where and the likely fix."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from toolkit.errors import ModelError
from toolkit.models.load import load_policy, load_reward_model, new_reward_model, trainable
from toolkit.models.resolve import ModelRef, resolve
from toolkit.models.save import save_policy
from toolkit.models.tokenizer import check_vocabulary, eos_ids, load_tokenizer
from toolkit.progress import Reporter
from toolkit.recipe.files import load_recipe
from toolkit.recipe.training import Lora, ModelSection
from toolkit.runs.dry_run import describe
from toolkit.stages import sft
from toolkit.stages.contexts import SftContext, context_of

pytestmark = pytest.mark.fault

FP32 = ModelSection(name="tiny", dtype="float32", lora=None)
Break = Callable[[Path], None]


@pytest.fixture
def model(tmp_path: Path, tiny_ref: ModelRef) -> Path:
    """A copy of the shipped model, to be broken."""
    return Path(shutil.copytree(tiny_ref.path, tmp_path / "model"))


@pytest.fixture
def adapter(tmp_path: Path, model: Path, tokenizer: Any) -> Path:
    """A policy's LoRA adapter on ``model``."""
    policy = trainable(load_policy(resolve(str(model)), FP32), Lora(r=2), task="CAUSAL_LM")
    save_policy(policy, tokenizer, tmp_path / "adapter", dtype=torch.float32, base=resolve(str(model)))
    return tmp_path / "adapter"


@pytest.fixture
def reward(tmp_path: Path, model: Path, tokenizer: Any) -> Path:
    """A reward model as a whole folder."""
    built = new_reward_model(resolve(str(model)), FP32, 0, seed=0)
    save_policy(built, tokenizer, tmp_path / "reward", dtype=torch.float32, base=resolve(str(model)))
    return tmp_path / "reward"


def refused(act: Callable[[], object], *words: str, fix: bool = True) -> ModelError:
    """``act`` raises a ModelError whose parts are there, and whose text holds ``words``."""
    with pytest.raises(ModelError) as caught:
        act()
    error = caught.value
    assert error.what and error.where and (error.fix or not fix), error.render()
    for word in words:
        assert word in error.render()
    return error


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor], str], None]) -> None:
    """Change the weights file; the callable gets all weights and the name of a feed-forward one."""
    path = folder / ("adapter_model.safetensors" if (folder / "adapter_config.json").is_file() else "model.safetensors")
    weights = load_file(path)
    change(weights, next(name for name in sorted(weights) if "mlp.up_proj" in name))
    save_file(weights, path, metadata={"format": "pt"})


# ---------------------------------------------------------------- names and places


def test_an_unknown_short_name() -> None:
    refused(lambda: resolve("tinyy"), "tinyy", "did you mean 'tiny'?")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    refused(lambda: resolve(str(tmp_path / "absent")), "absent")


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    refused(lambda: resolve(str(tmp_path)), str(tmp_path), "config.json")


def test_a_file_instead_of_a_folder(model: Path) -> None:
    refused(lambda: resolve(str(model / "model.safetensors")), "folder, not a file", "config.json")


def test_a_gguf_file_without_its_prefix(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    refused(lambda: resolve(str(file)), f"write gguf:{file}")


# ---------------------------------------------------------------- damage


def nan(folder: Path) -> None:
    edit_weights(folder, lambda weights, name: weights[name].view(-1)[3:4].fill_(float("nan")))


def test_weights_that_are_not_numbers(model: Path) -> None:
    nan(model)
    error = refused(lambda: load_policy(resolve(str(model)), FP32), "not finite")
    assert str(model) in error.where and "mlp.up_proj" in error.where


def test_an_infinite_weight_of_a_reward_model(reward: Path) -> None:
    edit_weights(reward, lambda weights, name: weights["score.weight"].view(-1)[0:1].fill_(float("inf")))
    error = refused(lambda: load_reward_model(resolve(str(reward)), FP32), "not finite")
    assert "score" in error.where


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"<html>502 Bad Gateway</html>" * 10)


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def missing_tensor(folder: Path) -> None:
    edit_weights(folder, lambda weights, name: weights.pop(name))


def wrong_shape(folder: Path) -> None:
    def halve(weights: dict[str, torch.Tensor], name: str) -> None:
        weights[name] = weights[name][: len(weights[name]) // 2].clone()

    edit_weights(folder, halve)


def bad_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def unknown_type(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="zorg")


DAMAGE = [cut, garbage, no_weights, missing_tensor, wrong_shape, bad_json, unknown_type]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_policy(model: Path, damage: Break) -> None:
    damage(model)
    refused(lambda: load_policy(resolve(str(model)), FP32), str(model), fix=False)


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_reward_model(reward: Path, damage: Break) -> None:
    damage(reward)
    refused(lambda: load_reward_model(resolve(str(reward)), FP32), str(reward), fix=False)


@pytest.mark.parametrize("of_adapter", [False, True])
def test_a_quantised_model_is_not_trained(model: Path, adapter: Path, of_adapter: bool, tmp_path: Path) -> None:
    """Its codes would be written as weights."""
    edit_json(model / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    (adapter / "base.json").unlink()  # else the base is another than the adapter was trained on
    ref = resolve(str(adapter if of_adapter else model))
    error = refused(lambda: new_reward_model(ref, FP32, 0, seed=0), "is quantised")
    assert error.where == "reward_model.base"
    recipe = load_recipe("smoke", [f"model.name={ref.path}"])
    context = context_of("sft", recipe.recipe)
    assert isinstance(context, SftContext)
    assert refused(lambda: sft.run(context, {}, tmp_path, Reporter(quiet=True)), "is quantised").where == "model.name"
    refused(lambda: describe(recipe, tmp_path / "run"), "is quantised")


@pytest.mark.parametrize("implementation", ["flash_attention_2", "no_such_attention"])
def test_an_attention_that_is_not_there(tiny_ref: ModelRef, implementation: str) -> None:
    section = FP32.model_copy(update={"attn_implementation": implementation})
    refused(lambda: load_policy(tiny_ref, section), "tiny", fix=False)


# ---------------------------------------------------------------- adapters


def test_an_adapter_whose_base_is_gone(adapter: Path, model: Path) -> None:
    shutil.rmtree(model)
    refused(lambda: resolve(str(adapter)), "base model", str(adapter), "base_model_name_or_path")


def test_an_adapter_that_names_no_base(adapter: Path) -> None:
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=None)
    refused(lambda: resolve(str(adapter)), "does not name its base", fix=False)


def test_an_adapter_without_weights(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    refused(lambda: load_policy(resolve(str(adapter)), FP32), str(adapter), fix=False)


def test_an_adapter_that_does_not_fit_its_base(adapter: Path) -> None:
    def halve(weights: dict[str, torch.Tensor], name: str) -> None:
        weights[name] = weights[name][:1].clone()

    edit_weights(adapter, halve)
    refused(lambda: load_policy(resolve(str(adapter)), FP32), str(adapter), fix=False)


def test_an_adapter_with_weights_that_are_not_numbers(adapter: Path) -> None:
    nan(adapter)
    error = refused(lambda: load_policy(resolve(str(adapter)), FP32), "not finite")
    assert "lora" in error.where


# ---------------------------------------------------------------- the wrong kind


def test_a_policy_is_no_reward_model(model: Path) -> None:
    refused(lambda: load_reward_model(resolve(str(model)), FP32), "not a reward model", "one output")


def test_a_policys_adapter_is_no_reward_model(adapter: Path) -> None:
    refused(lambda: load_reward_model(resolve(str(adapter)), FP32), str(adapter), fix=False)


def test_a_classifier_with_two_labels_is_no_reward_model(tmp_path: Path, model: Path) -> None:
    two = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    two.save_pretrained(tmp_path / "two")
    refused(lambda: load_reward_model(resolve(str(tmp_path / "two")), FP32), "2 outputs", "one", fix=False)


# ---------------------------------------------------------------- tokenizers


def test_a_tokenizer_larger_than_its_model(tmp_path: Path, model: Path, tiny: Any) -> None:
    from tokenizers import Tokenizer

    file = model / "tokenizer.json"
    core = Tokenizer.from_file(str(file))
    core.add_special_tokens([f"<|extra-{i}|>" for i in range(5)])
    core.save(str(file))
    rows = tiny.get_input_embeddings().weight.shape[0]
    tokenizer = load_tokenizer(resolve(str(model)))
    refused(lambda: check_vocabulary(rows, tokenizer, str(model)), str(model), str(rows), str(rows + 4))
    check_vocabulary(rows + 5, tokenizer, str(model))  # a padded embedding is no fault


def test_a_model_without_a_tokenizer(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()
    error = refused(lambda: load_tokenizer(resolve(str(model))), "tokenizer", fix=False)
    assert error.where == str(model)


def test_a_tokenizer_that_cannot_be_read(model: Path) -> None:
    (model / "tokenizer.json").write_text("{")
    refused(lambda: load_tokenizer(resolve(str(model))), "tokenizer", fix=False)


def test_a_model_and_a_tokenizer_that_name_no_end(tiny_ref: ModelRef, new_tiny: Callable[[], Any]) -> None:
    policy, tokenizer = new_tiny(), load_tokenizer(tiny_ref)
    tokenizer.eos_token = None
    tokenizer.chat_template = None  # which would name the token that closes a turn
    policy.generation_config.eos_token_id = None
    refused(lambda: eos_ids(policy, tokenizer), "end of text", fix=False)


@pytest.mark.parametrize("layers", [["lm_head"], ["nothing"], ["input_layernorm"], "a(b"])
def test_layers_that_get_no_adapter(tiny_ref: ModelRef, layers: list[str] | str) -> None:
    lora = Lora(r=2, target_modules=layers)
    reward_model = new_reward_model(tiny_ref, ModelSection(name="tiny", dtype="float32", lora=lora), 0, 0)
    with pytest.raises(ModelError, match="LlamaForSequenceClassification has no layers .* that take an adapter") as got:
        trainable(reward_model, lora, task="SEQ_CLS", modules_to_save=["score"])
    assert got.value.where == "model.lora.target_modules"
