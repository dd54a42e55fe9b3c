"""`d2svse serve`."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from d2svse.cli.common import Device, examples
from d2svse.cli.index import Model, open_index

EXAMPLES = examples(
    "d2svse serve INDEX",
    "d2svse serve INDEX --model MODEL --port 8000",
)


def serve(
    index: Annotated[Path, typer.Argument(help="Folder of an index.")],
    model: Model = None,
    device: Device = None,
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
    from d2svse.signals import exit_on_signals

    with (
        exit_on_signals("SIGTERM", "SIGHUP"),  # so that the uploads are removed
        TemporaryDirectory(prefix="d2svse-serve-", ignore_cleanup_errors=True) as scratch,
    ):
        os.environ["GRADIO_TEMP_DIR"] = scratch
        from d2svse.serving.guard import Hosts
        from d2svse.serving.page import SearchPage

        Hosts(host, allowed_host or ())
        page = SearchPage(open_index(index, model, device))
        try:
            public = page.launch(host, port, share=share, allowed_hosts=allowed_host or ())
            typer.echo(f"search page: {page.blocks.local_url} (Ctrl+C stops it)")
            if share:
                said = f"public: {public}" if public else "no public link: Gradio's servers did not open one"
                typer.echo(said, err=not public)
            page.blocks.block_thread()
        finally:
            page.close()


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
