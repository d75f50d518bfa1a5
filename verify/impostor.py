"""Run on a host: a server of IMAP, ManageSieve and SMTP that presents the certificate it is given.

Arguments: the file with key and chain, then for each protocol ``name:port``. What clients say
after TLS, and that they came at all, is written to standard output: one JSON object per line.
"""

from __future__ import annotations

import json
import socket
import ssl
import sys
import threading

_BEFORE = {
    "imap": [],
    "sieve": [
        (b'"IMPLEMENTATION" "impostor"\r\n"SASL" "PLAIN"\r\n"STARTTLS"\r\nOK\r\n', b"STARTTLS"),
        (b"OK\r\n", None),
    ],
    "smtp": [
        (b"220 impostor ESMTP\r\n", b"EHLO"),
        (b"250-impostor\r\n250 STARTTLS\r\n", b"STARTTLS"),
        (b"220 go on\r\n", None),
    ],
}
_AFTER = {
    "imap": b"* OK [CAPABILITY IMAP4rev1 AUTH=PLAIN] impostor\r\n",
    "sieve": b'"IMPLEMENTATION" "impostor"\r\n"SASL" "PLAIN"\r\nOK\r\n',
    "smtp": b"",
}


def serve(name: str, client: socket.socket, context: ssl.SSLContext) -> None:
    said = ""
    client.settimeout(15)
    try:
        for words, wanted in _BEFORE[name]:
            client.sendall(words)
            while wanted is not None and wanted not in client.recv(4096).upper():
                pass
        with context.wrap_socket(client, server_side=True) as stream:
            stream.sendall(_AFTER[name])
            said = stream.recv(4096).decode("utf-8", "replace")
    except OSError:
        pass  # it refuses, as it should
    finally:
        client.close()
    print(json.dumps({"protocol": name, "said": said}), flush=True)


def listen(name: str, port: int, context: ssl.SSLContext) -> None:
    with socket.create_server(("127.0.0.1", port)) as server:
        print(json.dumps({"listening": name}), flush=True)
        while True:
            client, _ = server.accept()
            threading.Thread(target=serve, args=(name, client, context), daemon=True).start()


def main() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(sys.argv[1])
    threads = []
    for word in sys.argv[2:]:
        name, _, port = word.partition(":")
        threads.append(threading.Thread(target=listen, args=(name, int(port), context)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
