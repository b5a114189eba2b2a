"""What a judge needs to know beside its name."""

from __future__ import annotations

from dataclasses import dataclass, field

from toolkit.recipe.schema import JudgeSettings
from toolkit.recipe.training import ModelSection


@dataclass(frozen=True)
class JudgeOptions:
    """``model`` loads the models that judge in this process, ``settings`` are those of language models.

    Models that score read at most ``max_response_tokens`` of a response, and ``token_budget`` tokens at once. The
    default of ``max_response_tokens`` is far above any recorded response, so that none is cut.
    """

    model: ModelSection
    settings: JudgeSettings = field(default_factory=JudgeSettings)
    max_response_tokens: int = 4096
    token_budget: int | None = None
