"""Caption images by an OpenAI-compatible endpoint: vLLM, TGI and others.

The requests are made here because `huggingface_hub.AsyncInferenceClient` cannot serve: it follows redirects to other
hosts, sends the user's Hub token to any address, reads answers of any size, and refuses all addresses under
`HF_HUB_OFFLINE`.
"""

from __future__ import annotations

import asyncio
import base64
import email.utils
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
from PIL import Image

from d2svse.captioning.pictures import Outcome, Picture, Sampling
from d2svse.captioning.text import find_fault
from d2svse.files.data import decode_text, parse_json
from d2svse.images import ImageError, load_image, orientation
from d2svse.text import visible

LONGEST_WAIT = 600.0
LONGEST_BACKOFF = 60.0
FAILURES_IN_A_ROW = 20
MAX_ANSWER_BYTES = 2**22
CHARACTERS_OF_TOKEN, MIN_CHARACTERS = 32, 4096  # how long a caption may be, by the tokens asked for
READ_ENCODINGS = ("", "identity", "gzip", "deflate")  # of an answer; what is packed several times is not unpacked
SAID_CHARACTERS = 200
RETRIED = (408, 409, 425, 429)
SENT_AS_THEY_ARE = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}


class EndpointError(ValueError):
    """The endpoint cannot be used, for any picture; the message says why and what to do."""


class _Retry(Exception):
    """A request that went wrong and may go well the next time; `wait` is what the endpoint asked for, in seconds."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _Refused(Exception):
    """A request that the endpoint will not answer, for this picture."""


class EndpointCaptioner:
    """Captions pictures by chat completions, several requests at a time.

    What goes wrong with one request (no answer in time, a broken connection, 408, 409, 425, 429, 5xx, no
    completion in the answer, one that is too large) is tried again after a wait that doubles each time, with jitter; a
    `Retry-After` holds back all requests. An empty, repeating or overlong caption is thrown away and asked for
    with another seed. What goes wrong with all (the key, the address, the model) stops the run.

    Args:
        url: the API's base, such as `http://localhost:8000/v1`.
        model: the model's name there.
        sampling: how captions are drawn; every request carries the picture's seed.
        api_key: sent as a bearer token; it stands in no message.
        concurrency: most requests under way.
        timeout: seconds for a whole answer.
        tries: requests for a picture before it counts as failed.
        max_requests: most requests of a run, those tried again included; None sets no limit.
        backoff: seconds before the first request is tried again.

    Attributes:
        requests: how many were sent.

    Raises:
        ValueError: if the URL is none, holds a password or a query, or a number is out of range.
    """

    def __init__(
        self,
        url: str,
        model: str,
        sampling: Sampling,
        *,
        api_key: str | None = None,
        concurrency: int = 8,
        timeout: float = 120.0,
        tries: int = 5,
        max_requests: int | None = None,
        backoff: float = 1.0,
    ) -> None:
        parts = urlsplit(url)
        if parts.username or parts.password or parts.query:
            raise ValueError(f"the endpoint {parts.hostname}: give the key in the environment, not in the address")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"the endpoint is an address such as http://localhost:8000/v1, got {url!r}")
        if min(concurrency, tries, timeout, 1 if max_requests is None else max_requests) <= 0 or backoff < 0:
            raise ValueError("concurrency, tries, timeout and the budget of requests must be positive")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ValueError("the key of the endpoint holds signs that no key has, such as a line break")
        self.base = url.rstrip("/").removesuffix("/chat/completions")
        self.model, self.sampling, self.concurrency, self.timeout = model, sampling, concurrency, timeout
        self.tries, self.max_requests, self.backoff, self.requests = tries, max_requests, backoff, 0
        self._key = api_key
        self._resume_at = 0.0
        self._failures_in_a_row = 0

    @property
    def settings(self) -> dict[str, Any]:
        """What the captions depend on."""
        return {"made_by": "endpoint", "model": self.model, **asdict(self.sampling)}

    def run(self, pictures: Sequence[Picture], take: Callable[[Outcome], None]) -> None:
        """Caption pictures until all are done or the budget is spent; see `Captioner`.

        Raises:
            EndpointError: if the endpoint refuses the key, does not know the model or the address, asks
                for too long a wait, or 20 pictures in a row have failed.
        """
        try:
            asyncio.run(self._run(iter(pictures), take))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    @property
    def spent(self) -> bool:
        """Whether the budget of requests is spent."""
        return self.max_requests is not None and self.requests >= self.max_requests

    async def _run(self, queue: Iterator[Picture], take: Callable[[Outcome], None]) -> None:
        headers = {"Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        limits = httpx2.Limits(max_connections=self.concurrency)
        async with (
            httpx2.AsyncClient(headers=headers, timeout=None, limits=limits) as client,
            asyncio.TaskGroup() as workers,
        ):
            for _ in range(self.concurrency):
                workers.create_task(self._work(client, queue, take))

    async def _work(self, client: Any, queue: Iterator[Picture], take: Callable[[Outcome], None]) -> None:
        for picture in queue:
            outcome = None if self.spent else await self._caption(client, picture)
            if outcome is None:
                return
            take(outcome)
            if self._failures_in_a_row >= FAILURES_IN_A_ROW:
                said = f"{self._failures_in_a_row} pictures in a row failed, the last: {outcome.reason}"
                raise EndpointError(f"{self.base}: {said}")

    async def _caption(self, client: Any, picture: Picture) -> Outcome | None:
        """What becomes of a picture; None if the budget is spent first."""
        try:
            address, content = await asyncio.to_thread(encode_picture, picture.path)
        except (ImageError, OSError) as error:
            return Outcome(picture, reason=str(error), draw=picture.draw)
        draw, wait, reason, unheard = picture.draw, 0.0, "", False
        for attempt in range(self.tries):
            await self._wait(wait)
            if self.spent:
                return None
            self.requests += 1
            seed = self.sampling.picture_seed(content, draw)
            try:
                text, finish = await self._ask(client, address, seed)
            except _Refused as error:
                reason, unheard = str(error), True
                break
            except _Retry as error:
                reason, unheard = str(error), True
                wait = self._next_wait(attempt, error.wait)
                continue
            fault = self._too_long(text) or find_fault(text)
            if fault is None:
                self._failures_in_a_row = 0
                return Outcome(picture, text.strip(), seed, finish, draw=draw)
            reason, unheard, wait, draw = fault, False, 0.0, draw + 1
        if unheard:
            self._failures_in_a_row += 1
        return Outcome(picture, reason=reason, draw=draw)

    def _next_wait(self, attempt: int, asked: float | None) -> float:
        if asked is not None and asked > LONGEST_WAIT:
            raise EndpointError(f"{self.base}: asks to come back in {asked:.0f} seconds; run the command again then")
        self._resume_at = max(self._resume_at, time.monotonic() + (asked or 0.0))
        return min(LONGEST_BACKOFF, self.backoff * 2**attempt) * random.uniform(0.5, 1.0)

    async def _wait(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        while (pause := self._resume_at - time.monotonic()) > 0:
            await asyncio.sleep(pause + random.uniform(0, min(1.0, self.backoff)))

    async def _ask(self, client: Any, address: str, seed: int) -> tuple[str, str]:
        content = [
            {"type": "image_url", "image_url": {"url": address}},
            {"type": "text", "text": self.sampling.prompt},
        ]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "max_tokens": self.sampling.max_new_tokens,
            "seed": seed,
        }
        try:
            async with (
                asyncio.timeout(self.timeout),
                client.stream("POST", f"{self.base}/chat/completions", json=body) as response,
            ):
                answer = await self._receive(response)
        except TimeoutError:
            raise _Retry(f"no answer within {self.timeout:g} seconds") from None
        except httpx2.RequestError as error:
            raise _Retry(self._hide(f"the connection failed ({type(error).__name__}: {error})")) from None
        status = response.status_code
        said = f"HTTP {status}: {self._cut(answer)}"
        if status == 200:
            return self._read(answer)
        if status in RETRIED or status >= 500:
            raise _Retry(said, retry_after(response.headers))
        if status in (401, 403):
            raise EndpointError(f"{self.base}: refuses the key, or wants one; see --api-key-env ({said})")
        if status == 404:
            raise EndpointError(f"{self.base}: no model {self.model!r} there, or the address is wrong ({said})")
        if status < 400:
            raise EndpointError(f"{self.base}: answers with a redirection; give the address itself ({said})")
        raise _Refused(said)

    async def _receive(self, response: Any) -> bytes:
        """Return the body of an answer, up to the limit of bytes."""
        encoding = response.headers.get("Content-Encoding", "").strip().lower()
        if encoding not in READ_ENCODINGS:
            raise _Retry(self._hide(f"an answer in the encoding {encoding[:50]!r}, which is not read"))
        answer = bytearray()
        async for part in response.aiter_bytes():
            answer += part
            if len(answer) > MAX_ANSWER_BYTES:
                raise _Retry(f"an answer of more than {MAX_ANSWER_BYTES} bytes, which is not read")
        return bytes(answer)

    def _read(self, answer: bytes) -> tuple[str, str]:
        try:
            choice = parse_json(decode_text(answer, "the answer"), "the answer")["choices"][0]
            text, finish = choice["message"]["content"], choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError):
            text, finish = 0, None
        if not isinstance(text, str | None):
            raise _Retry(f"the answer is no chat completion: {self._cut(answer)[:100]!r}")
        return text or "", "length" if finish == "length" else "stop"

    def _too_long(self, text: str) -> str | None:
        most = max(MIN_CHARACTERS, CHARACTERS_OF_TOKEN * self.sampling.max_new_tokens)
        asked = f"{self.sampling.max_new_tokens} tokens"
        return f"a caption of {len(text)} characters, where {asked} were asked for" if len(text) > most else None

    def _cut(self, answer: bytes) -> str:
        """The beginning of an answer, for messages; the key is hidden before it is cut."""
        return self._hide(" ".join(answer.decode(errors="replace").split()))[:SAID_CHARACTERS]

    def _hide(self, message: str) -> str:
        return visible(message.replace(self._key, "***") if self._key else message)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that `Retry-After` asks for, given as such or as a date; None without it."""
    value = headers.get("Retry-After", "").strip()
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def encode_picture(path: Path) -> tuple[str, bytes]:
    """A picture as a data URL, and what its file holds.

    A JPEG, PNG or WebP file that is upright and of 8-bit RGB goes as it is, any other as an upright RGB PNG.

    Raises:
        ImageError: if it cannot be read.
    """
    picture = load_image(path)
    content = sent = path.read_bytes()
    kind = None
    with suppress(Exception), Image.open(BytesIO(content), formats=tuple(SENT_AS_THEY_ARE)) as opened:
        # what Pillow alone cannot open, for its metadata or its size, goes as PNG
        kind = SENT_AS_THEY_ARE[opened.format or ""] if opened.mode == "RGB" and orientation(opened) == 1 else None
    if kind is None:
        buffer = BytesIO()
        picture.save(buffer, format="PNG")
        sent, kind = buffer.getvalue(), "image/png"
    return f"data:{kind};base64,{base64.b64encode(sent).decode()}", content
