"""The PyTorch operators: registration, gradients, compilation, and PyTorch's own attention function."""

import numpy as np
import pytest
from conftest import cases, needs_torch, torch

import attn

pytestmark = needs_torch


def tensors(case):
    """The case's inputs in the operator's order, leaves where there is a gradient."""
    made = []
    for p in case.mechanism.arguments:
        array = case.inputs.get(p.identifier)
        tensor = None if array is None else torch.from_numpy(array.copy())
        if p.differentiable and tensor is not None and case.mechanism.differentiable:
            tensor.requires_grad_()
        made.append(tensor)
    return made


def smallest(condition):
    """One case per mechanism, the one with the least input; one with expected gradients where there is any."""
    mark = cases(condition)
    name, found = mark.args
    best = {}
    for case in found:
        size = (not case.expected_grads, sum(a.size for a in case.inputs.values()))
        if case.name not in best or size < best[case.name][0]:
            best[case.name] = (size, case)
    return pytest.mark.parametrize(name, [case for _, case in best.values()], ids=lambda c: c.name)


@smallest(lambda c: c.mechanism.differentiable)
def test_opcheck(case):
    torch.library.opcheck(attn.torch._OPERATORS[case.name], tuple(tensors(case)), case.params)


@smallest(lambda c: c.expected_grads)
def test_operator_like_function(case):
    """The dispatcher's way and the direct way give the same values and gradients."""
    results = []
    for call in (attn.torch._OPERATORS[case.name], attn.torch.function(case.name)):
        inputs = tensors(case)
        made = call(*inputs, **case.params)
        made = (made,) if isinstance(made, torch.Tensor) else made
        loss = sum((t.double() ** 2).sum() for t in made if t is not None and t.requires_grad)
        loss.backward()
        results.append([loss.item()] + [t.grad for t in inputs if t is not None and t.grad is not None])
    assert len(results[0]) == len(results[1]) > 1
    for a, b in zip(*results):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


@smallest(lambda c: not c.mechanism.differentiable)
def test_opcheck_without_gradients(case):
    torch.library.opcheck(attn.torch._OPERATORS[case.name], tuple(tensors(case)), case.params,
                          test_utils=("test_schema", "test_faketensor"))


@smallest(lambda c: c.expected_grads)
def test_gradient_against_differences(case):
    """The derivative along random directions, by central differences in float32."""
    torch.manual_seed(1)
    inputs = tensors(case)
    operator = attn.torch._OPERATORS[case.name]
    names = [p.identifier for p in case.mechanism.arguments]
    leaves = [i for i, name in enumerate(names) if name in case.expected_grads]

    def loss(arguments):
        made = operator(*arguments, **case.params)
        made = (made,) if isinstance(made, torch.Tensor) else made
        return sum((tensor.double() * torch.from_numpy(case.grads[p.name].copy())).sum()
                   for tensor, p in zip(made, case.mechanism.outputs) if p.name in case.grads)

    loss(inputs).backward()
    direction = {i: torch.randn_like(inputs[i]) * (inputs[i].detach().abs().mean() + 1e-3) for i in leaves}
    slope = sum((inputs[i].grad.double() * d).sum() for i, d in direction.items()).item()
    expected = sum((torch.from_numpy(case.expected_grads[names[i]].copy()).double() * d).sum() for i, d in direction.items()).item()
    estimates = []
    with torch.no_grad():
        for step in (1e-3, 3e-3, 1e-2):
            ends = [loss([t + sign * step * direction[i] if i in direction else t for i, t in enumerate(inputs)]).item()
                    for sign in (1, -1)]
            estimates.append((ends[0] - ends[1]) / (2 * step))
    scale = max(abs(slope), *map(abs, estimates), 1e-3)
    if min(abs(e - expected) for e in estimates) > 0.03 * scale:
        assert abs(slope - expected) <= 0.01 * scale
        pytest.skip("the reference's gradient is not the derivative: it stops at selections or targets")
    assert min(abs(e - slope) for e in estimates) <= 0.03 * scale, (slope, estimates)


def test_compile():
    q, k, v = (torch.randn(1, 2, 40, 16, requires_grad=True) for _ in range(3))

    def function(q, k, v):
        return attn.torch.dense(q * 2, k, v, causal=True, outputs="o").sin()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    want = function(q, k, v)
    got = compiled(q, k, v)
    torch.testing.assert_close(got, want)
    grads = torch.autograd.grad(want.sum(), (q, k, v))
    torch.testing.assert_close(torch.autograd.grad(got.sum(), (q, k, v)), grads)


def test_compile_with_dynamic_shapes():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda q, k, v: attn.torch.dense(q, k, v, causal=True, outputs="o"), backend=backend,
                             dynamic=True, fullgraph=True)
    for n in (40, 50, 63):
        q, k, v = (torch.randn(1, 2, n, 16) for _ in range(3))
        torch.testing.assert_close(compiled(q, k, v), attn.torch.dense(q, k, v, causal=True, outputs="o"))
    assert len(graphs) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if torch else [])
@pytest.mark.parametrize("name", ["dense", "streaming"])
def test_gradients_of_half(name, dtype):
    q, k, v = (torch.randn(1, 2, 400, 16).to(dtype).requires_grad_() for _ in range(3))
    function = getattr(attn.torch, name)
    o = function(q, k, v, outputs="o")
    grad = torch.randn(o.shape).to(dtype)
    o.backward(grad)
    assert o.dtype == q.grad.dtype == v.grad.dtype == dtype
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    function(*exact, outputs="o").backward(grad.float())
    eps = torch.finfo(dtype).eps
    for name, half, single in zip("qkv", (q, k, v), exact):
        # No more than the rounding of the gradient and, in those of queries and keys, of the saved output.
        torch.testing.assert_close(half.grad.float(), single.grad, rtol=0.6 * eps, atol=2 * eps if name != "v" else 1e-4,
                                   msg=lambda text, name=name: f"gradient of {name}: {text}")


def test_ops_route_to_torch():
    q, k, v = (torch.randn(1, 2, 40, 16, requires_grad=True) for _ in range(3))
    assert attn.attention(q, k, v, "dense:causal=true").requires_grad
    assert attn.ops.dense(torch.nn.Parameter(q.detach()), k, v, outputs="o").requires_grad


def test_second_derivatives_are_refused():
    q, k, v = (torch.randn(1, 1, 8, 8, requires_grad=True) for _ in range(3))
    (grad,) = torch.autograd.grad(attn.torch.dense(q, k, v).o.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.sum().backward()


SDPA = {
    "plain": dict(),
    "causal": dict(is_causal=True),
    "causal wide": dict(n=9, m=30, is_causal=True),
    "causal tall": dict(n=30, m=9, is_causal=True),
    "boolean mask": dict(attn_mask=lambda n, m: torch.ones(n, m, dtype=torch.bool).tril(2)),
    "float mask": dict(attn_mask=lambda n, m: torch.randn(2, 1, n, m)),
    "mask of heads": dict(attn_mask=lambda n, m: torch.randn(4, n, m)),
    "scale": dict(scale=0.3),
    "grouped": dict(kv=2, enable_gqa=True),
    "value width": dict(dv=24),
    "three axes": dict(lead=(3,), kv=None),
    "two axes": dict(lead=(), kv=None),
    "five axes": dict(lead=(2, 3, 4), kv=None),
}


@pytest.mark.parametrize("what", SDPA)
def test_scaled_dot_product_attention(what):
    torch.manual_seed(0)
    options = dict(SDPA[what])
    n, m, kv, dv = options.pop("n", 21), options.pop("m", 21), options.pop("kv", 4), options.pop("dv", 16)
    lead = options.pop("lead", (2, 4))
    kv_lead = lead if kv is None else (*lead[:-1], kv)
    if "attn_mask" in options:
        options["attn_mask"] = options["attn_mask"](n, m)
    q, k, v = torch.randn(*lead, n, 16), torch.randn(*kv_lead, m, 16), torch.randn(*kv_lead, m, dv)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
    got = attn.torch.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


def test_scaled_dot_product_attention_errors():
    q = torch.randn(1, 2, 5, 8)
    for options in (dict(dropout_p=0.5), dict(is_causal=True, attn_mask=torch.ones(5, 5, dtype=torch.bool))):
        with pytest.raises(ValueError):
            attn.torch.scaled_dot_product_attention(q, q, q, **options)
    with pytest.raises(ValueError, match="enable_gqa"):
        attn.torch.scaled_dot_product_attention(q, q[:, :1], q[:, :1])


def test_non_contiguous():
    q, k, v = (torch.randn(1, 24, 2, 16).transpose(1, 2).requires_grad_() for _ in range(3))
    a = attn.torch.dense(q, k, v).o
    b = attn.torch.dense(q.contiguous(), k.contiguous(), v.contiguous()).o
    assert torch.equal(a, b)
    expanded = torch.ones(()).expand_as(a)
    for x, y in zip(torch.autograd.grad(a, (q, k, v), expanded), torch.autograd.grad(b, (q, k, v), expanded.clone())):
        np.testing.assert_array_equal(x.numpy(), y.numpy())


def test_other_tensors():
    q = torch.randn(1, 2, 8, 16)
    negated = torch.randn(1, 2, 8, 16, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    assert torch.equal(attn.torch.dense(negated, q, q).o, attn.torch.dense(negated.resolve_neg(), q, q).o)
    assert attn.torch.dense(*[q.to("meta")] * 3).o.shape == q.shape
    batch = torch.randn(3, 1, 2, 8, 16)
    got = torch.vmap(lambda x: attn.torch.dense(x, x, x, outputs="o"))(batch)
    assert torch.equal(got, torch.stack([attn.torch.dense(x, x, x).o for x in batch]))
    for wrong in (q.to_sparse(), q.to(torch.complex64)):
        with pytest.raises((RuntimeError, TypeError)):
            attn.torch.dense(wrong, q, q)
