"""Commands and stages in several processes, by `accelerate launch`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from toolkit.errors import EXIT_CODE_FILE


def for_this_machine(arguments: Sequence[str]) -> list[str]:
    """Arguments of ``accelerate launch``. Without a GPU it would start one process, whatever the number asked for:
    its launcher for several devices starts them all, and they talk through gloo."""
    import torch

    out = list(arguments)
    asked = [int(n) for a, n in zip(out, [*out[1:], "1"], strict=True) if a == "--num_processes" and n.isdigit()]
    asked += [int(a.partition("=")[2]) for a in out if a.startswith("--num_processes=")]
    if torch.cuda.is_available() or max(asked, default=1) < 2:
        return out
    return [*(["--multi_gpu"] if "--multi_gpu" not in out else []), *(a for a in out if a != "--cpu")]


def accelerate_launch(arguments: Sequence[str], module: str, own: Sequence[str]) -> int:
    """Run a module with its own arguments under `accelerate launch`; its exit code, and not the launcher's."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *for_this_machine(arguments), "-m", module, *own]
    with TemporaryDirectory() as folder:
        told = Path(folder) / "code"
        code = subprocess.run(command, check=False, env={**os.environ, EXIT_CODE_FILE: str(told)}).returncode
        return int(told.read_text(encoding="ascii")) if code and told.is_file() else code
