"""The numbers of a run, to compare before and after a change of the code.

``OMP_NUM_THREADS=1 python tests/support/golden.py smoke RUN [--write]`` compares a finished run with
``tests/runs/golden.json``, or records it there; it says what differs and exits with 1.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "runs" / "golden.json"
STAGES = ("sft", "reward_model", "ppo", "dpo")
# Of the log: what a clock says, and not the training.
TIMED = ("speed/", "train_runtime", "tokens")


def numbers_of(run: Path) -> dict[str, Any]:
    """Weights (a hash of each stage's), training curves, and the results but for costs."""
    found: dict[str, Any] = {"weights": {}, "curves": {}, "results": None}
    for stage in STAGES:
        files = sorted((run / stage).rglob("*.safetensors"))
        found["weights"][stage] = [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files]
        history = json.loads((run / stage / "stage.json").read_text())["metrics"].get("history", [])
        found["curves"][stage] = [
            {name: value for name, value in entry.items() if not name.startswith(TIMED)} for entry in history
        ]
    if (run / "results.json").is_file():
        results = json.loads((run / "results.json").read_text())
        found["results"] = {name: results[name] for name in ("policies", "win_rates", "implicit_vs_explicit")}
    return found


def machine() -> dict[str, str]:
    """What sums of floats depend on: bits are compared on equal machines alone."""
    import torch

    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    models = [
        line.partition(":")[2].strip() for line in text.splitlines() if line.startswith(("model name", "model\t"))
    ]
    kind = " ".join(models[:2]) or platform.processor()
    return {"processor": kind, "kernels": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}


def differences(recorded: Any, found: Any, where: str = "") -> list[str]:
    """Every place in which two nested values differ."""
    if isinstance(recorded, dict) and isinstance(found, dict):
        names = dict.fromkeys([*recorded, *found])
        return [d for name in names for d in differences(recorded.get(name), found.get(name), f"{where}/{name}")]
    if isinstance(recorded, list) and isinstance(found, list) and len(recorded) == len(found):
        return [
            d for i, pair in enumerate(zip(recorded, found, strict=True)) for d in differences(*pair, f"{where}/{i}")
        ]
    return [] if recorded == found else [f"{where}: {recorded} -> {found}"]


def main(name: str, run: Path, *, write: bool) -> int:
    everything = json.loads(FILE.read_text()) if FILE.is_file() else {}
    found = {"machine": machine(), **numbers_of(run)}
    if write:
        FILE.write_text(json.dumps({**everything, name: found}, indent=1) + "\n")
        return 0
    different = differences(everything[name], found)
    print("\n".join(different[:20]) or "equal, bit for bit")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), write="--write" in sys.argv))
