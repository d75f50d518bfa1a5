#!/bin/sh
# Makes an existing machine ready for the mail platform: run once, as root, on that machine.
# It may be repeated. It touches nothing but what it names below.
set -eu

usage() {
    cat <<'TEXT'
usage: bootstrap.sh [--login NAME] PUBLIC_KEY

Copy the folder agent/ to the machine and run it there as root, for instance:

  scp -r agent root@machine: && ssh root@machine sh agent/bootstrap.sh "'ssh-ed25519 AAAA... me'"

It installs python3 and sudo where they are missing, and makes
  the login NAME (default: deploy), which PUBLIC_KEY may use
  /etc/sudoers.d/mail-agent             that login may run the agent as root; the agent
                                        writes what it is told, so the key is as good as root
  /usr/local/sbin/mail-agent            the agent
  /etc/systemd/system/mail-agent-recover.service   undoes an interrupted change at boot
TEXT
}

login=deploy
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help) usage; exit 0 ;;
    --login) login="${2:?--login needs a name}"; shift 2 ;;
    -*) usage >&2; exit 1 ;;
    *) break ;;
    esac
done
if [ $# -ne 1 ]; then
    usage >&2
    exit 1
fi
key="$1"
case "$key" in
ssh-ed25519\ * | ecdsa-sha2-*\ * | ssh-rsa\ * | sk-*\ *) ;;
*) echo "bootstrap.sh: '$key' is no public key; give the text of your .pub file" >&2; exit 1 ;;
esac
case "$login" in
*[!a-z0-9_-]* | [!a-z_]* | "") echo "bootstrap.sh: '$login' is no name of a login" >&2; exit 1 ;;
esac
if [ "$(id -u)" != 0 ]; then
    echo "bootstrap.sh: run it as root" >&2
    exit 1
fi
here="$(cd "$(dirname "$0")" && pwd)"

if ! command -v python3 >/dev/null || ! command -v sudo >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3 sudo
fi
if ! id "$login" >/dev/null 2>&1; then
    useradd --create-home --shell /bin/sh --comment "Mail platform deployment" "$login"
fi
home="$(getent passwd "$login" | cut -d: -f6)"
install -d -m 0700 -o "$login" -g "$login" "$home/.ssh"
if ! grep -qxF "$key" "$home/.ssh/authorized_keys" 2>/dev/null; then
    echo "$key" >>"$home/.ssh/authorized_keys"
fi
chown -h "$login:$login" "$home/.ssh/authorized_keys"
chmod 0600 "$home/.ssh/authorized_keys"

rule="$(mktemp)"
trap 'rm -f "$rule"' EXIT
echo "$login ALL=(root) NOPASSWD: /usr/local/sbin/mail-agent" >"$rule"
visudo -cqf "$rule"
install -m 0440 -o root -g root "$rule" /etc/sudoers.d/mail-agent

# An agent that a push has brought since is newer than this copy.
[ -x /usr/local/sbin/mail-agent ] || install -m 0755 "$here/mail_agent.py" /usr/local/sbin/mail-agent
install -m 0644 "$here/mail-agent-recover.service" /etc/systemd/system/mail-agent-recover.service
systemctl daemon-reload
systemctl enable --quiet mail-agent-recover.service
/usr/local/sbin/mail-agent --self-test >/dev/null
echo "ready: $login may run the agent on $(hostname)"
