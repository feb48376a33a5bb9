"""What a worker that was taken over tries: every way out but its one target and its one server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from fathom.sandbox import Container, SyncSandbox
from fathom.sandbox.trajectory.record import Kind
from fathom.sandbox.trajectory.store import Store
from fathom.sandbox.worker.door import MOST_LINES
from fathom.sandbox.worker.worker import Worker
from tests.agent.chat_server import answer, serving
from tests.sandbox.edge.daemon import Daemon
from tests.sandbox.worker.test_worker import begin, box, list_of, until, wait

TIMEOUT = 60.0
# Speaks the door's language as a stranger would, with nothing of this package.
SPEAK = """
import glob, json, os, socket, struct, sys
def door(name="socket"):
    s = socket.socket(socket.AF_UNIX); s.settimeout(20); s.connect("/run/door/" + name); return s
def take(s, n):
    data = b""
    while len(data) < n:
        piece = s.recv(n - len(data))
        if not piece: return None
        data += piece
    return data
def ask(head, data=b"", s=None):
    s = s or door()
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    s.sendall(struct.pack("<II", len(text), len(data)) + text + data)
    sizes = take(s, 8)
    if sizes is None: return None
    a, b = struct.unpack("<II", sizes)
    return json.loads(take(s, a)), take(s, b)
def run(command, key, **more):
    arguments = {"command": command, "timeout": 20, "cap": 1000, **more}
    return ask({"ask": "run", "key": key, "effect": "once", "has_data": False, "verb": "exec",
        "arguments": arguments})
def said(answer):
    return answer[1].decode(errors="replace").split("}")[-1]
"""


class Attack:
    """A worker whose loop waits for a model that never answers, and a stranger beside it."""

    def __init__(self, node: Daemon, store: Store, worker: Worker) -> None:
        self.node, self.store, self.worker = node, store, worker
        self.target, self.home = box(node, "target"), box(node, "worker")

    def python(self, code: str) -> str:
        """Run a program in the worker, as its tenant; return what it printed."""
        with self.node.client() as client:
            inside: SyncSandbox = client.attach(self.home)
            result = inside.exec(["python3", "-I", "-c", SPEAK + code], timeout=TIMEOUT)
        assert result.exit_code == 0, result.stderr
        return result.stdout

    def answer(self, code: str) -> object:
        return json.loads(self.python(f"print(json.dumps({code}))"))


@pytest.fixture(scope="module")
def module_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("runs"), durability="process")


@pytest.fixture(scope="module")
def attack(node: Daemon, module_store: Store) -> Iterator[Attack]:
    asked, go_on = threading.Event(), threading.Event()

    def hang(handler: BaseHTTPRequestHandler) -> None:
        asked.set()
        go_on.wait(TIMEOUT)
        answer("Fine.")(handler)

    with serving(hang) as server:
        worker = begin(node, module_store, server)
        assert asked.wait(TIMEOUT)
        yield Attack(node, module_store, worker)
        # After all of it the loop still works, and so does the attendant.
        go_on.set()
        assert wait(worker)["status"] == "answered"
        until(lambda: not list_of(node))


def test_its_door_is_the_only_socket_and_cannot_be_changed(attack: Attack):
    found = attack.python(
        "import stat\n"
        "for base, folders, files in os.walk('/'):\n"
        "    folders[:] = [f for f in folders if (base, f) != ('/', 'proc')]\n"
        "    for f in files:\n"
        "        try:\n"
        "            if stat.S_ISSOCK(os.lstat(os.path.join(base, f)).st_mode): print(base, f)\n"
        "        except OSError: pass\n"
    )
    assert sorted(found.split("\n")[:-1]) == ["/run/door model", "/run/door socket"]
    for code in (
        "os.unlink('/run/door/socket')",
        "os.rename('/run/door/socket', '/run/door/model')",
        "socket.socket(socket.AF_UNIX).bind('/run/door/other')",
        "open('/run/door/x', 'w')",
        "os.chmod('/run/door/socket', 0o600)",
    ):
        tried = f"try:\n    {code}\n    print('done')\nexcept OSError as e: print(e.errno)"
        assert attack.python(tried) in ("30\n", "13\n", "1\n"), code


def test_it_has_no_network_and_no_abstract_socket(attack: Attack):
    tried = """
for family, where in ((socket.AF_INET, ("1.1.1.1", 53)), (socket.AF_INET, ("127.0.0.1", PORT)),
        (socket.AF_INET, ("10.0.2.2", PORT)), (socket.AF_UNIX, "\\0fathom")):
    s = socket.socket(family); s.settimeout(2)
    try: s.connect(where); print("reached", where)
    except OSError: pass
print(len([l for l in open("/proc/net/unix").read().splitlines()[1:] if "@" in l]))
print(open("/proc/net/dev").read().count(":") )
"""
    plan = json.loads((attack.store.path("run") / "worker.json").read_text())
    assert attack.python(tried.replace("PORT", str(plan["model"][1]))) == "0\n1\n"


def test_neither_the_daemon_nor_the_log_nor_another_sandbox_has_a_path(attack: Attack):
    with attack.node.client() as client:
        other = client.create(Container(), group="others")
        other.exec("echo secret > /work/f", timeout=TIMEOUT)
        paths = [
            attack.node.folder / "edge.sock",
            attack.node.folder / other.id / "agent.sock",
            attack.node.folder / attack.target / "agent.sock",
            attack.store.path("run") / "log",
            attack.store.path("run") / "worker.json",
            Path("/run/door/../../run/fathom-edge"),
        ]
        text = json.dumps([str(path) for path in paths])
        assert attack.answer(f"[p for p in {text} if os.path.exists(p)]") == []
        for name in (other.id, attack.target, attack.home):
            for arguments in ({"sandbox": name}, {"id": name}, {"op": name}, {"spill": 1 << 30}):
                more = "".join(f", {k}={v!r}" for k, v in arguments.items())
                said = attack.answer(f"run('true', 'name'{more})[0]['code']")
                assert said == "worker_refused"
        told = attack.answer("said(run('cat /work/f; hostname', 'a/1'))")
        assert "No such file" in str(told)
        assert "secret" not in str(told)
        assert other.exec("cat /work/f", timeout=TIMEOUT).stdout == "secret\n"
        other.stop()


@pytest.mark.parametrize(
    "head",
    [
        *({"ask": ask} for ask in ("create", "list", "destroy", "open", "stop", "hello", "fork")),
        *(
            {"ask": "run", "key": "v", "effect": "once", "has_data": False, "verb": verb}
            | {"arguments": {"path": "/x", "command": "true"}}
            for verb in ("stop", "freeze", "pack", "phase", "pty")
        ),
        {"ask": "run"},
        {"ask": ["run"]},
        {"ask": "run", "key": 5, "effect": "once", "has_data": False},
        {"ask": "recall", "key": "k", "digest": "zz"},
        {"ask": "remember", "key": "k", "digest": "00" * 32, "fields": {}, "blobs": {"a": -1}},
        {"ask": "remember", "key": "k", "digest": "00" * 32, "fields": {}, "blobs": {"a": 9}},
        {"ask": "remember", "key": "k" * 5000, "digest": "00" * 32, "fields": {}, "blobs": {}},
        {"ask": "end", "fields": [1]},
        {},
        [],
        5,
        None,
    ],
)
def test_it_can_ask_for_nothing_else(attack: Attack, head: object):
    assert attack.answer(f"ask(json.loads({json.dumps(head)!r}))[0]['is']") == "error"


def test_an_operation_with_other_values_is_refused(attack: Attack):
    for more in (
        "timeout=1e999",
        "timeout=-1",
        "timeout='1'",
        "cap=1 << 40",
        "env={'A': 5}",
        "env=[1]",
        "cwd=7",
    ):
        code = f"dict(command='true', timeout=5, cap=10) | dict({more})"
        head = "{'ask': 'run', 'key': 'w', 'effect': 'once', 'has_data': False, 'verb': 'exec', "
        assert attack.answer(f"ask({head}'arguments': {code}}})[0]['is']") == "error", more
    for command in ("[1]", "7", "None", "[['a']]"):
        assert attack.answer(f"run({command}, 'w')[0]['is']") == "error", command


def test_what_is_no_request_ends_that_connection_alone(attack: Attack):
    attack.python("""
for data in (b"", b"\\0", b"\\xff" * 8, b"GET / HTTP/1.1\\r\\n\\r\\n",
        struct.pack("<II", 1 << 30, 1 << 30),
        struct.pack("<II", 200000, 0) + b"[" * 200000, struct.pack("<II", 3, 0) + b"\\xff\\xfe{"):
    s = door(); s.sendall(data); s.close()
held = []
for _ in range(300):
    try: held.append(door())
    except OSError: break
""")
    code = f"[door() for _ in range({MOST_LINES - 1})] and ask({{'ask': 'order'}})"
    assert attack.answer(f"({code} or [{{}}])[0]")
    assert attack.answer("said(run('echo still here', 'b/1'))") == "still here\n"


def test_a_key_is_not_run_twice_and_not_for_another_request(attack: Attack):
    same = "[said(run('echo x >> /tmp/once; wc -l < /tmp/once', 'c/1')) for _ in '12']"
    assert attack.answer(same) == ["1\n", "1\n"]
    assert attack.answer("run('echo y', 'c/1')[0]['code']") == "trajectory_conflict"


def test_the_other_socket_leads_to_the_one_server(attack: Attack):
    """Whatever a worker writes there, the model's server reads it, and nobody else."""
    tried = """
s = door("model")
s.sendall(b"CONNECT 127.0.0.1:22 HTTP/1.1\\r\\nHost: 127.0.0.1:22\\r\\n\\r\\n")
print(s.recv(100).split()[1].decode())
s = door("model")
s.sendall(b"GET http://169.254.169.254/latest HTTP/1.1\\r\\nHost: 169.254.169.254\\r\\n\\r\\n")
print(b'"listed"' in s.recv(10000) + s.recv(10000))
"""
    # Python's server has no CONNECT, and answers the other as a request for its own models.
    assert attack.python(tried) == "501\nTrue\n"


def test_all_that_was_asked_for_is_in_the_log(attack: Attack):
    attack.python("run('echo written down', 'd/1')")
    asked = [e for e in attack.worker._read(0) if e.record.kind is Kind.INTENT]
    assert any(e.request and "written down" in e.request.describe() for e in asked)
