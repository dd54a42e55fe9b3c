"""A connection to Milvus that retries while the server is away, and raises one clear error."""

from __future__ import annotations

import ipaddress
import logging
import os
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from d2svse.retrieval.vectors import import_extra

pymilvus: Any = import_extra("pymilvus", "milvus")
logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # this module raises these errors, in one line

TOKEN_VARIABLE, URI_VARIABLE = "MILVUS_TOKEN", "MILVUS_URI"
ENCRYPTED = ("https",)
NOT_LOADED, CONNECT_FAILED = 101, 2  # error codes of Milvus
LONGEST_PAUSE = 3.0


class MilvusConnection:
    """The Milvus client of a local file or a server.

    Args:
        uri: a local path ending in `.db`, or the address of a server.
        timeout: seconds for which a call without an answer is repeated.
        collections: collections to load; a restarted Milvus Lite has loaded none.
        typed: whether the user gave the address. A token is sent only to such an address, or to that of MILVUS_URI.

    Attributes:
        client: the `MilvusClient`.
        embedded: whether Milvus runs in this process.

    Raises:
        ConnectionError: if Milvus cannot be opened.
        ValueError: if the path does not end in `.db`, the address holds a password, or a token would go
            unencrypted to another machine.
    """

    _open_files: ClassVar[Counter[str]] = Counter()
    _given: ClassVar[set[str]] = set()  # addresses from the user of this process

    def __init__(self, uri: str, timeout: float, collections: tuple[str, ...], typed: bool = True) -> None:
        self.uri, self.timeout, self.collections = uri, timeout, collections
        self.embedded, self._closed = "://" not in uri, False
        self._place = str(Path(uri).absolute()) if self.embedded else uri
        if self.embedded:
            if not uri.endswith(".db"):
                raise ValueError(f"{uri}: a local path for Milvus ends in .db; a server's address starts with http://")
            Path(self._place).parent.mkdir(parents=True, exist_ok=True)
        token = "" if self.embedded or not (typed or is_given(uri)) else os.environ.get(TOKEN_VARIABLE, "")
        _check_address(uri, bool(token))
        if typed:
            self._given.add(uri)
        try:
            self.client = pymilvus.MilvusClient(
                self._place,
                token=token,
                timeout=timeout,
                grpc_options={"grpc.keepalive_permit_without_calls": 0},  # servers close connections that only ping
            )
        except Exception as error:
            hint = "; an embedded one belongs to one process at a time" if self.embedded else ""
            raise ConnectionError(f"Milvus at {uri} cannot be opened ({_short(error)}){hint}") from None
        if self.embedded:
            self._open_files[self._place] += 1

    def ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call Milvus; if it cannot be reached, repeat the call after growing pauses until the timeout.

        Args:
            method: method of the `MilvusClient`.
            *arguments: arguments of the method.
            **options: keyword arguments of the method.

        Raises:
            ConnectionError: if Milvus does not answer in time, or refuses.
        """
        deadline, pause = time.monotonic() + self.timeout, 0.1
        while True:
            given = max(deadline - time.monotonic(), 0.1)
            try:
                return getattr(self.client, method)(*arguments, timeout=given, **options)
            except Exception as error:
                left = deadline - time.monotonic()
                if left <= 0 or not _may_pass(error):
                    raise ConnectionError(f"Milvus at {self.uri} did not {method} ({_short(error)})") from None
                if getattr(error, "code", None) == NOT_LOADED:  # Milvus Lite was restarted
                    for name in self.collections:
                        with suppress(Exception):  # the call itself raises the error
                            self.client.load_collection(name, timeout=max(left, 0.1))
                    continue
            time.sleep(min(pause, left))
            pause = min(2 * pause, LONGEST_PAUSE)

    def make_collection(self, name: str, schema: Any, kind: str, build: Mapping[str, Any]) -> None:
        """Create a collection with an index of its field `vector`, and load it; drop an existing one first.

        Args:
            name: name of the collection.
            schema: a schema from `client.create_schema`.
            kind: Milvus's name of the index.
            build: parameters of the index.

        Raises:
            ConnectionError: if Milvus does not answer, or refuses.
        """
        if self.ask("has_collection", name):
            self.ask("drop_collection", name)
        index = self.client.prepare_index_params()
        index.add_index(field_name="vector", index_type=kind, metric_type="IP", params=dict(build))
        self.ask("create_collection", name, schema=schema, index_params=index, consistency_level="Strong")
        self.ask("load_collection", name)

    def close(self) -> None:
        """Close the connection; release a local file if no other connection of this process uses it."""
        if self._closed:
            return
        self._closed = True
        self.client.close()
        if self.embedded:
            self._open_files[self._place] -= 1
            if not self._open_files[self._place]:
                lite = import_extra("milvus_lite.server_manager", "milvus")
                lite.server_manager_instance.release_server(self._place)


def is_given(uri: str) -> bool:
    """Return whether the user gave this address to this process or in the environment."""
    return uri in MilvusConnection._given or os.environ.get(URI_VARIABLE, "").rstrip("/") == uri.rstrip("/")


def is_local(uri: str) -> bool:
    """Return whether an address belongs to this machine."""
    parts = urlsplit(uri)
    if parts.scheme == "unix":
        return True
    try:
        return ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return parts.hostname == "localhost"


def _check_address(uri: str, secret: bool) -> None:
    if "://" not in uri:
        return
    parts = urlsplit(uri)
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            f"the address of Milvus at {parts.hostname} contains a password, which would be saved in files; "
            f"put it in {TOKEN_VARIABLE}"
        )
    if secret and parts.scheme not in ENCRYPTED and not is_local(uri):
        raise ValueError(
            f"{uri}: {TOKEN_VARIABLE} would be sent unencrypted; use an address that begins with https://, "
            f"or unset {TOKEN_VARIABLE}"
        )


def _may_pass(error: Exception) -> bool:
    """Return whether a repeated call may succeed, because the server is away or was restarted."""
    return getattr(error, "code", None) in (NOT_LOADED, CONNECT_FAILED) or "UNAVAILABLE" in str(error)


def _short(error: Exception) -> str:
    return " ".join(str(getattr(error, "message", None) or error).split())[:300]
