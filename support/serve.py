"""A model behind OpenAI's API, on this machine only: `python -m support.serve story`.

`/v1/chat/completions`, `/v1/completions` and `/v1/models` answer the `openai` client and everything
else that speaks to OpenAI; `/health` and `/metrics` tell how it is; `/` is a page to chat on.
"""

import argparse
import asyncio
import hmac
import os
import socket
import sys
import threading
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import fields
from pathlib import Path
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException
from torch import nn

from support.api import ChatForm, CompletionForm, Problem
from support.data import DataError
from support.pretrained import load
from support.service import Limits, Metrics, Service
from support.tokenizer import BPETokenizer

PAGE = Path(__file__).with_name("chat.html")
GRACE = 5  # seconds beyond the limit in which a slow reader may fetch its answer
HOST = "127.0.0.1"  # this machine only: whoever wants more puts a real web server in front


class Guard:
    """Around every request of the API: the key, a place in the house, and a limit in time.

    Its `finally` runs however a request ends: no place is lost, and no row goes on for nobody.
    """

    def __init__(self, app, limits: Limits, metrics: Metrics, api_key: str | None):
        self.app, self.limits, self.metrics, self.api_key = app, limits, metrics, api_key
        self.places = limits.batch + limits.waiting

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        status = 0

        async def noted_send(message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        request, place = Request(scope, receive), int(scope["method"] == "POST")
        request.state.start = time.monotonic()
        self.metrics.open.inc(place)
        self.places -= place
        try:
            async with asyncio.timeout(self.limits.seconds + GRACE):
                if problem := self.refusal(request):
                    await problem.response()(scope, receive, noted_send)
                else:
                    await self.app(scope, receive, noted_send)
        except TimeoutError:
            if not status:
                problem = Problem(408, f"The request took over {self.limits.seconds} seconds.")
                await problem.response()(scope, receive, noted_send)
        finally:
            self.places += place
            self.metrics.open.dec(place)
            job = getattr(request.state, "job", None)
            if job and job.finish in (None, "cancelled"):
                job.cancelled = True
                self.metrics.gone.inc()
            self.metrics.requests.labels(status or "none").inc()
            self.metrics.seconds.observe(time.monotonic() - request.state.start)

    def refusal(self, request: Request) -> Problem | None:
        """Return why a request is not even read, if there is a reason."""
        sent = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if self.api_key and not hmac.compare_digest(sent, self.api_key.encode()):
            message = "Wrong API key: send the header Authorization: Bearer KEY."
            return Problem(401, message, code="invalid_api_key")
        origin = request.headers.get("origin")  # browsers say from whose page a request comes
        if origin and urlsplit(origin).netloc != request.headers.get("host"):
            return Problem(403, f"Pages of {origin} may not use this server.")
        if self.places < 0 and request.method == "POST":
            return Problem(429, "All places are taken: try again later.", code="busy", retry=True)
        return None


def create_app(
    model: nn.Module,
    tokenizer: BPETokenizer,
    name: str,
    limits: Limits | None = None,
    api_key: str | None = None,
) -> FastAPI:
    """Return the web application that serves a model under `name`; see the top of this file."""
    service = Service(model, tokenizer, name, limits := limits or Limits())

    @asynccontextmanager
    async def lifespan(_):
        yield
        await asyncio.to_thread(service.engine.close)

    app = FastAPI(lifespan=lifespan, openapi_url=None)
    app.add_middleware(Guard, limits=limits, metrics=service.metrics, api_key=api_key)
    app.add_exception_handler(Problem, lambda _, problem: problem.response())
    app.add_exception_handler(
        HTTPException, lambda _, e: Problem(e.status_code, e.detail).response()
    )
    app.add_exception_handler(Exception, lambda *_: Problem(500, "See the log.").response())
    card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "you"}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await service.answer(request, ChatForm)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await service.answer(request, CompletionForm)

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model}")
    async def one_model(model: str) -> dict:
        if model != name:
            raise Problem(404, f"There is no model {model!r}: this server has {name!r}.", "model")
        return card

    @app.get("/health")
    async def health() -> JSONResponse:
        alive = service.engine.thread.is_alive()
        return JSONResponse({"status": "ok" if alive else "dead"}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        text = generate_latest(service.metrics.registry)
        return Response(text, media_type="text/plain; version=0.0.4")

    @app.get("/")
    async def page() -> HTMLResponse:
        rules = "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; "
        headers = {"Content-Security-Policy": rules + "script-src 'unsafe-inline'"}
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=headers)

    return app


class Server:
    """An app on a port of this machine, in a thread of this process.

    Args:
        port: 0 for any that is free; `url` says where it is.
    """

    def __init__(self, app: FastAPI, port: int = 0):
        try:
            self.socket = socket.create_server((HOST, port))
        except OSError as error:
            raise OSError(f"Port {port} cannot be had: use 0 for any that is free.") from error
        self.url = f"http://{HOST}:{self.socket.getsockname()[1]}"
        options = {"log_level": "warning", "http": "h11", "loop": "asyncio", "lifespan": "on"}
        options |= {"limit_concurrency": 1000, "timeout_graceful_shutdown": 30}
        self.uvicorn = uvicorn.Server(uvicorn.Config(app, **options))
        self.thread = threading.Thread(target=self.run, name="server", daemon=True)

    def run(self) -> None:
        """Serve here, until Ctrl-C or `stop`."""
        self.uvicorn.run(sockets=[self.socket])

    def start(self) -> "Server":
        """Serve in a thread, and return when it is ready."""
        self.thread.start()
        while not self.uvicorn.started:
            if not self.thread.is_alive():
                raise RuntimeError("The server did not start: see the log.")
            time.sleep(0.01)
        return self

    def stop(self) -> None:
        """Take no more requests, finish those that run, and end the thread."""
        self.uvicorn.should_exit = True
        self.thread.join()


def main() -> None:
    """Serve a model. The environment variable LLM_API_KEY holds the key, if there is to be one."""
    parser = argparse.ArgumentParser(prog="python -m support.serve", description=main.__doc__)
    parser.add_argument("model", help='"story", "smollm2-135m", or a folder')
    parser.add_argument("--port", type=int, default=8000)
    for field in fields(Limits):
        parser.add_argument(f"--{field.name}", type=field.type, default=field.default)
    options = vars(parser.parse_args())
    name, port = options.pop("model"), options.pop("port")
    try:
        limits, key = Limits(**options), os.environ.get("LLM_API_KEY")
        server = Server(create_app(*load(name), Path(name).name, limits, key), port)
    except (DataError, OSError, ValueError) as error:
        sys.exit(str(error))
    print(f"{name} is served at {server.url} until Ctrl-C.", flush=True)
    with suppress(KeyboardInterrupt):
        server.run()


if __name__ == "__main__":
    main()
