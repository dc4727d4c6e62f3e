"""libattn: attention on CPUs, exact, sparse and linear, behind one interface.

    import attn
    o = attn.attention(q, k, v, "flexprefill:gamma=0.95", causal=True)
    o = attn.ops.streaming(q, k, v, sinks=4, recent=1024)

Arrays of any library with DLPack or the buffer protocol go in without copies, and the same kind comes out.
attn.list() names the mechanisms, attn.describe(name) explains one. attn.torch has them as PyTorch operators with gradients,
attn.transformers as attention implementations of Hugging Face Transformers. attn.Model runs language models from GGUF files.
"""

import builtins
import functools
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from attn import _core, _ops, _table, ops
from attn._model import Model

__all__ = ["Model", "attention", "backward", "cost", "describe", "list", "ops"]
__version__ = _core.version()


class Cost(NamedTuple):
    """The main arithmetic, the bytes that must move when memory is the limit, and (query, key) pairs; 0: means nothing."""

    flops: float
    bytes: float
    pairs: float


def __getattr__(name):
    if name in ("torch", "transformers"):
        return importlib.import_module(f"attn.{name}")
    raise AttributeError(f"module 'attn' has no attribute '{name}'")


def list() -> "builtins.list[str]":
    """The names of all mechanisms, in alphabetical order."""
    return [*_ops.MECHANISMS]


def describe(name: str) -> _table.Mechanism:
    """What a mechanism is, its inputs, parameters and outputs. Printed, it is text; its attributes are the same as data."""
    return _ops.find(name)


@functools.lru_cache(maxsize=1024)
def _resolve(spec):
    """The mechanism of a SPEC, its function, and its parameters as keyword arguments."""
    name, params = _table.parse_spec(spec)
    mechanism = _ops.find(name)
    keywords = {p.name: p.identifier for p in mechanism.params}
    if not params.keys() <= keywords.keys():
        _core.Op(spec)  # raises with the library's message
    given = {keywords[key]: tuple(v) if isinstance(v, builtins.list) else v for key, v in params.items()}
    return mechanism, _ops.function(name), given


def attention(q: Any, k: Any, v: Any, spec: str = "dense", *, outputs: str | Sequence[str] | None = None,
              threads: int = 0, **options: Any) -> Any:
    """Attention by the mechanism that a SPEC names.

    q is [B, H, N, D], k [B, Hkv, M, D], v [B, Hkv, M, Dv]; the result is [B, H, N, Dv], an array of the caller's kind.
    spec is "name" or "name:key=value,key=value"; parameters and further inputs of the mechanism can also be given as
    keywords; causal=True suits mechanisms that are always causal too. With `outputs`, a name or several, other outputs of the mechanism are returned instead.

    ValueError for an unknown mechanism or parameter, a value out of range, or shapes that do not agree; TypeError for a
    data type that the mechanism does not accept; MemoryError when there is not enough of it.
    """
    mechanism, function, given = _resolve(spec)
    if options:
        names = [p.identifier for p in mechanism.params]
        if options.get("causal") is True and "causal" not in names and _ops.probe(_ops.is_causal, mechanism.name, given, q, k, v):
            del options["causal"]  # it is nothing else
        unknown = options.keys() - {p.identifier for p in (*mechanism.inputs, *mechanism.params)}
        if unknown:
            known = ", ".join(p.identifier for p in (*mechanism.inputs, *mechanism.params))
            raise ValueError(f"{mechanism.name} has no parameter or input '{sorted(unknown)[0]}' (it has {known})")
        twice = given.keys() & options.keys()
        if twice:
            raise ValueError(f"{mechanism.name}: parameter '{sorted(twice)[0]}' is given twice")
        given = {**given, **options}
    if outputs is None and len(mechanism.standard_outputs) > 1 and any(p.name == "o" for p in mechanism.outputs):
        outputs = "o"
    return function(q, k, v, outputs=outputs, threads=threads, **given)


def _bind(name, arguments, options):
    """A call's mechanism, its library object, and its inputs in the table's order."""
    mechanism, _, given = _resolve(name)
    given = {**given, **options}
    inputs = dict(zip((p.identifier for p in mechanism.arguments), arguments))
    for p in mechanism.inputs:
        if p.identifier in given:
            inputs[p.identifier] = given.pop(p.identifier)
    values = tuple(given.pop(p.identifier, p.default) for p in mechanism.params)
    if given or len(arguments) > len(mechanism.inputs):
        raise TypeError(f"{mechanism.name} has no parameter or input '{next(iter(given), len(arguments))}'")
    return mechanism, _ops.make_op(mechanism, values), tuple(inputs.get(p.identifier) for p in mechanism.inputs)


def backward(spec: str, grads: Mapping[str, Any], *inputs: Any, wrt: str | Sequence[str] | None = None, threads: int = 0,
             **options: Any) -> dict[str, Any]:
    """Gradients of the mechanism's inputs, for arrays without an automatic differentiation of their own.

    grads maps names of outputs to dLoss/d(output); inputs and options are those of the forward call. The result maps the
    names of the differentiable inputs (or those in wrt) to dLoss/d(input). NotImplementedError for a mechanism without
    backward.
    """
    mechanism, op, arrays = _bind(spec, inputs, options)
    names = [p.name for p in mechanism.inputs]
    wanted = {p.name for p, a in zip(mechanism.inputs, arrays) if p.differentiable and a is not None}
    if wrt is not None:
        wanted = {wrt} if isinstance(wrt, str) else {*wrt}
        for name in wanted - {*names}:
            raise ValueError(f"{mechanism.name} has no input '{name}' (it has {', '.join(names)})")
    _ops.request(mechanism, grads.keys())
    given = tuple(grads.get(p.name) for p in mechanism.outputs)
    made = op.backward(threads, tuple(n in wanted for n in names), arrays, (), given)
    return {name: grad for name, grad in zip(names, made) if grad is not None}


def cost(spec: str, *inputs: Any, **options: Any) -> Cost:
    """The work of a call with these inputs, by the mechanism's own account: Cost(flops, bytes, pairs)."""
    _, op, arrays = _bind(spec, inputs, options)
    return Cost(*op.cost(*arrays))
