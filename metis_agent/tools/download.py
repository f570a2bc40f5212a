"""Fetches a file from the public internet, and from nowhere else.

An address may come from a model or from a page that anyone wrote, so it must not reach into the network that
this process runs in (server-side request forgery). A host is resolved once, every address it has is checked,
and the connection goes to a checked one, with the certificate checked for the name; redirects pass the same way.
Facts: `ipaddress.is_global` alone lets several inner ranges pass (python/cpython#113171, requests-hardened).
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any, TypeAlias

import httpcore
import httpx

from metis_agent.deadline import DeadlineError, run_within
from metis_agent.errors import InputError

__all__ = ["DownloadRules", "download", "is_public"]

Address: TypeAlias = IPv4Address | IPv6Address

_BLOCK = 65_536
_REDIRECTS = (301, 302, 303, 307, 308)
_PUBLIC_V6 = ip_network("2000::/3")
_INNER = tuple(
    ip_network(network)
    for network in (
        "100.64.0.0/10",  # carrier NAT; cloud networks use it inside
        "168.63.129.16/32",  # Azure's host, on a public address
        "192.0.0.0/24",
        "192.88.99.0/24",  # 6to4 relays
        "2001::/23",  # Teredo, ORCHID and other ways to say an IPv4 address
        "2001:db8::/32",
        "2002::/16",  # 6to4
        "3fff::/20",
    )
)


def is_public(address: Address) -> bool:
    """True for an address of a host on the public internet."""
    if any(address.version == network.version and address in network for network in _INNER):
        return False
    if isinstance(address, IPv6Address) and address not in _PUBLIC_V6:  # mapped and translated IPv4 as well
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved)


@dataclass(frozen=True, kw_only=True)
class DownloadRules:
    """What may be fetched."""

    max_bytes: int = 20_000_000
    seconds: float = 10.0
    """For everything: resolving, connecting, redirects, the last byte."""
    redirects: int = 3
    ports: frozenset[int] = frozenset({80, 443})
    allowed: Callable[[Address], bool] = is_public
    """Which addresses may be connected to; replace it to allow a server of your own network."""


def download(url: str, rules: DownloadRules | None = None) -> bytes:
    """Return what is at an http or https address.

    Raises:
        InputError: the address may not be fetched, or nothing usable came back in time; the message does not
            tell what is inside the network.
    """
    rules = rules or DownloadRules()
    until = time.monotonic() + rules.seconds
    try:
        with httpcore.ConnectionPool(ssl_context=_tls(), network_backend=_CheckedNetwork(rules, until)) as pool:
            return _follow(pool, url, rules)
    except (httpcore.TimeoutException, DeadlineError):
        raise InputError(f"{_short(url)} did not arrive within {rules.seconds:g} seconds.") from None
    except (httpcore.NetworkError, httpcore.ProtocolError, OSError, ssl.SSLError) as error:
        raise InputError(f"{_short(url)} can't be fetched: its host does not answer as it should.") from error


def _follow(pool: httpcore.ConnectionPool, url: str, rules: DownloadRules) -> bytes:
    target = _parsed(url, rules)
    for _ in range(rules.redirects + 1):
        scheme, host, port, path = target.raw_scheme, target.raw_host, target.port, target.raw_path
        headers: list[tuple[bytes | str, bytes | str]] = [
            ("Host", target.netloc),
            ("Accept", "*/*"),
            ("Accept-Encoding", "identity"),
            ("User-Agent", "langgraph-metis"),
        ]
        where = httpcore.URL(scheme=scheme, host=host, port=port, target=path)
        with pool.stream("GET", where, headers=headers) as reply:
            fields = httpx.Headers(reply.headers)
            if reply.status not in _REDIRECTS:
                return _body(url, reply, fields, rules.max_bytes)
        try:
            onward = str(target.join(fields.get("location", "")))
        except (httpx.InvalidURL, ValueError) as error:
            raise InputError(f"{_short(url)} redirects to an address that can't be read.") from error
        target = _parsed(onward, rules)
    raise InputError(f"{_short(url)} redirects more than {rules.redirects} times.")


def _parsed(url: str, rules: DownloadRules) -> httpx.URL:
    """The one parser: what is checked is what is connected to."""
    try:
        target = httpx.URL(url)
    except (httpx.InvalidURL, ValueError, TypeError) as error:
        raise InputError(f"{_short(url)} is no web address.") from error
    if target.scheme not in ("http", "https") or not target.host:
        raise InputError(f"{_short(url)} is no http or https address with a host; give one.")
    if target.userinfo:
        raise InputError(f"{_short(url)} holds a user name; addresses with one are not fetched.")
    port = target.port if target.port is not None else (443 if target.scheme == "https" else 80)
    if port not in rules.ports:
        raise InputError(f"{_short(url)} names port {port}; only {sorted(rules.ports)} are fetched from.")
    return target


def _body(url: str, reply: httpcore.Response, fields: httpx.Headers, max_bytes: int) -> bytes:
    if reply.status != 200:
        raise InputError(f"{_short(url)} can't be fetched: its host answered with status {reply.status}.")
    if fields.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise InputError(f"{_short(url)} came compressed, though that was declined; it is not unpacked.")
    announced = fields.get("content-length", "0")
    if announced.isascii() and announced.isdigit() and int(announced[:18]) > max_bytes:
        raise _too_large(url, max_bytes)
    content = bytearray()
    for block in reply.iter_stream():
        content += block
        if len(content) > max_bytes:
            raise _too_large(url, max_bytes)
    return bytes(content)


class _CheckedNetwork(httpcore.NetworkBackend):
    """Connects to checked addresses only, and within the time that is left."""

    def __init__(self, rules: DownloadRules, until: float) -> None:
        self._rules = rules
        self._until = until
        self._plain = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        """Resolve, check every address, connect to the first that answers."""
        addresses = self._addresses(host, port)
        for number, address in enumerate(addresses, start=1):
            try:
                stream = self._plain.connect_tcp(str(address), port, _left(self._until), local_address, socket_options)
                return _TimedStream(stream, self._until)
            except httpcore.ConnectError:
                if number == len(addresses):
                    raise
        raise httpcore.ConnectError(f"{host!r} has no address")

    def _addresses(self, host: str, port: int) -> list[Address]:
        # Resolving can't be interrupted, only left behind.
        try:
            found = run_within(_left(self._until), lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(str(error)) from error
        addresses = list(dict.fromkeys(ip_address(str(entry[4][0])) for entry in found))
        if not all(self._rules.allowed(address) for address in addresses):
            raise InputError(f"host {_short(host)} is not on the public internet; only what is public is fetched.")
        return addresses[:4]


class _TimedStream(httpcore.NetworkStream):
    """Gives every step the time that is left of the whole, so that a slow drip ends as well."""

    def __init__(self, stream: httpcore.NetworkStream, until: float) -> None:
        self._stream = stream
        self._until = until

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(min(max_bytes, _BLOCK), _left(self._until))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _left(self._until))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        secured = self._stream.start_tls(ssl_context, server_hostname, _left(self._until))
        return _TimedStream(secured, self._until)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise httpcore.ReadTimeout("the time is up")
    return left


@lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    return httpx.create_ssl_context()


def _too_large(url: str, max_bytes: int) -> InputError:
    return InputError(f"{_short(url)} is larger than {max_bytes:,} bytes, the most that is fetched.")


def _short(url: str) -> str:
    """The address as messages show it, without what may be a secret."""
    bare = str(url).split("?")[0].split("#")[0]
    if "@" in bare:
        bare = bare.split("://")[0] + "://…@" + bare.rpartition("@")[2]
    return repr(bare if len(bare) <= 200 else bare[:199] + "…")
