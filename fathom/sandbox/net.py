"""What a sandbox may reach: nothing, unless a policy names it.

    Net.deny()
    Net.deny().address("203.0.113.7", 443).domain("example.org").mirror("pypi")

A policy is always a whole one: setting it replaces the former, and what it does not name is not
allowed. Addresses are reached directly over TCP. Domains and mirrors are reached through a proxy
on this machine that logs every request; the sandbox finds it in `http_proxy`.

Paper: none (the report only names its platform).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fathom.errors import SandboxError, Unsupported

PROXY_PORT = 3128
RELAY_PORT = 3129
WEB_PORTS = (80, 443)
_DOMAIN = re.compile(
    r"(\*\.)?([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
)
_MIRROR = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Net:
    """A network policy. Made from `Net.deny()` by naming what is allowed.

    `domains`: each with its ports, and whether it may have addresses of private networks or of this
    machine.
    """

    addresses: tuple[tuple[str, int], ...] = ()
    domains: tuple[tuple[str, tuple[int, ...], bool], ...] = ()
    mirrors: tuple[str, ...] = ()

    @classmethod
    def deny(cls) -> Net:
        """Return the policy that allows nothing."""
        return cls()

    def address(self, host: str, port: int) -> Net:
        """Also allow TCP to an IPv4 address and port. Raises SandboxError, Unsupported."""
        try:
            found = ipaddress.ip_address(host)
        except ValueError:
            raise SandboxError(f"{host!r} is not an address: allow a name with domain()") from None
        if found.version != 4:
            raise Unsupported(f"{host} is an IPv6 address: only IPv4 can be allowed")
        _check_port(port)
        return replace(self, addresses=(*self.addresses, (str(found), port)))

    def domain(self, name: str, *ports: int, private: bool = False) -> Net:
        """Also allow a domain (`*.example.org` for all below one), on ports 80 and 443 by default.

        `private`: whether this one may lead to a private network or to this machine.
        Raises SandboxError.
        """
        text = name.lower().rstrip(".")
        if not _DOMAIN.fullmatch(text) or re.fullmatch(r"[\d.]+", text):
            raise SandboxError(f'{name!r} is not a domain: give one such as "example.org"')
        for port in ports:
            _check_port(port)
        return replace(self, domains=(*self.domains, (text, ports or WEB_PORTS, private)))

    def mirror(self, name: str) -> Net:
        """Also allow reading the package mirror `name`, as this client's `mirrors` define it.

        Raises SandboxError.
        """
        if not _MIRROR.fullmatch(name):
            raise SandboxError(f"{name!r} cannot name a mirror: use lower-case letters and digits")
        return replace(self, mirrors=(*self.mirrors, name))

    @property
    def kinds(self) -> frozenset[str]:
        """What this policy needs of a sandbox's `caps.networks`."""
        found = {"none"}
        found |= {"address"} if self.addresses else set()
        found |= {"domain"} if self.domains else set()
        found |= {"mirror"} if self.mirrors else set()
        return frozenset(found)

    def as_json(self, mirrors: Mapping[str, str]) -> dict[str, Any]:
        """Return the policy for the proxy, mirrors with their places. Raises SandboxError."""
        for name in self.mirrors:
            if name not in mirrors:
                known = ", ".join(sorted(mirrors)) or "none"
                raise SandboxError(f"this client knows no mirror {name!r} (known: {known})")
        return {
            "addresses": [list(entry) for entry in self.addresses],
            "domains": [[name, list(ports), private] for name, ports, private in self.domains],
            "mirrors": {name: mirrors[name].rstrip("/") for name in self.mirrors},
        }

    def environment(self, host: str = "127.0.0.1") -> dict[str, str]:
        """Return the variables by which programs find the proxy and the mirrors.

        `host`: where the sandbox finds the proxy.
        """
        if not (self.domains or self.mirrors):
            return {}
        proxy = f"http://{host}:{PROXY_PORT}"
        found = {"no_proxy": "127.0.0.1,localhost", "NO_PROXY": "127.0.0.1,localhost"}
        if self.domains:
            for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
                found[name] = proxy
        if "pypi" in self.mirrors:
            found["PIP_INDEX_URL"] = f"{proxy}/mirror/pypi/simple/"
            found["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
        if "npm" in self.mirrors:
            found["NPM_CONFIG_REGISTRY"] = f"{proxy}/mirror/npm/"
        return found


def _check_port(port: int) -> None:
    if not 0 < port < 1 << 16:
        raise SandboxError(f"port is {port}: give a number from 1 to 65535")


def rules(addresses: list[list[Any]]) -> str:
    """Return the nftables program for a sandbox's namespace: all of it, replacing the former.

    Allowed connections are turned to the relay, which knows the same list and makes them from this
    machine. Nothing else leaves, and the sandbox's own loopback stays its own.
    """
    elements = ", ".join(f"{host} . {port}" for host, port in addresses)
    content = f"elements = {{ {elements} }}" if elements else ""
    return f"""
table inet fathom
delete table inet fathom
table inet fathom {{
  set allowed {{
    type ipv4_addr . inet_service
    {content}
  }}
  chain turn {{
    type nat hook output priority -100; policy accept;
    ip daddr . tcp dport @allowed redirect to :{RELAY_PORT}
  }}
  chain leave {{
    type filter hook output priority 0; policy drop;
    ip daddr 127.0.0.0/8 accept
    ip6 daddr ::1 accept
    ct state established,related accept
    reject with icmpx type admin-prohibited
  }}
}}
"""
