"""Run a test where it cannot meet a rehearsal that is up on the same machine.

The test runs in a child process with a mount namespace of its own, in which no network namespace
has a name yet and no rehearsal has the machine. What it mounts and names is gone when it ends;
processes that it leaves are the test's own business.
"""

from __future__ import annotations

import ctypes
import functools
import os
import pickle
import shutil
import subprocess
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec

import pytest

P = ParamSpec("P")
_CLONE_NEWNS = 0x00020000

needs_machines = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("systemd-nspawn") is None,
    reason="machines need root and systemd-nspawn",
)


def isolated(test: Callable[P, None]) -> Callable[P, None]:
    """Decorate a test function so that it runs isolated; its fixtures are made outside."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            result: tuple[str, str] = ("passed", "")
            try:
                _unshare()
                test(*args, **kwargs)
            except pytest.skip.Exception as skipped:
                result = ("skipped", str(skipped))
            except BaseException:
                result = ("failed", traceback.format_exc())
            with os.fdopen(write, "wb") as pipe:
                pickle.dump(result, pipe)
            os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            data = pipe.read()
        os.waitpid(child, 0)
        verdict, text = pickle.loads(data) if data else ("failed", "the test's process died")
        if verdict == "skipped":
            pytest.skip(text)
        if verdict == "failed":
            pytest.fail(text, pytrace=False)

    return run


def _unshare() -> None:
    libc: Any = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    for path in ("/run/netns", "/run/mail-rehearsal"):
        Path(path).mkdir(mode=0o700, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", path], check=True)
