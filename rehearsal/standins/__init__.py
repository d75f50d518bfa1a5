"""Stand-ins for the providers that a rehearsal cannot use.

The real engine attaches to them (``PULUMI_DEBUG_PROVIDERS=name:port,...``) and runs the
unchanged program. Each one keeps to the real provider's replace table, its defaults, its ways of
refusing and the tone of its errors, so that a preview in the rehearsal says what a preview on
the real platform would say:

- :mod:`.libvirt` (pulumi-libvirt 0.5.4): a domain becomes a machine of the rehearsal;
- :mod:`.cloudflare` (pulumi-cloudflare 6): a record is served at once by a real name server;
- :mod:`.command` (pulumi-command 1.2): real ssh;
- :mod:`.random` (pulumi-random 4) and :mod:`.tls` (pulumi-tls 5): real cryptography.

:mod:`.base` has what all share, :mod:`.server` starts them.
"""
