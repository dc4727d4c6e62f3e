"""What a call from Python costs beyond the library's own time, for one head of 16 tokens.

    python bench/python_overhead.py

From NumPy: the time of attn.ops.dense minus that of the C call inside it. From PyTorch: the same for attn.torch.dense, beside
PyTorch's overhead for an operator that is registered from Python and does nothing but make its output. Medians of many repeats.
"""

import statistics
import time

import numpy as np

import attn

try:
    import torch

    import attn.torch
except ImportError:
    torch = None


def microseconds(call, repeats=31, count=300):
    """Median time of a call."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(count):
            call()
        times.append((time.perf_counter() - begin) / count)
    return statistics.median(times) * 1e6


def c_call(q, k, v):
    """The library's share: attn_op_forward() with outputs that exist, called without Python's or ctypes' overhead between."""
    op = attn._core.Op("dense")
    return lambda count: op.time_forward(count, 1, q, k, v)


def main():
    q, k, v = (np.random.default_rng(0).standard_normal((1, 1, 16, 64), dtype=np.float32) for _ in "qkv")
    inner = c_call(q, k, v)
    inside = statistics.median(inner(300) for _ in range(31)) * 1e6
    rows = [("C call alone", inside, None)]
    numpy_time = microseconds(lambda: attn.ops.dense(q, k, v, threads=1))
    rows.append(("attn.ops.dense, NumPy", numpy_time, numpy_time - inside))
    failed = numpy_time - inside >= 10
    if torch is None:
        print("PyTorch is not installed; NumPy only")
    else:
        torch.set_num_threads(1)
        tq, tk, tv = map(torch.from_numpy, (q, k, v))

        @torch.library.custom_op("attn_bench::nothing", mutates_args=())
        def nothing(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return torch.empty_like(q)

        @torch.library.register_fake("attn_bench::nothing")
        def _(q, k, v):
            return torch.empty_like(q)

        torch.library.register_autograd("attn_bench::nothing", lambda ctx, grad: (grad, grad, grad))
        with torch.no_grad():
            base = microseconds(lambda: torch.ops.attn_bench.nothing(tq, tk, tv))
            sdpa = microseconds(lambda: torch.nn.functional.scaled_dot_product_attention(tq, tk, tv))
            torch_time = microseconds(lambda: attn.torch.dense(tq, tk, tv))
        rows.append(("PyTorch operator from Python that does nothing", base, base))
        rows.append(("PyTorch scaled_dot_product_attention, work included", sdpa, None))
        rows.append(("attn.torch.dense", torch_time, torch_time - inside))
        failed = failed or torch_time - inside >= 3 * base
        tq, tk, tv = (t.requires_grad_() for t in (tq, tk, tv))
        base = microseconds(lambda: torch.ops.attn_bench.nothing(tq, tk, tv))
        torch_time = microseconds(lambda: attn.torch.dense(tq, tk, tv))
        rows.append(("the operator that does nothing, recorded for gradients", base, base))
        rows.append(("attn.torch.dense, recorded for gradients", torch_time, torch_time - inside))
        failed = failed or torch_time - inside >= 3 * base
    print(f"{'1 head, 16 tokens, 64 wide, 1 thread':<55} {'us':>8} {'beyond C':>9}")
    for name, total, beyond in rows:
        print(f"{name:<55} {total:8.2f} {'' if beyond is None else format(beyond, '9.2f')}")
    print("limits: 10 us beyond the C call from NumPy, 3 operators that do nothing from PyTorch:", "missed" if failed else "kept")
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
