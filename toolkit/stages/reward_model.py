"""The explicit reward model: a scalar head on the SFT policy or another base, an ensemble, or a judge of steps.

``training/reward_model.py`` has the loss and the kinds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from toolkit.engine import distributed
from toolkit.engine.engine import Engine
from toolkit.engine.reward_model import RewardModel, load_scorer, step_ends_of
from toolkit.engine.sampling import SamplingParams, sample_responses
from toolkit.models.averaging import average_members
from toolkit.models.encoding import TextEncoder, Tree, text_encoder
from toolkit.models.inspect import best_device, torch_dtype
from toolkit.models.load import load_policy, load_reward_model, reads_pairs
from toolkit.models.resolve import ModelRef, resolve
from toolkit.models.reward_head import CENTRING_PROMPTS, RewardHead, SampleLaw
from toolkit.models.sharding import shards
from toolkit.models.tokenizer import load_tokenizer, reads_the_same
from toolkit.preferences.fresh import write_fresh_rewards
from toolkit.preferences.rows import PreferenceRow
from toolkit.preferences.solutions import solutions_from_parquet
from toolkit.preferences.tables import from_parquet
from toolkit.progress import Reporter
from toolkit.recipe.rounds import kind_of, round_of
from toolkit.stages.contexts import RewardModelContext
from toolkit.training.batch import Example
from toolkit.training.labelled import read_labelled
from toolkit.training.reward_model import Member, MemberTraining, members_to_train, steps_to_train
from toolkit.training.trainer import seed_everything


def run(context: RewardModelContext, inputs: dict[str, Path], out: Path, reporter: Reporter) -> dict[str, Any]:
    """Writes ``model/``: a sequence classifier (an adapter on its base, or all weights), or the folders of an ensemble.

    ``reward_head.json`` in it says how its outputs become one score, with a mean of 0 over samples of SFT. In a further
    round the reward model of ``previous`` is trained further, on the data and on the comparisons of all ``labels@N`` so
    far.
    """
    section = context.reward_model
    sft = resolve(str(inputs["sft"] / "model"))
    base = sft if section.base is None else resolve(section.base)
    tokenizer = load_tokenizer(base)
    rows = from_parquet(inputs["data"] / "train.parquet")
    encoder = text_encoder(tokenizer, rows[0].prompt, base.spec, pair=reads_pairs(base))
    limit = context.data.max_response_tokens
    previous = inputs["previous"] / "model" if "previous" in inputs else None
    new = labelled_so_far(inputs, encoder)
    if previous is not None:
        write_fresh(load_scorer(resolve(str(previous)), context.model, tokenizer), new[-1], out)
    if section.kind == "process":
        solutions = solutions_from_parquet(inputs["data"] / "train_steps.parquet")
        members, head = steps_to_train(section, solutions, encoder, limit, context.seed)
    else:
        further = [example for of_round in new for example in of_round]
        members, head = members_to_train(section, rows, encoder, limit, context.seed, further)
    training = MemberTraining(section, context.model, base, tokenizer, out, reporter, previous)
    took = []
    for member in members:
        seed_everything(member.seed)
        took.append(training.train(member, len(members)))
    head = replace(one_model(section.combine, members, head, training), conversational=encoder.conversational)
    if head.members:
        tokenizer.save_pretrained(out / "model")
        head.write(out / "model")  # what makes it an ensemble, before it is centred

    law = SampleLaw(temperature=1.0, max_new_tokens=limit)
    if section.center or head.n_outputs > 1:
        model = loaded(took, head, training)
        with distributed.shared_batches():
            outputs = model.outputs(samples_of_sft(model, sft, encoder, rows[:CENTRING_PROMPTS], context, law))
        head = head.centred_on([of_response for of_tree in outputs for of_response in of_tree], law)
    if not section.center:
        head = replace(head, mean=0.0, samples=None)
    if distributed.main_process():
        head.write(out / "model")
    first = took[0]
    return {
        "tokens": sum(each["tokens"] for each in took),
        "prompts_seen": max(each["prompts_seen"] for each in took),
        "response_tokens_trained": sum(each["response_tokens_trained"] for each in took),
        "history": first["history"],
        "mean": head.mean,
        "steps": first["steps"],
        **({"members": [each["history"] for each in took]} if len(took) > 1 else {}),
    }


def labelled_so_far(inputs: Mapping[str, Path], encoder: TextEncoder) -> list[list[Example]]:
    """The labelled comparisons of the arm's samples, of each round so far."""
    rounds = sorted((role for role in inputs if kind_of(role) == "labels"), key=round_of)
    return [read_labelled(inputs[role], "rm_ppo", encoder) for role in rounds]


def write_fresh(model: RewardModel, examples: Sequence[Example], out: Path) -> None:
    """Write what the reward model of the round before gives to the newest samples."""
    with distributed.shared_batches():
        scores = model.scores([example.tree for example in examples])
    if distributed.main_process():
        write_fresh_rewards(scores, out)


def one_model(combine: str, members: Sequence[Member], head: RewardHead, training: MemberTraining) -> RewardHead:
    """The head after ``average_weights`` has made one model of the members, which is done again after a kill."""
    if combine != "average_weights":
        return head
    if distributed.main_process():
        average_members([training.folder(member) for member in members], training.out / "model", training.model)
    distributed.barrier()
    return RewardHead()


def loaded(took: Sequence[dict[str, Any]], head: RewardHead, training: MemberTraining) -> RewardModel:
    """The reward model that was trained: a single one is in memory, unless it is sharded; others are loaded."""
    if len(took) == 1:
        pad_id, dtype = int(training.tokenizer.pad_token_id), torch_dtype(training.model.dtype)
        ends = step_ends_of(head, training.tokenizer)
        model = took[0]["model"]
        if shards():
            model = load_reward_model(resolve(str(training.out / "model")), training.model).to(best_device())
        return RewardModel([Engine(model, pad_id, dtype=dtype)], head, step_ends=ends)
    return load_scorer(resolve(str(training.out / "model")), training.model, training.tokenizer)


def samples_of_sft(
    model: RewardModel,
    sft: ModelRef,
    encoder: TextEncoder,
    rows: Sequence[PreferenceRow],
    context: RewardModelContext,
    law: SampleLaw,
) -> list[Tree]:
    """A sample of SFT for the prompt of each row, in the tokens of the reward model."""
    tokenizer = load_tokenizer(sft)
    of_sft = text_encoder(tokenizer, rows[0].prompt, sft.spec)
    prompts = [of_sft.prompt(row.prompt) for row in rows]
    samples = sample_responses(
        load_policy(sft, context.model).to(model.engines[0].device),
        tokenizer,
        prompts,
        lambda i, _: (context.seed, "centring", rows[i].prompt_id),
        SamplingParams(law.max_new_tokens, law.temperature),
        dtype=torch_dtype(context.model.dtype),
    )
    if encoder.pair is None and reads_the_same(encoder.tokenizer, tokenizer):
        return [Tree(ids, [sample.ids]) for ids, [sample] in zip(prompts, samples, strict=True)]
    return [
        model.read(encoder, row.prompt, [of_sft.decode(sample.ids)], [sample.truncated])
        for row, [sample] in zip(rows, samples, strict=True)
    ]
