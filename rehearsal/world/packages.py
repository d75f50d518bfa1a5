"""Debian packages that the machine of the outside world needs beside the base image.

The image builder imports this tuple. The machine starts none of these services by itself:
:mod:`rehearsal.world` writes their configuration and starts them.
"""

PACKAGES = (
    "ca-certificates",
    "knot",
    "knot-dnsutils",
    "nginx-light",
    "openssl",
    "pebble",
    "publicsuffix",
    "python3-aiosmtpd",
    "python3-authres",
    "python3-cryptography",
    "python3-dkim",
    "python3-dnspython",
    "python3-nacl",
    "python3-publicsuffix2",
    "python3-spf",
    "unbound",
)
