"""A judge over HTTP against a real server: transformers' own, with SmolLM2 behind it."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from toolkit.judging import llm
from toolkit.judging.answers import remembering
from toolkit.judging.options import JudgeOptions
from toolkit.judging.records import Judgement
from toolkit.judging.responses import PolicyResponses
from toolkit.models.resolve import resolve
from toolkit.progress import Reporter
from toolkit.recipe.schema import JudgeSettings
from toolkit.recipe.training import ModelSection

pytestmark = pytest.mark.e2e

PROMPTS = ["The hotel was", "I bought this phone and"]
TEXTS = {
    "a": [[" lovely and quiet, and I would stay there again."], [" it works well, so I love it."]],
    "b": [[" dirty, and the staff were rude to us."], [" it broke on the first day, which was awful."]],
}
TEMPLATE = """
kind: choice
max_tokens: 8
system: Answer with [[A]] or [[B]] and nothing else.
user: "{{ prompt }}\\n\\nA: {{ response_a }}\\n\\nB: {{ response_b }}\\n\\nWhich one is better?"
"""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """``openai:MODEL@BASE_URL`` of a server on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = resolve("smollm2-135m").path
    program = str(Path(sys.executable).with_name("transformers"))
    command = [program, "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "bfloat16"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            deadline = time.monotonic() + 120
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                    break
                except (urllib.error.URLError, OSError):
                    if process.poll() is not None or time.monotonic() > deadline:
                        process.kill()
                        pytest.fail(f"the server did not start: {process.communicate()[0][-2000:]}")
                    time.sleep(0.5)
            yield f"openai:{model}@http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(20)


def test_smollm2_behind_a_real_server(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = tmp_path / "template.yaml"
    template.write_text(TEMPLATE)
    # The model is found where it was converted; the memory of judgements is this test's own.
    monkeypatch.setattr(llm, "memory_file", lambda: tmp_path / "judgements.sqlite")
    options = JudgeOptions(ModelSection(), JudgeSettings(template=str(template), concurrency=2, timeout_s=120))

    def judge() -> list[Judgement]:
        responses = PolicyResponses(["p0", "p1"], PROMPTS, TEXTS)
        return llm.judge_pairs(server, [("a", "b")], responses, options, Reporter(quiet=True))[0]

    judgements = judge()
    assert len(judgements) == 4
    with remembering(tmp_path / "judgements.sqlite") as memory:
        cursor = memory.connection.execute("SELECT value, raw, error, prompt_tokens, completion_tokens FROM answers")
        rows = cursor.fetchall()
    assert len(rows) == 4
    for value, raw, error, prompt_tokens, completion_tokens in rows:
        assert raw and prompt_tokens > 20 and 0 < completion_tokens <= 8
        assert (value is None) == bool(error)  # a small model may well say something else than a verdict
    again = judge()  # greedy: the same replies, and what was answered is not asked
    assert [j.preference for j in again] == [j.preference for j in judgements]
