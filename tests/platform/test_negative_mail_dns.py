"""Faults in DNS that its checks must see. (SPF and DMARC: see the faults of smtp-out.)"""

from __future__ import annotations

from rehearsal.world.zones import reverse_zone
from verify.context import Context
from verify.lab import Entry
from verify.mail_dns import sending_addresses

from .faults import changed_zone, entry, expect_green, expect_red, without_pointer


def test_a_missing_address_turns_dns_1_red(platform_up: Context) -> None:
    zone = platform_up.platform.domain
    name = platform_up.platform.names.frontend
    address = str(platform_up.public(platform_up.frontends[0])[0])
    record = entry(platform_up, zone, name, "A", containing=address)
    with changed_zone(platform_up, zone, without=(record,)):
        expect_red(platform_up, "DNS-1", f"{name} A: ")
        expect_red(platform_up, "OUT-1", "resolves to")
    expect_green(platform_up, "DNS-1")


def test_a_record_of_nobody_turns_dns_1_red(platform_up: Context) -> None:
    zone = platform_up.platform.domain
    stray = Entry(f"stray.{zone}.", "TXT", '"left behind"', 300)
    with changed_zone(platform_up, zone, with_=(stray,)):
        expect_red(platform_up, "DNS-1", f"beyond the program's records: stray.{zone}")


def test_a_changed_foreign_record_turns_dns_1_red(platform_up: Context) -> None:
    zone = platform_up.platform.domain
    (known,) = (e for e in platform_up.lab.world.foreign_records(zone) if e.type == "TXT")
    foreign = entry(platform_up, zone, zone, "TXT", containing=known.data)
    with changed_zone(platform_up, zone, without=(foreign,)):
        expect_red(platform_up, "DNS-1", f"zone {zone} lacks {zone}. TXT")


def test_a_second_spf_record_turns_dns_1_and_2_red(platform_up: Context) -> None:
    domain = platform_up.sending_domains[0]
    zone = platform_up.platform.domains[domain].dns_zone
    first = entry(platform_up, zone, domain, "TXT", containing="v=spf1")
    second = Entry(first.owner, "TXT", '"v=spf1 a -all"', first.ttl)
    with changed_zone(platform_up, zone, with_=(second,)):
        expect_red(platform_up, "DNS-1", f"{domain} has 2 SPF records")
        expect_red(platform_up, "DNS-2", f"{domain}: has 2 SPF records")


def test_strings_that_join_without_a_space_turn_dns_2_red(platform_up: Context) -> None:
    """The seed's own record."""
    zone = platform_up.platform.domain
    label, _, rest = platform_up.platform.names.spf.partition(".")
    record = entry(platform_up, zone, f"{label}4.{rest}", "TXT")
    words = record.data.strip('"').split()
    broken = f'"{" ".join(words[:3])}" "{" ".join(words[3:])}"'
    joined = Entry(record.owner, record.type, broken, record.ttl)
    with changed_zone(platform_up, zone, without=(record,), with_=(joined,)):
        expect_red(platform_up, "DNS-2", "is no SPF term")


def test_a_key_cut_short_turns_dns_1_and_2_red(platform_up: Context) -> None:
    domain = platform_up.sending_domains[0]
    found = platform_up.platform.domains[domain]
    key = found.signing_key
    assert key is not None
    name = f"{key.selector}._domainkey.{domain}"
    record = entry(platform_up, found.dns_zone, name, "TXT")
    first = record.data.split('" "')[0].strip('"')
    cut = Entry(record.owner, record.type, f'"{first}"', record.ttl)
    with changed_zone(platform_up, found.dns_zone, without=(record,), with_=(cut,)):
        expect_red(platform_up, "DNS-2", "do not join to a key")
        expect_red(platform_up, "DNS-1", "do not join to a key")
        expect_red(platform_up, "OUT-3", "DKIM|signature")


def test_a_missing_pointer_turns_dns_3_red(platform_up: Context) -> None:
    address = sending_addresses(platform_up)[0]
    with without_pointer(platform_up, f"{address.reverse_pointer}.", reverse_zone(address)):
        expect_red(platform_up, "DNS-3", f"{address} has 0 PTR records")
    expect_green(platform_up, "DNS-3")
