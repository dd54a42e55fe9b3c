"""Caption images by an OpenAI-compatible endpoint: vLLM, TGI and others.

This module sends its own requests, because `huggingface_hub.AsyncInferenceClient` is not safe here. That client follows
redirects to other hosts, sends the user's Hub token to any address and reads answers of any size. It also refuses all
addresses under `HF_HUB_OFFLINE`.
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

from d2svse.captioning.images import ImageToCaption, Outcome, Sampling
from d2svse.captioning.text import find_fault
from d2svse.choices import check_counts, check_positive
from d2svse.files.data import decode_text, parse_json
from d2svse.images import ImageError, load_image, orientation
from d2svse.text import visible

LONGEST_WAIT = 600.0
LONGEST_BACKOFF = 60.0
FAILURES_IN_A_ROW = 20
MAX_ANSWER_BYTES = 2**22
CHARACTERS_OF_TOKEN, MIN_CHARACTERS = 32, 4096  # limits on a caption: for each requested token, and in any case
READ_ENCODINGS = ("", "identity", "gzip", "deflate")  # of an answer; a list such as "gzip, gzip" is refused
QUOTED_CHARACTERS = 200
RETRIED = (408, 409, 425, 429)
SENT_UNCHANGED = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}


class EndpointError(ValueError):
    """The endpoint cannot caption any image; the message says why and what to do."""


class _Retry(Exception):
    """A request that failed and may succeed later.

    Attributes:
        wait: seconds that the endpoint asks to wait, or None.
    """

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _Refused(Exception):
    """The endpoint refuses to caption this image."""


class EndpointCaptioner:
    """Captions images by chat completions, with several open requests.

    A failed request is repeated after a wait that doubles each time, with jitter. These failures are repeated: no
    answer in time, a broken connection, 408, 409, 425, 429, 5xx, and an answer that has no completion or is too
    large. A `Retry-After` delays all requests. An empty, repetitive or overlong caption is discarded, and another
    one is sampled with the next seed. A wrong key, address or model stops the run.

    Args:
        url: base URL of the API, such as `http://localhost:8000/v1`.
        model: name of the model at the endpoint.
        sampling: settings of the captions; every request contains the image's seed.
        api_key: key that is sent as a bearer token; no message contains it.
        concurrency: largest number of open requests.
        timeout: seconds to wait for a whole answer.
        tries: requests for an image before it counts as failed.
        max_requests: largest number of requests of a run, repeated ones included; None sets no limit.
        backoff: seconds before the second try.

    Attributes:
        requests: number of requests sent so far.

    Raises:
        ValueError: if the URL is not an http address or has a password or a query, or a number is out of range.
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
            raise ValueError(f"the endpoint {parts.hostname}: give the key in the environment and not in the address")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"the endpoint must be an address such as http://localhost:8000/v1, got {url!r}")
        try:
            _ = parts.port, httpx2.URL(url)  # a port that is no number from 0 to 65535 is an error
        except (ValueError, httpx2.InvalidURL) as error:
            raise ValueError(f"the endpoint must be an address of http, got {url!r} ({error})") from None
        check_positive(timeout=timeout)
        check_counts(concurrency=concurrency, tries=tries)
        if max_requests is not None:
            check_counts(max_requests=max_requests)
        if not backoff >= 0:  # NaN too
            raise ValueError(f"backoff must be at least 0, got {backoff}")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ValueError("the key of the endpoint has a character that no key has, such as a line break")
        self.base = url.rstrip("/").removesuffix("/chat/completions")
        self.model, self.sampling, self.concurrency, self.timeout = model, sampling, concurrency, timeout
        self.tries, self.max_requests, self.backoff, self.requests = tries, max_requests, backoff, 0
        self._key = api_key
        self._resume_at = 0.0
        self._failures_in_a_row = 0

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the captions depend on."""
        return {"made_by": "endpoint", "model": self.model, **asdict(self.sampling)}

    def run(self, images: Sequence[ImageToCaption], take: Callable[[Outcome], None]) -> None:
        """Caption images until all are done or `max_requests` is reached; see `Captioner`.

        It runs an event loop of its own; in a notebook, call it by `await asyncio.to_thread(captioner.run, …)`.

        Raises:
            EndpointError: if the endpoint refuses the key, does not know the model or the address, or asks for too long
                a wait; or if 20 images in a row failed.
        """
        try:
            asyncio.run(self._run(iter(images), take))
        except ExceptionGroup as group:
            error: Exception = group
            while isinstance(error, ExceptionGroup):
                error = error.exceptions[0]
            raise error from None

    @property
    def spent(self) -> bool:
        """Whether the run has sent `max_requests` requests."""
        return self.max_requests is not None and self.requests >= self.max_requests

    async def _run(self, queue: Iterator[ImageToCaption], take: Callable[[Outcome], None]) -> None:
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

    async def _work(self, client: Any, queue: Iterator[ImageToCaption], take: Callable[[Outcome], None]) -> None:
        for image in queue:
            outcome = None if self.spent else await self._caption(client, image)
            if outcome is None:
                return
            take(outcome)
            if self._failures_in_a_row >= FAILURES_IN_A_ROW:
                failed = f"{self._failures_in_a_row} images in a row failed, the last: {outcome.reason}"
                raise EndpointError(f"{self.base}: {failed}")

    async def _caption(self, client: Any, image: ImageToCaption) -> Outcome | None:
        """Return the outcome of an image, or None if `max_requests` is reached first."""
        try:
            address, content = await asyncio.to_thread(data_url, image.path)
        except (ImageError, OSError) as error:
            return Outcome(image, reason=str(error), draw=image.draw)
        draw, wait, reason, unanswered = image.draw, 0.0, "", False
        for attempt in range(self.tries):
            await self._wait(wait)
            if self.spent:
                return None
            self.requests += 1
            seed = self.sampling.image_seed(content, draw)
            try:
                text, finish = await self._ask(client, address, seed)
            except _Refused as error:
                reason, unanswered = str(error), True
                break
            except _Retry as error:
                reason, unanswered = str(error), True
                wait = self.next_wait(attempt, error.wait)
                continue
            fault = self._too_long(text) or find_fault(text)
            if fault is None:
                self._failures_in_a_row = 0
                return Outcome(image, text.strip(), seed, finish, draw=draw)
            reason, unanswered, wait, draw = fault, False, 0.0, draw + 1
        if unanswered:
            self._failures_in_a_row += 1
        return Outcome(image, reason=reason, draw=draw)

    def next_wait(self, attempt: int, asked: float | None) -> float:
        """Return the seconds to wait after a failed request; hold back all requests as long as the server asks.

        Args:
            attempt: number of the image's failed requests before this one.
            asked: the wait that the server asks for, in seconds, or None.

        Raises:
            EndpointError: if the server asks to wait longer than `LONGEST_WAIT`.
        """
        if asked is not None and asked > LONGEST_WAIT:
            raise EndpointError(f"{self.base}: asks to wait {asked:.0f} seconds; run the command again then")
        self._resume_at = max(self._resume_at, time.monotonic() + (asked or 0.0))
        return min(LONGEST_BACKOFF, self.backoff * 2 ** min(attempt, 60)) * random.uniform(0.5, 1.0)

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
        reply = f"HTTP {status}: {self._cut(answer)}"
        if status == 200:
            return self._read(answer)
        if status in RETRIED or status >= 500:
            raise _Retry(reply, retry_after(response.headers))
        if status in (401, 403):
            raise EndpointError(f"{self.base}: refuses the key, or needs one; see --api-key-env ({reply})")
        if status == 404:
            raise EndpointError(f"{self.base}: has no model {self.model!r}, or the address is wrong ({reply})")
        if status < 400:
            raise EndpointError(f"{self.base}: redirects to another address; give that address ({reply})")
        raise _Refused(reply)

    async def _receive(self, response: Any) -> bytes:
        """Return the body of an answer, up to the limit of bytes."""
        encoding = response.headers.get("Content-Encoding", "").strip().lower()
        if encoding not in READ_ENCODINGS:
            raise _Retry(self._hide(f"an answer in the encoding {encoding[:50]!r}; expected gzip, deflate or none"))
        answer = bytearray()
        async for part in response.aiter_bytes():
            answer += part
            if len(answer) > MAX_ANSWER_BYTES:
                raise _Retry(f"an answer of more than {MAX_ANSWER_BYTES} bytes; larger ones are not read")
        return bytes(answer)

    def _read(self, answer: bytes) -> tuple[str, str]:
        try:
            choice = parse_json(decode_text(answer, "the answer"), "the answer")["choices"][0]
            text, finish = choice["message"]["content"], choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError):
            text, finish = 0, None
        if not isinstance(text, str | None):
            raise _Retry(f"the answer is not a chat completion: {self._cut(answer)[:100]!r}")
        return text or "", "length" if finish == "length" else "stop"

    def _too_long(self, text: str) -> str | None:
        most = max(MIN_CHARACTERS, CHARACTERS_OF_TOKEN * self.sampling.max_new_tokens)
        limit = f"at most {self.sampling.max_new_tokens} tokens"
        return f"a caption of {len(text)} characters; expected {limit}" if len(text) > most else None

    def _cut(self, answer: bytes) -> str:
        """Return the beginning of an answer, for messages, without the key."""
        hidden = self._hide(" ".join(answer.decode(errors="replace").split()))  # first: half a key would stay visible
        return hidden[:QUOTED_CHARACTERS]

    def _hide(self, message: str) -> str:
        return visible(message.replace(self._key, "***") if self._key else message)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that the header `Retry-After` asks to wait (a number or a date), or None without it."""
    value = headers.get("Retry-After", "").strip()
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def data_url(path: Path) -> tuple[str, bytes]:
    """Return an image as a data URL, and the content of its file.

    The URL holds an upright, opaque 8-bit RGB file of one image in JPEG, PNG or WebP unchanged. It holds any other
    image as an upright RGB PNG.

    Raises:
        ImageError: if the image cannot be read.
    """
    image = load_image(path)
    content = sent = path.read_bytes()
    kind = None
    with suppress(Exception), Image.open(BytesIO(content), formats=tuple(SENT_UNCHANGED)) as opened:
        # Pillow refuses some files for their metadata or size that load_image reads; those become PNG.
        plain = opened.mode == "RGB" and "transparency" not in opened.info and getattr(opened, "n_frames", 1) == 1
        deep = opened.format == "PNG" and content[24] != 8  # bits of a channel; Pillow shows 8 of 16
        kind = SENT_UNCHANGED[opened.format or ""] if plain and not deep and orientation(opened) == 1 else None
    if kind is None:
        buffer = BytesIO()
        image.save(buffer, format="PNG")
        sent, kind = buffer.getvalue(), "image/png"
    return f"data:{kind};base64,{base64.b64encode(sent).decode()}", content
