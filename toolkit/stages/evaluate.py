"""One evaluation for every policy: the same held-out prompts, the same sampling, the same scores.

Writes ``samples.parquet``, ``rewards.parquet`` and ``judgements.parquet``. ``evals/summary.py`` computes
``evaluation.json`` from these tables: what they say, with intervals.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from toolkit.engine.engine import Engine
from toolkit.engine.sampling import SamplingParams, sample_responses
from toolkit.errors import RecipeError, StoreError
from toolkit.evals import summary
from toolkit.evals.beside_verdict import complete_verdict
from toolkit.evals.implicit_reward import ImplicitReward, defined_by
from toolkit.evals.intervals import BootstrapOptions
from toolkit.evals.training_signals import TRAINING_SIGNALS
from toolkit.files import read_json, write_json, write_table
from toolkit.judging import win_rates
from toolkit.judging.deciding import judging_of
from toolkit.judging.ended import where_both_ended
from toolkit.judging.held_out import RowScores, examine_judges
from toolkit.judging.independence import RunModels
from toolkit.judging.judge import Judged, ask_judges, name_training_signals
from toolkit.judging.options import JudgeOptions
from toolkit.judging.records import write_judgements
from toolkit.judging.responses import PolicyResponses
from toolkit.models.encoding import Encoded, TextEncoder, Tree, text_encoder
from toolkit.models.inspect import DTYPES, best_device
from toolkit.models.load import load_policy, load_reward_model
from toolkit.models.resolve import ModelRef, resolve, training_record
from toolkit.models.save import reward_mean
from toolkit.models.tokenizer import load_tokenizer
from toolkit.preferences import splits
from toolkit.preferences.gold import gold_rewards
from toolkit.preferences.reading import from_parquet
from toolkit.preferences.rows import PreferenceRow, readable
from toolkit.preferences.samples import COLUMNS, Sample, by_policy, by_prompt, read_samples, write_samples
from toolkit.progress import Reporter
from toolkit.recipe.arms import trained_differences
from toolkit.recipe.schema import EvaluateSection, ModelSection
from toolkit.runs.store import STAGE_FILE
from toolkit.stages.contexts import EvaluateContext

# What is known of a sample as soon as its policy has written it; the other columns come with the scores.
SAMPLED_COLUMNS = COLUMNS[: COLUMNS.index("policy_logp") + 1]


@dataclass(frozen=True)
class Policy:
    """A policy to sample. ``kind`` is base, sft, checkpoint or final."""

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
    """What all policies share: the held-out rows, and how responses are sampled and scored."""

    rows: list[PreferenceRow]
    prompts: list[list[int]]  # the rows' prompts as token ids
    encoder: TextEncoder
    section: EvaluateSection
    model: ModelSection
    max_new_tokens: int
    max_response_tokens: int
    seed: int

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.model.dtype]

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


def run(context: EvaluateContext, inputs: dict[str, Path], out: Path, reporter: Reporter) -> dict[str, Any]:
    """Writes the three tables and ``evaluation.json``: the run's ``results.json`` without recipe and cost."""
    section: EvaluateSection = context.evaluate
    models = TrainedModels(*(resolve(str(inputs[name] / "model")) for name in ("sft", "reward_model", "dpo")))
    settings = evaluation_settings(context, inputs, models.sft)
    has_gold, warnings = gold_is_known(settings.rows)
    judges, renamed = choose_judges(section.judges, has_gold, models)
    policies = find_policies(context, inputs, models.sft)
    drawn = [sample for policy in policies for sample in samples_of(policy, settings, out / "policies", reporter)]

    implicit = defined_by(training_record(models.dpo))
    scored = score_everything(drawn, settings, models, reporter)
    rewards = held_out_rewards(settings.rows, scored, implicit)
    scored_samples = with_scores(drawn, settings.rows, scored, implicit, has_gold)
    samples = [sample for sample in scored_samples if sample.sample_index < section.samples_per_prompt]
    samples += best_of_n(scored_samples, section)

    asked = judge_all(judges, samples, [policy.name for policy in policies], settings, reporter)
    bootstrap: BootstrapOptions = {
        "n_resamples": section.bootstrap,
        "confidence": section.confidence,
        "seed": context.seed,
    }
    tests, test_usages = examine_judges(
        judges,
        settings.rows,
        section.judge_test_pairs,
        settings.judge_options,
        reporter,
        known_scores=held_out_scores(settings.rows, rewards),
        bootstrap=bootstrap,
    )
    write_samples(samples, out / "samples.parquet")
    write_table([asdict(reward) for reward in rewards], out / "rewards.parquet")
    write_json(out / "data_report.json", read_json(inputs["data"] / "report.json"))
    # A file may call either arm the policy: one row for each judge, seen from RM + PPO.
    one_way = [win_rates.seen_from_ppo(judgement) for judgement in asked.judgements]
    write_judgements(one_way, out / "judgements.parquet", bootstrap)
    judged = win_rates.report(one_way, controls=win_rates.RECORDED_CONTROLS, **bootstrap)
    write_json(out / "judging.json", {name: judged[name] for name in ("bradley_terry", "judge_agreement")})
    prompt_ids, own = [row.prompt_id for row in settings.rows], run_models(inputs, models, policies)
    judging, doubts = judging_of(one_way, judges, tests, section, prompt_ids, own, bootstrap, asked.dependent)
    result = summary.summarise(
        [vars(sample) for sample in samples],
        [vars(reward) for reward in rewards],
        judged["win_rates"],
        [(p, pair.i, pair.j, pair.p, pair.weight) for p, row in enumerate(settings.rows) for pair in splits.pairs(row)],
        best_of_n=section.best_of_n,
        options=bootstrap,
        judging=judging,
        warnings=[*warnings, *renamed, *asked.warnings, *doubts],
    )
    ended = where_both_ended(one_way, samples, list(result["verdict"]["judges"]), **bootstrap)
    complete_verdict(result, ended, judging)
    records = {stage: read_json(inputs[stage] / STAGE_FILE) for stage in ("ppo", "dpo")}
    kl_nats = {row["policy"]: row["kl_nats"] for row in result["policies"]}
    differences = trained_differences(records, kl_nats, context.data.max_response_tokens)
    result["arm_differences"] = [difference.as_dict() for difference in differences]
    # The pipeline adds it to the cost.
    result["judge_usage"] = [asdict(usage) for usage in [*asked.usages, *test_usages]]
    write_json(out / "evaluation.json", result)
    reporter.line(result["verdict"]["sentence"])
    n_tokens = sum(sample.n_tokens for sample in samples)
    return {"tokens": 5 * n_tokens, "n_samples": len(samples)}  # each token was sampled once, and scored four times


def evaluation_settings(context: EvaluateContext, inputs: dict[str, Path], sft: ModelRef) -> EvaluationSettings:
    rows = from_parquet(inputs["data"] / "eval.parquet")
    encoder = text_encoder(load_tokenizer(sft), rows[0].prompt, sft.spec)
    return EvaluationSettings(
        rows=rows,
        prompts=[encoder.prompt(row.prompt) for row in rows],
        encoder=encoder,
        section=context.evaluate,
        model=context.model,
        max_new_tokens=context.evaluate.max_new_tokens or context.data.max_response_tokens,
        max_response_tokens=context.data.max_response_tokens,
        seed=context.seed,
    )


def gold_is_known(rows: Sequence[PreferenceRow]) -> tuple[bool, list[str]]:
    """Whether the gold reward of new samples can be computed, and a warning where it is not that of the data."""
    if any(row.gold is None for row in rows):
        return False, []
    for row in rows[:20]:
        assert row.gold is not None
        computed = gold_rewards([row.prompt] * len(row.responses), row.responses)
        if any(abs(a - b) > 1e-3 for a, b in zip(computed, row.gold, strict=True)):
            return False, ["the data's gold rewards are not those of the shipped gold reward: gold is left out"]
    return True, []


def choose_judges(judges: Sequence[str], has_gold: bool, models: TrainedModels) -> tuple[list[str], list[str]]:
    """The judges of a run, and warnings about those that are training signals by another name.

    Raises RecipeError where ``gold`` shall judge and the data has none.
    """
    chosen = judges or (["gold"] if has_gold else list(TRAINING_SIGNALS))
    if "gold" in chosen and not has_gold:
        raise RecipeError("the data has no gold reward", where="evaluate.judges", fix="name another judge")
    implicit = [models.dpo.fingerprint, models.sft.fingerprint]
    return name_training_signals(chosen, {"rm": [models.reward_model.fingerprint], "implicit": implicit})


def run_models(inputs: Mapping[str, Path], models: TrainedModels, policies: Sequence[Policy]) -> RunModels:
    """What no judge of this run may be. The base model may, and so may SFT where it is the base model, untrained."""
    kinds = {"checkpoint", "final"} | ({"sft"} if any(policy.kind == "base" for policy in policies) else set())
    trained = {policy.ref.fingerprint: policy.name for policy in policies if policy.kind in kinds}
    return RunModels(inputs["sft"].parent, trained | {models.reward_model.fingerprint: "its reward model"})


def find_policies(context: EvaluateContext, inputs: dict[str, Path], sft: ModelRef) -> list[Policy]:
    """base, sft, and both arms with their checkpoints in the order of training.

    Several samples of a prompt go to the policies that the verdict compares.
    """
    section: EvaluateSection = context.evaluate
    n = section.samples_per_prompt
    policies = []
    if context.sft.enabled:
        base = resolve(context.model.name, context.model.revision)
        policies.append(Policy("base", "base", "base", 0, base, 1))
    policies.append(Policy("sft", "sft", "sft", 0, sft, n + section.best_of_n))
    for arm, stage in (("rm_ppo", "ppo"), ("dpo", "dpo")):
        folders = (inputs[stage] / "checkpoints").glob("*") if section.checkpoints else ()
        checkpoints = [(training_record(ref), ref) for ref in (resolve(str(folder)) for folder in folders)]
        for record, ref in sorted(checkpoints, key=lambda item: (item[0]["step"], item[0].get("kl_milestone", 0.0))):
            at = f"kl-{record['kl_milestone']:g}" if "kl_milestone" in record else record["step"]
            policies.append(Policy(f"{arm}@{at}", arm, "checkpoint", record["step"], ref, 1))
        final = resolve(str(inputs[stage] / "model"))
        policies.append(Policy(arm, arm, "final", training_record(final)["step"], final, n))
    return policies


def samples_of(policy: Policy, settings: EvaluationSettings, folder: Path, reporter: Reporter) -> list[Sample]:
    """The policy's samples, from ``folder`` where an interrupted evaluation has drawn them already."""
    path = folder / f"{policy.name}.parquet"
    if not path.is_file():
        folder.mkdir(exist_ok=True)
        write_samples(sample_policy(policy, settings, reporter), path, SAMPLED_COLUMNS)
    return read_samples(path, SAMPLED_COLUMNS, error=StoreError, fix="remove it and run again")


def sample_policy(policy: Policy, settings: EvaluationSettings, reporter: Reporter) -> list[Sample]:
    """Sample a policy on every held-out prompt, and score the samples under itself at the sampling temperature."""
    section = settings.section
    engine = settings.engine(load_policy(policy.ref, settings.model))
    with reporter.task(f"sample {policy.name}", len(settings.rows) * policy.n_samples) as task:
        responses = sample_responses(
            engine.model,
            settings.encoder.tokenizer,
            settings.prompts,
            lambda i, k: (settings.seed, "evaluate", policy.name, settings.rows[i].prompt_id, k),
            SamplingParams(settings.max_new_tokens, section.temperature, policy.n_samples, section.batch_size),
            dtype=settings.dtype,
            advance=task.advance,
        )
    trees = [Tree(ids, [r.ids for r in group]) for ids, group in zip(settings.prompts, responses, strict=True)]
    # Everything is scored under SFT, the reference, and under the DPO policy later: once is enough.
    scored_later = policy.kind == "sft" or (policy.name == "dpo" and section.temperature == 1.0)
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
        for p, (row, group) in enumerate(zip(settings.rows, responses, strict=True))
        for k, response in enumerate(group)
    ]


# ---------------------------------------------------------------- scores


@dataclass(frozen=True)
class Scores:
    """Of one response: log-probabilities in nats under the reference and under DPO's policy, and the explicit reward.

    ``tempered_reference_logp`` is the reference's at the sampling temperature.
    """

    reference_logp: float
    tempered_reference_logp: float
    dpo_logp: float
    explicit_reward: float


@dataclass(frozen=True)
class ScoredPrompt:
    """A held-out prompt: the data's responses as ids with their scores, and the scores of all policies' samples."""

    encoded: Encoded
    held_out: list[Scores]
    samples: list[Scores]


@dataclass(frozen=True)
class HeldOutReward:
    """A row of ``rewards.parquet``: one held-out response of the data, with the columns of ``duel rewards --rm``."""

    prompt_id: str
    response_index: int
    response: str
    n_tokens: int
    policy_logp: float
    reference_logp: float
    implicit_reward: float
    implicit_reward_mean: float
    explicit_reward: float
    gold_reward: float | None
    truncated: bool


def score_everything(
    samples: Sequence[Sample], settings: EvaluationSettings, models: TrainedModels, reporter: Reporter
) -> list[ScoredPrompt]:
    """The scores of all held-out responses and all samples, by prompt; a prompt's samples keep their order.

    One tree per prompt holds the data's responses and every policy's samples, so that a prompt is computed once.
    """
    of_prompt = by_prompt(samples)
    held_out = [settings.encoder.encode(r.prompt, r.responses, settings.max_response_tokens) for r in settings.rows]
    trees = [
        Tree(ids, [*encoded.tree.response_ids, *(sample.response_ids for sample in of_prompt[row.prompt_id])])
        for ids, row, encoded in zip(settings.prompts, settings.rows, held_out, strict=True)
    ]
    passes = {"score under the reference": 1.0}
    if settings.section.temperature != 1.0:
        passes["score under the reference, at the sampling temperature"] = settings.section.temperature
    reference = _sequence_logps(models.sft, passes, trees, settings, reporter)
    [dpo] = _sequence_logps(models.dpo, {"implicit rewards": 1.0}, trees, settings, reporter)
    explicit = _explicit_rewards(models.reward_model, trees, settings, reporter)
    scored = []
    for encoded, *columns in zip(held_out, reference[0], reference[-1], dpo, explicit, strict=True):
        scores = [Scores(*of_response) for of_response in zip(*columns, strict=True)]
        n = len(encoded.tree.response_ids)
        scored.append(ScoredPrompt(encoded, scores[:n], scores[n:]))
    return scored


def _sequence_logps(
    ref: ModelRef,
    passes: Mapping[str, float],
    trees: Sequence[Tree],
    settings: EvaluationSettings,
    reporter: Reporter,
) -> list[list[list[float]]]:
    """For each pass (its label, and its temperature), for each tree: the log-probability of every response in nats."""
    gc.collect()  # the model before this one: one at a time is in memory
    engine = settings.engine(load_policy(ref, settings.model))
    sums = []
    for label, temperature in passes.items():
        with reporter.task(label, sum(len(tree.response_ids) for tree in trees)) as task:
            logps = engine.logps(trees, temperature=temperature, advance=task.advance)
        sums.append([[float(t.double().sum()) for t in responses] for responses in logps])
    return sums


def _explicit_rewards(
    ref: ModelRef, trees: Sequence[Tree], settings: EvaluationSettings, reporter: Reporter
) -> list[list[float]]:
    gc.collect()
    engine, mean = settings.engine(load_reward_model(ref, settings.model)), reward_mean(ref.path)
    with reporter.task("explicit rewards", sum(len(tree.response_ids) for tree in trees)) as task:
        scores = engine.scores(trees, advance=task.advance)
    return [[value - mean for value in values] for values in scores]


def held_out_rewards(
    rows: Sequence[PreferenceRow], scored: Sequence[ScoredPrompt], implicit: ImplicitReward
) -> list[HeldOutReward]:
    rewards = []
    for row, prompt in zip(rows, scored, strict=True):
        for k, (response, scores) in enumerate(zip(row.responses, prompt.held_out, strict=True)):
            n_tokens = len(prompt.encoded.tree.response_ids[k])
            log_ratio = scores.dpo_logp - scores.reference_logp
            rewards.append(
                HeldOutReward(
                    prompt_id=row.prompt_id,
                    response_index=k,
                    response=response,
                    n_tokens=n_tokens,
                    policy_logp=scores.dpo_logp,
                    reference_logp=scores.reference_logp,
                    implicit_reward=implicit(log_ratio, n_tokens),
                    implicit_reward_mean=implicit.beta * log_ratio / n_tokens,
                    explicit_reward=scores.explicit_reward,
                    gold_reward=row.gold[k] if row.gold is not None else None,
                    truncated=prompt.encoded.truncated[k],
                )
            )
    return rewards


def held_out_scores(rows: Sequence[PreferenceRow], rewards: Sequence[HeldOutReward]) -> dict[str, RowScores]:
    """The scores of the data's responses, by row, of the judges that have scored them already."""
    out: dict[str, RowScores] = {}
    for judge, column in (("rm", "explicit_reward"), ("implicit", "implicit_reward")):
        remaining = (getattr(reward, column) for reward in rewards)
        out[judge] = [[next(remaining) for _ in row.responses] for row in rows]
    known = [row.gold for row in rows if row.gold is not None]
    return out | ({"gold": known} if len(known) == len(rows) else {})


def with_scores(
    samples: Sequence[Sample],
    rows: Sequence[PreferenceRow],
    scored: Sequence[ScoredPrompt],
    implicit: ImplicitReward,
    has_gold: bool,
) -> list[Sample]:
    """The samples with their KL from the reference and their rewards."""
    prompts = {row.prompt_id: row.prompt for row in rows}
    remaining = {row.prompt_id: iter(prompt.samples) for row, prompt in zip(rows, scored, strict=True)}
    out = []
    for sample in samples:
        scores = next(remaining[sample.prompt_id])
        policy_logp = sample.policy_logp
        if policy_logp is None:
            policy_logp = scores.tempered_reference_logp if sample.kind == "sft" else scores.dpo_logp
        gold = gold_rewards([prompts[sample.prompt_id]], [sample.response])[0] if has_gold else None
        out.append(
            replace(
                sample,
                policy_logp=policy_logp,
                kl_nats=policy_logp - scores.tempered_reference_logp,
                implicit_reward=implicit(scores.dpo_logp - scores.reference_logp, sample.n_tokens),
                explicit_reward=scores.explicit_reward,
                gold_reward=gold,
            )
        )
    return out


def best_of_n(samples: Sequence[Sample], section: EvaluateSection) -> list[Sample]:
    """The best of n further SFT samples by the explicit and by the implicit reward, as policies of their own.

    Their samples are not those of the ``sft`` policy, so that both are independent draws.
    """
    n, first = section.best_of_n, section.samples_per_prompt
    pools = by_prompt(sample for sample in samples if sample.policy == "sft" and sample.sample_index >= first)
    out = []
    for name, reward in ((f"best_of_{n}_rm", "explicit_reward"), (f"best_of_{n}_implicit", "implicit_reward")):
        for pool in pools.values():
            best = max(pool, key=lambda sample: (getattr(sample, reward), -sample.sample_index))
            out.append(replace(best, policy=name, arm=name, kind="best_of_n", sample_index=0))
    return out


# ---------------------------------------------------------------- judgements


def judge_all(
    judges: Sequence[str],
    samples: Sequence[Sample],
    policies: Sequence[str],
    settings: EvaluationSettings,
    reporter: Reporter,
) -> Judged:
    """Every policy against SFT, and the arms against each other, by every judge; and what language models took."""
    names = [*policies, *sorted({sample.policy for sample in samples} - set(policies))]
    pairs = [(name, "sft") for name in names if name != "sft"] + [("rm_ppo", "dpo")]
    prompt_ids = [row.prompt_id for row in settings.rows]
    of_policy = {name: by_prompt(of_name) for name, of_name in by_policy(samples).items()}

    def column(field: str) -> dict[str, list[list[Any]]]:
        return {name: [[getattr(s, field) for s in of_policy[name][key]] for key in prompt_ids] for name in names}

    responses = PolicyResponses(
        prompt_ids,
        [row.prompt for row in settings.rows],
        column("response"),
        ids=column("response_ids"),
        truncated=column("truncated"),
    )
    known = {"gold": column("gold_reward"), "rm": column("explicit_reward"), "implicit": column("implicit_reward")}
    return ask_judges(judges, pairs, responses, settings.judge_options, reporter, known_scores=known)
