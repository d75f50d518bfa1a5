"""What the engine is asked for, and in which order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pulumi
import pulumi_libvirt
import pytest

from components.config_push import sealed_json
from mailsite.bundle import File, compose
from mailsite.loader import load_platform
from mailsite.model import CLIENT_ROLES, Platform, Role
from mailsite.records import dkim_keys, static_records

from .conftest import ROOT, live_config
from .graph import (
    CLOUD_INIT,
    COMMAND,
    DNS_RECORD,
    DOMAIN,
    MARK,
    PASSWORD,
    PRIVATE_KEY,
    VOLUME,
    Graph,
    Registration,
    UnknownResource,
    build,
)

CLUSTERS = (
    Role.RSPAMD,
    Role.SMTP_OUT,
    Role.MAILDROP,
    Role.WEBMAIL,
    Role.FRONTEND,
    Role.SMTP_IN,
)


def command(graph: Graph, host: str, step: str) -> Registration:
    return graph.one(COMMAND, f"{host}-{step}")


def pairs(platform: Platform) -> Iterator[tuple[str, str]]:
    """Each member of a cluster with the one after it."""
    for role in CLUSTERS:
        yield from pairwise(host.name for host in platform.members(role))


# -- what is there ----------------------------------------------------------------------------


def test_no_name_is_given_twice(graph: Graph) -> None:
    assert graph.duplicates == []


def test_preview_and_update_register_the_same_resources(graph: Graph, preview: Graph) -> None:
    assert set(graph.registrations) == set(preview.registrations)


def test_every_member_of_a_built_tier_is_there_and_no_other_host(
    graph: Graph, platform: Platform
) -> None:
    members = {h.name for role in (*CLUSTERS, *CLIENT_ROLES) for h in platform.members(role)}
    assert {r.name for r in graph.of_type("mail:index:Host")} == members
    machines = {n for n in members if platform.hosts[n].vm is not None}
    assert {r.name for r in graph.of_type(DOMAIN)} == machines
    assert {r.name for r in graph.of_type(COMMAND)} == {
        f"{name}-{step}"
        for name in members
        for step in ("secrets", "config", "confirm")
        if step != "secrets" or compose(platform, platform.hosts[name]).secret_files
    }


def test_names_and_types_follow_one_scheme(graph: Graph, platform: Platform) -> None:
    for found in graph.registrations.values():
        if not found.custom:
            assert found.type.startswith("mail:index:")
    hosts = graph.of_type("mail:index:Host")
    owners = {
        "mail:index:MaildropPair",
        "mail:index:NginxStreams",
        "mail:index:RspamdCluster",
        "mail:index:SmtpInCluster",
        "mail:index:SmtpOutCluster",
        "mail:index:Webmail",
        *(["mail:index:Certificates"] if platform.certificates else []),
    }
    if any(platform.members(role) for role in CLIENT_ROLES):
        owners.add("mail:index:NullClients")
    assert {graph.registrations[h.parent].type for h in hosts} == owners


def test_options_of_the_program_are_not_handed_down(graph: Graph) -> None:
    for found in graph.registrations.values():
        # Cloudflare's SDK names the predecessor of its record type by itself.
        if found.type != DNS_RECORD:
            kept = f"{found.type}::{found.name}"
            assert all(urn.endswith(kept) for urn in found.aliases)
    assert not any(r.retain_on_delete for r in graph.registrations.values())


# -- order ------------------------------------------------------------------------------------


def test_each_member_waits_until_the_one_before_it_is_confirmed(
    graph: Graph, platform: Platform
) -> None:
    for first, second in pairs(platform):
        done = command(graph, first, "confirm").urn
        assert graph.reaches(command(graph, second, "config"), done)
        if platform.hosts[second].vm is not None:
            # Also what a replacement takes down: the domain and the volume that it stands on.
            assert done in graph.one(DOMAIN, second).dependencies
            assert done in graph.one(VOLUME, f"{second}-root").dependencies


def test_no_member_waits_for_the_one_after_it(graph: Graph, platform: Platform) -> None:
    for first, second in pairs(platform):
        done = command(graph, second, "confirm").urn
        assert not graph.reaches(command(graph, first, "confirm"), done)


def test_frontends_and_webmail_come_after_the_members_that_they_lead_to(
    graph: Graph, platform: Platform
) -> None:
    behind = (*platform.members(Role.SMTP_OUT), *platform.members(Role.MAILDROP))
    for leader, members in (
        (Role.FRONTEND, (*behind, *platform.members(Role.WEBMAIL))),
        (Role.WEBMAIL, behind),
    ):
        for host in platform.members(leader):
            start = command(graph, host.name, "config")
            for member in members:
                assert graph.reaches(start, command(graph, member.name, "confirm").urn)


def test_secrets_then_files_then_confirmation(graph: Graph, platform: Platform) -> None:
    for role in CLUSTERS:
        for host in platform.members(role):
            config = command(graph, host.name, "config")
            assert config.urn in command(graph, host.name, "confirm").dependencies
            names = [r.name for r in graph.of_type(COMMAND)]
            if f"{host.name}-secrets" in names:
                assert command(graph, host.name, "secrets").urn in config.dependencies
            if host.vm is not None:
                assert graph.reaches(config, graph.one(DOMAIN, host.name).urn)


def test_registration_order_is_the_rolling_order(graph: Graph, platform: Platform) -> None:
    for first, second in pairs(platform):
        assert command(graph, first, "confirm").order < command(graph, second, "config").order


def test_no_output_of_one_host_reaches_another(graph: Graph) -> None:
    for found in graph.registrations.values():
        owner = graph.owner(found)
        for key, sources in found.property_dependencies.items():
            for urn in sources:
                other = graph.owner(graph.registrations[urn])
                assert other is None or other == owner, f"{found.name}.{key} reads {other}"


def test_keys_and_policies_are_published_before_mail_is_signed(
    graphs: Callable[[str, bool], Graph],
) -> None:
    graph = graphs("prod", False)
    policies = [r for r in graph.of_type(DNS_RECORD) if r.parent.endswith("::dns-policy")]
    assert any("_domainkey" in r.name for r in policies)
    assert any(r.name.startswith("_dmarc.") for r in policies)
    pushes = [
        r
        for r in graph.of_type(COMMAND)
        if r.name.endswith("-config") and "SmtpOutCluster" in r.urn
    ]
    assert pushes
    for push in pushes:
        for record in policies:
            assert graph.reaches(push, record.urn), f"{push.name} before {record.name}"


@pytest.mark.parametrize("stage", ["service", "mx"])
def test_service_names_appear_once_every_member_is_healthy(
    graphs: Callable[[str, bool], Graph], stage: str
) -> None:
    graph = graphs("prod", False)
    records = [r for r in graph.of_type(DNS_RECORD) if r.parent.endswith(f"::dns-{stage}")]
    done = [r for r in graph.of_type(COMMAND) if r.name.endswith("-confirm")]
    assert records
    assert len(done) == len(graph.of_type("mail:index:Host"))
    for record in records:
        for member in done:
            # A server that does not answer keeps no service from anybody.
            assert graph.reaches(record, member.urn) != ("NullClients" in member.urn)


def test_the_first_client_goes_ahead_of_the_others_and_all_wait_for_smtp_out(
    graphs: Callable[[str, bool], Graph],
) -> None:
    graph, platform = graphs("prod", False), load_platform(ROOT / "sites" / "prod")
    first, *others = [h.name for role in CLIENT_ROLES for h in platform.members(role)]
    assert len(others) > 1
    for name in (first, *others):
        push = command(graph, name, "config")
        for member in platform.members(Role.SMTP_OUT):
            assert graph.reaches(push, command(graph, member.name, "confirm").urn)
        ahead = [o for o in (first, *others) if o != name]
        waits = [o for o in ahead if graph.reaches(push, command(graph, o, "confirm").urn)]
        assert waits == ([] if name == first else [first])


def test_the_mx_comes_last_of_all_records(graphs: Callable[[str, bool], Graph]) -> None:
    graph = graphs("prod", False)
    last = [r for r in graph.of_type(DNS_RECORD) if r.parent.endswith("::dns-mx")]
    others = [r for r in graph.of_type(DNS_RECORD) if r not in last]
    assert len(last) > 1
    for record in last:
        assert record.inputs["type"] == "MX"
        assert all(graph.reaches(record, other.urn) for other in others)


def test_clusters_change_side_by_side(graph: Graph, platform: Platform) -> None:
    """But for frontends and webmail none waits for another: mail flows without a spam filter."""
    apart = (Role.RSPAMD, Role.SMTP_OUT, Role.SMTP_IN, Role.MAILDROP)
    for role in apart:
        start = command(graph, platform.members(role)[0].name, "config")
        for other in (o for o in apart if o is not role):
            for member in platform.members(other):
                if Role.CERTIFICATES not in member.roles:
                    assert not graph.reaches(start, command(graph, member.name, "config").urn)


def test_whoever_shows_the_certificate_is_configured_once_it_is_issued(
    acme: Graph, acme_site: Path
) -> None:
    """The first holder suffices, and machines are made meanwhile."""
    graph, platform = acme, load_platform(acme_site)
    first, second = (h.name for h in platform.members(Role.CERTIFICATES))
    issued = command(graph, first, "confirm").urn
    for role in (Role.SMTP_OUT, Role.SMTP_IN, Role.MAILDROP):
        members = platform.members(role)
        assert not graph.reaches(graph.one(DOMAIN, members[0].name), issued)
        for member in members:
            push = command(graph, member.name, "secrets")
            assert graph.reaches(push, issued)
            assert not graph.reaches(push, command(graph, second, "config").urn)


def test_no_dependency_is_circular(graph: Graph) -> None:
    for found in graph.registrations.values():
        assert not any(
            graph.reaches(graph.registrations[urn], found.urn)
            for urn in found.dependencies
            if urn in graph.registrations
        )


def test_the_holders_belong_to_the_certificates_and_end_before_the_other_filters(
    acme: Graph, acme_site: Path
) -> None:
    for host in load_platform(acme_site).members(Role.CERTIFICATES):
        found = acme.one("mail:index:Host", host.name)
        assert acme.registrations[found.parent].type == "mail:index:Certificates"
        stdin = command(acme, host.name, "secrets").inputs["stdin"]
        assert f"{MARK} token" in stdin
        assert f"OPENSSH {MARK} {host.name}-holder-key" in stdin


def test_a_host_that_becomes_a_holder_or_ends_to_be_one_keeps_all_its_resources(
    acme: Graph, acme_site: Path, graphs: Callable[[str, bool], Graph]
) -> None:
    given = graphs("example", False)
    for before, after in ((given, acme), (acme, given)):
        for host in load_platform(acme_site).members(Role.CERTIFICATES):
            known = {
                urn: found.type
                for found in after.registrations.values()
                if after.owner(found) == host.name
                for urn in found.aliases
            }
            old = [r for r in before.registrations.values() if before.owner(r) == host.name]
            assert {DOMAIN, VOLUME, COMMAND} <= {r.type for r in old}
            for registration in old:
                assert registration.urn not in after.registrations
                assert known[registration.urn] == registration.type


# -- providers --------------------------------------------------------------------------------


def test_every_libvirt_resource_is_on_the_hypervisor_of_its_host(
    graph: Graph, platform: Platform
) -> None:
    found = [r for r in graph.registrations.values() if r.type.startswith("libvirt:")]
    assert found
    for resource in found:
        owner = graph.owner(resource)
        vm = platform.hosts[owner].vm if owner is not None else None
        wanted = vm.hypervisor if vm is not None else resource.name.partition("-debian-13-")[0]
        assert f"pulumi:providers:libvirt::{wanted}::" in resource.provider


def test_every_provider_has_the_uri_of_its_hypervisor(graph: Graph, platform: Platform) -> None:
    for provider in graph.of_type("pulumi:providers:libvirt"):
        assert provider.inputs["uri"] == platform.hypervisors[provider.name].uri


def test_every_command_has_the_one_explicit_provider(graph: Graph) -> None:
    for found in graph.of_type(COMMAND):
        assert "pulumi:providers:command::ssh::" in found.provider


def test_only_hypervisors_with_machines_are_talked_to(graph: Graph, platform: Platform) -> None:
    used = {
        h.vm.hypervisor for role in CLUSTERS for h in platform.members(role) if h.vm is not None
    }
    assert {r.name for r in graph.of_type("pulumi:providers:libvirt")} == used


# -- machines ---------------------------------------------------------------------------------


def test_data_volumes_are_protected_and_never_resized_by_replacement(graph: Graph) -> None:
    volumes = [v for v in graph.of_type(VOLUME) if v.name.endswith("-data")]
    assert len(volumes) == len(graph.of_type(DOMAIN))
    for volume in volumes:
        assert volume.protect
        assert {"size", "source", "baseVolumeId"} <= set(volume.ignore_changes)
        assert "baseVolumeId" not in volume.inputs


def test_nothing_else_is_protected(graph: Graph) -> None:
    protected = {r.name for r in graph.registrations.values() if r.protect}
    assert protected == {f"{d.name}-data" for d in graph.of_type(DOMAIN)}


def test_first_boot_is_frozen(graph: Graph) -> None:
    for disk in graph.of_type(CLOUD_INIT):
        assert set(disk.ignore_changes) == {"userData", "metaData", "networkConfig"}
    for domain in graph.of_type(DOMAIN):
        assert not domain.ignore_changes  # its disks change only where it is built anew


def test_another_deploy_key_builds_no_machine_anew(graph: Graph, site: str) -> None:
    after = build(live_config(site, deployPublicKey="ssh-ed25519 " + "AAAA" * 17))

    def heeded(found: Registration) -> dict[str, Any]:
        return {k: v for k, v in found.inputs.items() if k not in found.ignore_changes}

    for token in (DOMAIN, VOLUME, CLOUD_INIT):
        for found in after.of_type(token):
            assert heeded(found) == heeded(graph.registrations[found.urn])
    for disk in after.of_type(CLOUD_INIT):
        assert disk.inputs["userData"] != graph.registrations[disk.urn].inputs["userData"]


def test_a_new_address_is_a_new_root_volume_and_a_new_first_boot(
    edited: Callable[..., Graph], graphs: Callable[[str, bool], Graph]
) -> None:
    moved = "out1.hosts.example.org"

    def move(data: Any) -> None:
        data["hosts"][moved]["interfaces"][0]["ipv4"] = "198.51.100.50"

    before, after = graphs("example", False), edited("example", "topology.yaml", move)

    def disks(graph: Graph) -> dict[str, str]:
        """Disks by resource name: the names that they have on the hypervisor."""
        found = (*graph.of_type(VOLUME), *graph.of_type(CLOUD_INIT))
        return {r.name: r.inputs["name"] for r in found}

    old, new = disks(before), disks(after)
    changed = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
    inits = {name for name in changed if name.startswith(f"{moved}-init-")}
    assert changed == {f"{moved}-root", *inits}
    assert len(inits) == 2  # a new resource: one that is replaced keeps what is ignored
    [disk] = [d for d in after.of_type(CLOUD_INIT) if d.name in inits]
    assert "198.51.100.50/26" in disk.inputs["networkConfig"]
    assert after.one(DOMAIN, moved).inputs["cloudinit"] == f"{disk.name}-id"
    assert before.one(DOMAIN, moved).inputs["disks"] == after.one(DOMAIN, moved).inputs["disks"]


def test_domains_start_with_their_hypervisor_and_have_the_size_of_the_site_data(
    graph: Graph, platform: Platform
) -> None:
    for domain in graph.of_type(DOMAIN):
        vm = platform.hosts[domain.name].vm
        assert vm is not None
        assert (domain.inputs["name"], domain.inputs["autostart"]) == (domain.name, True)
        assert domain.inputs["running"] is True
        assert (domain.inputs["memory"], domain.inputs["vcpu"]) == (vm.memory_mib, vm.cpus)
        assert [d["volumeId"] for d in domain.inputs["disks"]] == [
            f"{domain.name}-root-id",
            f"{domain.name}-data-id",
        ]


def test_interfaces_are_in_the_bridges_of_their_networks(graph: Graph, platform: Platform) -> None:
    for domain in graph.of_type(DOMAIN):
        bridges = [
            platform.network_of(leg).bridge for leg in platform.hosts[domain.name].interfaces
        ]
        found = domain.inputs["networkInterfaces"]
        assert [leg["bridge"] for leg in found] == bridges
        assert not any(leg.get("waitForLease") for leg in found)


def test_a_new_image_is_a_new_volume(edited: Callable[..., Graph], graphs: Any) -> None:
    def newer(data: Any) -> None:
        for hypervisor in data["hypervisors"].values():
            hypervisor["image"] = "https://images.example.org/debian-13-20261101.qcow2"

    def images(graph: Graph) -> set[str]:
        return {v.name for v in graph.of_type(VOLUME) if "-debian-13-" in v.name}

    old, new = graphs("example", False), edited("example", "topology.yaml", newer)
    assert len(images(old)) == len(images(new)) == 2
    assert not images(old) & images(new)


# -- pushes -----------------------------------------------------------------------------------


def test_nothing_in_a_command_can_run_at_the_wrong_moment(graph: Graph) -> None:
    for found in graph.of_type(COMMAND):
        assert not {"delete", "triggers", "environment", "update"} & set(found.inputs)
        assert found.inputs["addPreviousOutputInEnv"] is False
        assert not found.delete_before_replace


def test_a_replaced_machine_is_pushed_to_again(graph: Graph, platform: Platform) -> None:
    for found in graph.of_type(COMMAND):
        owner = graph.owner(found)
        assert owner is not None
        if platform.hosts[owner].vm is None:
            assert found.replace_with == ()
        else:
            assert found.replace_with == (graph.one(DOMAIN, owner).urn,)


def test_hosts_are_known_by_key_and_dialled_until_they_answer(
    graph: Graph, platform: Platform
) -> None:
    for found in graph.of_type(COMMAND):
        owner = graph.owner(found)
        assert owner is not None
        host = platform.hosts[owner]
        connection = found.inputs["connection"]
        wanted = f"ssh-ed25519 {owner}-ssh-host-key" if host.vm is not None else host.ssh_host_key
        assert connection["hostKey"] == wanted
        assert connection["host"] == str(platform.internal_leg(host).ipv4)
        assert connection["user"] == host.login
        assert connection["dialErrorLimit"] == -1
        assert "agentSocketPath" not in connection


def test_the_secret_push_is_silent_and_its_document_a_secret(graph: Graph) -> None:
    found = [r for r in graph.of_type(COMMAND) if r.name.endswith("-secrets")]
    assert found
    for push in found:
        assert push.inputs["logging"] == "none"
        assert "stdin" in push.secret
        assert push.inputs["create"].endswith("stage-secrets")


def test_the_public_document_is_plain_and_known_in_a_first_preview(
    preview: Graph, platform: Platform
) -> None:
    for push in preview.of_type(COMMAND):
        if push.name.endswith("-config"):
            owner = preview.owner(push)
            assert owner is not None
            assert "stdin" not in push.secret | push.unknown
            assert push.inputs["stdin"] == compose(platform, platform.hosts[owner]).public_json()


def test_the_push_names_the_digest_of_the_secrets_that_it_goes_with(graph: Graph) -> None:
    for push in graph.of_type(COMMAND):
        if push.name.endswith("-secrets"):
            config = command(graph, push.name.removesuffix("-secrets"), "config")
            digest = json.loads(push.inputs["stdin"])["digest"]
            assert config.inputs["create"].endswith(f"mail-agent apply --secrets {digest}")
            assert "create" not in config.secret


def test_the_confirmation_names_the_document(graph: Graph) -> None:
    for push in graph.of_type(COMMAND):
        if push.name.endswith("-confirm"):
            config = command(graph, push.name.removesuffix("-confirm"), "config")
            public = hashlib.sha256(config.inputs["stdin"].encode()).hexdigest()
            assert push.inputs["stdin"] == public


def test_a_digest_needs_the_key_and_the_content() -> None:
    def digest(content: str, key: str) -> str:
        return str(json.loads(sealed_json("h", {"/x": File(content)}, key))["digest"])

    assert digest("a", "k") == digest("a", "k")
    assert len({digest("a", "k"), digest("b", "k"), digest("a", "l")}) == 3
    assert digest("a", "k") not in (hashlib.sha256(b"a").hexdigest(), "")


# -- secrets ----------------------------------------------------------------------------------


def test_no_secret_is_visible_in_any_input(graph: Graph) -> None:
    for found in graph.registrations.values():
        assert MARK not in found.visible, found.urn


def test_the_marked_secrets_do_arrive_where_they_are_needed(
    graph: Graph, platform: Platform
) -> None:
    given = platform.certificates is None
    certificate = f"-----BEGIN KEY----- {MARK}" if given else f"OPENSSH {MARK}"
    wanted = {
        Role.SMTP_OUT: (f"PEM {MARK} dkim-", certificate, "{BLF-CRYPT}$2a$10$"),
        Role.SMTP_IN: (f"{MARK} srs-", certificate),
        Role.RSPAMD: (f"requirepass {MARK} redis-password", 'password = \\"$1$'),
        Role.WEBMAIL: (f"'{MARK} roundcube-des-key'", f"{MARK} sasl-", certificate),
        Role.FRONTEND: (certificate,),
    }
    for role, texts in wanted.items():
        for host in platform.members(role):
            document = command(graph, host.name, "secrets").inputs["stdin"]
            for text in texts:
                assert text in document, f"{host.name}: {text}"
    for disk in graph.of_type(CLOUD_INIT):
        assert f"OPENSSH {MARK}" in disk.inputs["userData"]
        assert "userData" in disk.secret


def test_no_secret_is_logged(graph: Graph, preview: Graph) -> None:
    assert not any(MARK in line for line in (*graph.log, *preview.log))


def test_every_generated_secret_is_marked_as_one_by_its_type(graph: Graph) -> None:
    for password in graph.of_type(PASSWORD):
        assert {"result", "bcryptHash"} <= password.additional_secret_outputs
    for key in graph.of_type(PRIVATE_KEY):
        assert {"privateKeyPem", "privateKeyOpenssh"} <= key.additional_secret_outputs


def test_passwords_are_a_secret_output_and_no_other_output_shows_a_secret(graph: Graph) -> None:
    assert graph.secret_outputs == {"sasl_passwords", "mailbox_passwords"}
    assert MARK not in graph.outputs["zones"] + graph.outputs["reverse_zones"]


def test_every_domain_key_and_login_is_generated_where_none_is_given(
    graph: Graph, platform: Platform
) -> None:
    wanted = {f"dkim-{d.name}-{k.selector}" for d, k in dkim_keys(platform)}
    assert wanted <= {r.name for r in graph.of_type(PRIVATE_KEY)}
    for domain, key in dkim_keys(platform):
        found = graph.one(PRIVATE_KEY, f"dkim-{domain.name}-{key.selector}")
        assert (found.inputs["algorithm"], found.inputs["rsaBits"]) == ("RSA", key.bits)
    logins = {f"sasl-{u.name}" for u in platform.sasl_users.values() if u.password_hash is None}
    boxes = {f"mailbox-{b.name}" for b in platform.mailboxes.values() if b.password_hash is None}
    inbound = {f"srs-{key}" for key in platform.inbound.srs_keys} | {
        "pairsync-secret",
        "redis-password",
        "rspamd-controller-password",
        "rspamd-controller-hash-salt",
        "roundcube-des-key",
    }
    assert {r.name for r in graph.of_type(PASSWORD)} == {*logins, *boxes, *inbound, "digest-key"}
    assert set(graph.outputs["sasl_passwords"]) == {n.removeprefix("sasl-") for n in logins}
    assert set(graph.outputs["mailbox_passwords"]) == {n.removeprefix("mailbox-") for n in boxes}


# -- DNS --------------------------------------------------------------------------------------


def test_every_record_is_published_as_it_is_written(
    graphs: Callable[[str, bool], Graph], platform: Platform, site: str
) -> None:
    if site != "prod":
        assert graphs(site, False).of_type(DNS_RECORD) == ()
        return
    zone_ids = live_config(site)["zoneIds"]
    found = {r.name: r.inputs for r in graphs(site, False).of_type(DNS_RECORD)}
    expected = {r.key: r for r in static_records(platform)}
    extra = set(found) - set(expected)
    assert set(expected) <= set(found)
    assert all("._domainkey." in name for name in extra)
    assert len(extra) == len(list(dkim_keys(platform)))
    for key, record in expected.items():
        inputs = found[key]
        assert inputs["zoneId"] == zone_ids[record.zone]
        assert (inputs["name"], inputs["type"]) == (record.name, record.type)
        assert (inputs["content"], inputs["ttl"]) == (record.wire, record.ttl)
        assert inputs["comment"] == record.why
        assert inputs["proxied"] is False


def test_published_dkim_keys_are_the_public_halves(graphs: Callable[[str, bool], Graph]) -> None:
    for record in graphs("prod", False).of_type(DNS_RECORD):
        if "._domainkey." in record.name:
            assert record.inputs["content"].startswith('"v=DKIM1; k=rsa; p=')
            assert "BEGIN" not in record.inputs["content"]
            assert "content" not in record.secret


def test_cnames_are_never_beside_what_they_replace(graphs: Callable[[str, bool], Graph]) -> None:
    for record in graphs("prod", False).of_type(DNS_RECORD):
        assert record.delete_before_replace == (record.inputs["type"] == "CNAME")


def test_zones_are_an_output_for_people_whose_dns_is_elsewhere(
    graph: Graph, platform: Platform
) -> None:
    text = graph.outputs["zones"]
    for record in static_records(platform):
        assert f"{record.name}.\t" in text
    assert text.count("v=DKIM1; k=rsa; p=") == len(list(dkim_keys(platform)))
    assert "in-addr.arpa." in graph.outputs["reverse_zones"]


def test_stages_are_published_each_by_its_own_component(
    graphs: Callable[[str, bool], Graph], platform: Platform, site: str
) -> None:
    records = graphs(site, False).of_type(DNS_RECORD)
    parents = {r.name: r.parent.rpartition("::")[2] for r in records}
    expected = {r.key: f"dns-{r.stage}" for r in static_records(platform)}
    if site == "prod":
        assert {key: parents[key] for key in expected} == expected
    else:
        assert not parents


# -- changes: what the engine would see -------------------------------------------------------


def inputs_of(graph: Graph, host: str) -> dict[str, Any]:
    """Everything of one host by URN, but what site data says of other hosts in its files."""
    return {
        r.urn: {k: v for k, v in r.inputs.items() if k not in ("stdin", "create")}
        for r in graph.registrations.values()
        if graph.owner(r) == host
    }


def add_member(data: Any) -> None:
    host = json.loads(json.dumps(data["hosts"]["out2.hosts.example.org"]))
    host["interfaces"][0] |= {"ipv4": "198.51.100.90", "ipv6": "2001:db8:2::90"}
    rows = list(data["hosts"].items())
    data["hosts"].clear()
    for name, value in [("out0.hosts.example.org", host), *rows]:
        data["hosts"][name] = value  # in front: the order of all others shifts


def drop_member(data: Any) -> None:
    del data["hosts"]["out2.hosts.example.org"]


@pytest.mark.parametrize("change", [add_member, drop_member])
def test_a_cluster_that_grows_or_shrinks_leaves_its_other_members_alone(
    edited: Callable[..., Graph],
    graphs: Callable[[str, bool], Graph],
    change: Callable[[Any], None],
) -> None:
    before, after = graphs("example", False), edited("example", "topology.yaml", change)
    stay = {r.name for r in before.of_type("mail:index:Host")} & {
        r.name for r in after.of_type("mail:index:Host")
    }
    assert "out1.hosts.example.org" in stay
    assert before.registrations.keys() != after.registrations.keys()
    for host in stay:
        assert inputs_of(before, host) == inputs_of(after, host)
    urns = {r.urn for r in before.registrations.values() if before.owner(r) in stay}
    assert urns <= after.registrations.keys()


def test_more_memory_touches_that_machine_alone(
    edited: Callable[..., Graph], graphs: Callable[[str, bool], Graph]
) -> None:
    def more(data: Any) -> None:
        data["hosts"]["out1.hosts.example.org"]["vm"]["memory_mib"] = 8192

    before, after = graphs("example", False), edited("example", "topology.yaml", more)
    changed = {
        urn
        for urn, found in after.registrations.items()
        if found.inputs != before.registrations[urn].inputs
    }
    assert changed == {before.one(DOMAIN, "out1.hosts.example.org").urn}


def test_a_given_password_hash_is_used_as_it_is(edited: Callable[..., Graph]) -> None:
    hashed = "{BLF-CRYPT}$2y$05$" + MARK

    def given(data: Any) -> None:
        data["alice"]["password_hash"] = hashed

    graph = edited("example", "sasl_users.yaml", given)
    assert "sasl-alice" not in {r.name for r in graph.of_type(PASSWORD)}
    assert hashed in command(graph, "out1.hosts.example.org", "secrets").inputs["stdin"]
    assert all(MARK not in r.visible for r in graph.registrations.values())


# -- tests of the test ------------------------------------------------------------------------


def test_the_harness_sees_a_secret_that_lies_open(edited: Callable[..., Graph]) -> None:
    def leak(data: Any) -> None:
        data["hypervisors"]["anvil"]["uri"] = f"qemu+ssh://root@{MARK}.example.org/system"

    graph = edited("example", "topology.yaml", leak)
    assert [r.name for r in graph.registrations.values() if MARK in r.visible] == ["anvil"]


def test_the_harness_sees_a_name_that_is_given_twice() -> None:
    def twice() -> None:
        for _ in range(2):
            pulumi.ComponentResource("mail:index:Host", "same")

    assert build(live_config("example"), program=twice).duplicates == [
        "urn:pulumi:test::mail::mail:index:Host::same"
    ]


def test_the_harness_sees_an_output_that_goes_from_one_host_to_another() -> None:
    def across() -> None:
        provider = pulumi_libvirt.Provider("kvm")
        previous: pulumi.Input[str] = "first"
        for name in ("a", "b"):
            host = pulumi.ComponentResource("mail:index:Host", name)
            options = pulumi.ResourceOptions(parent=host, provider=provider)
            previous = pulumi_libvirt.Volume(name, name=previous, opts=options).id

    graph = build(live_config("example"), program=across)
    with pytest.raises(AssertionError, match=r"b\.name reads a"):
        test_no_output_of_one_host_reaches_another(graph)


def test_the_harness_refuses_a_resource_that_it_knows_nothing_of() -> None:
    def strange() -> None:
        pulumi.CustomResource("strange:index:Thing", "x", {})

    with pytest.raises(UnknownResource):
        build(live_config("example"), program=strange)
