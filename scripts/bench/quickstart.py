"""The training of the quickstart by duel and by TRL 1.12, one trainer after the other: seconds and peak memory.

usage: python scripts/bench/quickstart.py [--prompts 64] [--rounds 2] [--threads N]
                                          [--peer-python .venv-trl/bin/python] [--out FILE.json]

The work is that of recipes/quickstart.yaml up to the evaluation: SFT, a reward model, PPO and DPO. ``duel`` runs the
recipe's stages. ``trl`` runs SFTTrainer, RewardTrainer, PPOTrainer and DPOTrainer. Each is one process, and they take
turns.

The same for both: the model in the precision that this processor is fast in, LoRA of rank 16 on all linear layers, the
token ids of the recipe's training prompts and responses, optimiser, schedule and number of steps. A ranking of 4
responses is up to 6 pairs of TRL's (fewer where labels tie), so its batch has the pairs of duel's 4 rankings. PPO has
as many episodes, inner epochs and minibatches. With fewer prompts than the recipe's there are fewer episodes in
proportion.

Timed on both sides: a stage's loading of models, its training, and writing what the next stage reads. Not timed:
imports, the data stage, and the conversion of the base model. Left as each side does it: duel's reward model is
centred on samples and its arms save two policies; TRL's PPO has a critic of its own. TRL has no gradient
checkpointing, which saves memory and costs time. It lives in a virtual environment of its own, which the script makes
where it is missing.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import harness
import ppo

STAGES = ("sft", "reward_model", "ppo", "dpo")
PEERS = ("duel", "trl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64, help="training prompts")
    parser.add_argument("--model", default="smollm2-135m", help="another model than the recipe's, to try the script")
    parser.add_argument("--rounds", type=int, default=2, help="turns that each side has")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--peer-python", type=Path, default=Path(".venv-trl/bin/python"))
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "quickstart.json")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        import torch

        torch.set_num_threads(args.threads)
        print("RESULT " + json.dumps({"duel": duel, "trl": trl}[args.peer](args.folder)))
        return
    ppo.make_environment(args.peer_python)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["DUEL_CACHE"] = str(folder / "cache")  # nothing of an earlier run, and of a turn before
        plan = prepare(folder, args.model, args.prompts)
        turns = harness.take_turns(
            PEERS, args.rounds, ["--folder", str(folder)], {"trl": str(args.peer_python.absolute())}
        )
    record = {
        "what": {"data": f"reviews, {args.prompts} training prompts of the recipe's data stage", **plan["settings"]},
        "command": harness.command(),
        "date": date.today().isoformat(),
        "machine": {"cpus": os.cpu_count(), "threads": args.threads, "processor": harness.processor()},
        "versions": harness.versions() | {"peer": turns["trl"][0].pop("versions")},
        **summary(turns),
        "code": harness.code_of("quickstart"),
    }
    for turn in turns["trl"]:
        turn.pop("versions", None)
    harness.write(args.out, record)
    for name, values in record["ratios"].items():
        print(f"{name}: {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")


def summary(turns: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Turns, and ratios with a value for each turn: of all stages together, then of each."""
    pairs = list(zip(turns["duel"], turns["trl"], strict=True))
    speed = {f", {stage}": [b["seconds"][stage] / a["seconds"][stage] for a, b in pairs] for stage in STAGES}
    memory = {f", {stage}": [a["peak_gib"][stage] / b["peak_gib"][stage] for a, b in pairs] for stage in STAGES}
    speed = {"": [sum(b["seconds"].values()) / sum(a["seconds"].values()) for a, b in pairs], **speed}
    memory = {"": [max(a["peak_gib"].values()) / max(b["peak_gib"].values()) for a, b in pairs], **memory}
    ratios = {f"times TRL{stage}": values for stage, values in speed.items()}
    ratios |= {f"of TRL's peak memory{stage}": values for stage, values in memory.items()}
    return {
        "ratios": {name: [round(value, 3) for value in values] for name, values in ratios.items()},
        "turns": turns,
    }


# ---------------------------------------------------------------- what both sides get


def prepare(folder: Path, model: str, n_prompts: int) -> dict[str, Any]:
    """Run the data stage, and write what TRL trains on into ``plan.json``: token ids, and each trainer's settings."""
    from toolkit.engine.fast.processor import fastest_dtype
    from toolkit.models.encoding import text_encoder
    from toolkit.models.resolve import resolve
    from toolkit.models.tokenizer import load_tokenizer
    from toolkit.preferences import splits
    from toolkit.preferences.tables import from_parquet
    from toolkit.progress import Reporter
    from toolkit.recipe.files import load_recipe
    from toolkit.runs.pipeline import RunOptions, run
    from toolkit.training.batch import examples_of

    standard = load_recipe("quickstart").recipe
    samples = standard.ppo.samples_per_prompt
    rollout = min(standard.ppo.per_device_train_batch_size // samples, n_prompts)
    rollout -= rollout % standard.ppo.num_mini_batches  # minibatches are of one size
    episodes = standard.ppo.total_episodes * n_prompts / standard.data.train_prompts
    settings = {
        "model.name": model,
        "model.dtype": fastest_dtype(),
        "data.train_prompts": n_prompts,
        "ppo.per_device_train_batch_size": rollout * samples,
        "ppo.total_episodes": max(1, round(episodes / (rollout * samples))) * rollout * samples,
    }
    loaded = load_recipe("quickstart", [f"{name}={value}" for name, value in settings.items()])
    recipe = loaded.recipe
    run(loaded, folder / "data", Reporter(quiet=True), RunOptions(until="data"))
    rows = from_parquet(folder / "data/data/train.parquet")
    ref = resolve(model)
    tokenizer = load_tokenizer(ref, recipe.model.chat_template)
    encoder = text_encoder(tokenizer, rows[0].prompt, ref.spec)
    limit = recipe.data.max_response_tokens
    texts = []
    for row in rows:
        imitated = [row.responses[i] for i in splits.imitated(row, recipe.sft.train_on)]
        tree = encoder.encode(row.prompt, imitated, limit).tree
        texts += [{"prompt_ids": tree.prompt_ids, "response_ids": ids} for ids in tree.response_ids]
    examples = examples_of(rows, encoder, limit)
    pairs = [pair_of(example, pair) for example in examples for pair in example.pairs if pair[2] != 0.5]
    plan = {
        "settings": settings,
        "model": ref.path,
        "dtype": recipe.model.dtype,
        "eos_token": tokenizer.decode([tokenizer.eos_token_id]),
        "pad_token": tokenizer.decode([tokenizer.pad_token_id]),
        "lora": recipe.model.lora.model_dump(),
        "texts": texts,
        "pairs": pairs,
        "prompts": [example.tree.prompt_ids for example in examples],
        "arguments": trl_arguments(recipe, folder, len(texts) / len(rows), len(pairs) / len(examples), len(examples)),
        "ppo": ppo_settings(recipe),
        "samples_per_prompt": samples,
        "beta": recipe.dpo.beta,
    }
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    return plan


def pair_of(example: Any, pair: Sequence[Any]) -> dict[str, list[int]]:
    """A comparison with a winner as TRL takes it."""
    first, second, prefer_first, _ = pair
    chosen, rejected = (first, second) if prefer_first > 0.5 else (second, first)
    responses = example.tree.response_ids
    return {
        "prompt_ids": example.tree.prompt_ids,
        "chosen_ids": responses[chosen],
        "rejected_ids": responses[rejected],
    }


def trl_arguments(
    recipe: Any, folder: Path, n_texts: float, n_pairs: float, n_prompts: int
) -> dict[str, dict[str, Any]]:
    """``TrainingArguments`` of every stage, as duel has them, with TRL's rows in a batch.

    ``n_texts`` and ``n_pairs`` are those of a prompt, on average.
    """
    from toolkit.training.length import total_steps
    from toolkit.training.trainer import training_arguments

    arguments = {}
    for stage in STAGES:
        section = getattr(recipe, stage)
        steps = total_steps(section, n_prompts) if stage != "ppo" else 1
        values = training_arguments(
            section, folder / "trl" / stage, seed=recipe.seed, dtype=recipe.model.dtype, steps=steps
        )
        values |= {"save_strategy": "no", "gradient_checkpointing": False}
        rows_of_prompt = {"sft": n_texts, "ppo": 1}.get(stage, n_pairs)
        values["per_device_train_batch_size"] = round(section.per_device_train_batch_size * rows_of_prompt)
        arguments[stage] = values
    # TRL's PPO counts episodes instead of steps, and drops columns itself.
    for name in ("max_steps", "remove_unused_columns"):
        del arguments["ppo"][name]
    return arguments


def ppo_settings(recipe: Any) -> dict[str, Any]:
    """What TRL's PPOConfig takes beside ``TrainingArguments``."""
    names = ("num_ppo_epochs", "num_mini_batches", "total_episodes", "kl_coef", "kl_estimator", "whiten_rewards")
    names += ("gamma", "lam", "cliprange", "cliprange_value", "vf_coef", "temperature")
    section = recipe.ppo
    return {name: getattr(section, name) for name in names} | {
        "response_length": section.response_length or recipe.data.max_response_tokens,
        "local_rollout_forward_batch_size": section.per_device_train_batch_size,
        # What replaces a score here, TRL subtracts from it.
        "missing_eos_penalty": None if section.missing_eos_penalty is None else -section.missing_eos_penalty,
        "stop_token": "eos",
        "num_sample_generations": 0,
    }


# ---------------------------------------------------------------- the two sides


def duel(folder: Path) -> dict[str, Any]:
    """The recipe's stages, the data stage taken from the run that prepared it."""
    from toolkit.engine.cache import reference_folder
    from toolkit.progress import Reporter
    from toolkit.recipe.files import load_recipe
    from toolkit.runs.pipeline import RunOptions, run
    from toolkit.stages import dpo, reward_model, sft  # imports are not timed
    from toolkit.stages import ppo as of_ppo

    assert dpo and reward_model and sft and of_ppo
    shutil.rmtree(reference_folder(), ignore_errors=True)  # the reference's log-probabilities, from the turn before
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    loaded = load_recipe("quickstart", [f"{name}={value}" for name, value in settings.items()])
    out = folder / "duel"
    shutil.rmtree(out, ignore_errors=True)
    run(loaded, out, Reporter(quiet=True), RunOptions(until=STAGES[-1], reuse=[folder / "data"]))
    records = {stage: json.loads((out / stage / "stage.json").read_text(encoding="utf-8")) for stage in STAGES}
    return {
        "seconds": {stage: record["wall_s"] for stage, record in records.items()},
        "peak_gib": {stage: record["peak_gib"] for stage, record in records.items()},
    }


def trl(folder: Path) -> dict[str, Any]:
    """TRL's four trainers, each on what the one before it wrote."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    work = folder / "trl"
    shutil.rmtree(work, ignore_errors=True)
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    stages: dict[str, Callable[[dict[str, Any], Path], None]] = {
        "sft": trl_sft,
        "reward_model": trl_reward_model,
        "ppo": trl_ppo,
        "dpo": trl_dpo,
    }
    import trl
    from trl.experimental.ppo import PPOTrainer  # imports are not timed

    assert PPOTrainer
    figures: dict[str, Any] = {"seconds": {}, "peak_gib": {}, "versions": harness.versions()}
    assert figures["versions"]["trl"] == trl.__version__
    for stage in STAGES:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # as duel does before each stage
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        started = time.perf_counter()
        stages[stage](plan, work)
        figures["seconds"][stage] = round(time.perf_counter() - started, 3)
        figures["peak_gib"][stage] = round(harness.memory("VmHWM"), 3)
    return figures


def tokenizer_of(plan: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(plan["model"], eos_token=plan["eos_token"], pad_token=plan["pad_token"])


def policy_from(folder: str | Path, plan: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, plan["dtype"]))


def classifier_from(folder: str | Path, plan: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoModelForSequenceClassification

    pad_id = tokenizer_of(plan).pad_token_id
    return AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, pad_token_id=pad_id, dtype=getattr(torch, plan["dtype"])
    )


def adapter(plan: dict[str, Any], task: str, modules_to_save: list[str] | None = None) -> Any:
    from peft import LoraConfig

    lora = plan["lora"]
    return LoraConfig(
        r=lora["r"],
        lora_alpha=lora["alpha"],
        target_modules=lora["target_modules"],
        task_type=task,
        modules_to_save=modules_to_save,
    )


def train(trainer: Any, steps: int) -> None:
    """Train, and make sure that there were as many steps (of PPO: rollouts) as duel's side has."""
    trainer.train()
    if trainer.state.global_step != steps:
        raise SystemExit(f"{type(trainer).__name__}: {trainer.state.global_step} steps, expected {steps}")


def trl_sft(plan: dict[str, Any], work: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = []
    for text in plan["texts"]:
        prompt, response = text["prompt_ids"], text["response_ids"]
        rows.append({"input_ids": prompt + response, "completion_mask": [0] * len(prompt) + [1] * len(response)})
    arguments = plan["arguments"]["sft"]
    trainer = SFTTrainer(
        model=policy_from(plan["model"], plan),
        args=SFTConfig(**arguments, max_length=None, completion_only_loss=True),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer_of(plan),
        peft_config=adapter(plan, "CAUSAL_LM"),
    )
    train(trainer, arguments["max_steps"])
    trainer.model.merge_and_unload().save_pretrained(work / "sft-model")


def trl_reward_model(plan: dict[str, Any], work: Path) -> None:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    rows = [
        {name: pair["prompt_ids"] + pair[name] for name in ("chosen_ids", "rejected_ids")} for pair in plan["pairs"]
    ]
    arguments = plan["arguments"]["reward_model"]
    trainer = RewardTrainer(
        model=classifier_from(work / "sft-model", plan),
        args=RewardConfig(**arguments, max_length=None),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer_of(plan),
        peft_config=adapter(plan, "SEQ_CLS", ["score"]),
    )
    train(trainer, arguments["max_steps"])
    trainer.model.merge_and_unload().save_pretrained(work / "reward-model")


def trl_ppo(plan: dict[str, Any], work: Path) -> None:
    prompts = [ids for ids in plan["prompts"] for _ in range(plan["samples_per_prompt"])]
    trainer = ppo.peer_trainer(
        tokenizer_of(plan),
        {**plan["arguments"]["ppo"], **plan["ppo"]},
        policy_from(work / "sft-model", plan),
        [classifier_from(work / "reward-model", plan) for _ in range(2)],
        prompts,
        adapter(plan, "CAUSAL_LM"),
    )
    values = plan["ppo"]
    train(trainer, values["total_episodes"] // plan["arguments"]["ppo"]["per_device_train_batch_size"])
    trainer.model.policy.save_pretrained(work / "ppo-model")


def trl_dpo(plan: dict[str, Any], work: Path) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    arguments = plan["arguments"]["dpo"]
    trainer = DPOTrainer(
        model=policy_from(work / "sft-model", plan),
        args=DPOConfig(**arguments, max_length=None, beta=plan["beta"]),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),  # it insists on text
        processing_class=tokenizer_of(plan),
        peft_config=adapter(plan, "CAUSAL_LM"),
    )
    trainer.train_dataset = Dataset.from_list(plan["pairs"])
    train(trainer, arguments["max_steps"])
    trainer.model.save_pretrained(work / "dpo-model")


if __name__ == "__main__":
    sys.exit(main())
