"""Prompts from any data, and samples of any policy for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from toolkit.errors import DataError
from toolkit.measure.options import PromptSelection
from toolkit.measure.responses import Answered
from toolkit.models.prompt_kind import trained_on_messages
from toolkit.models.rendering import TemplateRefusesError
from toolkit.models.resolve import ModelRef, resolve
from toolkit.preferences.prompts import UnlabelledPrompt
from toolkit.preferences.prompts import read_prompts as prompts_of_any_source
from toolkit.preferences.rows import Prompt, prompt_id
from toolkit.preferences.samples import Sample
from toolkit.progress import Reporter
from toolkit.recipe.training import ModelSection

if TYPE_CHECKING:
    from toolkit.engine.sampling import SamplingParams

# What :func:`sample` knows of a response.
SAMPLE_COLUMNS = ("prompt_id", "policy", "sample_index", "response", "response_ids", "n_tokens", "truncated")


def read_prompts(selection: PromptSelection, policies: Sequence[ModelRef]) -> list[tuple[str, Prompt]]:
    """(prompt id, prompt) of any source of prompts (:func:`toolkit.preferences.prompts.read_prompts`), as the policies
    read them (:func:`_as_messages`).

    Raises DataError where there is no prompt, or a row that is none.
    """
    return [(prompt_id(item.prompt), item.prompt) for item in _selected(selection, policies)]


def _selected(selection: PromptSelection, policies: Sequence[ModelRef]) -> list[UnlabelledPrompt]:
    return prompts_of_any_source(
        selection.data,
        split=selection.split,
        limit=selection.limit,
        seed=selection.seed,
        conversational=_as_messages(policies),
    )


def _as_messages(policies: Sequence[ModelRef]) -> bool | None:
    """True where texts become messages: a policy was trained on messages, and none on text. None: prompts stay."""
    known = {trained_on_messages(ref) for ref in policies}
    return True if True in known and False not in known else None


@contextmanager
def refusals_in(selection: PromptSelection, policies: Sequence[ModelRef]) -> Iterator[None]:
    """Inside it, a chat template that refuses one of these prompts is a DataError that names its row."""
    try:
        yield
    except TemplateRefusesError as error:
        conversational = _as_messages(policies)
        items = prompts_of_any_source(selection.data, split=selection.split, conversational=conversational)
        place = next((item.where for item in items if item.prompt == error.messages), "")
        raise DataError(error.what, where=place or f"{selection.data}: {error.where}", fix=error.fix) from error


@dataclass(frozen=True)
class PolicySampler:
    """A policy by its name, with the settings of its model and of its sampling."""

    policy: str
    model: ModelSection
    params: SamplingParams

    @cached_property
    def ref(self) -> ModelRef:
        """Raises ModelError where there is no such policy."""
        return resolve(self.policy)


def sample(
    sampler: PolicySampler, prompts: Sequence[tuple[str, Prompt]], *, seed: int, purpose: str, reporter: Reporter
) -> list[list[Sample]]:
    """The policy's responses to each prompt, with ``SAMPLE_COLUMNS``.

    A response is a function of seed, purpose, prompt and its number.
    """
    # Without a policy to sample nothing of this is needed, and torch takes long to import.
    from toolkit.engine.sampling import sample_responses
    from toolkit.models.encoding import text_encoder
    from toolkit.models.inspect import best_device, torch_dtype
    from toolkit.models.load import load_policy
    from toolkit.models.tokenizer import check_vocabulary, load_tokenizer

    ref = sampler.ref
    tokenizer = load_tokenizer(ref)
    encoder = text_encoder(tokenizer, prompts[0][1], ref.spec)
    model: Any = load_policy(ref, sampler.model)
    model.to(best_device())
    check_vocabulary(model.get_input_embeddings().weight.shape[0], tokenizer, ref.spec)
    encoded = [encoder.prompt(prompt) for _, prompt in prompts]
    with reporter.task(f"sample {ref.spec}", len(prompts) * sampler.params.n) as task:
        responses = sample_responses(
            model,
            tokenizer,
            encoded,
            lambda i, k: (seed, purpose, prompts[i][0], k),
            sampler.params,
            dtype=torch_dtype(sampler.model.dtype),
            advance=task.advance,
        )
    return [
        [
            Sample(
                prompt_id=key,
                policy=sampler.policy,
                sample_index=k,
                response=encoder.decode(response.ids),
                response_ids=response.ids,
                n_tokens=len(response.ids),
                truncated=response.truncated,
            )
            for k, response in enumerate(of_prompt)
        ]
        for (key, _), of_prompt in zip(prompts, responses, strict=True)
    ]


def sampled_responses(
    sampler: PolicySampler, selection: PromptSelection, *, purpose: str, reporter: Reporter
) -> list[Answered]:
    """The prompts of the data, in the groups that they have there, with what the policy responds (:func:`sample`).

    Raises what reading the prompts and sampling raise.
    """
    asked = _selected(selection, [sampler.ref])
    prompts = [(prompt_id(item.prompt), item.prompt) for item in asked]
    with refusals_in(selection, [sampler.ref]):
        samples = sample(sampler, prompts, seed=selection.seed, purpose=purpose, reporter=reporter)
    return [
        Answered(item.prompt, [s.response for s in of_prompt], group=item.group)
        for item, of_prompt in zip(asked, samples, strict=True)
    ]
