"""The completions endpoint with OpenAI's own client, which runs in the environment of `make test-interop`."""

import json
import subprocess
import threading
import time
from pathlib import Path

import pytest
import uvicorn

from recollect.data.tokenizers import open_tokenizer
from recollect.layers import LinearAttention
from recollect.models import repeat
from recollect.serving import Batcher, application
from tests.models.probes import functional

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-interop" / "bin" / "python"
CLIENT = """
import concurrent.futures, json, sys
import openai
client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
ask = dict(model="tiny", prompt="def ", max_tokens=24, temperature=0.8, seed=3)
whole = client.completions.create(**ask)
pieces = list(client.completions.create(**ask, stream=True))
with concurrent.futures.ThreadPoolExecutor(4) as pool:
    together = list(pool.map(lambda _: client.completions.create(**ask).choices[0].text, range(4)))
stream = client.completions.create(**{**ask, "max_tokens": 80}, stream=True)
next(iter(stream))
stream.close()
wrong = []
for changes in ({"max_tokens": 100000}, {"model": "other"}, {"temperature": -1}):
    try:
        client.completions.create(**{**ask, **changes})
    except openai.APIStatusError as error:
        wrong.append([type(error).__name__, error.body["message"]])
print(json.dumps({
    "models": [model.id for model in client.models.list()],
    "whole": whole.choices[0].text, "finish": whole.choices[0].finish_reason, "tokens": whole.usage.completion_tokens,
    "streamed": "".join(piece.choices[0].text for piece in pieces), "pieces": len(pieces),
    "together": together, "wrong": wrong,
}))
"""


def can_run() -> bool:
    """Whether the client is installed there."""
    return PYTHON.exists() and subprocess.run([PYTHON, "-c", "import openai"], capture_output=True).returncode == 0


@pytest.mark.skipif(not can_run(), reason="no .venv-interop with openai: make test-interop sets it up")
def test_openais_client():
    tokenizer = open_tokenizer("bytes")
    model, params = functional(vocabulary=257, width=16, stages=repeat(LinearAttention(heads=2), depth=1), tied=False)
    batcher = Batcher(model, params, tokenizer, rows=2, context=128)
    batcher.start()
    server = uvicorn.Server(uvicorn.Config(application(batcher, "tiny"), host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
        done = subprocess.run([PYTHON, "-c", CLIENT, address], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
    finally:
        server.should_exit = True
        thread.join()
        batcher.close()
    found = json.loads(done.stdout)
    assert found["models"] == ["tiny"] and found["finish"] in ("length", "stop") and 1 <= found["tokens"] <= 24
    assert found["streamed"] == found["whole"] and found["pieces"] > 1
    assert found["together"] == [found["whole"]] * 4
    assert [name for name, _ in found["wrong"]] == ["BadRequestError", "NotFoundError", "BadRequestError"]
    assert "this server takes at most 128" in found["wrong"][0][1]
