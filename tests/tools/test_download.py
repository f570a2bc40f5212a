import shutil
import socket
import ssl
import subprocess
import threading
import time
from ipaddress import ip_address

import pytest

from metis_agent.errors import InputError
from metis_agent.tools import download as module
from metis_agent.tools.download import DownloadRules, download, is_public

local = pytest.mark.allow_hosts(["127.0.0.1"])
pytestmark = pytest.mark.usefixtures("resolver")


def rules(server, **changed):
    return DownloadRules(**{"allowed": lambda address: True, "ports": frozenset({server.port}), "seconds": 5} | changed)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "2a00:1450::1"])
def test_public_addresses(address):
    assert is_public(ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1",
        "169.254.169.254", "100.64.0.1", "100.127.255.255", "100.100.100.200", "168.63.129.16", "192.0.0.1",
        "192.0.2.1",
        "192.88.99.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1",
        "255.255.255.255", "::1", "::", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::7f00:1", "64:ff9b::7f00:1",
        "64:ff9b:1::1", "100::1", "2001::1", "2001:20::1", "2001:db8::1", "2002:7f00:1::", "3fff::1", "5f00::1",
        "fc00::1", "fd00:ec2::254", "fe80::1", "fec0::1", "ff02::1", "4000::1",
    ],
)  # fmt: skip
def test_other_addresses(address):
    assert not is_public(ip_address(address))


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/", "http://127.1/", "http://2130706433/", "http://0x7f000001/", "http://0x7f.1/",
        "http://localhost/", "http://0/", "http://[::1]/", "http://[::ffff:127.0.0.1]/",
        "http://[::ffff:7f00:1]/", "http://169.254.169.254/latest/meta-data/", "http://[fd00:ec2::254]/",
        "http://100.64.1.1/", "http://10.0.0.1/", "https://192.168.0.1/", "http://[64:ff9b::7f00:1]/",
        "http://127.0.0.1:80/", "http://127.0.0.1:443/", "HTTP://127.0.0.1/",
    ],
)  # fmt: skip
def test_no_way_into_the_network(url):
    with pytest.raises(InputError, match="public internet"):
        download(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://0177.0.0.1/", "ftp://a.example/",
        "file:///etc/passwd", "gopher://a.example/", "a.example", "", "http://", "http:///x",
        "http://user@a.example/", "http://user:secret@a.example/", "http://a.example:22/", "http://a.example:8080/",
        "https://a.example:0/", "http://a.example:99999/", "http://[::1", "http://a\x00b/", "http://\u2460.example/\udcff",
        "http://a.example\n/", "javascript:alert(1)", "//a.example", "data:text/plain,x",
    ],
)  # fmt: skip
def test_addresses_that_are_not_fetched(url):
    with pytest.raises(InputError) as caught:
        download(url)
    assert "secret" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_every_address_of_a_host_is_checked(monkeypatch):
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 80)) for ip in ("8.8.8.8", "10.0.0.1")]
    monkeypatch.setattr(module.socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(InputError, match="public internet"):
        download("http://two-faced.example/")


@local
def test_a_host_is_resolved_once_and_the_checked_address_is_used(serve, reply, monkeypatch, resolver):
    """A name that answers with another address the second time gets no second time."""
    server, asked = serve(lambda handler: reply(handler, b"fetched")), []

    def resolve(host, port, *rest, **more):
        if host != "rebind.example":
            return resolver(host, port, *rest, **more)
        asked.append(host)
        return resolver("127.0.0.1" if len(asked) == 1 else "10.0.0.1", port, *rest, **more)

    monkeypatch.setattr(module.socket, "getaddrinfo", resolve)
    checked = []
    content = download(
        f"http://rebind.example:{server.port}/x", rules(server, allowed=lambda address: checked.append(address) or True)
    )
    assert content == b"fetched"
    assert (asked, checked) == (["rebind.example"], [ip_address("127.0.0.1")])
    assert server.requests[0].headers["Host"] == f"rebind.example:{server.port}"


@local
def test_what_is_asked(serve, reply):
    server = serve(lambda handler: reply(handler, b"content"))
    assert download(f"{server.url}/a%20b?c=d", rules(server)) == b"content"
    (request,) = server.requests
    assert request.path == "/a%20b?c=d"
    assert request.headers["Accept-Encoding"] == "identity"
    assert not {"Cookie", "Authorization"} & set(request.headers)


@local
def test_redirects_are_followed_and_checked(serve, reply):
    end = serve(lambda handler: reply(handler, b"arrived"))

    def onward(handler):
        places = {
            "/1": "/2",
            "/2": f"{end.url}/",
            "/in": "http://10.0.0.1/",
            "/file": "file:///etc/passwd",
            "/loop": "/loop",
        }
        reply(handler, status=302, headers=[("Location", places.get(handler.path, ""))])

    start = serve(onward)
    allowed = rules(
        start, ports=frozenset({start.port, end.port, 80}), allowed=lambda address: str(address) == "127.0.0.1"
    )
    assert download(f"{start.url}/1", allowed) == b"arrived"
    for path, said in (("/in", "public internet"), ("/file", "http or https"), ("/loop", "more than 3 times")):
        with pytest.raises(InputError, match=said):
            download(start.url + path, allowed)
    with pytest.raises(InputError, match="port"):
        download(f"{start.url}/1", rules(start))
    with pytest.raises(InputError):
        download(f"{start.url}/nowhere", allowed)


@local
@pytest.mark.parametrize(
    ("headers", "status", "said"),
    [
        ([], 404, "status 404"),
        ([("Content-Encoding", "gzip")], 200, "compressed"),
        ([("Content-Encoding", "br, identity")], 200, "compressed"),
        ([("Content-Length", "99999999999999999")], 200, "larger"),
        ([("Content-Length", "1001")], 200, "larger"),
    ],
)
def test_replies_that_are_refused(serve, reply, headers, status, said):
    server = serve(lambda handler: reply(handler, b"x", status=status, headers=headers))
    with pytest.raises(InputError, match=said):
        download(server.url, rules(server, max_bytes=1_000))


@local
def test_a_flood_is_cut_off(serve):
    sent = []

    def flood(handler):
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(b"x" * 65_536)
            sent.append(65_536)

    server = serve(flood)
    with pytest.raises(InputError, match="larger than 100,000 bytes"):
        download(server.url, rules(server, max_bytes=100_000))
    time.sleep(0.1)
    assert sum(sent) < 20_000_000


@local
@pytest.mark.parametrize("where", ["silence", "status", "headers", "body"])
def test_the_deadline_holds_for_the_whole(serve, where):
    end = threading.Event()

    def slow(handler):
        if where in ("headers", "body"):
            handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + (b"\r\n" if where == "body" else b""))
        while not end.wait(0.05):
            if where != "silence":
                handler.wfile.write(b"x" if where != "headers" else b"x: y\r\n")

    server, began = serve(slow), time.perf_counter()
    with pytest.raises(InputError, match=r"within 0\.5 seconds|does not answer as it should"):
        download(server.url, rules(server, seconds=0.5))
    assert time.perf_counter() - began < 10
    end.set()


@local
@pytest.mark.parametrize(
    "answer", [b"", b"\x00\xff", b"HTTP/1.1 abc\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx"]
)
def test_no_http(serve, answer):
    server = serve(lambda handler: handler.wfile.write(answer))
    with pytest.raises(InputError, match="does not answer as it should"):
        download(server.url, rules(server))


def test_resolving_that_hangs_is_left_behind(monkeypatch):
    end = threading.Event()
    monkeypatch.setattr(module.socket, "getaddrinfo", lambda *_, **__: end.wait(20) and [])
    began = time.perf_counter()
    with pytest.raises(InputError, match="within"):
        download("http://a.example/", DownloadRules(seconds=0.2))
    assert time.perf_counter() - began < 10
    end.set()


@pytest.mark.parametrize("error", [socket.gaierror("x"), UnicodeError("x")])
def test_a_host_that_is_not_known(monkeypatch, error):
    def unknown(*_, **__):
        raise error

    monkeypatch.setattr(module.socket, "getaddrinfo", unknown)
    with pytest.raises(InputError, match="does not answer"):
        download("https://a.example/?key=secret")


@pytest.fixture
def certificate(tmp_path):
    """A certificate for good.example that nobody signed, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    files = [str(tmp_path / "certificate.pem"), str(tmp_path / "key.pem")]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=good.example", "-addext", "subjectAltName=DNS:good.example",
         "-out", files[0], "-keyout", files[1]],
        check=True, capture_output=True,
    )  # fmt: skip
    return files


@local
def test_the_certificate_is_checked_for_the_name_not_the_address(serve, reply, monkeypatch, resolver, certificate):
    server = serve(lambda handler: reply(handler, b"fetched"), tls=certificate)

    def resolve(host, *rest, **more):
        return resolver("127.0.0.1" if host.endswith(".example") else host, *rest, **more)

    monkeypatch.setattr(module.socket, "getaddrinfo", resolve)
    with pytest.raises(InputError, match="does not answer as it should"):
        download(f"https://good.example:{server.port}/", rules(server))  # signed by nobody we know
    monkeypatch.setattr(module, "_tls", lambda: ssl.create_default_context(cafile=certificate[0]))
    assert download(f"https://good.example:{server.port}/", rules(server)) == b"fetched"
    with pytest.raises(InputError, match="does not answer as it should"):
        download(f"https://bad.example:{server.port}/", rules(server))
