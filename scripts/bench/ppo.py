"""PPO: samples per second and peak memory of this trainer and of TRL 1.12's, the last with PPO.

usage: python scripts/bench/ppo.py [--rollouts 7] [--prompts 32] [--tokens 32] [--architecture FOLDER]
                                   [--dtype bfloat16] [--peer-python .venv-trl/bin/python] [--out FILE.json]

All have the same model (SmolLM2-135M, or random weights of another architecture; LoRA of rank 16 on the policy),
prompts, batch (one sample of each prompt), length (no end of text) and two inner epochs. Each peer is a process of
its own. They take turns of one rollout while the others wait, since the machine's pace changes within minutes. The
first rollout of each is left out. TRL's critic is a whole model, as its trainer has it; ours is a second adapter, or
a head on the policy's states. TRL is installed in a virtual environment of its own, which the script makes where it
is missing. Peak memory is the process's on a CPU, and the tensors' on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import harness

TRL = "trl==1.12.0"
PEERS = ("adapters", "trunk", "trl")
N_EPOCHS, RANK = 2, 16
PREFIX = "PEER "  # of a worker's lines that are meant for this script


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=7, help="of each peer, the first included")
    parser.add_argument("--prompts", type=int, default=32, help="of a rollout")
    parser.add_argument("--tokens", type=int, default=32, help="of a response")
    parser.add_argument(
        "--architecture", type=Path, help="a folder with config.json and a tokenizer, for a model of random weights"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--peer-python", type=Path, default=Path(".venv-trl/bin/python"))
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "ppo.json")
    parser.add_argument("--worker", nargs=2, metavar=("PEER", "FOLDER"))
    args = parser.parse_args()
    if args.worker:
        peer, folder = args.worker
        worker(peer, Path(folder), args.rollouts)
        return
    make_environment(args.peer_python)
    with tempfile.TemporaryDirectory() as folder:
        settings = prepare(Path(folder), args.architecture, args.dtype, args.prompts, args.tokens)
        turns, peak_gib = measure(str(args.peer_python), folder, args.rollouts)
    result = {
        "command": harness.command(),
        **about(),
        "model": f"random weights of {args.architecture.name}" if args.architecture else "smollm2-135m",
        "settings": {name: value for name, value in settings.items() if name not in ("model", "texts")},
        **summary(turns, peak_gib, args.prompts),
        "code": harness.code_of("ppo"),
    }
    harness.write(args.out, result)
    print(json.dumps({name: result[name] for name in ("speed_over_trl", "memory_over_trl")}))


def make_environment(python: Path) -> None:
    """A virtual environment with the peer's packages around this ``python``, where it is missing."""
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(python.parent.parent)], check=True)
        for packages in (["torch==2.13.0"], [TRL, "peft"]):
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)


def measure(peer_python: str, folder: str, rollouts: int) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Seconds of every peer's rollout, turn by turn, and each process's peak memory in GiB."""
    workers: dict[str, subprocess.Popen[str]] = {}

    def answer(peer: str) -> float:
        out = workers[peer].stdout
        assert out is not None
        for line in out:
            if line.startswith(PREFIX):
                return float(line.removeprefix(PREFIX))
        raise SystemExit(f"{peer} ended with {workers[peer].wait()}")

    try:
        for peer in PEERS:
            python = peer_python if peer == "trl" else sys.executable
            command = [python, __file__, "--rollouts", str(rollouts), "--worker", peer, folder]
            workers[peer] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            answer(peer)
        turns: list[dict[str, float]] = []
        for turn in range(rollouts - 1):
            seconds = {}
            for peer in PEERS if turn % 2 == 0 else reversed(PEERS):
                stdin = workers[peer].stdin
                assert stdin is not None
                print(file=stdin, flush=True)
                seconds[peer] = answer(peer)
            turns.append({peer: seconds[peer] for peer in PEERS})
            print(f"{turn + 1}/{rollouts - 1} {turns[-1]}", file=sys.stderr, flush=True)
        peak_gib = {}
        for peer, process in workers.items():
            assert process.stdin is not None
            process.stdin.close()
            peak_gib[peer] = answer(peer)
        return turns, peak_gib
    finally:
        for process in workers.values():
            process.kill()


def about() -> dict[str, Any]:
    import torch

    cores = f"{harness.processor()}, {len(os.sched_getaffinity(0))} cores"
    return {
        "date": date.today().isoformat(),
        "machine": f"{torch.cuda.get_device_name()}, {cores}" if torch.cuda.is_available() else cores,
        "versions": harness.versions() | {"peer": TRL},
    }


def summary(turns: list[dict[str, float]], peak_gib: dict[str, float], prompts: int) -> dict[str, Any]:
    """Medians over the turns, and ours over TRL's: of speeds the median of each turn's ratio."""
    ratios = {peer: [turn["trl"] / turn[peer] for turn in turns] for peer in PEERS[:2]}
    return {
        "turns_s": turns,
        "samples_per_s": {p: round(prompts / statistics.median(turn[p] for turn in turns), 3) for p in PEERS},
        "peak_gib": peak_gib,
        "ratios": {peer: [round(ratio, 3) for ratio in of_turns] for peer, of_turns in ratios.items()},
        "speed_over_trl": {peer: round(statistics.median(of_turns), 2) for peer, of_turns in ratios.items()},
        "memory_over_trl": {peer: round(peak_gib[peer] / peak_gib["trl"], 2) for peer in PEERS[:2]},
    }


def prepare(folder: Path, architecture: Path | None, dtype: str, n_prompts: int, n_tokens: int) -> dict[str, Any]:
    """The policy, a reward model on it (whole, and as an adapter), and prompts, as plain files for every peer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from toolkit.models.inspect import best_device, parameter_count
    from toolkit.models.load import new_reward_model, trainable
    from toolkit.models.resolve import resolve
    from toolkit.models.save import merge_and_save, save_policy
    from toolkit.models.tokenizer import load_tokenizer
    from toolkit.preferences.reading import read_preferences
    from toolkit.recipe.training import Lora, ModelSection

    weights_dtype = getattr(torch, dtype)
    if architecture is None:
        ref = resolve("smollm2-135m")
    else:
        torch.manual_seed(0)
        with best_device():
            config = AutoConfig.from_pretrained(architecture)
            policy = AutoModelForCausalLM.from_config(config, dtype=weights_dtype)
        tokenizer_of_policy = load_tokenizer(resolve(str(architecture)))
        merge_and_save(policy, tokenizer_of_policy, folder / "policy", weights_dtype)
        ref = resolve(str(folder / "policy"))
    tokenizer = load_tokenizer(ref)
    section = ModelSection(name=ref.spec, dtype=dtype, lora=Lora(r=RANK, alpha=2 * RANK))
    whole = new_reward_model(ref, section, tokenizer.pad_token_id, seed=0)
    save_policy(whole, tokenizer, folder / "reward", dtype=weights_dtype, base=ref)
    parameters = parameter_count(whole)
    adapter = trainable(whole, section.lora, task="SEQ_CLS", modules_to_save=["score"])
    save_policy(adapter, tokenizer, folder / "reward_adapter", dtype=weights_dtype, base=ref)
    settings = {
        "model": ref.path,
        "dtype": dtype,
        "parameters": parameters,
        "prompts": n_prompts,
        "tokens": n_tokens,
        "inner_epochs": N_EPOCHS,
        "lora_rank": RANK,
        "texts": [row.prompt for row in read_preferences("reviews", split="train").rows[:n_prompts]],
    }
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    return settings


def worker(peer: str, folder: Path, rollouts: int) -> None:
    """Train. After each rollout print how many seconds it took, and wait for a line before the next. At the end print
    the peak memory in GiB."""
    import torch
    from transformers import TrainerCallback

    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    steps_of_rollout = 1 if peer == "trl" else N_EPOCHS
    done = 0

    class Turns(TrainerCallback):  # type: ignore[misc]
        began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            nonlocal done
            done += 1
            if done % steps_of_rollout == 0:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                print(f"{PREFIX}{time.perf_counter() - self.began:.3f}", flush=True)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()  # the others need the memory now
                sys.stdin.readline()
                self.began = time.perf_counter()

    trainer = (trl_trainer if peer == "trl" else our_trainer)(peer, folder, settings, rollouts)
    trainer.add_callback(Turns())
    trainer.train()
    if done != rollouts * steps_of_rollout:
        raise SystemExit(f"{peer}: {done} steps, expected {rollouts * steps_of_rollout}")
    speeds = {
        name: round(value)
        for log in trainer.state.log_history
        for name, value in log.items()
        if name.startswith("speed")
    }
    print(f"{peer}: {speeds}", file=sys.stderr, flush=True)  # of the last rollout, where the peer logs them
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / harness.KIB_IN_GIB
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**30
    print(f"{PREFIX}{peak:.2f}", flush=True)


def our_trainer(peer: str, folder: Path, settings: dict[str, Any], rollouts: int) -> Any:
    import torch
    from peft import LoraConfig

    from toolkit.ppo import PPOConfig, PPOTrainer

    args = PPOConfig(
        output_dir=str(folder / peer),
        per_device_train_batch_size=settings["prompts"],
        total_episodes=settings["prompts"] * rollouts,
        num_ppo_epochs=N_EPOCHS,
        response_length=settings["tokens"],
        stop_token_ids=[-1],  # no token
        missing_eos_penalty=None,
        share_trunk=peer == "trunk",
        learning_rate=1e-5,
        bf16=settings["dtype"] == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    prompts = [{"prompt": prompt} for prompt in settings["texts"]]
    return PPOTrainer(settings["model"], args, str(folder / "reward_adapter"), prompts, peft_config=lora)


def trl_trainer(peer: str, folder: Path, settings: dict[str, Any], rollouts: int) -> Any:
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings["model"], padding_side="left")
    values = {
        "output_dir": str(folder / peer),
        "per_device_train_batch_size": settings["prompts"],
        "gradient_accumulation_steps": 1,
        "num_mini_batches": 1,
        "num_ppo_epochs": N_EPOCHS,
        "total_episodes": settings["prompts"] * rollouts,
        "response_length": settings["tokens"],
        "local_rollout_forward_batch_size": settings["prompts"],
        "num_sample_generations": 0,
        "temperature": 1.0,
        "gradient_checkpointing": False,  # its default saves memory and costs time
        "learning_rate": 1e-5,
        "bf16": settings["dtype"] == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "no",
        "report_to": "none",
    }
    dtype = getattr(torch, settings["dtype"])
    classifier = {"num_labels": 1, "dtype": dtype}
    return peer_trainer(
        tokenizer,
        values,
        AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype),
        [AutoModelForSequenceClassification.from_pretrained(folder / "reward", **classifier) for _ in range(2)],
        [tokenizer(prompt)["input_ids"] for prompt in settings["texts"]],
        LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def peer_trainer(
    tokenizer: Any, values: dict[str, Any], policy: Any, classifiers: list[Any], prompts: list[list[int]], lora: Any
) -> Any:
    """TRL's PPOTrainer. ``values`` are of its PPOConfig, ``classifiers`` are the reward model and the critic."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer.padding_side = "left"
    reward_model, value_model = classifiers
    data = Dataset.from_list([{"input_ids": ids} for ids in prompts])
    return PPOTrainer(
        args=PPOConfig(**values),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=data,
        eval_dataset=data,
        peft_config=lora,
    )


if __name__ == "__main__":
    main()
