"""Many domains: the tables of smtp-in are built, pushed and in force without a pause in service."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from mailsite.bundle import compose
from mailsite.model import Host, MailDomain, Platform
from verify import smtp_in
from verify.change import Stream
from verify.context import Context, eventually, expect

DOMAINS, ADDRESSES = 5_000, 50_000


def with_many_domains(platform: Platform) -> Platform:
    mailbox = next(iter(platform.mailboxes))
    each = ADDRESSES // DOMAINS - 2
    users = {"postmaster": mailbox, "abuse": mailbox}
    users |= {f"user{n}": f"{mailbox}+user{n}" for n in range(each)}
    model = MailDomain.model_validate({"name": "d.invalid", "addresses": users})
    many = {
        name: model.model_copy(update={"name": name})
        for name in (f"d{n}.many.invalid" for n in range(DOMAINS))
    }
    return platform.model_copy(update={"domains": {**platform.domains, **many}})


@contextmanager
def as_before(context: Context, member: Host) -> Iterator[None]:
    try:
        yield
    finally:
        context.lab.machine(member).apply()


def test_fifty_thousand_addresses_take_effect_without_a_pause(platform_up: Context) -> None:
    member = smtp_in.members(platform_up)[-1]
    machine = platform_up.lab.machine(member)
    before = machine.run("systemctl", "show", "-p", "InvocationID,MainPID", "postfix.service")
    platform = with_many_domains(platform_up.platform)

    started = time.monotonic()
    size = len(compose(platform, platform.hosts[member.name]).public_json())
    rendered = time.monotonic() - started

    sender = platform_up.lab.sender("careful")
    door = next(d for d in smtp_in.remote_doors(platform_up, sender) if d.member is member)
    with as_before(platform_up, member):
        with Stream(platform_up) as stream:
            started = time.monotonic()
            machine.apply(platform)
            pushed = time.monotonic() - started

            def taken() -> None:
                fresh = replace(door, client=platform_up.internet.client())
                with fresh.session(platform_up) as session:
                    session.ehlo()
                    code, text = session.envelope("", f"user7@d{DOMAINS - 1}.many.invalid")
                    expect(code == 250, f"{code} {text}")

            eventually(taken, seconds=30, every=0.5)
            in_force = time.monotonic() - started
        told = stream.judged()
        after = machine.run("systemctl", "show", "-p", "InvocationID,MainPID", "postfix.service")
        assert after == before
        mail = smtp_in.write(sender, f"user3@d{DOMAINS // 2}.many.invalid")
        with door.session(platform_up) as session:
            session.ehlo()
            assert session.submit(mail.sender, [mail.recipient], mail.content)[0] == 250
        eventually(
            lambda: expect(platform_up.lab.world.copies(mail.token), "it did not arrive"),
            seconds=20,
        )
    print(
        f"{ADDRESSES} addresses in {DOMAINS} domains: {size / 1e6:.1f} MB, rendered in"
        f" {rendered:.1f} s, pushed in {pushed:.1f} s, in force after {in_force:.1f} s; {told}"
    )
    assert rendered < 60
    assert in_force < 60
