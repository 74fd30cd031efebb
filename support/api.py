"""What OpenAI's API says and hears: the fields of a request, the text of an answer, the errors.

Its reference, https://platform.openai.com/docs/api-reference, is the standard that clients follow.
"""

import json
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Literal

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, ValidationError, model_validator

from support.tokenizer import BPETokenizer

# Fields that we do not have, and what they may say because it changes nothing.
NEUTRAL = {
    "n": 1,
    "best_of": 1,
    "echo": False,
    "logprobs": False,
    "suffix": "",
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
}
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
Stop = Annotated[str, Field(min_length=1)]


class Problem(Exception):
    """An error that the client hears: an HTTP status, a sentence, and whether to try again."""

    def __init__(self, status: int, message: str, param=None, code=None, retry=False):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = {"Retry-After": "1"} if retry else {}

    def body(self) -> dict:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        said = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": said}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


# ---- requests -----------------------------------------------------------------------------------


class Part(BaseModel, extra="forbid"):
    type: Literal["text"]
    text: str


class Message(BaseModel, extra="forbid"):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def plain(self) -> dict[str, str]:
        """Return the message as `chat_prompt` takes it."""
        parts = [self.content] if isinstance(self.content, str) else [p.text for p in self.content]
        role = "system" if self.role == "developer" else self.role  # its newer name
        return {"role": role, "content": "".join(parts)}


class StreamOptions(BaseModel, extra="forbid"):
    include_usage: bool = False
    include_obfuscation: bool = False


class Form(BaseModel, extra="forbid", strict=True):
    """What a request may say; None is as good as nothing."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @property
    def asked(self) -> int | None:
        """How many new tokens are asked for, under the old name or the new one."""
        return self.max_completion_tokens or self.max_tokens

    @model_validator(mode="before")
    @classmethod
    def without_what_changes_nothing(cls, said):
        if not isinstance(said, dict):
            return said

        def idle(name, value):
            neutral = NEUTRAL.get(name)
            same = value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
            return value is None or name in IGNORED or (name in NEUTRAL and same)

        return {name: value for name, value in said.items() if not idle(name, value)}


class ChatForm(Form):
    messages: list[Message] = Field(min_length=1)


class CompletionForm(Form):
    prompt: str | list[int]


async def read_form(request: Request, kind: type[Form], most: int) -> Form:
    """Return the fields in a request's body. Raises Problem: over `most` bytes, no JSON, wrong."""
    body, size = bytearray(), 0
    async for chunk in request.stream():  # to the end: many clients listen only when all is sent
        size += len(chunk)
        if size <= most:
            body += chunk
    if size > most:
        raise Problem(413, f"The body has {size:,} bytes: send at most {most:,}.")
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise explained(error.errors()[0]) from None


def explained(error: dict) -> Problem:
    """Return pydantic's first error as a sentence with the value and the fix."""
    where = ".".join(map(str, error["loc"]))
    if error["type"] == "json_invalid":
        return Problem(400, f"The body is not valid JSON: {error['ctx']['error']}.", code="json")
    if error["type"] == "missing":
        return Problem(400, f"The field {where!r} is missing.", where)
    value = repr(error["input"])
    value = value if len(value) <= 60 else value[:57] + "..."
    if error["type"] == "extra_forbidden":
        return Problem(400, f"{where}={value} is not supported here: leave it out.", where)
    return Problem(400, f"{where or 'The body'}={value}: {error['msg']}.", where)


# ---- answers ------------------------------------------------------------------------------------


class Reply:
    """Tokens in, text out: in whole characters, and only up to the first stop sequence."""

    def __init__(self, tokenizer: BPETokenizer, stop: Sequence[str] = ()):
        self.tokenizer, self.stop, self.stopped = tokenizer, stop, False
        self.held: list[int] = []  # tokens that end within a character
        self.text = ""  # what may be the beginning of a stop sequence

    def add(self, token: int) -> str:
        """Take a token and return the text that is sure now."""
        self.held.append(token)
        if not (text := self.tokenizer.decode(self.held)).endswith("\ufffd"):
            self.held = []
            return self._give(text)
        return ""

    def rest(self) -> str:
        """Return what is left when no more tokens come."""
        return self._give(self.tokenizer.decode(self.held)) + self._cut(len(self.text))

    def _give(self, text: str) -> str:
        if self.stopped:
            return ""
        self.text += text
        if found := [at for stop in self.stop if (at := self.text.find(stop)) >= 0]:
            self.stopped = True
            given, self.text = self.text[: min(found)], ""
            return given
        begun = (stop[:n] for stop in self.stop for n in range(1, len(stop)))
        kept = max((len(start) for start in begun if self.text.endswith(start)), default=0)
        return self._cut(len(self.text) - kept)

    def _cut(self, at: int) -> str:
        given, self.text = self.text[:at], self.text[at:]
        return given


class Answer:
    """What is sent back: whole, or in pieces as server-sent events."""

    def __init__(self, model: str, chat: bool):
        self.chat, now = chat, int(time.time())
        name = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
        self.head = {"id": name, "created": now, "model": model}

    def whole(self, text: str, finish: str, usage: dict) -> dict:
        kind = "chat.completion" if self.chat else "text_completion"
        message = {"role": "assistant", "content": text, "refusal": None}
        said = {"message": message} if self.chat else {"text": text}
        return self.head | {"object": kind, "choices": [_choice(said, finish)], "usage": usage}

    def piece(self, text: str | None = None, finish: str | None = None, **delta) -> str:
        """Return an event with more text; its `delta` may say who speaks."""
        delta |= {} if text is None else {"content": text}
        return self._event(
            [_choice({"delta": delta} if self.chat else {"text": text or ""}, finish)]
        )

    def usage(self, usage: dict) -> str:
        return self._event([], usage=usage)

    def _event(self, choices: list[dict], **more) -> str:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return event(self.head | {"object": kind, "choices": choices} | more)


def event(said: dict) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(said)}\n\n"


def _choice(said: dict, finish: str | None) -> dict:
    return {"index": 0, **said, "logprobs": None, "finish_reason": finish}
