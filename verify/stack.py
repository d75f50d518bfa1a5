"""What a stack's configuration file says, as far as checks need it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ruamel.yaml import YAML

PROJECT = Path(__file__).resolve().parent.parent


class StackError(Exception):
    """The stack is not there or does not suit. The text says what to do."""


@dataclass(frozen=True)
class Stack:
    """A stack of the project.

    Attributes:
        name: Such as ``prod``.
        site: Folder of its site data.
        live: Whether its hosts are real ones that belong to the operator.
    """

    name: str
    site: Path
    live: bool

    @classmethod
    def read(cls, name: str, project: Path = PROJECT) -> Stack:
        """Read ``Pulumi.<name>.yaml``.

        Raises:
            StackError: There is no such stack, or it names no site data.
        """
        path = project / f"Pulumi.{name}.yaml"
        if not path.exists():
            there = sorted(p.name.split(".")[1] for p in project.glob("Pulumi.*.yaml"))
            raise StackError(f"there is no stack {name!r}; there are: {', '.join(there) or 'none'}")
        config = (YAML(typ="safe").load(path.read_text(encoding="utf-8")) or {}).get("config", {})
        site = config.get("mail:site")
        if not site:
            raise StackError(
                f"{path.name}: mail:site is not set; run: pulumi config set mail:site sites/<name>"
            )
        live = config.get("mail:live", False)
        return cls(name, project / str(site), live is True or str(live).lower() == "true")

    def require_live(self) -> None:
        """Refuse to touch hosts that nobody called live.

        Raises:
            StackError: The stack is not live.
        """
        if not self.live:
            raise StackError(
                f"stack {self.name!r} is not live, so nothing of it is contacted; to try the "
                f"platform out, run: make rehearsal; if the hosts in {self.site.name!r} are yours, "
                "run: pulumi config set mail:live true"
            )
