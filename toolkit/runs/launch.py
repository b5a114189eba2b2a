"""Commands and stages in several processes, which `accelerate launch` starts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from toolkit.errors import EXIT_CODE_FILE


def for_this_machine(arguments: Sequence[str]) -> list[str]:
    """Arguments of ``accelerate launch``, with what makes it start several processes where there is no GPU.

    By itself it starts one there, whatever ``--num_processes`` says. Its launcher for several GPUs starts them all, and
    they talk through gloo.
    """
    import torch

    numbers = [n for a, n in zip(arguments, [*arguments[1:], ""], strict=True) if a == "--num_processes"]
    numbers += [a.partition("=")[2] for a in arguments if a.startswith("--num_processes=")]
    n_processes = max((int(n) for n in numbers if n.isdigit()), default=1)
    if torch.cuda.is_available() or n_processes < 2:
        return list(arguments)
    return [*(["--multi_gpu"] if "--multi_gpu" not in arguments else []), *(a for a in arguments if a != "--cpu")]


def accelerate_launch(arguments: Sequence[str], module: str, module_arguments: Sequence[str]) -> int:
    """Run a module under `accelerate launch`. Returns the module's exit code, which the launcher's hides."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *for_this_machine(arguments)]
    with TemporaryDirectory() as folder:
        file = Path(folder) / "code"
        environment = {**os.environ, EXIT_CODE_FILE: str(file)}
        code = subprocess.run([*launcher, "-m", module, *module_arguments], check=False, env=environment).returncode
        return int(file.read_text(encoding="ascii")) if code and file.is_file() else code
