"""The arm without a reward model: direct preference optimisation, whose policy is its own reward model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Trainer

from toolkit.engine import cache, distributed
from toolkit.engine.engine import Engine
from toolkit.engine.logps import by_response
from toolkit.engine.sampling import SamplingParams, sample_responses
from toolkit.errors import RecipeError
from toolkit.evals.implicit_reward import LENGTH_NORMALISED, defined_by
from toolkit.models.encoding import TextEncoder, Tree, text_encoder
from toolkit.models.inspect import best_device, torch_dtype
from toolkit.models.load import attention, load_policy, trainable
from toolkit.models.resolve import ModelRef, resolve
from toolkit.models.save import save_policy, write_training_record
from toolkit.models.sharding import gathered, placed
from toolkit.models.tokenizer import load_tokenizer
from toolkit.ppo.labels import labels_by
from toolkit.preferences.fresh import write_fresh_rewards
from toolkit.preferences.rows import PreferenceRow
from toolkit.preferences.tables import from_parquet
from toolkit.progress import Reporter
from toolkit.recipe.training import DpoSection, ModelSection, OnlineSection
from toolkit.stages.contexts import DpoContext
from toolkit.training.batch import Example, PairBatch, examples_of
from toolkit.training.budget import Spending
from toolkit.training.callbacks import SaveAtKl, StageProgress
from toolkit.training.labelled import read_labelled
from toolkit.training.length import Cost, total_steps
from toolkit.training.milestones import RESPONSES, KlMilestones, MilestonePolicy
from toolkit.training.online import OnlineData, OnlineTrainer, prompts_alone
from toolkit.training.trainer import (
    EngineTrainer,
    checkpoint,
    items_of,
    keep_along,
    policy_folder,
    prompts_seen,
    prompts_trained,
    record_before,
    seed_everything,
    train_to_end,
    trained_tokens,
    training_arguments,
)

# Prompts that are sampled to estimate the KL. With a spread of 5 nats, the estimate has a standard error of 0.9.
KL_PROMPTS = 32


def preference_loss(
    log_ratio_i: torch.Tensor, log_ratio_j: torch.Tensor, prefer_i: torch.Tensor, section: DpoSection
) -> torch.Tensor:
    """[P] losses of comparisons, from log pi/pi_ref of their two responses (``LENGTH_NORMALISED``: per token).

    sigmoid: Rafailov et al. 2023 (arXiv 2305.18290), equation 7, with conservative label smoothing (Mitchell 2023).
    sigmoid_norm: the same on length-averaged log-ratios (Lambert et al. 2024, arXiv 2411.15124, section 5.1.2).
    robust: Chowdhury et al. 2024 (arXiv 2403.00409), unbiased where a share ``label_smoothing`` of labels is flipped.
    ipo: Azar et al. 2023 (arXiv 2310.12036), equation 17, on length-averaged log-ratios as in TRL.
    hinge: Zhao et al. 2023 (SLiC), as in TRL. A soft label weighs the loss of both orders.

    >>> loss = preference_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]), DpoSection(beta=1.0))
    >>> round(loss.item(), 6)  # -log sigmoid(1)
    0.313262
    """
    difference = log_ratio_i - log_ratio_j
    margin = section.beta * difference
    flipped = section.label_smoothing
    if section.loss_type == "robust":
        p = prefer_i
        clean, other = -F.logsigmoid(margin), -F.logsigmoid(-margin)
        for_i = ((1 - flipped) * clean - flipped * other) / (1 - 2 * flipped)
        for_j = ((1 - flipped) * other - flipped * clean) / (1 - 2 * flipped)
        return p * for_i + (1 - p) * for_j
    p = prefer_i * (1 - flipped) + (1 - prefer_i) * flipped
    if section.loss_type in ("sigmoid", "sigmoid_norm"):
        return -(p * F.logsigmoid(margin) + (1 - p) * F.logsigmoid(-margin))
    if section.loss_type == "ipo":
        target = 1 / (2 * section.beta)
        return p * (difference - target).square() + (1 - p) * (-difference - target).square()
    return p * F.relu(1 - margin) + (1 - p) * F.relu(1 + margin)


def dpo_loss(
    engine: Engine, section: DpoSection, reference: list[torch.Tensor], batch: PairBatch
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted sum over comparisons, and metrics; ``reference[e]``: [K] log-probabilities of example e.

    The metrics, of comparisons with a winner, are TRL's (``rewards/*`` are sums over tokens for every loss, as there)
    and ``displacement/*``: training may lower the log-probability of chosen responses too, if it lowers that of
    rejected ones more (Razin et al. 2024, arXiv 2410.08847). ``chosen`` and ``rejected`` are log pi/pi_ref in nats per
    response, ``rate`` is the share of chosen responses below 0.
    """
    logps_N, _ = engine.token_logps(batch.trees)
    logps_R = by_response(logps_N, batch.trees)
    ref_R = torch.cat([reference[e] for e in batch.example.tolist()]).to(logps_R.device)
    ratio_R = logps_R - ref_R
    scaled_R = ratio_R
    if section.loss_type in LENGTH_NORMALISED:
        scaled_R = ratio_R / torch.bincount(batch.trees.owner, minlength=ratio_R.numel())
    losses_P = preference_loss(scaled_R[batch.first], scaled_R[batch.second], batch.prefer_first, section)
    with torch.no_grad():
        chosen, rejected = batch.decided()
        logps, ratio = logps_R.detach(), ratio_R.detach()
        margin = section.beta * (ratio[chosen] - ratio[rejected])
        metrics = {
            "rewards/chosen": section.beta * ratio[chosen],
            "rewards/rejected": section.beta * ratio[rejected],
            "rewards/margins": margin,
            "rewards/accuracies": (margin > 0).float() + 0.5 * (margin == 0).float(),
            "logps/chosen": logps[chosen],
            "logps/rejected": logps[rejected],
            "displacement/chosen": ratio[chosen],
            "displacement/rejected": ratio[rejected],
            "displacement/rate": (ratio[chosen] < 0).float(),
        }
    return (batch.weight * losses_P).sum(), metrics


def reference_logps(
    ref: ModelRef, section: ModelSection, policy: Any, pad_id: int, trees: list[Tree], reporter: Reporter
) -> list[torch.Tensor]:
    """For each tree, [K] summed log-probabilities under ``policy``, which is the reference. The cache has them."""
    distributed.join_group()
    weights = str(policy.dtype).removeprefix("torch.")
    key = cache.identity(ref, dtype=section.dtype, attention=attention(section), weights=weights)
    n_responses = sum(len(tree.response_ids) for tree in trees)
    with reporter.task("reference log-probabilities", n_responses) as task:
        blocks = cache.ResponseCache(
            cache.reference_folder(), key, lambda: Engine(policy, pad_id, dtype=torch_dtype(section.dtype))
        ).logps(trees, advance=task.advance, skip=lambda n: task.resume_at(task.done + n))
        return [torch.stack([torch.from_numpy(t).sum() for t in row]) for block in blocks for row in block]


class KlProbe:
    """Estimates the KL to the reference during training, by log pi / pi_ref of new samples of the policy.

    ``reference`` is None where it is the policy without its adapter.
    """

    def __init__(
        self, policy: Any, reference: Any, encoder: TextEncoder, rows: list[PreferenceRow], context: DpoContext
    ) -> None:
        self.prompts = [(row.prompt_id, encoder.prompt(row.prompt)) for row in rows[:RESPONSES]]
        self.policy, self.reference, self.seed = policy, reference, context.seed
        self.dtype, self.tokenizer = torch_dtype(context.model.dtype), encoder.tokenizer
        self.params = SamplingParams(context.data.max_response_tokens)
        pad_id = int(self.tokenizer.pad_token_id)
        # They are made once: a new engine would try the tree's mask again.
        self.policy_engine = Engine(policy, pad_id, dtype=self.dtype)
        self.reference_engine = self.policy_engine
        if reference is not None:
            self.reference_engine = Engine(reference, pad_id, dtype=self.dtype)
        self.tokens = 0  # of samples and their prompts

    def __call__(self, step: int) -> torch.Tensor:
        """[R] log pi / pi_ref, in nats per response, of a sample for each of this process's first prompts."""
        rank, size = distributed.world()
        prompts = self.prompts[:KL_PROMPTS][rank::size]
        return self.log_ratios([ids for _, ids in prompts], [(self.seed, "kl", step, name) for name, _ in prompts])

    def at_milestone(self) -> torch.Tensor:
        """[R] the same of the samples that a milestone is measured on, of all processes."""
        rank, size = distributed.world()
        positions = range(rank, RESPONSES, size)
        prompts = [self.prompts[position % len(self.prompts)] for position in positions]
        keys = [
            (self.seed, "milestone", position, name) for position, (name, _) in zip(positions, prompts, strict=True)
        ]
        ratios = self.log_ratios([ids for _, ids in prompts], keys)
        gathered = distributed.all_items(list(zip(positions, ratios.tolist(), strict=True)))
        return torch.tensor([ratio for _, ratio in sorted(gathered)], dtype=torch.float64)

    def log_ratios(self, prompts: list[list[int]], keys: Sequence[Sequence[object]]) -> torch.Tensor:
        """[R] log pi / pi_ref, in nats per response, of a sample for each prompt; ``keys`` seed them."""
        self.policy.eval()  # with gradient checkpointing, training mode has no cache; the next step sets it again
        samples = sample_responses(
            self.policy, self.tokenizer, prompts, lambda i, _: keys[i], self.params, dtype=self.dtype
        )
        trees = [Tree(ids, [sample.ids]) for ids, [sample] in zip(prompts, samples, strict=True)]
        self.tokens += sum(map(len, trees))
        policy_logps = self.policy_engine.logps(trees)
        with self.policy.disable_adapter() if self.reference is None else nullcontext():
            reference_logps = self.reference_engine.logps(trees)
        pairs = zip(policy_logps, reference_logps, strict=True)
        return torch.tensor([float((a - b).double().sum()) for [a], [b] in pairs], dtype=torch.float64)


def run(context: DpoContext, inputs: dict[str, Path], out: Path, reporter: Reporter) -> dict[str, Any]:
    """Writes ``model/``, the arm's policy, and ``checkpoints/step-N/`` along training.

    In a further round training goes on from the policy of ``previous``, on the comparisons of ``labels`` alone, with
    the same reference and a new optimiser; records count its steps and its cost on.
    """
    section, dtype, lora = context.dpo, torch_dtype(context.model.dtype), context.model.lora
    sft = resolve(str(inputs["sft"] / "model"))
    earlier = record_before(inputs)
    spending = Spending(Cost.recorded(earlier))
    tokenizer = load_tokenizer(sft)
    seed_everything(context.seed)
    rows = from_parquet(inputs["data"] / "train.parquet")
    encoder = text_encoder(tokenizer, rows[0].prompt, sft.spec)
    online, pad_id = section.online, int(tokenizer.pad_token_id)
    policy, examples, reference = beginning(context, rows, encoder, sft, inputs, out, reporter)
    steps = total_steps(section, items_of(section, examples))

    def save_in(folder: Path, facts: Mapping[str, object]) -> None:
        save_policy(policy, tokenizer, folder, dtype=dtype, base=sft)
        write_training_record(
            folder,
            **facts,
            **(budget or spending).facts(),
            arm="dpo",
            conversational=encoder.conversational,
            beta=section.beta,
            loss_type=section.loss_type,
            implicit_reward=defined_by({"loss_type": section.loss_type}, section.beta).words,
            reference_fingerprint=sft.fingerprint,
            online=online.labels if online is not None else None,
        )

    def save(step: int) -> None:
        save_in(policy_folder(out, step, final=step == steps), {"step": earlier.get("step", 0) + step})

    def keep_milestone(kept: MilestonePolicy) -> None:
        reporter.line(f"dpo: {kept}")
        if distributed.main_process():
            save_in(checkpoint(out, kept.name), kept.facts())

    budget, keeping = keep_along(section, spending, steps, save)
    progress = StageProgress(reporter, "dpo", steps, budget)
    callbacks = [progress, *keeping]
    arguments = training_arguments(section, out, seed=context.seed, dtype=context.model.dtype, steps=steps)
    probe: KlProbe | None = None
    milestones: KlMilestones | None = None
    trainer: Trainer
    if section.trainer == "trl":
        from toolkit.training import trl  # TRL takes long to import

        trl_inputs = trl.TrainerInputs(policy, lora, tokenizer, arguments, callbacks, spending)
        trainer = trl.dpo(trl_inputs, section, examples, reference, reporter)
        policy = trainer.model
    else:
        policy = policy if lora is None else trainable(policy, lora, task="CAUSAL_LM")
        engine = Engine(policy, pad_id, dtype=dtype)
        # In fp32 as the policy is, so that the KL of two equal models is 0.
        needs_start = lora is None and bool(section.kl_milestones or online)
        start = load_policy(sft, context.model, dtype=torch.float32).to(engine.device) if needs_start else None
        if online is None:
            loss = partial(dpo_loss, engine, section, reference)
            trainer = EngineTrainer(engine, arguments, examples, loss, callbacks, spending, budget)
        else:
            data = online_data(context, online, rows, encoder, engine, start, inputs)
            loss_of = partial(dpo_loss, engine, section)
            trainer = OnlineTrainer(engine, arguments, data, loss_of, callbacks, spending, budget)
        if section.kl_milestones:
            probe = KlProbe(policy, start, encoder, rows, context)
            weights = [weight for weight in policy.parameters() if weight.requires_grad]
            milestones = KlMilestones(section.kl_milestones, weights, probe.at_milestone, keep_milestone)
            trainer.add_callback(SaveAtKl(milestones, probe, trainer.values))
    train_to_end(trainer, progress, out)
    # A budget ends earlier. A run that is resumed with more processes may be past its last step already.
    saved, steps = trainer.state.global_step == steps, trainer.state.global_step
    if distributed.saves_models() and not saved:
        save(steps)
    note_displacement(progress.history, section.logging_steps, reporter)
    missed = milestones.missed("dpo", reporter.line) if milestones is not None else {}
    of_data = computed_data(section, steps, examples, spending)
    if probe is not None:
        of_data["tokens"] += int(distributed.all_sum(torch.tensor(probe.tokens, device=best_device())))
    return {
        "prompts_seen": prompts_seen(section, steps, examples),
        **(budget or spending).metrics(),
        "history": progress.history,
        "steps": steps,
        **of_data,
        **missed,
    }


def to_train(ref: ModelRef, context: DpoContext) -> Any:
    """A policy on this process's device. Without LoRA it trains as it is; a sharded one must not change any more."""
    if context.model.lora is not None:
        return placed(load_policy(ref, context.model, dtype=torch_dtype(context.model.dtype)))
    return placed(trainable(load_policy(ref, context.model, dtype=torch.float32), None, task="CAUSAL_LM"))


def beginning(
    context: DpoContext,
    rows: list[PreferenceRow],
    encoder: TextEncoder,
    sft: ModelRef,
    inputs: Mapping[str, Path],
    out: Path,
    reporter: Reporter,
) -> tuple[Any, list[Example], list[torch.Tensor]]:
    """The policy that training starts from, what it goes over, and the reference's log-probabilities of its responses.

    With ``dpo.online`` it goes over prompts alone: samples and their log-probabilities come on the way. In a further
    round it also writes the implicit rewards of the round's samples, before training on them.
    """
    dtype = torch_dtype(context.model.dtype)
    policy = to_train(sft, context)
    if context.dpo.online is not None:
        return policy, prompts_alone(rows, encoder), []
    if "labels" in inputs:
        examples = read_labelled(inputs["labels"], "dpo", encoder)
    else:
        examples = examples_of(rows, encoder, context.data.max_response_tokens)
    trees, pad_id = [example.tree for example in examples], int(encoder.tokenizer.pad_token_id)
    with gathered(policy):
        reference = reference_logps(sft, context.model, policy, pad_id, trees, reporter)
    if "previous" in inputs:
        previous = resolve(str(inputs["previous"] / "model"))
        policy = to_train(previous, context)
        with gathered(policy), distributed.shared_batches():
            fresh = fresh_rewards(context.dpo, Engine(policy, pad_id, dtype=dtype), examples, reference)
        if distributed.main_process():
            write_fresh_rewards(fresh, out)
    return policy, examples, reference


def fresh_rewards(
    section: DpoSection, engine: Engine, examples: Sequence[Example], reference: Sequence[torch.Tensor]
) -> list[list[float]]:
    """The implicit reward of each example's responses, before training on them."""
    implicit = defined_by({"loss_type": section.loss_type}, section.beta)
    rewards = []
    for example, logps, of_reference in zip(
        examples, engine.logps([example.tree for example in examples]), reference, strict=True
    ):
        ratios = [float(a.double().sum()) - float(b) for a, b in zip(logps, of_reference, strict=True)]
        lengths = map(len, example.tree.response_ids)
        rewards.append([implicit(ratio, n) for ratio, n in zip(ratios, lengths, strict=True)])
    return rewards


def computed_data(section: DpoSection, steps: int, examples: Sequence[Example], spending: Spending) -> dict[str, int]:
    """``tokens`` that went through the models; and the ``pairs`` of the data, or with ``dpo.online`` its label budget:
    how many sampled responses were scored (``labels``)."""
    tokens = trained_tokens(section, steps, examples)
    if section.online is not None:
        n_labels = section.online.samples_per_prompt * prompts_trained(section, steps, len(examples))
        return {"tokens": tokens + spending.tokens, "labels": n_labels}
    pairs = sum(len(example.pairs) for example in examples)
    return {"tokens": tokens + sum(len(example.tree) for example in examples), "pairs": pairs}


def online_data(
    context: DpoContext,
    online: OnlineSection,
    rows: list[PreferenceRow],
    encoder: TextEncoder,
    engine: Engine,
    start: Any,
    inputs: Mapping[str, Path],
) -> OnlineData:
    """What online DPO samples and how it is labelled. ``start`` is the reference, None where the policy without its
    adapter is.

    Raises RecipeError where the gold reward has to label data that has none.
    """
    if online.labels == "gold" and rows[0].gold is None:
        raise RecipeError("the data has no gold reward", where="dpo.online.labels", fix="rm, or another reward model")
    reward_model = inputs["reward_model"] / "model" if online.labels == "rm" else None
    policy = engine.model
    reference_engine = engine if start is None else Engine(start, engine.pad_id, dtype=engine.dtype)

    def reference(trees: list[Tree]) -> list[torch.Tensor]:
        with policy.disable_adapter() if start is None else nullcontext():
            return [torch.stack([logps.sum() for logps in row]) for row in reference_engine.logps(trees)]

    return OnlineData(
        rows,
        encoder,
        SamplingParams(context.data.max_response_tokens, n=online.samples_per_prompt),
        labels_by(online.labels, reward_model, encoder.tokenizer, context.model),
        reference,
        context.seed,
        torch_dtype(context.model.dtype),
        log_kl=not context.dpo.kl_milestones,  # their probe logs it
    )


def note_displacement(history: Sequence[Mapping[str, float]], logging_steps: int, reporter: Reporter) -> None:
    """Say so if the chosen responses of the last steps are less likely than under the reference."""
    last = next((row for row in reversed(history) if "displacement/chosen" in row), None)
    if last is not None and last["displacement/chosen"] < 0:
        reporter.line(
            f"likelihood displacement: in the last {logging_steps} steps the chosen responses stood "
            f"{-last['displacement/chosen']:.1f} nats below the reference, {last['displacement/rate']:.0%} of them "
            "below it"
        )
