"""What the stand-ins remember: one JSON file each, written atomically."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Store:
    """A JSON object on disk that several threads of one process share.

    The file is private to its owner: provider state can hold secrets.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._written = ""
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            self._data: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            self._data = {}
        except json.JSONDecodeError as error:
            raise RuntimeError(
                f"{path}:{error.lineno}: {error.msg}; the file is damaged: run `make down`"
            ) from error

    @contextmanager
    def edit(self) -> Iterator[dict[str, Any]]:
        """Hold the data under the lock; changes are written when the block ends, in any way."""
        with self._lock:
            try:
                yield self._data
            finally:
                text = json.dumps(self._data, indent=1, sort_keys=True)
                if text != self._written:
                    write_private(self.path, text)
                    self._written = text

    @contextmanager
    def view(self) -> Iterator[dict[str, Any]]:
        """Hold the data under the lock, to read it."""
        with self._lock:
            yield self._data


def write_private(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in one step, readable by its owner alone."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w") as stream:
            stream.write(text + "\n")
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
