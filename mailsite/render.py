"""Rendering of the templates that become files on the hosts.

The path of a template is the path of the file on the host, below the folder of its tier:
``templates/smtp_out/etc/postfix/main.cf.j2`` becomes ``/etc/postfix/main.cf``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from jinja2 import (
    Environment,
    FileSystemLoader,
    StrictUndefined,
    TemplateError,
    TemplateSyntaxError,
)

TEMPLATES = Path(__file__).resolve().parent.parent / "templates"


class RenderError(Exception):
    """A template that cannot be rendered; the message names it and, if known, the line."""


def environment(folder: Path) -> Environment:
    """The Jinja environment of all templates: an undefined variable is an error."""
    return Environment(
        loader=FileSystemLoader(folder),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - configuration files, not HTML
    )


_ENVIRONMENT = environment(TEMPLATES)


def source(template: str) -> str:
    """The path of ``template`` in the checkout, as errors and file headers name it."""
    return f"templates/{template}"


def target(template: str) -> str:
    """The path on the host that ``template`` becomes.

    >>> target("smtp_out/etc/postfix/main.cf.j2")
    '/etc/postfix/main.cf'
    """
    _, _, path = template.partition("/")
    return "/" + path.removesuffix(".j2")


def render(template: str, **context: object) -> str:
    """Render ``template``, a path relative to ``templates/``.

    The variable ``template`` is always defined: the template's own path in the checkout.

    Raises:
        RenderError: the template is missing or broken, or uses an undefined variable.
    """
    return render_in(_ENVIRONMENT, template, context)


def render_in(env: Environment, template: str, context: Mapping[str, object]) -> str:
    """:func:`render` with templates from another folder, see :func:`environment`."""
    try:
        return env.get_template(template).render(context, template=source(template))
    except TemplateError as error:
        line = _line_of(error, template)
        raise RenderError(f"{source(template)}{line}: {type(error).__name__}: {error}") from error


def _line_of(error: TemplateError, template: str) -> str:
    """``:LINE`` of the innermost frame that lies in ``template``; empty if there is none."""
    found = error.lineno if isinstance(error, TemplateSyntaxError) else None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.endswith(template):
            found = trace.tb_lineno
        trace = trace.tb_next
    return f":{found}" if found else ""
