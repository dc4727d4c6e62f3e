"""Write golden/gguf/blocks.gguf: tensors of random blocks in each format, and the same in float32 under NAME.f32, by the
dequantiser of the Python package gguf."""

import pathlib

import gguf
import numpy as np

TYPES = ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
ROWS, COLUMNS = 3, 256


def main():
    rng = np.random.default_rng(7)
    path = pathlib.Path(__file__).parent.parent / "golden" / "gguf" / "blocks.gguf"
    writer = gguf.GGUFWriter(path, "test")
    writer.add_int32("test.number", -5)
    writer.add_float64("test.half", 0.5)
    writer.add_bool("test.yes", True)
    writer.add_array("test.names", ["a", "", "three words here"])
    writer.add_array("test.list", [3, -1, 4])
    for name in TYPES:
        kind = gguf.GGMLQuantizationType[name]
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        raw = rng.integers(0, 256, (ROWS, COLUMNS // elements, size), dtype=np.uint8)
        # The 16-bit scales are made finite and of ordinary size; everything else is random.
        halves = {"F16": [0], "BF16": [], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
                  "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}[name]
        for at in halves:
            values = rng.normal(size=raw.shape[:2]).astype(np.float16)
            raw[:, :, at:at + 2] = values[:, :, None].view(np.uint8)
        if name == "BF16":
            values = rng.normal(size=(ROWS, COLUMNS)).astype(np.float32).view(np.uint32) >> 16
            raw = values.astype(np.uint16).view(np.uint8)
        raw = raw.reshape(ROWS, -1)
        data = raw.view(np.float16) if name == "F16" else raw
        writer.add_tensor(name, data, raw_dtype=kind)
        writer.add_tensor(name + ".f32", gguf.quants.dequantize(data, kind).astype(np.float32).reshape(ROWS, COLUMNS))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
