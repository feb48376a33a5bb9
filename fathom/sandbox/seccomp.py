"""Which system calls a tenant may not make, and that policy compiled to a BPF program.

The policy names what is denied, and answers ENOSYS to every call newer than the tables below: a
call that was not judged here does not exist in the sandbox. The same program serves every
substrate, so none of them needs libseccomp.

Paper: none (sandbox security; the report only names its platform).
"""

from __future__ import annotations

import errno
import platform
import struct

from fathom.errors import Unsupported

# Denied outright with EPERM: name -> (x86_64, aarch64); None where the call does not exist.
DENIED: dict[str, tuple[int | None, int | None]] = {
    "acct": (163, 89),
    "add_key": (248, 217),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "clock_adjtime": (305, 266),
    "clock_settime": (227, 112),
    "create_module": (174, None),
    "delete_module": (176, 106),
    "fanotify_init": (300, 262),
    "finit_module": (313, 273),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "get_kernel_syms": (177, None),
    "init_module": (175, 105),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "ioperm": (173, None),
    "iopl": (172, None),
    "kcmp": (312, 272),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "lookup_dcookie": (212, 18),
    "migrate_pages": (256, 238),
    "modify_ldt": (154, None),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "move_pages": (279, 239),
    "name_to_handle_at": (303, 264),
    "nfsservctl": (180, 42),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "process_madvise": (440, 440),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "query_module": (178, None),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "setdomainname": (171, 162),
    "sethostname": (170, 161),
    "setns": (308, 268),
    "settimeofday": (164, 170),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "sysfs": (139, None),
    "syslog": (103, 116),
    "umount2": (166, 39),
    "uselib": (134, None),
    "userfaultfd": (323, 282),
    "ustat": (136, None),
    "vhangup": (153, 58),
}
# What a server needs not, once it runs: to start programs, to reach anybody, to signal others.
# name -> (x86_64, aarch64), as above.
NOT_FOR_SERVERS: dict[str, tuple[int | None, int | None]] = {
    "bind": (49, 200),
    "connect": (42, 203),
    "execve": (59, 221),
    "execveat": (322, 281),
    "fork": (57, None),
    "kill": (62, 129),
    "listen": (50, 201),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "prlimit64": (302, 261),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "setrlimit": (160, 164),
    "socket": (41, 198),
    "tkill": (200, 130),
    "vfork": (58, None),
}
# What a function call may do to itself alone, since the interpreter that serves the next call has
# the same user: name -> numbers, and the arguments that must have one value (0 is the caller).
SELF_ALONE: dict[str, tuple[tuple[int, int], dict[int, int]]] = {
    "ioprio_set": ((251, 30), {0: 1, 1: 0}),
    "prlimit64": ((302, 261), {0: 0}),
    "sched_setaffinity": ((203, 122), {0: 0}),
    "sched_setattr": ((314, 274), {0: 0}),
    "sched_setparam": ((142, 118), {0: 0}),
    "sched_setscheduler": ((144, 119), {0: 0}),
    "setpriority": ((141, 140), {0: 0, 1: 0}),
}
# What would outlast a function call, and cannot be found and removed after it: message queues.
NOT_FOR_CALLS = {"mq_open": (240, 180), "mq_unlink": (241, 181)}
# Judged by an argument.
CLONE = (56, 220)
IOCTL = (16, 29)
PERSONALITY = (135, 92)
SOCKET = (41, 198)
UNSHARE = (272, 97)
# Answered as if it were not there: callers then use a form whose arguments can be judged.
ABSENT = {"clone3": (435, 435), "openat2": (437, 437)}
# Calls that set a file's mode: name -> numbers, and the argument that is the mode.
SET_MODE: dict[str, tuple[tuple[int | None, int | None], int]] = {
    "chmod": ((90, None), 1),
    "creat": ((85, None), 1),
    "fchmod": ((91, 52), 1),
    "fchmodat": ((268, 53), 2),
    "fchmodat2": ((452, 452), 2),
    "mknod": ((133, None), 1),
    "mknodat": ((259, 33), 2),
}
# The same where a flag says that the mode is meant: numbers, the flags' argument, the mode's.
OPEN: dict[str, tuple[tuple[int | None, int | None], int, int]] = {
    "open": ((2, None), 1, 2),
    "openat": ((257, 56), 2, 3),
}

NAMESPACE_FLAGS = 0x7E020000 | 0x80  # every CLONE_NEW*, CLONE_NEWTIME included
CLONE_THREAD = 0x00010000  # never together with a new namespace
# A clone's low byte is its exit signal, so CLONE_NEWTIME (0x80) cannot be asked of clone.
CLONE_NAMESPACE_FLAGS = 0x7E020000
# Terminal input injection, console takeover, the XFS extent swap that stopped a whole file system.
DENIED_IOCTLS = (0x5412, 0x541C, 0xC0C0586D)
# A tenant's file in a bound folder belongs to that folder's owner, who may be root of the host.
# With one of these bits it would hand out the owner's rights to whoever runs it there.
SET_ID_BITS = 0o6000
CREATES = 0o100 | 0o20000000  # O_CREAT, O_TMPFILE
AF_UNIX, AF_INET, AF_INET6, AF_NETLINK = 1, 2, 10, 16
NETLINK_ROUTE = 0
LAST_KNOWN = 462

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_LD_WORD, _JEQ, _JGT, _JSET, _RET = 0x20, 0x15, 0x25, 0x45, 0x06
_ALLOW = 0x7FFF0000
_KILL_PROCESS = 0x80000000
_NUMBER, _ARCH = 0, 4


def _argument(index: int) -> int:
    """Return the offset of an argument's low half; every value judged here fits into it."""
    return 16 + 8 * index


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _return(error: int | None) -> bytes:
    return _op(_RET, _ALLOW if error is None else 0x00050000 | error)


def _when(number: int, body: list[bytes]) -> list[bytes]:
    """Run `body` only for this call; it must end in a return."""
    return [_op(_JEQ, number, 0, len(body)), *body]


def _deny_any(argument: int, test: int, values: tuple[int, ...]) -> list[bytes]:
    body = [_op(_LD_WORD, _argument(argument))]
    for value in values:
        body += [_op(test, value, 0, 1), _return(errno.EPERM)]
    return [*body, _return(None)]


def _allow_only(argument: int, values: tuple[int, ...], error: int) -> list[bytes]:
    body = [_op(_LD_WORD, _argument(argument))]
    for value in values:
        body += [_op(_JEQ, value, 0, 1), _return(None)]
    return [*body, _return(error)]


def _socket_families() -> list[bytes]:
    """Allow sockets of this machine's own kinds, and of netlink the routing table alone."""
    load, *rest = _allow_only(0, (AF_UNIX, AF_INET, AF_INET6), errno.EAFNOSUPPORT)
    routes_only = _allow_only(2, (NETLINK_ROUTE,), errno.EAFNOSUPPORT)
    return [load, _op(_JEQ, AF_NETLINK, 0, len(routes_only)), *routes_only, *rest]


def compile_filter(machine: str | None = None, *, server: bool = False) -> bytes:
    """Compile the policy for this machine to an array of 8-byte BPF instructions.

    `server`: for a process that serves open sockets and needs nothing else; threads it may start.

    Raises Unsupported on an architecture other than x86_64 and aarch64.
    """
    column, program = _head(machine)
    program += [
        # x32 numbers are larger still, so this line refuses them too.
        _op(_JGT, LAST_KNOWN, 0, 1),
        _return(errno.ENOSYS),
    ]
    denied_outright = {**DENIED, **(NOT_FOR_SERVERS if server else {})}
    for numbers in denied_outright.values():
        if (number := numbers[column]) is not None:
            program += _when(number, [_return(errno.EPERM)])
    for numbers in ABSENT.values():
        program += _when(numbers[column], [_return(errno.ENOSYS)])
    for numbers, mode in SET_MODE.values():
        if (number := numbers[column]) is not None:
            program += _when(number, _deny_any(mode, _JSET, (SET_ID_BITS,)))
    for numbers, flags, mode in OPEN.values():
        if (number := numbers[column]) is not None:
            only_if_created = [
                _op(_LD_WORD, _argument(flags)),
                _op(_JSET, CREATES, 1, 0),
                _return(None),
            ]
            denied = _deny_any(mode, _JSET, (SET_ID_BITS,))
            program += _when(number, [*only_if_created, *denied])
    if server:
        only_threads = [
            _op(_LD_WORD, _argument(0)),
            _op(_JSET, CLONE_THREAD, 1, 0),
            _return(errno.EPERM),
        ]
        program += _when(CLONE[column], [*only_threads, _return(None)])
    else:
        program += _when(CLONE[column], _deny_any(0, _JSET, (CLONE_NAMESPACE_FLAGS,)))
    program += _when(UNSHARE[column], _deny_any(0, _JSET, (NAMESPACE_FLAGS,)))
    program += _when(IOCTL[column], _deny_any(1, _JEQ, DENIED_IOCTLS))
    program += _when(PERSONALITY[column], _allow_only(0, (0, 0xFFFFFFFF), errno.EPERM))
    program += _when(SOCKET[column], _socket_families())
    program.append(_return(None))
    return b"".join(program)


def compile_call_filter(machine: str | None = None) -> bytes:
    """Compile what function calls may not do besides. It is put on top of `compile_filter`'s.

    Raises Unsupported on an architecture other than x86_64 and aarch64.
    """
    column, program = _head(machine)
    for numbers, arguments in SELF_ALONE.values():
        body: list[bytes] = []
        for argument, value in arguments.items():
            body += [_op(_LD_WORD, _argument(argument)), _op(_JEQ, value, 1, 0)]
            body.append(_return(errno.EPERM))
        program += _when(numbers[column], [*body, _return(None)])
    for numbers in NOT_FOR_CALLS.values():
        program += _when(numbers[column], [_return(errno.EPERM)])
    program.append(_return(None))
    return b"".join(program)


def _head(machine: str | None) -> tuple[int, list[bytes]]:
    """Return the tables' column for a machine, and a program up to the loaded call's number."""
    machine = machine or platform.machine()
    if machine not in _AUDIT_ARCH:
        raise Unsupported(
            f"the sandbox has no system call table for {machine}: use an x86_64 or aarch64 machine"
        )
    program = [
        _op(_LD_WORD, _ARCH),
        _op(_JEQ, _AUDIT_ARCH[machine], 1, 0),
        _op(_RET, _KILL_PROCESS),
        _op(_LD_WORD, _NUMBER),
    ]
    return 0 if machine == "x86_64" else 1, program


def oci_form() -> dict[str, object]:
    """Return the outright denials in the form of an OCI runtime configuration."""
    return {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [
            {"names": sorted(DENIED), "action": "SCMP_ACT_ERRNO", "errnoRet": errno.EPERM}
        ],
    }
