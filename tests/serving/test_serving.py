"""The completions endpoint over plain HTTP, on a tiny random model of bytes: streamed, concurrent, cancelled, oversized
and malformed requests; and that what it answers is what `generate` writes."""

import argparse
import concurrent.futures
import http.client
import json
import socket
import threading
import time
from pathlib import Path

import pytest
import uvicorn

from recollect.commands import serve
from recollect.configuration import UserError
from recollect.data.tokenizers import open_tokenizer
from recollect.layers import Attention, LinearAttention, SlidingWindow
from recollect.layers.modules import Taylor
from recollect.models import continue_texts, repeat
from recollect.models.sampling import Sampling
from recollect.serving import Batcher, Busy, Refused, Request, application, read_completions
from tests.models.probes import functional

TOKENIZER = open_tokenizer("bytes")
CONTEXT = 96


@pytest.fixture(scope="module")
def served():
    layers = (
        Attention(heads=2),
        LinearAttention(heads=2, feature_dim=3, feature_map=Taylor()),
        SlidingWindow(window=5),
    )
    model, params = functional(vocabulary=257, width=16, stages=repeat(*layers, depth=3), tied=False)
    batcher = Batcher(model, params, TOKENIZER, rows=2, context=CONTEXT, waiting=6)
    batcher.start()
    server = uvicorn.Server(uvicorn.Config(application(batcher, "tiny"), host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield model, params, batcher, server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()
    batcher.close()


def ask(port: int, body, path="/v1/completions", method="POST", host=None):
    """Status and parsed body of a request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    headers = {"content-type": "application/json"} | ({} if host is None else {"host": host})
    connection.request(method, path, body if isinstance(body, bytes | None) else json.dumps(body), headers)
    response = connection.getresponse()
    text = response.read().decode()
    return response.status, json.loads(text) if response.headers["content-type"].startswith(
        "application/json"
    ) else text


def written(model, params, prompt, tokens, **settings):
    """What `generate` writes."""
    parts = list(continue_texts(model, params, TOKENIZER, [prompt], tokens, Sampling(**settings)))
    return "".join(part.text for part in parts), sum(len(part.tokens) for part in parts)


def test_whole_and_streamed_answers_are_what_generate_writes(served):
    model, params, _, port = served
    sampled = {"temperature": 0.9, "top_p": 0.8, "seed": 5}
    text, count = written(model, params, "def f", 40, **sampled)
    greedy, _ = written(model, params, "class ", 20, temperature=0)
    body = {"model": "tiny", "prompt": "def f", "max_tokens": 40, "logprobs": 1, **sampled}
    status, answer = ask(port, body)
    (choice,) = answer["choices"]
    assert status == 200 and choice["text"] == text and choice["finish_reason"] in ("length", "stop")
    assert answer["usage"] == {"prompt_tokens": 6, "completion_tokens": count, "total_tokens": 6 + count}
    assert len(choice["logprobs"]["token_logprobs"]) == count and max(choice["logprobs"]["token_logprobs"]) <= 0
    several = {"prompt": ["def f", "class "], "max_tokens": 20, "temperature": 0}
    assert [one["text"] for one in ask(port, several)[1]["choices"]][1] == greedy
    status, events = ask(port, {**body, "stream": True, "stream_options": {"include_usage": True}})
    lines = [line.removeprefix("data: ") for line in events.split("\n\n") if line]
    assert status == 200 and lines[-1] == "[DONE]"
    *pieces, last = [json.loads(line) for line in lines[:-1]]
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == text and len(pieces) > 1
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == count


def test_what_runs_beside_a_request_changes_nothing(served):
    port = served[3]
    prompts = [("a", 33, 1), ("bcd" * 9, 50, 2), ("", 17, 3), ("e f", 40, 4), ("g", 60, 5)]
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        bodies = [{"prompt": p, "max_tokens": n, "seed": seed, "temperature": 0.7} for p, n, seed in prompts]
        answers = list(pool.map(lambda body: ask(port, body)[1], bodies))
    assert [answer["choices"] for answer in answers] == [ask(port, body)[1]["choices"] for body in bodies]


def test_a_client_that_goes_away_frees_its_row(served):
    *_, batcher, port = served
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = {"prompt": "x", "max_tokens": CONTEXT - 2, "stream": True, "n": 2, "seed": 1}
    connection.request("POST", "/v1/completions", json.dumps(body))
    assert connection.getresponse().read(10)
    connection.close()
    end = time.monotonic() + 60
    while any(batcher._running):
        assert time.monotonic() < end
        time.sleep(0.02)
    cancelled = Request([1], 80, Sampling(), (), pytest.fail, cancelled=True)  # nothing is received
    batcher.submit(cancelled)
    assert ask(port, {"prompt": "x", "max_tokens": 1})[0] == 200


def test_too_many_wait(served):
    *_, batcher, port = served
    status, answer = ask(port, {"prompt": ["a"] * 7, "max_tokens": 1})
    assert status == 503 and "at most 6 requests may wait" in answer["error"]["message"]
    with pytest.raises(Busy):
        batcher.submit(*(Request([1], 1, Sampling(), (), print) for _ in range(7)))


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "not JSON"),
        (b"[1]", 400, "must be a JSON object"),
        (b"[" * 100_000, 400, "not JSON"),
        (b" " * (4 * 2**20 + 1), 413, "larger than"),
        ({"prompt": "x" * 90, "max_tokens": 16}, 400, "91 tokens and max_tokens=16 are 107 tokens"),
        ({"prompt": "x", "max_tokens": 0}, 400, "max_tokens: must be a whole number from 1 to 2,147,483,648"),
        ({"prompt": "x", "max_tokens": 1.5}, 400, "max_tokens"),
        ({"prompt": {"a": 1}}, 400, "prompt: must be str or list"),
        ({"prompt": [[1, 300]]}, 400, "ids must be in [0, 257)"),
        ({"prompt": []}, 400, "empty list"),
        ({"temperature": "hot"}, 400, "temperature"),
        (b'{"temperature": NaN}', 400, "temperature"),
        ({"stop": ["a", ""]}, 400, "stop"),
        ({"echo": True}, 400, "echo: this server takes no other value"),
        ({"tools": []}, 400, "tools: there is no such field"),
        ({"n": 33}, 400, "at most 32 choices"),
        ({"model": "gpt-4"}, 404, "no model 'gpt-4'"),
    ],
)
def test_what_cannot_be_served_is_named(served, body, status, message):
    answered, answer = ask(served[3], body)
    assert answered == status and message in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


def test_models_and_other_places(served):
    port = served[3]
    assert ask(port, None, "/v1/models", "GET")[1]["data"][0]["id"] == "tiny"
    assert ask(port, None, "/v1/models/tiny", "GET")[0] == 200 and ask(port, None, "/v1/models/x", "GET")[0] == 404
    assert ask(port, {}, "/v1/chat/completions")[0] == 404 and ask(port, None, method="GET")[0] == 405
    assert ask(port, {}, host="evil.example")[0] == 400


def test_a_failure_ends_what_runs_and_nothing_else(served, monkeypatch):
    *_, batcher, port = served
    monkeypatch.setattr(batcher, "_decode", lambda *arguments: 1 / 0)
    status, answer = ask(port, {"prompt": "x", "max_tokens": 3})
    assert status == 500 and "ZeroDivisionError" in answer["error"]["message"]
    monkeypatch.undo()
    assert ask(port, {"prompt": "x", "max_tokens": 3})[0] == 200


def test_fields_that_change_nothing_are_taken():
    body = {
        "model": "m",
        "prompt": [5, 6],
        "echo": False,
        "best_of": 1,
        "suffix": None,
        "user": "me",
        "n": 2,
        "seed": 3,
    }
    request = read_completions(json.dumps(body).encode(), 10)
    assert [(prompt, sampling.seed) for prompt, sampling in request.choices] == [((5, 6), 3), ((5, 6), 4)]
    with pytest.raises(Refused):
        read_completions(b'{"n": 0}', 10)
    with pytest.raises(UserError, match="rows"):
        Batcher(None, None, TOKENIZER, rows=0)


def test_a_port_that_is_taken_is_an_error_before_the_model_is_read():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: Address already in use"):
            serve.run(argparse.Namespace(port=port, run=Path("nowhere"), rows=1, context=2, waiting=1))


def test_sizes_too_small_name_their_option():
    with pytest.raises(UserError, match="--rows 0: must be at least 1"):
        serve.run(argparse.Namespace(port=8000, run=Path("nowhere"), rows=0, context=2, waiting=1))
