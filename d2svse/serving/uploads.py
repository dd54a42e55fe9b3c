"""Keep the images that users upload in one private folder of bounded size, and open no other file."""

from __future__ import annotations

import os
import stat
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from d2svse.images import StoredImage

MOST_BYTES = 64 * 2**20  # bytes of one upload
MOST_BYTES_KEPT = 2**30  # bytes of all uploads
MOST_FILES_KEPT = 1000
HOURS_KEPT = 12
NOT_UPLOADED = "This image was not uploaded here, or it is gone: drop it again. The page fetches no other images."
# Do not wait for a pipe, and do not follow a link that has replaced the file.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


class Uploads:
    """A private folder of uploads; `close` removes it, and so does the end of the object or the process.

    Attributes:
        folder: path of the folder, without symbolic links.
    """

    def __init__(self) -> None:
        parent = os.environ.get("GRADIO_TEMP_DIR") or None
        if parent is not None:
            os.makedirs(parent, exist_ok=True)
        self._folder = TemporaryDirectory(prefix="d2svse-serve-", dir=parent, ignore_cleanup_errors=True)
        self.folder = os.path.realpath(self._folder.name)

    def close(self) -> None:
        """Remove the folder with all uploads."""
        self._folder.cleanup()

    def open(self, path: str) -> BinaryIO:
        """Open an upload.

        Args:
            path: an absolute path.

        Raises:
            FileNotFoundError: for everything but a regular file below the folder, always with the same message.
        """
        with suppress(OSError, ValueError):
            real = os.path.realpath(path)
            if os.path.isabs(path) and os.path.commonpath([real, self.folder]) == self.folder:
                handle = os.open(real, _FLAGS)
                if stat.S_ISREG(os.fstat(handle).st_mode):
                    return os.fdopen(handle, "rb")
                os.close(handle)
        raise FileNotFoundError(NOT_UPLOADED)

    def holds(self, path: str) -> bool:
        """Return whether a path belongs to an upload."""
        try:
            self.open(path).close()
        except FileNotFoundError:
            return False
        return True

    def claim(self, value: Any) -> Upload | None:
        """Return the upload that a request names, or None if it names none.

        Args:
            value: the value from the browser, `{"path": ...}` or None.

        Raises:
            FileNotFoundError: if the value names anything but an upload, always with the same message.
        """
        if value is None:
            return None
        path = value.get("path") if isinstance(value, dict) else None
        if not isinstance(path, str) or not self.holds(path):
            raise FileNotFoundError(NOT_UPLOADED)
        return Upload(self, path)

    def make_room(self, incoming: int = 0) -> None:
        """Remove uploads that are too old, and the oldest ones until the incoming bytes fit in the limits.

        Args:
            incoming: bytes that will be written next.
        """
        files = sorted((*_state_of(path), path) for path in Path(self.folder).rglob("*") if not path.is_dir())
        total, count = sum(size for _, size, _ in files) + incoming, len(files)
        for changed, size, path in files:
            in_time = changed > time.time() - 3600 * HOURS_KEPT
            if total <= MOST_BYTES_KEPT and count <= MOST_FILES_KEPT and in_time:
                break
            with suppress(OSError):
                path.unlink()
                path.parent.rmdir()  # fails if the folder contains other files
            total, count = total - size, count - 1


class Upload(StoredImage):
    """An uploaded image; each read opens and checks the file again. Messages name it without its folder."""

    def __init__(self, uploads: Uploads, path: str) -> None:
        self._uploads, self._path = uploads, path

    def __fspath__(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        """The name of the uploaded file."""
        return os.path.basename(self._path)

    @property
    def state(self) -> tuple[int, ...]:
        """Size in bytes and modification time in nanoseconds of the file."""
        with self._uploads.open(self._path) as file:
            status = os.fstat(file.fileno())
        return status.st_size, status.st_mtime_ns

    def read_bytes(self) -> bytes:
        """Read the file.

        Raises:
            FileNotFoundError: if the file is gone.
        """
        with self._uploads.open(self._path) as file:
            return file.read(MOST_BYTES)


def _state_of(path: Path) -> tuple[float, int]:
    """Return the time of the last change of a file and its bytes."""
    try:
        state = path.lstat()
    except OSError:  # the file was removed in the meantime
        return 0.0, 0
    return state.st_mtime, state.st_size
