"""What judges are shown: the responses of several policies to the same prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from toolkit.preferences.rows import Prompt


@dataclass(frozen=True)
class PolicyResponses:
    """Responses of policies to the same prompts: ``texts[policy][p]`` are a policy's samples for prompt p."""

    prompt_ids: Sequence[str]
    prompts: Sequence[Prompt]
    texts: Mapping[str, Sequence[Sequence[str]]]

    def paired(self, policy: str, baseline: str) -> Iterator[tuple[str, Prompt, str, str]]:
        """(prompt id, prompt, the policy's k-th sample, the baseline's k-th sample) for each prompt and k.

        Where one of the two has more samples for a prompt, its further ones are left out.
        """
        of_prompt = zip(self.prompt_ids, self.prompts, self.texts[policy], self.texts[baseline], strict=True)
        for prompt_id, prompt, policy_texts, baseline_texts in of_prompt:
            for policy_text, baseline_text in zip(policy_texts, baseline_texts, strict=False):
                yield prompt_id, prompt, policy_text, baseline_text
