"""Whether a model was trained on prompts of chat messages or of text, as duel records it beside the weights."""

from __future__ import annotations

from toolkit.models.resolve import ModelRef, training_record
from toolkit.models.reward_head import reward_head


def trained_on_messages(ref: ModelRef) -> bool | None:
    """True for a reward model, or the policy of an arm, that duel trained on messages, False for one on text.

    None where nothing says so: other models, those of the hub, and those that earlier versions trained.
    """
    if ref.kind == "hub":
        return None
    head = reward_head(ref.path)
    if head.process is not None:
        return head.process.conversational
    known = head.conversational if head.conversational is not None else training_record(ref).get("conversational")
    return None if known is None else bool(known)
