"""Training an explicit reward model: Bradley-Terry over all comparisons of a prompt, for one score or for several."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from toolkit.engine import distributed
from toolkit.engine.engine import Engine
from toolkit.engine.process import step_trees
from toolkit.errors import RecipeError
from toolkit.files import read_json, write_json
from toolkit.models.config import refuse_quantised
from toolkit.models.encoding import TextEncoder, text_encoder
from toolkit.models.inspect import best_device, learned_positions, torch_dtype
from toolkit.models.load import (
    head_modules,
    load_reward_model,
    new_reward_model,
    reads_pairs,
    table_of_positions,
    trainable,
)
from toolkit.models.resolve import ModelRef, resolve
from toolkit.models.reward_head import ProcessHead, RewardHead
from toolkit.models.save import save_policy
from toolkit.models.sharding import placed
from toolkit.models.tokenizer import load_tokenizer
from toolkit.preferences import splits
from toolkit.preferences.annotators import annotators_of
from toolkit.preferences.rows import PreferenceRow
from toolkit.preferences.solutions import Solution
from toolkit.progress import Reporter
from toolkit.recipe.training import ModelSection, RewardModelSection
from toolkit.training.batch import Example, PairBatch, examples_of
from toolkit.training.budget import Spending
from toolkit.training.callbacks import StageProgress
from toolkit.training.length import total_steps
from toolkit.training.process import StepTrainer, step_examples, step_loss
from toolkit.training.trainer import (
    EngineTrainer,
    items_of,
    prompts_seen,
    train_to_end,
    trained_tokens,
    training_arguments,
)

TRAINED_FILE = "trained.json"  # beside a finished member's checkpoints


def bradley_terry(
    engine: Engine, center_rewards_coefficient: float, batch: PairBatch
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted sum of -log sigmoid(r_i - r_j - margin) over comparisons, and metrics; responses are computed once.

    A soft label weighs the losses of both orders. Ouyang et al. 2022 (arXiv 2203.02155), equation 1; the margin:
    Touvron et al. 2023 (arXiv 2307.09288), equation 2. With several heads a comparison trains that of its annotator,
    or all of them by the mean of their losses.
    """
    rewards_R = engine.branch_scores(batch.trees)
    first, second = rewards_R[batch.first], rewards_R[batch.second]
    if batch.output is not None:
        first, second = (values.gather(1, batch.output[:, None]).squeeze(1) for values in (first, second))
    heads = first.shape[1:]  # (M,) where every head trains on every comparison
    p, least = (values.reshape(-1, *(1 for _ in heads)) for values in (batch.prefer_first, batch.margin))
    margin = first - second
    nll = -(p * F.logsigmoid(margin - least) + (1 - p) * F.logsigmoid(-margin - least))
    loss = (batch.weight * _over_heads(nll)).sum()
    if center_rewards_coefficient:
        loss = loss + center_rewards_coefficient * (batch.weight * _over_heads((first + second).square())).sum()
    with torch.no_grad():
        first, second = _over_heads(first), _over_heads(second)
        sign = torch.sign(batch.prefer_first - 0.5)
        chosen, rejected = (torch.where(sign > 0, a, b)[sign != 0] for a, b in ((first, second), (second, first)))
        right = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
        metrics = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": right,
            # The names that RewardTrainer logs.
            "accuracy": right,
            "margin": chosen - rejected,
            "mean_reward": rewards_R,
        }
    return loss, metrics


def _over_heads(values: torch.Tensor) -> torch.Tensor:
    """[P] values of [P] or [P, M]."""
    return values if values.dim() == 1 else values.mean(1)


# -- what is trained


@dataclass(frozen=True)
class Member:
    """One training: its folder's name ("" for the only one), its seeds, its examples, its outputs.

    ``head_seed`` initialises the new head, ``seed`` orders the data.
    """

    name: str
    seed: int
    head_seed: int
    examples: Sequence[Example]
    n_outputs: int = 1


def examples_by_annotator(
    rows: Sequence[PreferenceRow], names: Sequence[str], encoder: TextEncoder, max_response_tokens: int
) -> list[Example]:
    """Rows as token ids, with the comparisons of each annotator by themselves for the head of that annotator."""
    examples = []
    for row in rows:
        pairs: list[tuple[int, int, float, float]] = []
        margins: list[float] = []
        outputs: list[int] = []
        for number, name in enumerate(names):
            of_one = replace(row, comparisons=[c for c in row.comparisons if c.annotator == name])
            pairs += splits.pairs(of_one)
            margins += splits.margins(of_one)
            outputs += [number] * (len(pairs) - len(outputs))
        if pairs:
            tree = encoder.encode(row.prompt, row.responses, max_response_tokens).tree
            examples.append(Example(tree, pairs, tuple(margins), tuple(outputs)))
    return examples


def members_to_train(
    section: RewardModelSection,
    rows: Sequence[PreferenceRow],
    encoder: TextEncoder,
    limit: int,
    seed: int,
    further: Sequence[Example] = (),
) -> tuple[list[Member], RewardHead]:
    """What to train on these rows, responses of at most ``limit`` tokens, and on ``further`` comparisons, which no
    annotator of the data made; and the head that makes one score of it.

    Raises RecipeError for heads of annotators that the rows cannot train.
    """
    combine = section.combine if section.combine != "average_weights" else "mean"
    head = RewardHead(combine=combine, uwo_lambda=section.uwo_lambda)
    if section.annotators == "heads":
        names = annotators_of(rows, section.annotator)
        examples = examples_by_annotator(rows, names, encoder, limit)
        return [Member("", seed, seed, examples, len(names))], replace(
            head, outputs=names, annotator=section.annotator or ""
        )
    examples = [*examples_of(rows, encoder, limit), *further]
    if section.members == 1:
        return [Member("", seed, seed, examples)], RewardHead()
    if section.differ_by == "head":
        names = [f"head-{number}" for number in range(section.members)]
        return [Member("", seed, seed, examples, section.members)], replace(head, outputs=names)
    members = []
    for number in range(section.members):
        own = member_seed(seed, number)
        resampled = bootstrap_of(examples, own) if section.differ_by == "data" else examples
        # Weights can be averaged only from one start (Rame et al. 2024), the new head's among them.
        shared_start = section.combine == "average_weights" or section.differ_by == "data"
        members.append(Member(f"member-{number}", own, seed if shared_start else own, resampled))
    names = [member.name for member in members]
    return members, replace(head, outputs=names, members=names)


def steps_to_train(
    section: RewardModelSection, solutions: Sequence[Solution], encoder: TextEncoder, limit: int, seed: int
) -> tuple[list[Member], RewardHead]:
    """:func:`members_to_train` for a process reward model, on labelled steps.

    Raises RecipeError for an encoder, which would see what follows a step; DataError where nothing can be learned.
    """
    if encoder.pair is not None:
        what = "an encoder reads a whole response at once, and cannot judge a step by what stands before it"
        raise RecipeError(what, where="reward_model.base", fix="a decoder, or kind: preference")
    trees, _ = step_trees(solutions, encoder, section.step_separator, limit)
    head = RewardHead(process=ProcessHead(section.step_separator, section.solution_score, encoder.conversational))
    return [Member("", seed, seed, step_examples(trees, solutions))], head


def member_seed(seed: int, number: int) -> int:
    """The seed of an ensemble's member. The first has the run's."""
    if number == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"member:{seed}:{number}".encode()).digest()[:4], "big") >> 1


def bootstrap_of(examples: Sequence[Example], seed: int) -> list[Example]:
    """As many prompts as there are, drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(examples), (len(examples),), generator=generator)
    return [examples[int(i)] for i in drawn]


def check_positions(positions: int | None, examples: Sequence[Example], base: str) -> None:
    """Raises RecipeError where a base with a table of ``positions`` has too few of them for the training data."""
    too_long = [example.tree.depth for example in examples if positions is not None and example.tree.depth > positions]
    if too_long:
        raise RecipeError(
            f"{len(too_long)} of {len(examples)} prompts have more tokens with their longest response (up to "
            f"{max(too_long)}) than {base!r} has positions ({positions})",
            where="reward_model.base",
            fix="lower data.max_prompt_tokens or data.max_response_tokens, or take another base",
        )


def check_base(
    model: ModelSection,
    section: RewardModelSection,
    rows: Sequence[PreferenceRow],
    solutions: Sequence[Solution],
    limit: int,
) -> None:
    """What can be said of the base before there is an SFT policy, which has the tokenizer of ``model``.

    Raises a DuelError where the base cannot read the training data.
    """
    base = resolve(model.name, model.revision) if section.base is None else resolve(section.base)
    refuse_quantised(base, "model.name" if section.base is None else "reward_model.base")
    tokenizer = load_tokenizer(base, model.chat_template if section.base is None else None)
    encoder = text_encoder(tokenizer, rows[0].prompt, base.spec, pair=reads_pairs(base))
    positions = table_of_positions(base)
    if section.kind == "process":
        [member], _ = steps_to_train(section, solutions, encoder, limit, seed=0)
        check_positions(positions, member.examples, base.spec)
    elif positions is not None:
        check_positions(positions, examples_of(rows, encoder, limit), base.spec)


# -- training


@dataclass(frozen=True)
class MemberTraining:
    """What the trainings of all members share. ``previous`` is the folder of the reward model that they go on from."""

    section: RewardModelSection
    model: ModelSection
    base: ModelRef
    tokenizer: PreTrainedTokenizerBase
    out: Path
    reporter: Reporter
    previous: Path | None = None

    def folder(self, member: Member) -> Path:
        """Where its model is written: members whose weights are averaged stay beside their checkpoints."""
        averaged = self.section.combine == "average_weights" and member.name
        return self.out / "trainer" / member.name / "model" if averaged else self.out / "model" / member.name

    def train(self, member: Member, n_members: int) -> dict[str, Any]:
        """Train one member, unless an interrupted stage has, and return what it took. Its head is not written."""
        checkpoints = self.out / "trainer" / member.name if member.name else self.out
        record = checkpoints / TRAINED_FILE
        if member.name and record.is_file():
            return read_json(record)
        label = f"reward_model, {member.name} of {n_members}" if member.name else "reward_model"
        model, spending = self._start(member), Spending()
        section, examples = self.section, member.examples
        check_positions(learned_positions(model), examples, self.base.spec)
        steps = total_steps(section, items_of(section, examples))
        progress = StageProgress(self.reporter, label, steps)
        arguments = training_arguments(section, checkpoints, seed=member.seed, dtype=self.model.dtype, steps=steps)
        trainer: Any
        if section.trainer == "trl":
            from toolkit.training import trl  # TRL takes long to import

            model, lora = model.to(best_device()), self.model.lora
            trl_inputs = trl.TrainerInputs(model, lora, self.tokenizer, arguments, [progress], spending)
            trainer = trl.reward_model(trl_inputs, section, examples, self.reporter)
            model = trainer.model
        else:
            model = placed(trainable(model, self.model.lora, task="SEQ_CLS", modules_to_save=head_modules(model)))
            engine = Engine(model, int(self.tokenizer.pad_token_id), dtype=torch_dtype(self.model.dtype))
            if section.kind == "process":
                steps_loss = partial(step_loss, engine)
                trainer = StepTrainer(engine, arguments, examples, steps_loss, [progress], spending)
            else:
                loss = partial(bradley_terry, engine, section.center_rewards_coefficient)
                trainer = EngineTrainer(engine, arguments, examples, loss, [progress], spending)
        train_to_end(trainer, progress, checkpoints)
        model.eval()
        took = {
            "tokens": trained_tokens(section, steps, examples),
            "prompts_seen": prompts_seen(section, steps, examples),
            "response_tokens_trained": spending.tokens,
            "history": progress.history,
            "steps": steps,
        }
        if distributed.saves_models():
            dtype = torch_dtype(self.model.dtype)
            save_policy(model, self.tokenizer, self.folder(member), dtype=dtype, base=self.base)
        if distributed.main_process() and member.name:
            RewardHead().write(self.folder(member))
            write_json(record, took)
        distributed.barrier()
        return took if member.name else took | {"model": model}

    def _start(self, member: Member) -> Any:
        """A new model, or the one of the round before: the member's, or what became of all members."""
        if self.previous is not None:
            of_member = self.previous / member.name
            ref = resolve(str(of_member if of_member.is_dir() else self.previous))
            dtype = torch_dtype(self.model.dtype) if self.model.lora is not None else torch.float32
            return load_reward_model(ref, self.model, dtype=dtype)
        pad_id = int(self.tokenizer.pad_token_id)
        return new_reward_model(self.base, self.model, pad_id, member.head_seed, member.n_outputs)
