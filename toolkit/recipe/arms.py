"""What the two arms differ in, what matters most first: a verdict compares all of it at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from toolkit.recipe.schema import Recipe
from toolkit.recipe.training import Arm, DpoSection, PpoSection

# An arm counts these in its own unit (PPO: responses of a rollout, DPO: prompts of the data), or they only log or keep.
OWN_UNITS = {
    "kl_milestones",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "logging_steps",
}
# Losses whose beta weighs the KL as PPO's kl_coef does: the labels are read as Bradley-Terry, on sums over tokens.
BRADLEY_TERRY_LOSSES = ("sigmoid", "robust")
# Two measured quantities are called equal where they are within this share of the larger one.
EQUAL_WITHIN = 0.1

Pair = tuple[float | None, float | None]
"""A quantity of RM + PPO and of DPO; None where it is not known."""


@dataclass(frozen=True)
class ArmDifference:
    """One quantity or setting of both arms. ``name`` is a key, ``label`` says it in words, ``note`` why it matters."""

    name: str
    label: str
    ppo: Any
    dpo: Any
    differs: bool
    note: str = ""

    @property
    def sentence(self) -> str:
        """
        >>> ArmDifference("adam_epsilon", "adam_epsilon", 1e-5, 1e-8, True).sentence
        'the arms differ in adam_epsilon: RM + PPO 1e-05, DPO 1e-08'
        """
        verb = "differ in" if self.differs else "are equal in"
        note = f" ({self.note})" if self.note else ""
        return f"the arms {verb} {self.label}: RM + PPO {shown(self.ppo)}, DPO {shown(self.dpo)}{note}"

    def as_dict(self) -> dict[str, Any]:
        """JSON types; with the two values as text and the sentence."""
        texts = {"ppo_text": shown(self.ppo), "dpo_text": shown(self.dpo), "sentence": self.sentence}
        return {**asdict(self), **texts}


@dataclass(frozen=True)
class Measured:
    """What is known of the arms beside their settings.

    ``kl_nats`` is the KL to SFT on the held-out prompts, in nats per response. ``prompts_seen`` counts different
    prompts that the policy was trained on. ``response_tokens_trained`` counts a response token once for each pass over
    it.
    """

    kl_nats: Pair = (None, None)
    prompts_seen: Pair = (None, None)
    response_tokens_trained: Pair = (None, None)


NOTHING_MEASURED = Measured()


def shown(value: object) -> str:
    """A value as a reader takes it.

    >>> shown(None), shown(1e-5), shown(12.9123), shown(34358), shown(True)
    ('none', '1e-05', '12.91', '34,358', 'true')
    """
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def arm_differences(
    ppo: PpoSection, dpo: DpoSection, max_response_tokens: int, measured: Measured = NOTHING_MEASURED
) -> list[ArmDifference]:
    """What the arms differ in, in order of weight.

    First come the KL that was paid, its weight, the prompts, the tokens and the tuning: where they are known they are
    in the list even if they are equal. Then come PPO's help against unfinished text, and the shared settings that
    differ.
    """
    first = [*_measured(measured), _kl_weight(ppo, dpo), *_online(dpo)]
    return [*first, *_effort(measured), *_help(ppo, max_response_tokens)] + [
        ArmDifference(name, name, getattr(ppo, name), getattr(dpo, name), True)
        for name in Arm.model_fields
        if name not in OWN_UNITS and getattr(ppo, name) != getattr(dpo, name)
    ]


def planned_differences(recipe: Recipe, measured: Measured = NOTHING_MEASURED) -> list[ArmDifference]:
    """:func:`arm_differences` of a recipe."""
    differences = arm_differences(recipe.ppo, recipe.dpo, recipe.data.max_response_tokens, measured)
    if recipe.reward_model.kind == "process":
        differences.insert(0, labels_difference(str(recipe.reward_model.steps), recipe.data.source))
    return differences


def labels_difference(steps: int | str, comparisons: int | str) -> ArmDifference:
    """What the arms learn from where the reward model reads labelled steps: how many, or the names of the data."""
    label = "the labels that they learn from (reward_model.kind: process)"
    note = "a label of every step says more than a comparison of two responses"
    of_ppo, of_dpo = f"steps: {shown(steps)}", f"comparisons: {shown(comparisons)}"
    return ArmDifference("labels", label, of_ppo, of_dpo, True, note)


def trained_differences(
    records: Mapping[str, Mapping[str, Any]], kl_nats: Mapping[str, float | None], max_response_tokens: int
) -> list[ArmDifference]:
    """:func:`arm_differences` of trained arms.

    ``records`` are those of the stages ppo and dpo (``stage.json``), ``kl_nats`` the policies' distances from SFT.
    """

    def settings(stage: str) -> dict[str, Any]:
        nested: dict[str, Any] = {}
        for name, value in records[stage]["fields"].items():
            if name.startswith(f"{stage}."):
                _, *above, last = name.split(".")
                target = nested
                for key in above:
                    target = target.setdefault(key, {})
                target[last] = value
        return nested

    def metric(name: str) -> Pair:
        return records["ppo"]["metrics"][name], records["dpo"]["metrics"][name]

    kl = kl_nats["rm_ppo"], kl_nats["dpo"]
    measured = Measured(kl, metric("prompts_seen"), metric("response_tokens_trained"))
    ppo, dpo = PpoSection(**settings("ppo")), DpoSection(**settings("dpo"))
    return arm_differences(ppo, dpo, max_response_tokens, measured)


def _measured(measured: Measured) -> Iterator[ArmDifference]:
    if None not in measured.kl_nats:
        a, b = measured.kl_nats
        note = "the arm that moved further from SFT paid more for its reward"
        label = "the KL that they reached (nats per response, held-out prompts)"
        yield ArmDifference("kl_nats", label, a, b, _differ(measured.kl_nats), note)


def _kl_weight(ppo: PpoSection, dpo: DpoSection) -> ArmDifference:
    if dpo.loss_type not in BRADLEY_TERRY_LOSSES:
        note = f"the loss {dpo.loss_type} has another scale than the reward model, so the two do not compare"
    elif ppo.whiten_rewards:
        note = "whiten_rewards changes the reward model's scale, so the two do not compare"
    else:
        note = "one parameter where labels are Bradley-Terry: both arms aim at pi_ref exp(reward / beta)"
    note += "; adaptive_kl changes kl_coef along training" if ppo.adaptive_kl else ""
    comparable = dpo.loss_type in BRADLEY_TERRY_LOSSES and not ppo.whiten_rewards and not ppo.adaptive_kl
    label = "the weight of the KL (ppo.kl_coef, dpo.beta)"
    return ArmDifference("kl_coef, beta", label, ppo.kl_coef, dpo.beta, not comparable or ppo.kl_coef != dpo.beta, note)


def _online(dpo: DpoSection) -> Iterator[ArmDifference]:
    if dpo.online is not None:
        label = "what they learn from samples of the policy (dpo.online)"
        of_dpo = f"comparisons of their scores by {dpo.online.labels}"
        note = "DPO trains on the policy's samples, not on the responses of the data"
        yield ArmDifference("online", label, "the reward of each", of_dpo, True, note)


def _effort(measured: Measured) -> Iterator[ArmDifference]:
    if None not in measured.prompts_seen:
        a, b = measured.prompts_seen
        yield ArmDifference("prompts_seen", "the prompts that their policies were trained on", a, b, a != b)
    if None not in measured.response_tokens_trained:
        a, b = measured.response_tokens_trained
        differs = _differ(measured.response_tokens_trained)
        note = "a token counts once for each pass over it"
        yield ArmDifference("response_tokens_trained", "the response tokens trained on", a, b, differs, note)
    note = "a single run tries one setting of each arm"
    yield ArmDifference("tuning_trials", "the settings that were tried", 1, 1, False, note)


def _help(ppo: PpoSection, max_response_tokens: int) -> Iterator[ArmDifference]:
    """What PPO learns from beside the comparisons, and what keeps it from unfinished and long text; the data and the
    loss of DPO have nothing like it."""
    note = "DPO has no counterpart"
    if ppo.reward == "length":
        label = "what they learn from (ppo.reward)"
        yield ArmDifference("reward", label, ppo.reward, "the comparisons", True, "a control: PPO reads no comparison")
    if ppo.prompts is not None:
        label = "further prompts without labels (ppo.prompts)"
        yield ArmDifference("prompts", label, ppo.prompts, None, True, note)
    if ppo.ptx_coef:
        label = "other text in the loss (ppo.ptx_coef, ppo.ptx_texts)"
        texts = f"{ppo.ptx_coef:g} x the likelihood of {ppo.ptx_texts or 'what SFT imitates'}"
        yield ArmDifference("ptx_coef", label, texts, None, True, note)
    if ppo.reference_decay is not None:
        label = "a reference that follows the policy (ppo.reference_decay)"
        yield ArmDifference("reference_decay", label, ppo.reference_decay, None, True, note)
    if ppo.missing_eos_penalty is not None:
        label = "the score of an unfinished response (ppo.missing_eos_penalty)"
        yield ArmDifference("missing_eos_penalty", label, ppo.missing_eos_penalty, None, True, note)
    if ppo.response_length not in (None, max_response_tokens):
        label = "the longest response in training (ppo.response_length, data.max_response_tokens)"
        yield ArmDifference("response_length", label, ppo.response_length, max_response_tokens, True, note)


def _differ(pair: Pair) -> bool:
    a, b = (value or 0.0 for value in pair)
    return abs(a - b) > EQUAL_WITHIN * max(abs(a), abs(b))
