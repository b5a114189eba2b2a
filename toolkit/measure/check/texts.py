"""Checks of texts alone: damaged encodings, and text that a chat template rendered already."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from toolkit.measure.check.findings import Collector, excerpt
from toolkit.measure.check.stored import CheckedRow, CheckedRows
from toolkit.models.rendering import Markers

# Bytes 0x80 to 0xBF as Latin-1 and as Windows-1252 show them: what follows a lead byte in misread UTF-8.
_TAIL = "[\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122]"
# Lead bytes of Latin letters, punctuation and emoji. Those of Cyrillic and Arabic are letters themselves, so that only
# two in a row count. Behind a capital letter Â and Ã are Portuguese ("IRMÃ").
_LEADS = "\u00c2\u00c3\u00e2\u00f0\u00d0\u00d1\u00d8\u00d9"
_MISREAD = re.compile(
    f"(?<![A-Z\u00c0-\u00dd])[\u00c2\u00c3]{_TAIL}|\u00e2{_TAIL}{{2}}|\u00f0{_TAIL}{{3}}|(?:[\u00d0\u00d1\u00d8\u00d9]{_TAIL}){{2,}}"
)
# Joiners (U+200C, U+200D) are part of emoji and of Persian and Indic words; direction marks belong to mixed scripts.
_ODD = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u202d\u202e\u2060\ufeff\ufffd\ud800-\udfff]")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_NAMES = {
    "\x00": "NUL",
    "\u200b": "zero-width space",
    "\u2060": "zero-width word joiner",
    "\ufeff": "byte order mark",
    "\ufffd": "replacement character (bytes that could not be read)",
    "\u202d": "direction override",
    "\u202e": "direction override",
}


def check_encoding(rows: Iterable[CheckedRow], collector: Collector) -> None:
    for row in rows:
        for text in row.texts:
            if (damage := damaged(text)) is not None:
                collector.add("encoding", row.number, damage)
                break


def damaged(text: str) -> str | None:
    """The first character that is damaged or cannot be seen, in words; None for a sound text.

    >>> damaged("cafÃ©"), damaged("naïve café 🙂")
    ("'Ã©' is 'é' read in another encoding: 'cafÃ©'", None)
    """
    match = (_CONTROL if text.isascii() else _ODD).search(text)
    if match is not None:
        return f"{_name(match[0])} in {_around(text, match)}"
    if text.isascii() or not any(lead in text for lead in _LEADS):
        return None
    for match in _MISREAD.finditer(text):
        if (meant := _as_utf8(match[0])) is not None:
            return f"{match[0]!r} is {meant!r} read in another encoding: {_around(text, match)}"
    return None


def _name(character: str) -> str:
    if character in _NAMES:
        return _NAMES[character]
    kind = "half of a surrogate pair" if "\ud800" <= character <= "\udfff" else "control character"
    return f"{kind} U+{ord(character):04X}"


def _around(text: str, match: re.Match[str]) -> str:
    return excerpt(text[max(0, match.start() - 20) : match.end() + 20])


def _as_utf8(text: str) -> str | None:
    """The text whose UTF-8 bytes were read as Windows-1252 or Latin-1; None where these are no bytes of a text."""
    raw = bytearray()
    for character in text:
        try:
            raw += character.encode("cp1252")
        except UnicodeEncodeError:
            if ord(character) > 0xFF:
                return None
            raw.append(ord(character))
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None


class RenderedTexts:
    """``prerendered``, and ``eos_twice`` and ``eos_missing`` where responses end with the text of EOS."""

    def __init__(self, markers: Markers, collector: Collector) -> None:
        self.markers, self.collector = markers, collector
        self.n_responses = self.n_ended = 0
        self.not_ended = array("q")  # places of rows with a response that has no such end

    def take(self, rows: Sequence[CheckedRow]) -> None:
        """Check these rows, which come after the ones before."""
        for row in rows:
            for detail in _rendered_details(row, self.markers):
                self.collector.add("prerendered", row.number, detail)
            ends = [self.markers.end_of(text) for text in row.responses]
            n_ended = sum(end is not None for end in ends)
            self.n_responses += len(ends)
            self.n_ended += n_ended
            if n_ended < len(ends):
                self.not_ended.append(row.place)
            if (end := next(filter(None, ends), None)) is not None:
                text = row.responses[ends.index(end)]
                detail = f"the response ends with {end}: {excerpt(text, end=True)}"
                self.collector.add("prerendered", row.number, detail)
                if self.markers.is_own_end(end):
                    self.collector.add("eos_twice", row.number, detail)

    def missing_ends(self, rows: CheckedRows) -> None:
        """Where most responses carry their end, one without was cut before it came here."""
        if 2 * self.n_ended > self.n_responses:
            for place in self.not_ended:
                self.collector.add("eos_missing", int(rows.numbers[place]), partial(self._missing_end, rows, place))

    def _missing_end(self, rows: CheckedRows, place: int) -> str:
        text = next(text for text in rows[place].responses if self.markers.end_of(text) is None)
        return f"other responses end with the text of EOS, and this one does not: {excerpt(text, end=True)}"


def _rendered_details(row: CheckedRow, markers: Markers) -> Iterator[str]:
    prompts = [row.prompt] if isinstance(row.prompt, str) else [message["content"] for message in row.prompt]
    for text in prompts:
        if (marker := markers.opening_of(text)) is not None:
            yield f"the prompt holds {marker!r}: {excerpt(text)}"
    for text in row.responses:
        if (marker := markers.turn_in(text)) is not None:
            yield f"a response holds {marker!r}: {excerpt(text)}"
