"""Checks of what the model's tokenizer and chat template make of the rows. Nothing here needs a forward pass.

Only what decides is tokenised: the head of a prompt, a window around the border to the response, and texts with more
bytes than the limit has tokens, since no token is less than a byte.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from toolkit.evals.two_sides import uneven
from toolkit.evals.words import counted
from toolkit.measure.check.findings import Collector, excerpt
from toolkit.measure.check.stored import CheckedRow, CheckedRows
from toolkit.models.batches import ids_of_texts
from toolkit.models.encoding import TextEncoder
from toolkit.models.rendering import TEMPLATE_ERRORS, Markers, open_think_block, render_prompt

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


Rendered = list[tuple[CheckedRow, str]]
"""Rows with the text of their prompt, as the model reads it."""


class TokenChecks:
    """The rows of one kind (text, or messages) with what the tokenizer makes of them, some rows at once."""

    def __init__(
        self, tokenizer: Any, conversational: bool, limits: Limits, markers: Markers, collector: Collector
    ) -> None:
        self.tokenizer, self.limits = tokenizer, limits
        self.markers, self.collector = markers, collector
        self.encoder = TextEncoder(tokenizer, conversational)
        self.n_long, self.n_looked_at, self.n_longer = 0, 0, 0  # prompts that may be too long
        # Of each pair with a winner: the place of its row, and which sides are cut (1: chosen, 2: rejected).
        self.pair_places, self.cut_sides = array("q"), bytearray()

    def take(self, rows: Sequence[CheckedRow]) -> None:
        """Check these rows, which come after the ones before."""
        rendered = self._render(rows)
        self._think(rendered)
        self._bos(rendered)
        self._eos(rows)
        self._boundary(rendered)
        self._long_prompts(rendered)
        self._cut(rows)

    # ------------------------------------------------------------------------------------------------ template
    def _render(self, rows: Sequence[CheckedRow]) -> Rendered:
        rendered: Rendered = []
        for row in rows:
            if isinstance(row.prompt, str):
                rendered.append((row, row.prompt))
                continue
            try:
                text = render_prompt(self.tokenizer, row.prompt)
            except TEMPLATE_ERRORS as error:
                words = (str(error).strip() or type(error).__name__).splitlines()[0]
                self.collector.refuse("template_raises", row.number, f"the template says: {words[:200]}")
                continue
            rendered.append((row, text))
            for message in row.prompt:
                if not self._is_rendered(row.prompt, message, text):
                    kind = "system_dropped" if message["role"] == "system" else "unseen_parts"
                    detail = f"the template leaves out {message['role']!r}: {excerpt(message['content'])}"
                    self.collector.add(kind, row.number, detail)
        return rendered

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

    def _think(self, rendered: Rendered) -> None:
        for row, text in rendered:
            if (opening := open_think_block(text[-HEAD:], row.responses)) is not None:
                detail = f"{opening} stands before the response {excerpt(row.responses[0])}: {excerpt(text, end=True)}"
                self.collector.add("think_block_open", row.number, detail)

    # ------------------------------------------------------------------------------------------------ BOS and EOS
    @cached_property
    def _adds_bos(self) -> bool:
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos]

    def _bos(self, rendered: Rendered) -> None:
        bos = self.tokenizer.bos_token_id
        if bos is None:
            return
        ids = self._ids([text[:HEAD] for _, text in rendered], special=not self.encoder.conversational)
        for row, text in rendered:
            head = text[:HEAD]
            first = ids[head][:2]
            if first == [bos, bos]:
                self.collector.add("bos_twice", row.number, f"two {self.markers.bos} open {excerpt(head)}")
            elif first[:1] != [bos] and self.encoder.conversational and self._adds_bos:
                self.collector.add("bos_missing", row.number, f"no {self.markers.bos} opens {excerpt(head)}")

    def _eos(self, rows: Sequence[CheckedRow]) -> None:
        if not self.encoder.conversational:
            if self.tokenizer.eos_token_id is None:
                self._all(rows, "eos_missing", "the tokenizer names no end of text (eos_token)")
        elif not self.markers.template_ends_answers:
            after = self.markers.after_answer or ""
            detail = f"the template writes {excerpt(after)} behind an assistant's turn, and no special token"
            self._all(rows, "eos_missing", detail)

    def _all(self, rows: Sequence[CheckedRow], kind: str, detail: str) -> None:
        for row in rows:
            self.collector.add(kind, row.number, detail)

    # ------------------------------------------------------------------------------------------------ the border
    def _boundary(self, rendered: Rendered) -> None:
        borders = dict.fromkeys(
            (text[-WINDOW:], response[:WINDOW]) for row, text in rendered for response in row.responses
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
        for row, text in rendered:
            for response in row.responses:
                border = text[-WINDOW:], response[:WINDOW]
                if border in differ:
                    self.collector.add("boundary", row.number, partial(self._border, border, *differ[border]))
                    break

    def _border(self, border: tuple[str, str], ids_apart: list[int], ids_together: list[int]) -> str:
        apart, joined = (self._tokens_at(ids, *border) for ids in (ids_apart, ids_together))
        return f"{apart} apart, {joined} together, at {excerpt(border[0][-15:])} + {excerpt(border[1][:15])}"

    def _tokens_at(self, ids: list[int], tail: str, head: str) -> str:
        """The tokens around the first one that the two ways do not share, as the vocabulary writes them."""
        apart = self._ids([tail])[tail]
        start = max(0, len(apart) - 2)
        return " ".join(map(str, self.tokenizer.convert_ids_to_tokens(ids[start : start + 4])))

    # ------------------------------------------------------------------------------------------------ limits
    def _long_prompts(self, rendered: Rendered) -> None:
        longer = [text for _, text in rendered if _n_bytes(text) + UNSURE > self.limits.max_prompt_tokens]
        self.n_longer += len(longer)
        looked_at = longer[: MOST_LONG_PROMPTS - self.n_looked_at]
        ids = self._ids(looked_at, special=not self.encoder.conversational)
        self.n_looked_at += len(looked_at)
        self.n_long += sum(len(ids[text]) > self.limits.max_prompt_tokens for text in looked_at)

    def long_prompts(self) -> str:
        """How many prompts have more tokens than the limit, which a run leaves out, in words; "" for none.

        Of very many prompts that may be longer it is the share in the first of them.
        """
        if not self.n_long:
            return ""
        if self.n_looked_at < self.n_longer:
            return f"about {counted(round(self.n_long / self.n_looked_at * self.n_longer), 'row')}"
        return counted(self.n_long, "row")

    def _cut(self, rows: Sequence[CheckedRow]) -> None:
        limit = self.limits.max_response_tokens
        ids = self._ids([text for row in rows for text in row.responses if _n_bytes(text) + UNSURE > limit])
        cut = {text: len(of_text) for text, of_text in ids.items() if len(of_text) + 1 > limit}
        first_ids = {text: ids[text][:limit] for text in cut}
        for row in rows:
            lengths = [cut[text] for text in row.responses if text in cut]
            if lengths:
                detail = (
                    f"{len(lengths)} of {len(row.responses)} responses, the longest has {max(lengths):,} tokens of "
                    f"{limit:,}"
                )
                self.collector.add("cut", row.number, detail)
            for chosen, rejected in winners(row):
                self.pair_places.append(row.place)
                self.cut_sides.append((chosen in cut) + 2 * (rejected in cut))
            self._identical_when_cut(row, first_ids)

    def cut_unevenly(self, rows: CheckedRows) -> None:
        """``cut_unevenly`` of the rows that were taken, which are among ``rows``."""
        places, sides = np.frombuffer(self.pair_places, np.int64), np.frombuffer(self.cut_sides, np.uint8)
        chosen, rejected = (sides & 1) > 0, (sides & 2) > 0
        result = uneven(rows.keys[places], chosen, rejected)
        if result is None:
            return
        first, second = counted(result.n_first_more, "prompt"), counted(result.n_second_more, "prompt")
        self.collector.add_all(
            "cut_unevenly",
            rows.numbers[places[(chosen != rejected) & (chosen == result.first_more)]].tolist(),
            f"{result.first_rate:.1%} of the chosen and {result.second_rate:.1%} of the rejected responses are cut at "
            f"{self.limits.max_response_tokens} tokens: the chosen more often in {first}, "
            f"the rejected in {second} (exact test, p = {result.p_value:.2g}); "
            f"training learns {'not to end' if result.first_more else 'that what ends is better'}",
        )

    def _identical_when_cut(self, row: CheckedRow, cut_ids: dict[str, list[int]]) -> None:
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


def winners(row: CheckedRow) -> list[tuple[str, str]]:
    """Of every pair on which the annotators prefer one response in the mean, the preferred one and the other."""
    return [
        (row.responses[pair.i], row.responses[pair.j])
        if pair.p > 0.5
        else (row.responses[pair.j], row.responses[pair.i])
        for pair in row.pairs
        if pair.p != 0.5
    ]


def _n_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _alike(text: str) -> str:
    return "".join(text.split()).casefold() if len(text) < 4096 else text
