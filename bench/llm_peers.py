"""Prompt processing, generation, memory and perplexity beside llama.cpp (llama-cpp-python) in one run.

    python llm_peers.py LIBATTN.so MODEL.gguf TEXT [--threads 1,2] [--lengths 512,2048,8000] [--repeats 2] [--budget 60]
                        [--perplexity [TOKENS]] [--no-memory]

Both read the same tokens with a 16-bit cache and chunks of 512. The two take turns, and each number is the best of its repeats, of
which an engine gets no more when it has used its budget of seconds for a length; llama.cpp gets the better of its two settings of
flash attention. Memory is the peak resident size of a process that opens the model and evaluates the longest prompt. Progress goes to
stderr.
"""

import argparse
import ctypes
import math
import os
import subprocess
import sys
import time

import numpy as np

F16 = 1
RUN = 16


class Settings(ctypes.Structure):
    _fields_ = [("length", ctypes.c_int64), ("sequences", ctypes.c_int), ("chunk", ctypes.c_int64),
                ("threads", ctypes.c_int), ("cache", ctypes.c_int), ("progress", ctypes.c_void_p),
                ("user", ctypes.c_void_p)]


class Batch(ctypes.Structure):
    _fields_ = [("sequence", ctypes.c_int), ("tokens", ctypes.c_void_p), ("count", ctypes.c_int64)]


EACH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.POINTER(ctypes.c_float))


class Ours:
    name = "libattn"

    def __init__(self, library, path, length, threads):
        self.lib = ctypes.CDLL(library)
        self.lib.attn_last_error.restype = ctypes.c_char_p
        self.lib.attn_context_truncate.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int64]
        self.model, self.context = ctypes.c_void_p(), ctypes.c_void_p()
        self.check(self.lib.attn_model_open(ctypes.byref(self.model), path.encode(), None))
        settings = Settings(length=length, cache=F16, threads=threads)
        self.check(self.lib.attn_context_create(ctypes.byref(self.context), self.model, ctypes.byref(settings)))

    def check(self, status):
        if status != 0:
            sys.exit(f"libattn: {self.lib.attn_last_error().decode()}")

    def clear(self):
        self.check(self.lib.attn_context_truncate(self.context, 0, 0))

    def eval(self, tokens, each=None):
        array = np.asarray(tokens, np.int32)
        batch = Batch(0, array.ctypes.data, len(tokens))
        self.check(self.lib.attn_context_eval(self.context, ctypes.byref(batch), 1, each, None))

    def losses(self, tokens, vocabulary):
        out = []

        @EACH
        def each(_, item, index, logits):
            if index + 1 < len(tokens):
                x = np.ctypeslib.as_array(logits, (vocabulary,)).astype(np.float64)
                top = x.max()
                out.append(top + math.log(np.exp(x - top).sum()) - x[tokens[index + 1]])
            return 0

        self.clear()
        self.eval(tokens, each)
        return out

    def close(self):
        self.lib.attn_context_destroy(self.context)
        self.lib.attn_model_close(self.model)


class Theirs:
    def __init__(self, path, length, threads, flash, every=False):
        import llama_cpp
        self.name = "llama.cpp" + (" fa" if flash else "")
        self.llama = llama_cpp.Llama(path, n_ctx=length, n_batch=512, n_ubatch=512, n_threads=threads, n_threads_batch=threads,
                                     flash_attn=flash, logits_all=every, verbose=False)

    def clear(self):
        self.llama.reset()
        self.llama._ctx.kv_cache_clear()

    def eval(self, tokens):
        self.llama.eval(tokens)

    def losses(self, tokens, vocabulary):
        self.clear()
        out = []
        for begin in range(0, len(tokens), 512):
            self.llama.eval(tokens[begin:begin + 512])
            for i in range(begin, min(begin + 512, len(tokens) - 1)):
                x = self.llama.scores[i].astype(np.float64)
                top = x.max()
                out.append(top + math.log(np.exp(x - top).sum()) - x[tokens[i + 1]])
        return out

    def close(self):
        self.llama.close()


def read_tokens(model, text):
    import llama_cpp
    tokenizer = llama_cpp.Llama(model, vocab_only=True, verbose=False)
    return tokenizer.tokenize(open(text, "rb").read())


def speed(engines, tokens, length, repeats, budget):
    """Tokens per second of the prompt and of generation after it, per engine."""
    prompt, generation, spent = {}, {}, {engine.name: 0 for engine in engines}
    for repeat in range(repeats):
        for engine in engines:
            if repeat > 0 and spent[engine.name] > budget:
                continue
            begin = time.perf_counter()
            engine.clear()
            start = time.perf_counter()
            engine.eval(tokens[:length])
            seconds = time.perf_counter() - start
            print(f"   {length} tokens, {engine.name}: prompt {seconds:.2f} s", file=sys.stderr, flush=True)
            prompt[engine.name] = max(prompt.get(engine.name, 0), length / seconds)
            for run in range(4):
                start = time.perf_counter()
                for i in range(RUN):
                    engine.eval([tokens[i]])
                seconds = time.perf_counter() - start
                generation[engine.name] = max(generation.get(engine.name, 0), RUN / seconds)
            spent[engine.name] += time.perf_counter() - begin
    return prompt, generation


def report(what, length, rates):
    ours = rates.pop("libattn")
    best = max(rates, key=rates.get)
    print(f"  {what:10} {length:6} tokens: {ours:9.1f}/s, {best} {rates[best]:9.1f}/s, ratio {ours / rates[best]:6.2f}", flush=True)


def peak_memory(arguments):
    code = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    return float(code.stdout.split()[-1]) if code.returncode == 0 else float("nan")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("library")
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--lengths", default="128,512,2048,8000")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--budget", type=float, default=60, help="seconds after which an engine is not repeated (60)")
    parser.add_argument("--perplexity", type=int, nargs="?", const=0, help="of so many tokens (the longest length); llama.cpp keeps all "
                        "their logits, 1 MB each with a vocabulary of 262,144")
    parser.add_argument("--no-memory", action="store_true", help="do not measure the peak memory")
    parser.add_argument("--memory-of", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    lengths = [int(x) for x in args.lengths.split(",")]
    room = max(lengths) + 4 * RUN
    if args.memory_of:
        tokens = [(i * 7919 + 13) % 30000 for i in range(max(lengths))]
        engine = Ours(args.library, args.model, room, 2) if args.memory_of == "ours" else Theirs(args.model, room, 2, True)
        engine.eval(tokens)
        print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
        return

    tokens = read_tokens(args.model, args.text)[:room]
    print(f"{os.path.basename(args.model)}, {len(tokens)} tokens of {args.text}")
    for threads in [int(x) for x in args.threads.split(",")]:
        print(f" {threads} thread{'s' if threads > 1 else ''}")
        engines = [Ours(args.library, args.model, room, threads), Theirs(args.model, room, threads, False),
                   Theirs(args.model, room, threads, True)]
        for length in lengths:
            prompt, generation = speed(engines, tokens, length, args.repeats, args.budget)
            report("prompt", length, prompt)
            report("generation", length, generation)
        for engine in engines:
            engine.close()
    base = [args.library, args.model, args.text, "--lengths", args.lengths, "--memory-of"]
    if not args.no_memory:
        print(f" peak memory {peak_memory([*base, 'ours']) / 1024:.0f} MiB, llama.cpp {peak_memory([*base, 'theirs']) / 1024:.0f} MiB")
    if args.perplexity is not None:
        import llama_cpp
        vocabulary = llama_cpp.Llama(args.model, vocab_only=True, verbose=False).n_vocab()
        text = tokens[:args.perplexity or max(lengths)]
        ours, theirs = Ours(args.library, args.model, len(text), 2), Theirs(args.model, len(text), 2, True, True)
        a, b = (math.exp(np.mean(engine.losses(text, vocabulary))) for engine in (ours, theirs))
        print(f" perplexity of {len(text)} tokens {a:.4f}, llama.cpp {b:.4f}, difference {100 * (a / b - 1):+.3f} %")


if __name__ == "__main__":
    main()
