"""A search page on loopback, and ways to ask it that no browser takes."""

import http.client
import json
from pathlib import Path

BOUNDARY = "limit"


class Server:
    """A page that is served on loopback.

    Args:
        page: The `SearchPage`; None if nobody asks for its uploads.
        port: Its port.
    """

    def __init__(self, page, port):
        self.page, self.port = page, port

    @property
    def uploads(self):
        return Path(self.page.uploads.folder)

    def ask(self, path, body=None, headers=None, method=None, host=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        given = {"Host": f"127.0.0.1:{self.port}" if host is None else host, **(headers or {})}
        if body is not None and "Content-Length" not in given and "Transfer-Encoding" not in given:
            given["Content-Length"] = str(len(body))
        connection.putrequest(method or ("GET" if body is None else "POST"), path, skip_host=True)
        for name, value in given.items():
            for one in value if isinstance(value, list) else [value]:
                connection.putheader(name, one)
        connection.endheaders()
        if body is not None:
            connection.send(body)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer.status, data.decode("utf-8", "replace")

    def post(self, path, data, **options):
        headers = {"Content-Type": "application/json", **options.pop("headers", {})}
        return self.ask(path, json.dumps(data).encode(), headers, **options)

    def search(self, *data):
        """Search by the short way."""
        status, told = self.post("/gradio_api/call/search", {"data": list(data)})
        if status != 200:
            return told
        return self.ask(f"/gradio_api/call/search/{json.loads(told)['event_id']}")[1]

    def functions(self):
        return json.loads(self.ask("/config")[1])["dependencies"]

    @property
    def search_function(self):
        return next(one["id"] for one in self.functions() if one["api_name"] == "search")

    @property
    def explain_function(self):
        return next(one["id"] for one in self.functions() if any(event == "select" for _, event in one["targets"]))

    def join(self, function, data, session, **more):
        body = {"data": data, "fn_index": function, "session_hash": session, "trigger_id": None, **more}
        return self.post("/gradio_api/queue/join", body)

    def run(self, function, data, session, **more):
        """Run a function as a browser does, by the queue."""
        status, told = self.join(function, data, session, **more)
        assert status == 200, told
        return self.ask(f"/gradio_api/queue/data?session_hash={session}")[1]

    def upload(self, name, content, **options):
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}", **options.pop("headers", {})}
        body = head.encode() + content + f"\r\n--{BOUNDARY}--\r\n".encode()
        return self.ask("/gradio_api/upload", body, headers, **options)
