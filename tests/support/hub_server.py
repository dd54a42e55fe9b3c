"""A Hub on the loopback interface: the part of its HTTP that huggingface_hub uses for models, and faults."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants
from transformers.utils import hub as transformers_hub

FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)
    stored: set[str] = field(default_factory=set)  # paths that lie in the large file storage

    def commit(self, ref: str, files: dict[str, bytes], title: str) -> str:
        number = hashlib.sha1(f"{len(self.commits)} {ref} {sorted(files)}".encode()).hexdigest()
        self.commits[number], self.refs[ref] = files, number
        self.titles.append(title)
        return number

    def find(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)


@dataclass
class Fault:
    """What is done to requests: an answer with this status and error code, or a body cut after so many bytes."""

    method: str
    path: str
    status: int = 0
    code: str = ""
    cut: int = 0
    times: int = 10**9


@dataclass(frozen=True)
class Seen:
    method: str
    path: str
    headers: dict[str, str]


class Answer(Exception):
    def __init__(self, status: int, body: object = None, **headers: str) -> None:
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()


class LoopbackHub(ThreadingHTTPServer):
    """Users are tokens with the namespaces that they own; large files are those of safetensors."""

    daemon_threads = True

    def __init__(self, users: dict[str, tuple[str, ...]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.users = users
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.lock = threading.RLock()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def storage_url(self) -> str:
        """Another host, as on the Hub: no token may be sent there."""
        return f"http://localhost:{self.server_port}/storage"

    def fail(self, method: str, path: str, **what: int | str) -> None:
        """Do `what` to requests of this method whose path holds this regular expression."""
        self.faults.append(Fault(method, path, **what))

    def requests(self, method: str, path: str) -> list[Seen]:
        return [seen for seen in self.seen if seen.method == method and re.search(path, seen.path)]

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[name]
        return repository.commits[repository.find(revision) or ""]


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str, token: str, cache: Path) -> None:
    """Let this process take another Hub, with a cache of its own."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(transformers_hub, "_hf_api", None)  # made at its first use, for the endpoint of then
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", token)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LoopbackHub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        hub = self.server
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._read_chunks()
        cut = 0
        with hub.lock:
            hub.seen.append(Seen(self.command, path, {name.lower(): value for name, value in self.headers.items()}))
            answer = Answer(404, {"error": "no such route"})
            for fault in hub.faults:
                if fault.times and fault.method == self.command and re.search(fault.path, path):
                    fault.times -= 1
                    cut, status = fault.cut, fault.status
                    if status:
                        answer = Answer(status, {"error": "a fault"}, X_Error_Code=fault.code)
                    break
            else:
                status = 0
            if not status:
                try:
                    self._route(urlsplit(self.path).path)
                except Answer as given:
                    answer = given
        self._send(answer, cut)

    def _send(self, answer: Answer, cut: int) -> None:
        body = answer.body
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted and answer.status == 200 and "Accept-Ranges" in answer.headers:
            start = int(wanted[1])
            answer.headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            answer.status, body = 206, body[start:]
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if cut:
            self.wfile.write(body[:cut])
            self.close_connection = True
        else:
            self.wfile.write(body)

    def _read_chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _route(self, path: str) -> None:
        model = r"/api/models/([\w.-]+/[\w.-]+)"
        routes: list[tuple[str, str, Callable[..., None]]] = [
            ("GET", r"/api/whoami-v2", self._whoami),
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", self._validate),
            ("GET", model, self._info),
            ("GET", rf"{model}/revision/([^/]+)", self._info),
            ("GET", rf"{model}/tree/([^/]+)(?:/(.+))?", self._tree),
            ("POST", rf"{model}/branch/([^/]+)", self._branch),
            ("POST", rf"{model}/preupload/([^/]+)", self._preupload),
            ("POST", rf"{model}/commit/([^/]+)", self._commit),
            ("POST", r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", self._large_files),
            ("PUT", r"/storage/(\w+)", self._store),
            ("GET|HEAD", r"/storage/(\w+)", self._stored),
            ("GET|HEAD", r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", self._resolve),
        ]
        for methods, pattern, serve in routes:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods.split("|"):
                serve(*(unquote(group) for group in match.groups() if group is not None))

    def _namespaces(self) -> tuple[str, ...]:
        given = self.headers.get("Authorization")
        if given is None:
            return ()
        token = given.removeprefix("Bearer ")
        if token not in self.server.users:
            raise Answer(401, {"error": "bad"}, X_Error_Message="Invalid credentials in Authorization header")
        return self.server.users[token]

    def _repository(self, name: str, write: bool = False) -> Repository:
        mine = self._namespaces()
        owned = name.split("/")[0] in mine
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and not owned):
            if not mine:
                raise Answer(401, {"error": "login"}, X_Error_Message="Invalid username or password.")
            raise Answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        if write and not owned:
            raise Answer(403, {"error": "no write access"}, X_Error_Message="no write access")
        return repository

    def _files(self, repository: Repository, revision: str) -> tuple[str, dict[str, bytes]]:
        commit = repository.find(revision)
        if commit is None:
            raise Answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        return commit, repository.commits[commit]

    def _whoami(self) -> None:
        mine = self._namespaces()
        if not mine:
            raise Answer(401, {"error": "login"}, X_Error_Message="Invalid username or password.")
        raise Answer(200, {"name": mine[0], "orgs": [{"name": name} for name in mine[1:]]})

    def _create(self) -> None:
        asked, mine = json.loads(self.body), self._namespaces()
        if not mine:
            raise Answer(401, {"error": "login"}, X_Error_Message="Invalid username or password.")
        owner = asked["organization"] or mine[0]
        if owner not in mine:
            raise Answer(403, {"error": "not yours"}, X_Error_Message="not yours")
        name = f"{owner}/{asked['name']}"
        created = {"url": f"{self.server.url}/{name}"}
        if name in self.server.repositories:
            raise Answer(409, created | {"error": "You already created this model repo"})
        repository = self.server.repositories[name] = Repository(asked.get("visibility") == "private")
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        raise Answer(200, created)

    def _validate(self) -> None:
        match = FRONT_MATTER.match(json.loads(self.body)["content"])
        try:
            values = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError as error:
            raise Answer(400, {"errors": [{"message": f"not YAML: {error}"}], "warnings": []}) from None
        if not isinstance(values, dict):
            raise Answer(400, {"errors": [{"message": "no metadata"}], "warnings": []})
        raise Answer(200, {"errors": [], "warnings": []})

    def _info(self, name: str, revision: str = "main") -> None:
        repository = self._repository(name)
        commit, files = self._files(repository, revision)
        siblings = [{"rfilename": path} for path in files]
        raise Answer(200, {"id": name, "sha": commit, "private": repository.private, "siblings": siblings})

    def _tree(self, name: str, revision: str, folder: str = "") -> None:
        repository = self._repository(name)
        commit, files = self._files(repository, revision)
        files = {path: content for path, content in files.items() if path.startswith(folder)}
        if not files:
            raise Answer(404, {"error": "no such folder"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        rows = []
        for path, content in files.items():
            row = {"type": "file", "path": path, "size": len(content), "oid": _git_id(content)}
            if path in repository.stored:
                row["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            rows.append(row)
        raise Answer(200, rows)

    def _branch(self, name: str, branch: str) -> None:
        repository = self._repository(name, write=True)
        if branch in repository.refs:
            raise Answer(409, {"error": "Reference already exists"})
        repository.refs[branch] = repository.refs["main"]
        raise Answer(200, {})

    def _preupload(self, name: str, revision: str) -> None:
        files = self._files(self._repository(name, write=True), revision)[1]
        rows = []
        for file in json.loads(self.body)["files"]:
            large = file["path"].endswith(".safetensors")
            row = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if file["path"] in files:
                content = files[file["path"]]
                row["oid"] = hashlib.sha256(content).hexdigest() if large else _git_id(content)
            rows.append(row)
        raise Answer(200, {"files": rows})

    def _large_files(self, name: str) -> None:
        self._repository(name, write=True)
        objects = []
        for item in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.server.storage_url}/{item['oid']}"}}
            objects.append(item if item["oid"] in self.server.large else item | {"actions": upload})
        raise Answer(200, {"transfer": "basic", "objects": objects})

    def _store(self, number: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != number:
            raise Answer(400, {"error": "not what was announced"})
        self.server.large[number] = self.body
        raise Answer(200, {})

    def _stored(self, number: str) -> None:
        raise Answer(200, self.server.large[number], ETag=f'"{number}"', Accept_Ranges="bytes")

    def _commit(self, name: str, revision: str) -> None:
        repository = self._repository(name, write=True)
        files, title = dict(self._files(repository, revision)[1]), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                title = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.server.large:
                    raise Answer(400, {"error": f"{value['path']} was not uploaded"})
                files[value["path"]] = self.server.large[value["oid"]]
                repository.stored.add(value["path"])
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        answer = {}
        if "create_pr=1" in urlsplit(self.path).query:
            number = sum(ref.startswith("refs/pr/") for ref in repository.refs) + 1
            revision = f"refs/pr/{number}"
            answer = {"pullRequestUrl": f"{self.server.url}/{name}/discussions/{number}"}
        commit = repository.commit(revision, files, title)
        raise Answer(200, answer | {"commitUrl": f"{self.server.url}/{name}/commit/{commit}", "commitOid": commit})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repository = self._repository(name)
        commit, files = self._files(repository, revision)
        if path not in files:
            raise Answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        content = files[path]
        if path in repository.stored:
            number = hashlib.sha256(content).hexdigest()
            linked = {"X_Linked_Etag": f'"{number}"', "X_Linked_Size": str(len(content))}
            raise Answer(302, b"", Location=f"{self.server.storage_url}/{number}", X_Repo_Commit=commit, **linked)
        raise Answer(200, content, ETag=f'"{_git_id(content)}"', X_Repo_Commit=commit, Accept_Ranges="bytes")


def _git_id(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
