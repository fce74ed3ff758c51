"""How the gateway listens: TLS with real certificates, and sentences for what cannot be used."""

import logging
import os
import resource
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import httpx
import orjson
import pytest

from gateway import listener
from gateway.settings import Settings, SettingsError
from tests.scripted import CHAT_PATH, HELLO, ScriptedBackend, Server, raw_request


def certificate(folder, name, *options):
    """Self-signed, by OpenSSL's own command."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-keyout", str(key), "-out", str(cert), *(options or ["-nodes"])]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return str(cert), str(key)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def pair(folder):
    return certificate(folder, "one")


@pytest.fixture(scope="module")
def server(pair):
    cert, key = pair
    with Server(
        ScriptedBackend(), Settings(tls_cert=cert, tls_key=key, header_timeout_s=1, write_timeout_s=1)
    ) as running:
        yield running


@pytest.fixture(scope="module")
def trusting(pair):
    return ssl.create_default_context(cafile=pair[0])


def test_an_answer_and_a_stream_over_tls(server, trusting):
    with httpx.Client(base_url=f"https://127.0.0.1:{server.port}", verify=trusting, timeout=5) as client:
        answer = client.post(CHAT_PATH, json=HELLO)
        assert answer.json()["choices"][0]["message"]["content"] == " Hello you"
        assert client.post(CHAT_PATH, json={**HELLO, "stream": True}).text.endswith("data: [DONE]\n\n")


def read_all(connection):
    data = b""
    try:
        while part := connection.recv(65536):
            data += part
    except (ConnectionResetError, ssl.SSLEOFError):
        pass
    return data


def test_plain_http_to_tls_is_closed(server, trusting):
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(raw_request(CHAT_PATH, HELLO))
        assert b"HTTP/1.1 200" not in read_all(connection)
    test_an_answer_and_a_stream_over_tls(server, trusting)


@pytest.mark.parametrize(
    ("sent", "status"),
    [(b"GET / HTTP/1.1\r\nx: ", 408), (b"GET / HTTP/1.1\r\nx: " + b"y" * 200_000, 431), (b"\0\0\r\n\r\n", 400)],
)
def test_the_bounds_hold_over_tls(server, trusting, sent, status):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as plain:
        with trusting.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
            connection.sendall(sent)
            head, _, body = read_all(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert orjson.loads(body)["error"]["message"]


def test_a_certificate_and_its_key_in_one_file(pair, folder):
    both = folder / "both.pem"
    both.write_text("".join(Path(path).read_text() for path in pair))
    listener.check_tls(Settings(tls_cert=str(both)))


def test_files_that_cannot_be_used(pair, folder):
    cert, key = pair
    _, other = certificate(folder, "two")
    locked_cert, locked = certificate(folder, "three", "-passout", "pass:secret-password")
    empty = folder / "empty"
    empty.write_text("")
    for given, why in [
        ((str(folder / "none"), key), "TRIPTYCH_TLS_CERT: .*none cannot be read: No such file"),
        ((cert, str(folder / "none")), "TRIPTYCH_TLS_KEY: .*none cannot be read: No such file"),
        ((cert, other), "TRIPTYCH_TLS_CERT and TRIPTYCH_TLS_KEY: .*the key is not the certificate's"),
        ((cert, ""), "TRIPTYCH_TLS_CERT and TRIPTYCH_TLS_KEY: .*not PEM"),
        ((str(empty), key), "TRIPTYCH_TLS_CERT and TRIPTYCH_TLS_KEY: .*not PEM"),
        ((locked_cert, locked), "TRIPTYCH_TLS_KEY: the key is encrypted"),
    ]:
        with pytest.raises(SettingsError, match=why):
            listener.check_tls(Settings(tls_cert=given[0], tls_key=given[1]))


def test_the_command_says_it_in_a_sentence(folder):
    env = {**os.environ, "TRIPTYCH_TLS_CERT": str(folder / "none"), "TRIPTYCH_PORT": "0"}
    command = [sys.executable, "-m", "gateway.cli", "serve", "--pipeline", "echo"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env, stdin=subprocess.DEVNULL)
    assert refused.returncode == 1
    assert refused.stderr.startswith("triptych: TRIPTYCH_TLS_CERT: ")
    assert len(refused.stderr.splitlines()) == 1


def test_urls():
    assert Settings().url == "http://127.0.0.1:8080"
    assert Settings(host="::1", port=1, tls_cert="c").url == "https://[::1]:1"


@pytest.mark.parametrize(
    ("host", "keys_required", "told"),
    [
        ("127.0.0.1", False, 0),
        ("localhost", False, 0),
        ("::1", False, 0),
        ("0.0.0.0", True, 0),
        ("0.0.0.0", False, 1),
        ("::", False, 1),
        ("host.example", False, 1),
    ],
)
def test_an_open_door_is_told(host, keys_required, told, caplog):
    with caplog.at_level(logging.WARNING):
        listener.warn_if_open(Settings(host=host), keys_required=keys_required)
    assert len(caplog.records) == told


def test_files_for_the_connections(caplog):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    code = (
        "import resource, logging\n"
        "from gateway.listener import raise_file_limit\n"
        "from gateway.settings import Settings\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (300, 1000))\n"
        "raise_file_limit(Settings(max_connections=500))\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))\n"
        "raise_file_limit(Settings(max_connections=5000))\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))\n"
    )
    assert limits[1] == resource.RLIM_INFINITY or limits[1] >= 1000
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == ["(756, 1000)", "(1000, 1000)"]
    assert "MAX_CONNECTIONS = 5000 needs 5256 open files, and the system allows 1000" in done.stderr
