"""Which addresses a sandbox may reach by a name that anybody could point anywhere.

Whoever owns a name decides where it leads. Addresses of private networks are none of theirs, and
neither are this machine's own, public ones included: what listens there may trust a firewall that
connections from this machine never meet.

Paper: none (the report only names its platform).
"""

from __future__ import annotations

import ipaddress
import socket

# Addresses of IPv6 that a translator on the way turns into the IPv4 address in their last bits.
_TRANSLATED = tuple(ipaddress.IPv6Network(text) for text in ("64:ff9b::/96", "64:ff9b:1::/48"))


def is_public(where: str) -> bool:
    """Return whether `where` is an address of somebody else, on the public internet."""
    address = ipaddress.ip_address(where)
    if not address.is_global or address.is_multicast or address.is_reserved or _is_own(where):
        return False
    return address.version == 4 or all(is_public(str(one)) for one in _inside(address))


def _inside(address: ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """Return the IPv4 addresses that an IPv6 address leads to, by whatever translation."""
    found = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    if any(address in network for network in _TRANSLATED):
        found.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return [one for one in found if one is not None]


def _is_own(where: str) -> bool:
    """Whether packets to an address stay on this machine: only then a socket can have it."""
    kind = socket.AF_INET6 if ":" in where else socket.AF_INET
    try:
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.bind((where, 0))
    except OSError:
        return False
    return True
