"""Prompt and response apart, one BOS, an EOS that belongs to the response, and templates that close their turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from toolkit.errors import ModelError
from toolkit.models.encoding import TextEncoder, is_conversation, text_encoder
from toolkit.models.resolve import ModelRef, resolve
from toolkit.models.tokenizer import load_tokenizer, response_end

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it good?"}]
WORDS = ["<s>", "</s>", "<pad>", "<turn>", "<sep>", "is", "it", "good", "bad", "yes", "user", "assistant", "?"]


def words(*, template: str | None = None, eos: bool = True, closes: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words that opens every text with a BOS, and closes it with an EOS if asked to."""
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    core.pre_tokenizer = Whitespace()
    single = "<s> $A </s>" if closes else "<s> $A"
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    special = {"bos_token": "<s>", "pad_token": "<pad>", "extra_special_tokens": ["<turn>"]}
    if eos:
        special["eos_token"] = "</s>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.chat_template = template
    return tokenizer


TURNS = "{{ bos_token }}{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' <turn> ' }}{% endfor %}"
TURNS += "{% if add_generation_prompt %}assistant{% endif %}"


def test_prompt_and_response_are_tokenised_apart(tokenizer: Any) -> None:
    """Text that would melt into one token across the border stays on its side."""
    prompt, response = "I like the fil", "m very much"
    encoded = text_encoder(tokenizer, prompt).encode(prompt, [response], 50)
    assert encoded.tree.prompt_ids == tokenizer(prompt)["input_ids"]
    assert encoded.tree.response_ids == [[*tokenizer(response)["input_ids"], 2]]
    assert encoded.tree.prompt_ids + encoded.tree.response_ids[0][:-1] != tokenizer(prompt + response)["input_ids"]
    assert encoded.truncated == [False]


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_text_comes_back(text: str) -> None:
    encoder = TextEncoder(load_tokenizer(resolve("tiny")), conversational=False)
    [ids], [truncated] = encoder.responses([text], max_tokens=1000)
    assert ids[-1] == 2 and not truncated
    assert encoder.decode(ids) == text


def test_an_example_for_people_has_whole_characters() -> None:
    encoder = TextEncoder(load_tokenizer(resolve("tiny")), conversational=False)
    prompt, response = "I\u2019ll see \u00e9t\u00e9", "\u4f60\u597d \U0001f600"
    shown = encoder.rendered(encoder.encode(prompt, [response], 50))
    assert "".join(token["text"] for token in shown if not token["response"]) == prompt
    assert "".join(token["text"] for token in shown if token["response"]).startswith(response)
    assert [token["id"] for token in shown][:2] == encoder.prompt(prompt)[:2] and "" in [t["text"] for t in shown]


def test_the_end_belongs_to_the_response_and_truncation_has_none(tokenizer: Any) -> None:
    texts = [" one two three four", " one", ""]
    bare = tokenizer(texts)["input_ids"]
    limit = len(bare[0])
    encoder = text_encoder(tokenizer, "")
    ids, truncated = encoder.responses(texts, max_tokens=limit + 1)
    assert ids == [[*b, 2] for b in bare] and truncated == [False, False, False]
    # One token less: the text still fits, its end does not.
    ids, truncated = encoder.responses(texts, max_tokens=limit)
    assert ids == [bare[0], [*bare[1], 2], [2]] and truncated == [True, False, False]
    ids, truncated = encoder.responses(texts, max_tokens=limit - 1)
    assert ids[0] == bare[0][:-1] and truncated == [True, False, False]


def test_a_sample_that_was_cut_gets_no_end(tokenizer: Any) -> None:
    encoder = text_encoder(tokenizer, "The film")
    [ids] = tokenizer([" is good."])["input_ids"]
    tree = encoder.encode_samples("The film", [" is good.", " is good.", ""], [True, False, True])
    assert tree.prompt_ids == encoder.prompt("The film")
    assert tree.response_ids == [ids, [*ids, 2], [2]]  # nothing would be left of an empty response without its end


def test_the_bos_stands_once_at_the_head_of_the_prompt() -> None:
    tokenizer = words(template=TURNS)
    encoded = text_encoder(tokenizer, "is it").encode("is it", ["good", "bad yes"], 9)
    assert encoded.tree.prompt_ids == [0, 5, 6]
    assert encoded.tree.response_ids == [[7, 1], [8, 9, 1]]
    messages = [{"role": "user", "content": "is it good"}]
    chat = text_encoder(tokenizer, messages).prompt(messages)
    assert chat == [0, 10, 5, 6, 7, 3, 11]
    assert chat.count(tokenizer.bos_token_id) == 1


def test_a_tokenizer_that_closes_texts_does_not_close_a_prompt() -> None:
    tokenizer = words(closes=True)
    assert tokenizer("is it")["input_ids"] == [0, 5, 6, 1]
    encoder = text_encoder(tokenizer, "is it")
    assert encoder.prompt("is it") == [0, 5, 6]
    assert encoder.responses(["good"], max_tokens=9) == ([[7, 1]], [False])


def test_a_trained_tokenizer_with_a_bos(stories_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories_folder)
    encoder = text_encoder(tokenizer, "Once upon a time")
    ids = encoder.prompt("Once upon a time")
    assert ids == tokenizer("Once upon a time")["input_ids"]
    assert ids.count(tokenizer.bos_token_id or -1) <= 1 and ids[-1] != tokenizer.eos_token_id
    [response], _ = encoder.responses(["there was a cat"], max_tokens=99)
    assert tokenizer.bos_token_id not in response and response[-1] == 2


def test_messages_end_with_the_opening_of_the_assistants_turn(tokenizer: Any) -> None:
    text = tokenizer.decode(text_encoder(tokenizer, CHAT).prompt(CHAT))
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nIs it good?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert is_conversation(CHAT) and not is_conversation("Is it good?")


def test_what_ends_a_response(tokenizer: Any) -> None:
    assert response_end(tokenizer, conversational=True) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert response_end(tokenizer, conversational=False) == tokenizer.eos_token_id
    turns = words(template=TURNS)
    assert response_end(turns, conversational=True) == 3  # <turn>, which is not the EOS
    assert response_end(turns, conversational=False) == 1
    # A template that puts plain text, or nothing, behind a turn: the EOS it is.
    for behind in ("' user '", "''"):
        tokenizer = words(template="{% for m in messages %}{{ m['content'] + " + behind + " }}{% endfor %}")
        assert response_end(tokenizer, conversational=True) == 1


def test_a_tokenizer_without_an_end_is_refused() -> None:
    with pytest.raises(ModelError, match="end of text") as caught:
        response_end(words(eos=False), conversational=False)
    assert "eos_token" in caught.value.fix
    assert response_end(words(eos=False, template=TURNS), conversational=True) == 3


def test_conversations_need_a_chat_template(tiny_ref: Any, tmp_path: Path) -> None:
    bare = words()
    with pytest.raises(ModelError, match="no chat template") as caught:
        text_encoder(bare, CHAT, "some/model")
    assert "some/model" in caught.value.what and caught.value.where and "model.chat_template" in caught.value.fix
    template = tmp_path / "turns.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}!", encoding="utf-8")
    tokenizer = load_tokenizer(tiny_ref, str(template))
    assert tokenizer.decode(text_encoder(tokenizer, CHAT).prompt(CHAT)) == "Be brief.Is it good?!"
    with pytest.raises(ModelError, match="chat template") as caught:
        load_tokenizer(tiny_ref, str(tmp_path / "absent.jinja"))
    assert "absent.jinja" in caught.value.where and caught.value.fix


@pytest.mark.parametrize(
    ("pad", "eos", "expected"),
    [("<pad>", "</s>", "<pad>"), ("</s>", "</s>", "<pad>"), (None, "</s>", "<pad>")],
)
def test_padding_is_not_the_end_where_that_can_be_helped(
    tmp_path: Path, pad: str | None, eos: str, expected: str
) -> None:
    tokenizer = words()
    tokenizer.pad_token, tokenizer.eos_token = pad, eos
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    loaded = load_tokenizer(ModelRef("x", str(tmp_path), "folder", ""))
    assert (loaded.pad_token, loaded.eos_token) == (expected, eos)


def test_decoding_leaves_the_end_out(tokenizer: Any) -> None:
    encoder = text_encoder(tokenizer, "")
    [ids], _ = encoder.responses([" it is good."], max_tokens=50)
    assert encoder.decode(ids) == " it is good."


def test_what_people_see_marks_the_response(tokenizer: Any) -> None:
    encoder = text_encoder(tokenizer, "The film")
    encoded = encoder.encode("The film", [" is good.", " is bad."], 50)
    shown = encoder.rendered(encoded)
    assert "".join(t["text"] for t in shown if not t["response"]) == "The film"
    assert "".join(t["text"] for t in shown if t["response"]) == " is good.<|im_end|>"
    assert [t["id"] for t in shown] == encoded.tree.prompt_ids + encoded.tree.response_ids[0]


STORY_RESPONSES = [" there was", "\nThere was", "  two", "", "\u00e9t\u00e9", " \U0001f642 x", "a\n\nb"]


def test_a_response_continues_the_prompt_with_a_tokenizer_that_puts_a_blank_before_texts(stories_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories_folder)
    encoder = text_encoder(tokenizer, "Once upon a time")
    prompt = encoder.prompt("Once upon a time")
    ids, _ = encoder.responses(STORY_RESPONSES, max_tokens=99)
    together = tokenizer(["Once upon a time" + text for text in STORY_RESPONSES])["input_ids"]
    assert [prompt + response[:-1] for response in ids] == together
    assert tokenizer.convert_ids_to_tokens(ids[0]) == ["\u2581there", "\u2581was", "</s>"]
    assert tokenizer.convert_ids_to_tokens(ids[1])[0] == "<0x0A>"
    # What was sampled comes back as text with its blank, and as the same ids.
    assert [encoder.decode(response) for response in ids] == STORY_RESPONSES
    texts = [tokenizer.decode(prompt + response, skip_special_tokens=True) for response in ids]
    assert texts == ["Once upon a time" + text for text in STORY_RESPONSES]


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_text_comes_back_from_such_a_tokenizer(stories_folder: Path, text: str) -> None:
    encoder = TextEncoder(AutoTokenizer.from_pretrained(stories_folder), conversational=False)
    [ids], _ = encoder.responses([text.replace("\u2581", "").replace("<", "")], max_tokens=1000)
    assert encoder.decode(ids) == text.replace("\u2581", "").replace("<", "")


LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def test_a_template_that_writes_the_blank_before_an_answer(stories_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories_folder)
    tokenizer.chat_template = LLAMA_2
    question = [{"role": "user", "content": "Is it good?"}]
    encoder = text_encoder(tokenizer, question)
    encoded = encoder.encode(question, ["There was"], 99)
    both = tokenizer("<s>[INST] Is it good? [/INST] There was", add_special_tokens=False)["input_ids"]
    assert encoded.tree.prompt_ids + encoded.tree.response_ids[0][:-1] == both
    assert encoder.decode(encoded.tree.response_ids[0]) == "There was"


def test_rendered_text_has_one_bos_and_one_eos(stories_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories_folder)
    encoder = text_encoder(tokenizer, "")
    assert encoder.prompt("<s>[user] Hi</s>[assistant] ").count(1) == 1
    for text in ("[user] Tell a story [assistant] ", "Once", ""):
        ids = encoder.prompt(f"<s>{text}")
        assert ids == encoder.prompt(text) and ids[0] == 1 and ids.count(1) == 1
    texts = [" a cat", "", " </s> closes a text"]
    ended = [" a cat</s>", "</s>\n", " </s> closes a text</s>"]
    assert encoder.responses(texts, 99) == encoder.responses(ended, 99)
    # A tokenizer that adds no BOS keeps the one that is written, and a template's second one goes.
    closing = words(template="{{ bos_token + ' ' }}" + TURNS)
    assert text_encoder(closing, "").prompt("<s> is it") == [0, 5, 6]
    messages = [{"role": "user", "content": "is it good"}]
    assert text_encoder(closing, messages).prompt(messages) == [0, 10, 5, 6, 7, 3, 11]


def test_rendered_text_ends_as_a_message_does_where_that_is_not_the_eos() -> None:
    """Gemma and Phi-3 are examples. The end of the template became letters, with an EOS behind them."""
    template = TURNS.replace("' <turn> '", "'<turn>'").replace("assistant{%", "assistant {%")
    core = words()
    core.add_special_tokens({"extra_special_tokens": ["<turn>", "<start_of_turn>"]})
    core.chat_template = template.replace("m['role']", "'<start_of_turn>' + m['role']").replace(
        "assistant {%", "<start_of_turn>assistant {%"
    )
    messages = [{"role": "user", "content": "is it"}]
    chat = text_encoder(core, messages)
    rendered = core.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    text = text_encoder(core, rendered)
    turn = core.convert_tokens_to_ids("<turn>")
    assert text.prompt(rendered) == chat.prompt(messages) and chat.end_id == turn != core.eos_token_id
    for ended in ("good", "good<turn>", "good<turn>\n", "good<turn></s>", "good</s>"):
        assert text.responses([ended], 99) == chat.responses(["good"], 99), ended
        assert text.counted_responses([ended], 99).lengths == [2]
    # Other text ends with the EOS, behind a BOS too, and no end becomes letters.
    for prompt in ("is it", "<s>is it"):
        assert text_encoder(core, prompt).responses(["good<turn>"], 99)[0] == [[7, 1]]


def test_chatml_without_a_bos_of_the_tokenizer_stays(tokenizer: Any) -> None:
    rendered = "<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n"
    encoder = text_encoder(tokenizer, rendered)
    assert encoder.prompt(rendered) == tokenizer(rendered)["input_ids"]
    [ids], _ = encoder.responses(["Yes.<|im_end|>\n"], 99)
    assert ids == tokenizer("Yes.<|im_end|>")["input_ids"]


CHATML = "<|im_start|>user\nIs it good?<|im_end|>"


@pytest.mark.parametrize("name", ["tiny", "stories", "words that close"])
def test_many_prompts_and_responses_are_read_as_each_of_them_alone(
    name: str, tiny_ref: Any, stories_folder: Path
) -> None:
    folders = {"tiny": tiny_ref.path, "stories": str(stories_folder)}
    tokenizer = AutoTokenizer.from_pretrained(folders[name]) if name in folders else words(closes=True)
    texts = ["Is it good?", CHATML, "<s>yes", "yes</s>", "", "good <s> bad", "\U0001f600 yes"]
    encoder = text_encoder(tokenizer, texts[0])
    assert encoder.prompts(texts, encoder.written(texts)) == [encoder.prompt(text) for text in texts]
    for asked in (texts, ["Is it good?", "", "good"]):
        assert encoder.prompt_lengths(asked, asked) == [len(encoder.prompt(text)) for text in asked]
    together, cut = encoder.responses(texts, 4)
    alone = [encoder.responses([text], 4) for text in texts]
    assert (together, cut) == ([ids[0] for ids, _ in alone], [was_cut[0] for _, was_cut in alone])


@pytest.mark.parametrize("name", ["tiny", "stories", "words that close"])
@pytest.mark.parametrize("limit", [1, 2, 3, 99])
def test_counted_responses_are_those_that_are_read(name: str, limit: int, tiny_ref: Any, stories_folder: Path) -> None:
    folders = {"tiny": tiny_ref.path, "stories": str(stories_folder)}
    tokenizer = AutoTokenizer.from_pretrained(folders[name]) if name in folders else words(closes=True)
    encoder = text_encoder(tokenizer, "Is it good?")
    for texts in (["Is it good?", "Is it", "good", "Is it good?", "", "It is"], ["good</s>", "good", "<s>good"]):
        ids, cut = encoder.responses(texts, limit)
        counted = encoder.counted_responses(texts, limit)
        assert counted.lengths == list(map(len, ids)) and counted.n_cut == sum(cut)
        places = range(len(texts))
        assert [[counted.equal(i, j) for i in places] for j in places] == [[a == b for a in ids] for b in ids]


def test_many_conversations_are_read_as_each_of_them_alone(tokenizer: Any) -> None:
    texts = ["Is it good?", CHATML, "", "good"]
    conversations = [[{"role": "user", "content": text}] for text in texts] + [CHAT]
    encoder = text_encoder(tokenizer, CHAT)
    written = encoder.written(conversations)
    assert encoder.prompts(conversations, written) == [encoder.prompt(messages) for messages in conversations]
    assert [text[-60:] for text in written] == [encoder.end_of_prompt(messages) for messages in conversations]
    tokenizer = words(template=TURNS)
    encoder = text_encoder(tokenizer, CHAT)
    assert encoder.prompts([CHAT, "is"], encoder.written([CHAT, "is"])) == [encoder.prompt(CHAT), encoder.prompt("is")]
