"""What ships with the project: the preference data ``reviews`` and the model ``tiny``."""

from __future__ import annotations

import re
import sys
from importlib import resources
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from toolkit.preferences.gold import gold_components
from toolkit.preferences.reading import read_preferences
from toolkit.preferences.simulate import ANNOTATORS, agreement, annotate
from toolkit.preferences.splits import split_rows

REPO = Path(__file__).resolve().parents[2]
TINY = Path(str(resources.files("toolkit") / "assets" / "tiny"))
CHAT = [
    {"role": "system", "content": "Answer in one sentence."},
    {"role": "user", "content": "Is the film good?"},
]


@pytest.fixture(scope="module")
def reviews():  # type: ignore[no-untyped-def]
    return read_preferences("reviews")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(TINY).eval()


# ------------------------------------------------------------------------------------------------------------ reviews
def test_reviews_reads_clean(reviews) -> None:  # type: ignore[no-untyped-def]
    report = reviews.report
    assert (report.n_prompts, report.n_responses, report.n_annotators) == (640, 3840, 3)
    assert report.n_empty == report.n_duplicates == report.n_identical == report.n_contradictions == 0
    assert not report.conversational


def test_reviews_are_short_openings_and_distinct_continuations(reviews) -> None:  # type: ignore[no-untyped-def]
    unfinished = 0
    for row in reviews.rows:
        assert 6 <= len(row.prompt.split()) <= 16 and not row.prompt.endswith((" ", "."))
        assert len(set(row.responses)) == 6
        for text in row.responses:
            assert re.match(r" [A-Za-z0-9\"'$]", text), text
            assert text.isascii() and "\n" not in text and text == text.rstrip()
            unfinished += text.rstrip("\"')")[-1] not in ".!?"
    assert 0 < unfinished / 3840 < 0.15


@pytest.mark.parametrize("seed", range(5))
def test_reviews_hold_out_whole_templates_and_enough_prompts(reviews, seed: int) -> None:  # type: ignore[no-untyped-def]
    train, held_out = split_rows(reviews.rows, 0.35, seed)
    assert len(held_out) >= 205 and len({row.group for row in reviews.rows}) == 37
    assert not {row.group for row in train} & {row.group for row in held_out}


def test_reviews_are_what_gold_and_annotators_say(reviews) -> None:  # type: ignore[no-untyped-def]
    for row in reviews.rows[::20]:
        assert row.gold == [round(gold_components(row.prompt, text).reward, 4) for text in row.responses]
        assert row.comparisons == annotate(row.prompt, row.responses, row.gold, ANNOTATORS, 0)
        pairs = {(min(c.winner, c.loser), max(c.winner, c.loser)) for c in row.comparisons}
        assert pairs == set(combinations(range(6), 2))


def test_annotators_agree_as_labelers_do(reviews) -> None:  # type: ignore[no-untyped-def]
    """InstructGPT's labelers agree on about 73% of pairs."""
    assert agreement(reviews.rows) == pytest.approx(0.73, abs=0.01)


def test_gold_separates_the_responses_of_a_prompt(reviews) -> None:  # type: ignore[no-untyped-def]
    spread = [max(row.gold) - min(row.gold) for row in reviews.rows]
    assert sum(s > 0.4 for s in spread) / len(spread) > 0.8
    golds = [g for row in reviews.rows for g in row.gold]
    assert -0.1 < sum(golds) / len(golds) < 0.1


def test_openings_come_again_from_their_seed(reviews, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.syspath_prepend(str(REPO / "scripts"))
    import build_openings

    monkeypatch.delitem(sys.modules, "build_openings")
    texts = build_openings.openings(704, 0)
    assert len(set(texts)) == 704 and texts == build_openings.openings(704, 0)
    assert all(texts[row.prompt] == row.group for row in reviews.rows)
    assert not set(build_openings.openings(300, 1, exclude=texts)) & set(texts)


# --------------------------------------------------------------------------------------------------------------- tiny
def test_tiny_is_small_and_whole() -> None:
    names = {path.name for path in TINY.iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    assert (TINY / "model.safetensors").stat().st_size < 8_000_000


def test_tiny_has_a_padding_token_that_is_not_its_end(model, tokenizer) -> None:  # type: ignore[no-untyped-def]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id and tokenizer.bos_token_id is None
    for config in (model.config, model.generation_config):
        assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert len(tokenizer) == model.config.vocab_size == 2048
    assert tokenizer.model_max_length == model.config.max_position_embeddings >= 1024
    assert (
        model.config.tie_word_embeddings
        and tokenizer("a")["input_ids"] == tokenizer("a", add_special_tokens=False)["input_ids"]
    )


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=100))
def test_any_text_comes_back_from_its_ids(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY) if not CACHE else CACHE[0]
    CACHE.append(tokenizer)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


CACHE: list[PreTrainedTokenizerFast] = []


def test_prompt_and_response_tokenised_apart_join_to_the_text(reviews, tokenizer) -> None:  # type: ignore[no-untyped-def]
    for row in reviews.rows[::16]:
        prompt = tokenizer(row.prompt)["input_ids"]
        for text in row.responses:
            ids = prompt + tokenizer(text)["input_ids"]
            assert tokenizer.decode(ids) == row.prompt + text
            assert ids == tokenizer(row.prompt + text)["input_ids"]  # responses start with a space


def test_the_chat_template_speaks_chatml_and_is_prefix_preserving(tokenizer) -> None:  # type: ignore[no-untyped-def]
    asked = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert asked == (
        "<|im_start|>system\nAnswer in one sentence.<|im_end|>\n"
        "<|im_start|>user\nIs the film good?<|im_end|>\n<|im_start|>assistant\n"
    )
    answered = tokenizer.apply_chat_template([*CHAT, {"role": "assistant", "content": "Yes."}], tokenize=False)
    assert answered == asked + "Yes.<|im_end|>\n"
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 2 and tokenizer.decode(ids) == asked


def test_tiny_predicts_the_reviews_and_ends_its_own(reviews, model, tokenizer) -> None:  # type: ignore[no-untyped-def]
    """Well below the 7.6 nats of a uniform guess, and most samples end with the EOS within 80 tokens."""
    losses = []
    with torch.inference_mode():
        for row in reviews.rows[:60]:
            prompt = tokenizer(row.prompt)["input_ids"]
            ids = torch.tensor([[*prompt, *tokenizer(row.responses[0])["input_ids"], tokenizer.eos_token_id]])
            logps = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            losses.append(-logps.gather(1, ids[0, len(prompt) :, None]).mean().item())
        assert sum(losses) / len(losses) < 4.5
        torch.manual_seed(0)
        prompts = [tokenizer(row.prompt)["input_ids"] for row in reviews.rows[:32]]
        width = max(map(len, prompts))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + p for p in prompts])
        mask = (torch.arange(width) >= torch.tensor([[width - len(p)] for p in prompts])).long()
        out = model.generate(ids, attention_mask=mask, max_new_tokens=80)[:, width:]
    assert (out == tokenizer.eos_token_id).any(1).float().mean() > 0.8
