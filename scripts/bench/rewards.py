"""Implicit rewards of real pairs: the engine, RewardBench's way, and the floor of a bare forward pass.

- ``duel``: what ``duel rewards`` computes: policy and reference on tree batches. After every 24 pairs the floor is
  timed, separately: the transformer alone on the same batches, without unembedding and log-softmax.
- ``rewardbench``: as RewardBench's DPO pipeline does it: all chosen and all rejected of a batch in one padded tensor,
  logits of every position in fp32, a log-softmax over them, the responses' tokens gathered. By default in batches of 6.

Policy and reference are two copies of one model; both are loaded before the clock starts.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import harness


def loaded(args: argparse.Namespace, attention: str | None = None) -> tuple[Any, list[Any], list[Any]]:
    """Tokenizer, trees, and the two models."""
    from toolkit.models.load import load_policy
    from toolkit.models.resolve import resolve

    tokenizer, examples = harness.real_pairs(args, args.pairs)
    pair = [load_policy(resolve(args.model), harness.model_section(args, attention)) for _ in range(2)]
    return tokenizer, [example.tree for example in examples], pair


def duel(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from toolkit.engine.engine import Engine
    from toolkit.engine.logps import hidden_states
    from toolkit.models.inspect import precision, torch_dtype

    tokenizer, trees, pair = loaded(args)
    dtype = torch_dtype(args.dtype)
    engines = [Engine(model, int(tokenizer.pad_token_id), dtype=dtype) for model in pair]

    def rewards(chosen: list[Any]) -> None:
        policy, reference = (engine.logps(chosen) for engine in engines)
        for row in zip(policy, reference, strict=True):
            [0.1 * float((a.double() - b.double()).sum()) for a, b in zip(*row, strict=True)]

    def floor(chosen: list[Any]) -> None:
        with torch.no_grad(), precision(torch.device("cpu"), dtype):
            for engine in engines:
                for indices in engine.batches(chosen):
                    hidden_states(engine.model, engine.pack([chosen[i] for i in indices]))

    spent = {rewards: 0.0, floor: 0.0}

    def work() -> int:
        for start in range(0, len(trees), 24):
            for part in (rewards, floor) if start % 48 else (floor, rewards):
                started = time.perf_counter()
                part(trees[start : start + 24])
                spent[part] += time.perf_counter() - started
        return len(trees)

    rewards(sorted(trees, key=len)[-2:])  # the probe, and the libraries' first use
    return harness.measured(work) | {
        "seconds": round(spent[rewards], 3),
        "pairs_per_s": round(len(trees) / spent[rewards], 4),
        "floor_pairs_per_s": round(len(trees) / spent[floor], 4),
    }


def rewardbench(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    tokenizer, trees, pair = loaded(args, "sdpa")  # transformers' own choice

    def padded(chosen: list[Any]) -> tuple[Any, Any, Any]:
        rows = [(t.prompt_ids, t.response_ids[side]) for side in (0, 1) for t in chosen]
        width = max(len(prompt) + len(response) for prompt, response in rows)
        ids = torch.full((len(rows), width), int(tokenizer.pad_token_id))
        attention, of_response = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width)
        for k, (prompt, response) in enumerate(rows):
            n = len(prompt) + len(response)
            ids[k, :n] = torch.tensor(prompt + response)
            attention[k, :n] = 1
            of_response[k, len(prompt) : n] = 1
        return ids, attention, of_response

    def passes(chosen: list[Any]) -> int:
        with torch.no_grad():
            for start in range(0, len(chosen), args.batch):
                ids, attention, of_response = padded(chosen[start : start + args.batch])
                logps = []
                for model in pair:
                    logits = model(input_ids=ids, attention_mask=attention).logits.to(torch.float32)
                    log_p = logits[:, :-1].log_softmax(-1)
                    token = log_p.gather(2, ids[:, 1:, None]).squeeze(2)
                    logps.append((token * of_response[:, 1:]).sum(-1))
                (0.1 * (logps[0] - logps[1])).tolist()
        return len(chosen)

    passes(trees[:2])
    return harness.measured(lambda: passes(trees))


if __name__ == "__main__":
    parser = harness.parser(__doc__.splitlines()[0], "rewards")
    parser.add_argument("--pairs", type=int, default=96)
    parser.add_argument("--batch", type=int, default=6, help="pairs in a batch of RewardBench's way")
    harness.main(
        parser.parse_args(),
        {"duel": duel, "rewardbench": rewardbench},
        {
            "share of the floor": (("duel", "pairs_per_s"), ("duel", "floor_pairs_per_s")),
            "times RewardBench's way": (("duel", "pairs_per_s"), ("rewardbench", "pairs_per_s")),
        },
        {"data": "hh_harmless pairs, the first of the file", "unit": "pairs/s for policy and reference together"},
    )
