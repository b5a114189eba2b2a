"""Stages, their keys, and which of them run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from toolkit.errors import RecipeError, StoreError
from toolkit.files import write_json
from toolkit.models.resolve import resolve
from toolkit.recipe.files import load_recipe
from toolkit.recipe.schema import flat
from toolkit.runs.plan import (
    STAGE_NAMES,
    PlannedStage,
    judge_fingerprints,
    outside_fingerprints,
    plan_stages,
    source_fingerprint,
    stages_to_run,
)
from toolkit.runs.store import STAGE_FILE, RunFolder
from toolkit.stages.contexts import CONTEXTS, from_json, settings_of, to_json

LATER = {"sft", "reward_model", "ppo", "dpo", "evaluate", "report"}


def plan(folder: Path, *sets: str) -> list[PlannedStage]:
    return plan_stages(load_recipe("smoke", sets), RunFolder(folder))


def finish(folder: Path, planned: PlannedStage) -> None:
    run = RunFolder(folder)
    run.work_dir(planned.spec.name, planned.key).mkdir(parents=True)
    (run.work_dir(planned.spec.name, planned.key) / "result").write_text(planned.key)
    run.finish(planned.spec.name, planned.key, {"fields": planned.fields}, planned.inputs)


# ---------------------------------------------------------------- keys


def test_the_fields_of_a_key_are_the_stages_settings_and_what_it_reads(tmp_path: Path) -> None:
    recipe = load_recipe("smoke").recipe
    settings = flat(recipe)
    for planned in plan(tmp_path):
        fields = dict(planned.fields)
        assert {name: fields.pop(name) for name in list(fields) if name in settings}.items() <= settings.items()
        assert fields.pop("code") and all(fields.pop(f"input {name}") for name in planned.spec.inputs)
        others = {
            "data": ["data_seed", "data.source (content)", "model (tokenizer, templates, generation)"],
            "sft": ["model (weights)", "model (tokenizer, templates, generation)"],
            "report": ["input recipe.resolved.yaml"],
        }
        assert list(fields) == others.get(planned.spec.name, [])
    dpo = next(planned for planned in plan(tmp_path) if planned.spec.name == "dpo")
    assert {"dpo.beta", "model.lora", "data.max_response_tokens", "seed"} <= dpo.fields.keys()
    assert not any(name.startswith(("ppo.", "data.s", "sft.")) for name in dpo.fields)


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ("seed=1", set(STAGE_NAMES)),
        ("model.name=smollm2-135m", set(STAGE_NAMES)),
        ("model.dtype=bfloat16", LATER),
        ("data.max_response_tokens=9", set(STAGE_NAMES)),
        ("data.eval_fraction=0.3", set(STAGE_NAMES)),
        ("sft.learning_rate=1", LATER),
        ("reward_model.center=false", {"reward_model", "ppo", "evaluate", "report"}),
        ("ppo.kl_coef=1", {"ppo", "evaluate", "report"}),
        ("dpo.beta=1", {"dpo", "evaluate", "report"}),
        ("evaluate.bootstrap=100", {"evaluate", "report"}),
        ("report.title=x", {"report"}),
        ("report_to=[tensorboard]", {"report"}),
        ("name=other", {"report"}),
    ],
)
def test_a_setting_changes_the_keys_of_the_stages_that_depend_on_it(
    tmp_path: Path, change: str, stages: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toolkit.runs.plan.outside_fingerprints", lambda *_: {})  # no weights are looked at
    before, after = plan(tmp_path), plan(tmp_path, change)
    assert {a.spec.name for a, b in zip(after, before, strict=True) if a.key != b.key} == stages


def test_the_number_of_processes_is_in_the_keys_of_the_stages_that_train(tmp_path: Path) -> None:
    """Two processes take two batches in a step, so that one process has another result."""
    loaded, folder = load_recipe("smoke"), RunFolder(tmp_path)
    alone, one, two = plan_stages(loaded, folder), plan_stages(loaded, folder, 1), plan_stages(loaded, folder, 2)
    assert [planned.key for planned in alone] == [planned.key for planned in one]
    assert not any("processes" in planned.fields for planned in one)
    trained = {planned.spec.name for planned in two if planned.fields.get("processes") == 2}
    assert trained == {"sft", "reward_model", "ppo", "dpo"}
    assert {a.spec.name for a, b in zip(one, two, strict=True) if a.key != b.key} == LATER
    for planned in two:
        if planned.spec.name in ("data", "sft"):
            finish(tmp_path, planned)
    states = {planned.spec.name: planned.state for planned in plan_stages(loaded, folder)}
    assert (states["data"].status, states["sft"].status) == ("cached", "stale")
    assert states["sft"].changed == ("processes",)
    whole, shards = two, plan_stages(loaded, folder, 2, sharded=True)  # checkpoints have another form
    assert {a.spec.name for a, b in zip(whole, shards, strict=True) if a.key != b.key} == LATER


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_a_context_comes_back_from_json(stage: str, tmp_path: Path) -> None:
    sets = ["model.lora={r: 4, alpha: 8}", "ppo.max_kl=3.5", "evaluate.judges=[gold, 'rm:tiny']", "data.columns={a: b}"]
    context = next(planned.context for planned in plan(tmp_path, *sets) if planned.spec.name == stage)
    write_json(tmp_path / "context.json", to_json(context))
    back = from_json(stage, to_json(context))
    assert back == context and type(back) is CONTEXTS[stage] and settings_of(back) == settings_of(context)


def test_what_lies_outside_the_run_is_part_of_the_key(tmp_path: Path) -> None:
    votes, data = tmp_path / "votes.jsonl", tmp_path / "pairs.jsonl"
    votes.write_text("1")
    data.write_text("1")
    sets = [f"data.source={data}", f"evaluate.judges=['file:{votes}', 'rm:tiny', 'implicit:tiny,tiny', gold, rm]"]
    recipe = load_recipe("smoke", sets).recipe
    first = {stage: outside_fingerprints(stage, recipe) for stage in STAGE_NAMES}
    of_text = "model (tokenizer, templates, generation)"
    assert set(first["data"]) == {"data.source (content)", of_text}
    assert set(first["sft"]) == {"model (weights)", of_text}
    assert set(first["evaluate"]) == {
        f"file:{votes} (content)",
        "rm:tiny (model)",
        "implicit:tiny,tiny (model)",
    }
    votes.write_text("2")
    data.write_text("2")
    second = {stage: outside_fingerprints(stage, recipe) for stage in STAGE_NAMES}
    assert [stage for stage in STAGE_NAMES if first[stage] != second[stage]] == ["data", "evaluate"]


OF_TEXT = "model (tokenizer, templates, generation)"
EDITS = {  # what is edited -> which stages run again by themselves, and what each says has changed
    "template.jinja": {"data": "model.chat_template (content)", "sft": "model.chat_template (content)"},
    "model/tokenizer.json": {"data": OF_TEXT, "sft": OF_TEXT},
    "model/chat_template.jinja": {"data": OF_TEXT, "sft": OF_TEXT},
    "model/generation_config.json": {"data": OF_TEXT, "sft": OF_TEXT},
    "model/model.safetensors": {"sft": "model (weights)"},
    "judge/model.safetensors": {"evaluate": "llm:judge (model)"},
    "judge/chat_template.jinja": {"evaluate": "llm:judge (model)"},
    "question.yaml": {"evaluate": "evaluate.judge.template (content)"},
    "scoring.py": {"evaluate": "python:scoring:score (source)"},
    "helpers.py": {"evaluate": "python:scoring:score (source)"},
}


@pytest.mark.parametrize("edited", EDITS)
def test_what_a_result_depends_on_is_noticed_when_it_is_edited(
    edited: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("model", "judge"):
        shutil.copytree(resolve("tiny").path, tmp_path / name)
        (tmp_path / name / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (tmp_path / "template.jinja").write_text("{{ messages[0].content }}")
    (tmp_path / "question.yaml").write_text("kind: choice")
    (tmp_path / "scoring.py").write_text("import json\nimport helpers\n")
    (tmp_path / "helpers.py").write_text("WEIGHT = 1\n")
    (tmp_path / "other.py").write_text("")  # nothing imports it
    judges = "evaluate.judges=['llm:judge', 'python:scoring:score', 'openai:m@http://localhost:1/v1']"
    sets = ["model.name=model", "model.chat_template=template.jinja", judges, "evaluate.judge.template=question.yaml"]
    for planned in plan(tmp_path / "run", *sets):
        finish(tmp_path / "run", planned)
    (tmp_path / "other.py").write_text("1")
    assert {planned.state.status for planned in plan(tmp_path / "run", *sets)} == {"cached"}
    with (tmp_path / edited).open("ab") as file:
        file.write(b" ")
    stale = {p.spec.name: p.state.changed for p in plan(tmp_path / "run", *sets) if p.state.status != "cached"}
    assert set(stale) >= {*EDITS[edited], "evaluate", "report"}
    assert {stage: [name for name in stale[stage] if not name.startswith("input")] for stage in stale} == {
        stage: [EDITS[edited][stage]] if stage in EDITS[edited] else [] for stage in stale
    }


def test_a_function_of_a_package_depends_on_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "judges").mkdir()
    (tmp_path / "judges" / "__init__.py").write_text("raise RuntimeError('nothing is imported to plan')")
    (tmp_path / "judges" / "length.py").write_text("from .words import count")
    (tmp_path / "judges" / "words.py").write_text("1")
    before = judge_fingerprints("python:judges.length:score")
    (tmp_path / "judges" / "words.py").write_text("2")
    assert judge_fingerprints("python:judges.length:score") != before
    assert judge_fingerprints("python:judges.no_such:score") == {"python:judges.no_such:score (source)": "missing"}
    assert judge_fingerprints("python:no_such:score") == {"python:no_such:score (source)": "missing"}


def test_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.parquet").write_text("1")
    known = {name: source_fingerprint(str(name), None) for name in ("reviews", tmp_path / "folder")}
    assert all(len(value) == 16 for value in known.values())
    assert source_fingerprint("no-such-name", None) == "missing"
    assert source_fingerprint("owner/missing.jsonl.gz", None) == "missing"

    class Hub:
        def dataset_info(self, name: str, revision: str | None) -> Any:
            if name == "owner/gone":
                raise OSError("no network")
            return type("Info", (), {"sha": f"commit of {name} at {revision}"})

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert source_fingerprint("owner/name", "v1") == "commit of owner/name at v1"
    assert source_fingerprint("owner/gone", "v1") == "v1" and source_fingerprint("owner/gone", None) == "unpinned"
    settings = ["data.source=owner/name", "data.revision=v1", "data.eval_source=owner/other", "model.name=tiny"]
    contents = outside_fingerprints("data", load_recipe("smoke", settings).recipe)
    assert contents["data.source (content)"] == "commit of owner/name at v1"
    assert contents["data.eval_source (content)"] == "commit of owner/other at None"


# ---------------------------------------------------------------- which run


def test_states_and_what_changed(tmp_path: Path) -> None:
    stages = plan(tmp_path)
    assert [planned.state.status for planned in stages] == ["missing"] * 7
    for planned in stages:
        finish(tmp_path, planned)
    assert [planned.state.status for planned in plan(tmp_path)] == ["cached"] * 7
    other = {planned.spec.name: planned for planned in plan(tmp_path, "dpo.beta=0.7")}
    assert [planned.state.status for planned in other.values()] == ["cached"] * 4 + ["stale"] * 3
    assert other["dpo"].state.changed == ("dpo.beta",) and other["evaluate"].state.changed == ("input dpo",)
    finish(tmp_path, other["dpo"])
    assert {p.spec.name: p.state.status for p in plan(tmp_path)}["dpo"] == "shelved"


def test_what_comes_from_the_shelf_counts_as_it_will_be(tmp_path: Path) -> None:
    """After another setting, going back takes everything from the shelf: the inputs are there again by then."""
    for planned in plan(tmp_path):
        finish(tmp_path, planned)
    for planned in plan(tmp_path, "dpo.beta=0.3"):
        if planned.state.status != "cached":
            finish(tmp_path, planned)
    back = plan(tmp_path)
    assert [planned.state.status for planned in back] == ["cached"] * 4 + ["shelved"] * 3
    assert stages_to_run(back, "evaluate", None) == ["evaluate", "dpo"]
    assert stages_to_run(back, "report", None) == ["report", "dpo", "evaluate"]


def test_only_and_until(tmp_path: Path) -> None:
    stages = plan(tmp_path)
    assert stages_to_run(stages, None, None) == list(STAGE_NAMES)
    assert stages_to_run(stages, None, "reward_model") == ["data", "sft", "reward_model"]
    assert stages_to_run(stages, "data", None) == ["data"]
    with pytest.raises(StoreError, match="needs data, sft") as caught:
        stages_to_run(stages, "dpo", None)
    assert "--until sft" in caught.value.fix
    for planned in stages[:2]:
        finish(tmp_path, planned)
    assert stages_to_run(plan(tmp_path), "dpo", None) == ["dpo"]
    finish(tmp_path, plan(tmp_path, "sft.weight_decay=1")[1])
    assert stages_to_run(plan(tmp_path), "dpo", None) == ["dpo", "sft"]  # from the shelf
    for options in (("dop", None), (None, "dop")):
        with pytest.raises(RecipeError, match="'dpo'"):
            stages_to_run(stages, *options)


def test_a_work_folder_means_that_a_stage_goes_on(tmp_path: Path) -> None:
    first = plan(tmp_path)[0]
    work = RunFolder(tmp_path).work_dir("data", first.key)
    work.mkdir(parents=True)
    assert plan(tmp_path)[0].state.status == "partial"
    assert not (work / STAGE_FILE).exists()


def test_further_prompts_are_a_part_of_ppos_key_and_must_be_there(tmp_path: Path) -> None:
    def keys(*sets: str) -> dict[str, str]:
        planned = plan_stages(load_recipe("smoke", sets), RunFolder(tmp_path / "run"))
        return {stage.spec.name: stage.key for stage in planned}

    file = tmp_path / "more.txt"
    with pytest.raises(RecipeError, match="there is no file") as refused:
        keys(f"ppo.prompts={file}")
    assert refused.value.where == "ppo.prompts"
    file.write_text("one\n", encoding="utf-8")
    one, without = keys(f"ppo.prompts={file}"), keys()
    file.write_text("one\ntwo\n", encoding="utf-8")
    two = keys(f"ppo.prompts={file}")
    assert {name for name in one if one[name] != two[name]} == {"ppo", "evaluate", "report"}
    assert {name for name in one if one[name] != without[name]} == {"ppo", "evaluate", "report"}


def test_dpo_reads_the_reward_model_where_that_labels_its_samples(tmp_path: Path) -> None:
    def of_dpo(*sets: str) -> PlannedStage:
        return next(stage for stage in plan(tmp_path, *sets) if stage.spec.name == "dpo")

    assert of_dpo().inputs == ("data", "sft")
    online = of_dpo("dpo.online={labels: rm}")
    assert online.inputs == ("data", "sft", "reward_model") and "input reward_model" in online.fields
    assert of_dpo("dpo.online={labels: gold}").inputs == ("data", "sft")
    other = of_dpo("dpo.online={labels: rm}", "reward_model.learning_rate=0.5")
    assert other.key != online.key
    assert of_dpo("reward_model.learning_rate=0.5").key == of_dpo().key
