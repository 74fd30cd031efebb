"""From a request to its answer: read it, let it join the batch, hand on what is written.

`support.api` knows the words of the API, `support.batching` the model; this is between the two.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import asdict, dataclass

from fastapi import Request
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from torch import nn

from support.api import Answer, ChatForm, CompletionForm, Problem, Reply, event, read_form
from support.batching import Engine, Row
from support.pretrained import chat_prompt
from support.tokenizer import BPETokenizer
from support.tokenizer_files import end_of_text


@dataclass
class Limits:
    """What a server takes upon itself.

    Args:
        batch: rows that generate together.
        waiting: further requests that may wait; the next one hears 429.
        tokens: the most tokens of an answer.
        context: the most tokens of prompt and answer together, unless the model can only do less.
        body: bytes of a request.
        seconds: the time of a request, from its first byte to the last of the answer.
    """

    batch: int = 8
    waiting: int = 64
    tokens: int = 512
    context: int = 2048
    body: int = 1_000_000
    seconds: float = 120.0

    def __post_init__(self):
        for name, value in asdict(self).items():
            if value < 0 or (value == 0 and name != "waiting"):
                raise ValueError(f"{name}={value} leaves nothing to serve: use a larger number.")


class Metrics:
    """What the server counts, for Prometheus."""

    def __init__(self):
        self.registry = CollectorRegistry()
        here = {"registry": self.registry}
        self.requests = Counter("llm_requests", "Requests by status", ["status"], **here)
        self.seconds = Histogram("llm_request_seconds", "From request to last byte", **here)
        self.first = Histogram("llm_first_token_seconds", "From request to first token", **here)
        self.prompt = Counter("llm_prompt_tokens", "Tokens read", **here)
        self.tokens = Counter("llm_completion_tokens", "Tokens written", **here)
        self.steps = Counter("llm_steps", "Steps of the batch", **here)
        self.gone = Counter("llm_disconnects", "Clients that left before their answer", **here)
        self.open = Gauge("llm_requests_open", "Requests in the house", **here)
        self.running = Gauge("llm_rows_running", "Rows in the batch", **here)
        self.waiting = Gauge("llm_rows_waiting", "Rows that wait for a place", **here)

    def on_step(self, n: int) -> None:
        self.steps.inc()
        self.tokens.inc(n)


class Job(Row):
    """A row whose text goes to a request, from the engine's thread to the event loop."""

    def __init__(self, reply: Reply, *args, **options):
        super().__init__(*args, **options)
        self.reply, self.loop = reply, asyncio.get_running_loop()
        self.pieces: asyncio.Queue[str | Exception | None] = asyncio.Queue()

    def add(self, token: int) -> None:
        super().add(token)
        text = "" if self.finish == "stop" else self.reply.add(token)
        if self.finish:
            text += self.reply.rest()
        if self.reply.stopped:
            self.finish = "stop"
        if text:
            self._tell(text)
        if self.finish:
            self._tell(None)

    def fail(self, error: Exception) -> None:
        super().fail(error)
        self._tell(error)

    def usage(self) -> dict[str, int]:
        n, total = self.n_prompt, len(self.ids)
        return {"prompt_tokens": n, "completion_tokens": total - n, "total_tokens": total}

    def _tell(self, piece) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)

    async def texts(self) -> AsyncIterator[str]:
        """Yield the answer's text as it comes. Raises what went wrong."""
        while (piece := await self.pieces.get()) is not None:
            if isinstance(piece, TimeoutError):
                raise Problem(503, f"{piece} Try again later.", code="timeout", retry=True)
            if isinstance(piece, Exception):
                logging.getLogger(__name__).error("The model failed.", exc_info=piece)
                raise Problem(500, f"The model failed ({type(piece).__name__}): see the log.")
            yield piece


class Service:
    """One model and all that its requests share."""

    def __init__(self, model: nn.Module, tokenizer: BPETokenizer, name: str, limits: Limits):
        if tokenizer is None:
            raise ValueError(f"{name} has no tokenizer: put its tokenizer.json into the folder.")
        self.tokenizer, self.name, self.limits = tokenizer, name, limits
        self.context = min(limits.context, model.config.context_length)
        self.longest = max(map(len, tokenizer.vocab))  # bytes of a token
        special = tokenizer.special_tokens
        ends = ("<|endoftext|>", "<|im_end|>", end_of_text(tokenizer))
        self.stop_ids = {special[end] for end in ends if end in special}
        self.metrics = Metrics()
        self.engine = Engine(model, limits.batch, self.metrics.on_step)
        self.metrics.running.set_function(lambda: len(self.engine.batch.rows))
        self.metrics.waiting.set_function(lambda: len(self.engine.waiting))

    def read(self, form: ChatForm | CompletionForm) -> tuple[list[int], int]:
        """Return the prompt's ids and how many may follow. Raises Problem."""
        if form.model != self.name:
            message = f"There is no model {form.model!r}: this server has {self.name!r}."
            raise Problem(404, message, "model", "model_not_found")
        if chat := isinstance(form, ChatForm):
            ids = self._encode("messages", self._conversation(form))
        else:
            ids = self._encode("prompt", form.prompt)
        most, asked = min(self.limits.tokens, self.context - len(ids)), form.asked
        if asked is None:
            return ids, min(most, self.limits.tokens if chat else 16)  # 16 as at OpenAI
        if asked > most:
            message = f"max_tokens={asked} is too much after a prompt of {len(ids)} tokens"
            raise Problem(400, f"{message}: ask for at most {most}.", "max_tokens")
        return ids, asked

    def _conversation(self, form: ChatForm) -> str:
        special, messages = self.tokenizer.special_tokens, [m.plain() for m in form.messages]
        if "<|im_start|>" not in special:
            raise Problem(400, f"{self.name} knows no chats: use /v1/completions.", "model")
        if said := [name for name in special for m in messages if name in m["content"]]:
            message = f"{said[0]} would end or forge a message: take it out of the content."
            raise Problem(400, message, "messages")
        return chat_prompt(messages)

    def _encode(self, field: str, prompt: str | list[int]) -> list[int]:
        n = len(prompt)
        if isinstance(prompt, str):
            n = len(prompt.encode()) // self.longest  # at least: no need to encode a book
            if n < self.context:
                prompt = self.tokenizer.encode(prompt, allowed_special="all")
                n = len(prompt)
        if n >= self.context:
            message = f"The prompt has at least {n} tokens; with its answer it may have"
            fix = f"{self.context}: shorten it to at most {self.context - 1}."
            raise Problem(400, f"{message} {fix}", field, "context_length_exceeded")
        if not prompt:
            raise Problem(400, "The prompt is empty: begin it with at least one token.", field)
        V = self.tokenizer.vocab_size
        if wrong := [i for i in prompt if not 0 <= i < V]:
            raise Problem(400, f"No token has id {wrong[0]}: ids go from 0 to {V - 1}.", field)
        return prompt

    async def answer(self, request: Request, kind: type[ChatForm] | type[CompletionForm]):
        """Return the response to a request."""
        form = await read_form(request, kind, self.limits.body)
        ids, n = await asyncio.to_thread(self.read, form)
        stop = [form.stop] if isinstance(form.stop, str) else form.stop
        deadline = request.state.start + self.limits.seconds
        how = {"temperature": form.temperature, "top_p": form.top_p, "seed": form.seed}
        job = Job(Reply(self.tokenizer, stop), ids, n, self.stop_ids, deadline=deadline, **how)
        request.state.job = job
        self.metrics.prompt.inc(len(ids))
        self.engine.submit(job)
        request.state.watch = asyncio.create_task(watch(request, job))
        texts, answer = job.texts(), Answer(self.name, chat=kind is ChatForm)
        first = await anext(texts, "")  # an error before this can still have a status of its own
        self.metrics.first.observe(time.monotonic() - request.state.start)
        if form.stream:
            events = self._events(answer, first, texts, job, form.stream_options.include_usage)
            return StreamingResponse(events, media_type="text/event-stream")
        text = first + "".join([text async for text in texts])
        return JSONResponse(answer.whole(text, job.finish, job.usage()))

    async def _events(self, answer: Answer, first: str, texts, job: Job, include_usage: bool):
        if answer.chat:
            yield answer.piece("", role="assistant")
        yield answer.piece(first)
        try:
            async for text in texts:
                yield answer.piece(text)
        except Problem as problem:  # too late for a status
            yield event(problem.body())
            return
        yield answer.piece(finish=job.finish)
        if include_usage:
            yield answer.usage(job.usage())
        yield "data: [DONE]\n\n"


async def watch(request: Request, job: Job) -> None:
    """Cancel a job whose client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.cancelled = True
