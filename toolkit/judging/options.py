"""What a judge needs to know beside its name."""

from __future__ import annotations

from dataclasses import dataclass, field

from toolkit.recipe.schema import JudgeSettings, ModelSection


@dataclass(frozen=True)
class JudgeOptions:
    """How models are loaded that judge in this process, how language models are asked, how much is read at once.

    The default of ``max_response_tokens`` is far above any recorded response, so that none is cut.
    """

    model: ModelSection
    settings: JudgeSettings = field(default_factory=JudgeSettings)
    max_response_tokens: int = 4096
    token_budget: int | None = None
