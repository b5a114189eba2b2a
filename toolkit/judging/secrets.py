"""Keys that an endpoint is sent and may send back: they are taken out where its replies and errors enter."""

from __future__ import annotations

import base64
import html
import json
import re
from urllib.parse import quote, quote_plus

REDACTED = "[redacted]"
# Local servers take any key, and people write words such as EMPTY, none or dummy.
SHORTEST_SECRET = 6


class Redactor:
    """Takes a key out of texts, however it is written there.

    >>> redact = Redactor("sk-canary/42")
    >>> redact("Bearer sk-canary/42"), redact("?key=sk-canary%2F42"), redact("key: SK-CANARY/42")
    ('Bearer [redacted]', '?key=[redacted]', 'key: [redacted]')
    >>> REDACTED in redact(base64.b64encode(b"user:sk-canary/42").decode())
    True
    >>> Redactor("none")("none")
    'none'
    """

    def __init__(self, secret: str) -> None:
        written = _spellings(secret) if len(secret) >= SHORTEST_SECRET else []
        longest_first = sorted(written, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)), re.IGNORECASE) if written else None

    def __call__(self, text: str) -> str:
        return text if self._pattern is None else self._pattern.sub(REDACTED, text)

    def of_document(self, value: object) -> object:
        """The same JSON document with every text in it redacted.

        >>> Redactor("sk-canary").of_document({"sk-canary": ["a sk-canary", 1]})
        {'[redacted]': ['a [redacted]', 1]}
        """
        if isinstance(value, str):
            return self(value)
        if isinstance(value, list):
            return [self.of_document(item) for item in value]
        if isinstance(value, dict):
            return {self(str(key)): self.of_document(item) for key, item in value.items()}
        return value


def _spellings(secret: str) -> set[str]:
    escaped = {json.dumps(secret)[1:-1], repr(secret)[1:-1], html.escape(secret), quote_plus(secret)}
    escaped |= {json.dumps(spelling)[1:-1] for spelling in escaped}  # in a body that is not parsed
    return {secret, secret[::-1], quote(secret, safe=""), quote(secret), secret.encode().hex(), *escaped} | {
        spelling for offset in range(3) for spelling in _base64_spellings(secret, offset)
    }


def _base64_spellings(secret: str, offset: int) -> list[str]:
    """How base64 spells the secret behind ``offset`` other bytes, without the digits that its neighbours change."""
    content = b"\0" * offset + secret.encode()
    first, end = -(-offset * 8 // 6), len(content) * 8 // 6
    spelled = base64.b64encode(content).decode()[first:end]
    return [spelled, spelled.replace("+", "-").replace("/", "_")]
