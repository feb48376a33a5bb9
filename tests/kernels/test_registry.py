"""The kernel registry: what computes a call, and that nothing falls back unasked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fathom.errors import KernelError
from fathom.kernels import operation, register, registered, registry, select, use_backend

X = torch.ones(2)


@pytest.fixture(autouse=True)
def _own_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What these tests register is gone afterwards."""
    monkeypatch.setattr(registry, "_kernels", dict(registry._kernels))
    monkeypatch.setattr(registry, "_accepts", dict(registry._accepts))
    yield
    assert registry._forced == []


def add(op: str, backend: str, **options: object) -> None:
    register(op, backend, **options)(lambda x, **_: backend)  # type: ignore[arg-type]


def test_the_fastest_backend_of_the_device_computes() -> None:
    add("probe", "reference")
    assert operation("probe")(X) == "reference"
    add("probe", "numba")
    assert operation("probe")(X) == "numba"


def test_another_devices_backend_is_never_chosen() -> None:
    add("probe", "triton")
    with pytest.raises(KernelError, match="'probe' has no kernel for device 'cpu'"):
        operation("probe")(X)
    add("probe", "reference")
    assert operation("probe")(X) == "reference"
    assert operation("probe")(torch.empty(2, device="meta")) == "reference"


def test_a_refused_call_goes_to_the_reference() -> None:
    add("probe", "reference")
    add("probe", "numba", accepts=lambda x, small=True: small)
    assert operation("probe")(X) == "numba"
    assert operation("probe")(X, small=False) == "reference"


def test_a_refused_call_without_a_reference_is_an_error() -> None:
    add("probe", "numba", accepts=lambda x: False)
    with pytest.raises(KernelError, match="probe"):
        operation("probe")(X)


def test_a_forced_backend_computes_or_fails() -> None:
    add("probe", "reference")
    with use_backend("reference"):
        assert operation("probe")(X) == "reference"
    with use_backend("numba"), pytest.raises(KernelError, match="no kernel for backend 'numba'"):
        operation("probe")(X)
    add("probe", "numba", accepts=lambda x: False)
    with use_backend("numba"), pytest.raises(KernelError, match="accepts this call"):
        operation("probe")(X)
    add("other", "numba")
    add("other", "reference")
    with use_backend("reference"):
        assert operation("other")(X) == "reference"


def test_forced_backends_nest_and_end_with_their_block() -> None:
    add("probe", "reference")
    add("probe", "numba")
    with use_backend("reference"):  # not what would be chosen otherwise
        with use_backend("numba"):
            assert operation("probe")(X) == "numba"
        assert operation("probe")(X) == "reference"
        with pytest.raises(RuntimeError, match="inside"), use_backend("numba"):
            raise RuntimeError("inside")
        assert operation("probe")(X) == "reference"
    assert operation("probe")(X) == "numba"


def test_a_real_operation_obeys_a_forced_backend() -> None:
    with use_backend("numba"), pytest.raises(KernelError, match="rmsnorm"):
        operation("rmsnorm")(X, X, 1e-6)
    with use_backend("no_such_backend"), pytest.raises(KernelError, match="no_such_backend"):
        operation("rmsnorm")(X, X, 1e-6)


def test_an_unknown_operation_is_an_error_when_called() -> None:
    missing = operation("no_such_operation")
    assert missing.__name__ == "no_such_operation"
    with pytest.raises(KernelError, match="'no_such_operation' has no kernel for device 'cpu'"):
        missing(X)
    with pytest.raises(KernelError):
        select("no_such_operation", X)


def test_a_call_without_tensor_or_with_an_unknown_device_is_an_error() -> None:
    with pytest.raises(KernelError, match="without a tensor"):
        operation("rmsnorm")(1.0, eps=1e-6)

    class Elsewhere(torch.Tensor):
        device = torch.device("xpu")

    with pytest.raises(KernelError, match="no backend for device 'xpu'"):
        operation("rmsnorm")(torch.ones(2).as_subclass(Elsewhere))


def test_errors_inside_a_kernel_are_not_swallowed() -> None:
    def broken(x: torch.Tensor) -> None:
        raise ValueError("broken kernel")

    add("probe", "reference")
    register("probe", "numba")(broken)
    with pytest.raises(ValueError, match="broken kernel"):
        operation("probe")(X)


def test_every_operation_has_a_reference() -> None:
    from fathom.engine import stored_runner, torch_runner  # noqa: F401  (register a `runner` each)

    table = registered()
    assert table == dict(sorted(table.items()))
    assert table["runner"] == ["numba", "reference", "triton"]
    for op, backends in table.items():
        assert "reference" in backends, op
        assert backends == sorted(set(backends))


def test_every_cuda_operation_is_compared_with_its_reference() -> None:
    """At least, a test of kernels names it."""
    own = Path(__file__).resolve().parent
    kernels = own.parents[1] / "fathom" / "kernels" / "triton"
    sources = "".join(file.read_text() for file in kernels.glob("*.py"))
    operations = re.findall(r'register\("(\w+)", "triton"', sources)
    tests = "".join(file.read_text() for file in own.glob("test_*.py"))
    assert len(operations) > 15
    assert [op for op in operations if f'"{op}"' not in tests] == []
