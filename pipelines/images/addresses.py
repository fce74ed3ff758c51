"""Which addresses pictures may be fetched from: those of the public internet, and of hosts that the operator lists.

Pure: resolves and connects nothing.
"""

from __future__ import annotations

import ipaddress
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

# Networks of an operator's own, which may hold a host that is listed.
_INTERNAL_4 = tuple(
    IPv4Network(text) for text in ("10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")
)
_INTERNAL_6 = tuple(IPv6Network(text) for text in ("::1/128", "fc00::/7"))

# Where no picture is, whoever lists it: this network, link-local with the clouds' metadata, protocols,
# documentation, the 6to4 relay, Azure's own host, benchmarks, multicast, reserved.
_NEVER_4 = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8",
        "168.63.129.16/32",
        "169.254.0.0/16",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)
# Of IPv6 only what is given to hosts (2000::/3), without tunnels (Teredo, 6to4: an IPv4 address hides in each),
# protocols and documentation. Two metadata hosts lie among the unique local addresses.
_PUBLIC_6 = IPv6Network("2000::/3")
_NEVER_6 = tuple(
    IPv6Network(text)
    for text in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20", "fd00:ec2::/32", "fd20:ce::254/128")
)
_NAT64 = IPv6Network("64:ff9b::/96")


def allowed(address: str, *, listed: bool) -> bool:
    """Whether a picture may be fetched from this numeric address; `listed`: its host is on the operator's list."""
    try:
        number = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(number, IPv6Address):
        hidden = number.ipv4_mapped or (IPv4Address(int(number) & 0xFFFFFFFF) if number in _NAT64 else None)
        if hidden is None:
            return _allowed_6(number, listed)
        number = hidden
    if any(number in network for network in _NEVER_4):
        return False
    return listed or not any(number in network for network in _INTERNAL_4)


def _allowed_6(number: IPv6Address, listed: bool) -> bool:
    if any(number in network for network in _NEVER_6):
        return False
    return number in _PUBLIC_6 or (listed and any(number in network for network in _INTERNAL_6))
