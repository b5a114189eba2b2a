"""``scripts/bench/rm_card.py`` and ``rm_bias.py``: both run at their smallest, and their statistics are right."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from support.running import ROOT, run

sys.path.insert(0, str(ROOT / "scripts/bench"))
import rm_bias
import rm_card

SMALL = ("--prompts", "16", "--held-out", "12")


def bench(name: str, folder: Path, *words: str) -> dict[str, Any]:
    out = folder / f"{name}.json"
    script = str(ROOT / "scripts/bench" / f"{name}.py")
    run(sys.executable, script, *SMALL, *words, "--work", str(folder / name), "--out", str(out))
    return dict(json.loads(out.read_text()))
