"""attn.Model: text in, text out, probabilities, interruption, errors."""

import math
import os
import signal
import threading
import time

import numpy as np
import pytest
from conftest import MODEL, needs_model

import attn

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def model():
    return attn.Model(MODEL, context_length=1024)


@needs_model
def test_tokens(model):
    tokens = model.tokenize("Hé wörld, 日本!")
    assert model.detokenize(tokens) == "Hé wörld, 日本!"
    marked = model.tokenize("<|im_end|>", parse=True)
    assert len(marked) == 1 and model.detokenize(marked) == "" and model.detokenize(marked, special=True) == "<|im_end|>"
    assert len(model.tokenize("<|im_end|>")) > 1
    assert model.chat([{"role": "user", "content": "Hello"}]).rstrip().endswith("<|im_start|>assistant")


@needs_model
def test_generate(model):
    text = "".join(model.generate(PROMPT, max_tokens=12))
    assert "Paris" in text
    tokens = [*model.generate_tokens(PROMPT, max_tokens=12)]
    assert model.detokenize(tokens) == text
    assert [*model.generate_tokens(model.tokenize(PROMPT), max_tokens=12)] == tokens
    other = attn.Model(MODEL, context_length=64, threads=1, cache="f32")
    assert [*other.generate_tokens(PROMPT, max_tokens=12)] == tokens
    assert sum(1 for _ in other.generate_tokens(PROMPT, max_tokens=1000)) <= 64
    assert "".join(model.generate([{"role": "user", "content": "Say hello."}], max_tokens=8))


@needs_model
def test_stop(model):
    whole = "".join(model.generate(PROMPT, max_tokens=12))
    for stop in (".", "is", "aris", "s.\n\nThe"):
        want = whole[: whole.index(stop)] if stop in whole else whole
        assert "".join(model.generate(PROMPT, max_tokens=12, stop=stop)) == want


@needs_model
def test_sampling(model):
    def draw(seed):
        return [*model.generate_tokens("Once upon a time", max_tokens=10, temperature=1.0, top_k=50, seed=seed)]

    assert draw(1) == draw(1) != draw(2)
    with pytest.raises(ValueError, match="temperature"):
        next(model.generate(PROMPT, temperature=-1.0))


@needs_model
def test_probabilities(model):
    tokens = model.tokenize(PROMPT + " Paris.")
    got = model.logprobs(tokens)
    assert len(got) == len(tokens) - 1 and max(got) <= 0
    for count in (3, len(tokens) - 1):  # the same from the logits of a shorter prompt
        next(model.generate_tokens(tokens[:count]))
        logits = np.asarray(model.logits(), np.float64)
        want = logits[tokens[count]] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        assert abs(got[count - 1] - want) < 1e-3
    assert abs(model.perplexity(tokens) - math.exp(-sum(got) / len(got))) < 1e-6
    assert model.perplexity(PROMPT + " Paris.") < model.perplexity("is of Paris capital The France.")
    assert model.logprobs(tokens[:1]) == []
    assert model.info.layers == 30 and model.stats.tokens > 0


@needs_model
def test_prefix_is_kept(model):
    [*model.generate_tokens(PROMPT, max_tokens=4)]
    before = model.stats.tokens
    [*model.generate_tokens(PROMPT + " Paris", max_tokens=1)]
    assert model.stats.tokens - before <= 2


@needs_model
@pytest.mark.skipif("streaming" not in attn.list(), reason="this library has no streaming")
def test_mechanism():
    text = "one two three four five six seven eight nine ten " * 12
    streaming = attn.Model(MODEL, generation="streaming:sinks=4,recent=32", context_length=512)
    exact = attn.Model(MODEL, context_length=512)
    for model in (streaming, exact):
        assert "".join(model.generate(text, max_tokens=8))
    assert streaming.stats.cache_bytes < exact.stats.cache_bytes
    with pytest.raises(ValueError, match="no mechanism"):
        attn.Model(MODEL, prompt="nothing")


@needs_model
def test_interruption():
    model = attn.Model(MODEL, context_length=8192, threads=1)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start what runs in the background without one
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        model.perplexity([5] * 8000, window=8000)
    signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begin < 10
    assert "Paris" in "".join(model.generate(PROMPT, max_tokens=3))


@needs_model
def test_lock_is_released(model):
    counted, done = [0], threading.Event()

    def count():
        while not done.is_set():
            counted[0] += 1
            time.sleep(0.001)

    worker = threading.Thread(target=count)
    worker.start()
    model.logprobs([5] * 300)
    done.set()
    worker.join()
    assert counted[0] > 3


@needs_model
def test_errors(model):
    for kind, call in (
        (ValueError, lambda: model.logprobs([10**9, 1])),
        (ValueError, lambda: model.logprobs([-1, 1])),
        (TypeError, lambda: model.logprobs(["a", 1])),
        (ValueError, lambda: model.logprobs([1] * 2000)),
        (ValueError, lambda: model.perplexity("")),
        (ValueError, lambda: next(model.generate([]))),
        (ValueError, lambda: next(model.generate([1] * 1025))),
        (ValueError, lambda: attn.Model(MODEL, prompt="dense:causal=false")),
        (TypeError, lambda: attn.Model(MODEL, cache="i64")),
        (ValueError, lambda: attn.Model(MODEL, policy="x.json", prompt="dense")),
    ):
        with pytest.raises(kind):
            call()


def test_file_errors(tmp_path):
    with pytest.raises(OSError):
        attn.Model(tmp_path / "nothing.gguf")
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF\3\0\0\0" + b"\xff" * 40)
    with pytest.raises(ValueError):
        attn.Model(bad)
