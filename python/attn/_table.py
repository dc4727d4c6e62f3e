"""From the library's tables to Python: names, signatures, documentation, and the source of the functions.

Only this file knows how a table entry becomes a function; attn.ops, attn.torch and the type stubs all use it. It imports
nothing of the package, so that the build can use it too.
"""

import json
import keyword
import re
from dataclasses import dataclass

PORT_TYPES = {
    "float": "float32, float16 or bfloat16",
    "float32": "float32",
    "cache": "float32, float16, bfloat16 or int8",
    "int": "int32 or int64",
    "bool": "bool",
}
PARAM_TYPES = {
    "bool": "bool",
    "int": "int",
    "float": "float",
    "choice": "str",
    "ints": "Sequence[int]",
    "floats": "Sequence[float]",
    "bools": "Sequence[bool]",
}


@dataclass(frozen=True)
class Port:
    """An input or output: `shape` in symbols ("B,H,N,D"), `type` one of PORT_TYPES."""

    name: str
    shape: str
    type: str
    optional: bool
    differentiable: bool
    on_request: bool
    help: str
    identifier: str = ""


@dataclass(frozen=True)
class Param:
    """A parameter. `required` ones have no default; a default of None is automatic (`default_text` says how)."""

    name: str
    type: str
    required: bool
    default: object
    default_text: str | None
    choices: tuple
    min: float
    max: float
    min_open: bool
    max_open: bool
    min_items: int
    max_items: int
    help: str
    identifier: str = ""

    @property
    def nullable(self):
        return self.default is None and not self.required

    @property
    def is_list(self):
        return self.type in ("ints", "floats", "bools")

    @property
    def range(self):
        """">= 1, < 5", or "" without bounds."""
        if self.type in ("bool", "bools", "choice"):
            return ""
        low = "" if self.min == float("-inf") else f"{'>' if self.min_open else '>='} {self.min:.10g}"
        high = "" if self.max == float("inf") else f"{'<' if self.max_open else '<='} {self.max:.10g}"
        return ", ".join(filter(None, (low, high)))


class Mechanism:
    """What the library says about one mechanism. Printed, it is the documentation."""

    def __init__(self, entry):
        self.name = entry["name"]
        self.title = entry["title"] or ""
        self.summary = entry["summary"] or ""
        self.paper = entry["paper"] or ""
        self.differentiable = entry["differentiable"]
        taken = {"outputs", "threads"}
        self.inputs = tuple(Port(**p, identifier=identifier(p["name"], taken)) for p in entry["inputs"])
        self.outputs = tuple(Port(**p, identifier=identifier(p["name"], set())) for p in entry["outputs"])
        self.params = tuple(_param(p, taken) for p in entry["params"])

    @property
    def standard_outputs(self):
        """Those that a call gives without being asked."""
        return tuple(p for p in self.outputs if not p.on_request)

    @property
    def arguments(self):
        """The inputs in the order of the function's arguments: the required ones first."""
        return tuple(sorted(self.inputs, key=lambda p: p.optional))

    @property
    def identifier(self):
        return identifier(self.name.rpartition(".")[2], set())

    @property
    def result_name(self):
        return "".join(part.capitalize() for part in re.split(r"[._]", self.name)) + "Result"

    def __repr__(self):
        return f"{self.name}: {document(self)}"


def identifier(name, taken):
    """A Python name for a table's name, unlike those in `taken`, which it joins."""
    made = re.sub(r"\W", "_", name)
    while keyword.iskeyword(made) or made in taken:
        made += "_"
    taken.add(made)
    return made


def _param(entry, taken):
    entry = dict(entry)
    text = entry["default"]
    entry["required"] = text is None
    entry["choices"] = tuple(entry["choices"].split("|")) if entry["choices"] else ()
    entry["default"] = value(text) if text is not None else None
    if entry["type"] in ("ints", "floats", "bools") and entry["default"] is not None:
        items = entry["default"]
        entry["default"] = tuple(items) if isinstance(items, list) else (items,)
    if entry["type"] in ("float", "floats") and entry["default"] is not None:
        items = entry["default"]
        entry["default"] = tuple(map(float, items)) if isinstance(items, tuple) else float(items)
    return Param(**entry, identifier=identifier(entry["name"], taken))


def value(text):
    """A parameter's value as written in a SPEC: JSON where it is JSON, a name otherwise."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def parse_spec(spec):
    """("name", {"key": value}) of "name:key=value,key=[1,2]"."""
    name, _, rest = spec.partition(":")
    params = {}
    for item in re.findall(r"(?:\[[^\]]*\]|[^,\[])+", rest):
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise ValueError(f"{name}: '{item}': expected key=value")
        if key in params:
            raise ValueError(f"{name}: parameter '{key}' is given twice")
        params[key] = value(text)
    return name, params


# ---- Documentation ----


def _wrapped(text, indent="    ", width=100):
    lines, line = [], ""
    for word in text.split():
        if line and len(indent) + len(line) + 1 + len(word) > width:
            lines.append(indent + line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return "\n".join([*lines, indent + line] if line else lines)


def _section(title):
    return f"\n{title}\n{'-' * len(title)}"


def _port_line(port):
    notes = ", optional" if port.optional else ""
    notes += ", on request" if port.on_request else ""
    notes += ", differentiable" if port.differentiable else ""
    return f"{port.identifier} : array [{', '.join(port.shape.split(','))}], {PORT_TYPES[port.type]}{notes}"


def _param_line(p):
    kind = " | ".join(map(repr, p.choices)) if p.type == "choice" else PARAM_TYPES[p.type]
    default = "required" if p.required else f"default {p.default_text or repr(p.default)}"
    return f"{p.identifier} : {kind}{' ' + p.range if p.range else ''}, {default}"


def document(m, torch=False):
    """The docstring."""
    lines = [m.title + ("" if m.title.endswith(".") else "."), ""]
    lines += [_wrapped(p, "") for p in m.summary.split("\n") if p.strip()]
    lines.append(_section("Parameters"))
    for port in m.arguments:
        lines += [_port_line(port), _wrapped(port.help)]
    for p in m.params:
        lines += [_param_line(p), _wrapped(p.help)]
    lines += [
        "outputs : str or sequence of str, optional",
        _wrapped("Which outputs to compute: one name gives that array, several give a named tuple."),
    ]
    if not torch:
        lines += ["threads : int >= 0, default 0", _wrapped("Threads to use; 0 for all. Results do not depend on it.")]
    lines.append(_section("Returns"))
    for port in m.outputs:
        lines += [_port_line(port), _wrapped(port.help)]
    if len(m.standard_outputs) > 1:
        lines.append(_wrapped("As a named tuple; outputs that these arguments do not produce are None.", ""))
    lines.append(_section("Raises"))
    lines += [
        "ValueError",
        _wrapped("A parameter out of range, or shapes that do not agree."),
        "TypeError",
        _wrapped("An input of a data type or kind that it does not accept."),
        "MemoryError",
        _wrapped("Not enough memory."),
    ]
    if m.paper:
        lines += [_section("References"), m.paper]
    return "\n".join(lines) + "\n"


# ---- Source ----


def _annotation(p):
    kind = f"Literal{list(p.choices)!r}" if p.type == "choice" else PARAM_TYPES[p.type]
    if p.is_list:
        kind += f" | {PARAM_TYPES[p.type][9:-1]}"
    return kind + (" | None" if p.nullable else "")


def arguments(m, annotate=None, extra=()):
    """The text of the argument list. annotate: the type of arrays, or None for a list without types."""
    parts = []
    for port in m.arguments:
        kind = f": {annotate}{' | None' if port.optional else ''}" if annotate else ""
        parts.append(port.identifier + kind + (" = None" if port.optional else "") if annotate
                     else port.identifier + ("=None" if port.optional else ""))
    parts.append("*")
    for p in m.params:
        kind = f": {_annotation(p)}" if annotate else ""
        parts.append(f"{p.identifier}{kind}" + ("" if p.required else f"={p.default!r}"))
    return ", ".join([*parts, *extra])


def names(ports):
    return "".join(f"{p.identifier}, " for p in ports)


def _key(m, lists):
    """The parameters as a tuple. lists: the text that makes a list hashable."""
    return "(" + "".join((lists.format(p.identifier) if p.is_list else p.identifier) + ", " for p in m.params) + ")"


# What `attn.ops` runs: _routes says which types belong to PyTorch, _cache keeps mechanisms by their parameters.
DIRECT = """\
def {name}({arguments}):
{route}    try:
        op = _cache[{key}]
    except (KeyError, TypeError):
        op = _make({key})
    if outputs is None:
        return {result}
    return _select(op, outputs, threads, {inputs})
"""
ROUTE = """\
    if _routes[type({first})]:
        return _torch()({inputs}{params}outputs=outputs)
"""


def direct_source(m, routed=True):
    call = f"op.forward(None, threads, {names(m.inputs)})"
    one = len(m.standard_outputs) == 1
    passed = "".join(f"{p.identifier}={p.identifier}, " for p in (*m.arguments, *m.params))
    route = ROUTE.format(first=m.arguments[0].identifier, inputs=passed, params="") if m.inputs and routed else ""
    return DIRECT.format(
        name=m.identifier,
        arguments=arguments(m, extra=("outputs=None", "threads=0")),
        route=route,
        key=_key(m, "{}"),
        result=call if one else f"_Result(*{call})",
        inputs=names(m.inputs),
    )


# What `attn.torch` runs: the front calls the registered operator, or the library itself where nobody but autograd watches;
# the kernel is what is registered for the CPU.
FRONT = """\
def {name}({arguments}):
    way = {way}
    if way == 1:
        return _direct({passed}outputs=outputs, threads=_threads())
    if way == 2:
        return _recorded({key}, outputs, {inputs})
    if outputs is None:
        return {result}
    return _select(_operator({passed}outputs=_names(outputs)), outputs)
"""
KERNEL = """\
def {name}({arguments}):
    return {call}
"""


def front_source(m):
    passed = names(m.arguments) + "".join(f"{p.identifier}={p.identifier}, " for p in m.params)
    call = f"_operator({passed[:-2]})"
    if len(m.outputs) > 1:
        call = f"_standard({call})"
    return FRONT.format(name=m.identifier, arguments=arguments(m, extra=("outputs=None",)), passed=passed, result=call,
                        inputs=names(m.inputs), key=_key(m, "{}"), way=f"_way({names(m.inputs)})" if m.inputs else "0")


def kernel_source(m, one):
    key = _key(m, "{0} if {0} is None else tuple({0})")
    inputs = names(m.inputs) or "_kind, "  # without inputs, an array of the kind to make
    call = (f"_find({key}).forward(None, _threads(), {inputs})" if one
            else f"_all(_find({key}), outputs, {inputs})")
    return KERNEL.format(name=m.identifier, arguments=arguments(m, extra=('outputs=""',)), call=call)


def schema(m):
    """The operator's schema in PyTorch's notation. Every output is there; those not computed are empty tensors."""
    # [1]: a number stands for a list of one.
    kinds = {"bool": "bool", "int": "int", "float": "float", "choice": "str", "ints": "int[1]", "floats": "float[1]",
             "bools": "bool[1]"}
    parts = [f"Tensor{'?' if p.optional else ''} {p.identifier}{'=None' if p.optional else ''}" for p in m.arguments]
    parts.append("*")
    for p in m.params:
        default = p.default
        if isinstance(default, tuple):
            default = list(default)
        text = json.dumps(default) if p.type == "choice" and default is not None else repr(default)
        parts.append(f"{kinds[p.type]}{'?' if p.nullable else ''} {p.identifier}" + ("" if p.required else f"={text}"))
    parts.append('str outputs=""')
    result = "Tensor" if len(m.outputs) == 1 else "(" + ", ".join(["Tensor"] * len(m.outputs)) + ")"
    return f"({', '.join(parts)}) -> {result}"


def annotations(m, array, extra):
    result = {p.identifier: array + (" | None" if p.optional else "") for p in m.arguments}
    result.update({p.identifier: _annotation(p) for p in m.params})
    result.update(extra)
    result["return"] = array if len(m.standard_outputs) == 1 else m.result_name
    return result


def compile_function(source, name, scope):
    """Run the source of one function and give the function."""
    exec(compile(source, f"<attn {name}>", "exec"), scope)
    return scope[name]
