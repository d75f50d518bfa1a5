"""Rendering: the path of a template is its target, and what is undefined is an error."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from jinja2 import meta

from mailsite.bundle import ROLES, compose
from mailsite.loader import load_platform
from mailsite.render import TEMPLATES, RenderError, environment, render, render_in, target
from tests.unit.test_loader import EXAMPLE
from tests.unit.test_roles_certificates import with_acme

ALL = sorted(str(path.relative_to(TEMPLATES)) for path in TEMPLATES.rglob("*.j2"))


def variables(template: str) -> set[str]:
    text = (TEMPLATES / template).read_text(encoding="utf-8")
    return meta.find_undeclared_variables(environment(TEMPLATES).parse(text)) - {"template"}


def included(template: str) -> set[str]:
    text = (TEMPLATES / template).read_text(encoding="utf-8")
    parsed = environment(TEMPLATES).parse(text)
    return {part for part in meta.find_referenced_templates(parsed) if part}


def test_every_file_of_the_template_folder_is_a_template() -> None:
    files = {str(p.relative_to(TEMPLATES)) for p in TEMPLATES.rglob("*") if p.is_file()}
    assert files == set(ALL)


@pytest.mark.parametrize("template", [t for t in ALL if variables(t)])
def test_an_undefined_variable_is_an_error_that_names_the_template(template: str) -> None:
    with pytest.raises(RenderError, match=rf"templates/{re.escape(template)}:\d+: UndefinedError"):
        render(template)


def test_an_undefined_attribute_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "tier").mkdir()
    (tmp_path / "tier/file.j2").write_text("one\ntwo {{ host.nmae }}\n", encoding="utf-8")
    with pytest.raises(RenderError, match=r"^templates/tier/file\.j2:2: .*nmae"):
        render_in(environment(tmp_path), "tier/file.j2", {"host": object()})


def test_a_broken_template_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "file.j2").write_text("one\n{% if %}\n", encoding="utf-8")
    with pytest.raises(RenderError, match=r"^templates/file\.j2:2: TemplateSyntaxError"):
        render_in(environment(tmp_path), "file.j2", {})


def test_a_missing_template_is_an_error() -> None:
    with pytest.raises(RenderError, match=r"templates/nowhere/file\.j2: TemplateNotFound"):
        render("nowhere/file.j2")


def test_the_path_of_a_template_is_the_path_on_the_host() -> None:
    assert target("smtp_out/etc/postfix/main.cf.j2") == "/etc/postfix/main.cf"


def test_every_template_is_used_and_lands_at_its_own_path() -> None:
    """Each role's host has the template's file there; a template that nobody uses is left over."""
    used: dict[str, str] = {}
    platforms = (load_platform(EXAMPLE), with_acme())
    for platform, host in ((p, h) for p in platforms for h in p.hosts.values()):
        bundle = compose(platform, host)
        used |= {f.template: path for path, f in bundle.files.items() if f.template}
        used |= {f"templates/{f.template}": p for p, f in bundle.secret_files.items() if f.template}
    # Programs are no templates.
    used = {t: path for t, path in used.items() if not t.startswith(("agent/", "pairsync/"))}
    parts = {f"templates/{part}" for name in ALL for part in included(name)}
    assert set(used) | parts == {f"templates/{name}" for name in ALL}
    for template, path in used.items():
        # One certificate file per name: its folder is not in the template's path.
        if template.startswith("templates/") and "/etc/certs/" not in template:
            assert target(template.removeprefix("templates/")) == path


def test_every_file_says_where_it_comes_from() -> None:
    """An operator who opens a file on a host must see what to edit instead."""
    platform = load_platform(EXAMPLE)
    hosts = [h for h in platform.hosts.values() if set(h.roles) & set(ROLES)]
    seen = 0
    for host in hosts:
        for path, file in compose(platform, host).files.items():
            # A host name is one word, and the agent says it in its own words.
            if file.template.startswith("templates/") and path != "/etc/hostname":
                head = "\n".join(file.content.splitlines()[:2])
                assert f"Managed by the mail platform; edit {file.template}," in head, path
                seen += 1
    assert seen > 20
