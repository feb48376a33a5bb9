"""The Debian system of full machines: packages by mmdebstrap, and what makes it a sandbox.

The kernel is not part of it: machines are given the one of `vm.kernel`, and the agent is put into
/run as the machine starts. What is added here is a unit that starts it, the tenant's user and
folder, and the absence of everything that would run on its own.

Paper: §5.2.5 (full VM substrate).
"""

from __future__ import annotations

from pathlib import Path

from fathom.errors import SandboxError
from fathom.sandbox.images import Image, Owners, Store, debian, lookup
from fathom.sandbox.images import layers as layering
from fathom.sandbox.images.source import Taking
from fathom.sandbox.images.types import OWN

NAME = "debian"
_STORED = f"{OWN}full-debian"
# To be raised with every change of what is added, and of the packages.
_VERSION = 3
_PACKAGES = 1
PACKAGES = (
    *("systemd", "systemd-sysv", "dbus", "udev", "kmod", "login", "util-linux", "procps"),
    *("iproute2", "ca-certificates", "less", "psmisc", "sudo"),
)
_UNIT = """\
[Unit]
Description=Agent of the sandbox
DefaultDependencies=no
After=systemd-udevd.service local-fs.target
OnFailure=poweroff.target

[Service]
ExecStart=/run/fathom/agent --port 1
OOMScoreAdjust=-900
OOMPolicy=continue
KillMode=process
TasksMax=infinity
Delegate=yes

[Install]
WantedBy=multi-user.target
"""
# They would change a machine while nobody looks, or wait for what is not there.
_MASKED = (
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "fstrim.timer"),
    *("e2scrub_all.timer", "e2scrub_reap.service", "systemd-timesyncd.service", "man-db.timer"),
    *("systemd-networkd.service", "systemd-resolved.service", "serial-getty@ttyS0.service"),
    *("systemd-tmpfiles-clean.timer", "systemd-pstore.service", "systemd-update-utmp.service"),
)
_HOSTS = "127.0.0.1 localhost sandbox\n::1 localhost\n"


def image(store: Store) -> Image:
    """Return the system's image, building it on first use (minutes). Raises SandboxError."""
    name = f"{_STORED}-{_VERSION}"
    if name in store.names():
        return store.resolve(name)
    packages = f"{_STORED}-packages-{_PACKAGES}"
    if packages in store.names():
        base = store.resolve(packages)
    else:
        base = debian.system(store, None, packages=PACKAGES)
        store.put_image(base, packages, own=True)
    with store.making("the full system cannot be made") as work:
        tree = work / "tree"
        _fill(tree, store, base)
        layer = layering.pack_folder(store, tree, Taking(owners=Owners(everybody=(0, 0)), mtime=0))
    made = Image(layers=(*base.layers, layer.digest), run=base.run, architecture=base.architecture)
    store.put_image(made, name, own=True)
    return made


def _fill(root: Path, store: Store, base: Image) -> None:
    def text(path: str) -> str:
        return lookup.read_file(store, base, path).decode()

    passwd, group = text("/etc/passwd"), text("/etc/group")
    if ":1000:" in passwd or ":1000:" in group:
        raise SandboxError("the system's image has a user 1000 already")
    units = "etc/systemd/system"
    files = {
        "etc/passwd": f"{passwd}user:x:1000:1000:user:/work:/bin/bash\n",
        "etc/group": f"{group}user:x:1000:\n",
        "etc/hosts": _HOSTS,
        "etc/hostname": "sandbox\n",
        "etc/machine-id": "",
        "etc/resolv.conf": "",
        f"{units}/fathom-agent.service": _UNIT,
        # A folder of its own in /tmp would be the service's, and commands are below the service.
        "etc/tmpfiles.d/fathom.conf": "d /work 0755 1000 1000\n",
        "etc/sysctl.d/60-fathom.conf": (
            "kernel.dmesg_restrict=1\nkernel.kptr_restrict=2\nkernel.unprivileged_bpf_disabled=1\n"
        ),
    }
    for path, content in files.items():
        place = root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(content)
        place.chmod(0o644)
    links = {
        f"{units}/multi-user.target.wants/fathom-agent.service": "../fathom-agent.service",
        f"{units}/default.target": "/lib/systemd/system/multi-user.target",
        **{f"{units}/{unit}": "/dev/null" for unit in _MASKED},
    }
    for path, target in links.items():
        place = root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(target)
    for folder in [root, *(p for p in root.rglob("*") if p.is_dir() and not p.is_symlink())]:
        folder.chmod(0o755)
    (root / "work").mkdir(mode=0o755)
