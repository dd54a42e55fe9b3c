"""Telling transformers' Auto classes of the model without loading transformers before anybody else does."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

AUTO_CLASSES = "transformers.models.auto.configuration_auto"  # all Auto classes import it


def register_when_transformers_is_loaded() -> None:
    """Import `d2svse.models`, which registers the model, as soon as transformers' Auto classes are imported."""
    if AUTO_CLASSES in sys.modules:
        importlib.import_module("d2svse.models")
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


class _Watch(MetaPathFinder, threading.local):
    """Notices when the outermost import of transformers or d2svse ends.

    Not earlier: in the middle of one, modules that the model needs are there by half.
    """

    depth = 0

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in ("transformers", "d2svse"):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            loader.exec_module = self._watched(loader.exec_module)
        return spec

    def _watched(self, run: Any) -> Any:
        def exec_module(module: ModuleType) -> None:
            self.depth += 1
            try:
                run(module)
            finally:
                self.depth -= 1
            if self.depth == 0 and AUTO_CLASSES in sys.modules and self in sys.meta_path:
                sys.meta_path.remove(self)
                importlib.import_module("d2svse.models")

        return exec_module
