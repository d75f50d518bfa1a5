"""Roundcube as its user sees it: pages in a browser, by what stands on them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from verify.browser import SECONDS
from verify.registry import Failed

if TYPE_CHECKING:
    from playwright.sync_api import FrameLocator, Page


class Roundcube:
    """One user's visit.

    Args:
        page: An empty page.
        origin: Where webmail is, such as ``https://webmail.example.org``.
        shots: Folder for pictures of the pages; None: none are taken.
        say: Takes a line for the transcript.
    """

    def __init__(
        self, page: Page, origin: str, shots: Path | None, say: Callable[[str], None]
    ) -> None:
        self._page = page
        self._origin = origin
        self._shots = shots
        self._say = say
        page.on("console", lambda m: say(f"browser {m.type}: {m.text}"))
        page.on("response", lambda r: say(f"{r.status} {r.request.method} {r.url}"))

    def _shoot(self, name: str) -> None:
        if self._shots is not None:
            self._shots.mkdir(parents=True, exist_ok=True)
            self._page.screenshot(path=self._shots / f"{name}.png")

    def _go(self, query: str) -> None:
        self._page.goto(f"{self._origin}/?{query}")

    def _arrive(self, wanted: str) -> None:
        """Wait for a part of a page.

        Raises:
            Failed: Roundcube says that something is wrong instead.
        """
        wrong = "#messagestack .error, #messagestack .alert-danger, #messagestack .warning"
        self._page.wait_for_selector(f"{wanted}, {wrong}", state="attached")
        told = self._page.locator(wrong)
        if told.count():
            self._shoot("wrong")
            raise Failed(f"Roundcube says: {' '.join(told.all_inner_texts())}")

    def _click(self, selector: str) -> None:
        """Click as a user does: Roundcube hears no command while it waits for its server."""
        self._page.wait_for_function("() => window.rcmail && !rcmail.busy")
        self._page.click(selector)

    def login(self, user: str, password: str) -> None:
        """From the login page to the list of mails."""
        page = self._page
        page.goto(f"{self._origin}/")
        self._shoot("1-login")
        page.fill("#rcmloginuser", user)
        page.fill("#rcmloginpwd", password)
        page.click("#rcmloginsubmit")
        self._arrive("#messagelist")
        self._shoot("2-mails")

    def setting(self, name: str) -> object:
        """A value that the server gave the page, from Roundcube's ``rcmail.env``."""
        return self._page.evaluate("name => rcmail.env[name]", name)

    def read(self, subject: str) -> str:
        """Open the mail in the inbox with ``subject``. Returns the text of its body."""
        from playwright.sync_api import TimeoutError as Late  # a second that other checks spare

        page = self._page
        row = page.locator("#messagelist tbody tr", has_text=subject)
        for _ in range(int(SECONDS / 2)):
            try:
                row.first.wait_for(state="attached", timeout=2000)
                break
            except Late:
                # Anew, and not by its refresh, which leaves out what another session saw first.
                self._go("_task=mail&_mbox=INBOX")
                self._arrive("#messagelist")
        identifier = row.first.locator("td.subject a").first.get_attribute("href") or ""
        uid = re.search(r"_uid=(\d+)", identifier)
        assert uid is not None, f"the list's row leads to {identifier!r}"
        self._go(f"_task=mail&_mbox=INBOX&_uid={uid[1]}&_action=show")
        body = page.inner_text("#messagebody")
        self._shoot("3-mail")
        return body

    def answer(self, text: str) -> None:
        """Answer the mail that is open."""
        page = self._page
        self._click("#toolbar-menu a.reply, .toolbar a.reply")
        page.wait_for_selector("#composebody", state="attached")
        page.fill("#composebody", text)
        self._shoot("4-answer")
        self._click("#compose-content button.send, .formbuttons button.send")
        # Sent: the page that one came from.
        self._arrive("#messagelist, #messagebody")

    def add_filter(self, name: str, word: str, folder: str) -> None:
        """Have mails with ``word`` in the subject filed in ``folder``."""
        page = self._page
        self._go("_task=settings&_action=plugin.managesieve")
        self._click("a.create:not(.disabled)")
        form = self._form()
        form.locator("[name=_name]").fill(name)
        form.locator(".multi-input input:visible").first.fill(word)
        form.locator("[name^='_action_type']").first.select_option("fileinto")
        form.locator("[name^='_action_mailbox']").first.select_option(folder)
        self._shoot("5-filter")
        form.locator("button.submit").click()
        page.locator("#filterslist tr", has_text=name).wait_for()

    def _form(self) -> FrameLocator:
        return self._page.frame_locator("#filter-box")

    def remove_filter(self, name: str) -> None:
        page = self._page
        self._go("_task=settings&_action=plugin.managesieve")
        page.locator("#filterslist tr", has_text=name).click()
        self._form().locator(f"[name=_name][value='{name}']").wait_for()
        self._click("a.delete:not(.disabled)")
        page.click(".ui-dialog button.delete, .ui-dialog button.mainaction")
        page.locator("#filterslist tr", has_text=name).wait_for(state="detached")

    def logout(self) -> None:
        page = self._page
        self._click("#taskmenu a.logout, a.button-logout")
        page.wait_for_selector("#rcmloginuser")
        self._shoot("6-logged-out")
