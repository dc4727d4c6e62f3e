"""Mechanisms as attention implementations of Hugging Face Transformers, for unchanged models:

    import attn.transformers
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="attn:streaming:sinks=4,recent=1024")

After "attn:" comes a SPEC, or several for different layers, separated by ";". A SPEC for some layers begins with their
numbers and "="; the first that names a layer is the one it gets, and layers without any get `dense`:

    "attn:0-1,30=dense;streaming:sinks=4,recent=1024"

The mechanism has to work from q, k and v alone, and to be causal where the model is. One that is for whole prompts only (as
`flexprefill`) leaves single tokens, in generation, to `dense`. Layers whose mask says more than "causal" need a mechanism with a `bias`
input, as `dense` has; layers with a sliding window of their own get `dense` with that window where the SPEC's mechanism
cannot take it.
"""

import functools
import re

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

import attn
import attn.torch
from attn import _core

PREFIX = "attn:"
_RULE = re.compile(r"(?:(\d+(?:-\d*)?(?:,\d+(?:-\d*)?)*)=)?(.+)", re.DOTALL)


class _Layer:
    """What a SPEC says, ready to be called."""

    def __init__(self, spec):
        self.mechanism, _, self.options = attn._resolve(spec)
        self.function = attn.torch.function(self.mechanism.name)
        self.inputs = {p.name for p in self.mechanism.inputs}
        self.params = {p.name for p in self.mechanism.params}
        _core.Op(spec)  # raises with the library's message when a parameter is wrong
        missing = [p.name for p in self.mechanism.inputs if not p.optional and p.name not in ("q", "k", "v")]
        if missing or not {"q", "k", "v"} <= self.inputs:
            raise ValueError(f"{self.mechanism.name} does not work from q, k and v alone"
                             + (f": it needs {', '.join(missing)}" if missing else ""))
        self.causal = "causal" in self.params
        self.single = [p.name for p in self.mechanism.standard_outputs] == ["o"]

    def check(self, q, k, v, is_causal):
        """ValueError when queries of a causal layer would see later keys."""
        if is_causal and not self.causal and q.shape[2] > 1 and not attn._ops.probe(
                attn._ops.is_causal, self.mechanism.name, self.options, q, k, v):
            raise ValueError(f"{self.mechanism.name} is not causal, as this layer has to be")

    def steps(self, q, k, v):
        """Whether it can compute one query at a time; some mechanisms are for whole prompts only."""
        return attn._ops.probe(attn._ops.takes_steps, self.mechanism.name, self.options, q, k, v)

    def __call__(self, q, k, v, **given):
        outputs = {} if self.single else {"outputs": "o"}
        return self.function(q, k, v, **{**given, **self.options}, **outputs)


@functools.lru_cache(maxsize=256)
def _layer(spec):
    return _Layer(spec)


def _parse(text):
    """Rules of "LAYERS=SPEC;SPEC": pairs of a test for a layer's number (None: every layer) and a SPEC."""
    rules = []
    for part in filter(None, (p.strip() for p in text.split(";"))):
        layers, spec = _RULE.fullmatch(part).groups()
        ranges = []
        for item in layers.split(",") if layers else ():
            first, dash, last = item.partition("-")
            ranges.append((int(first), int(last) if last else (float("inf") if dash else int(first))))
        _layer(spec)
        rules.append((ranges, spec))
    if not rules:
        raise ValueError(f"'{PREFIX}{text}': expected {PREFIX}SPEC or {PREFIX}LAYERS=SPEC;SPEC")
    return rules


def _spec_for(rules, index):
    for ranges, spec in rules:
        if not ranges or (index is not None and any(first <= index <= last for first, last in ranges)):
            return spec
    return "dense"


def _additive(mask, dtype):
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask.logical_not(), float("-inf"))


def _attend(rules, module, query, key, value, attention_mask, scaling=None, dropout=0.0, is_causal=None,
            sliding_window=None, softcap=None, s_aux=None, position_bias=None, **unused):
    """The function that Transformers calls: query [B, H, N, D] and so on; returns [B, N, H, Dv] and no weights."""
    if dropout and module.training:
        raise ValueError(f"attention dropout = {dropout}, expected 0 (set attention_dropout=0 in the model's config)")
    layer = _layer(_spec_for(rules, getattr(module, "layer_idx", None)))
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if query.shape[2] == 1 and not layer.steps(query, key, value):
        layer = _layer("dense")
    bias = attention_mask
    if bias is not None:
        bias = _additive(bias[..., : key.shape[2]], query.dtype)
        is_causal = False
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias
    given = {}
    if bias is not None:
        if "bias" not in layer.inputs and sliding_window is not None:
            layer = _layer("dense")
        given["bias"] = bias.to(query.dtype)
    if s_aux is not None:
        given["sinks"] = s_aux.to(query.dtype)
    if softcap is not None:
        given["softcap"] = float(softcap)
    for name in given:
        if name not in layer.inputs | layer.params:
            reason = ("padding or a mask of the model's own; without padding, give no attention_mask" if name == "bias"
                      else "the model uses it")
            raise ValueError(f"{layer.mechanism.name} has no {name}, which this layer needs ({reason})")
    if scaling is not None and "scale" in layer.params:
        given["scale"] = float(scaling)
    if layer.causal:
        given["causal"] = bool(is_causal)
    layer.check(query, key, value, is_causal)
    o = layer(query, key, value, **given)
    return o.transpose(1, 2).contiguous(), None


def _mask(batch_size, q_length, kv_length, q_offset=0, kv_offset=0, attention_mask=None, local_size=None,
          allow_is_causal_skip=True, **options):
    """The mask of a layer, None when "causal" says it all: the last query sees the last key."""
    aligned = int(q_offset) + q_length == int(kv_offset) + kv_length
    local = local_size is not None and kv_length > local_size
    padded = attention_mask is not None and not bool(attention_mask.all())
    if allow_is_causal_skip and aligned and not local and not padded:
        return None
    return sdpa_mask(batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset,
                     kv_offset=kv_offset, attention_mask=attention_mask, local_size=local_size,
                     allow_is_causal_skip=False, **options)


def register(name):
    """Make "attn:..." known to Transformers. Happens by itself when a model is made with that implementation."""
    if not name.startswith(PREFIX):
        raise ValueError(f"'{name}': expected {PREFIX}SPEC")
    if name not in ALL_ATTENTION_FUNCTIONS:
        rules = _parse(name.removeprefix(PREFIX))
        ALL_ATTENTION_FUNCTIONS.register(name, functools.partial(_attend, rules))
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, _mask)
    return name


def _hook(original):
    @functools.wraps(original)
    def get_correct_attn_implementation(self, requested_attention, *arguments, **options):
        if isinstance(requested_attention, str) and requested_attention.startswith(PREFIX):
            return register(requested_attention)
        return original(self, requested_attention, *arguments, **options)

    return get_correct_attn_implementation


# Transformers knows implementations by their full names only; SPECs are without number, so each is registered when asked for.
setattr(PreTrainedModel, "get_correct_attn_implementation", _hook(PreTrainedModel.get_correct_attn_implementation))
