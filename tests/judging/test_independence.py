"""A judge that is a model of the run, or was trained on prompts of the evaluation, does not decide."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from toolkit.evals.intervals import BootstrapOptions
from toolkit.files import write_json, write_table
from toolkit.judging.deciding import judging_of
from toolkit.judging.independence import RunModels, dependence, trained_prompts
from toolkit.judging.records import Judgement
from toolkit.models.resolve import resolve
from toolkit.recipe.schema import EvaluateSection

BOOTSTRAP: BootstrapOptions = {"n_resamples": 100, "confidence": 0.95, "seed": 0}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A reward model in a run folder that was trained on the prompts a, b and c."""
    run = tmp_path / "run"
    folder = run / "reward_model" / "model"
    folder.mkdir(parents=True)
    (run / "data").mkdir()
    write_json(run / "manifest.json", {})
    write_table([{"prompt_id": key, "prompt": key} for key in "abc"], run / "data" / "train.parquet")
    write_json(folder / "config.json", {})
    return folder


ELSEWHERE = RunModels(Path("/nowhere"))


def test_the_prompts_of_a_models_run_are_known(model: Path, tmp_path: Path) -> None:
    assert trained_prompts(resolve(str(model))) == {"a", "b", "c"}
    alone = tmp_path / "alone"
    alone.mkdir()
    write_json(alone / "config.json", {})
    assert trained_prompts(resolve(str(alone))) == set() and trained_prompts(resolve("tiny")) == set()


def test_an_adapter_saw_the_prompts_of_its_run_and_of_its_bases(model: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "later" / "reward_model" / "model"
    adapter.mkdir(parents=True)
    write_json(adapter / "adapter_config.json", {"base_model_name_or_path": str(model)})
    assert trained_prompts(resolve(str(adapter))) == {"a", "b", "c"}
    write_json(tmp_path / "later" / "manifest.json", {})
    (tmp_path / "later" / "data").mkdir()
    write_table([{"prompt_id": "z"}], tmp_path / "later" / "data" / "train.parquet")
    assert trained_prompts(resolve(str(adapter))) == {"a", "b", "c", "z"}
    above = tmp_path / "above"
    above.mkdir()
    write_json(above / "adapter_config.json", {"base_model_name_or_path": str(adapter)})
    assert trained_prompts(resolve(str(above))) == {"a", "b", "c", "z"}


def test_judges_that_saw_the_prompts_are_named_with_how_many(model: Path) -> None:
    judges = [f"rm:{model}", f"implicit:tiny,{model}", f"llm:{model}", "rm:tiny", "gold", "rm", "llm:tiny"]
    reasons = dependence(judges, ["b", "c", "d"], ELSEWHERE)
    assert reasons == dict.fromkeys(judges[:3], "a model that was trained on 2 of these 3 prompts")
    assert dependence(judges, ["x", "y"], ELSEWHERE) == {}


def test_no_model_of_the_run_decides(model: Path, tmp_path: Path) -> None:
    """By any path and as any kind of judge: its policies, checkpoints and reward models, earlier ones and copies."""
    run = tmp_path / "this"
    places = [
        "sft/model",
        "dpo/model",
        "ppo/checkpoints/step-4",
        "dpo/checkpoints/kl-1",
        ".shelf/reward_model-ab/model",
    ]
    for place in places:
        (run / place).mkdir(parents=True)
        write_json(run / place / "config.json", {"where": place})
    (tmp_path / "link").symlink_to(run)
    copy = tmp_path / "copy"
    shutil.copytree(run / "ppo" / "checkpoints" / "step-4", copy)
    own = RunModels(run, {resolve(str(copy)).fingerprint: "rm_ppo@4"})

    judges = [
        f"{kind}:{root / place}" for kind in ("llm", "rm") for root in (run, tmp_path / "link") for place in places
    ]
    judges += [f"implicit:{run / 'dpo/checkpoints/kl-1'},{run / 'sft/model'}", f"implicit:tiny,{run / 'dpo/model'}"]
    reasons = dependence([*judges, f"llm:{copy}"], ["p"], own)
    assert list(reasons) == [*judges, f"llm:{copy}"]
    assert reasons[f"llm:{run / 'sft/model'}"] == "a model of this run, sft/model"
    assert reasons[f"llm:{copy}"] == "a model of this run, rm_ppo@4"
    assert reasons[f"implicit:tiny,{run / 'dpo/model'}"] == "a model of this run, dpo/model"

    # Another run's policy may be compared with this run's SFT policy: both may have started there.
    others = [
        f"implicit:{model},{run / 'sft/model'}",
        f"llm:{model}",
        "llm:tiny",
        "rm",
        "python:a:b",
        "file:votes.jsonl",
    ]
    # A file may name models that are not here, and people.
    assert dependence([*others, "llm:/no/such/model", "alice"], ["p"], own) == {}


def test_a_recorded_judge_is_looked_at_by_the_name_in_the_file(model: Path) -> None:
    judgements = [Judgement(f"p{i}", "rm_ppo", "dpo", f"llm:{model}", 1.0) for i in range(30)]
    own = RunModels(model.parents[1])
    judging, warnings = judging_of(
        judgements, ["file:votes.jsonl"], {}, EvaluateSection(), [f"p{i}" for i in range(30)], own, BOOTSTRAP
    )
    assert judging.unverified == {f"llm:{model}": 30}
    assert judging.pooled is None and f"llm:{model}" in judging.refused
    assert warnings[0] == f"judge llm:{model} is a model of this run, reward_model/model: it does not decide"
