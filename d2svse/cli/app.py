"""The `d2svse` command: a typer application, with a file for each command."""

from __future__ import annotations

import functools
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.main import get_command

from d2svse.cli import (
    average,
    caption,
    compare,
    convert,
    data,
    demo,
    distill,
    encode,
    evaluate,
    explain,
    export,
    index,
    info,
    push,
    search,
    serve,
    sweep,
    train,
)
from d2svse.cli.common import examples
from d2svse.text import visible
from d2svse.version import __version__

_SPACES = re.compile("[ \t\r\n]+")  # other line separators are shown escaped

app = typer.Typer(
    name="d2svse",
    help="Image-text retrieval: train in two stages, evaluate, encode, search.",
    epilog=examples(
        "d2svse demo", "d2svse index build MODEL photos -o INDEX", 'd2svse search INDEX "a dog on a beach"'
    ),
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
app.command("train", epilog=train.EXAMPLES)(train.train)
app.command("sweep", epilog=sweep.EXAMPLES)(sweep.sweep)
app.command("distill", epilog=distill.EXAMPLES)(distill.distill)
app.command("eval", epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command("compare", epilog=compare.EXAMPLES)(compare.compare)
app.command("encode", epilog=encode.EXAMPLES)(encode.encode)
app.command("export", epilog=export.EXAMPLES)(export.export)
app.add_typer(index.app, name="index")
app.command("info", epilog=info.EXAMPLES)(info.info)
app.command("search", epilog=search.EXAMPLES)(search.search)
app.command("explain", epilog=explain.EXAMPLES)(explain.explain)
app.command("serve", epilog=serve.EXAMPLES)(serve.serve)
app.command("demo", epilog=demo.EXAMPLES)(demo.demo)
app.add_typer(caption.app, name="caption")
app.command("average", epilog=average.EXAMPLES)(average.average)
app.command("push", epilog=push.EXAMPLES)(push.push)
app.add_typer(convert.app, name="convert")
app.add_typer(data.app, name="data")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


_command = functools.cache(get_command)  # building the command for each call would slow the tests


def main(arguments: list[str] | None = None) -> None:
    """Run a command; a user's error prints one line and exits with 2.

    The environment variable `D2SVSE_DEBUG` shows the traceback instead.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        code = _command(app)(args=arguments, prog_name="d2svse", standalone_mode=False)
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError, ImportError) as error:
        _fail(error)
    except Exception as error:
        if _memory_ran_out(error):
            _fail(error, _out_of_memory(error, sys.argv[1:] if arguments is None else arguments))
        if not hasattr(error, "format_message"):  # typer's usage errors, which name the option, have it
            raise
        _fail(error)
    sys.exit(code if isinstance(code, int) else 0)


def main_train() -> None:
    """Run `d2svse train`, as the command `d2svse-train`."""
    main(["train", *sys.argv[1:]])


def _memory_ran_out(error: Exception) -> bool:
    if isinstance(error, MemoryError):
        return True
    if not isinstance(error, RuntimeError) or "torch" not in sys.modules:  # only torch has errors of its own for it
        return False
    return isinstance(error, sys.modules["torch"].OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _out_of_memory(error: Exception, arguments: Sequence[str]) -> str:
    """Return a sentence for an error of memory, which names the option of the command that helps."""
    command: Any = _command(app)
    for argument in arguments:
        command = getattr(command, "commands", {}).get(argument, command)
    options = {name for parameter in command.params for name in parameter.opts}
    help_ = "lower --batch-size" if "--batch-size" in options else "it needs a machine or a device with more"
    help_ += ", or keep it and encode in parts with --chunk-size" if "--chunk-size" in options else ""
    on_device = f" ({str(error).partition('.')[0]})" if type(error).__name__ == "OutOfMemoryError" else ""
    return f"memory ran out: {help_}{on_device}"


def _fail(error: Exception, message: str | None = None) -> None:
    if os.environ.get("D2SVSE_DEBUG"):
        raise error
    if message is None:
        message = error.format_message() if hasattr(error, "format_message") else str(error) or type(error).__name__
    message = message.replace("Value error, ", "")  # what pydantic puts before a refused choice
    if message.strip():  # without a command typer has printed the help already
        typer.echo(f"d2svse: {visible(' '.join(_SPACES.split(message.strip())))}", err=True)
    sys.exit(2)
