"""The mail platform, read from top to bottom as the path of a mail: out of it, and into it."""

from pathlib import Path

import pulumi
from pulumi_command import Provider

from components import secrets as given
from components.certificates import Certificates
from components.host import Access, ClusterArgs, Fleet
from components.mail_dns import MailDns, MailDnsArgs, ZoneData, unpublished
from components.maildrop import MaildropPair
from components.nginx_streams import NginxStreams
from components.null_clients import NullClients
from components.operator import clear_errors
from components.retired_hosts import RetiredHosts
from components.rspamd import RspamdCluster
from components.secrets import SecretStore, SecretStoreArgs
from components.settings import Settings
from components.smtp_in import SmtpInCluster
from components.smtp_out import SmtpOutCluster
from components.vm import Hypervisors, HypervisorsArgs
from components.webmail import Webmail
from mailsite.records import Stage, ptr_text, static_records

# Everything that can be wrong is found here, before anything is registered or contacted.
with clear_errors():
    settings = Settings.load(Path(__file__).parent)
    platform = settings.platform()
    settings.refuse_up_unless_live()
    static_records(platform)
    fleet = Fleet.plan(platform)
    given.require(fleet.secrets, settings.given)
    if own := unpublished(platform, settings.zone_ids):
        pulumi.log.info(f"Not in mail:zoneIds, so publish the output 'zones' of: {', '.join(own)}")

# What every host needs: its secrets, a machine to run on, and a way in.
machines = [host.name for host in fleet.machines]
secrets = SecretStore("secrets", SecretStoreArgs(platform, settings.given, machines, fleet.secrets))
hypervisors = Hypervisors("hypervisors", HypervisorsArgs(platform, fleet.machines))
access = Access(Provider("ssh"), settings.deploy_public_key, settings.deploy_key)
zone_data = ZoneData.of(platform, secrets)


def dns(stage: Stage, after: list[pulumi.Resource]) -> MailDns:
    return MailDns(f"dns-{stage}", MailDnsArgs(zone_data, settings.zone_ids, stage, after))


def cluster(
    after: list[pulumi.Resource], certified: list[pulumi.Resource] | None = None
) -> ClusterArgs:
    return ClusterArgs(fleet, hypervisors.carriers, secrets, access, after, certified or ())


# Receivers can look up names, keys and policies before the first mail is signed with them.
names = dns(Stage.HOST, after=[])
policy = dns(Stage.POLICY, after=[])

# Who talks to whom is proven by a certificate, which two hosts have issued before any daemon needs
# it. Machines of the other tiers are made meanwhile.
certificates = Certificates("certificates", cluster(after=names.done))
certified = certificates.issued

# What leaves and what comes in passes the spam filter. Without it mail flows on unfiltered, so
# nothing waits for it but the MX. The holders may be members, so it goes on where they end.
rspamd = RspamdCluster("rspamd", cluster(after=[*names.done, *certificates.done]))

# A user submits to a frontend, which passes the stream on to smtp-out, which signs and delivers,
# and reads mail through one, at a replica of the mailboxes, or in a browser, by way of webmail. A
# frontend is healthy only if they answer through it, so they come first.
smtp_out = SmtpOutCluster("smtp-out", cluster([*names.done, *policy.done], certified))
maildrop = MaildropPair("maildrop", cluster(names.done, certified))
webmail = Webmail("webmail", cluster(after=[*smtp_out.done, *maildrop.done]))
behind = [*smtp_out.done, *maildrop.done, *webmail.done]
frontends = NginxStreams("nginx-streams", cluster(after=behind))

# Other people's servers bring mail to smtp-in, which forwards it or leads it to the mailboxes.
smtp_in = SmtpInCluster("smtp-in", cluster([*names.done, *policy.done], certified))

# Servers, hypervisors and routers send what they have to say by smtp-out, like every other machine.
clients = NullClients("null-clients", cluster(after=[*names.done, *smtp_out.done]))

# The public names of the services lead somewhere only once there is somebody to answer; last of
# all the mail of the domains is led here.
everyone = [*certificates.done, *rspamd.done, *behind, *frontends.done, *smtp_in.done]
services = dns(Stage.SERVICE, after=everyone)
dns(Stage.MX, after=[*everyone, *services.done])

# Nobody is led to a retired machine any more: the operator gets it back as it was before us.
RetiredHosts("retired-hosts", cluster(after=[*everyone, *clients.done, *services.done]))

pulumi.export("zones", zone_data.text)
pulumi.export("reverse_zones", ptr_text(platform))
pulumi.export("sasl_passwords", pulumi.Output.secret(secrets.sasl_passwords))
pulumi.export("mailbox_passwords", pulumi.Output.secret(secrets.mailbox_passwords))
