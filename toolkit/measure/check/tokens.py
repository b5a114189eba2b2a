"""Checks of what the model's tokenizer and chat template make of the rows. Nothing here needs a forward pass.

Only what decides is tokenised: the head of a prompt, a window around the border to the response, and texts with more
bytes than the limit has tokens, since no token is less than a byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from toolkit.evals.two_sides import uneven
from toolkit.evals.words import counted
from toolkit.measure.check.findings import Collector, excerpt
from toolkit.measure.check.rows import CheckedRow
from toolkit.models.batches import ids_of_texts
from toolkit.models.encoding import TextEncoder
from toolkit.models.rendering import TEMPLATE_ERRORS, Markers, open_think_block, render_prompt
from toolkit.preferences.views import chunks

AT_ONCE = 4096  # rows whose tokens are in memory
WINDOW = 40  # characters on each side of the border: longer than any word that could cross it
HEAD = 60  # characters of a prompt that hold every BOS
MOST_LONG_PROMPTS = 1000  # that are tokenised in full
CHANGE = "and so on"  # what a template does not look for in a turn
UNSURE = 3  # tokens that a tokenizer may add to a text: a blank in front, BOS, EOS


@dataclass(frozen=True)
class Limits:
    """The longest prompt and response in tokens, as ``data`` of a recipe has them."""

    max_prompt_tokens: int = 512
    max_response_tokens: int = 256


@dataclass(frozen=True)
class Winner:
    """A compared pair with a winner, as places among the responses of one row."""

    row: int
    chosen: int
    rejected: int


class TokenChecks:
    """The rows of one kind (text, or messages) with what the tokenizer makes of them."""

    def __init__(
        self, tokenizer: Any, rows: Sequence[CheckedRow], limits: Limits, markers: Markers, collector: Collector
    ) -> None:
        self.tokenizer, self.rows, self.limits = tokenizer, rows, limits
        self.markers, self.collector = markers, collector
        self.encoder = TextEncoder(tokenizer, rows[0].conversational)
        self.rendered: dict[int, str] = {}  # the text of each row's prompt, by the row's place

    def run(self) -> None:
        self._render()
        self._think()
        self._bos()
        self._eos()
        self._boundary()

    # ------------------------------------------------------------------------------------------------ template
    def _render(self) -> None:
        for place, row in enumerate(self.rows):
            if isinstance(row.prompt, str):
                self.rendered[place] = row.prompt
                continue
            try:
                text = render_prompt(self.tokenizer, row.prompt)
            except TEMPLATE_ERRORS as error:
                words = (str(error).strip() or type(error).__name__).splitlines()[0]
                self.collector.refuse("template_raises", row.number, f"the template says: {words[:200]}")
                continue
            self.rendered[place] = text
            for message in row.prompt:
                if not self._is_rendered(row.prompt, message, text):
                    kind = "system_dropped" if message["role"] == "system" else "unseen_parts"
                    detail = f"the template leaves out {message['role']!r}: {excerpt(message['content'])}"
                    self.collector.add(kind, row.number, detail)

    def _is_rendered(self, prompt: list[dict[str, str]], message: dict[str, str], text: str) -> bool:
        content = message["content"].strip()
        if message["role"] == "assistant":  # templates of reasoning models drop the thoughts of earlier turns
            content = content.rpartition("</think>")[2].strip()
        if content in text and not (
            message["role"] == "system" and content and any(content in m["content"] for m in prompt if m is not message)
        ):
            return True
        # The template may write it in other letters, or another message holds the same words: a change of it tells.
        others = [{**m, "content": f"{m['content']} {CHANGE}"} if m is message else m for m in prompt]
        try:
            return render_prompt(self.tokenizer, others) != text
        except TEMPLATE_ERRORS:
            return True

    def _think(self) -> None:
        for place, text in self.rendered.items():
            row = self.rows[place]
            if (opening := open_think_block(text[-HEAD:], row.responses)) is not None:
                detail = f"{opening} stands before the response {excerpt(row.responses[0])}: {excerpt(text, end=True)}"
                self.collector.add("think_block_open", row.number, detail)

    # ------------------------------------------------------------------------------------------------ BOS and EOS
    @cached_property
    def _adds_bos(self) -> bool:
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos]

    def _bos(self) -> None:
        bos = self.tokenizer.bos_token_id
        if bos is None:
            return
        for rendered in chunks(self.rendered.items(), AT_ONCE):
            heads = {place: text[:HEAD] for place, text in rendered}
            ids = self._ids(heads.values(), special=not self.encoder.conversational)
            for place, head in heads.items():
                row, first = self.rows[place], ids[head][:2]
                if first == [bos, bos]:
                    self.collector.add("bos_twice", row.number, f"two {self.markers.bos} open {excerpt(head)}")
                elif first[:1] != [bos] and self.encoder.conversational and self._adds_bos:
                    self.collector.add("bos_missing", row.number, f"no {self.markers.bos} opens {excerpt(head)}")

    def _eos(self) -> None:
        if not self.encoder.conversational:
            if self.tokenizer.eos_token_id is None:
                self._all("eos_missing", "the tokenizer names no end of text (eos_token)")
        elif not self.markers.template_ends_answers:
            after = self.markers.after_answer or ""
            detail = f"the template writes {excerpt(after)} behind an assistant's turn, and no special token"
            self._all("eos_missing", detail)

    def _all(self, kind: str, detail: str) -> None:
        for row in self.rows:
            self.collector.add(kind, row.number, detail)

    # ------------------------------------------------------------------------------------------------ the border
    def _boundary(self) -> None:
        for rendered in chunks(self.rendered.items(), AT_ONCE):
            self._boundary_of(rendered)

    def _boundary_of(self, rendered: Sequence[tuple[int, str]]) -> None:
        borders = dict.fromkeys(
            (text[-WINDOW:], response[:WINDOW]) for place, text in rendered for response in self.rows[place].responses
        )
        tails = self._ids({tail for tail, _ in borders})
        heads = dict.fromkeys(head for _, head in borders)
        response_ids = dict(zip(heads, self.encoder.continuations(list(heads)), strict=True))
        lead = self.encoder.lead
        together = self._ids({tail + lead + head for tail, head in borders})
        differ = {
            (tail, head): (tails[tail] + response_ids[head], together[tail + lead + head])
            for tail, head in borders
            if tails[tail] + response_ids[head] != together[tail + lead + head]
        }
        if not differ:
            return
        for place, text in rendered:
            for response in self.rows[place].responses:
                border = text[-WINDOW:], response[:WINDOW]
                if border in differ:
                    apart, joined = (self._tokens_at(ids, *border) for ids in differ[border])
                    detail = (
                        f"{apart} apart, {joined} together, at {excerpt(border[0][-15:])} + {excerpt(border[1][:15])}"
                    )
                    self.collector.add("boundary", self.rows[place].number, detail)
                    break

    def _tokens_at(self, ids: list[int], tail: str, head: str) -> str:
        """The tokens around the first one that the two ways do not share, as the vocabulary writes them."""
        apart = self._ids([tail])[tail]
        start = max(0, len(apart) - 2)
        return " ".join(map(str, self.tokenizer.convert_ids_to_tokens(ids[start : start + 4])))

    # ------------------------------------------------------------------------------------------------ limits
    def long_prompts(self) -> str:
        """How many prompts have more tokens than the limit, which a run leaves out, in words; "" for none.

        Of very many prompts that may be longer it is the share in the first of them.
        """
        limit = self.limits.max_prompt_tokens
        longer = [text for text in self.rendered.values() if _n_bytes(text) + UNSURE > limit]
        looked_at = longer[:MOST_LONG_PROMPTS]
        ids = self._ids(set(looked_at), special=not self.encoder.conversational)
        n = sum(len(ids[text]) > limit for text in looked_at)
        if len(looked_at) < len(longer):
            return f"about {counted(round(n / len(looked_at) * len(longer)), 'row')}" if n else ""
        return counted(n, "row") if n else ""

    def check_cut(self) -> None:
        """``cut``, ``cut_unevenly`` and ``identical_when_cut``."""
        limit = self.limits.max_response_tokens
        longer = {t for row in self.rows for t in row.responses if _n_bytes(t) + UNSURE > limit}
        ids = self._ids(longer)
        cut = {text for text in longer if len(ids[text]) + 1 > limit}
        for row in self.rows:
            n_cut = sum(text in cut for text in row.responses)
            if n_cut:
                longest = max(len(ids[text]) for text in row.responses if text in cut)
                detail = f"{n_cut} of {len(row.responses)} responses, the longest has {longest:,} tokens of {limit:,}"
                self.collector.add("cut", row.number, detail)
        pairs = winners(self.rows)
        self._cut_unevenly(pairs, cut)
        self._identical_when_cut({text: ids[text][:limit] for text in cut})

    def _cut_unevenly(self, pairs: Sequence[Winner], cut: set[str]) -> None:
        sides = [(self._text(pair, pair.chosen) in cut, self._text(pair, pair.rejected) in cut) for pair in pairs]
        result = uneven([self.rows[pair.row].key for pair in pairs], sides)
        if result is None:
            return
        rows = [
            self.rows[pair.row].number
            for pair, (chosen, rejected) in zip(pairs, sides, strict=True)
            if chosen != rejected and chosen == result.first_more
        ]
        first, second = counted(result.n_first_more, "prompt"), counted(result.n_second_more, "prompt")
        self.collector.add_all(
            "cut_unevenly",
            rows,
            f"{result.first_rate:.1%} of the chosen and {result.second_rate:.1%} of the rejected responses are cut at "
            f"{self.limits.max_response_tokens} tokens: the chosen more often in {first}, "
            f"the rejected in {second} (exact test, p = {result.p_value:.2g}); "
            f"training learns {'not to end' if result.first_more else 'that what ends is better'}",
        )

    def _text(self, pair: Winner, response: int) -> str:
        return self.rows[pair.row].responses[response]

    def _identical_when_cut(self, cut_ids: dict[str, list[int]]) -> None:
        for row in self.rows:
            for pair in row.pairs:
                first, second = row.responses[pair.i], row.responses[pair.j]
                if first == second:
                    detail = f"both responses are the text {excerpt(first)}"
                elif first in cut_ids and cut_ids[first] == cut_ids.get(second):
                    detail = f"both responses are cut to {excerpt(first)}"
                elif _alike(first) == _alike(second) and self._same_ids(first, second):
                    detail = f"the tokenizer reads {excerpt(first)} and {excerpt(second)} as the same tokens"
                else:
                    continue
                self.collector.add("identical_when_cut", row.number, detail)
                break

    def _same_ids(self, first: str, second: str) -> bool:
        limit = self.limits.max_response_tokens
        ids = self._ids({first, second})
        return ids[first][:limit] == ids[second][:limit]

    # ------------------------------------------------------------------------------------------------ tokens
    def _ids(self, texts: Any, *, special: bool = False) -> dict[str, list[int]]:
        """The ids of each distinct text."""
        distinct = list(dict.fromkeys(texts))
        return dict(zip(distinct, ids_of_texts(self.tokenizer, distinct, add_special_tokens=special), strict=True))


def winners(rows: Sequence[CheckedRow]) -> list[Winner]:
    """Every pair of a row on which its annotators prefer one response in the mean."""
    return [
        Winner(place, *((pair.i, pair.j) if pair.p > 0.5 else (pair.j, pair.i)))
        for place, row in enumerate(rows)
        for pair in row.pairs
        if pair.p != 0.5
    ]


def _n_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _alike(text: str) -> str:
    return "".join(text.split()).casefold() if len(text) < 4096 else text
