"""Telling transformers' Auto classes of the model without loading transformers before anybody else does."""

from __future__ import annotations

import importlib
import sys
import threading
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from itertools import dropwhile
from types import ModuleType
from typing import Any

AUTO_CLASSES = "transformers.models.auto.configuration_auto"  # all Auto classes import it


def register_when_transformers_is_loaded() -> None:
    """Import `d2svse.models`, which registers the model, as soon as transformers' Auto classes are imported.

    Where that fails there is a warning: other libraries take an error while they import transformers
    for a sign that it is not there.
    """
    if AUTO_CLASSES in sys.modules:
        try:
            importlib.import_module("d2svse.models")
        except Exception as error:
            _warn(error)
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def _warn(error: Exception) -> None:
    what = "transformers' Auto classes do not know the model of d2svse, for importing it failed"
    warnings.warn(f"{what}: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=3)


class _Watch(MetaPathFinder):
    """Notices when a thread's outermost import of transformers or d2svse ends.

    Not earlier: in the middle of one, modules that the model needs are there by half. It finds
    modules by the finders behind it, and stays where it is when all is done: a finder that goes
    makes an import of another thread skip the next one.
    """

    def __init__(self) -> None:
        self.importing: list[int] = []  # threads, each as often as it is within an import
        self.done = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if self.done or fullname.partition(".")[0] not in ("transformers", "d2svse"):
            return None
        behind = list(dropwhile(lambda finder: finder is not self, sys.meta_path))[1:]
        specs = (finder.find_spec(fullname, path, target) for finder in behind if hasattr(finder, "find_spec"))
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            watched: Any = _WatchedLoader(spec.loader, self)
            spec.loader = watched
        return spec

    def run(self, loader: Any, module: ModuleType) -> None:
        """Run a module by its loader; register the model if it was the outermost one."""
        thread = threading.get_ident()
        self.importing.append(thread)
        try:
            loader.exec_module(module)
        finally:
            self.importing.remove(thread)
        if self.done or thread in self.importing or AUTO_CLASSES not in sys.modules:
            return
        self.importing.append(thread)
        try:
            importlib.import_module("d2svse.models")
        except Exception as error:
            if set(self.importing) != {thread}:  # another thread has a module by half and waits for this one: it will
                return
            _warn(error)
        finally:
            self.importing.remove(thread)
        self.done = True


class _WatchedLoader:
    """Stands for a module's loader, which may be one for many modules, until the module is run."""

    def __init__(self, loader: Any, watch: _Watch) -> None:
        self.loader, self.watch = loader, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.watch.run(self.loader, module)
