"""Flags of a command that are made of the fields of option dataclasses."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterable
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer


def flags(options: type, heading: str, of_preset: Collection[str] = ()) -> list[inspect.Parameter]:
    """Return typer's parameters for the fields of a dataclass that have a flag; None where one is not given.

    Args:
        options: a dataclass whose fields are made by `d2svse.training.options.option`.
        heading: what they stand under in `--help`.
        of_preset: names of fields whose default a preset may give.
    """
    hints = get_type_hints(options)
    parameters = []
    for field in dataclasses.fields(options):
        flag = field.metadata["flag"]
        if flag:
            info = typer.Option(
                *([f"--{field.name.replace('_', '-')}"] if flag is True else flag.split()),
                help=field.metadata["help"],
                show_default="of the preset" if field.name in of_preset else _default(field),
                rich_help_panel=heading,
            )
            kind: Any = Annotated[_read_as(hints[field.name]) | None, info]
            parameters.append(
                inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
            )
    return parameters


def with_flags(parameters: Iterable[inspect.Parameter]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that puts flags in the place of a command's `**given`, before its own of their heading."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        first, *rest = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        every = [first, *parameters, *rest]
        command.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in every}
        return command

    return decorate


def _default(field: dataclasses.Field[Any]) -> str | bool:
    """What `--help` shows as the default; False for nothing."""
    made = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if made is dataclasses.MISSING or made is None or made is False:
        return False
    return ",".join(map(str, made)) if isinstance(made, list) else str(made)


def _read_as(hint: Any) -> Any:
    """The type that the command line reads: of a union the first, of a list a text with commas."""
    if get_origin(hint) in (Union, UnionType):
        hint = next(part for part in get_args(hint) if part is not NoneType)
    return str if get_origin(hint) is list else hint
