"""What a chat template makes of messages, and the marks by which text shows that a template has rendered it already."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from toolkit.errors import DataError, ModelError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What code of a template can raise beside its own refusals: it is run on messages that it was not written for. What
# jinja2 accepts may be no Python ({% break %} outside a loop), and a text may be larger than the memory.
TEMPLATE_ERRORS = (
    *(TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError),
    *(SyntaxError, MemoryError),
)
# Marks of turns that no text holds by chance.
_TURN = re.compile(
    r"<\|im_start\|>\s*(?:system|user|assistant)|<\|start_header_id\|>|<start_of_turn>(?:user|model)|\[/?INST\]|"
    r"<<SYS>>|<\|(?:user|assistant|system)\|>|<\uff5c(?:User|Assistant)\uff5c>|<\|START_OF_TURN_TOKEN\|>"
)
# Ends and beginnings of texts. Other tokenizers' "<s>" is none: HTML has it.
_ENDS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>", "<|end|>", "<|eom_id|>")
_BEGINNINGS = ("<|begin_of_text|>", "<|startoftext|>", "<bos>", "<\uff5cbegin\u2581of\u2581sentence\uff5c>")
_THINK = re.compile(r"(?:<(?:think|thinking|thought|reasoning|reflection)>|\[THINK\])\s*\Z")
_SENTENCE_END = "</s>"
_SURROGATE = re.compile("[\ud800-\udfff]")
_MARK = "duel-marks-this-text"
LAST_CHARACTERS = 60  # of a prompt: more than any template writes to open a block of thoughts
# A template takes milliseconds, and writes little beside the messages. One with a loop in a loop does not end.
MOST_SECONDS, MOST_ADDED = 20.0, 1_000_000


class TemplateRefusesError(ModelError):
    """A chat template that raises on a conversation. Whoever knows the row of the ``messages`` adds its place."""

    def __init__(self, messages: Sequence[Mapping[str, Any]], words: str) -> None:
        self.messages = list(messages)
        beginning = str(self.messages[0].get("content", ""))[:60] if self.messages else ""
        super().__init__(
            f"the chat template refuses this conversation: {words}",
            where=f"the conversation that begins with {beginning!r}",
            fix="mend the conversation or leave its row out, or set model.chat_template to another template",
        )


@contextmanager
def refusals_at(where: str) -> Iterator[None]:
    """Inside it, a template that refuses a conversation is a DataError at this place."""
    try:
        yield
    except TemplateRefusesError as error:
        raise DataError(error.what, where=where, fix=error.fix) from error


def rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], *, opening: bool = True) -> str:
    """The messages as the template writes them; ``opening``: with that of the assistant's turn.

    Raises TemplateRefusesError, with the template's own words, where it raises.
    """
    turns = [dict(message) for message in messages]
    try:
        return _applied(tokenizer, turns, opening=opening)
    except TEMPLATE_ERRORS as error:
        raise TemplateRefusesError(turns, first_line(error)) from error


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> str:
    """The messages as the template writes them, with the opening of the assistant's turn."""
    return _applied(tokenizer, list(messages), opening=True)


def rendered_prompts(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Mapping[str, Any]]]
) -> list[str]:
    """What :func:`rendered` gives for each of these conversations. They are rendered together, which takes less time.

    Raises TemplateRefusesError for the first one on which the template raises.
    """
    turns = [[dict(message) for message in messages] for messages in conversations]
    if all(turns):  # transformers refuses a conversation without messages only where it stands alone
        try:
            with time_limit(MOST_SECONDS):
                texts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            return [_checked(str(text), messages) for text, messages in zip(texts, turns, strict=True)]
        except (ModelError, *TEMPLATE_ERRORS):
            pass  # one by one below, which says whose fault it is
    return [rendered(tokenizer, messages) for messages in conversations]


def _applied(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], *, opening: bool) -> str:
    """Raises one of TEMPLATE_ERRORS, also where the template does not end or writes what no tokenizer reads."""
    with time_limit(MOST_SECONDS):
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opening))
    return _checked(text, messages)


def _checked(text: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """What a template wrote. Raises ValueError for far too much, and for what no tokenizer reads."""
    if len(text) > MOST_ADDED:
        most = MOST_ADDED + 10 * sum(len(str(message)) for message in messages)
        if len(text) > most:
            raise ValueError(f"it writes {len(text):,} characters, more than {most:,} for these messages")
    if not text.isascii() and (half := _SURROGATE.search(text)) is not None:
        raise ValueError(f"it writes half of a surrogate pair, U+{ord(half[0]):04X}")
    return text


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises ModelError inside it after this time. Only a main thread can be interrupted: others go on."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def end(number: int, frame: object) -> None:
        raise ModelError(
            f"the chat template did not end within {seconds:g} s on one conversation",
            where="the model's chat template",
            fix="set model.chat_template to another template",
        )

    before = signal.signal(signal.SIGALRM, end)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left, interval)  # a caller's own limit goes on


def answers_after_blank(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template writes a blank between the opening of the assistant's turn and the answer.

    False where the template raises: its errors belong to the rows that it is asked for.
    """
    question = {"role": "user", "content": "?"}
    try:
        opening = render_prompt(tokenizer, [question])
        answered = _applied(tokenizer, [question, {"role": "assistant", "content": _MARK}], opening=False)
    except TEMPLATE_ERRORS:
        return False
    return answered.startswith(f"{opening} {_MARK}")


def ends_in_thoughts(before: str) -> bool:
    """Whether a text ends with the opening of a block of thoughts."""
    # The last character tells of most texts that they do not, in less time than the pattern.
    return (
        before[-LAST_CHARACTERS:].rstrip().endswith((">", "]")) and _THINK.search(before[-LAST_CHARACTERS:]) is not None
    )


def open_think_block(before: str, responses: Sequence[str]) -> str | None:
    """The tag of a block of thoughts that is open where the responses begin, if one of them does not close it.

    ``before`` is the end of the text before them.

    >>> open_think_block("assistant\\n<think>\\n", ["Yes."]), open_think_block("<think>", ["It is.</think>Yes."])
    ('<think>', None)
    """
    match = _THINK.search(before)
    if match is None:
        return None
    opening = match[0].strip()
    closing = f"{opening[0]}/{opening[1:]}"
    unfinished = any(closing not in text or text.lstrip().startswith(opening) for text in responses)
    return opening if unfinished else None


@dataclass(frozen=True)
class Markers:
    """By what a text shows that it was rendered for this tokenizer, or for another of the known ones."""

    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def bos(self) -> str | None:
        token = self.tokenizer.bos_token
        return str(token) if token else None

    @cached_property
    def ends(self) -> tuple[str, ...]:
        """The texts of this tokenizer that end a response: the EOS, and what its template puts behind an answer."""
        eos = self.tokenizer.eos_token
        return tuple(dict.fromkeys(str(end) for end in (eos, self._template_end) if end))

    @cached_property
    def turns(self) -> tuple[str, ...]:
        """What this tokenizer's template writes before a user's text and before an answer, if that is telling."""
        try:
            text = render_prompt(self.tokenizer, [{"role": "user", "content": _MARK}])
        except TEMPLATE_ERRORS:
            return ()
        before, _, behind = text.partition(_MARK)
        before = before.removeprefix(self.bos or "").strip()
        user = before.splitlines()[-1].strip() if before else ""
        answer = behind.strip().splitlines()[-1].strip() if behind.strip() else ""
        return tuple(mark for mark in (before, user, answer) if len(mark) > 2)

    @cached_property
    def after_answer(self) -> str | None:
        """What the template writes behind an assistant's turn; None without a template, or where it raises."""
        if self.tokenizer.chat_template is None:
            return None
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
        try:
            return _applied(self.tokenizer, turns, opening=False).rpartition(_MARK)[2]
        except TEMPLATE_ERRORS:
            return None

    @property
    def template_ends_answers(self) -> bool:
        """Whether the template puts a special token behind an assistant's turn. True where that cannot be said."""
        return self.after_answer is None or self._template_end is not None

    @cached_property
    def _template_end(self) -> str | None:
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        ids = self.tokenizer(self.after_answer or "", add_special_tokens=False)["input_ids"]
        end = next((int(i) for i in ids if int(i) in special), None)
        return None if end is None else str(self.tokenizer.convert_ids_to_tokens(end))

    def is_own_end(self, end: str) -> bool:
        return end in self.ends

    def end_of(self, response: str) -> str | None:
        """The text of an end of text that a response ends with."""
        text = response.rstrip()
        end = next((end for end in (*self.ends, *_ENDS) if text.endswith(end)), None)
        # HTML's struck text is closed by the same letters.
        return _SENTENCE_END if end is None and text.endswith(_SENTENCE_END) and "<s>" not in text else end

    def turn_in(self, text: str) -> str | None:
        """The first mark of a turn in a text."""
        if "<" not in text and "[" not in text:
            return None
        match = _TURN.search(text)
        return match[0] if match is not None else None

    def opening_of(self, prompt: str) -> str | None:
        """What shows that a prompt was rendered: BOS or a template's turn at its start, or a mark of a turn in it."""
        text = prompt.lstrip()
        for start in (self.bos, *_BEGINNINGS):
            if start and text.startswith(start):
                return start
        turn = next((mark for mark in self.turns[:1] if text.startswith(mark)), None)
        return turn or self.turn_in(prompt)
