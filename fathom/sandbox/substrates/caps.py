"""What a container by each substrate will really do on this machine.

Paper: §5.2.5 (what differs between sandbox types is a parameter; `Caps` says the rest).
"""

from __future__ import annotations

from fathom.errors import Unsupported
from fathom.sandbox import cgroups, syscalls
from fathom.sandbox.egress import nft_program
from fathom.sandbox.substrates.choice import Name, process_limit_is_per_namespace
from fathom.sandbox.types import Caps, Container


def caps_of(substrate: Name, spec: Container) -> Caps:
    """Say what a substrate will do for `spec`. Raises Unsupported for a limit that cannot hold."""
    limits = {"memory", "pids", "cpu", "disk"}
    missing: set[str] = set()
    if substrate == "bubblewrap":
        missing |= {"memory", "cpu"}
        if not process_limit_is_per_namespace():
            missing |= {"pids"}
    io = cgroups.io_limits(cgroups.current_layout()) if substrate != "bubblewrap" else set[str]()
    for name in sorted({"io_read", "io_write"} - io):
        if getattr(spec, name) is not None:
            raise Unsupported(
                f"the limit {name} cannot hold here: control groups of version 1 bound what is "
                "read from disks, those of version 2 what is written as well, for root alone"
            )
    limits |= io
    asked = sorted(name for name in missing if getattr(spec, name) is not None)
    if asked:
        raise Unsupported(
            f"{substrate} cannot hold the limit {' and '.join(asked)} for a whole sandbox: leave "
            "it out, or run as root with crun or runc"
        )
    if spec.door is not None and substrate == "bubblewrap":
        raise Unsupported("bubblewrap shows no door: run as root with crun or runc")
    if spec.workdir is not None and spec.disk is None:
        # A folder of the host has whatever room its file system has; /tmp is still bounded.
        missing |= {"disk"}
    privileged = substrate != "bubblewrap"
    # Empty files take no room but the kernel's memory. bubblewrap mounts no file system with a
    # bound for their number, and a folder of the host has none.
    limits |= {"files"}
    if not privileged or spec.workdir is not None:
        missing |= {"files"}
    networks = {"none"}
    if privileged:
        networks |= {"domain", "mirror"} | ({"address"} if nft_program() else set[str]())
    # What a door leads to is given to one sandbox, not to its copies.
    copies = privileged and spec.workdir is None and spec.door is None
    return Caps(
        substrate=substrate,
        enforced=frozenset(limits - missing),
        not_enforced=frozenset(missing),
        reports_oom=privileged,
        timeout_kills="command",
        separate_user=privileged,
        workdir="memory" if spec.workdir is None else "host",
        landlock=syscalls.landlock_version() > 0,
        snapshot="disk" if copies else "",
        fork="disk" if copies else "",
        pause=privileged,
        networks=frozenset(networks),
    )
