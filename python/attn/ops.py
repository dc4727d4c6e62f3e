"""One function per mechanism: attn.ops.dense(q, k, v, causal=True), attn.ops.neighborhood.mask(...).

The functions come from the library's own tables, on first use. They take arrays of any library with DLPack or the buffer
protocol, without copies, and give back arrays of the same library. PyTorch tensors go through attn.torch, so that
gradients and torch.compile work.
"""

from attn import _ops


def __dir__():
    return sorted(_ops.tops())


def __getattr__(name):
    if name not in _ops.tops():
        raise AttributeError(f"there is no mechanism '{name}' (attn.list() shows them)")
    return globals().setdefault(name, _ops.top(name))
