"""Times what reads preference files on files of N short rows: seconds, processor seconds and peak memory, by command.

usage: python scripts/bench/rows.py [--rows 10000 100000 1000000] [--only data check ...] [--out FILE]

Every measure is a command of its own process, on a file that is made here from a fixed seed: pairs of short texts, of
which a fifth belong to the prompt of the row before. What was measured is added to ``results/rows.json`` beside this
file; an entry of the same measure and size is replaced.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import harness

SHARED = 0.2  # of the rows have the prompt of the row before
PROMPT_WORDS, RESPONSE_WORDS = 8, 10
TOKENS = range(300, 500)  # ids of words of `tiny`
TEXT = """the a film book hotel meal soup waiter plot music scene story end was is had felt very rather quite too good
bad slow long short bright warm cold kind late fresh dull funny sad we they I it and but so because with of in on at to
that this again never always place town room view price night day friend actor author chef liked loved left found said
thought tasted looked seemed worked"""
WORDS = TEXT.split()


def texts(rng: random.Random, n: int) -> str:
    return " ".join(rng.choices(WORDS, k=n))


def prompts(n: int, rng: random.Random) -> Iterator[str]:
    """``n`` prompts, of which some are that of the row before."""
    prompt = ""
    for k in range(n):
        if not k or rng.random() >= SHARED:
            prompt = f"{texts(rng, PROMPT_WORDS)} {k}"
        yield prompt


def write(path: Path, rows: Iterator[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def pairs(path: Path, n: int) -> Path:
    rng = random.Random(n)
    sides = ("chosen", "rejected")
    rows = ({"prompt": p} | {side: texts(rng, RESPONSE_WORDS) for side in sides} for p in prompts(n, rng))
    return write(path, rows)


def table(path: Path, n: int) -> Path:
    """The pairs as a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pairs(path, n).open(encoding="utf-8") as lines:
        records = pa.Table.from_pylist([json.loads(line) for line in lines])
    pq.write_table(records, path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def conversations(path: Path, n: int) -> Path:
    rng = random.Random(n)
    turns = ([{"role": "user", "content": prompt}] for prompt in prompts(n, rng))
    sides = ("chosen", "rejected")
    return write(path, ({"prompt": p} | {side: texts(rng, RESPONSE_WORDS) for side in sides} for p in turns))


def judgements(path: Path, n: int) -> Path:
    rng = random.Random(n)
    names = {"policy": "a", "baseline": "b", "judge": "j", "order": 0}
    rows = (names | {"prompt_id": f"{k:016x}", "preference": rng.choice([0.0, 0.5, 1.0, 1.0])} for k in range(n))
    return write(path, rows)


def both_orders(path: Path, n: int) -> Path:
    """Judgements of n / 2 prompts, each in both orders, with what is known of the responses' lengths."""
    rng = random.Random(n)
    asked = ({"policy": "a", "baseline": "b", "judge": "j", "prompt_id": f"{k:016x}"} for k in range(n // 2))
    shown = (row | {name: rng.randint(20, 90) for name in ("policy_length", "baseline_length")} for row in asked)
    rows = (row | {"order": k, "preference": rng.choice([0.0, 0.5, 1.0, 1.0])} for row in shown for k in (0, 1))
    return write(path, rows)


def responses(path: Path, n: int) -> Path:
    """Two policies' answers to n / 2 prompts."""
    rng = random.Random(n)
    asked = [f"The film was {texts(rng, PROMPT_WORDS)} {k}" for k in range(n // 2)]
    rows = ({"prompt": p, "policy": name, "response": texts(rng, RESPONSE_WORDS)} for p in asked for name in "ab")
    return write(path, rows)


def samples(path: Path, n: int) -> Path:
    """A table of a run: two policies' samples for n / 2 prompts, with their token ids."""
    from toolkit.preferences.rows import prompt_id
    from toolkit.preferences.samples import SAMPLES_FILE, Sample, write_samples

    rng = random.Random(n)
    asked = [f"The film was {texts(rng, PROMPT_WORDS)} {k}" for k in range(n // 2)]
    drawn = (
        Sample(
            prompt_id(p), name, prompt=p, response=texts(rng, RESPONSE_WORDS), response_ids=rng.choices(TOKENS, k=15)
        )
        for p in asked
        for name in "ab"
    )
    columns = ["prompt_id", "policy", "sample_index", "prompt", "response", "response_ids", "truncated"]
    write_samples(drawn, path.with_name(SAMPLES_FILE), columns)
    return path.with_name(SAMPLES_FILE)


def in_own_process(function: Callable[..., Path], *arguments: Any) -> Path:
    """What a function makes, in a process of its own: the peak of a command begins with that of what starts it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def reward_model(out: Path) -> Path:
    """A reward model on ``tiny`` that was not trained, in a folder."""
    from toolkit.models.load import new_reward_model
    from toolkit.models.resolve import resolve
    from toolkit.models.tokenizer import load_tokenizer
    from toolkit.recipe.training import ModelSection

    ref, folder = resolve("tiny"), out / "rm"
    tokenizer = load_tokenizer(ref)
    model = new_reward_model(ref, ModelSection(dtype="float32"), int(tokenizer.pad_token_id), 0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Measure:
    """A command on a file: ``make`` writes it, ``arguments`` has those of ``duel`` for (file, folder for results)."""

    make: Callable[[Path, int], Path]
    arguments: Callable[[Path, Path], list[str]]
    stage: str | None = None  # of a run, whose own seconds and peak count as well
    most: int = sys.maxsize  # rows: a model that reads more takes hours


def _data(source: Path, out: Path) -> list[str]:
    limits = [f"data.{name}=null" for name in ("train_prompts", "eval_prompts", "max_responses")]
    settings = [f"data.source={source}", "data.eval_fraction=0.1", *limits]
    given = [word for setting in settings for word in ("--set", setting)]
    return ["run", "smoke", "--until", "data", "--out", str(out / "run"), *given]


def _label(source: Path, out: Path, judge: str, *more: str) -> list[str]:
    return ["label", "--data", str(source), "--judge", judge, *more, "--out", str(out / "l.jsonl.gz")]


def _judge(source: Path, out: Path) -> list[str]:
    return ["judge", str(source), "--judge", "gold", "--out", str(out / "judged.parquet")]


def _score(source: Path, out: Path) -> list[str]:
    model = in_own_process(reward_model, out)
    return ["score", "--rm", str(model), "--data", str(source), "--out", str(out / "scores.parquet")]


MEASURES = {
    "data": Measure(pairs, _data, "data"),
    "data of conversations": Measure(conversations, _data, "data"),
    "data of a Parquet file": Measure(table, _data, "data"),
    "check": Measure(pairs, lambda source, out: ["check", str(source), "--model", "tiny"]),
    "label": Measure(pairs, lambda source, out: _label(source, out, "gold")),
    "label by a reward model": Measure(
        pairs, lambda source, out: _label(source, out, f"rm:{in_own_process(reward_model, out)}"), most=100_000
    ),
    "label by an implicit reward": Measure(
        pairs, lambda source, out: _label(source, out, "implicit:tiny,tiny"), most=100_000
    ),
    "label by a language model": Measure(
        pairs, lambda source, out: _label(source, out, "llm:tiny", "--principles", "hhh"), most=10_000
    ),
    "winrate": Measure(judgements, lambda source, out: ["winrate", str(source), "--json"]),
    "winrate, both orders": Measure(both_orders, lambda source, out: ["winrate", str(source), "--json"]),
    "judge": Measure(responses, _judge),
    "judge of samples": Measure(samples, _judge),
    "score": Measure(pairs, _score, most=100_000),
    "rewards": Measure(
        pairs,
        lambda source, out: [
            *("rewards", "--policy", "tiny", "--reference", "tiny", "--any-reference"),
            *("--data", str(source), "--out", str(out / "rewards.parquet")),
        ],
        most=100_000,
    ),
}


def measured(measure: Measure, source: Path, out: Path) -> dict[str, Any]:
    """Run the command: seconds, processor seconds of its processes, and the peak of the largest one."""
    command = [sys.executable, "-m", "toolkit.cli", "-q", *measure.arguments(source, out)]
    started = time.perf_counter()
    with (out / "output.txt").open("w+") as output:
        child = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | {"DUEL_CACHE": str(out)})
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - started
        if status:
            output.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{output.read()[-3000:]}")
    figures = {
        "seconds": round(seconds, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_gib": round(usage.ru_maxrss / harness.KIB_IN_GIB, 3),
    }
    if measure.stage:
        stage = json.loads((out / "run" / "manifest.json").read_text())["stages"][measure.stage]
        figures |= {"stage_s": stage["wall_s"], "stage_peak_gib": stage["peak_gib"]}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES), help="take these measures only")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "rows.json")
    options = parser.parse_args()
    record = json.loads(options.out.read_text()) if options.out.is_file() else {}
    entries = {(entry["measure"], entry["rows"]): entry for entry in record.get("measured", [])}
    for n in options.rows:
        for name in options.only:
            if n > MEASURES[name].most:
                continue
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder)
                source = in_own_process(MEASURES[name].make, out / "rows.jsonl", n)
                size = source.stat().st_size
                figures = measured(MEASURES[name], source, out)
            load = round(os.getloadavg()[0], 1)  # above the number of cores, the seconds are those of a shared machine
            about = {"measure": name, "rows": n, "mib": round(size / 2**20, 1), "date": date.today().isoformat()}
            entries[name, n] = about | figures | {"load_average": load}
            print(entries[name, n], file=sys.stderr, flush=True)
            order = sorted(entries, key=lambda key: (list(MEASURES).index(key[0]), key[1]))
            machine = {"cpus": os.cpu_count(), "processor": harness.processor()}
            record = {"what": __doc__.splitlines()[0], "command": "python scripts/bench/rows.py", "machine": machine}
            harness.write(
                options.out, record | {"versions": harness.versions(), "measured": [entries[key] for key in order]}
            )


if __name__ == "__main__":
    main()
