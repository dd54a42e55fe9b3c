"""Classes by name: a decorator, entry points of installed packages, and configurations with nested options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from d2svse.choices import unknown

T = TypeVar("T")
Class = TypeVar("Class", bound=type)


class Registry(Generic[T]):
    """The classes of one kind by their names.

    Args:
        kind: what they are, for messages, such as "similarity".
        group: entry-point group in which installed packages name further classes.
        example: a name, for messages.

    Attributes:
        classes: those that are imported, by name; `names` tells all.
    """

    def __init__(self, kind: str, group: str, example: str) -> None:
        self.kind, self.group, self.example = kind, group, example
        self.classes: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[Class], Class]:
        """Return a class decorator that adds a class under `name`.

        Raises:
            ValueError: if the name is taken by another class.
        """

        def add(cls: Class) -> Class:
            taken = self.classes.get(name)
            if taken is not None and taken != cls:
                raise ValueError(f"the {self.kind} name {name!r} is taken by {taken.__qualname__}")
            self.classes[name] = cls
            return cls

        return add

    def names(self) -> list[str]:
        """Return all names, those of installed packages included."""
        return sorted({*self.classes, *(point.name for point in entry_points(group=self.group))})

    def find(self, name: str) -> type[T]:
        """Return the class of a name; one of an entry point is imported now.

        Raises:
            ValueError: if the name is unknown.
        """
        if name not in self.classes:
            for point in entry_points(group=self.group):
                if point.name == name:
                    self.register(name)(point.load())
                    break
            else:
                raise ValueError(
                    f"{unknown(self.kind, name, self.names())}; one of your own is known once its module is "
                    f"imported, to commands by an entry point of the group {self.group}"
                )
        return self.classes[name]

    def options(self, configuration: Any) -> dict[str, Any]:
        """Return the one form of a configuration, `{"name": ..., **constructor_arguments}`.

        Args:
            configuration: the name, or the name and the arguments.

        Raises:
            ValueError: if it is something else.
        """
        options = {"name": configuration} if isinstance(configuration, str) else configuration
        if not isinstance(options, Mapping) or not isinstance(options.get("name"), str):
            raise ValueError(
                f'{self.kind} must be a name such as "{self.example}", or {{"name": "{self.example}"}} with its '
                f"arguments, got {options!r:.80}"
            )
        return dict(options)

    def build(self, configuration: str | Mapping[str, Any], make: Callable[[type[T], dict[str, Any]], T]) -> T:
        """Make an object of a configuration.

        Args:
            configuration: the name, or the name and the arguments.
            make: calls the class with the arguments.

        Raises:
            ValueError: if the name is unknown or an argument does not fit.
        """
        arguments = self.options(configuration)
        name = arguments.pop("name")
        cls = self.find(name)
        try:
            return make(cls, arguments)
        except TypeError as error:
            raise ValueError(f"{self.kind} {name!r}: {error}") from error
