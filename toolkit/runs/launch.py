"""Commands and stages in several processes, which `accelerate launch` starts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from toolkit.errors import EXIT_CODE_FILE, LAUNCHER_FILE, RecipeError
from toolkit.files import locked


def number_of_processes(arguments: Sequence[str]) -> int:
    """How many processes `accelerate launch` starts with these arguments; 1 without any.

    As there, the arguments come before the configuration file, and that comes before the number of GPUs. Raises
    RecipeError where the configuration file is not there or the number is below 1.
    """
    if not arguments:
        return 1
    import torch
    from accelerate.commands.config.config_args import default_config_file
    from accelerate.commands.launch import launch_command_parser

    parsed = launch_command_parser().parse_args([*arguments, "script"])
    number = parsed.num_processes
    file = Path(parsed.config_file or default_config_file)
    if parsed.config_file and not file.is_file():
        raise RecipeError("there is no such file", where=f"--config_file {file}", fix="name accelerate's own file")
    if number is None and file.is_file() and (parsed.config_file or not parsed.cpu):
        number = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("num_processes")
    if number is None:
        number = max(1, torch.cuda.device_count())
    if number < 1:
        raise RecipeError(f"{number} processes can do no work", where="--num_processes", fix="1 or more")
    return int(number)


def for_this_machine(arguments: Sequence[str]) -> list[str]:
    """Arguments of ``accelerate launch``, with what makes it start several processes where there is no GPU.

    By itself it starts one there, whatever ``--num_processes`` says. Its launcher for several GPUs starts them all, and
    they talk through gloo.
    """
    import torch

    if torch.cuda.is_available() or number_of_processes(arguments) < 2:
        return list(arguments)
    return [*(["--multi_gpu"] if "--multi_gpu" not in arguments else []), *(a for a in arguments if a != "--cpu")]


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
