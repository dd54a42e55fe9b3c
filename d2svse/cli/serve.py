"""`d2svse serve`."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from d2svse.cli.common import examples
from d2svse.cli.index import Model, open_index

EXAMPLES = examples(
    "d2svse serve INDEX",
    "d2svse serve INDEX --model MODEL --port 8000",
)


def serve(
    index: Annotated[Path, typer.Argument(help="Folder of an index.")],
    model: Model = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 admits other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 7860,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-host",
            help="Host name of the page besides localhost and --host; repeatable.",
        ),
    ] = None,
    share: Annotated[
        bool, typer.Option("--share", help="Also open a public link; all data then passes through Gradio's servers.")
    ] = False,
) -> None:
    """Serve a page to search an index with a browser, and to see why a result has its score.

    By default the page is open to this machine only, and it sends no data elsewhere.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    for name in ("NO_PROXY", "no_proxy"):  # Gradio requests its own page at start; a proxy would not find it
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost", host]))
    _check_address(host, port)  # fail before the slow imports
    with _exit_on_signals(), TemporaryDirectory(prefix="d2svse-serve-", ignore_cleanup_errors=True) as scratch:
        os.environ["GRADIO_TEMP_DIR"] = scratch
        from d2svse.serving.guard import Hosts
        from d2svse.serving.page import SearchPage

        Hosts(host, allowed_host or ())
        page = SearchPage(open_index(index, model))
        try:
            public = page.launch(host, port, share=share, allowed_hosts=allowed_host or ())
            typer.echo(f"search page: {page.blocks.local_url} (Ctrl+C stops it)")
            if share:
                said = f"public: {public}" if public else "no public link: Gradio's servers did not open one"
                typer.echo(said, err=not public)
            page.blocks.block_thread()
        finally:
            page.close()


@contextmanager
def _exit_on_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into ordinary exits, so that the uploads are removed."""

    def leave(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second signal must not stop the removal
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    names = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {name: signal.signal(name, leave) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _check_address(host: str, port: int) -> None:
    """Check that a port is free.

    Raises:
        OSError: if the port is in use, or this machine does not have the address.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        why = error.strerror or str(error)
        raise OSError(f"cannot listen at {host}, port {port} ({why}): give another --port or --host") from None
