"""The policies that an evaluation compares, and their samples on the held-out prompts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from toolkit.engine import distributed
from toolkit.engine.engine import Engine
from toolkit.engine.sampling import SamplingParams, sample_responses
from toolkit.errors import StoreError
from toolkit.evals.rounds import policy_of_round
from toolkit.files import fingerprint
from toolkit.judging.options import JudgeOptions
from toolkit.measure.rounds import rounds_of
from toolkit.models.encoding import TextEncoder, Tree, text_encoder
from toolkit.models.inspect import best_device, torch_dtype
from toolkit.models.load import load_policy
from toolkit.models.resolve import ModelRef, resolve, training_record
from toolkit.models.tokenizer import load_tokenizer
from toolkit.preferences.rows import PreferenceRow, readable
from toolkit.preferences.samples import COLUMNS, Sample, read_samples, stored_samples, write_samples
from toolkit.progress import Reporter
from toolkit.recipe.schema import EvaluateSection
from toolkit.recipe.training import ModelSection
from toolkit.stages.contexts import EvaluateContext

# What is known of a sample as soon as its policy has written it; the other columns come with the scores.
SAMPLED_COLUMNS = COLUMNS[: COLUMNS.index("policy_logp") + 1]
# Of the policies that show what training did, and that no verdict compares.
UNDECIDING_KINDS = ("base", "checkpoint")


@dataclass(frozen=True)
class Policy:
    """A policy to sample. ``kind`` is base, sft, checkpoint, round (the end of an earlier round) or final."""

    name: str
    arm: str
    kind: str
    step: int
    ref: ModelRef
    n_samples: int


@dataclass(frozen=True)
class TrainedModels:
    """What scores the responses: the reference of both arms, PPO's reward model, DPO's policy."""

    sft: ModelRef
    reward_model: ModelRef
    dpo: ModelRef


@dataclass(frozen=True)
class EvaluationSettings:
    """What all policies share: the held-out rows, and how responses are sampled and scored.

    ``further``: the temperature is one of ``evaluate.temperatures``. Its samples have seeds that the temperature is
    part of, and the reference alone scores them.
    """

    rows: list[PreferenceRow]
    prompts: list[list[int]]  # the rows' prompts as token ids
    encoder: TextEncoder
    section: EvaluateSection
    model: ModelSection
    max_new_tokens: int
    max_response_tokens: int
    seed: int
    further: bool = False

    def at_further(self, temperature: float) -> EvaluationSettings:
        """The same at one of ``evaluate.temperatures``."""
        return replace(self, section=self.section.model_copy(update={"temperature": temperature}), further=True)

    @classmethod
    def of(cls, context: EvaluateContext, rows: list[PreferenceRow], sft: ModelRef) -> EvaluationSettings:
        """The settings of a recipe for these held-out rows; prompts are read as the SFT policy reads them."""
        encoder = text_encoder(load_tokenizer(sft), rows[0].prompt, sft.spec)
        return cls(
            rows=rows,
            prompts=[encoder.prompt(row.prompt) for row in rows],
            encoder=encoder,
            section=context.evaluate,
            model=context.model,
            max_new_tokens=context.evaluate.max_new_tokens or context.data.max_response_tokens,
            max_response_tokens=context.data.max_response_tokens,
            seed=context.seed,
        )

    @property
    def dtype(self) -> torch.dtype:
        return torch_dtype(self.model.dtype)

    def prompts_of(self, policy: Policy) -> list[int]:
        """Indices of the rows that a policy is sampled on: all of them, or ``evaluate.checkpoint_prompts`` for policies
        that decide nothing.

        Hashes of the prompts decide which, so that all these policies, and every seed, have the same ones.
        """
        n = self.section.checkpoint_prompts
        if n is None or policy.kind not in UNDECIDING_KINDS:
            return list(range(len(self.rows)))
        return sorted(sorted(range(len(self.rows)), key=lambda i: fingerprint(self.rows[i].prompt_id))[:n])

    def engine(self, model: Any) -> Engine:
        pad_id = int(self.encoder.tokenizer.pad_token_id)
        return Engine(model.to(best_device()), pad_id, dtype=self.dtype, token_budget=self.section.token_budget)

    @property
    def judge_options(self) -> JudgeOptions:
        return JudgeOptions(
            self.model,
            self.section.judge,
            max_response_tokens=max(self.max_response_tokens, self.max_new_tokens),
            token_budget=self.section.token_budget,
        )


def find_policies(context: EvaluateContext, inputs: dict[str, Path], sft: ModelRef) -> list[Policy]:
    """base, sft, both arms with their checkpoints and rounds in the order of training, and rft where the recipe has
    it.

    Several samples of a prompt go to the policies that the verdict compares, and to those of earlier rounds.
    """
    section: EvaluateSection = context.evaluate
    n = section.samples_per_prompt
    policies = []
    if context.sft.enabled:
        base = resolve(context.model.name, context.model.revision)
        policies.append(Policy("base", "base", "base", 0, base, 1))
    policies.append(Policy("sft", "sft", "sft", 0, sft, n + section.best_of_n))
    for arm, stage in (("rm_ppo", "ppo"), ("dpo", "dpo")):
        earlier = rounds_of(inputs, stage)
        for round_, folder in earlier.items():
            policies += _checkpoints(arm, folder, section)
            ref = resolve(str(folder / "model"))
            name = policy_of_round(arm, round_, len(earlier) + 1)
            policies.append(Policy(name, arm, "round", training_record(ref)["step"], ref, n))
        policies += _checkpoints(arm, inputs[stage], section)
        final = resolve(str(inputs[stage] / "model"))
        policies.append(Policy(arm, arm, "final", training_record(final)["step"], final, n))
    if "rft" in inputs:
        ref = resolve(str(inputs["rft"] / "model"))
        policies.append(Policy("rft", "rft", "final", training_record(ref)["step"], ref, n))
    return policies


def _checkpoints(arm: str, stage: Path, section: EvaluateSection) -> list[Policy]:
    """The policies along the training of a stage, in its order."""
    folders = (stage / "checkpoints").glob("*") if section.checkpoints else ()
    policies = []
    checkpoints = [(training_record(ref), ref) for ref in (resolve(str(folder)) for folder in folders)]
    for record, ref in sorted(checkpoints, key=lambda item: (item[0]["step"], item[0].get("kl_milestone", 0.0))):
        at = f"kl-{record['kl_milestone']:g}" if "kl_milestone" in record else record["step"]
        policies.append(Policy(f"{arm}@{at}", arm, "checkpoint", record["step"], ref, 1))
    return policies


def samples_of(policy: Policy, settings: EvaluationSettings, folder: Path, reporter: Reporter) -> list[Sample]:
    """The policy's samples, from ``folder`` where an interrupted evaluation has drawn them already."""
    path = folder / f"{policy.name}.parquet"
    if stored_samples(path, SAMPLED_COLUMNS) is None:
        drawn = sample_policy(policy, settings, reporter)
        if distributed.main_process():
            folder.mkdir(parents=True, exist_ok=True)
            write_samples(drawn, path, SAMPLED_COLUMNS)
        distributed.barrier()  # the others read it
    return read_samples(path, SAMPLED_COLUMNS, error=StoreError, fix="remove it and run again")


def sample_policy(policy: Policy, settings: EvaluationSettings, reporter: Reporter) -> list[Sample]:
    """Sample a policy on its held-out prompts, and score the samples under itself at the sampling temperature."""
    section, indices = settings.section, settings.prompts_of(policy)
    rows, prompts = [settings.rows[i] for i in indices], [settings.prompts[i] for i in indices]
    engine = settings.engine(load_policy(policy.ref, settings.model))
    label = f"sample {policy.name}" + (f" at temperature {section.temperature}" if settings.further else "")
    purpose = ("evaluate", section.temperature) if settings.further else ("evaluate",)
    with reporter.task(label, len(rows) * policy.n_samples) as task:
        responses = sample_responses(
            engine.model,
            settings.encoder.tokenizer,
            prompts,
            lambda i, k: (settings.seed, *purpose, policy.name, rows[i].prompt_id, k),
            SamplingParams(settings.max_new_tokens, section.temperature, policy.n_samples, section.batch_size),
            dtype=settings.dtype,
            advance=task.advance,
        )
    trees = [Tree(ids, [r.ids for r in group]) for ids, group in zip(prompts, responses, strict=True)]
    # What the reference, SFT, and DPO's policy score later is not scored twice.
    dpo_scores_later = section.temperature == 1.0 and not settings.further
    scored_later = policy.kind == "sft" or (policy.name == "dpo" and dpo_scores_later)
    logps = None if scored_later else engine.logps(trees, temperature=section.temperature)
    return [
        Sample(
            prompt_id=row.prompt_id,
            policy=policy.name,
            arm=policy.arm,
            kind=policy.kind,
            step=policy.step,
            sample_index=k,
            prompt=readable(row.prompt),
            response=settings.encoder.decode(response.ids),
            response_ids=response.ids,
            n_tokens=len(response.ids),
            truncated=response.truncated,
            policy_logp=float(logps[p][k].double().sum()) if logps is not None else None,
        )
        for p, (row, group) in enumerate(zip(rows, responses, strict=True))
        for k, response in enumerate(group)
    ]
