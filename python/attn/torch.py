"""Every mechanism as a PyTorch operator: attn.torch.dense(q, k, v, causal=True), torch.ops.attn.dense.

The operators have schemas with the mechanisms' real parameters, kernels for the CPU, fake kernels (shapes without data)
and, where the mechanism is differentiable, gradients; so autograd, torch.compile and torch.export take them as they are.
`scaled_dot_product_attention` is PyTorch's function of that name on top of `dense`.
"""

import functools
from collections import namedtuple

import torch

from attn import _core, _ops, _table

_DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.int8: "i8", torch.int32: "i32",
           torch.int64: "i64", torch.bool: "bool"}
_TYPES = {name: dtype for dtype, name in _DTYPES.items()}


def _describe(tensor, number):
    """What the library needs to know of a tensor to tell the outputs' shapes. number: makes an int of an extent."""
    if tensor is None:
        return None
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"data type {tensor.dtype} is not supported ({', '.join(map(str, _DTYPES))})")
    return tuple(number(n) for n in tensor.shape), _DTYPES[tensor.dtype]


def _likely(extent):
    """An extent's value in the call that is traced; the trace does not depend on it."""
    if isinstance(extent, int):
        return extent
    hint = getattr(extent.node, "hint", None)
    return int(extent) if hint is None else int(hint)


def _symbolic_shapes(mechanism, arrays):
    """The outputs' shapes in terms of the inputs' extents, which may be symbolic; None where a shape's text does not say."""
    bound = {}
    for port, tensor in zip(mechanism.inputs, arrays):
        if tensor is not None and "..." not in port.shape:
            for symbol, extent in zip(port.shape.split(","), tensor.shape):
                if symbol.isidentifier():
                    bound.setdefault(symbol, extent)
    shapes = []
    for port in mechanism.outputs:
        extents = [int(s) if s.isdigit() else bound.get(s) for s in port.shape.split(",")]
        shapes.append(None if None in extents else tuple(extents))
    return shapes


# ---- Gradients: one operator for all mechanisms ----

torch.library.define(
    "attn::_backward",
    "(str mechanism, str params, Tensor?[] inputs, Tensor?[] outputs, Tensor?[] grads, bool[] wrt) -> Tensor[]",
)


@functools.lru_cache(maxsize=1024)
def _find_op(mechanism, params):
    return _core.Op(mechanism, params)


@torch.library.impl("attn::_backward", "CPU")
def _backward(mechanism, params, inputs, outputs, grads, wrt):
    op = _find_op(mechanism, params)
    made = op.backward(torch.get_num_threads(), tuple(wrt), tuple(inputs), tuple(outputs), tuple(grads))
    return [grad for grad in made if grad is not None]


@torch.library.register_fake("attn::_backward")
def _backward_fake(mechanism, params, inputs, outputs, grads, wrt):
    return [torch.empty(i.shape, dtype=i.dtype, device=i.device) for i, wanted in zip(inputs, wrt) if wanted]


def _no_second_derivative(ctx, *grads):
    raise NotImplementedError("the mechanisms have no second derivatives")


torch.library.register_autograd("attn::_backward", _no_second_derivative)


def _register_autograd(name, mechanism):
    order = [mechanism.inputs.index(p) for p in mechanism.arguments]  # argument number to input number
    fixed = [i for i, p in enumerate(mechanism.outputs) if not p.differentiable]
    keywords = [p.identifier for p in mechanism.params]

    def setup(ctx, inputs, keyword_only_inputs, output):
        outputs = (output,) if isinstance(output, torch.Tensor) else tuple(output)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(outputs[i] for i in fixed))
        arranged = [None] * len(order)
        ctx.given = len(inputs)  # PyTorch leaves out inputs at the end that are None
        for number, tensor in zip(order, inputs):
            arranged[number] = tensor
        ctx.save_for_backward(*arranged, *outputs)
        ctx.params = _ops.to_json(mechanism, [keyword_only_inputs[k] for k in keywords])

    def backward(ctx, *grads):
        count = len(order)
        inputs, outputs = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        wrt = [False] * count
        for number, needed in zip(order, ctx.needs_input_grad):
            wrt[number] = needed and mechanism.inputs[number].differentiable and inputs[number] is not None
        result = [None] * count
        if any(wrt) and any(g is not None for g in grads):
            saved = [None if _absent(o) else o for o in outputs]
            made = torch.ops.attn._backward(mechanism.name, ctx.params, list(inputs), saved, list(grads), wrt)
            for number, grad in zip((i for i in range(count) if wrt[i]), made):
                result[number] = grad
        return tuple(result[number] for number in order[: ctx.given])

    torch.library.register_autograd(name, backward, setup_context=setup)


# ---- Operators ----


def _absent(tensor):
    """Whether an output stands for one that was not computed."""
    return tensor.dim() == 1 and tensor.shape[0] == 0


def _present(mechanism, made):
    return [None if _absent(t) and p.shape.count(",") != 0 else t for p, t in zip(mechanism.outputs, made)]


def _define(mechanism):
    """Register a mechanism as torch.ops.attn.NAME."""
    name = "attn::" + _table.identifier(mechanism.name.replace(".", "_"), set())
    cache = _ops.Cache(mechanism)
    one = len(mechanism.outputs) == 1
    standard = tuple(i for i, p in enumerate(mechanism.outputs) if not p.on_request)
    every = tuple(range(len(mechanism.outputs)))

    def find(values):
        return cache.get(values) or cache.make(values)

    def request(outputs):
        """The standard outputs (gradients use them) and those on request that `outputs` names."""
        return standard if not outputs else tuple(sorted({*standard, *_ops.request(mechanism, outputs.split(","))}))

    def forward_all(op, outputs, *inputs):
        """All outputs have a place in the result; an empty tensor stands for one that was not computed."""
        wanted = request(outputs)
        full = [None] * len(every)
        for number, tensor in zip(wanted, op.forward(wanted, torch.get_num_threads(), *inputs)):
            full[number] = tensor
        return tuple(torch.empty(0) if tensor is None else tensor for tensor in full)

    scope = {"_find": find, "_threads": torch.get_num_threads, "_all": forward_all, "_kind": torch.empty(0)}
    kernel = _table.compile_function(_table.kernel_source(mechanism, one), mechanism.identifier, scope)

    def fake(*arguments, **keywords):
        bound = dict(zip((p.identifier for p in mechanism.arguments), arguments), **keywords)
        values = tuple(bound.get(p.identifier, p.default) for p in mechanism.params)
        values = tuple(tuple(v) if isinstance(v, (list, tuple)) else v for v in values)
        arrays = [bound.get(p.identifier) for p in mechanism.inputs]
        wanted = request(bound.get("outputs", ""))
        shapes = _symbolic_shapes(mechanism, arrays)
        number = int if any(shapes[i] is None for i in wanted) else _likely
        made = find(values).outputs(*(_describe(a, number) for a in arrays))
        device = next((a.device for a in arrays if a is not None), "cpu")
        result = tuple(
            torch.empty(made[i][0] if number is int else shapes[i], dtype=_TYPES[made[i][1]], device=device)
            if i in wanted and made[i] is not None else torch.empty(0, device=device) for i in every)
        return result[0] if one else result

    torch.library.define(name, _table.schema(mechanism))
    torch.library.impl(name, "CPU" if mechanism.inputs else "CompositeExplicitAutograd", kernel)
    torch.library.register_fake(name, fake)
    if mechanism.differentiable:
        _register_autograd(name, mechanism)
    return getattr(torch.ops.attn, name.partition("::")[2]).default


_OPERATORS = {name: _define(mechanism) for name, mechanism in _ops.MECHANISMS.items()}


_PLAIN = {torch.Tensor, torch.nn.Parameter, type(None)}


def _no_modes():
    """Whether nobody watches or transforms calls: no dispatch or function modes, no torch.func transforms."""
    return (torch._C._len_torch_dispatch_stack() == 0 and not torch._C._is_torch_function_mode_enabled()
            and torch._C._functorch.peek_interpreter_stack() is None)


try:
    _no_modes()
except AttributeError:  # another PyTorch: every call goes through its dispatcher

    def _no_modes():
        return False


def _way(*inputs):
    """How a call runs: 0 by PyTorch's dispatcher, which costs several times as much as the rest of a small call; 1 directly;
    2 directly, recorded for gradients."""
    if torch.compiler.is_compiling() or not _no_modes() or not _PLAIN.issuperset(map(type, inputs)):
        return 0
    recorded = False
    for tensor in inputs:
        if tensor is not None:
            if not tensor.is_cpu or tensor.is_neg():  # the dispatcher knows what to do with negated views and other devices
                return 0
            recorded |= tensor.requires_grad
    return 2 if recorded and torch.is_grad_enabled() else 1


def _recorder(mechanism):
    """An autograd function that calls the library directly: apply(op, values, wanted, *inputs) gives the outputs
    whose numbers are in `wanted`; values are op's parameters."""
    inputs, outputs = len(mechanism.inputs), len(mechanism.outputs)
    differentiable = tuple(p.differentiable for p in mechanism.inputs)
    fixed = {i for i, p in enumerate(mechanism.outputs) if not p.differentiable}

    class Recorder(torch.autograd.Function):
        @staticmethod
        def forward(ctx, op, values, wanted, *arrays):
            made = op.forward(wanted, torch.get_num_threads(), *arrays)
            ctx.op, ctx.values, ctx.wanted = op, values, wanted
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*(t for i, t in zip(wanted, made) if i in fixed and t is not None))
            ctx.save_for_backward(*arrays, *made)
            return made

        @staticmethod
        def backward(ctx, *grads):
            saved = ctx.saved_tensors
            made, given = [None] * outputs, [None] * outputs
            for i, tensor, grad in zip(ctx.wanted, saved[inputs:], grads):
                made[i], given[i] = tensor, grad
            if not any(grad is not None for grad in grads):
                return (None,) * (inputs + 3)
            wrt = tuple(n and d and t is not None for n, d, t in zip(ctx.needs_input_grad[3:], differentiable, saved))
            if torch.is_grad_enabled():  # create_graph=True: the operator refuses second derivatives when they are taken
                found = iter(torch.ops.attn._backward(mechanism.name, _ops.to_json(mechanism, ctx.values),
                                                      saved[:inputs], made, given, wrt))
                return (None, None, None, *(next(found) if w else None for w in wrt))
            found = ctx.op.backward(torch.get_num_threads(), wrt, saved[:inputs], tuple(made), tuple(given))
            return (None, None, None, *found)

    return Recorder.apply


def _front(mechanism):
    """The Python function in front of an operator."""
    result = namedtuple(mechanism.result_name, [p.identifier for p in mechanism.standard_outputs])
    standard = tuple(i for i, p in enumerate(mechanism.outputs) if not p.on_request)
    one = len(mechanism.outputs) == 1
    direct = _ops.direct(mechanism, routed=False)
    cache = _ops.Cache(mechanism)
    apply = _recorder(mechanism)

    def ask(outputs):
        wanted = _ops.request(mechanism, outputs)
        return ",".join(mechanism.outputs[i].name for i in wanted if mechanism.outputs[i].on_request)

    def to_result(made):
        made = _present(mechanism, made)
        return made[standard[0]] if len(standard) == 1 else result(*(made[i] for i in standard))

    def pick(made, outputs):
        """From the outputs by number to what was asked for."""
        chosen = [made[i] for i in _ops.request(mechanism, outputs)]
        if isinstance(outputs, str):
            return chosen[0]
        return namedtuple(mechanism.result_name, [_table.identifier(n, set()) for n in outputs])(*chosen)

    def select(made, outputs):
        return pick((made,) if one else _present(mechanism, made), outputs)

    def recorded(values, outputs, *inputs):
        try:
            op = cache.get(values) or cache.make(values)
        except TypeError:  # lists
            op = cache.make(values)
        if outputs is None:
            made = apply(op, values, standard, *inputs)
            return made[0] if len(standard) == 1 else result(*made)
        wanted = tuple(sorted({*standard, *_ops.request(mechanism, outputs)}))
        return pick(dict(zip(wanted, apply(op, values, wanted, *inputs))), outputs)

    def unrecorded(values, outputs, *inputs):
        keywords = {p.identifier: v for p, v in zip(mechanism.params, values)}
        keywords.update((p.identifier, t) for p, t in zip(mechanism.inputs, inputs))
        return direct(**keywords, outputs=outputs, threads=torch.get_num_threads())

    scope = {"_operator": _OPERATORS[mechanism.name], "_standard": to_result, "_select": select, "_names": ask, "_way": _way,
             "_direct": direct, "_recorded": recorded if mechanism.differentiable else unrecorded,
             "_threads": torch.get_num_threads}
    made = _table.compile_function(_table.front_source(mechanism), mechanism.identifier, scope)
    made.__module__ = "attn.torch"
    made.__qualname__ = mechanism.name
    made.__doc__ = _table.document(mechanism, torch=True)
    made.__annotations__ = _table.annotations(mechanism, "Tensor", {"outputs": "str | Sequence[str] | None"})
    return made


@functools.cache
def _top(name):
    return _ops.tree(_ops.tops()[name], _front)


@functools.cache
def function(name):
    """The function of a mechanism by its full name ("neighborhood.mask")."""
    _ops.find(name)
    first, *rest = (_table.identifier(part, set()) for part in name.split("."))
    return functools.reduce(getattr, rest, _top(first))


def __dir__():
    return sorted([*_ops.tops(), "function", "scaled_dot_product_attention"])


def __getattr__(name):
    if name not in _ops.tops():
        raise AttributeError(f"there is no mechanism '{name}' (attn.list() shows them)")
    return globals().setdefault(name, _top(name))


# ---- PyTorch's own attention function ----


def scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
                                 enable_gqa=False):
    """torch.nn.functional.scaled_dot_product_attention, computed by `dense`.

    The arguments are PyTorch's: query [..., Hq, L, E], key [..., H, S, E], value [..., H, S, Ev]; attn_mask boolean (True:
    takes part) or added to the scores, broadcastable to [..., Hq, L, S]; is_causal counts from the first query and key.
    Different head counts need enable_gqa. ValueError for dropout_p other than 0.
    """
    if dropout_p != 0:
        raise ValueError(f"dropout_p = {dropout_p}, expected 0 (there is no dropout)")
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask and is_causal exclude each other")
    if query.dim() < 2 or key.dim() != query.dim() or value.dim() != query.dim():
        raise ValueError(f"query, key and value need the same number of dimensions, at least 2; they have {query.dim()}, "
                         f"{key.dim()} and {value.dim()}")
    if query.dim() > 2 and not enable_gqa and query.shape[-3] != key.shape[-3]:
        raise ValueError(f"{query.shape[-3]} query heads and {key.shape[-3]} key heads need enable_gqa=True")
    lead, length, span = query.shape[:-2], query.shape[-2], key.shape[-2]
    if is_causal and length < span:  # PyTorch's first query sees the first key only, so the last keys are unseen
        key, value, span = key[..., :length, :], value[..., :length, :], length
    elif is_causal and length > span:
        attn_mask = torch.ones(length, span, dtype=torch.bool, device=query.device).tril()
        is_causal = False
    bias = None
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros(attn_mask.shape, dtype=query.dtype, device=query.device).masked_fill(
                attn_mask.logical_not(), float("-inf"))
        bias = _four(attn_mask, lead)
    o = function("dense")(_four(query), _four(key), _four(value), bias, causal=is_causal, scale=scale, outputs="o")
    return o.reshape(*lead, length, value.shape[-1])


def _four(tensor, lead=None):
    """As [B, H, N, D]. lead: leading axes that a mask is to have (1 stays 1)."""
    if lead is not None:
        tensor = tensor.reshape((1,) * (len(lead) + 2 - tensor.dim()) + tuple(tensor.shape))
        if len(lead) > 2 and any(n != 1 for n in tensor.shape[:-3]):
            tensor = tensor.expand(*lead[:-1], *tensor.shape[-3:])
    if tensor.dim() == 4:
        return tensor
    if tensor.dim() < 4:
        return tensor.reshape((1,) * (4 - tensor.dim()) + tuple(tensor.shape))
    return tensor.reshape(-1, *tensor.shape[-3:])
