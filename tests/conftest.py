from __future__ import annotations

import gc
import itertools
import os
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy is loaded; the workers share the cores
_TESTS_ENDED = itertools.count(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the tests marked as slow as well")


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures, and torch with them, where tests run; the process that hands them to workers needs neither."""
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None):
        config.pluginmanager.import_plugin("support.fixtures")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the slow tests unless `--all` or a test's own name asks for them.

    The longest come first, so that quick ones are left to fill the end with (pytest-xdist with `--maxschedchunk 1`).
    The pages of the docs wait for a folder that the first of them fills, so the other pages come later.
    """
    slow = [item for item in items if item.get_closest_marker("slow")]
    if not (config.getoption("--all") or any("::" in argument for argument in config.args)):
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    long = [item for item in items if item.get_closest_marker("slow") or item.get_closest_marker("long")]
    pages = [item for item in long if item.path.stem == "test_code_blocks"]
    long = [*pages[:1], *(item for item in long if item not in pages), *pages[1:]]
    items[:] = [*long, *(item for item in items if item not in long)]


def pytest_collection_finish() -> None:
    """Leave what is imported out of garbage collections, and start the server of forks if a test has use for it."""
    gc.freeze()
    if processes := sys.modules.get("support.processes"):
        processes.start_server()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Leave what tests have loaded out of garbage collections as well; every training and loading has some."""
    if not next(_TESTS_ENDED) % 50:
        gc.collect()
        gc.freeze()
