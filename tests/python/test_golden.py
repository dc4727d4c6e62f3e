"""Every mechanism against its golden cases, through NumPy and through PyTorch."""

import numpy as np
from conftest import cases, needs_torch, torch

import attn


@cases()
def test_numpy(case):
    function = attn._ops.function(case.name)
    got = function(**case.inputs, **case.params, outputs=list(case.outputs))
    for (name, want), array in zip(case.outputs.items(), got, strict=True):
        assert isinstance(array, np.ndarray)
        case.compare(name, array, want)


@cases(lambda c: c.expected_grads)
def test_numpy_gradients(case):
    got = attn.backward(case.name, case.grads, **case.inputs, **case.params)
    for name, want in case.expected_grads.items():
        case.compare(f"grad_{name}", got[name], want)


@needs_torch
@cases()
def test_torch(case):
    function = attn.torch.function(case.name)
    inputs = {name: torch.from_numpy(array.copy()) for name, array in case.inputs.items()}
    leaves = [name for name in case.inputs if name in case.expected_grads]
    for name in leaves:
        inputs[name].requires_grad_()
    got = function(**inputs, **case.params, outputs=list(case.outputs))
    for (name, want), tensor in zip(case.outputs.items(), got, strict=True):
        assert isinstance(tensor, torch.Tensor)
        case.compare(name, tensor.detach().numpy(), want)
    if case.expected_grads:
        sources = [tensor for name, tensor in zip(case.outputs, got) if name in case.grads]
        torch.autograd.backward(sources, [torch.from_numpy(case.grads[n].copy()) for n in case.outputs if n in case.grads])
        for name in leaves:
            case.compare(f"grad_{name}", inputs[name].grad.numpy(), case.expected_grads[name])
