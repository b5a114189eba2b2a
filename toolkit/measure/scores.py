"""What scores an evaluation's responses: the reference, the DPO policy and the reward model, in one pass each."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from toolkit.engine.reward_model import load_scorer
from toolkit.evals.ensembles import disagreement
from toolkit.evals.implicit_reward import ImplicitReward
from toolkit.judging.held_out import RowScores
from toolkit.measure.policies import EvaluationSettings, TrainedModels
from toolkit.models.encoding import Encoded, Tree, text_encoder
from toolkit.models.load import load_policy
from toolkit.models.resolve import ModelRef
from toolkit.models.tokenizer import load_tokenizer, reads_the_same
from toolkit.preferences.gold import gold_rewards
from toolkit.preferences.rows import PreferenceRow
from toolkit.preferences.samples import Sample, by_prompt
from toolkit.progress import Reporter
from toolkit.recipe.schema import EvaluateSection


@dataclass(frozen=True)
class Scores:
    """Of one response: log-probabilities in nats under the reference and under DPO's policy, and the explicit reward.

    ``tempered_reference_logp`` is the reference's at the sampling temperature, ``outputs`` are those of the reward
    model, centred, that its score is made of: more than one under an ensemble, or heads of annotators.
    """

    reference_logp: float
    tempered_reference_logp: float
    dpo_logp: float
    explicit_reward: float
    outputs: Sequence[float] = ()

    @property
    def disagreement(self) -> float | None:
        """The standard deviation of several outputs."""
        return float(disagreement(self.outputs)) if len(self.outputs) > 1 else None


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
    explicit, outputs = _explicit_rewards(models.reward_model, trees, held_out, of_prompt, settings, reporter)
    scored = []
    for encoded, *columns in zip(held_out, reference[0], reference[-1], dpo, explicit, outputs, strict=True):
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
            sums.append(engine.map_logps(trees, _sum, temperature=temperature, advance=task.advance))
    return sums


def _sum(logps: torch.Tensor) -> float:
    return float(logps.double().sum())


def _explicit_rewards(
    ref: ModelRef,
    trees: Sequence[Tree],
    held_out: Sequence[Encoded],
    of_prompt: Mapping[str, Sequence[Sample]],
    settings: EvaluationSettings,
    reporter: Reporter,
) -> tuple[list[list[float]], list[list[list[float]]]]:
    """For each tree, the score of each response and its centred outputs.

    A reward model with another tokenizer than the policy's reads the texts in its own tokens.
    """
    gc.collect()
    tokenizer = load_tokenizer(ref)
    model = load_scorer(ref, settings.model, tokenizer, token_budget=settings.section.token_budget)
    if model.reads_pairs or not reads_the_same(tokenizer, settings.encoder.tokenizer):
        encoder = text_encoder(tokenizer, settings.rows[0].prompt, ref.spec, pair=model.reads_pairs)
        trees = [
            model.read(
                encoder,
                row.prompt,
                [*row.responses, *(sample.response for sample in of_prompt[row.prompt_id])],
                [*encoded.truncated, *(sample.truncated for sample in of_prompt[row.prompt_id])],
            )
            for row, encoded in zip(settings.rows, held_out, strict=True)
        ]
    with reporter.task("explicit rewards", sum(len(tree.response_ids) for tree in trees)) as task:
        outputs = model.outputs(trees, advance=task.advance)
    return [model.head.scores(of_tree).tolist() for of_tree in outputs], [
        model.head.centred(of_tree).tolist() for of_tree in outputs
    ]


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
                reward_disagreement=scores.disagreement,
                gold_reward=gold,
            )
        )
    return out


def with_kl(
    samples: Sequence[Sample], settings: EvaluationSettings, sft: ModelRef, has_gold: bool, reporter: Reporter
) -> list[Sample]:
    """Samples of a further temperature with their KL from the reference at that temperature, and their gold rewards.

    Their explicit and implicit rewards stay unknown: no judge that decides needs them.
    """
    of_prompt = by_prompt(samples)
    trees = [
        Tree(ids, [sample.response_ids for sample in of_prompt[row.prompt_id]])
        for ids, row in zip(settings.prompts, settings.rows, strict=True)
    ]
    temperature = settings.section.temperature
    label = f"score under the reference, at temperature {temperature}"
    [reference] = _sequence_logps(sft, {label: temperature}, trees, settings, reporter)
    out = []
    for row, logps in zip(settings.rows, reference, strict=True):
        for sample, reference_logp in zip(of_prompt[row.prompt_id], logps, strict=True):
            policy_logp = reference_logp if sample.policy_logp is None else sample.policy_logp
            gold = gold_rewards([row.prompt], [sample.response])[0] if has_gold else None
            kl = policy_logp - reference_logp
            out.append(replace(sample, policy_logp=policy_logp, kl_nats=kl, gold_reward=gold))
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
