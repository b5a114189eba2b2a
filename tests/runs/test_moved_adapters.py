"""Adapters of a run that was moved: with duel, with plain peft, and merged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from support.running import SMALL, duel
from transformers import AutoModelForCausalLM

from toolkit.files import read_json
from toolkit.models.load import load_policy, trainable
from toolkit.models.resolve import ModelRef, base_record, resolve
from toolkit.models.save import save_policy
from toolkit.models.tokenizer import load_tokenizer
from toolkit.recipe.training import Lora, ModelSection

IDS = torch.tensor([[5, 6, 7, 8]])


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits  # type: ignore[no-any-return]


def with_base(run: Path, adapter: str) -> PeftModel:
    """As the page on run folders says for plain peft."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run / "sft" / "model"), run / adapter)


def test_plain_peft_loads_an_adapter_in_its_place_and_with_its_base_elsewhere(tmp_path: Path) -> None:
    run, tiny = tmp_path / "run", resolve("tiny")
    shutil.copytree(tiny.path, run / "sft" / "model")
    (run / "manifest.json").write_text("{}")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(run / "sft" / "model")
    model = get_peft_model(base, LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM"))
    sft = resolve(str(run / "sft" / "model"))
    save_policy(model, load_tokenizer(tiny), run / "dpo" / "model", dtype=torch.float32, base=sft)
    trained = logits(model)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(run / "dpo" / "model")), trained)
    moved = Path(shutil.move(run, tmp_path / "elsewhere"))
    with pytest.raises(OSError):  # the base is not where it was
        AutoPeftModelForCausalLM.from_pretrained(moved / "dpo" / "model")
    assert torch.equal(logits(with_base(moved, "dpo/model")), trained)
    again = load_policy(resolve(str(moved / "dpo" / "model")), ModelSection(name="tiny", dtype="float32"))
    torch.testing.assert_close(logits(again), trained, atol=1e-4, rtol=1e-4)


def test_a_saved_adapter_names_its_base_its_commit_and_its_fingerprint(tmp_path: Path) -> None:
    tiny = resolve("tiny")
    on_hub = ModelRef("a/b", "a/b", "hub", "0123456789abcdef", revision="c0ffee")
    section, lora = ModelSection(name="tiny", dtype="float32"), Lora(r=2)
    policy = trainable(load_policy(tiny, section), lora, task="CAUSAL_LM")
    for base, name, revision in ((tiny, tiny.path, None), (on_hub, "a/b", "c0ffee")):
        folder = tmp_path / base.kind
        save_policy(policy, load_tokenizer(tiny), folder, dtype=torch.float32, base=base)
        config = read_json(folder / "adapter_config.json")
        assert (config["base_model_name_or_path"], config["revision"]) == (name, revision)
        record = base_record(folder)
        assert record is not None and (record.spec, record.fingerprint) == (base.spec, base.fingerprint)


@pytest.mark.e2e
@pytest.mark.slow
def test_a_run_with_adapters_is_moved_and_merged(tmp_path: Path) -> None:
    duel("run", "smoke", "--out", str(tmp_path / "run"), *SMALL, "--set=model.lora.r=2", "--set=dpo.num_checkpoints=1")
    before = {
        arm: logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / arm / "model"))
        for arm in ("ppo", "dpo")
    }
    moved = Path(shutil.move(tmp_path / "run", tmp_path / "elsewhere"))
    done = duel("push", str(moved), "--to", str(tmp_path / "merged"), "--only", "ppo", "--only", "dpo")
    assert done.stderr.count("name a base that is gone") == 1
    for arm, trained in before.items():
        assert torch.equal(logits(with_base(moved, f"{arm}/model")), trained)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / arm)
        torch.testing.assert_close(logits(merged), trained, atol=1e-4, rtol=1e-4)
