"""Models with their adapters merged into their weights."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn

from toolkit.engine.fast.adapters import adapted_layers, lora_layers, merge_into_low_precision
from toolkit.errors import ModelError


def merged(model: Any) -> Any:
    """The model with its adapter in its weights; a model without one as it is.

    An unembedding and an embedding that share their weights become two where the adapter changes one of them: peft
    would change the other one with it. Raises ModelError where peft cannot merge a layer.
    """
    if not isinstance(model, PeftModel):
        return model
    base: Any = model.get_base_model()
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    adapted = lora_layers(base)
    if (head in adapted or embedding in adapted) and head is not None and head.weight is embedding.weight:
        bare: Any = head.get_base_layer() if head in adapted else head
        bare.weight = nn.Parameter(bare.weight.detach().clone(), requires_grad=False)
    merge_into_low_precision(base)
    whole: Any = model.merge_and_unload()
    # peft says nothing of layers that it leaves as they are.
    if unmerged := adapted_layers(whole):
        raise ModelError(
            f"peft cannot merge the adapter of {unmerged[0]!r} into its weights",
            where=model.name_or_path or type(whole).__name__,
            fix="an adapter of one kind on each layer: no trainable_token_indices beside a LoRA of a tied lm_head",
        )
    head = whole.get_output_embeddings()
    if head is not None and head.weight is not whole.get_input_embeddings().weight:
        whole.config.tie_word_embeddings = False  # else loading would tie them again; peft 0.18 leaves it
    return whole
