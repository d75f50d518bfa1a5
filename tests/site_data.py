"""Files of site data, read and written by tests that change them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml


def read(path: Path) -> Any:
    """The content of a YAML file of ours."""
    return yaml.load(path.read_text(), Loader=yaml.CSafeLoader)


def write(path: Path, content: Any) -> None:
    """Write a file of site data: JSON is YAML, and quick to write."""
    path.write_text(json.dumps(content, indent=1))
