"""What a node is given to start a machine, and the emulator's command line for it.

Paper: §5.2.5 (microVM and full VM substrates).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["microvm", "fullvm"]
KINDS: tuple[Kind, ...] = ("microvm", "fullvm")
# The emulator's own translations of guest code, and the rest of what it needs beside the guest.
_TRANSLATIONS = 64 << 20
_OVERHEAD = 192 << 20
_COMMON_KERNEL = "quiet panic=-1 reboot=t no_timer_check random.trust_cpu=on"


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineLaunch:
    """One machine. Sizes in bytes.

    `accelerator`: "kvm" or "tcg". `agent`: the compiled agent. `tree`: the folder that is the
    emulator's root. `base`: the disk that never changes; `disk`: room for writes, in the guest's
    memory (microvm) or as a file on top of the base (fullvm). `cpus`: processors of the guest;
    `cpu`: how much time they get. `uid`: the host's user as whom the emulator runs. `user`: as
    whom commands run in the guest. `tsc_khz`: what the guest is told about its clock's rate, 0 to
    let it find out. `template`: the folder of a saved machine to begin with, "" to boot. `keep`:
    whether the node shall hold that machine's memory for the next ones. `scratch`: where disks
    may be put.
    """

    folder: Path
    substrate: str
    accelerator: str
    agent: str
    tree: str
    kernel: str
    initramfs: str
    base: str
    memory: int
    disk: int
    cpus: int
    cpu: float | None
    hostname: str
    uid: int
    user: str = "user"
    tsc_khz: int = 0
    template: str = ""
    keep: bool = False
    scratch: str = ""
    outlive: bool = False

    @property
    def group_memory(self) -> int:
        """What the emulator's control group may use: the guest, and the emulator itself.

        The guest counts twice. A page that it writes first and that its saved machine left empty
        is given a page of zeros in the shared file by the kernel, before it gets one of its own.
        """
        return 2 * self.memory + _TRANSLATIONS + _OVERHEAD

    def as_json(self) -> dict[str, Any]:
        """Return the values in the form that `launch_in` takes after JSON."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**values, "folder": str(self.folder)}


def launch_in(folder: Path, values: dict[str, Any]) -> MachineLaunch:
    """Read a launch from JSON. Raises TypeError for values that it has not."""
    given: dict[str, Any] = {**values, "folder": folder}
    return MachineLaunch(**given)


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Open files that the emulator inherits, by their descriptors; -1 for those not used.

    `below`: disks between the base and the one that is written to, the lowest first.
    """

    monitor: int
    port: int
    memory: int
    base: int
    kernel: int = -1
    initramfs: int = -1
    disk: int = -1
    state: int = -1
    below: tuple[int, ...] = ()

    def all(self) -> tuple[int, ...]:
        """Return those that are there."""
        names = (name for name in self.__dataclass_fields__ if name != "below")
        return tuple(fd for fd in (*map(self.__getattribute__, names), *self.below) if fd >= 0)


def command_line(launch: MachineLaunch, files: Files) -> list[str]:
    """Return the emulator's arguments, the program first. It finds no file but those given."""
    full = launch.substrate == "fullvm"
    bus = "pci" if full else "device"
    machine = "q35,smm=off,vmport=off,usb=off" if full else "microvm,acpi=on,rtc=on"
    accelerator = "kvm" if launch.accelerator == "kvm" else "tcg,thread=multi,tb-size=64"
    words = ["/usr/bin/qemu-system-x86_64"]
    words += ["-M", f"{machine},suppress-vmdesc=on,memory-backend=ram", "-accel", accelerator]
    words += ["-cpu", "host" if launch.accelerator == "kvm" else "max"]
    words += ["-smp", str(launch.cpus), "-m", f"{launch.memory >> 10}k"]
    words += ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]
    words += ["-L", "/usr/share/qemu"]
    # What the emulator may no longer ask of the kernel, whoever runs inside of it.
    words += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    # A machine's state is saved without its memory, in the form that has no preamble.
    words += ["-global", "migration.send-configuration=off"]
    ram = f"memory-backend-file,id=ram,size={launch.memory},share=off"
    words += ["-object", f"{ram},mem-path=/proc/self/fd/{files.memory}"]
    words += ["-chardev", f"socket,id=monitor,fd={files.monitor},server=on,wait=off"]
    words += ["-mon", "chardev=monitor,mode=control"]
    # The console keeps its last 64 KiB, however much a guest writes.
    words += ["-chardev", "ringbuf,id=console,size=65536", "-serial", "chardev:console"]
    words += ["-device", f"virtio-serial-{bus},max_ports=2"]
    words += ["-chardev", f"socket,id=agent,fd={files.port},server=on,wait=off"]
    words += ["-device", "virtserialport,chardev=agent,name=fathom.agent,nr=1"]
    words += ["-netdev", "user,id=net,ipv6=off", "-device", _network(bus)]
    words += _disks(files, bus)
    if full:
        words += ["-vga", "none", "-device", "VGA,id=video,vgamem_mb=8"]
    if files.state >= 0:
        words += ["-incoming", "defer", "-S"]
    else:
        words += ["-kernel", f"/proc/self/fd/{files.kernel}"]
        words += ["-initrd", f"/proc/self/fd/{files.initramfs}"]
        words += ["-append", kernel_line(launch)]
    return words


def _network(bus: str) -> str:
    # No program for booting over it, and the same address in every copy.
    rom = ",romfile=" if bus == "pci" else ""
    return f"virtio-net-{bus},netdev=net,mac=52:54:00:12:34:56{rom}"


def _disks(files: Files, bus: str) -> list[str]:
    words = ["-add-fd", f"fd={files.base},set=1"]
    base = "driver=file,filename=/dev/fdset/1,node-name=base,read-only=on,locking=off"
    words += ["-blockdev", f"{base},auto-read-only=off"]
    drive = "base"
    if files.disk >= 0:
        words += ["-blockdev", "driver=raw,file=base,node-name=below,read-only=on"]
        below = "below"
        for number, fd in enumerate(files.below):
            words += ["-add-fd", f"fd={fd},set={number + 3}"]
            node = f"filename=/dev/fdset/{number + 3},node-name=file{number},read-only=on"
            words += ["-blockdev", f"driver=file,{node},locking=off,auto-read-only=off"]
            node = f"file=file{number},backing={below},node-name=disk{number},read-only=on"
            words += ["-blockdev", f"driver=qcow2,{node}"]
            below = f"disk{number}"
        words += ["-add-fd", f"fd={files.disk},set=2"]
        words += ["-blockdev", "driver=file,filename=/dev/fdset/2,node-name=file,locking=off"]
        words += ["-blockdev", f"driver=qcow2,file=file,backing={below},node-name=disk"]
        drive = "disk"
    return [*words, "-device", f"virtio-blk-{bus},drive={drive}"]


def kernel_line(launch: MachineLaunch) -> str:
    """Return the guest's kernel command line."""
    words = [_COMMON_KERNEL, f"fathom.hostname={launch.hostname}"]
    if launch.tsc_khz:
        words.append(f"tsc_early_khz={launch.tsc_khz}")
    if launch.substrate == "fullvm":
        words += [
            "fathom.init=/sbin/init",
            "console=tty0",
            "systemd.show_status=1",
            "root=/dev/vda",
        ]
    else:
        words += [f"fathom.writes={launch.disk}", "console=ttyS0", "loglevel=3"]
    return " ".join(words)
