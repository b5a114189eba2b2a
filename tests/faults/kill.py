"""Kill duel's commands with SIGKILL at random moments, run them again until they complete, and compare the ends.

    python tests/faults/kill.py --kills 100 --seed 0
    python tests/faults/kill.py --kills 4 --only "run; score"

Every command runs once without a kill. Then it is killed up to three times, at moments drawn over the whole of that
time, and run again with the same words until it completes. What it left must be what the first one left: files, tables
and logs, bit for bit, without times. A judge behind a fake endpoint counts its questions: beside the ones in flight at
a kill none comes twice. Exit code 1 where something differs.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import pyarrow.parquet as pq  # noqa: E402
from support.finished_study import SMALL_STUDY  # noqa: E402
from support.running import ROOT, SMALL, command, environment  # noqa: E402

KILLS_PER_TRIAL = 3
# Nothing is on disk before a command has its imports.
STARTING_S = 1.5
# What the clock decides, what depends on it, and what counts the answers of one call alone.
TIMES = {
    *("started", "finished", "wall_s", "time", "peak_gib", "seconds", "left_s", "speed", "provenance", "sealed"),
    *("wall_s_low", "wall_s_high", "matched_compute", "n_remembered", "files", "inputs", "responses_computed"),
    *("responses_per_second", "tokens_per_second"),
    *("new_prompt_tokens", "new_completion_tokens", "new_cost_usd", "out", "command", "sentence_of_cost"),
}
# Of these files a resumed run has more lines, or another time; and what is there to go on from.
LEFT_OUT = ("metrics.jsonl", ".progress.json", ".lock", ".workers", "report.html", "attempts.json")


# ---------------------------------------------------------------- what is left


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in TIMES and "speed/" not in k and "wall_s" not in k}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def without_seconds(value: Any) -> Any:
    """Sentences of costs and warnings name seconds."""
    if isinstance(value, dict):
        return {k: without_seconds(v) for k, v in value.items() if not (k == "sentence" and "took" in str(v))}
    return [without_seconds(item) for item in value] if isinstance(value, list) else value


def content(path: Path, names: dict[str, str]) -> object:
    """The content of a file that does not depend on when it was written; ``names`` are words to replace."""
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        return timeless(table.to_pylist()), sorted(table.column_names)
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if path.suffix in (".json", ".gz", ".yaml", ".md"):
        text = raw.decode()
        for name, replacement in names.items():
            text = text.replace(name, replacement)
        return without_seconds(timeless(json.loads(text))) if path.suffix == ".json" else text
    return hashlib.sha256(raw).hexdigest()


def left(folder: Path) -> dict[str, object]:
    """Everything below a folder, by its name."""
    names = {str(folder): "FOLDER", str(folder.resolve()): "FOLDER"}
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in LEFT_OUT)
    files = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: content(path, names) for name, path in files.items() if not name.startswith("cache/")}


def difference(expected: dict[str, object], got: dict[str, object]) -> str:
    if expected.keys() != got.keys():
        return f"files: {sorted(expected.keys() ^ got.keys())[:4]}"
    changed = [name for name in expected if expected[name] != got[name]]
    if not changed:
        return ""
    return f"{changed[:3]}: {first_difference(expected[changed[0]], got[changed[0]])}"


def first_difference(a: Any, b: Any, place: str = "") -> str:
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return next((first_difference(a[k], b[k], f"{place}.{k}") for k in a if a[k] != b[k]), "")
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return next(
            (first_difference(x, y, f"{place}[{i}]") for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), ""
        )
    return f"{place}: {str(a)[:120]} became {str(b)[:120]}"


# ---------------------------------------------------------------- a judge that counts


class Endpoint(ThreadingHTTPServer):
    """A judge that answers by a hash of the question, after a moment, and counts what it has answered."""

    daemon_threads = True

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                question = body["messages"][-1]["content"]
                time.sleep(0.02)
                letter = "AB"[hashlib.sha256(question.encode()).digest()[0] % 2]
                choice = {
                    "index": 0,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": f"[[{letter}]]"},
                }
                usage = {"prompt_tokens": 30, "completion_tokens": 5, "total_tokens": 35}
                answer = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
                payload = json.dumps({**answer, "usage": usage}).encode()
                outer.asked[question] += 1
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def judge(self) -> str:
        return f"openai:m@http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, *_: object) -> None:
        """A killed command hangs up."""


# ---------------------------------------------------------------- the commands


@dataclass(frozen=True)
class Case:
    """A command: its words for an output folder. ``asks``: it asks the endpoint."""

    name: str
    words: Callable[[Path], list[str]]
    asks: bool = False


def cases(source: Path, endpoint: Endpoint) -> list[Case]:
    """``source`` is a finished run, whose models and data the commands take."""
    eval_rows, sft, dpo = (str(source / name) for name in ("data/eval.parquet", "sft/model", "dpo/model"))
    rm, prompts = str(source / "reward_model/model"), ["--data", "reviews", "--limit", "12"]
    asked = ["--judge", endpoint.judge, "--concurrency", "1"]
    two, one_setting = ["--", "--num_processes", "2"], ["--seeds=1", "--trials=1"]
    return [
        Case("run", lambda out: ["run", "smoke", "--out", f"{out}/r", *SMALL]),
        Case("run, 2 processes", lambda out: ["run", "smoke", "--out", f"{out}/r", "--until", "dpo", *SMALL, *two]),
        Case("sweep", lambda out: ["sweep", "smoke", "--grid", "dpo.beta=0.1,0.4", "--out", f"{out}/s", *SMALL]),
        Case("study", lambda out: ["study", "study-tiny", "--out", f"{out}/s", *SMALL_STUDY, *one_setting]),
        Case(
            "rewards",
            lambda out: (
                ["rewards", "--policy", dpo, "--reference", sft, "--rm", rm, "--data", eval_rows]
                + ["--per-token", "--out", f"{out}/rewards.parquet"]
            ),
        ),
        Case("score", lambda out: ["score", "--rm", rm, "--data", eval_rows, "--out", f"{out}/scores.parquet"]),
        Case(
            "compare",
            lambda out: ["compare", sft, dpo, *prompts, *asked, "--judge", f"rm:{rm}", "--out", f"{out}/c"],
            asks=True,
        ),
        Case(
            "judge",
            lambda out: (
                ["judge", str(source), "--policy", "dpo", "--baseline", "sft", *asked] + ["--out", f"{out}/j.parquet"]
            ),
            asks=True,
        ),
        Case(
            "judge, llm",
            lambda out: (
                ["judge", str(source), "--policy", "rm_ppo", "--baseline", "sft", "--judge", "llm:tiny"]
                + ["--out", f"{out}/j.parquet"]
            ),
        ),
        Case(
            "label",
            lambda out: (
                ["label", *prompts, "--policy", sft, "--k", "3", "--principles", "hhh", *asked]
                + ["--out", f"{out}/l.jsonl.gz"]
            ),
            asks=True,
        ),
        Case("simulate", lambda out: ["simulate", "--policy", sft, *prompts, "--k", "3", "--out", f"{out}/d.jsonl.gz"]),
        Case("push", lambda out: ["push", str(source), "--to", f"{out}/p"]),
    ]


# ---------------------------------------------------------------- killing them


@dataclass
class Counts:
    kills: int = 0
    trials: int = 0
    completed: int = 0
    equal: int = 0
    asked_twice: int = 0


class Killer:
    """Runs a command in folders below ``root``, with caches of its own, and kills it at random moments."""

    def __init__(self, case: Case, root: Path, endpoint: Endpoint, generator: random.Random) -> None:
        self.case, self.root, self.endpoint, self.generator = case, root, endpoint, generator
        started = time.monotonic()
        code, said = self.run(root / "whole", None)
        self.takes_s = time.monotonic() - started
        if code:
            raise SystemExit(f"{case.name} does not run:\n{said}")
        self.expected = left(root / "whole")
        shutil.rmtree(root / "whole")

    def run(self, out: Path, kill_after_s: float | None) -> tuple[int, str]:
        """The exit code and the end of stderr; -9 where it was killed."""
        out.mkdir(parents=True, exist_ok=True)
        cache = out / "cache"
        with (out.parent / f"{out.name}.stderr").open("w+") as stderr:
            process = subprocess.Popen(
                command("-q", *self.case.words(out)),
                cwd=ROOT,
                env=environment(DUEL_CACHE=str(cache), OPENAI_API_KEY="none"),
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
            try:
                process.wait(timeout=kill_after_s)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)  # the command alone: what it launched has to end by itself
                process.wait()
            stderr.seek(0)
            return process.returncode, stderr.read()[-800:]

    def trial(self, number: int, most_kills: int, counts: Counts) -> str:
        """One command to its end. Returns what is wrong with it."""
        out, kills = self.root / f"trial-{number}", 0
        self.endpoint.asked.clear()
        counts.trials += 1
        while True:
            moment = self.generator.uniform(min(STARTING_S, self.takes_s / 3), self.takes_s)
            code, said = self.run(out, moment if kills < most_kills else None)
            if code != -signal.SIGKILL:
                break
            kills += 1
            counts.kills += 1
        if code:
            return f"exit code {code} after {kills} kills: {said}"
        counts.completed += 1
        wrong = difference(self.expected, left(out))
        counts.equal += not wrong
        twice = sum(n - 1 for n in self.endpoint.asked.values()) - kills  # one at a time is in flight
        counts.asked_twice += max(0, twice)
        shutil.rmtree(out)
        return wrong or (f"{twice} questions asked twice" if twice > 0 else "")


def table(counts: dict[str, Counts]) -> Iterator[str]:
    yield "| command | kills | runs | completed | equal | asked twice |"
    yield "|---|---|---|---|---|---|"
    total = Counts()
    for name, of in counts.items():
        yield f"| {name} | {of.kills} | {of.trials} | {of.completed} | {of.equal} | {of.asked_twice} |"
        for field, value in vars(of).items():
            setattr(total, field, getattr(total, field) + value)
    yield f"| all | {total.kills} | {total.trials} | {total.completed} | {total.equal} | {total.asked_twice} |"


def finished_run(folder: Path) -> Path:
    """A run whose models and data the other commands take."""
    words = command("-q", "run", "smoke", "--out", str(folder), *SMALL)
    subprocess.run(words, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, check=True)
    return folder


def kill(n_kills: int, seed: int, only: list[str], root: Path, source: Path) -> tuple[dict[str, Counts], list[str]]:
    """``n_kills`` over the commands (or ``only`` those), and what went wrong."""
    generator, endpoint, wrong = random.Random(seed), Endpoint(), list[str]()
    chosen = [case for case in cases(source, endpoint) if not only or case.name in only]
    counts = {case.name: Counts() for case in chosen}
    share = max(1, n_kills // len(chosen))
    for position, case in enumerate(chosen):
        killer = Killer(case, root / f"case-{position}", endpoint, generator)
        wanted = share + (n_kills - share * len(chosen) if position == 0 else 0)
        while counts[case.name].kills < wanted and counts[case.name].trials < 3 * wanted:
            most = min(KILLS_PER_TRIAL, wanted - counts[case.name].kills)
            problem = killer.trial(counts[case.name].trials, most, counts[case.name])
            if problem:
                wrong.append(f"{case.name}: {problem}")
                print(wrong[-1], file=sys.stderr, flush=True)
        print(f"{case.name}: {counts[case.name]}", file=sys.stderr, flush=True)
    return counts, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="names of commands, with semicolons between them")
    arguments = parser.parse_args()
    only = [name.strip() for name in arguments.only.split(";") if name.strip()]
    with tempfile.TemporaryDirectory() as folder:
        source = finished_run(Path(folder) / "source")
        counts, wrong = kill(arguments.kills, arguments.seed, only, Path(folder), source)
    print("\n".join(table(counts)))
    return int(bool(wrong))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
