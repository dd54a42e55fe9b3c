"""Filter requests: allow only known hosts, the page's own origin, the routes that it needs, and bounded bodies."""

from __future__ import annotations

import asyncio
import ipaddress
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from d2svse.serving.images import FOLDER
from d2svse.serving.uploads import MOST_BYTES, Uploads

MOST_BODY = 2**20  # bytes of a request without an upload
MOST_UPLOADING = 8  # simultaneous uploads
UPLOAD_SECONDS = 300

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_-]+(?:\.[a-z0-9_-]+)*\.?)(?::([0-9]{1,5}))?", re.IGNORECASE)
_WILDCARDS = ("", "0.0.0.0", "::")
_FILE, _UPLOAD, _PROGRESS = "/gradio_api/file=", "/gradio_api/upload", "/gradio_api/upload_progress"
# The routes of Gradio that the page and its Python client need. Other routes serve files, fetch URLs or start programs.
_READ = re.compile(
    r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/(assets|static|svelte)/.+"
    rf"|/{FOLDER}/(small|large)/[0-9a-f]+\.jpg"
    r"|/gradio_api/(info/?|startup-events|heartbeat/[^/]+|queue/data|call/[^/]+/[^/]+|upload_progress|file=/.+)",
    re.DOTALL,
)
_WRITE = re.compile(r"/gradio_api/(queue/join|call/[^/]+/?|upload|cancel|reset/?)")
_PROTECTION = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "frame-ancestors 'self'",
    "Referrer-Policy": "same-origin",
}


class Hosts:
    """The host names under which a browser may request the page.

    These are the loopback names, the address that the server listens at, and the given names. A server that listens
    at all addresses (0.0.0.0) also allows every IP address. This is safe, because DNS rebinding needs a name.

    Args:
        bound: the address that the server listens at.
        named: further names, without scheme and port.

    Raises:
        ValueError: if a name is not a host name.
    """

    def __init__(self, bound: str, named: Sequence[str] = ()) -> None:
        for name in named:
            found = _HOST.fullmatch(name)
            if found is None or found[2] is not None:
                raise ValueError(
                    f"--allowed-host {name!r}: expected a host name without scheme and port, such as photos.example.org"
                )
        self.named = {_plain(name) for name in named}
        self._bound, self._any_address = _plain(bound), bound in _WILDCARDS

    def allow(self, host: str) -> bool:
        """Return whether a `Host` header, with or without a port, names this server."""
        found = _HOST.fullmatch(host)
        if found is None:
            return False
        name = _plain(found[1])
        if name in self.named or name in ("localhost", self._bound):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or self._any_address

    def own(self, origin: str, hosts: Sequence[str]) -> bool:
        """Return whether an `Origin` header belongs to this page: same host and port, or a given name."""
        try:
            parts = urlsplit(origin)
            port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        except (ValueError, KeyError):
            return False
        if _plain(parts.hostname or "") in self.named:
            return True
        for host in hosts:
            found = _HOST.fullmatch(host)
            if found is None or _plain(found[1]) != _plain(parts.hostname or ""):
                continue
            if port == int(found[2] or {"http": 80, "https": 443}[parts.scheme]):
                return True
        return False


def _plain(name: str) -> str:
    """Normalise a host name: lower case, without the brackets of an IPv6 address and the final dot."""
    return name.lower().strip("[]").removesuffix(".")


async def _drain(receive: Receive) -> None:
    """Read the rest of a body up to a limit, because a client that is cut off while it sends sees no response."""
    left = 2 * MOST_BYTES
    try:
        while left > 0:
            message = await asyncio.wait_for(receive(), 1)
            left -= len(message.get("body", b""))
            if not message.get("more_body"):
                return
    except TimeoutError:
        return


class Guard:
    """Middleware that refuses requests with a 4xx or 503 status before they reach the application.

    Args:
        app: the application.
        hosts: the host names of this server.
        uploads: the folder of uploads.
    """

    def __init__(self, app: ASGIApp, hosts: Hosts, uploads: Uploads) -> None:
        self._app, self._hosts, self._uploads = app, hosts, uploads
        self._uploading = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or pass it to the application."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":  # a page of Gradio needs no other protocol
            return await send({"type": "websocket.close", "code": 1008})
        headers = Headers(scope=scope)
        refused = self._check_sender(scope, headers) or self._check_request(scope, headers)
        if refused is not None:
            await _drain(receive)
            return await refused(scope, receive, send)

        async def send_protected(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_PROTECTION)
            await send(message)

        if scope["path"] == _UPLOAD:
            return await self._take_upload(scope, receive, send_protected)
        await self._app(scope, receive, send_protected)

    def _check_sender(self, scope: Scope, headers: Headers) -> Response | None:
        """Refuse a wrong host name, and requests from pages of other sites."""
        hosts = headers.getlist("host")
        forwarded = [part.strip() for value in headers.getlist("x-forwarded-host") for part in value.split(",")]
        if len(hosts) != 1 or not all(map(self._hosts.allow, [*hosts, *forwarded])):
            return PlainTextResponse("This server does not have that host name; see --allowed-host.", 421)
        origins = headers.getlist("origin")
        if all(self._hosts.own(origin, [*hosts, *forwarded]) for origin in origins):
            if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
                return None
            followed = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
            if followed and scope["method"] == "GET" and scope["path"] == "/":  # a link to the page
                return None
        return PlainTextResponse("Another site may not use this page.", 403)

    def _check_request(self, scope: Scope, headers: Headers) -> Response | None:
        """Refuse routes that the page does not need, files that were not uploaded, and bodies that are too large."""
        path = scope["path"]
        if scope["method"] in ("GET", "HEAD"):
            known = _READ.fullmatch(path) is not None and ".." not in path.split("/")
            if path.startswith(_FILE):
                known = known and self._uploads.holds(path.removeprefix(_FILE))
            if known and path == _PROGRESS:  # Gradio would store a record for each requested name
                return Response('data: {"msg": "done"}\n\n', media_type="text/event-stream")
            return None if known else PlainTextResponse("Not found", 404)
        if scope["method"] != "POST" or _WRITE.fullmatch(path) is None:
            return PlainTextResponse("Not found", 404)
        length = headers.get("content-length", "")
        if not (length.isascii() and length.isdigit()):
            return PlainTextResponse("The length of the request is missing.", 411)
        most = MOST_BYTES + MOST_BODY if path == _UPLOAD else MOST_BODY
        if int(length) > most:
            return PlainTextResponse(f"Too large: at most {most} bytes.", 413)
        return None

    async def _take_upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._uploading >= MOST_UPLOADING:
            return await PlainTextResponse("Too many uploads at once: try again.", 503)(scope, receive, send)
        started = False

        async def send_noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        self._uploading += 1
        try:
            await run_in_threadpool(self._uploads.make_room, self._uploading * (MOST_BYTES + MOST_BODY))
            async with asyncio.timeout(UPLOAD_SECONDS):
                # Without the query string, Gradio does not store the progress of the upload.
                await self._app({**scope, "query_string": b""}, receive, send_noted)
        except TimeoutError:
            if not started:
                await PlainTextResponse("The upload took too long.", 408)(scope, receive, send)
        finally:
            self._uploading -= 1
