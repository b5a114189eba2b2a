"""A chat template that never ends, or writes without end, is refused."""

from __future__ import annotations

import copy
import signal
import threading
from typing import Any

import pytest

from toolkit.errors import ModelError
from toolkit.models import rendering
from toolkit.models.rendering import TemplateRefusesError, rendered, time_limit

MESSAGES = [{"role": "user", "content": "Hi"}]
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def with_template(tokenizer: Any, template: str) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def test_one_that_does_not_end(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the command, not the row: each row would take as long."""
    monkeypatch.setattr(rendering, "MOST_SECONDS", 0.2)
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(ModelError, match="did not end within") as caught:
        rendered(with_template(tokenizer, ENDLESS), MESSAGES)
    assert "model.chat_template" in str(caught.value.fix)
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert rendered(tokenizer, MESSAGES)


def test_a_limit_around_it_goes_on(tokenizer: Any) -> None:
    signal.setitimer(signal.ITIMER_REAL, 60.0)
    try:
        assert rendered(tokenizer, MESSAGES)
        assert 0.0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60.0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def test_one_that_writes_without_end(tokenizer: Any) -> None:
    with pytest.raises(TemplateRefusesError, match="writes 3,000,000 characters"):
        rendered(with_template(tokenizer, "{{ 'abc' * 1000000 }}"), MESSAGES)


def test_another_thread_has_no_limit() -> None:
    done = []

    def work() -> None:
        with time_limit(0.001):
            done.append(sum(range(100_000)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done
