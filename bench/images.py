"""Images of sandboxes: bytes read before the first program runs, packing, forks, disks.

`python -m bench.images [--store DIR --image NAME]`, as root. Without an image the built-in "python"
is taken. Medians and 95th percentiles; other work on the machine is included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from fathom.sandbox.images import (
    Disk,
    Image,
    Store,
    attach,
    builtin_image,
    compose,
    flatten,
    pack_diff,
    push,
    snapshot,
    write_base,
)
from fathom.sandbox.images.care import describe


def milliseconds(step: Callable[[int], object], count: int) -> dict[str, float]:
    """Time `step`. `cpu_p50_ms` is this process's own share, `best_ms` the fastest run."""
    cpu: list[float] = []
    times: list[float] = []
    for number in range(count):
        started, used = time.perf_counter(), time.process_time()
        step(number)
        times.append((time.perf_counter() - started) * 1000)
        cpu.append((time.process_time() - used) * 1000)
    ordered = sorted(times)
    return {
        "p50_ms": round(statistics.median(times), 2),
        "p95_ms": round(ordered[int(0.95 * (len(ordered) - 1))], 2),
        "best_ms": round(ordered[0], 2),
        "cpu_p50_ms": round(statistics.median(cpu), 2),
        "runs": count,
    }


def on_demand(store: Store, image: Image, work: Path) -> dict[str, object]:
    """Mount an image whose contents are elsewhere, and count what is read when."""
    push(store, image, str(work / "origin"), "bench")
    with Store(work / "empty") as fresh:
        started = time.perf_counter()
        there = attach(fresh, str(work / "origin"), "bench")
        attached = time.perf_counter() - started
        rows = describe(fresh, there)
        total = sum(meta + data for _, meta, data, _ in rows)
        sums = sum(path.stat().st_size for path in (fresh.folder / "data").glob("*.sums"))
        metadata = sum(path.stat().st_size for path in (fresh.folder / "blobs").iterdir()) + sums

        def contents() -> int:
            return sum(row[3] for row in describe(fresh, there))

        (work / "od").mkdir()
        started = time.perf_counter()
        with compose(fresh, there, work / "od") as stack:
            mounted = time.perf_counter() - started
            files = sum(len(names) for _, _, names in os.walk(stack.root))
            before = contents()
            started = time.perf_counter()
            subprocess.run(["chroot", str(stack.root), "/bin/bash", "-c", "true"], check=True)
            first = time.perf_counter() - started
            after = contents()
            started = time.perf_counter()
            subprocess.run(["chroot", str(stack.root), "/bin/bash", "-c", "true"], check=True)
            second = time.perf_counter() - started
    return {
        "image_bytes": total,
        "metadata_bytes": metadata,
        "contents_before_first_exec": before,
        "read_before_first_exec_percent": round(100 * (metadata + before) / total, 3),
        "contents_after_bash": after,
        "read_after_bash_percent": round(100 * (metadata + after) / total, 2),
        "files_listed": files,
        "attach_ms": round(attached * 1000, 1),
        "mount_ms": round(mounted * 1000, 1),
        "first_exec_ms": round(first * 1000, 1),
        "second_exec_ms": round(second * 1000, 1),
    }


def writes(upper: Path, count: int = 200, size: int = 2000) -> None:
    """Make an upper folder of small files and one mark of a deleted one."""
    upper.mkdir()
    for number in range(count):
        (upper / f"file{number}").write_bytes(os.urandom(size))
    os.mknod(upper / "gone", 0o020000, 0)


def measure(store: Store, image: Image, work: Path, rounds: int) -> dict[str, object]:
    """Measure everything with one image in the folder `work`."""
    report: dict[str, object] = {"on_demand": on_demand(store, image, work)}
    for number in range(rounds):
        writes(work / f"upper{number}")
    loose = Store(store.folder, durable=False)

    def mount(number: int) -> None:
        (work / f"m{number}").mkdir()
        (work / f"w{number}").mkdir()
        compose(store, image, work / f"m{number}", upper=work / f"w{number}").close()

    def fork(number: int, one: Store) -> None:
        later = snapshot(one, image, work / f"upper{number}")
        target = work / f"f{one.durable}{number}"
        (target / "w").mkdir(parents=True)
        with compose(one, later, target, upper=target / "w") as stack:
            assert (stack.root / "file0").stat().st_size == 2000

    def mkfs(number: int) -> None:
        subprocess.run(
            ["mkfs.erofs", "--quiet", str(work / f"e{number}"), str(work / f"upper{number}")],
            check=True,
            capture_output=True,
        )

    report["mount_with_upper"] = milliseconds(mount, rounds)
    report["pack_diff_200_files"] = milliseconds(
        lambda n: pack_diff(loose, work / f"upper{n}"), rounds
    )
    report["pack_diff_200_files_synced"] = milliseconds(
        lambda n: pack_diff(store, work / f"upper{n}"), rounds
    )
    if shutil.which("mkfs.erofs"):
        report["mkfs_erofs_200_files"] = milliseconds(mkfs, rounds)
    for number in range(rounds):
        shutil.rmtree(work / f"upper{number}")
        writes(work / f"upper{number}")
    report["fork_pack_mount_read"] = milliseconds(lambda n: fork(n, loose), rounds)
    large = work / "large"
    writes(large, 50, 2_000_000)
    report["pack_diff_100_MB"] = milliseconds(lambda n: pack_diff(loose, large), 3)
    chain = image
    for number in range(min(rounds, 8)):
        chain = snapshot(loose, chain, work / f"upper{number}")
    report["flatten_chain_of_8"] = milliseconds(lambda n: flatten(loose, chain.layers[1:]), 3)
    base = work / "base.raw"
    started = time.perf_counter()
    write_base(store, image, base)
    report["vm_base_erofs_ms"] = round((time.perf_counter() - started) * 1000)
    if shutil.which("qemu-img"):
        disk = Disk.create(work / "vm.qcow2", base)
        frozen = disk.snapshot(work / "s.qcow2")
        report["vm_disk_fork"] = milliseconds(
            lambda n: frozen.fork(work / f"fork{n}.qcow2"), rounds
        )
    loose.close()
    return report


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--image")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--work", type=Path, help="folder on the disk to measure")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.work) as name:
        work = Path(name)
        with Store(given.store or work / "store") as store:
            if given.image:
                image = store.resolve(given.image)
            else:
                image = builtin_image(store, "python")
            report = measure(store, image, work, given.rounds)
    report["machine"] = {
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "load": [round(value, 1) for value in os.getloadavg()],
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
