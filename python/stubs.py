"""Write ops.pyi and torch.pyi: stubs.py EXTENSION OUTPUT_DIRECTORY. Runs at build time, from the library's tables."""

import importlib.util
import pathlib
import sys

HEADER = '''"""Generated from the tables of libattn {version}."""

from collections.abc import Sequence
from typing import Any, Generic, Literal, NamedTuple, TypeVar, overload

{array}
'''
SDPA = """
def function(name: str) -> Any: ...
def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor: ...
"""


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def signatures(table, mechanism, name, array, extra, place=""):
    """Three overloads: the standard outputs, one output by name, several by name."""
    text = table.arguments(mechanism, annotate=array)
    if array == "A" and not mechanism.inputs:  # no argument tells the kind
        array = "Any"
    many = f"{mechanism.result_name}[{array}]" if array in ("A", "Any") and "threads" in extra else mechanism.result_name
    standard = array if len(mechanism.standard_outputs) == 1 else many
    indent, self = "    " if place else "", "self, " if place == "method" else ""
    head = f"{indent}@staticmethod\n{indent}@overload" if place == "static" else f"{indent}@overload"
    overlap = "  # type: ignore[overload-overlap]"  # a str is a sequence of str too
    for kind, result, note in (("None = None", standard, ""), ("str", array, overlap),
                               ("Sequence[str]", f"tuple[{array} | None, ...]", "")):
        yield f"{head}\n{indent}def {name}({self}{text}, outputs: {kind}{extra}) -> {result}: ...{note}"


def stub(table, mechanisms, array, extra):
    lines = []
    tops = {}
    for m in mechanisms:
        tops.setdefault(m.name.partition(".")[0], []).append(m)
        if len(m.standard_outputs) > 1:
            base = "NamedTuple, Generic[A]" if array == "A" else "NamedTuple"
            fields = "".join(f"\n    {p.identifier}: {array}{' | None' if p.optional else ''}" for p in m.standard_outputs)
            lines.append(f"class {m.result_name}({base}):{fields}\n")
    for top, members in tops.items():
        if [m.name for m in members] == [top]:
            lines += [*signatures(table, members[0], members[0].identifier, array, extra), ""]
        else:
            lines += namespace(table, top, {m.name: m for m in members}, array, extra)
            lines.append(f"{table.identifier(top, set())}: {class_name(top)}\n")
    return "\n".join(lines)


def class_name(name):
    return "_" + "".join(part.capitalize() for part in name.replace("_", ".").split("."))


def namespace(table, name, members, array, extra):
    """A class for a function with other functions as its attributes."""
    lines, body = [], []
    children = dict.fromkeys(".".join(m.split(".")[: name.count(".") + 2]) for m in members if m.startswith(name + "."))
    for child in children:
        short = table.identifier(child.rpartition(".")[2], set())
        if any(m.startswith(child + ".") for m in members):
            lines += namespace(table, child, members, array, extra)
            body.append(f"    {short}: {class_name(child)}")
        else:
            body += signatures(table, members[child], short, array, extra, "static")
    if name in members:
        body += signatures(table, members[name], "__call__", array, extra, "method")
    return [*lines, f"class {class_name(name)}:", *body, ""]


def main():
    core = load("attn._core", sys.argv[1])
    table = load("attn._table", pathlib.Path(__file__).parent / "attn" / "_table.py")
    mechanisms = [table.Mechanism(entry) for entry in core.table()]
    out = pathlib.Path(sys.argv[2])
    head = HEADER.format(version=core.version(), array='A = TypeVar("A")  # an array of the caller\'s kind')
    (out / "ops.pyi").write_text(head + "\n" + stub(table, mechanisms, "A", ", threads: int = 0"))
    head = HEADER.format(version=core.version(), array="from torch import Tensor")
    (out / "torch.pyi").write_text(head + SDPA + "\n" + stub(table, mechanisms, "Tensor", ""))


if __name__ == "__main__":
    main()
