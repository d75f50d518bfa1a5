"""Errors as the operator sees them: what is wrong and what to do, no traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pulumi

from components.host import HostKeyError
from components.mail_dns import ZoneIdError
from components.secrets import MissingSecretsError
from components.settings import SettingsError
from mailsite.loader import SiteError
from mailsite.records import RecordError


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn the errors that the operator can mend into one that the engine prints as it is."""
    try:
        yield
    except (
        HostKeyError,
        MissingSecretsError,
        RecordError,
        SettingsError,
        SiteError,
        ZoneIdError,
    ) as error:
        raise pulumi.RunError(str(error)) from None
