"""Commands and stages in several processes, which `accelerate launch` starts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from toolkit.errors import EXIT_CODE_FILE, LAUNCHER_FILE, RecipeError, first_line
from toolkit.files import locked
from toolkit.recipe.rounds import kind_of
from toolkit.recipe.schema import Recipe

# Of accelerate's settings of FSDP, those that mean something here.
RESHARD, VERSION = "fsdp_reshard_after_forward", "fsdp_version"
UNSUPPORTED = {
    "fsdp_offload_params": ("weights that lie on the CPU while they train", "fsdp_offload_params: false"),
    "fsdp_activation_checkpointing": (
        "the checkpointing of FSDP",
        "fsdp_activation_checkpointing: false, and gradient_checkpointing: true in the recipe's sections",
    ),
}
_WITH_UNDERSCORES = {"--use-fsdp": "--use_fsdp", "--multi-gpu": "--multi_gpu"}


@dataclass(frozen=True)
class Launch:
    """What the arguments of ``accelerate launch`` ask for.

    ``sharding`` has the fields of :class:`toolkit.models.sharding.Sharding`. It is None where each process holds whole
    models. ``processes`` are those of all machines; the one with rank 0 is the main machine.
    """

    processes: int = 1
    machines: int = 1
    machine_rank: int = 0
    sharding: Mapping[str, bool] | None = None


def launch_of(arguments: Sequence[str]) -> Launch:
    """What ``accelerate launch`` does with these arguments; one process without any.

    As there, the arguments come before the configuration file, and that comes before the number of GPUs. Raises
    RecipeError where an argument is no option, the configuration file is not there or cannot be read, a number is out
    of range, or the processes would work in a way that duel does not know (DeepSpeed, FSDP 1, and others).
    """
    if not arguments:
        return Launch()
    import torch
    from accelerate.commands.config.config_args import default_config_file
    from accelerate.commands.launch import launch_command_parser

    parsed = launch_command_parser().parse_args([*arguments, "script"])
    if parsed.training_script_args:
        what = f"{parsed.training_script} is no option of accelerate launch"
        raise RecipeError(what, where="behind --", fix="options alone: duel itself is what is launched")
    number = parsed.num_processes
    file = Path(parsed.config_file or default_config_file)
    if parsed.config_file and not file.is_file():
        raise RecipeError("there is no such file", where=f"--config_file {file}", fix="name accelerate's own file")
    config = _configuration(file) if file.is_file() and (parsed.config_file or not parsed.cpu) else {}
    if number is None:
        number = config.get("num_processes")
    machines = int(parsed.num_machines or config.get("num_machines") or 1)
    rank = parsed.machine_rank if parsed.machine_rank is not None else config.get("machine_rank") or 0
    if not 0 <= rank < machines:  # it would wait for a main machine that never starts
        what = f"machine {rank} of {machines}: the first machine has rank 0, the last one {machines - 1}"
        raise RecipeError(
            what, where="--machine_rank", fix="another rank, or the number of all machines (--num_machines)"
        )
    if machines > 1 and (number is None or number % machines):
        what = f"{machines} machines share {'no' if number is None else number} processes"
        raise RecipeError(what, where="--num_processes", fix="that of all machines, with as many on each")
    if number is None:
        number = max(1, torch.cuda.device_count())
    if number < 1:
        raise RecipeError(f"{number} processes can do no work", where="--num_processes", fix="1 or more")
    kind, where = _kind_of_training(parsed, config, file)
    if kind not in ("NO", "FSDP") and not kind.startswith("MULTI_"):
        raise RecipeError(
            f"duel does not train under {kind}",
            where=where,
            fix="FSDP2, which shards full fine-tuning (--use_fsdp --fsdp_version 2), or an adapter (model.lora)",
        )
    sharding = _sharding(arguments, parsed, config.get("fsdp_config") or {}, where) if kind == "FSDP" else None
    return Launch(int(number), machines, int(rank), sharding if number > 1 else None)


def _configuration(file: Path) -> dict[str, Any]:
    """accelerate's configuration file. Raises RecipeError where it is none."""
    fix = "write it anew with `accelerate config`"
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"the file cannot be read: {first_line(error)}", where=str(file), fix=fix) from error
    if not isinstance(config, dict):
        raise RecipeError("the file has no settings with names", where=str(file), fix=fix)
    for name in ("num_processes", "num_machines", "machine_rank"):
        if not isinstance(config.get(name), int | None):
            what = f"{config[name]!r} is not a whole number"
            raise RecipeError(what, where=f"{file}: {name}", fix=fix)
    if not isinstance(config.get("fsdp_config"), dict | None):
        raise RecipeError("a section of settings is expected", where=f"{file}: fsdp_config", fix=fix)
    return config


def _kind_of_training(parsed: Any, config: Mapping[str, Any], file: Path) -> tuple[str, str]:
    """accelerate's name of how the processes train, and where it says so: an argument counts, or else the file."""
    flags = {"use_deepspeed": "DEEPSPEED", "use_fsdp": "FSDP", "use_megatron_lm": "MEGATRON_LM", "tpu": "XLA"}
    for flag, kind in flags.items():
        if getattr(parsed, flag):
            return kind, f"--{flag}"
    if vars(parsed).get("use_parallelism_config") or config.get("parallelism_config"):
        return "accelerate's parallelism_config", "--use_parallelism_config"
    if parsed.multi_gpu:
        return "MULTI_GPU", "--multi_gpu"
    # Without quotes YAML reads NO as false.
    return str(config.get("distributed_type") or "NO"), f"{file}: distributed_type"


def _sharding(arguments: Sequence[str], parsed: Any, section: Mapping[str, Any], where: str) -> dict[str, bool]:
    """The settings of FSDP2. Raises RecipeError for FSDP 1, and for what duel does not do."""
    asked = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in arguments}

    def value(name: str) -> str:
        of_file = section.get(name, section.get(name.removeprefix("fsdp_"), getattr(parsed, name)))
        return str(getattr(parsed, name) if name in asked else of_file).lower()

    if value(VERSION) != "2":
        raise RecipeError("duel does not train under FSDP 1", where=where, fix=f"{VERSION}: 2 (--{VERSION} 2)")
    for name, (what, fix) in UNSUPPORTED.items():
        if value(name) == "true":
            raise RecipeError(f"duel does not know {what}", where=name, fix=fix)
    return {"reshard_after_forward": value(RESHARD) not in ("false", "shard_grad_op", "no_reshard")}


def check_sharded(recipe: Recipe, stages: Collection[str]) -> None:
    """Raises RecipeError where one of these stages cannot train with sharded models."""
    kinds = {kind_of(stage) for stage in stages}
    what = "FSDP2 shards full fine-tuning, and this recipe trains an adapter"
    if recipe.model.lora is not None and kinds & {"sft", "reward_model", "ppo", "dpo", "rft"}:
        raise RecipeError(what, where="model.lora", fix="null, or start the processes without FSDP")
    kept = "no policy is kept for a KL milestone with sharded models"
    conflicts = [
        ("ppo", bool(recipe.ppo.kl_milestones), kept, "ppo.kl_milestones", "leave it out"),
        ("dpo", recipe.dpo.online is not None, "online DPO does not train with sharded models", "dpo.online", "null"),
        ("dpo", bool(recipe.dpo.kl_milestones), kept, "dpo.kl_milestones", "leave it out"),
    ]
    for section, trainer in (("dpo", recipe.dpo.trainer), ("reward_model", recipe.reward_model.trainer)):
        what = "TRL's trainer does not train with sharded models here"
        conflicts.append((section, trainer == "trl", what, f"{section}.trainer", "engine"))
    for kind, conflict, what, where, fix in conflicts:
        if conflict and kind in kinds:
            raise RecipeError(what, where=where, fix=fix)


def for_this_machine(arguments: Sequence[str]) -> list[str]:
    """Arguments of ``accelerate launch``, with what makes it start several processes where there is no GPU.

    By itself it starts one there, whatever ``--num_processes`` says. Its launcher for several GPUs starts them all, and
    they talk through gloo. The stages shard models themselves, so that launcher starts the processes of FSDP2, too.
    """
    import torch

    launch = launch_of(arguments)
    # accelerate takes each of these with hyphens, too.
    arguments = [_WITH_UNDERSCORES.get(argument, argument) for argument in arguments]
    alone = torch.cuda.is_available() and launch.sharding is None and launch.machines == 1
    if launch.processes < 2 or alone:
        return [argument for argument in arguments if argument != "--use_fsdp"]
    return [
        *(["--multi_gpu"] if "--multi_gpu" not in arguments else []),
        *(argument for argument in arguments if argument not in ("--cpu", "--use_fsdp")),
    ]


def accelerate_launch(arguments: Sequence[str], module: str, module_arguments: Sequence[str]) -> int:
    """Run a module under `accelerate launch`. Returns the module's exit code, which the launcher's hides."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *for_this_machine(arguments)]
    with TemporaryDirectory() as folder:
        code_file, launcher_file = Path(folder) / "code", Path(folder) / "launcher"
        environment = {**os.environ, EXIT_CODE_FILE: str(code_file), LAUNCHER_FILE: str(launcher_file)}
        with locked(launcher_file):  # a killed run lets go of it, and its processes end
            command = [*launcher, "-m", module, *module_arguments]
            # In a session of its own, the launcher hears no Ctrl-C of the terminal: this process ends it.
            code = subprocess.run(command, check=False, env=environment, start_new_session=True).returncode
        os.environ.setdefault("ACCELERATE_LOG_LEVEL", "ERROR")  # its warnings, equal in each stage, are shown once
        return int(code_file.read_text(encoding="ascii")) if code and code_file.is_file() else code
