"""All that runs on the engine against its peers: implicit rewards, DPO training, reward model training.

usage: python scripts/bench/scoring.py [--rounds N] [--model M] [--dtype T] [--threads N]

Runs ``rewards.py``, ``dpo.py`` and ``reward_model.py`` one after the other with these options. In each the peers take
turns, and each writes a file of results.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

BENCHES = ("rewards", "dpo", "reward_model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _, options = parser.parse_known_args()
    if any(option.startswith("--out") for option in options):
        parser.error("each bench has a file of its own: run one alone with --out")
    for name in BENCHES:
        print(f"{name}:", flush=True)
        subprocess.run([sys.executable, str(Path(__file__).with_name(f"{name}.py")), *options], check=True)


if __name__ == "__main__":
    main()
