"""What makes the functions of attn.ops from the library's tables."""

import array
import functools
import json
import random
import sys
from collections import namedtuple
from types import SimpleNamespace

from attn import _core, _table

MECHANISMS = {entry["name"]: _table.Mechanism(entry) for entry in _core.table()}
CACHE_LIMIT = 1024  # sets of parameters that a mechanism keeps ready


def tops():
    """The names of attn.ops: mechanisms, or what comes before the dot in their names."""
    return {_table.identifier(name.partition(".")[0], set()): name.partition(".")[0] for name in MECHANISMS}


@functools.cache
def top(name):
    """The function behind a name of attn.ops, with its relatives as attributes."""
    return tree(tops()[name], direct)


def tree(name, make):
    """The function of a mechanism with those whose names continue its name as attributes."""
    node = make(MECHANISMS[name]) if name in MECHANISMS else SimpleNamespace()
    depth = name.count(".") + 1
    for child in dict.fromkeys(".".join(full.split(".")[: depth + 1]) for full in MECHANISMS):
        if child.startswith(name + ".") and child.count(".") == depth:
            setattr(node, _table.identifier(child.rpartition(".")[2], set()), tree(child, make))
    return node


def find(name):
    """The mechanism called `name`; ValueError with a suggestion when there is none."""
    if name not in MECHANISMS:
        _core.Op(name, "{}")  # raises with the library's message
        raise ValueError(f"there is no mechanism '{name}'")
    return MECHANISMS[name]


def _plain(item):
    """NumPy scalars and arrays, and whatever else knows how to become a Python number or list."""
    for method in ("tolist", "item"):
        if hasattr(item, method):
            return getattr(item, method)()
    raise TypeError(f"a parameter cannot be a {type(item).__name__}")


def to_json(mechanism, values):
    """Parameter values in the table's order as the library's JSON."""
    given = {p.name: v for p, v in zip(mechanism.params, values) if not (v is None and p.nullable)}
    try:
        return json.dumps(given, default=_plain, allow_nan=False)
    except ValueError:
        raise ValueError(f"{mechanism.name}: parameters must be finite: {given}") from None


def make_op(mechanism, values):
    """The library's object for parameter values in the table's order."""
    return _core.Op(mechanism.name, to_json(mechanism, values))


class Cache(dict):
    """Parameter values to the library's objects."""

    def __init__(self, mechanism):
        super().__init__()
        self.mechanism = mechanism

    def make(self, values):
        op = make_op(self.mechanism, values)
        if len(self) >= CACHE_LIMIT:
            self.clear()
        try:
            self[values] = op
        except TypeError:  # lists are not hashable; a tuple would be found next time
            pass
        return op


class _Routes(dict):
    """Whether a type is PyTorch's."""

    def __missing__(self, kind):
        torch = sys.modules.get("torch")
        self[kind] = found = torch is not None and issubclass(kind, torch.Tensor)
        return found


_routes = _Routes()


def request(mechanism, outputs):
    """The numbers of the outputs named in `outputs` (a name or several)."""
    known = [p.name for p in mechanism.outputs]
    wanted = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    for name in wanted:
        if name not in known:
            raise ValueError(f"{mechanism.name} has no output '{name}' (it has {', '.join(known)})")
    return tuple(known.index(name) for name in wanted)


def direct(mechanism, routed=True):
    """The function that calls the library with the caller's arrays. routed: PyTorch's go through attn.torch."""
    cache = Cache(mechanism)
    result = namedtuple(mechanism.result_name, [p.identifier for p in mechanism.standard_outputs])

    def select(op, outputs, threads, *inputs):
        made = op.forward(request(mechanism, outputs), threads, *inputs)
        if isinstance(outputs, str):
            return made[0]
        return namedtuple(mechanism.result_name, [_table.identifier(n, set()) for n in outputs])(*made)

    def torch_function():
        import attn.torch

        return attn.torch.function(mechanism.name)

    scope = {"_cache": cache, "_make": cache.make, "_routes": _routes, "_select": select, "_Result": result,
             "_torch": torch_function}
    made = _table.compile_function(_table.direct_source(mechanism, routed), mechanism.identifier, scope)
    made.__module__ = "attn.ops"
    made.__qualname__ = mechanism.name
    made.__doc__ = _table.document(mechanism)
    made.__annotations__ = _table.annotations(
        mechanism, "Array", {"outputs": "str | Sequence[str] | None", "threads": "int"})
    return made


@functools.cache
def function(name):
    """The function of a mechanism by its full name."""
    find(name)
    first, *rest = (_table.identifier(part, set()) for part in name.split("."))
    return functools.reduce(getattr, rest, top(first))


# ---- What the tables do not say: tried on a few tokens ----


def _noise(seed, *shape):
    """Numbers of a few tokens, as a memoryview."""
    count = functools.reduce(lambda a, b: a * b, shape)
    numbers = random.Random(seed)
    return memoryview(array.array("f", (numbers.uniform(-1, 1) for _ in range(count)))).cast("B").cast("f", shape)


@functools.lru_cache(maxsize=1024)
def is_causal(name, given, heads, kv_heads, width, value_width):
    """Whether a mechanism without a parameter `causal` lets no query see a later key. given: its parameters as pairs."""
    tokens = 16
    q, k = _noise(1, 1, heads, tokens, width), _noise(2, 1, kv_heads, tokens, width)
    v = _noise(3, 1, kv_heads, tokens, value_width)
    results = []
    try:
        for _ in range(2):
            o = function(name)(q, k, v, **dict(given), outputs="o", threads=1)
            results.append(memoryview(o.tobytes()).cast("f"))
            for h in range(kv_heads):  # another last key and value
                for i in range(width):
                    k[0, h, tokens - 1, i] += 3
                for i in range(value_width):
                    v[0, h, tokens - 1, i] += 3
    except (TypeError, ValueError, NotImplementedError):
        return False
    seen = [abs(a - b) > 1e-6 for a, b in zip(*results)]
    return not any(x for i, x in enumerate(seen) if i // value_width % tokens != tokens - 1)


@functools.lru_cache(maxsize=1024)
def takes_steps(name, given, heads, kv_heads, width, value_width):
    """Whether a mechanism works for one query and any number of keys, as generation needs it."""
    try:
        for keys in (2, 4):
            function(name)(_noise(1, 1, heads, 1, width), _noise(2, 1, kv_heads, keys, width),
                           _noise(3, 1, kv_heads, keys, value_width), **dict(given), outputs="o", threads=1)
    except (TypeError, ValueError, NotImplementedError):
        return False
    return True


def probe(test, name, options, q, k, v):
    """test (is_causal or takes_steps) for parameters and arrays as in a call."""
    try:
        given = tuple(sorted((key, tuple(x) if isinstance(x, list) else x) for key, x in options.items()))
        return test(name, given, q.shape[1], k.shape[1], q.shape[3], v.shape[3])
    except (AttributeError, IndexError, TypeError):
        return False
