"""What the benchmarks share: real pairs as token ids, peers in processes of their own that take turns, one JSON file.

A peer is a function of the parsed arguments that returns ``{"pairs": n, "seconds": s, ...}``: the work it did and the
time that took, without loading the model. Peak memory is the process's, and above what it held before the work began.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
GIB = 2**20  # of the KiB that /proc counts in
Peer = Callable[[argparse.Namespace], dict[str, Any]]


def parser(description: str, name: str) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    found.add_argument("--model", default="smollm2-135m")
    found.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    found.add_argument("--rounds", type=int, default=2, help="turns that each peer has")
    found.add_argument("--threads", type=int, default=os.cpu_count())
    found.add_argument("--out", type=Path, default=RESULTS / f"{name}.json")
    found.add_argument("--only", nargs="*", help="these peers alone")
    found.add_argument("--peer", help=argparse.SUPPRESS)
    return found


def real_file(name: str) -> Path:
    """A file of the real data, in the folder that $DUEL_REAL_DATA names."""
    folder = os.environ.get("DUEL_REAL_DATA")
    if not folder:
        sys.exit("DUEL_REAL_DATA must name the folder of real preference data")
    return Path(folder) / name


def examples(args: argparse.Namespace, source: str | Path, n: int) -> tuple[Any, list[Any]]:
    """The tokenizer, and ``n`` prompts with their responses as training examples, in the order of the file."""
    from toolkit.models.encoding import text_encoder
    from toolkit.models.resolve import resolve
    from toolkit.models.tokenizer import load_tokenizer
    from toolkit.preferences.reading import read_preferences
    from toolkit.training.batch import examples_of

    tokenizer = load_tokenizer(resolve(args.model))
    rows = read_preferences(str(source)).rows[: 2 * n]
    return tokenizer, examples_of(rows, text_encoder(tokenizer, rows[0].prompt), 512)[:n]


def memory(field: str) -> float:
    """A field of this process's status (VmRSS, VmHWM) in GiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / GIB


def measured(work: Callable[[], int]) -> dict[str, Any]:
    """Run ``work``, which returns the pairs that it did: seconds, memory before, peak, and the peak above it."""
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    started = time.perf_counter()
    pairs = work()
    seconds = time.perf_counter() - started
    peak = memory("VmHWM")
    return {
        "pairs": pairs,
        "seconds": round(seconds, 3),
        "pairs_per_s": round(pairs / seconds, 4),
        "loaded_gib": round(before, 3),
        "peak_gib": round(peak, 3),
        "above_loaded_gib": round(peak - before, 3),
    }


def main(
    args: argparse.Namespace,
    peers: Mapping[str, Peer],
    ratios: Mapping[str, tuple[tuple[str, str], tuple[str, str]]],
    about: Mapping[str, str],
) -> None:
    """Take turns, print a table and the ratios, and write ``args.out``.

    ``ratios``: name -> two of (peer, field): the median of the first over the median of the other.
    """
    if args.peer:
        import torch
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.set_num_threads(args.threads)
        print("RESULT " + json.dumps(peers[args.peer](args)))
        return
    chosen = [name for name in peers if not args.only or name in args.only]
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    for turn in range(args.rounds):
        for name in chosen if turn % 2 == 0 else reversed(chosen):
            command = [sys.executable, *sys.argv, "--peer", name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if done.returncode or not lines:
                sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
            turns[name].append(json.loads(lines[-1].removeprefix("RESULT ")))
            print(f"{turn + 1}/{args.rounds} {name}: {turns[name][-1]}", file=sys.stderr, flush=True)
    summary = {
        name: {field: statistics.median(turn[field] for turn in found) for field in found[0]}
        for name, found in turns.items()
    }
    found_ratios = {
        name: round(summary[a][of_a] / summary[b][of_b], 3)
        for name, ((a, of_a), (b, of_b)) in ratios.items()
        if a in summary and b in summary
    }
    print(f"{'peer':<16}{'pairs/s':>10}{'peak GiB':>10}{'above loaded':>14}")
    for name, row in summary.items():
        print(f"{name:<16}{row['pairs_per_s']:>10.3f}{row['peak_gib']:>10.2f}{row['above_loaded_gib']:>14.2f}")
    for name, value in found_ratios.items():
        print(f"{name}: {value:.2f}")
    record = {
        "what": dict(about),
        "command": " ".join(["python", "scripts/bench/" + Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"cpus": os.cpu_count(), "threads": args.threads, "processor": processor()},
        "versions": versions(),
        "median": summary,
        "ratios": found_ratios,
        "turns": turns,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"written: {args.out}")


def processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.processor()


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "trl", "peft")}
