"""Conventions that a reader relies on, checked on the syntax tree of every module."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "fathom").rglob("*.py"))
SCRIPTS = [
    p for f in ("tests", "docs", "bench", "recipes", "scripts") for p in (ROOT / f).rglob("*.py")
]

# The words that name dimensions; `block`, `group` are the sizes of a quantisation tile and group.
GLOSSARY = frozenset(
    "tokens batch seq blocks window heads head_dim rope_dim index_heads index_dim topk hidden "
    "streams experts vocab groups entries rows cols block group pages bytes slots tail".split()
)
ARITHMETIC = frozenset({"min", "max", "ceil", "or"})
SHAPE = re.compile(r"\[([^\]\[]*)\]")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@dataclass(frozen=True)
class TensorFunction:
    """A public function whose annotations mention tensors, with the texts that may describe it."""

    where: str
    tensors: list[str]
    known: frozenset[str]  # words that its shapes may use beside the glossary
    own: str
    around: str  # docstrings of its class and module


def tensor_functions(tree: ast.Module, file: str) -> Iterator[TensorFunction]:
    defined = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}

    def visit(node: ast.AST, around: str) -> Iterator[TensorFunction]:
        for child in ast.iter_child_nodes(node):
            name = getattr(child, "name", "_")
            if name.startswith("_"):
                continue
            if isinstance(child, ast.ClassDef):
                yield from visit(child, f"{around}\n{ast.get_docstring(child) or ''}")
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            arguments = [*child.args.posonlyargs, *child.args.args, *child.args.kwonlyargs]
            tensors = [a.arg for a in arguments if mentions_tensor(a.annotation)]
            if tensors or mentions_tensor(child.returns):
                yield TensorFunction(
                    where=f"{file}:{child.lineno} {name}",
                    tensors=tensors,
                    known=GLOSSARY | ARITHMETIC | defined | {a.arg for a in arguments},
                    own=ast.get_docstring(child) or "",
                    around=around,
                )

    yield from visit(tree, ast.get_docstring(tree) or "")


def mentions_tensor(annotation: ast.expr | None) -> bool:
    return annotation is not None and bool(re.search(r"\bTensor\b", ast.unparse(annotation)))


def states_shape(text: str, name: str) -> bool:
    """Whether `text` gives a shape for `name`, alone (`q: [..]`) or in a list (`q, kv: [..]`).

    A clause may also refer to another shape: "its shape", "the same shape", "same".
    """
    remark = r"`?(?: \([^)]*\))?"
    others = rf"(?:(?:,| and|;)\s`?\w+{remark})*"
    clause = r"(?:(?!;|\.\s).)*?(?:\[|\bsame\b|\bshape\b)"
    return bool(re.search(rf"\b{name}\b{remark}{others}(?::\s{clause}|\s\[)", text, re.DOTALL))


def shape_problems(f: TensorFunction) -> Iterator[str]:
    """What the docstrings leave unsaid about shapes, and dimensions that nobody knows."""
    if not SHAPE.search(f.own) and "shape" not in f.own:
        yield f"{f.where}: the docstring states no shape"
    for name in f.tensors:
        if not states_shape(f.own, name) and not states_shape(f.around, name):
            yield f"{f.where}: no shape for {name}"
    for shape in SHAPE.findall(f.own):
        words = set(re.findall(r"[A-Za-z_]+", shape))
        if words & GLOSSARY and words - f.known:
            unknown = ", ".join(sorted(words - f.known))
            yield f"{f.where}: [{shape}] uses words outside the glossary: {unknown}"


def test_shapes_are_documented():
    problems = [
        problem
        for path in MODULES
        for function in tensor_functions(parse(path), name_of(path))
        for problem in shape_problems(function)
    ]
    assert not problems, "\n".join(problems)


SAMPLE = '''
"""Module. `mask` [batch, seq] bool wherever it appears."""
class Layer:
    def good(self, q: Tensor, kv: torch.Tensor | None, mask: Tensor) -> Tensor:
        """q: [batch, seq, head_dim]; kv (or None): [batch, entries, head_dim]; as q."""
    def listed(self, gate: Tensor, up: Tensor) -> Tensor:
        """gate, up: [tokens, cols]. Returns [tokens, cols // group] float32."""
    def silent(self, q: Tensor) -> int:
        """Does a thing."""
    def vague(self, q: Tensor) -> Tensor:
        """Takes q. Returns [tokens, hidden]."""
    def foreign(self, q: Tensor) -> None:
        """q: [tokens, channels]."""
    def _private(self, q: Tensor) -> None: ...
def plain(x: int) -> int: ...
'''


def test_the_shape_check_sees_what_it_should():
    tree = ast.parse(SAMPLE.strip())
    found = [p for f in tensor_functions(tree, "sample") for p in shape_problems(f)]
    assert [p.split(" ", 1)[1] for p in found] == [
        "silent: the docstring states no shape",
        "silent: no shape for q",
        "vague: no shape for q",
        "foreign: [tokens, channels] uses words outside the glossary: channels",
    ]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module_docstring_ends_with_its_place_in_the_paper(path):
    docstring = ast.get_docstring(parse(path))
    assert docstring, f"{name_of(path)} has no docstring"
    last = docstring.split("\n\n")[-1]
    assert last.startswith("Paper: "), f"{name_of(path)}: the last paragraph is not `Paper: ...`"
    assert re.search(r"§\d|none \(.+\)", last), f"{name_of(path)}: write §2.3.1 or none (reason)"


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=name_of)
def test_ascii_only(path):
    docstring = ast.get_docstring(parse(path), clean=False) or ""
    paper = docstring[docstring.rfind("Paper: ") :] if "Paper: " in docstring else ""
    text = path.read_text(encoding="utf-8")
    text = text.replace(paper, paper.replace("§", ""), 1) if paper else text
    if path == Path(__file__):
        text = text.replace("§", "")
    strange = [
        f"line {number}: {character!r}"
        for number, line in enumerate(text.splitlines(), 1)
        for character in line
        if not character.isascii()
    ]
    assert not strange


def test_nothing_prints_outside_the_command_line():
    printing = [
        f"{name_of(path)}:{node.lineno}"
        for path in MODULES
        if path.relative_to(ROOT / "fathom").parts[0] != "cli"
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert not printing
