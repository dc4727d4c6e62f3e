"""The package's own face: names, signatures, documentation, stubs, kinds of arrays, errors, memory."""

import ast
import gc
import importlib.resources
import inspect
import math
import threading

import numpy as np
import pytest
from conftest import needs_torch, optional, torch

import attn

QKV = ("q", "k", "v")


def qkv(*shape, seed=0, dtype=np.float32):
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape or (1, 2, 24, 16)).astype(dtype) for _ in QKV]


def exact(q, k, v, causal=False):
    """Plain attention in float64."""
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    s = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        n, m = s.shape[-2:]
        s = np.where(np.arange(m)[None, :] <= np.arange(n)[:, None] + (m - n), s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True) @ v


# ---- What there is ----


@pytest.mark.parametrize("name", attn.list())
def test_function(name):
    mechanism, function = attn.describe(name), attn._ops.function(name)
    parameters = inspect.signature(function).parameters
    assert [*parameters] == [p.identifier for p in (*mechanism.arguments, *mechanism.params)] + ["outputs", "threads"]
    for p in mechanism.params:
        assert (parameters[p.identifier].default is inspect.Parameter.empty) == p.required
        if not p.required:
            assert parameters[p.identifier].default == p.default
    for p in mechanism.inputs:
        assert (parameters[p.identifier].default is None) == p.optional
        assert p.shape.split(",")[0] in function.__doc__
    assert mechanism.title.rstrip(".") in function.__doc__ and mechanism.paper in function.__doc__
    assert str(mechanism).startswith(name + ": ")


def test_names():
    assert attn.list() == sorted(attn.list(), key=lambda n: n.replace(".", " "))
    assert {n.partition(".")[0] for n in attn.list()} == {n.rstrip("_") for n in dir(attn.ops)}
    with pytest.raises(AttributeError, match="no mechanism 'nothing'"):
        attn.ops.nothing
    with pytest.raises(ValueError, match="no mechanism 'nothing'"):
        attn.describe("nothing")


@pytest.mark.parametrize("stub", ["ops.pyi", "torch.pyi"])
def test_stubs(stub):
    text = importlib.resources.files("attn").joinpath(stub).read_text()
    named = {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}
    for name in attn.list():
        assert name.rpartition(".")[2] in {n.rstrip("_") for n in named} or "__call__" in named


# ---- Arrays ----


def test_against_plain_attention():
    q, k, v = qkv(2, 4, 33, 40)
    np.testing.assert_allclose(attn.attention(q, k, v), exact(q, k, v), rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(attn.attention(q, k[:, :2], v[:, :2], "dense:causal=true"),
                               exact(q, k[:, :2], v[:, :2], True), rtol=1e-4, atol=2e-5)


@pytest.mark.skipif("flexprefill" not in attn.list(), reason="this library has no flexprefill")
def test_causal_of_what_is_always_causal():
    q, k, v = qkv(1, 2, 64, 16)
    got = attn.attention(q, k, v, "flexprefill:gamma=0.95", causal=True)
    assert np.array_equal(got, attn.ops.flexprefill(q, k, v, gamma=0.95, outputs="o"))
    with pytest.raises(ValueError, match="causal"):
        attn.attention(q, k, v, "flexprefill", causal=False)
    with pytest.raises(ValueError, match="causal"):
        attn.attention(q, k, v, "disendiff.attention", causal=True)


def layouts():
    def negative(x):
        return np.ascontiguousarray(x[:, :, ::-1, ::-1])[:, :, ::-1, ::-1]

    def transposed(x):
        return np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)

    def strided(x):
        return np.repeat(np.repeat(x, 3, axis=2), 2, axis=3)[:, :, ::3, ::2]

    def read_only(x):
        x = x.copy()
        x.flags.writeable = False
        return x

    def offset(x):
        return np.concatenate([x, x], axis=1)[:, x.shape[1] :]

    return [negative, transposed, strided, read_only, offset]


@pytest.mark.parametrize("layout", layouts(), ids=lambda f: f.__name__)
def test_layouts(layout):
    q, k, v = qkv()
    want = attn.ops.dense(q, k, v, outputs="o")
    got = attn.ops.dense(*map(layout, (q, k, v)), outputs="o")
    assert np.array_equal(got, want)
    if torch is not None and layout.__name__ not in ("negative", "read_only"):
        got = attn.ops.dense(*(torch.from_numpy(layout(x)) for x in (q, k, v)), outputs="o")
        assert np.array_equal(got.numpy(), want)


def test_broadcast():
    q, k, v = qkv()
    wide = np.broadcast_to(k[:, :1], k.shape)
    assert np.array_equal(attn.ops.dense(q, wide, v, outputs="o"), attn.ops.dense(q, wide.copy(), v, outputs="o"))


def test_empty():
    q, k, v = qkv()
    assert attn.ops.dense(q[:, :, :0], k, v, outputs="o").shape == (1, 2, 0, 16)
    assert not attn.ops.dense(q, k[:, :, :0], v[:, :, :0], outputs="o").any()
    assert attn.ops.dense(q[:0], k[:0], v[:0], outputs="o").shape == (0, 2, 24, 16)


def test_memoryview():
    q, k, v = qkv()
    got = attn.ops.dense(*map(memoryview, (q, k, v)), outputs="o")
    assert isinstance(got, memoryview) and got.format == "f" and got.shape == q.shape
    assert np.array_equal(np.asarray(got), attn.ops.dense(q, k, v, outputs="o"))


@pytest.mark.parametrize("dtype, tolerance", [(np.float16, 2e-3), ("bfloat16", 2e-2)])
def test_half(dtype, tolerance):
    if dtype == "bfloat16":
        ml_dtypes = optional("ml_dtypes")
        if ml_dtypes is None:
            pytest.skip("ml_dtypes is not installed")
        dtype = ml_dtypes.bfloat16
    q, k, v = qkv(dtype=dtype)
    got, lse = attn.ops.dense(q, k, v)
    assert got.dtype == q.dtype and lse.dtype == np.float32
    np.testing.assert_allclose(np.asarray(got, np.float64), exact(q, k, v), rtol=tolerance, atol=tolerance)


class OnlyDlpack:
    """An array with DLPack and nothing else, of a library with from_dlpack and nothing else."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, *, stream=None, max_version=None):
        return self.array.__dlpack__()

    def __dlpack_device__(self):
        return (1, 0)

    def __array_namespace__(self):
        return OnlyDlpack

    @staticmethod
    def from_dlpack(array):
        return OnlyDlpack(np.from_dlpack(array))


def test_dlpack():
    q, k, v = qkv()
    got = attn.ops.dense(*map(OnlyDlpack, (q, k, v)), outputs="o")
    assert isinstance(got, OnlyDlpack)
    assert np.array_equal(got.array, attn.ops.dense(q, k, v, outputs="o"))


def test_jax():
    jax = optional("jax")
    if jax is None:
        pytest.skip("JAX is not installed")
    q, k, v = qkv()
    got = attn.ops.dense(*map(jax.numpy.asarray, (q, k, v)), outputs="o")
    assert isinstance(got, jax.Array)
    assert np.array_equal(np.asarray(got), attn.ops.dense(q, k, v, outputs="o"))


def test_outputs():
    q, k, v = qkv()
    both = attn.ops.dense(q, k, v, outputs=["lse", "o"])
    assert both._fields == ("lse", "o") and both.lse.shape == q.shape[:3]
    assert np.array_equal(both.o, attn.ops.dense(q, k, v, outputs="o"))
    assert np.array_equal(attn.attention(q, k, v), both.o)


def test_threads_agree():
    q, k, v = qkv(1, 3, 200, 32)
    for threads in (1, 2, 7):
        assert np.array_equal(attn.attention(q, k, v, threads=threads), attn.attention(q, k, v))


def test_concurrent_calls():
    q, k, v = qkv(1, 2, 300, 32)
    want, wrong = attn.attention(q, k, v), []

    def work():
        for _ in range(20):
            if not np.array_equal(attn.attention(q, k, v, threads=1), want):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_backward_and_cost():
    q, k, v = qkv()
    grads = attn.backward("dense:causal=true", {"o": np.ones_like(q)}, q, k, v)
    assert grads.keys() == {"q", "k", "v"}
    np.testing.assert_allclose(grads["v"].sum(), q.size, rtol=1e-4)  # rows of probabilities add up to one
    assert attn.backward("dense", {"o": np.ones_like(q)}, q, k, v, wrt="q", causal=True).keys() == {"q"}
    try:
        assert attn.cost("dense", q, k, v).flops > 0
    except NotImplementedError:
        pytest.skip("dense gives no account of its cost")


# ---- Errors ----

Q, K, V = qkv()
ERRORS = {
    "float64": (TypeError, "float64", lambda: attn.ops.dense(Q.astype(np.float64), K, V)),
    "int input": (TypeError, "i64", lambda: attn.ops.dense(Q, K.astype(np.int64), V)),
    "complex": (TypeError, "complex64", lambda: attn.ops.dense(Q, K.astype(np.complex64), V)),
    "big endian": (TypeError, ">f", lambda: attn.ops.dense(Q.astype(">f4"), K, V)),
    "objects": (TypeError, "data type", lambda: attn.ops.dense(Q.astype(object), K, V)),
    "no array": (TypeError, "expected an array", lambda: attn.ops.dense(Q, [1.0], V)),
    "missing": (ValueError, "k .* is missing", lambda: attn.ops.dense(Q, None, V)),
    "rank": (ValueError, "shape", lambda: attn.ops.dense(Q[0], K, V)),
    "many axes": (ValueError, "9 dimensions", lambda: attn.ops.dense(np.zeros((1,) * 9, np.float32), K, V)),
    "lengths": (ValueError, "shape", lambda: attn.ops.dense(Q, K, V[:, :, :5])),
    "heads": (ValueError, "multiple", lambda: attn.ops.dense(np.repeat(Q, 3, 1)[:, :5], K, V)),
    "stride": (ValueError, "stride", lambda: attn.ops.dense(odd_stride(), K, V)),
    "unaligned": (ValueError, "aligned", lambda: attn.ops.dense(unaligned(), K, V)),
    "parameter value": (ValueError, "softcap", lambda: attn.ops.dense(Q, K, V, softcap=-1.0)),
    "parameter type": (ValueError, "causal", lambda: attn.ops.dense(Q, K, V, causal="maybe")),
    "not finite": (ValueError, "finite", lambda: attn.ops.dense(Q, K, V, scale=math.nan)),
    "unknown keyword": (TypeError, "widow", lambda: attn.ops.dense(Q, K, V, widow=1)),
    "unknown parameter": (ValueError, "widow", lambda: attn.attention(Q, K, V, "dense:widow=1")),
    "unknown option": (ValueError, "widow", lambda: attn.attention(Q, K, V, widow=1)),
    "twice": (ValueError, "twice", lambda: attn.attention(Q, K, V, "dense:causal=true", causal=True)),
    "twice in spec": (ValueError, "twice", lambda: attn.attention(Q, K, V, "dense:causal=true,causal=true")),
    "no value": (ValueError, "key=value", lambda: attn.attention(Q, K, V, "dense:causal")),
    "unknown mechanism": (ValueError, "no mechanism", lambda: attn.attention(Q, K, V, "dance")),
    "empty spec": (ValueError, "mechanism", lambda: attn.attention(Q, K, V, "")),
    "zero byte": (ValueError, "null", lambda: attn.attention(Q, K, V, "dense\0")),
    "output": (ValueError, "no output 'p'", lambda: attn.ops.dense(Q, K, V, outputs="p")),
    "threads": (ValueError, "threads", lambda: attn.ops.dense(Q, K, V, threads=-1)),
    "threads type": (TypeError, "int", lambda: attn.ops.dense(Q, K, V, threads="two")),
    "gradient of nothing": (ValueError, "at least one", lambda: attn.backward("dense", {}, Q, K, V)),
    "gradient shape": (ValueError, "shape", lambda: attn.backward("dense", {"o": Q[0]}, Q, K, V)),
    "gradient type": (TypeError, "float64", lambda: attn.backward("dense", {"o": Q.astype("d")}, Q, K, V)),
}


def odd_stride():
    records = np.zeros(Q.shape, np.dtype({"names": ["x"], "formats": ["<f4"], "offsets": [0], "itemsize": 6}))
    return records["x"]


def unaligned():
    return np.frombuffer(b"\0" + Q.tobytes(), np.float32, Q.size, 1).reshape(Q.shape)


@pytest.mark.parametrize("what", ERRORS)
def test_error(what):
    kind, text, call = ERRORS[what]
    with pytest.raises(kind, match=text):
        call()


@needs_torch
def test_torch_errors():
    q, k, v = map(torch.from_numpy, (Q, K, V))
    for kind, text, call in (
        (TypeError, "float64", lambda: attn.torch.dense(q.double(), k, v)),
        (ValueError, "shape", lambda: attn.torch.dense(q, k, v[:, :, :3])),
        (ValueError, "softcap", lambda: attn.torch.dense(q, k, v, softcap=-1.0)),
    ):
        with pytest.raises(kind, match=text):
            call()


def test_garbage_never_crashes():
    random = np.random.default_rng(5)
    kinds = [np.float32, np.float16, np.int64, np.int32, np.int8, np.bool_, np.float64, np.uint8]
    for name in attn.list():
        mechanism, function = attn.describe(name), attn._ops.function(name)
        for _ in range(12):
            inputs = {}
            for p in mechanism.inputs:
                shape = tuple(random.integers(0, 5, random.integers(0, 6)))
                kind = kinds[random.integers(len(kinds))] if random.random() < 0.5 else np.float32
                chance = random.random()
                inputs[p.identifier] = np.zeros(shape, kind) if chance < 0.9 else None if chance < 0.95 else 3
            required = {p.identifier: 1 for p in mechanism.params if p.required}
            try:
                function(**inputs, **required)
            except (TypeError, ValueError, NotImplementedError):
                pass


# ---- Memory ----


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_no_leak():
    q, k, v = qkv(1, 1, 16, 16)
    bad = np.zeros((1, 2, 3), np.float32)

    def calls(count):
        for i in range(count):
            attn.ops.dense(q, k, v, threads=1)
            if i % 8 == 0:
                attn.ops.dense(q, k, v, outputs=["o", "lse"], threads=1)
                attn.ops.dense(memoryview(q), memoryview(k), memoryview(v), threads=1)
                attn.ops.dense(q, k, v, scale=1.0 + i * 1e-6, threads=1)
                attn.ops.dense(OnlyDlpack(q), OnlyDlpack(k), OnlyDlpack(v), threads=1)
                try:
                    attn.ops.dense(q, bad, v)
                except ValueError:
                    pass

    calls(20_000)
    gc.collect()
    before = resident()
    calls(100_000)
    gc.collect()
    assert resident() - before < 4 << 20


@needs_torch
def test_no_leak_torch():
    torch.set_num_threads(1)
    q, k, v = (torch.from_numpy(x).requires_grad_() for x in qkv(1, 1, 16, 16))

    def calls(count):
        for _ in range(count):
            attn.torch.dense(q, k, v).o.sum().backward()

    calls(500)
    gc.collect()
    before = resident()
    calls(3000)
    gc.collect()
    assert resident() - before < 8 << 20
