"""What judges are shown: the responses of several policies to the same prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.preferences.rows import PreferenceRow, Prompt
from toolkit.preferences.samples import Sample, by_prompt

Scores = list[list[float]]  # for each prompt, one score for each of its responses


@dataclass(frozen=True)
class SampledIds:
    """Of the responses to one prompt: the ids that were sampled, where they are known, and which have no end."""

    ids: Sequence[Sequence[int]] | None
    truncated: Sequence[bool]


@dataclass(frozen=True)
class PolicyResponses:
    """Responses of policies to the same prompts: ``texts[policy][p]`` are a policy's samples for prompt p, if any.

    ``ids`` and ``truncated``, of the same shape, are the sampled token ids and whether a response ran into the length
    limit. Without ``truncated`` every response is taken as one that ended.
    """

    prompt_ids: Sequence[str]
    prompts: Sequence[Prompt]
    texts: Mapping[str, Sequence[Sequence[str]]]
    ids: Mapping[str, Sequence[Sequence[Sequence[int]]]] | None = None
    truncated: Mapping[str, Sequence[Sequence[bool]]] | None = None

    def prompt_samples(self, p: int) -> SampledIds | None:
        """What is known of all policies' responses to prompt p, in the policies' order, besides their texts."""
        if self.truncated is None:
            return None
        truncated = [cut for name in self.texts for cut in self.truncated[name][p]]
        ids = None if self.ids is None else [of_response for name in self.texts for of_response in self.ids[name][p]]
        return SampledIds(ids, truncated)

    def paired(self, policy: str, baseline: str) -> Iterator[tuple[str, Prompt, str, str]]:
        """(prompt id, prompt, the policy's k-th sample, the baseline's k-th sample) for each prompt and k.

        Where one of the two has more samples for a prompt, its further ones are left out.
        """
        of_prompt = zip(self.prompt_ids, self.prompts, self.texts[policy], self.texts[baseline], strict=True)
        for prompt_id, prompt, policy_texts, baseline_texts in of_prompt:
            for policy_text, baseline_text in zip(policy_texts, baseline_texts, strict=False):
                yield prompt_id, prompt, policy_text, baseline_text


def of_samples(policies: Mapping[str, Sequence[Sample]], rows: Sequence[PreferenceRow]) -> PolicyResponses:
    """Policies' samples for these rows as judges are shown them."""
    prompt_ids = [row.prompt_id for row in rows]
    return PolicyResponses(
        prompt_ids,
        [row.prompt for row in rows],
        sample_column(policies, prompt_ids, "response"),
        ids=sample_column(policies, prompt_ids, "response_ids"),
        truncated=sample_column(policies, prompt_ids, "truncated"),
    )


def sample_column(
    policies: Mapping[str, Sequence[Sample]], prompt_ids: Sequence[str], name: str
) -> dict[str, list[list[Any]]]:
    """A field of each policy's samples, by policy, prompt and sample; none for a prompt that it was not sampled on."""
    groups = {policy: by_prompt(samples) for policy, samples in policies.items()}
    return {
        policy: [[getattr(s, name) for s in group.get(key, ())] for key in prompt_ids]
        for policy, group in groups.items()
    }
