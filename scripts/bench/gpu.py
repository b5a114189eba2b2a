"""On one GPU: correctness, then speed, memory and model FLOP utilisation of scoring, training and sampling.

usage: python scripts/bench/gpu.py [--sizes 1 0.1 7] [--budget 460] [--trl FOLDER] [--trl-ppo FOLDER] [--out FILE.json]
       python scripts/bench/gpu.py --device cpu --sizes tiny --out /tmp/gpu.json      (a check, under a minute)

TRL need not be installed. Where the GPU has no package index, put the packages into folders beforehand, and take these
folders along:

    python -m pip install --no-deps --target .peers/trl-1.16 trl==1.16.0
    python -m pip install --no-deps --target .peers/trl-1.12 trl==1.12.0

These are the defaults of --trl (DPO, reward model) and --trl-ppo (PPO). A peer that cannot be imported is left out,
and the result says so. All models are Llamas of random weights in bf16 with LoRA of rank 16. Peers get the same sizes,
token ids, batches and steps, and take turns; each lives in one process, which frees a case's memory before the next.

Cases run in the order of importance until the budget in seconds is spent; the others are skipped, and the result says
which. Timed is what remains after the first steps, with the device synchronised.

Formulas. P: weights of the linear layers; tokens of a tree: each token once, its prompt for all responses.
    forward    2 P tokens + 4 layers heads head_dim pairs + 2 hidden vocabulary response_tokens
               (pairs: of a token and one that it attends to, itself among them; a reward has no unembedding)
    LoRA step  2 forward: the weights are frozen, so the backward pass computes gradients of activations alone
    DPO        one LoRA step and one forward of the reference; implicit rewards: two forwards; reward model: a LoRA step
    PPO        of a rollout: its generation, reference and reward (three forwards), one forward before the first update,
               and a LoRA step for each inner epoch
    MFU        FLOPs of the case, so counted for every peer, over seconds and --peak-tflops
    sampling   with fixed shapes and a CUDA graph; sampling_growing: with tensors that grow by a token at a time.
               seconds: of the second half of the responses; whole_seconds: with prompts and graph
    floor      of a decoding step: (bytes of weights and unembedding + bytes of the rows' cache) over --bandwidth-tbs
tokens/s counts prompt and response of each row, as a computation without trees has them, for every peer.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import harness

RANK, BYTES = 16, 2  # of the adapters; of a weight or cached number in bf16
WARM_STEPS = 2
ANSWER = "ANSWER "
LEAST_SECONDS = 15.0  # a case is not begun with less time left


# ---------------------------------------------------------------- arithmetic


@dataclass(frozen=True)
class Shape:
    """A Llama's."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool
    head_dim: int = 64

    @property
    def linear(self) -> int:
        """Weights of all linear layers, without the unembedding."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def unembedding(self) -> int:
        return self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        norms = self.hidden * (2 * self.layers + 1)
        return self.linear + self.unembedding * (1 if self.tied else 2) + norms


SHAPES = {
    "tiny": Shape(64, 2, 4, 2, 128, 2048, tied=True, head_dim=16),
    "0.1": Shape(576, 30, 9, 3, 1536, 49_152, tied=True),  # SmolLM2-135M
    "1": Shape(2048, 16, 32, 8, 8192, 128_256, tied=True),  # Llama 3.2 1B
    "7": Shape(4096, 32, 32, 32, 11_008, 32_000, tied=False, head_dim=128),  # Llama 2 7B
}


@dataclass(frozen=True)
class Load:
    """How much a case computes: of training and scoring pairs, PPO, sampling, and long rows."""

    pairs: int = 16  # in a batch
    prompt: int = 256
    response: int = 256
    steps: int = 6
    ppo_prompts: int = 64
    ppo_epochs: int = 2
    rollouts: int = 3
    sampled: int = 64  # rows of a batch
    sampled_prompt: int = 128
    new_tokens: int = 64
    rows: tuple[int, ...] = (1024, 4096, 16_384)


TINY = Load(2, 12, 8, 4, 4, 2, 3, 4, 12, 16, (64, 128))


def causal_pairs(n: int, before: int = 0) -> int:
    """Pairs of a token and one that it attends to, of ``n`` tokens behind ``before`` others."""
    return n * before + n * (n + 1) // 2


def forward_flops(shape: Shape, prompt: int, responses: list[int], *, logits: bool = True) -> int:
    """Of one tree."""
    tokens = prompt + sum(responses)
    pairs = causal_pairs(prompt) + sum(causal_pairs(n, prompt) for n in responses)
    attention = 4 * shape.layers * shape.heads * shape.head_dim * pairs
    unembedding = 2 * shape.unembedding * sum(responses) if logits else 0
    return 2 * shape.linear * tokens + attention + unembedding


def case_flops(case: str, shape: Shape, load: Load) -> int:
    """Of a step of training, of a batch's implicit rewards, or of a rollout."""
    if case == "ppo":
        rollout = forward_flops(shape, load.sampled_prompt, [load.new_tokens])
        reward = forward_flops(shape, load.sampled_prompt, [load.new_tokens], logits=False)
        return load.ppo_prompts * ((3 + 2 * load.ppo_epochs) * rollout + reward)
    pair = forward_flops(shape, load.prompt, [load.response] * 2, logits=case != "reward_model")
    return load.pairs * pair * {"rewards": 2, "dpo": 3, "reward_model": 2}[case]


def case_tokens(case: str, load: Load) -> int:
    """Of a step or rollout, prompts once for each row."""
    if case == "ppo":
        return load.ppo_prompts * (load.sampled_prompt + load.new_tokens)
    return load.pairs * 2 * (load.prompt + load.response)


def decoding_floor(shape: Shape, load: Load, bandwidth: float) -> float:
    """Seconds in which ``bandwidth`` bytes a second read all that the second half of the responses must read.

    A response has twice ``new_tokens``.
    """
    weights = (shape.linear + shape.unembedding) * BYTES
    of_token = 2 * shape.layers * shape.kv_heads * shape.head_dim * BYTES
    contexts = sum(load.sampled_prompt + step for step in range(load.new_tokens + 1, 2 * load.new_tokens + 1))
    return (load.new_tokens * weights + load.sampled * contexts * of_token) / bandwidth


# ---------------------------------------------------------------- the schedule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--sizes", nargs="+", default=["1", "0.1", "7"], choices=list(SHAPES), help="billion weights")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=1, help="turns that each peer has in a case")
    parser.add_argument("--budget", type=float, default=460.0, help="seconds for all of it")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of the device in bf16, without sparsity")
    parser.add_argument("--bandwidth-tbs", type=float, default=4.3, help="terabytes a second of the device's memory")
    parser.add_argument("--trl", type=Path, default=Path(".peers/trl-1.16"), help="folder with TRL 1.16")
    parser.add_argument("--trl-ppo", type=Path, default=Path(".peers/trl-1.12"), help="folder with TRL 1.12")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "gpu.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.device)
        return
    started = time.monotonic()
    peers = Peers(args, started + args.budget)
    try:
        rows = list(run_all(args, peers))
    finally:
        peers.end()
    record = {
        "what": {
            "sizes": {size: {**asdict(SHAPES[size]), "parameters": SHAPES[size].parameters} for size in args.sizes}
        },
        "load": {size: asdict(load_of(size)) for size in args.sizes},
        "command": harness.command(),
        "date": date.today().isoformat(),
        "machine": peers.facts.get("machine", harness.processor()),
        "peak_tflops": args.peak_tflops,
        "bandwidth_tbs": args.bandwidth_tbs,
        "versions": peers.facts,
        "seconds": round(time.monotonic() - started, 1),
        "ratios": ratios(rows),
        "cases": rows,
        "code": harness.code_of("gpu"),
    }
    harness.write(args.out, record)
    for row in rows:
        print(json.dumps(row))
    print(json.dumps(record["ratios"], indent=1))
    if any(row.get("right") is False for row in rows):
        sys.exit("a result is wrong: see the cases of correctness")


def load_of(size: str) -> Load:
    return TINY if size == "tiny" else Load()


class Peers:
    """The processes of duel and of the two versions of TRL, asked for one case at a time until the deadline."""

    def __init__(self, args: argparse.Namespace, deadline: float) -> None:
        self.args, self.deadline, self.facts = args, deadline, dict[str, Any]()
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self.lines: dict[str, queue.Queue[str]] = {}

    def ask(self, peer: str, case: str, size: str) -> dict[str, Any]:
        """What the peer measured; or why it did not."""
        if self.deadline - time.monotonic() < LEAST_SECONDS:
            return {"skipped": "the time budget is spent"}
        if peer not in self.processes:
            self._start(peer)
        if "missing" in (facts := self.facts[peer]):
            return {"skipped": facts["missing"]}
        try:
            return self._answer(peer, f"{case} {size}")
        except TimeoutError:
            self._stop(peer)
            return {"skipped": "cut off: the time budget is spent"}
        except EOFError:
            self._stop(peer)
            return {"error": "the process ended"}

    def _start(self, peer: str) -> None:
        folder = self.args.trl_ppo if peer == "trl-ppo" else self.args.trl  # duel's stages import TRL, too
        paths = [str(folder.absolute()), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self.args.device == "cpu" else {}
        self.processes[peer] = subprocess.Popen(
            [sys.executable, __file__, "--device", self.args.device, "--worker", peer],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | hidden | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            text=True,
        )
        self.lines[peer] = queue.Queue()
        threading.Thread(target=self._read, args=(self.processes[peer], self.lines[peer]), daemon=True).start()
        self.facts[peer] = {"missing": "it did not start"}
        self.facts[peer] = self._answer(peer, "facts")
        self.facts.setdefault("machine", self.facts[peer].get("machine"))

    @staticmethod
    def _read(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put("")  # it has ended

    def _answer(self, peer: str, request: str) -> dict[str, Any]:
        """Raises TimeoutError at the deadline, EOFError where the process has ended."""
        process = self.processes[peer]
        assert process.stdin is not None
        print(request, file=process.stdin, flush=True)
        while True:
            try:
                line = self.lines[peer].get(timeout=max(0.0, self.deadline - time.monotonic()))
            except queue.Empty:
                raise TimeoutError from None
            if not line:
                raise EOFError
            if line.startswith(ANSWER):
                answer: dict[str, Any] = json.loads(line.removeprefix(ANSWER))
                return answer

    def _stop(self, peer: str) -> None:
        self.processes.pop(peer).kill()

    def end(self) -> None:
        for peer in list(self.processes):
            self._stop(peer)


CASES = ("correctness", "sampling", "sampling_growing", "dpo", "reward_model", "ppo", "rewards", "rows")
PEER_OF = {"dpo": "trl", "reward_model": "trl", "ppo": "trl-ppo"}


def run_all(args: argparse.Namespace, peers: Peers) -> Any:
    """A row of the result for each case, size and peer."""
    for size in args.sizes:
        for case in args.cases:
            if case == "correctness" and size != smallest(args.sizes):
                continue  # the kernels are the same
            names = ["duel", *([PEER_OF[case]] if case in PEER_OF else [])]
            for turn in range(args.rounds):
                for peer in names if turn % 2 == 0 else reversed(names):
                    answer = peers.ask(peer, case, size)
                    row = {"case": case, "size": size, "peer": peer, **figures(case, size, answer, args)}
                    print(
                        f"{args.budget - (peers.deadline - time.monotonic()):.0f} s {row}", file=sys.stderr, flush=True
                    )
                    yield row


def smallest(sizes: list[str]) -> str:
    return min(sizes, key=lambda size: SHAPES[size].parameters)


def figures(case: str, size: str, answer: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The answer with what follows from it: tokens/s, model FLOP utilisation, times the bandwidth floor."""
    if "seconds" not in answer:
        return dict(answer)
    shape, load, seconds = SHAPES[size], load_of(size), answer["seconds"]
    if case.startswith("sampling"):
        floor = decoding_floor(shape, load, args.bandwidth_tbs * 1e12)
        speed = load.sampled * load.new_tokens / seconds
        derived = {"ms_per_step": round(1000 * seconds / load.new_tokens, 3), "times_floor": round(seconds / floor, 2)}
    else:
        speed = case_tokens(case, load) / seconds
        mfu = case_flops(case, shape, load) / seconds / (args.peak_tflops * 1e12)
        derived = {"mfu": float(f"{mfu:.3g}")}
    return {**answer, "tokens_per_s": round(speed, 1), **derived}


def ratios(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Times the peer's tokens/s and share of its peak memory, with a value for each turn."""
    measured: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if "tokens_per_s" in row:
            measured.setdefault((row["case"], row["size"], row["peer"]), []).append(row)
    values: dict[str, list[float]] = {}
    for (case, size, peer), turns in measured.items():
        if case.startswith("sampling"):
            values[f"times the bandwidth floor, {case}, {size} B"] = [turn["times_floor"] for turn in turns]
        if case == "sampling":
            growing = measured.get(("sampling_growing", size, peer), [])
            values[f"times sampling with tensors that grow, {size} B"] = [
                round(b["whole_seconds"] / a["whole_seconds"], 3) for a, b in zip(turns, growing, strict=False)
            ]
        theirs = measured.get((case, size, PEER_OF.get(case, "")), [])
        if peer == "duel" and theirs:
            turn_pairs = list(zip(turns, theirs, strict=False))
            values[f"times TRL, {case}, {size} B"] = [
                round(a["tokens_per_s"] / b["tokens_per_s"], 3) for a, b in turn_pairs
            ]
            values[f"of TRL's peak memory, {case}, {size} B"] = [
                round(a["peak_gib"] / b["peak_gib"], 3) for a, b in turn_pairs if b["peak_gib"]
            ]
    return {name: of_turns for name, of_turns in values.items() if of_turns}


# ---------------------------------------------------------------- a worker


def work(peer: str, device: str) -> None:
    """Answer requests from standard input: ``facts``, or a case and a size."""
    for line in sys.stdin:
        request = line.split()
        try:
            answer = facts(peer, device) if request == ["facts"] else measure(peer, *request, device)
        except Exception as error:  # one case less: the others still run
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
            if request == ["facts"]:
                answer = {"missing": answer["error"]}
        print(ANSWER + json.dumps(answer), flush=True)


def facts(peer: str, device: str) -> dict[str, Any]:
    """Versions and the device; raises ImportError where the peer's trainers are missing."""
    from importlib.metadata import version

    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    names = ["torch", "transformers", "peft"]
    if peer == "trl-ppo":
        from trl.experimental.ppo import PPOTrainer

        assert PPOTrainer
    if peer == "trl":
        from trl import DPOTrainer, RewardTrainer

        assert DPOTrainer and RewardTrainer
    if peer != "duel":
        names.append("trl")
    machine = torch.cuda.get_device_name() if device == "cuda" else harness.processor()
    return {"machine": machine, **{name: version(name) for name in names}}


def measure(peer: str, case: str, size: str, device: str) -> dict[str, Any]:
    """Run a case, with nothing of the one before on the device."""
    import gpu_cases
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        bench = gpu_cases.Bench(SHAPES[size], load_of(size), torch.device(device), Path(folder))
        run: Callable[[gpu_cases.Bench], dict[str, Any]] = getattr(gpu_cases, case if peer == "duel" else f"trl_{case}")
        return run(bench)


if __name__ == "__main__":
    main()
