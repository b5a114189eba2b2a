"""What the benchmarks share: real pairs, models and settings, peers in processes that take turns, one JSON file.

A peer is a function of the parsed arguments that returns ``{"pairs": n, "seconds": s, ...}``: the work that it did and
the time that this took, without loading the model. Peak memory is the process's, in all and above what it held before.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
# The modules whose work a bench times; what they import counts, too, inside the rooms that compute.
MODULES = {
    "rewards": ("toolkit.engine.engine", "toolkit.models.load"),
    "dpo": ("toolkit.stages.dpo",),
    "reward_model": ("toolkit.training.reward_model",),
    "ppo": ("toolkit.ppo.trainer",),
    "quickstart": (
        "toolkit.stages.sft",
        "toolkit.stages.reward_model",
        "toolkit.stages.ppo",
        "toolkit.stages.dpo",
    ),
    "gpu": ("toolkit.ppo.trainer", "toolkit.stages.dpo", "toolkit.training.reward_model"),
}
ROOMS = ("engine", "models", "training", "ppo", "stages", "measure")
KIB_IN_GIB = 2**20
Peer = Callable[[argparse.Namespace], dict[str, Any]]


def parser(description: str, name: str) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    options.add_argument("--rounds", type=int, default=2, help="turns that each peer has")
    options.add_argument("--threads", type=int, default=os.cpu_count())
    options.add_argument("--out", type=Path, default=RESULTS / f"{name}.json")
    options.add_argument("--only", nargs="*", help="run these peers only")
    options.add_argument("--peer", help=argparse.SUPPRESS)
    return options


def real_file(name: str) -> Path:
    """A file of the real data, in the folder that $DUEL_REAL_DATA names."""
    folder = os.environ.get("DUEL_REAL_DATA")
    if not folder:
        sys.exit("DUEL_REAL_DATA must name the folder of real preference data")
    return Path(folder) / name


def real_pairs(args: argparse.Namespace, n: int) -> tuple[Any, list[Any]]:
    """The tokenizer, and the first ``n`` pairs of hh_harmless."""
    return examples(args, real_file("hh_harmless/pairs.jsonl.gz"), n)


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


def model_section(args: argparse.Namespace, attention: str | None = None) -> Any:
    """Which model to load, in which precision; without ``attention`` with this project's own."""
    from toolkit.recipe.training import ModelSection

    return ModelSection(name=args.model, dtype=args.dtype, attn_implementation=attention)


def training_settings(
    section: Any, args: argparse.Namespace, folder: str, *, batch: int, steps: int
) -> tuple[Any, dict[str, Any]]:
    """A stage's settings (``section`` is their class) and the trainer's arguments, the same for every peer."""
    from toolkit.training.trainer import training_arguments

    settings = section(per_device_train_batch_size=batch, learning_rate=1e-4, warmup_ratio=0.0, logging_steps=1000)
    arguments = training_arguments(settings, Path(folder), seed=0, dtype=args.dtype, steps=steps)
    return settings, arguments | {"save_strategy": "no"}


def memory(field: str) -> float:
    """A field of this process's status (VmRSS, VmHWM) in GiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / KIB_IN_GIB


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
    turns = take_turns([name for name in peers if not args.only or name in args.only], args.rounds)
    medians = {
        name: {field: statistics.median(turn[field] for turn in of_peer) for field in of_peer[0]}
        for name, of_peer in turns.items()
    }
    measured_ratios = {
        name: round(medians[a][of_a] / medians[b][of_b], 3)
        for name, ((a, of_a), (b, of_b)) in ratios.items()
        if a in medians and b in medians
    }
    print(f"{'peer':<16}{'pairs/s':>10}{'peak GiB':>10}{'above loaded':>14}")
    for name, row in medians.items():
        print(f"{name:<16}{row['pairs_per_s']:>10.3f}{row['peak_gib']:>10.2f}{row['above_loaded_gib']:>14.2f}")
    for name, value in measured_ratios.items():
        print(f"{name}: {value:.2f}")
    record = {
        "what": dict(about),
        "command": command(),
        "date": date.today().isoformat(),
        "machine": {"cpus": os.cpu_count(), "threads": args.threads, "processor": processor()},
        "versions": versions(),
        "median": medians,
        "ratios": measured_ratios,
        "turns": turns,
        **({"code": code_of(args.out.stem)} if args.out.stem in MODULES else {}),
    }
    write(args.out, record)


def take_turns(
    peers: Sequence[str], rounds: int, options: Sequence[str] = (), pythons: Mapping[str, str] | None = None
) -> dict[str, list[dict[str, Any]]]:
    """What each peer measured in each of its turns, in a process of its own for each.

    ``options`` are added to this process's own; ``pythons`` has the interpreters of peers that need another.
    """
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in peers}
    for turn in range(rounds):
        for name in peers if turn % 2 == 0 else reversed(peers):
            python = (pythons or {}).get(name, sys.executable)
            words = [python, *sys.argv, *options, "--peer", name]
            done = subprocess.run(words, capture_output=True, text=True)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if done.returncode or not lines:
                sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
            turns[name].append(json.loads(lines[-1].removeprefix("RESULT ")))
            print(f"{turn + 1}/{rounds} {name}: {turns[name][-1]}", file=sys.stderr, flush=True)
    return turns


def command() -> str:
    """How this bench was called."""
    return " ".join(["python", "scripts/bench/" + Path(sys.argv[0]).name, *sys.argv[1:]])


def files_of(bench: str) -> list[Path]:
    """The files of the rooms that compute which a bench's modules reach."""
    from toolkit.files import PACKAGE, reached_modules

    reached = reached_modules(MODULES[bench], follows=lambda name: name.split(".")[1] in ROOMS)
    return sorted(PACKAGE.parent / f"{name.replace('.', '/')}.py" for name in reached)


def code_of(bench: str) -> str:
    """A hash over the code that a bench times."""
    texts = (code_alone(path.read_text(encoding="utf-8")) for path in files_of(bench))
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def code_alone(text: str) -> str:
    """Python code without docstrings, comments and formatting."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            first.value.value = ""
    return ast.unparse(tree)


def write(out: Path, record: Mapping[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"written: {out}", file=sys.stderr)


def processor() -> str:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return models[0].partition(":")[2].strip() if models else platform.processor()


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "trl", "peft")}
