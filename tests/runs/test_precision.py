"""``model.dtype: auto``: float32 where a machine converts to multiply bfloat16, and what a run records of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from toolkit.engine.fast import processor
from toolkit.errors import RecipeError
from toolkit.models.inspect import torch_dtype
from toolkit.progress import Reporter
from toolkit.recipe.files import load_recipe, resolved_yaml
from toolkit.runs import pipeline
from toolkit.runs.pipeline import RunOptions
from toolkit.runs.plan import plan_stages
from toolkit.runs.precision import load_for_run, slow_precision
from toolkit.runs.store import RunFolder
from toolkit.runs.sweep import Sweep


def machine(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr(processor, "_multiplies_bfloat16", lambda: dtype == "bfloat16")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_auto_is_decided_before_a_run_and_recorded(dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine(monkeypatch, dtype)
    loaded = load_for_run("quickstart")
    assert loaded.recipe.model.dtype == dtype
    assert torch_dtype("auto") == torch_dtype(dtype)
    [line] = [line for line in resolved_yaml(loaded).splitlines() if line.startswith("  dtype:")]
    assert line.split("#")[0].strip() == f"dtype: {dtype}"
    assert "auto (file:quickstart.yaml:" in line
    written = tmp_path / "resolved.yaml"
    written.write_text(resolved_yaml(loaded), encoding="utf-8")
    assert load_recipe(str(written)).recipe == loaded.recipe
    [job] = Sweep("quickstart", (), (), None, tmp_path).jobs()
    assert job.loaded.recipe.model.dtype == dtype


@pytest.mark.parametrize("named", ["bfloat16", "float32"])
def test_a_precision_that_is_named_stays(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, "float32")
    loaded = load_for_run("quickstart", [f"model.dtype={named}"])
    assert loaded.recipe.model.dtype == named
    assert loaded.origins["model.dtype"] == "--set"
    slow = slow_precision(loaded)
    assert (slow is not None) == (named == "bfloat16")
    assert slow is None or "model.dtype: float32" in slow
    machine(monkeypatch, "bfloat16")
    assert slow_precision(loaded) is None


def test_runs_of_one_command_say_once_that_the_precision_is_slow(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(monkeypatch, "float32")
    reporter = Reporter()
    loaded = load_for_run("smoke", ["model.dtype=bfloat16"])

    def stop(*_: object) -> None:
        raise RecipeError("the first stage is enough", where="here", fix="none")

    monkeypatch.setattr(pipeline, "complete", stop)
    for name in "ab":
        with pytest.raises(RecipeError, match="enough"):
            pipeline.run(loaded, tmp_path / name, reporter, RunOptions(until="sft"))
    assert capsys.readouterr().err.count("float32 is several times as fast") == 1


def test_stages_of_another_precision_are_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keys = {}
    for dtype in ("bfloat16", "float32"):
        machine(monkeypatch, dtype)
        loaded = load_for_run("smoke", ["model.dtype=auto"])
        keys[dtype] = {stage.spec.name: stage.key for stage in plan_stages(loaded, RunFolder(tmp_path))}
    assert keys["bfloat16"]["sft"] != keys["float32"]["sft"]
    assert keys["bfloat16"]["data"] == keys["float32"]["data"]


@pytest.mark.parametrize(
    ("capability", "avx512", "other", "fastest"),
    [
        ("AVX2", False, False, "float32"),
        ("AVX512", False, True, "float32"),  # the first of them, whose products in bfloat16 are conversions
        ("AVX512", True, True, "bfloat16"),
        ("DEFAULT", False, True, "bfloat16"),  # an ARM server
        ("DEFAULT", False, False, "float32"),
    ],
)
def test_which_processors_multiply_bfloat16(
    capability: str, avx512: bool, other: bool, fastest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: other)
    assert processor.fastest_dtype() == fastest


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_decides_where_there_is_one(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert processor.fastest_dtype() == ("bfloat16" if native else "float32")
