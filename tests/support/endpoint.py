"""A chat-completions endpoint on this machine that misbehaves as it is told."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

Behave = Callable[[int, int], str]
SLOW_SECONDS = 1.5


class Loopback:
    """A server with an OpenAI-compatible `/v1/chat/completions`.

    Args:
        behave: from the number of a request, and how many came for its picture before (both from 0), what is
            done: "ok", or the name of a fault.
    """

    def __init__(self, behave: Behave = lambda request, earlier: "ok", delay: float = 0.0) -> None:
        self.behave, self.delay = behave, delay
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.keys: list[str | None] = []
        self.under_way = self.most_under_way = 0
        self.earlier: Counter[str] = Counter()
        self.lock = threading.Lock()

    def __enter__(self) -> Loopback:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                outer.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # a client that was killed or has stopped waiting

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        picture = body["messages"][0]["content"][0]["image_url"]["url"]
        with self.lock:
            request = len(self.bodies)
            self.bodies.append(body)
            self.times.append(time.monotonic())
            self.keys.append(handler.headers.get("Authorization"))
            what = self.behave(request, self.earlier[picture])
            self.earlier[picture] += 1
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            time.sleep(SLOW_SECONDS if what == "slow" else self.delay)
            if handler.path != "/v1/chat/completions":
                what = "404"
            self.send(handler, what, caption_for(picture, body["seed"]))
        finally:
            with self.lock:
                self.under_way -= 1

    def send(self, handler: BaseHTTPRequestHandler, what: str, caption: str) -> None:
        status, headers = 200, {}
        if what == "empty":
            caption = " \n"
        elif what == "null":
            caption = None
        elif what == "repeating":
            caption = "A man stands. " + "He holds a cup in his hand. " * 20
        choice = {"message": {"role": "assistant", "content": caption}, "finish_reason": "stop"}
        content = json.dumps({"object": "chat.completion", "choices": [choice]})
        if what[:3].isdigit():
            status, _, wait = what.partition(" after ")
            status, headers = int(status), {"Retry-After": wait} if wait else {}
            content = json.dumps({"error": {"message": f"no, {handler.headers.get('Authorization')}"}})
        elif what == "half":
            content = content[: len(content) // 2]
        elif what == "nonsense":
            content = json.dumps({"choices": []})
        if what == "broken":
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            handler.wfile.write(b'{"choices"')
            handler.close_connection = True
            return
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content.encode()))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content.encode())


def caption_for(picture: str, seed: int) -> str:
    """What the server says of a picture, told by its data URL, for a seed."""
    return f"The picture shows {hashlib.sha256(picture.encode()).hexdigest()[:8]}. It was drawn with {seed}."
