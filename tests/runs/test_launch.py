"""A run whose stages have two processes: what follows ``--`` reaches ``accelerate launch``, and they share the
work, also where there is no GPU. In test_signals.py they share SFT, and end with their run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.running import SMALL, duel, duel_process

from toolkit.errors import RecipeError
from toolkit.recipe.files import load_recipe
from toolkit.runs.launch import check_sharded, for_this_machine, launch_of
from toolkit.stages.__main__ import check_processes


def test_how_many_processes_the_arguments_ask_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch_of(()).processes == 1
    assert launch_of(["--num_processes", "3"]).processes == launch_of(["--num-processes=3"]).processes == 3
    config = tmp_path / "accelerate.yaml"
    config.write_text("distributed_type: MULTI_GPU\nnum_processes: 4\n")
    assert launch_of(["--config_file", str(config)]).processes == 4
    assert launch_of([f"--config_file={config}", "--num_processes", "2"]).processes == 2
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(tmp_path / "none"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert launch_of(["--mixed_precision", "bf16"]).processes == 8
    with pytest.raises(RecipeError, match="no such file"):
        launch_of(["--config_file", str(tmp_path / "none")])
    with pytest.raises(RecipeError, match="0 processes"):
        launch_of(["--num_processes", "0"])


@pytest.mark.parametrize(
    ("text", "what", "where"),
    [
        ("num_processes: [", "cannot be read", "accelerate.yaml"),
        ("- num_processes", "no settings", "accelerate.yaml"),
        ("num_processes: two", "'two' is not a whole number", "accelerate.yaml: num_processes"),
        ("num_processes: 2\nnum_machines: two", "'two' is not a whole number", "accelerate.yaml: num_machines"),
        ("num_processes: 2\ndistributed_type: FSDP\nfsdp_config: yes", "section", "accelerate.yaml: fsdp_config"),
    ],
)
def test_a_configuration_file_that_is_none_is_refused(tmp_path: Path, text: str, what: str, where: str) -> None:
    config = tmp_path / "accelerate.yaml"
    config.write_text(text)
    with pytest.raises(RecipeError, match=what) as caught:
        launch_of(["--config_file", str(config)])
    assert str(caught.value.where).endswith(where)


@pytest.mark.parametrize(("machines", "rank"), [("1", "1"), ("2", "2"), ("2", "-1")])
def test_a_machine_that_no_main_machine_waits_for_is_refused(machines: str, rank: str) -> None:
    with pytest.raises(RecipeError, match=f"machine {rank} of {machines}") as caught:
        launch_of(["--num_processes", "2", "--num_machines", machines, "--machine_rank", rank])
    assert caught.value.where == "--machine_rank"


FSDP2 = ["--use_fsdp", "--fsdp_version", "2", "--num_processes", "2"]


def test_a_script_behind_the_options_is_refused() -> None:
    for arguments in (["--num_processes", "2", "train.py"], ["train.py", "--num_processes", "2"]):
        with pytest.raises(RecipeError, match=r"train\.py is no option of accelerate launch"):
            launch_of(arguments)


def test_what_the_arguments_say_about_sharding(tmp_path: Path) -> None:
    frees, keeps = {"reshard_after_forward": True}, {"reshard_after_forward": False}
    assert launch_of(FSDP2).sharding == frees
    assert launch_of([*FSDP2, "--fsdp_reshard_after_forward=false"]).sharding == keeps
    assert launch_of([*FSDP2[:-1], "1"]).sharding is None  # one process has all shards
    assert launch_of(["--num_processes", "2"]).sharding is None
    config = tmp_path / "fsdp.yaml"
    config.write_text(
        "distributed_type: FSDP\nnum_processes: 2\nfsdp_config:\n"
        "  fsdp_version: 2\n  fsdp_reshard_after_forward: false\n  fsdp_offload_params: false\n"
    )
    assert launch_of(["--config_file", str(config)]).sharding == keeps
    assert launch_of(["--config_file", str(config), "--fsdp_reshard_after_forward", "true"]).sharding == frees
    assert launch_of(["--config_file", str(config), "--multi_gpu"]).sharding is None
    # The stages shard models; accelerate starts plain processes, which it would not without a GPU.
    assert for_this_machine(FSDP2) == ["--multi_gpu", "--fsdp_version", "2", "--num_processes", "2"]
    assert for_this_machine(["--use-fsdp", *FSDP2[1:]]) == for_this_machine(FSDP2)
    assert for_this_machine(["--config_file", str(config)]) == ["--multi_gpu", "--config_file", str(config)]


@pytest.mark.parametrize(
    ("arguments", "config", "what", "where"),
    [
        (["--use_deepspeed"], "", "does not train under DEEPSPEED", "--use_deepspeed"),
        ([], "distributed_type: DEEPSPEED", "does not train under DEEPSPEED", "accelerate.yaml: distributed_type"),
        ([], "distributed_type: MEGATRON_LM", "does not train under MEGATRON_LM", "distributed_type"),
        ([], "distributed_type: XLA", "does not train under XLA", "distributed_type"),
        (
            [],
            "distributed_type: NO\nparallelism_config: {parallelism_config_tp_size: 2}",
            "parallelism_config",
            "--use",
        ),
        (["--use_fsdp"], "", "under FSDP 1", "--use_fsdp"),
        ([], "distributed_type: FSDP", "under FSDP 1", "distributed_type"),
        ([], "distributed_type: FSDP\nfsdp_config: {fsdp_version: 1}", "under FSDP 1", "distributed_type"),
        ([*FSDP2, "--fsdp_offload_params", "true"], "", "on the CPU", "fsdp_offload_params"),
        (
            [*FSDP2, "--fsdp_activation_checkpointing=true"],
            "",
            "checkpointing of FSDP",
            "fsdp_activation_checkpointing",
        ),
    ],
)
def test_other_ways_to_train_are_refused(
    arguments: list[str], config: str, what: str, where: str, tmp_path: Path
) -> None:
    if config:
        (tmp_path / "accelerate.yaml").write_text(config)
        arguments = [*arguments, "--config_file", str(tmp_path / "accelerate.yaml"), "--num_processes", "2"]
    with pytest.raises(RecipeError, match=what) as caught:
        launch_of(arguments)
    assert where in caught.value.where and caught.value.fix


@pytest.mark.parametrize(
    ("sets", "stages", "where"),
    [
        (["model.lora.r=4"], ["sft"], "model.lora"),
        (["model.lora.r=4"], ["ppo@2"], "model.lora"),
        (["ppo.kl_milestones=[1.0]"], ["ppo"], "ppo.kl_milestones"),
        (["dpo.online.labels=gold"], ["dpo"], "dpo.online"),
        (["dpo.kl_milestones=[1.0]"], ["dpo@2"], "dpo.kl_milestones"),
        (["dpo.trainer=trl"], ["dpo"], "dpo.trainer"),
        (["reward_model.trainer=trl"], ["reward_model"], "reward_model.trainer"),
    ],
)
def test_what_does_not_train_with_sharded_models_is_refused(sets: list[str], stages: list[str], where: str) -> None:
    recipe = load_recipe("smoke", ["model.lora=null", *sets]).recipe
    check_sharded(recipe, ["data", "evaluate"])
    with pytest.raises(RecipeError) as caught:
        check_sharded(recipe, stages)
    assert caught.value.where == where and caught.value.fix


def test_the_command_line_refuses_deepspeed_and_sharded_adapters(tmp_path: Path) -> None:
    for launch, words in ((["--use_deepspeed"], "DEEPSPEED"), (FSDP2, "this recipe trains an adapter")):
        done = duel("run", "smoke", "--set=model.lora.r=4", "--out", str(tmp_path), "--", *launch, check=2)
        assert words in done.stderr and not (tmp_path / "manifest.json").exists()
    done = duel(
        "rewards", "--policy=tiny", "--reference=tiny", "--data=reviews", "--out=t.parquet", "--", *FSDP2, check=2
    )
    assert "each holds whole models" in done.stderr


def test_a_stage_refuses_another_number_of_processes_than_its_key_says() -> None:
    check_processes(2, 2)
    with pytest.raises(RecipeError, match="started 4 processes, and the stage's key is that of 2"):
        check_processes(4, 2)


@pytest.mark.slow
@pytest.mark.e2e
def test_two_processes_share_every_stage(tmp_path: Path) -> None:
    out = tmp_path / "run"
    milestones = [
        "--set=dpo.per_device_train_batch_size=8",
        "--set=dpo.logging_steps=1",
        "--set=dpo.num_checkpoints=1",
        "--set=dpo.kl_milestones=[0.000001]",
    ]
    options = [*SMALL, *milestones, "--out", str(out)]
    done = duel_process("run", "smoke", *options, "--", "--num_processes", "2")
    assert "Traceback" not in done.stderr
    for stage in ("sft", "reward_model", "ppo", "dpo"):
        record = json.loads((out / stage / "stage.json").read_text(encoding="utf-8"))
        assert record["metrics"]["processes"] == record["fields"]["processes"] == 2, stage
    # The evaluation is the same for any number of processes, so its key does not have it.
    evaluated = json.loads((out / "evaluate" / "stage.json").read_text(encoding="utf-8"))
    assert evaluated["metrics"]["processes"] == 2 and "processes" not in evaluated["fields"]
    assert json.loads((out / "results.json").read_text(encoding="utf-8"))["verdict"]
    assert record["metrics"]["steps"] == 2  # DPO's 24 prompts, 8 for each process
    for arm in ("ppo", "dpo"):
        assert (out / arm / "model" / "model.safetensors").is_file()
    curves = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    # The smoke recipe's 16 responses are those of each process: one rollout of 32 for both.
    rollouts = [entry for entry in curves if entry.get("stage") == "ppo" and "objective/kl" in entry]
    assert len(rollouts) == 1 and rollouts[0]["objective/kl"] == 0
    # Each process samples its share of the prompts that DPO's KL is estimated on.
    kl = [entry["objective/kl"] for entry in curves if entry.get("stage") == "dpo" and "objective/kl" in entry]
    assert len(kl) == 2 and all(isinstance(value, float) for value in kl)
    assert not (out / "dpo" / "checkpoints").is_dir() or (out / "dpo" / "checkpoints" / "kl-1e-06").is_dir()
    # One process takes none of it for its own.
    planned = json.loads(duel_process("run", "smoke", *options, "--dry-run", "--json").stdout)
    states = {stage["stage"]: (stage["state"], stage["changed"]) for stage in planned["stages"]}
    assert states["data"] == ("cached", [])
    assert all(states[stage] == ("stale", ["processes"]) for stage in ("sft", "reward_model", "ppo", "dpo"))


@pytest.mark.slow
@pytest.mark.e2e
def test_a_run_trains_with_sharded_models_and_evaluates_what_they_became(tmp_path: Path) -> None:
    out = tmp_path / "run"
    still = [f"--set={section}.warmup_ratio=0" for section in ("sft", "ppo", "dpo", "rft")]  # the only step has a rate
    options = [*SMALL, *still, "--set=model.lora=null", "--set=rft.n=2", "--out", str(out)]
    done = duel_process("run", "smoke", *options, "--", *FSDP2)
    assert "Traceback" not in done.stderr
    records = {path.parent.name: json.loads(path.read_text()) for path in out.glob("*/stage.json")}
    assert {records[stage]["metrics"]["processes"] for stage in ("sft", "reward_model", "ppo", "dpo", "rft")} == {2}
    for stage in ("sft", "reward_model", "ppo", "dpo", "rft"):
        [entry] = [name for name in records[stage]["files"] if name.endswith("model.safetensors")][-1:]
        assert (out / stage / entry).stat().st_size > 500_000, stage  # all weights, and not those of a shard
    results = json.loads((out / "results.json").read_text())
    kl = {row["policy"]: row["kl_nats"] for row in results["policies"]}
    assert kl["dpo"] != 0 and kl["rm_ppo"] != 0 and kl["rft"] != 0 and results["verdict"]
