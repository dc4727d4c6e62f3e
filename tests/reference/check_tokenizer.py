#!/usr/bin/env python3
"""Token ids against the reference tokenizer: check_tokenizer.py ATTN MODEL.gguf [TEXT...]

The reference is the `tokenizers` package set up by hand from the model file's vocabulary (byte-level BPE), or llama-cpp-python for
SentencePiece-style vocabularies. Without TEXT a mix of about 1 MB is made: words, code, accents, CJK, emoji, odd white space,
long runs. Exits with 77 (skipped) where a package is missing.
"""
import random
import subprocess
import sys
import tempfile


def strings(reader, key):
    field = reader.fields[key]
    return [bytes(field.parts[i]).decode("utf-8") for i in field.data]


def text(reader, key):
    field = reader.fields[key]
    return bytes(field.parts[field.data[0]]).decode()


def reference(path, reader):
    model, pre = text(reader, "tokenizer.ggml.model"), text(reader, "tokenizer.ggml.pre")
    if model == "gpt2" and pre in ("smollm", "default", "gpt-2"):
        from tokenizers import Tokenizer, models, pre_tokenizers
        vocabulary = {token: i for i, token in enumerate(strings(reader, "tokenizer.ggml.tokens"))}
        merges = [tuple(m.split(" ")) for m in strings(reader, "tokenizer.ggml.merges")]
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        if pre == "smollm":
            steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
        return lambda data: tokenizer.encode(data.decode("utf-8"), add_special_tokens=False).ids
    from llama_cpp import Llama
    llama = Llama(path, vocab_only=True, verbose=False)
    return lambda data: llama.tokenize(data, add_bos=False, special=False)


def mixture():
    random.seed(1)
    ranges = [(0x20, 0x7E), (0xA0, 0x17F), (0x370, 0x3FF), (0x400, 0x4FF), (0x5D0, 0x5EA), (0x620, 0x64A), (0x900, 0x97F),
              (0xE01, 0xE3A), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1F6FF), (0x2000, 0x206F),
              (0x1F1E6, 0x1F1FF)]
    spaces = [" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", "   ", " \n ", "\x85", "\u2028", "\x0b", "\x1c", "\u200b", "\ufeff"]
    parts = []
    for _ in range(90000):
        kind = random.random()
        if kind < 0.3:
            parts.append(random.choice(spaces))
        elif kind < 0.5:
            parts.append("".join(random.choice("abcdefghijklmnopqrstuvwxyz'ABCDE") for _ in range(random.randint(1, 9))))
        elif kind < 0.6:
            parts.append("".join(random.choice("0123456789\u00b2\u00bd\u2167\u0663") for _ in range(random.randint(1, 12))))
        elif kind < 0.65:
            parts.append(random.choice(["don't", "I'LL", "we've", "\U0001f469\u200d\U0001f469\u200d\U0001f467", "e\u0301", "\x07", "--",
                                        "if (x[i] != 0) {", "\u00ab\u00bb", "\u202e"]))
        else:
            low, high = random.choice(ranges)
            parts.append("".join(chr(random.randint(low, high)) for _ in range(random.randint(1, 6))))
    return ("".join(parts) + " " * 50000 + "a" * 50000).encode("utf-8")


def main():
    attn, path, files = sys.argv[1], sys.argv[2], sys.argv[3:]
    try:
        import gguf
        encode = reference(path, gguf.GGUFReader(path))
    except ImportError as missing:
        print(f"skipped: {missing}")
        return 77
    failed = 0
    texts = [(name, open(name, "rb").read()) for name in files] or [("a made-up mixture", mixture())]
    for name, data in texts:
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            got = [int(x) for x in subprocess.run([attn, "tokenize", path, file.name], capture_output=True, check=True).stdout.split()]
        want = list(encode(data))
        if got == want:
            print(f"ok   {name}: {len(data)} bytes, {len(want)} tokens")
            continue
        failed += 1
        first = next((i for i, (a, b) in enumerate(zip(got, want)) if a != b), min(len(got), len(want)))
        print(f"FAIL {name}: first difference at token {first}: got {got[first:first + 8]}, expected {want[first:first + 8]}")
    print(f"{len(texts) - failed} passed, {failed} failed")
    return failed > 0


sys.exit(main())
