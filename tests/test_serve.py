"""The real server, asked by the real `openai` client and by rude ones."""

import asyncio
import copy
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from support import serve, service
from support.api import Reply
from support.generate import generate
from support.pretrained import chat_prompt, load
from support.serve import Server, create_app
from support.service import Job, Limits
from support.storyworld import stories

ROOT = Path(__file__).resolve().parents[1]
STORIES = [story.text for story in islice(stories(0, "test"), 200)]


@pytest.fixture(scope="module")
def story():
    return load("story")


@contextmanager
def serving(model, tokenizer, api_key=None, **limits):
    server = Server(create_app(model, tokenizer, "story", Limits(**limits), api_key)).start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def server(story):
    with serving(*story, batch=16, waiting=32, body=100_000) as server:
        yield server


def client_of(server, **options) -> openai.OpenAI:
    options = {"api_key": "none", "max_retries": 0} | options
    return openai.OpenAI(base_url=f"{server.url}/v1", **options)


@pytest.fixture(scope="module")
def client(server):
    return client_of(server)


def metrics(server) -> dict[str, float]:
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        families = text_string_to_metric_families(answer.read().decode())
    samples = [sample for family in families for sample in family.samples]
    return {s.name + "".join(s.labels.values()): s.value for s in samples}


def wait_until_empty(server, seconds=10):
    end = time.monotonic() + seconds
    names = ("llm_rows_running", "llm_rows_waiting", "llm_requests_open")
    while any(metrics(server)[name] for name in names):
        assert time.monotonic() < end, "a place was lost"
        time.sleep(0.02)


def alone(story, prompt, n, special="all", seed=None, **how):
    """Return the text and the ids that `generate` gives for a prompt by itself."""
    model, tokenizer = story
    ids = prompt if isinstance(prompt, list) else tokenizer.encode(prompt, special)
    draws = torch.Generator().manual_seed(seed) if seed is not None else None
    stop_id = tokenizer.special_tokens["<|endoftext|>"]
    row = generate(model, [ids], n, stop_id=stop_id, generator=draws, **how)[0][len(ids) :]
    return tokenizer.decode([i for i in row if i != stop_id]), row


BEGINNING = "Once upon a time, there was a brave fox named Mia. One sunny morning, she"
COMPLETE = {"model": "story", "prompt": BEGINNING, "max_tokens": 12, "temperature": 0}


def post(server, body, path="/v1/completions", **headers):
    """Return the status and the JSON that a raw request gets."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


# ---- the right answers --------------------------------------------------------------------------


def test_a_completion_is_what_generate_gives(story, client):
    answer = client.completions.create(**COMPLETE)
    text, row = alone(story, BEGINNING, 12, temperature=0)
    assert answer.choices[0].text == text and answer.choices[0].finish_reason == "length"
    n = len(story[1].encode(BEGINNING))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (n, len(row))
    assert answer.usage.total_tokens == n + 12
    by_ids = client.completions.create(**COMPLETE | {"prompt": story[1].encode(BEGINNING)})
    assert by_ids.choices[0].text == text


def test_a_chat_is_the_completion_of_its_template(story, client):
    messages = [{"role": "user", "content": "Tell me of a fox."}]
    how = {"model": "story", "temperature": 0, "max_tokens": 20}
    answer = client.chat.completions.create(messages=messages, **how)
    text, row = alone(story, chat_prompt(messages), 20, temperature=0)
    assert answer.choices[0].message.content == text
    assert answer.choices[0].message.role == "assistant"
    system = [{"role": "developer", "content": "Be brief."}, *messages]
    as_system = [{"role": "system", "content": "Be brief."}, *messages]
    brief = client.chat.completions.create(messages=system, **how).choices[0].message.content
    assert brief == alone(story, chat_prompt(as_system), 20, temperature=0)[0]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Tell me of a fox."}]}]
    again = client.chat.completions.create(messages=parts, **how)
    assert again.choices[0].message.content == text


def test_a_story_ends_by_itself(story, client):
    text, row = alone(story, BEGINNING, 300, temperature=0)
    assert len(row) < 300, "choose another beginning"
    answer = client.completions.create(**COMPLETE | {"max_tokens": 300})
    assert answer.choices[0].text == text and answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len(row)


def test_a_stream_is_the_same_text_in_pieces(story, client):
    how = COMPLETE | {"max_tokens": 40, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = client.completions.create(**how)
    text, row = alone(story, BEGINNING, 40, temperature=0)
    assert "".join(chunk.choices[0].text for chunk in chunks) == text and len(chunks) > 20
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert last.choices == [] and last.usage.completion_tokens == 40
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_of_a_chat(story, client):
    messages = [{"role": "user", "content": "Hello!"}]
    how = {"model": "story", "messages": messages, "temperature": 0, "max_completion_tokens": 15}
    chunks = list(client.chat.completions.create(**how, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert said == alone(story, chat_prompt(messages), 15, temperature=0)[0]
    assert chunks[-1].choices[0].finish_reason == "length" and chunks[-1].usage is None


def test_a_seed_decides_and_its_absence_does_not(story, client):
    how = COMPLETE | {"temperature": 2.0, "top_p": 0.99}
    texts = [client.completions.create(**how, seed=s).choices[0].text for s in (5, 5, 6)]
    want = alone(story, BEGINNING, 12, seed=5, temperature=2.0, top_p=0.99)[0]
    assert texts[0] == texts[1] == want != texts[2]
    drawn = {client.completions.create(**how).choices[0].text for _ in range(3)}
    assert len(drawn) > 1


def test_stop_sequences_end_an_answer_and_are_not_in_it(story, client):
    text, _ = alone(story, BEGINNING, 60, temperature=0)
    stop = text[20:27]  # somewhere across tokens
    want = text[: text.find(stop)]
    for stops in (stop, ["never said", stop, text[30:]]):
        for stream in (False, True):
            how = COMPLETE | {"max_tokens": 60, "stop": stops, "stream": stream}
            answer = client.completions.create(**how)
            choices = [c.choices[0] for c in answer] if stream else answer.choices
            assert "".join(choice.text for choice in choices) == want
            assert choices[-1].finish_reason == "stop"
    unused = client.completions.create(**COMPLETE, stop=text[5:9] + "zzz")
    assert unused.choices[0].text == alone(story, BEGINNING, 12, temperature=0)[0]


class Bytes:
    """A tokenizer whose ids are the bytes of UTF-8."""

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def reply(text: bytes, stop=()) -> tuple[list[str], bool]:
    """Return the pieces in which a text comes out, token by token, and whether a stop came."""
    reply, pieces = Reply(Bytes(), stop), []
    for token in text:
        pieces.append(reply.add(token))
        if reply.stopped:
            break
    return [piece for piece in [*pieces, reply.rest()] if piece], reply.stopped


def test_text_comes_in_whole_characters():
    assert reply("é😀a".encode()) == (["é", "😀", "a"], False)
    assert reply(b"a\xf0\x9f") == (["a", "\ufffd"], False)
    assert reply(b"a\xff\xffb") == (["a", "\ufffd\ufffdb"], False)


def test_what_may_begin_a_stop_sequence_waits():
    assert reply(b"one STO two", ["STOP"]) == ([*"one ", "STO ", *"two"], False)
    assert reply(b"one STOP two", ["STOP"]) == ([*"one "], True)
    assert reply(b"aab", ["ab"]) == (["a"], True)
    assert reply(b"abac", ["abad", "ac"]) == (["ab"], True)
    assert reply(b"xab", ["abc"]) == (["x", "ab"], False)
    assert reply("né".encode(), ["é"]) == (["n"], True)
    assert reply(b"n\xc3", ["\ufffd"]) == (["n"], True)


# ---- many at once -------------------------------------------------------------------------------


def ask_at_once(story, server, n):
    """Ask n different questions at once; return the answers, and what each should have been."""
    model, tokenizer = story
    stop_id = tokenizer.special_tokens["<|endoftext|>"]
    prompts = [text[: 20 + i % 90] for i, text in enumerate(STORIES[:n])]
    assert len(set(prompts)) == n
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    rows = generate(model, ids, 8, temperature=0, stop_id=stop_id)
    wanted = [tokenizer.decode(row[len(p) :]) for row, p in zip(rows, ids, strict=True)]
    how = [{"temperature": 0} for _ in prompts]
    for i in range(0, n, 5):  # every fifth draws
        how[i] = {"temperature": 1.0, "top_p": 0.9, "seed": i}
        wanted[i] = alone(story, prompts[i], 8, **how[i])[0]

    async def one(client, i):
        stream = i % 3 == 0
        call = {"model": "story", "prompt": prompts[i], "max_tokens": 8, **how[i]}
        answer = await client.completions.create(**call, stream=stream)
        if stream:
            return "".join([chunk.choices[0].text async for chunk in answer])
        return answer.choices[0].text

    async def all_of_them():
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=50) as client:
            return await asyncio.gather(*(one(client, i) for i in range(n)))

    return asyncio.run(all_of_them()), wanted


def test_200_at_once_none_lost_none_mixed(story, server):
    before = metrics(server)
    answers, wanted = ask_at_once(story, server, 200)
    assert answers == wanted and len(set(wanted)) > 100
    wait_until_empty(server)
    after = metrics(server)
    statuses = {s: after[f"llm_requests_total{s}"] for s in ("200", "429")}
    assert statuses["200"] - before.get("llm_requests_total200", 0) == 200
    assert statuses["429"] > before.get("llm_requests_total429", 0)  # not all fitted in at once
    written = after["llm_completion_tokens_total"] - before["llm_completion_tokens_total"]
    steps = after["llm_steps_total"] - before["llm_steps_total"]
    assert written > 4 * steps, "they did not share steps"


def test_mixed_answers_would_be_seen(story, server, monkeypatch):
    """The planted fault: a piece goes to the request that got one before."""
    right, before = Job._tell, []

    def crossed(job, piece):
        right(before[-1] if before and isinstance(piece, str) else job, piece)
        before.append(job)

    monkeypatch.setattr(Job, "_tell", crossed)
    answers, wanted = ask_at_once(story, server, 40)
    assert answers != wanted
    wait_until_empty(server)


def test_a_full_house_says_429_and_when_to_come_again(story):
    with serving(*story, batch=1, waiting=0) as server:
        held = open_stream(server, max_tokens=300)
        request = urllib.request.Request(f"{server.url}/v1/completions", b"{}")
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(request)
        assert error.value.code == 429 and int(error.value.headers["Retry-After"]) >= 1
        assert json.load(error.value)["error"]["type"] == "rate_limit_error"
        with pytest.raises(openai.RateLimitError):
            client_of(server).completions.create(**COMPLETE)
        held.close()
        wait_until_empty(server)
        assert client_of(server).completions.create(**COMPLETE).choices[0].text


# ---- what is wrong, and what is said ------------------------------------------------------------

CHAT = {"model": "story", "messages": [{"role": "user", "content": "Hi"}]}
WRONG = [
    (b"", 400, "not valid JSON"),
    (b"{", 400, "not valid JSON"),
    (b'{"model": "story", "prompt": "\xff"}', 400, "not valid JSON"),
    (b'{"model": "story", "prompt": "\\ud800"}', 400, "not valid JSON"),
    (b"[" * 50_000, 400, "not valid JSON"),
    (b"[1]", 400, "The body"),
    (b"null", 400, "The body"),
    ({}, 400, "'model' is missing"),
    ({"model": "story"}, 400, "'prompt' is missing"),
    (COMPLETE | {"model": "gpt-5"}, 404, "'gpt-5'"),
    (COMPLETE | {"prompt": ""}, 400, "empty"),
    (COMPLETE | {"prompt": []}, 400, "empty"),
    (COMPLETE | {"prompt": ["a", "b"]}, 400, "prompt"),
    (COMPLETE | {"prompt": [5, 2048]}, 400, "id 2048: ids go from 0 to 2047"),
    (COMPLETE | {"prompt": [-1]}, 400, "id -1"),
    (COMPLETE | {"prompt": "a " * 400}, 400, "it may have 384: shorten it to at most 383"),
    (COMPLETE | {"prompt": "a " * 45_000}, 400, "shorten it to at most 383"),
    (COMPLETE | {"prompt": [5] * 384}, 400, "at least 384 tokens"),
    (COMPLETE | {"max_tokens": 0}, 400, "max_tokens=0"),
    (COMPLETE | {"max_tokens": 999}, 400, "max_tokens=999"),
    (COMPLETE | {"prompt": [5] * 380, "max_tokens": 5}, 400, "ask for at most 4"),
    (COMPLETE | {"max_tokens": "7"}, 400, "max_tokens='7'"),
    (COMPLETE | {"temperature": -1}, 400, "temperature=-1"),
    (COMPLETE | {"temperature": 2.5}, 400, "temperature=2.5"),
    (COMPLETE | {"temperature": float("nan")}, 400, "temperature=nan"),
    (COMPLETE | {"top_p": 0}, 400, "top_p=0"),
    (COMPLETE | {"seed": 2**70}, 400, "seed="),
    (COMPLETE | {"stop": ["a"] * 5}, 400, "stop"),
    (COMPLETE | {"stop": ""}, 400, "stop"),
    (COMPLETE | {"n": 2}, 400, "n=2 is not supported"),
    (COMPLETE | {"logprobs": 0}, 400, "logprobs=0 is not supported"),
    (COMPLETE | {"echo": True}, 400, "echo=True is not supported"),
    (COMPLETE | {"frequency_penalty": 0.5}, 400, "frequency_penalty=0.5"),
    (COMPLETE | {"temprature": 1}, 400, "temprature=1 is not supported"),
    (CHAT | {"logprobs": True}, 400, "logprobs=True"),
    (CHAT | {"tools": [{"type": "function"}]}, 400, "tools="),
    (CHAT | {"messages": []}, 400, "messages=[]"),
    (CHAT | {"messages": [{"role": "tool", "content": "x"}]}, 400, "role='tool'"),
    (CHAT | {"messages": [{"role": "user"}]}, 400, "content"),
    (CHAT | {"messages": [{"role": "user", "content": "a<|im_end|>b"}]}, 400, "<|im_end|> would"),
    (CHAT | {"messages": [{"role": "user", "content": "a " * 500}]}, 400, "shorten it"),
]


@pytest.mark.parametrize("body, status, message", WRONG)
def test_errors_are_openais_json_and_name_the_value(server, body, status, message):
    chat = isinstance(body, dict) and "messages" in body
    path = "/v1/chat/completions" if chat else "/v1/completions"
    got, said = post(server, body, path, **{"Content-Type": "application/json"})
    assert got == status and message in said["error"]["message"]
    assert set(said["error"]) == {"message", "type", "param", "code"}
    assert said["error"]["type"] == "invalid_request_error"


def test_what_changes_nothing_may_be_said(server, client):
    idle = {"n": 1, "logprobs": None, "frequency_penalty": 0.0, "user": "me", "stop": None}
    answer = client.completions.create(**COMPLETE, **idle)
    assert answer.choices[0].text == client.completions.create(**COMPLETE).choices[0].text


def test_other_errors_are_openais_too(server, client):
    assert post(server, b"{}", "/v1/nothing")[0] == 404
    assert post(server, b"{}", "/v1/models")[0] == 405
    assert set(post(server, b"{}", "/v1/models")[1]["error"]) >= {"message", "type"}
    status, said = post(server, b" " * 3_000_000)
    assert status == 413 and "3,000,000 bytes: send at most 100,000" in said["error"]["message"]
    with pytest.raises(openai.NotFoundError, match="gpt-5"):
        client.models.retrieve("gpt-5")
    with pytest.raises(openai.BadRequestError, match="max_tokens=0"):
        client.completions.create(**COMPLETE | {"max_tokens": 0})
    wait_until_empty(server)


def test_models_health_page(server, client):
    assert [model.id for model in client.models.list()] == ["story"]
    assert client.models.retrieve("story").id == "story"
    with urllib.request.urlopen(f"{server.url}/health") as answer:
        assert json.load(answer) == {"status": "ok"}
    with urllib.request.urlopen(server.url) as answer:
        page = answer.read().decode()
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert "<title>Chat" in page and "http://" not in page and "https://" not in page
    for other in ("/docs", "/openapi.json"):
        assert post(server, b"", other)[0] == 404


def test_the_key(story):
    with serving(*story, api_key="right") as server:
        for key in ("wrong", "", "right "):
            status, said = post(server, COMPLETE, Authorization=f"Bearer {key}x")
            assert status == 401 and said["error"]["code"] == "invalid_api_key"
        assert post(server, COMPLETE)[0] == 401
        with pytest.raises(openai.AuthenticationError):
            client_of(server).models.list()
        assert client_of(server, api_key="right").completions.create(**COMPLETE).choices[0].text
        with urllib.request.urlopen(f"{server.url}/health") as answer:
            assert answer.status == 200


def test_pages_of_others_may_not_ask(server):
    assert post(server, COMPLETE, Origin="https://example.org")[0] == 403
    assert post(server, COMPLETE, Origin=server.url)[0] == 200


def test_it_listens_on_this_machine_only(server):
    assert server.socket.getsockname()[0] == "127.0.0.1"


# ---- rude clients -------------------------------------------------------------------------------


def open_stream(server, rcvbuf=None, **changes) -> socket.socket:
    """Ask for a stream by hand, and return the connection once the first piece is there."""
    body = json.dumps(COMPLETE | {"stream": True} | changes).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    connection = socket.socket()
    if rcvbuf:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
    connection.connect(server.socket.getsockname())
    connection.sendall(head.encode() + body)
    connection.settimeout(30)
    assert connection.recv(100).startswith(b"HTTP/1.1 200")
    return connection


def texts_of(raw: bytes) -> str:
    """Return the text of the events in what came over a connection (chunks' sizes in between)."""
    events = [x for x in raw.decode().splitlines() if x.startswith("data: {")]
    return "".join(json.loads(x.removeprefix("data: "))["choices"][0]["text"] for x in events)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_is_cut_off_frees_its_place(story, stream):
    with serving(*story, batch=1, waiting=4) as server:
        call = {"max_tokens": 330, "prompt": [5] * 10, "temperature": 2.0, "stream": stream}
        if stream:
            connection = open_stream(server, **call)
        else:
            body = json.dumps(COMPLETE | call).encode()
            head = (
                f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            connection = socket.create_connection(server.socket.getsockname())
            connection.sendall(head.encode() + body)
            while not metrics(server)["llm_rows_running"]:
                time.sleep(0.005)
        assert metrics(server)["llm_rows_running"] == 1
        connection.close()
        wait_until_empty(server)
        assert metrics(server)["llm_disconnects_total"] == 1
        assert metrics(server)["llm_completion_tokens_total"] < 300
        text = client_of(server).completions.create(**COMPLETE).choices[0].text
        assert text == alone(story, BEGINNING, 12, temperature=0)[0]


def test_one_that_leaves_the_queue_frees_its_place(story):
    with serving(*story, batch=1, waiting=1) as server:
        running = open_stream(server, max_tokens=330, prompt=[5] * 10, temperature=2.0)
        body = json.dumps(COMPLETE).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        waiting = socket.create_connection(server.socket.getsockname())
        waiting.sendall(head.encode() + body)
        while not metrics(server)["llm_rows_waiting"]:
            time.sleep(0.005)
        waiting.close()
        while metrics(server)["llm_rows_waiting"]:
            time.sleep(0.005)
        assert metrics(server)["llm_rows_running"] == 1
        running.close()
        wait_until_empty(server)
        assert metrics(server)["llm_disconnects_total"] == 2


def test_a_slow_reader_gets_everything_and_holds_up_nobody(story):
    name = "story" + "-" * 400  # stands in every piece, and fills the line
    server = Server(create_app(*story, name, Limits(batch=2)))
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # so that it fills up
    server.start()
    try:
        call = {"max_tokens": 350, "prompt": [5] * 10, "temperature": 1.5, "seed": 3, "model": name}
        slow = open_stream(server, rcvbuf=4096, **call)
        client = client_of(server)
        for _ in range(3):
            text = client.completions.create(**COMPLETE | {"model": name}).choices[0].text
            assert text == alone(story, BEGINNING, 12, temperature=0)[0]
        while metrics(server)["llm_rows_running"]:
            time.sleep(0.02)
        assert metrics(server)["llm_requests_open"] == 1  # written, and not yet fetched
        raw = b""
        while not raw.endswith(b"0\r\n\r\n"):
            raw += slow.recv(500)
        want = alone(story, [5] * 10, 350, temperature=1.5, seed=3)[0]
        assert want.endswith(texts_of(raw)[-1000:]) and len(texts_of(raw)) > len(want) - 200
        wait_until_empty(server)
        assert metrics(server)["llm_disconnects_total"] == 0
    finally:
        server.stop()


def test_one_that_never_reads_or_never_writes_loses_its_place(story, monkeypatch):
    monkeypatch.setattr(serve, "GRACE", 0.2)
    with serving(*story, seconds=0.3) as server:
        silent = socket.create_connection(server.socket.getsockname())
        silent.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        silent.settimeout(10)
        answer = b""
        while b"}}" not in answer:
            answer += silent.recv(2000)
        assert answer.startswith(b"HTTP/1.1 408") and b"took over 0.3 seconds" in answer
        wait_until_empty(server)


def test_time_runs_out(story):
    call = COMPLETE | {"max_tokens": 330, "prompt": [5] * 10, "temperature": 2.0}
    with serving(*story, seconds=0.15, batch=1) as server:
        answer = client_of(server).completions.create(**call)
        assert answer.choices[0].finish_reason == "length"
        assert 0 < answer.usage.completion_tokens < 330
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: post(server, call), range(8)))
        waited = [said["error"]["message"] for status, said in answers if status == 503]
        assert waited and all("before its turn came. Try again later." in said for said in waited)
        assert {status for status, _ in answers} == {200, 503}


def test_an_error_in_the_model_is_told_and_survived(story, caplog):
    model = copy.deepcopy(story[0])
    right = model.hidden

    def fragile(ids, mask=None, cache=None):
        if (ids == 2000).any():
            raise FloatingPointError("planted")
        return right(ids, mask, cache)

    model.hidden = fragile
    with serving(model, story[1]) as server:
        status, said = post(server, COMPLETE | {"prompt": [2000]})
        assert status == 500 and "FloatingPointError" in said["error"]["message"]
        assert said["error"]["type"] == "server_error" and "planted" in caplog.text
        text = client_of(server).completions.create(**COMPLETE).choices[0].text
        assert text == alone(story, BEGINNING, 12, temperature=0)[0]


# ---- beginning and end --------------------------------------------------------------------------


def test_a_stop_lets_an_answer_finish(story):
    with serving(*story) as server:
        stream = client_of(server).completions.create(**COMPLETE | {"max_tokens": 200}, stream=True)
        pieces = [next(stream).choices[0].text]
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        pieces += [chunk.choices[0].text for chunk in stream]
        stopping.join(timeout=10)
        assert not stopping.is_alive() and not server.thread.is_alive()
        assert "".join(pieces) == alone(story, BEGINNING, 200, temperature=0)[0]
        with pytest.raises(openai.APIConnectionError):
            client_of(server).completions.create(**COMPLETE)


def test_the_command_serves_and_ends_gracefully_on_a_signal(story):
    command = [sys.executable, "-m", "support.serve", "story", "--port", "0", "--batch", "2"]
    environment = os.environ | {"LLM_API_KEY": "k", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        url = process.stdout.readline().split()[4]
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0)
        stream = client.completions.create(**COMPLETE | {"max_tokens": 150}, stream=True)
        pieces = [next(stream).choices[0].text]
        process.send_signal(signal.SIGTERM)
        pieces += [chunk.choices[0].text for chunk in stream]
        assert "".join(pieces) == alone(story, BEGINNING, 150, temperature=0)[0]
        assert process.wait(timeout=20) in (0, -signal.SIGTERM)
    finally:
        process.kill()


def test_a_port_that_is_taken_and_limits_that_serve_nobody_are_refused(story, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["serve", "story", "--port", str(port)])
        with pytest.raises(SystemExit, match=f"Port {port} cannot be had"):
            serve.main()
    for wrong in (["nobody"], ["story", "--batch", "0"], ["story", "--seconds", "-1"]):
        monkeypatch.setattr(sys, "argv", ["serve", *wrong])
        with pytest.raises(SystemExit, match="nobody|batch=0|seconds=-1"):
            serve.main()


def test_a_model_without_a_tokenizer_is_refused(story):
    with pytest.raises(ValueError, match="tokenizer.json"):
        service.Service(story[0], None, "mine", Limits())
