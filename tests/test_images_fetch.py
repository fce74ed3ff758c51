"""Fetching a picture: from real servers on this machine, and never from what only this machine can reach."""

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines.errors import StageError
from pipelines.images import connection
from pipelines.images.fetch import Fetching, Host, fetch
from tests.picture_bytes import known, saved

PARAM = "messages[0].content[0].image_url.url"
PICTURE = saved(known(), "PNG")
PEM = Path(__file__).parent / "pictures_test.pem"
Answer = Callable[[socket.socket, str], None]


def answer(body: bytes = PICTURE, status: str = "200 OK", **headers: str | None) -> bytes:
    fields: dict[str, str | None] = {"content-type": "image/png", "content-length": str(len(body))}
    fields |= {key.replace("_", "-"): value for key, value in headers.items()}
    lines = "".join(f"{key}: {value}\r\n" for key, value in fields.items() if value is not None)
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + body


def redirect(to: str, status: str = "302 Found") -> bytes:
    return answer(b"", status, location=to)


class Server:
    """Answers each request by its path; keeps what it was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, bytes | Answer] = {}
        self.requests: list[str] = []
        self.tls: ssl.SSLContext | None = None
        self.closing = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(peer,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, peer: socket.socket) -> None:
        with peer:
            try:
                peer.settimeout(30)
                if self.tls:
                    peer = self.tls.wrap_socket(peer, server_side=True)
                request = b""
                while b"\r\n\r\n" not in request:
                    piece = peer.recv(65536)
                    if not piece:
                        return
                    request += piece
                self.requests.append(request.decode("latin-1"))
                given = self.answers[request.split(b" ")[1].decode("latin-1")]
                if isinstance(given, bytes):
                    peer.sendall(given)
                else:
                    given(peer, request.decode("latin-1"))
            except OSError:
                pass
            finally:
                peer.close()

    def drip(self, start: bytes, piece: bytes) -> Answer:
        def dripping(peer: socket.socket, _: str) -> None:
            peer.sendall(start)
            while not self.closing.wait(0.02):
                peer.sendall(piece)

        return dripping

    def close(self) -> None:
        self.closing.set()
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for thread in self._threads:
            thread.join(30)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def settings(server: Server, **more: object) -> Fetching:
    return Fetching(hosts=(Host("localhost", server.port), Host("127.0.0.1", server.port)), **more)  # type: ignore[arg-type]


def fetched(server: Server, path: str = "/a.png", **more: object) -> bytes:
    return fetch(f"http://localhost:{server.port}{path}", param=PARAM, fetching=settings(server, **more))


def refusal(url: str, fetching: Fetching | None = None) -> str:
    with pytest.raises(StageError) as error:
        fetch(url, param=PARAM, fetching=fetching or Fetching(seconds=5))
    assert (error.value.code, error.value.param) == ("invalid_image", PARAM)
    message = error.value.message
    assert message.startswith(f"'{PARAM}' ")
    assert message.endswith(".")
    assert "127.0.0.1" not in message
    return message


def refused(server: Server, path: str = "/a.png", **more: object) -> str:
    return refusal(f"http://localhost:{server.port}{path}", settings(server, **more))


def resolver(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> list[tuple[str, int]]:
    """Every name has these addresses; the list is of what was asked."""
    asked = []

    def getaddrinfo(host: str, port: int, **_: object) -> list[object]:
        asked.append((host, port))
        families = [(socket.AF_INET6 if ":" in a else socket.AF_INET, a) for a in addresses]
        return [
            (family, socket.SOCK_STREAM, 6, "", (a, port, 0, 0) if family == socket.AF_INET6 else (a, port))
            for family, a in families
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


@pytest.fixture
def nobody_connects(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(self: socket.socket, address: object) -> None:
        raise AssertionError(f"connected to {address}")

    monkeypatch.setattr(socket.socket, "connect", connect)


def test_a_picture_is_fetched(server):
    server.answers["/a.png"] = answer()
    assert fetched(server) == PICTURE
    (request,) = server.requests
    assert request.startswith("GET /a.png HTTP/1.1\r\n")
    assert f"\r\nHost: localhost:{server.port}\r\n" in request
    assert "\r\nAccept-Encoding: identity\r\n" in request
    assert "cookie" not in request.lower()


@pytest.mark.parametrize(
    "given",
    [
        answer(content_type="image/jpeg"),  # the bytes decide
        answer(content_type="image/png; charset=binary"),
        answer(content_type="application/octet-stream"),
        answer(content_type=None),
        answer(content_encoding="identity"),
        answer(content_length=None),
        answer(
            b"".join(
                b"%x;x=y\r\n%b\r\n" % (len(PICTURE[at : at + 7]), PICTURE[at : at + 7])
                for at in range(0, len(PICTURE), 7)
            )
            + b"0\r\nTrailer: x\r\n\r\n",
            content_length=None,
            transfer_encoding="chunked",
        ),
        b"HTTP/1.1 100 Continue\r\n\r\n" + answer(),
        b"HTTP/1.0 200 OK\r\n\r\n" + PICTURE,
    ],
)
def test_servers_answer_in_many_ways(server, given):
    server.answers["/a.png"] = given
    assert fetched(server) == PICTURE


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (answer(status="404 Not Found"), "status 404"),
        (answer(status="500 secret"), "status 500"),
        (answer(b"", "204 No Content"), "status 204"),
        (answer(status="206 Partial Content"), "status 206"),
        (answer(b"", "304 Not Modified"), "status 304"),
        (answer(content_type="text/html"), "leads to 'text/html', which is no picture"),
        (answer(content_type="image/svg+xml"), "'image/svg+xml'"),
        (answer(content_type="text/plain; image/png"), "'text/plain'"),
        (answer(content_encoding="gzip"), "compresses"),
        (answer(content_encoding="br"), "compresses"),
        (answer(content_length=str(len(PICTURE) + 1)), "broke off"),
        (answer(b"ff\r\nabc", content_length=None, transfer_encoding="chunked"), "broke off"),
        (answer(b"zz\r\nabc", content_length=None, transfer_encoding="chunked"), "broke off"),
        (b"", "broke off"),
        (b"SSH-2.0-OpenSSH\r\n", "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 1000 + b"\r\n", "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000, "does not speak HTTP"),
        (answer(b"", "302 Found"), "redirects without saying where to"),
    ],
)
def test_what_is_no_picture_is_refused(server, given, problem):
    server.answers["/a.png"] = given
    message = refused(server, seconds=10)
    assert problem in message
    assert "secret" not in message


def test_the_size_is_capped_before_and_while_it_comes(server):
    server.answers["/a.png"] = answer()
    server.answers["/unsaid.png"] = answer(content_length=None)
    server.answers["/endless.png"] = server.drip(answer(b"", content_length=None), bytes(100_000))
    assert fetched(server, "/a.png", max_bytes=len(PICTURE)) == PICTURE
    assert fetched(server, "/unsaid.png", max_bytes=len(PICTURE)) == PICTURE
    for path in ("/a.png", "/unsaid.png"):
        assert f"larger than the {len(PICTURE) - 1} bytes" in refused(server, path, max_bytes=len(PICTURE) - 1)
    assert "larger than" in refused(server, "/endless.png", max_bytes=1_000_000, seconds=30)
    server.answers["/promised.png"] = answer(content_length=str(10**15))
    assert "larger than" in refused(server, "/promised.png")


@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\nx: ", answer(b"", content_length=None)])
def test_a_server_that_drips_is_left(server, start):
    server.answers["/a.png"] = server.drip(start, b"1")
    assert "could not be fetched within 0.5 s" in refused(server, seconds=0.5)


def test_a_server_that_says_nothing_is_left(server):
    server.answers["/a.png"] = lambda peer, _: server.closing.wait(30)
    assert "within 0.3 s" in refused(server, seconds=0.3)
    server.answers["/b.png"] = server.drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n")
    assert "within 0.3 s" in refused(server, "/b.png", seconds=0.3)


def test_a_resolver_that_hangs_is_left(monkeypatch):
    end = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: end.wait(30) and [])
    assert "within 0.2 s" in refusal("http://example.com/a.png", Fetching(seconds=0.2))
    end.set()


def test_no_more_than_so_many_wait_for_a_resolver(monkeypatch):
    end = threading.Event()
    monkeypatch.setattr(connection, "_resolving", threading.BoundedSemaphore(1))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: end.wait(30) and [])
    before = threading.active_count()
    for _ in range(3):
        assert "within 0.1 s" in refusal("http://example.com/a.png", Fetching(seconds=0.1))
    assert threading.active_count() <= before + 1
    end.set()
    deadline = time.monotonic() + 30
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "has no address" in refusal("http://example.com/a.png", Fetching(seconds=5))


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/a.png",
        "http://localhost/a.png",
        "http://localhost./a.png",
        "https://127.0.0.1/a.png",
        "http://2130706433/",
        "http://0x7f000001/",
        "http://0177.0.0.1/",
        "http://127.1/",
        "http://0/",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[::ffff:a9fe:a9fe]/",
        "http://169.254.169.254/latest/meta-data/",
        "http://10.0.0.1/",
        "http://192.168.0.1/",
        "http://172.16.0.1/",
        "http://100.64.0.1/",
        "http://0.0.0.0/",
        "http://224.0.0.1/",
        "http://１２７.0.0.1/",
        "http://①②⑦.0.0.1/",
        "http://[fd00::1]/",
        "http://[fe80::1]/",
    ],
)
def test_what_only_this_machine_can_reach_is_refused(url, nobody_connects):
    message = refusal(url)
    assert "not public" in message or "no address" in message
    assert "169.254" not in message


@pytest.mark.parametrize(
    "addresses", [("10.0.0.1",), ("8.8.8.8", "127.0.0.1"), ("127.0.0.1", "8.8.8.8"), ("2600::1", "::1"), ("fe80::1%1",)]
)
def test_a_name_with_one_such_address_is_refused(addresses, monkeypatch, nobody_connects):
    asked = resolver(monkeypatch, *addresses)
    assert "not public" in refusal("http://pictures.test/a.png")
    assert asked == [("pictures.test", 80)]


def test_a_host_on_the_list_may_be_private_but_not_metadata(monkeypatch, nobody_connects):
    resolver(monkeypatch, "169.254.169.254")
    assert "not public" in refusal("http://pictures.test/", Fetching(hosts=(Host("pictures.test"),)))


def test_the_connection_goes_to_the_address_that_was_checked(server, monkeypatch):
    """A second answer of the resolver would not be asked for."""
    asked = resolver(monkeypatch, "127.0.0.1")
    server.answers["/a.png"] = answer()
    url = f"http://pictures.test:{server.port}/a.png"
    fetching = Fetching(hosts=(Host("pictures.test", server.port),))
    assert fetch(url, param=PARAM, fetching=fetching) == PICTURE
    assert asked == [("pictures.test", server.port)]
    assert f"Host: pictures.test:{server.port}\r\n" in server.requests[0]


def test_the_next_address_is_tried(server, monkeypatch):
    resolver(monkeypatch, "127.0.0.2", "127.0.0.1")
    server.answers["/a.png"] = answer()
    url = f"http://pictures.test:{server.port}/a.png"
    assert fetch(url, param=PARAM, fetching=Fetching(hosts=(Host("pictures.test", server.port),))) == PICTURE


def test_nobody_there(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    message = refusal(f"http://localhost:{port}/a.png", Fetching(hosts=(Host("localhost", port),)))
    assert "does not answer" in message
    assert "has no address" in refusal("http://nobody.invalid/a.png")


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_redirects_are_followed(server, status):
    server.answers["/a.png"] = redirect("b.png?x=1", status)
    server.answers["/b.png?x=1"] = redirect(f"http://127.0.0.1:{server.port}/c.png", status)
    server.answers["/c.png"] = redirect("/d.png", status)
    server.answers["/d.png"] = answer()
    assert fetched(server) == PICTURE
    assert [request.split(" ")[1] for request in server.requests] == ["/a.png", "/b.png?x=1", "/c.png", "/d.png"]


def test_redirects_end(server):
    server.answers["/a.png"] = redirect("/a.png")
    assert "redirects more than 3 times" in refused(server)
    assert len(server.requests) == 4


@pytest.mark.parametrize(
    ("to", "problem"),
    [
        ("http://169.254.169.254/latest/", "not on this server's list"),
        ("http://localhost:1/", "not on this server's list"),
        ("file:///etc/passwd", "neither http nor https"),
        ("data:image/png;base64,AAAA", "neither http nor https"),
        ("gopher://localhost/", "neither http nor https"),
        ("http://user:word@localhost/", "user name or password"),
        ("http://[", "well-formed"),
        ("/a b", "spaces"),
    ],
)
def test_every_redirect_is_checked(server, to, problem):
    server.answers["/a.png"] = redirect(to)
    assert problem in refused(server)


def test_a_redirect_to_an_address_that_is_not_public(server, monkeypatch):
    """From a public host, as far as the check can tell: only its answer is this machine's."""
    monkeypatch.setattr("pipelines.images.fetch.allowed", lambda address, listed: address == "192.0.2.1")
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, port, **more: (
            [(2, 1, 6, "", ("192.0.2.1", port))] if host == "pictures.test" else real(host, port, **more)
        ),
    )
    connect = socket.socket.connect
    seen = []

    def connected(self: socket.socket, address: tuple[str, int]) -> None:
        seen.append(address)
        connect(self, ("127.0.0.1", server.port))

    monkeypatch.setattr(socket.socket, "connect", connected)
    server.answers["/a.png"] = redirect("http://localhost/secret.png")
    assert "not public" in refusal("http://pictures.test/a.png")
    assert seen == [("192.0.2.1", 80)]


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("http://user@example.com/", "user name or password"),
        ("http://user:word@example.com/", "user name or password"),
        ("http://@example.com/", "user name or password"),
        ("http://example.com:8080/", "a port other than 80 and 443"),
        ("http://example.com:22/", "a port other than 80 and 443"),
        ("http://example.com:0/", "well-formed"),
        ("http://example.com:99999/", "well-formed"),
        ("http://example.com:x/", "well-formed"),
        ("http://", "well-formed"),
        ("http:///a.png", "well-formed"),
        ("http://:80/", "well-formed"),
        ("http://[::1/", "well-formed"),
        ("http://[fe80::1%25eth0]/", "well-formed"),
        ("http://exa mple.com/", "spaces"),
        ("http://example.com/\r\nX: y", "spaces, control"),
        ("http://example.com\\@127.0.0.1/", "backslashes"),
        ("http://exa_mple!.com/", "well-formed"),
        ("http://" + "a" * 70 + ".com/", "well-formed"),
        ("http://" + "a." * 200 + "com/", "well-formed"),
        ("http://example.com/" + "a" * 9000, "more than 8192 characters"),
        ("http:example.com", "well-formed"),
    ],
)
def test_a_url_that_is_none(url, problem, nobody_connects):
    assert problem in refusal(url)


def test_a_path_is_written_as_http_takes_it(server):
    server.answers["/%C3%A9%20a?q=%C3%BC&b=[1]"] = answer()
    assert fetched(server, "/é%20a?q=ü&b=[1]#part") == PICTURE


@pytest.mark.parametrize(
    ("entry", "url", "covered"),
    [
        ("pictures.test", "http://pictures.test/", True),
        ("pictures.test", "https://PICTURES.TEST/", True),
        ("pictures.test", "https://pictures.test./", True),
        ("pictures.test", "http://pictures.test:8080/", False),
        ("pictures.test:8080", "http://pictures.test:8080/", True),
        ("pictures.test:8080", "http://pictures.test/", False),
        ("pictures.test", "http://a.pictures.test/", False),
        ("pictures.test", "http://xpictures.test/", False),
        ("*.pictures.test", "http://a.pictures.test/", True),
        ("*.pictures.test", "http://a.b.pictures.test/", True),
        ("*.pictures.test", "http://pictures.test/", False),
        ("*.pictures.test", "http://xpictures.test/", False),
        ("*.pictures.test:81", "http://a.pictures.test:81/", True),
        (" Pictures.Test , other.test", "http://other.test/", True),
        ("[fd00::1]:81", "http://[fd00::1]:81/", True),
        ("10.1.2.3", "http://10.1.2.3/", True),
    ],
)
def test_the_list_of_hosts(entry, url, covered, monkeypatch):
    """One that is covered is connected to, wherever it is; nothing else is resolved."""
    reached = []
    asked = resolver(monkeypatch, "10.1.2.3")

    def connect(self: socket.socket, address: object) -> None:
        reached.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket.socket, "connect", connect)
    fetching = Fetching.from_env({"TRIPTYCH_IMAGE_HOSTS": entry})
    message = refusal(url, fetching)
    if covered:
        assert "does not answer" in message
        assert len(reached) == 1
    else:
        assert "not on this server's list" in message
        assert (reached, asked) == ([], [])


def trusted(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    """TLS with a certificate for pictures.test, of which this machine thinks well."""
    server.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.tls.load_cert_chain(PEM)
    monkeypatch.setattr(connection, "_tls", lambda: ssl.create_default_context(cafile=str(PEM)))
    resolver(monkeypatch, "127.0.0.1")


def over_tls(server: Server, host: str = "pictures.test", **more: object) -> tuple[str, Fetching]:
    return f"https://{host}:{server.port}/a.png", Fetching(hosts=(Host(host, server.port),), **more)  # type: ignore[arg-type]


def test_a_picture_over_tls(server, monkeypatch):
    trusted(monkeypatch, server)
    server.answers["/a.png"] = answer()
    url, fetching = over_tls(server)
    assert fetch(url, param=PARAM, fetching=fetching) == PICTURE


def test_a_certificate_must_be_the_hosts_and_trusted(server, monkeypatch):
    real = connection._tls
    trusted(monkeypatch, server)
    server.answers["/a.png"] = answer()
    assert "certificate is not valid" in refusal(*over_tls(server, "other.test"))
    monkeypatch.setattr(connection, "_tls", real)
    assert "certificate is not valid" in refusal(*over_tls(server))
    assert server.requests == []


def test_https_does_not_lead_to_http(server, monkeypatch):
    trusted(monkeypatch, server)
    server.answers["/a.png"] = redirect("http://pictures.test/a.png")
    assert "redirects from https to http" in refusal(*over_tls(server))


def test_a_host_without_tls_and_one_that_is_silent(server, monkeypatch):
    resolver(monkeypatch, "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        fetching = Fetching(hosts=(Host("pictures.test", port),), seconds=0.3)
        assert "within 0.3 s" in refusal(f"https://pictures.test:{port}/", fetching)
    server.answers["/a.png"] = answer()
    message = refusal(*over_tls(server, seconds=1))
    assert "TLS" in message or "within 1 s" in message


def test_a_server_that_drips_over_tls_is_left(server, monkeypatch):
    trusted(monkeypatch, server)
    server.answers["/a.png"] = server.drip(answer(b"", content_length=None), b"1")
    assert "within 0.5 s" in refusal(*over_tls(server, seconds=0.5))


def test_proxies_of_the_environment_are_not_asked(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    server.answers["/a.png"] = answer()
    assert fetched(server) == PICTURE


def test_settings():
    assert Fetching.from_env({}) == Fetching()
    assert Fetching.from_env({"TRIPTYCH_IMAGE_FETCH": "", "TRIPTYCH_IMAGE_HOSTS": ""}) == Fetching()
    given = {
        "TRIPTYCH_IMAGE_FETCH": "off",
        "TRIPTYCH_IMAGE_HOSTS": "a.test, *.b.test:8080,",
        "TRIPTYCH_IMAGE_FETCH_MB": "1.5",
        "TRIPTYCH_IMAGE_FETCH_S": "2",
    }
    hosts = (Host("a.test"), Host(".b.test", 8080))
    assert Fetching.from_env(given) == Fetching(False, hosts, 1024 * 1536, 2.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("TRIPTYCH_IMAGE_FETCH", "yes"),
        ("TRIPTYCH_IMAGE_HOSTS", "http://a.test"),
        ("TRIPTYCH_IMAGE_HOSTS", "a.test:0"),
        ("TRIPTYCH_IMAGE_HOSTS", "a.test:99999"),
        ("TRIPTYCH_IMAGE_HOSTS", "*"),
        ("TRIPTYCH_IMAGE_HOSTS", "a.*.test"),
        ("TRIPTYCH_IMAGE_HOSTS", "a b"),
        ("TRIPTYCH_IMAGE_FETCH_MB", "0"),
        ("TRIPTYCH_IMAGE_FETCH_MB", "-1"),
        ("TRIPTYCH_IMAGE_FETCH_MB", "nan"),
        ("TRIPTYCH_IMAGE_FETCH_MB", "1025"),
        ("TRIPTYCH_IMAGE_FETCH_S", "1e9"),
        ("TRIPTYCH_IMAGE_FETCH_S", "301"),
        ("TRIPTYCH_IMAGE_FETCH_S", "ten"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(key, value):
    with pytest.raises(ValueError, match=key):
        Fetching.from_env({key: value})
