"""Values and pure functions: sizes, requests, control group paths, the compiled filter."""

from __future__ import annotations

import dataclasses
import errno
import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom.errors import SandboxError, SandboxTimeout, Unsupported
from fathom.sandbox import Container, ExecResult, cgroups, paths, seccomp
from fathom.sandbox.request import form_request
from fathom.sandbox.substrates import bubblewrap, container
from fathom.sandbox.substrates.launch import MASKED_PATHS, Launch
from fathom.sandbox.types import Caps, parse_size

V1 = """\
24 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 24 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
32 30 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
33 30 0:29 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids
34 30 0:30 / /sys/fs/cgroup/free\\040zer rw - cgroup cgroup rw,freezer
36 30 0:32 / /sys/fs/cgroup/net_cls rw - cgroup cgroup rw,net_cls
35 30 0:31 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
"""
V2 = """\
24 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate
"""


# Sizes and values ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1024, 1024),
        ("7", 7),
        ("7B", 7),
        ("1KiB", 1024),
        ("512MiB", 512 << 20),
        ("2 GiB", 2 << 30),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes(text, size):
    assert parse_size(text, "memory") == size


@pytest.mark.parametrize(
    "text",
    ["", "MiB", "1.5GiB", "-1", "1mb", "1025 TiB", "9" * 5000, 1 << 51, None, True, 2.5, 0, "0"],
)
def test_sizes_that_are_none(text):
    with pytest.raises(SandboxError, match="memory"):
        parse_size(text, "memory")


def test_sizes_beyond_a_bound_name_it():
    for text, said in (("-5MiB", "more than nothing"), ("999999TiB", "1024TiB at most")):
        with pytest.raises(SandboxError, match=said):
            parse_size(text, "memory")


@given(st.integers(min_value=1, max_value=1 << 40))
def test_every_number_of_bytes_is_itself(size: int):
    assert parse_size(size, "disk") == parse_size(str(size), "disk") == size


def test_values_cannot_be_changed():
    for value in (
        Container(),
        ExecResult(exit_code=0, stdout="", stderr="", output=""),
        Caps(
            substrate="crun",
            enforced=frozenset(),
            not_enforced=frozenset(),
            reports_oom=True,
            timeout_kills="command",
            separate_user=True,
        ),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, dataclasses.fields(value)[0].name, "changed")
        assert not hasattr(value, "__dict__")
    with pytest.raises(TypeError):
        Container("folder")  # type: ignore[misc]


def test_defaults():
    spec = Container()
    spec.check()
    assert (spec.memory_bytes, spec.pids_limit, spec.disk_bytes) == (512 << 20, 128, 128 << 20)


@given(st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=("Cs",))))
def test_any_text_is_a_command(text: str):
    request = form_request(text, timeout=1)
    assert (request.argv, request.shell) == ((text,), True)
    other = form_request(["x", text], timeout=1)
    assert (other.argv, other.shell) == (("x", text), False)
    assert request.digest() != other.digest()
    assert request.digest() != request.digest(b"")


@pytest.mark.parametrize(
    ("cwd", "folder"), [(None, "/work/"), ("a/b", "/work/a/b"), ("/tmp", "/tmp"), ("", "/work/")]
)
def test_folders_start_from_work(cwd, folder):
    assert form_request("true", timeout=1, cwd=cwd).cwd == folder


# Control groups ------------------------------------------------------------------------------


def test_layout_of_v1_with_v2_beside_it():
    layout = cgroups.read_layout(V1)
    assert layout is not None
    assert layout.version == 1
    assert layout.roots == {
        "cpu": Path("/sys/fs/cgroup/cpu,cpuacct"),
        "freezer": Path("/sys/fs/cgroup/free zer"),
        "memory": Path("/sys/fs/cgroup/memory"),
        "pids": Path("/sys/fs/cgroup/pids"),
    }
    assert layout.beside == Path("/sys/fs/cgroup/unified")
    assert layout.others == (Path("/sys/fs/cgroup/net_cls"),)
    group = cgroups.Group(layout, "sb-1")
    assert [str(path) for path in group.all_folders()] == [
        "/sys/fs/cgroup/cpu,cpuacct/fathom/sb-1",
        "/sys/fs/cgroup/free zer/fathom/sb-1",
        "/sys/fs/cgroup/memory/fathom/sb-1",
        "/sys/fs/cgroup/net_cls/fathom/sb-1",
        "/sys/fs/cgroup/pids/fathom/sb-1",
        "/sys/fs/cgroup/unified/fathom/sb-1",
    ]
    assert group.can_freeze
    assert str(group.oom_file).endswith("memory/fathom/sb-1/memory.oom_control")


def test_what_bounds_disks_in_either_layout(tmp_path: Path):
    """This machine has one of the two; the other one's files are checked as they are written."""
    v1 = cgroups.read_layout(
        V1 + "\n39 31 0:35 / /sys/fs/cgroup/blkio rw - cgroup cgroup rw,blkio\n"
    )
    assert v1 is not None
    assert v1.io == Path("/sys/fs/cgroup/blkio")
    assert str(cgroups.Group(v1, "sb-1", io=True).folders["blkio"]).endswith("blkio/fathom/sb-1")
    assert "blkio" not in cgroups.Group(v1, "sb-1").folders
    assert cgroups.io_files(v1, ["8:0", "8:16"], 5, 6) == [
        ("blkio.throttle.read_bps_device", "8:0 5"),
        ("blkio.throttle.read_bps_device", "8:16 5"),
        ("blkio.throttle.write_bps_device", "8:0 6"),
        ("blkio.throttle.write_bps_device", "8:16 6"),
    ]
    v2 = cgroups.Layout(version=2, roots=dict.fromkeys(cgroups.CONTROLLERS, tmp_path), io=tmp_path)
    assert cgroups.io_limits(v2) == set()
    (tmp_path / "cgroup.controllers").write_text("cpu io memory pids\n")
    assert cgroups.io_limits(v2) == {"io_read", "io_write"}
    assert cgroups.io_files(v2, ["8:0"], 5, None) == [("io.max", "8:0 rbps=5")]
    assert cgroups.io_files(v2, ["8:0"], None, 6) == [("io.max", "8:0 wbps=6")]
    group = cgroups.Group(v2, "sb-1", io=True)
    group.create()
    for folder in (tmp_path, tmp_path / "fathom"):
        assert (folder / "cgroup.subtree_control").read_text() == "+memory +pids +cpu +io"
    group.limit_io(7, 8)
    assert (tmp_path / "fathom" / "sb-1" / "io.max").read_text().endswith(" rbps=7 wbps=8")


def test_disks_are_those_with_room_that_are_no_memory(tmp_path: Path):
    for name, size, device in (("sda", 9, "8:0"), ("loop0", 0, "7:0"), ("zram0", 5, "253:0")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "size").write_text(f"{size}\n")
        (tmp_path / name / "dev").write_text(f"{device}\n")
    (tmp_path / "gone").mkdir()
    assert cgroups.disks(tmp_path) == ["8:0"]


def test_layout_of_v2():
    layout = cgroups.read_layout(V2)
    assert layout is not None
    assert (layout.version, layout.beside, layout.others) == (2, None, ())
    group = cgroups.Group(layout, "sb-1")
    home = "/sys/fs/cgroup/fathom/sb-1"
    assert [str(path) for path in group.all_folders()] == [home]
    assert group.can_freeze
    assert str(group.oom_file) == f"{home}/memory.events"


def test_no_layout():
    assert cgroups.read_layout("") is None
    assert cgroups.read_layout(V1.replace("rw,pids", "rw,perf_event")) is None


def test_limits_of_both_layouts():
    def written(mounts: str, cpu: float | None) -> dict[str, str]:
        layout = cgroups.read_layout(mounts)
        assert layout is not None
        files = cgroups.limit_files(layout, memory=64 << 20, pids=10, cpu=cpu)
        return {file: text for _, file, text, required in files if required}

    assert written(V1, None) == {"memory.limit_in_bytes": "67108864", "pids.max": "13"}
    assert written(V2, None) == {"memory.max": "67108864", "pids.max": "13"}
    assert written(V1, 1.5)["cpu.cfs_quota_us"] == "150000"
    assert written(V2, 0.01)["cpu.max"] == "1000 100000"


def test_v2_groups_are_made_with_controllers_for_their_children(tmp_path: Path):
    """On plain folders: which files are written, and in which order."""
    layout = cgroups.Layout(version=2, roots=dict.fromkeys(cgroups.CONTROLLERS, tmp_path))
    (tmp_path / "cgroup.subtree_control").write_text("pids hugetlb\n")
    group = cgroups.Group(layout, "sb-1")
    group.create()
    group.limit(memory=1 << 30, pids=7, cpu=2.0)
    read = {str(p.relative_to(tmp_path)): p.read_text() for p in tmp_path.rglob("*") if p.is_file()}
    assert read == {
        "cgroup.subtree_control": "+memory +cpu",
        "fathom/cgroup.subtree_control": "+memory +pids +cpu",
        "fathom/sb-1/memory.max": str(1 << 30),
        "fathom/sb-1/memory.swap.max": "0",
        "fathom/sb-1/pids.max": "10",
        "fathom/sb-1/cpu.max": "200000 100000",
    }
    (tmp_path / "fathom/sb-1/cgroup.events").write_text("populated 1\nfrozen 1\n")
    group.freeze()
    assert (tmp_path / "fathom/sb-1/cgroup.freeze").read_text() == "1"
    group.thaw()
    assert (tmp_path / "fathom/sb-1/cgroup.freeze").read_text() == "0"
    group.enter(77)
    assert (tmp_path / "fathom/sb-1/cgroup.procs").read_text() == "77"


def test_controllers_that_cannot_be_turned_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    layout = cgroups.Layout(version=2, roots=dict.fromkeys(cgroups.CONTROLLERS, tmp_path))
    monkeypatch.setattr(cgroups, "_write", refuse)
    with pytest.raises(SandboxError, match=r"memory, pids, cpu cannot be turned on.*busy"):
        cgroups.Group(layout, "sb-1").create()


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n", 3),
        ("low 0\nhigh 0\nmax 12\noom 2\noom_kill 1\noom_group_kill 0\n", 1),
        ("", 0),
    ],
)
def test_counting_kills_for_memory(text, count):
    assert cgroups.oom_count(text) == count


# Folders -------------------------------------------------------------------------------------


def test_cache_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert paths.cache_folder() == Path("/c/fathom")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert paths.cache_folder() == Path("/h/.cache/fathom")


def test_runtime_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert paths.runtime_folder() == Path("/run/fathom")
    monkeypatch.setattr("os.geteuid", lambda: 4321)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert paths.runtime_folder() == tmp_path / "fathom"
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/nonexistent")
    assert paths.runtime_folder() == Path("/tmp/fathom-4321")


def test_a_runtime_folder_must_not_be_a_link(tmp_path: Path):
    (tmp_path / "real").mkdir(mode=0o711)
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(SandboxError, match="somebody else"):
        paths.make_runtime_folder(tmp_path / "link")
    (tmp_path / "file").touch()
    with pytest.raises(SandboxError, match="cannot be made"):
        paths.make_runtime_folder(tmp_path / "file")


# What the runtimes are told ------------------------------------------------------------------


def launch(substrate: str, workdir: str | None = None) -> Launch:
    return Launch(
        folder=Path("/run/fathom/sb-1"),
        substrate=substrate,
        program=f"/usr/bin/{substrate}",
        agent="/opt/agent",
        ids=container.first_id("sb-1"),
        netns="/proc/7/fd/8",
        rootfs="/image",
        workdir=workdir,
        memory=1 << 28,
        pids=8,
        cpu=None,
        disk=1 << 20,
        hostname="box",
    )


def test_container_configuration():
    config = container.configuration(launch("crun"), Path("/r"), Path("/w"))
    assert config["root"] == {"path": "/r", "readonly": True}
    assert config["process"]["noNewPrivileges"]
    assert set(config["process"]["capabilities"]["bounding"]) == {
        "CAP_SETUID",
        "CAP_SETGID",
        "CAP_SETPCAP",
        "CAP_KILL",
    }
    kinds = {entry["type"] for entry in config["linux"]["namespaces"]}
    assert kinds == {"pid", "network", "ipc", "uts", "mount", "user", "cgroup"}
    mapping = config["linux"]["uidMappings"][0]
    assert mapping["hostID"] >= 1 << 20
    assert {"type": "network", "path": "/proc/7/fd/8"} in config["linux"]["namespaces"]
    assert set(MASKED_PATHS) == set(config["linux"]["maskedPaths"])
    for mount in config["mounts"]:
        assert "nosuid" in mount["options"], mount
    assert [m["source"] for m in config["mounts"] if m["destination"] == "/work"] == ["/w"]


def test_ranges_of_ids_stay_apart_from_real_users():
    ranges = {container.first_id(f"sb-{number}") for number in range(500)}
    assert len(ranges) > 400
    for first in ranges:
        assert first % container.ID_COUNT == 0
        assert 1 << 30 < first < (1 << 31) - container.ID_COUNT


def test_bubblewrap_command_line():
    line = bubblewrap.command_line(launch("bubblewrap", "/home/me/work"), 7, 8)
    text = " ".join(line)
    for wanted in (
        "--ro-bind /opt/agent /dev/fathom-agent",
        "--unshare-user",
        "--unshare-net",
        "--unshare-pid",
        "--unshare-ipc",
        "--unshare-uts",
        "--cap-drop ALL",
        "--clearenv",
        "--die-with-parent",
        "--new-session",
        "--seccomp 8",
        "--ro-bind /image /",
        "--bind /home/me/work /work",
        "--size 1048576 --tmpfs /tmp",
    ):
        assert wanted in text, wanted
    assert "--dev-bind" not in text


# The filter ----------------------------------------------------------------------------------

ALLOW, KILL = "allow", "kill"


def judge(program: bytes, arch: int, number: int, *arguments: int) -> str:
    """Run a filter the way the kernel does, on one call."""
    data = struct.pack("=IIQ6Q", number & 0xFFFFFFFF, arch, 0, *(*arguments, *[0] * 6)[:6])
    code = [struct.unpack_from("=HBBI", program, at) for at in range(0, len(program), 8)]
    at, accumulator = 0, 0
    while True:
        operation, if_true, if_false, value = code[at]
        at += 1
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif operation == 0x06:
            if value & 0xFFFF0000 == 0x00050000:
                return errno.errorcode[value & 0xFFFF]
            return {0x7FFF0000: ALLOW, 0x80000000: KILL}[value]
        else:
            test = {0x15: accumulator == value, 0x25: accumulator > value}
            test[0x45] = bool(accumulator & value)
            at += if_true if test[operation] else if_false


ARCHES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}


@pytest.fixture(params=ARCHES)
def judged(request: pytest.FixtureRequest):
    arch, column = ARCHES[request.param]
    program = seccomp.compile_filter(request.param)

    def check(numbers: tuple[int | None, int | None], *arguments: int) -> str:
        number = numbers[column]
        assert number is not None
        return judge(program, arch, number, *arguments)

    return check


def test_filter_size_fits_the_kernel():
    assert len(seccomp.compile_filter("x86_64")) // 8 < 4096


def test_filter_denies_every_listed_call(judged):
    for name, numbers in seccomp.DENIED.items():
        if None not in numbers:
            assert judged(numbers) == "EPERM", name


def test_filter_knows_no_call_of_tomorrow_and_no_other_architecture():
    for machine, (arch, _) in ARCHES.items():
        program = seccomp.compile_filter(machine)
        assert judge(program, arch, seccomp.LAST_KNOWN) == ALLOW
        assert judge(program, arch, seccomp.LAST_KNOWN + 1) == "ENOSYS"
        assert judge(program, arch, 0x40000000 | 1) == "ENOSYS"
        assert judge(program, arch, -1) == "ENOSYS"
        assert judge(program, 0x40000003, 1) == KILL


def test_filter_judges_arguments(judged):
    assert judged(seccomp.CLONE, 17) == ALLOW
    assert judged(seccomp.CLONE, 0x10000000 | 17) == "EPERM"
    assert judged(seccomp.CLONE, (0x20000000 | 17) | (1 << 40)) == "EPERM"
    assert judged(seccomp.UNSHARE, 0x400) == ALLOW
    assert judged(seccomp.UNSHARE, 0x80) == "EPERM"
    assert judged(seccomp.IOCTL, 0, 0x5401) == ALLOW
    assert judged(seccomp.IOCTL, 0, 0x5412) == "EPERM"
    assert judged(seccomp.IOCTL, 0, 0x5412 | (1 << 33)) == "EPERM"
    assert judged(seccomp.PERSONALITY, 0xFFFFFFFF) == ALLOW
    assert judged(seccomp.PERSONALITY, 0x0040000) == "EPERM"
    for family in (1, 2, 10):
        assert judged(seccomp.SOCKET, family, 1, 5) == ALLOW
    assert judged(seccomp.SOCKET, 16, 3, 0) == ALLOW
    for family in (16, 17, 38, 40, 44):
        assert judged(seccomp.SOCKET, family, 3, 12) == "EAFNOSUPPORT"
    fchmod, _ = seccomp.SET_MODE["fchmod"]
    assert judged(fchmod, 0, 0o755) == ALLOW
    assert judged(fchmod, 0, 0o1777) == ALLOW
    assert judged(fchmod, 0, 0o4755) == judged(fchmod, 0, 0o2755) == "EPERM"
    openat, _, _ = seccomp.OPEN["openat"]
    assert judged(openat, 0, 0, 0, 0o4755) == ALLOW  # no file is made, the mode means nothing
    assert judged(openat, 0, 0, 0o101, 0o644) == ALLOW
    assert judged(openat, 0, 0, 0o101, 0o4644) == "EPERM"
    assert judged(openat, 0, 0, 0o20200002, 0o6644) == "EPERM"


def test_filter_needs_a_known_machine():
    with pytest.raises(Unsupported, match="riscv64"):
        seccomp.compile_filter("riscv64")


@pytest.mark.parametrize(
    ("header", "column"),
    [
        ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", 0),
        ("/usr/include/asm-generic/unistd.h", 1),
    ],
)
def test_numbers_are_those_of_the_system_headers(header: str, column: int):
    if not Path(header).exists():
        pytest.skip(f"{header} is not installed")
    text = Path(header).read_text()
    known = {name: int(n) for name, n in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)}
    listed = {
        **seccomp.DENIED,
        **seccomp.ABSENT,
        **{name: entry[0] for name, entry in seccomp.SET_MODE.items()},
        **{name: entry[0] for name, entry in seccomp.OPEN.items()},
        "clone": seccomp.CLONE,
        "ioctl": seccomp.IOCTL,
        "personality": seccomp.PERSONALITY,
        "socket": seccomp.SOCKET,
        "unshare": seccomp.UNSHARE,
    }
    checked = 0
    for name, numbers in listed.items():
        if name in known or numbers[column] is None:
            assert known.get(name) == numbers[column], name
            checked += 1
    assert checked > 50


def test_a_command_that_said_nothing_leaves_no_empty_brackets():
    ended = ExecResult(exit_code=137, stdout="", stderr="", output="", timed_out=True)
    with pytest.raises(SandboxTimeout, match=r"raise timeout= \(it said nothing\)"):
        ended.check()
