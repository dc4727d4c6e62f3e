"""Language models from GGUF files, run by the library itself."""

import codecs
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from attn import _core

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]


class Model:
    """A language model from a GGUF file.

        model = attn.Model("model.gguf", generation="streaming:sinks=4,recent=1024")
        for piece in model.generate("Once upon a time"):
            print(piece, end="", flush=True)

    prompt and generation are SPECs of the attention mechanisms for prompts and for generated tokens (None: exact attention),
    policy is a JSON file with mechanisms per layer and head instead. context_length is the number of tokens held (0: what
    the model was made for), cache the type of the key/value cache ("f32", "f16", "bf16" or "i8"), threads the number of
    threads (0: all).

    Other Python threads run while the library computes, and Ctrl-C interrupts it. One model serves one thread at a time.
    OSError for a file that cannot be read, ValueError for one that is malformed, NotImplementedError for architectures that
    the library does not know.
    """

    def __init__(self, path: str | os.PathLike, *, prompt: str | None = None, generation: str | None = None,
                 policy: str | os.PathLike | None = None, context_length: int = 0, cache: str = "f32", threads: int = 0):
        if policy is not None and (prompt is not None or generation is not None):
            raise ValueError("policy excludes prompt and generation")
        self._model = _core.Model(os.fspath(path), threads)
        policy = None if policy is None else os.fspath(policy)
        self._context = self._model.context(context_length, cache, threads, prompt, generation, policy)
        self._seen: list[int] = []  # the tokens of the context
        self.info = SimpleNamespace(**self._model.info())

    # ---- Text and tokens ----

    def tokenize(self, text: str, *, special: bool = True, parse: bool = False) -> list[int]:
        """The tokens of a text. special: with the tokens that the model wants at the begin or end; parse: names of control
        tokens in the text ("<|im_start|>") become these tokens."""
        return self._model.tokenize(text, special, parse)

    def detokenize(self, tokens: Iterable[int], *, special: bool = False) -> str:
        """The text of tokens. special: with the names of control tokens."""
        return b"".join(self._model.token(t, special) for t in tokens).decode(errors="replace")

    def chat(self, messages: Sequence[Mapping[str, str]], *, reply: bool = True) -> str:
        """A conversation as the model's chat template writes it; messages are {"role": ..., "content": ...}."""
        return self._model.chat([(m["role"], m["content"]) for m in messages], reply)

    def _tokens(self, prompt):
        if isinstance(prompt, str):
            return self.tokenize(prompt)
        prompt = [*prompt]
        if prompt and isinstance(prompt[0], dict):
            return self.tokenize(self.chat(prompt), parse=True)
        return prompt

    # ---- Generation ----

    def _read(self, tokens):
        """Make the context hold `tokens`; what it holds already at the beginning is not computed again."""
        common = 0
        while common < min(len(tokens) - 1, len(self._seen)) and tokens[common] == self._seen[common]:
            common += 1
        try:
            self._context.truncate(common)
        except ValueError:  # tokens that it needs were evicted
            common = 0
            self._context.truncate(0)
        self._seen = tokens[:common]
        room = common + self._context.room()
        if not 0 < len(tokens) <= room:
            raise ValueError(f"the prompt has {len(tokens)} tokens, expected 1 to {room} (context_length)")
        self._eval(tokens[common:])

    def _eval(self, tokens):
        try:
            self._context.eval(tokens)
        except BaseException:  # the context keeps the complete chunks of an interrupted call
            done = max(self._context.length() - len(self._seen), 0)
            self._seen += tokens[:done]
            raise
        self._seen += tokens

    def generate_tokens(self, prompt: Prompt, *, max_tokens: int = 256, temperature: float = 0.0, top_k: int = 0,
                        top_p: float = 1.0, min_p: float = 0.0, repeat_penalty: float = 1.0, repeat_window: int = 64,
                        seed: int = 0) -> Iterator[int]:
        """Generate tokens one by one, until the model ends, max_tokens are reached, or the context is full.

        prompt is a text, a list of tokens, or a conversation (see `chat`). temperature 0 takes the most likely token;
        otherwise a token is drawn, with the filters top_k (0: off), top_p (1: off), min_p (0: off) and repeat_penalty
        (1: off) over the last repeat_window tokens. The same seed draws the same tokens.
        """
        tokens = self._tokens(prompt)
        sampler = _core.Sampler(self.info.vocabulary, temperature, top_k, top_p, min_p, repeat_penalty, repeat_window, seed)
        for token in tokens:
            sampler.accept(token)
        self._read(tokens)
        for count in range(max_tokens):
            token = sampler.next(self._context)
            if self._model.is_end(token):
                return
            sampler.accept(token)
            yield token
            if count + 1 == max_tokens or self._context.room() < 1:
                return
            self._eval([token])

    def generate(self, prompt: Prompt, *, stop: str | Sequence[str] = (), **options: Any) -> Iterator[str]:
        """Generate text piece by piece; the options are those of generate_tokens. stop: texts (or one) that end it and are
        not part of it."""
        stops = [stop] if isinstance(stop, str) else [*stop]
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        held = ""
        for token in self.generate_tokens(prompt, **options):
            held += decoder.decode(self._model.token(token, False))
            ends = [held.find(s) for s in stops if s in held]
            if ends:
                if min(ends) > 0:
                    yield held[: min(ends)]
                return
            keep = max((n for s in stops for n in range(1, len(s)) if held.endswith(s[:n])), default=0)
            if len(held) > keep:
                yield held[: len(held) - keep]
                held = held[len(held) - keep :]
        held += decoder.decode(b"", True)
        if held:
            yield held

    # ---- Measures ----

    def logprobs(self, prompt: Prompt) -> list[float]:
        """Natural log-probabilities of the tokens of a text (or list of tokens), each given those before it: one fewer than
        there are tokens."""
        tokens = self._tokens(prompt)
        self._seen = []
        self._context.truncate(0)
        return self._context.logprobs(tokens) if len(tokens) > 1 else []

    def perplexity(self, text: Prompt, *, window: int = 512) -> float:
        """exp of the mean negative log-probability of a text's tokens, in windows of that many tokens that start afresh."""
        tokens = self._tokens(text)
        values = []
        for begin in range(0, len(tokens), window):
            values += self.logprobs(tokens[begin : begin + window])
        if not values:
            raise ValueError(f"a perplexity needs two tokens, the text has {len(tokens)}")
        return math.exp(-math.fsum(values) / len(values))

    def logits(self) -> Any:
        """Logits of the token that follows all that was read: a NumPy array (memoryview without NumPy). ValueError before
        anything was generated."""
        return self._context.logits()

    @property
    def stats(self) -> SimpleNamespace:
        """Tokens, seconds and cache memory so far."""
        return SimpleNamespace(**self._context.stats())
