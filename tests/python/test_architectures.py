"""Small random models of every architecture and kind of rotary scaling, written to GGUF files as converters do: the library's
probabilities are those of Transformers in float32."""

import math

import numpy as np
import pytest
from conftest import needs_torch, optional, torch

import attn

transformers = optional("transformers") if torch is not None else None
gguf = optional("gguf") if transformers is not None else None
pytestmark = [needs_torch, pytest.mark.skipif(gguf is None, reason="Transformers or gguf is not installed")]

SMALL = dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=512, bos_token_id=1, eos_token_id=None, pad_token_id=0, initializer_range=0.3)
NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm"}
NORMS = {"post_attention_layernorm": "ffn_norm"}
GEMMA_NORMS = {"post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
               "post_feedforward_layernorm": "post_ffw_norm"}


def llama3_factors(base, dims, factor, low, high, original):
    """What Llama 3 divides frequencies by, as converters store it in rope_freqs.weight."""
    factors = []
    for i in range(0, dims, 2):
        wave = 2 * math.pi * base ** (i / dims)
        smooth = (original / wave - low) / (high - low)
        factors.append(1 if wave < original / high else factor if wave > original / low else 1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def write_gguf(path, name, model, config, scaling):
    """A model's file, with a vocabulary of single characters."""
    writer = gguf.GGUFWriter(path, name)
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_block_count(layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if width * heads != config.hidden_size:
        writer.add_key_length(width)
        writer.add_value_length(width)
    rope = config.rope_parameters
    if name == "gemma3":
        rope = rope["full_attention"]
        writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base(rope["rope_theta"])
    original = rope.get("original_max_position_embeddings")
    if scaling in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
        writer.add_rope_scaling_factor(rope["factor"])
    if scaling == "longrope":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_tensor("rope_factors_long.weight", np.array(rope["long_factor"], np.float32))
        writer.add_tensor("rope_factors_short.weight", np.array(rope["short_factor"], np.float32))
    if scaling in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(original)
    if scaling == "llama3":
        factors = llama3_factors(rope["rope_theta"], width, rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"], original)
        writer.add_tensor("rope_freqs.weight", factors)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([chr(0x21 + i) for i in range(94)] + [chr(0x120), chr(0x10A)])
    writer.add_token_merges([])
    gemma = name == "gemma3"
    norms = {**NAMES, **(GEMMA_NORMS if gemma else NORMS)}
    for key, value in model.state_dict().items():
        array = value.float().numpy()
        part, _, kind = key.removeprefix("model.").rpartition(".")
        if part.startswith("layers."):
            _, index, part = part.split(".", 2)
            if name == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):  # pairs of halves to neighbouring pairs
                count = heads if "q_proj" in part else config.num_key_value_heads
                array = array.reshape(count, 2, width // 2, -1).swapaxes(1, 2).reshape(array.shape)
            target = f"blk.{index}.{norms[part]}.{kind}"
        else:
            target = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[part] + "." + kind
            if target == "output.weight" and config.tie_word_embeddings:
                continue
        if gemma and "norm" in target:
            array = array + 1
        writer.add_tensor(target, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64,
            "long_factor": [1.0 + 0.6 * i for i in range(8)], "short_factor": [1.0 + 0.1 * i for i in range(8)]}
GEMMA_ROPES = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
               "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
CASES = {  # name: architecture, settings of Transformers' configuration
    "llama": ("llama", dict()),
    "llama-biases-tied": ("llama", dict(attention_bias=True, tie_word_embeddings=True)),
    "llama-linear": ("llama", dict(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0})),
    "llama-llama3": ("llama", dict(rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                                                    "high_freq_factor": 4.0, "original_max_position_embeddings": 64}, head_dim=32)),
    "llama-yarn": ("llama", dict(rope_parameters=YARN)),
    "llama-longrope": ("llama", dict(rope_parameters=LONGROPE)),
    "qwen2": ("qwen2", dict(rope_theta=1e6)),
    "qwen2-tied-yarn": ("qwen2", dict(tie_word_embeddings=True, rope_parameters={**YARN, "rope_theta": 1e6})),
    "qwen3": ("qwen3", dict(head_dim=32, rope_theta=1e6)),
    "qwen3-yarn": ("qwen3", dict(head_dim=24, rope_parameters={**YARN, "rope_theta": 1e6})),
    "gemma3": ("gemma3", dict(head_dim=32, num_hidden_layers=7, sliding_window=8, query_pre_attn_scalar=32)),
    "gemma3-linear": ("gemma3", dict(head_dim=40, num_hidden_layers=6, sliding_window=16, query_pre_attn_scalar=40, rope_parameters=GEMMA_ROPES)),
}


def make_model(name, settings):
    kind = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma3": "Gemma3Text"}[name]
    config = getattr(transformers, kind + "Config")(**{**SMALL, **settings})
    torch.manual_seed(0)
    model = getattr(transformers, {"Gemma3Text": "Gemma3"}.get(kind, kind) + "ForCausalLM")._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for key, value in model.named_parameters():  # biases and norms begin as constants: nothing would notice their absence
            if value.ndim == 1:
                value.add_(torch.randn_like(value), alpha=0.3)
    return config, model.float().eval()


@pytest.mark.parametrize("case", CASES)
def test_same_probabilities(case, tmp_path):
    name, settings = CASES[case]
    config, model = make_model(name, settings)
    scaling = case.rpartition("-")[2]
    write_gguf(tmp_path / "model.gguf", name, model, config, scaling)
    tokens = np.random.default_rng(1).integers(2, 96, 200).tolist()
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].double()
    want = torch.log_softmax(logits, -1)
    picked = want[torch.arange(199), torch.tensor(tokens[1:])].numpy()
    ours = attn.Model(tmp_path / "model.gguf", context_length=256)
    got = np.array(ours.logprobs(tokens))
    error, at = np.abs(got - picked).max(), int(np.abs(got - picked).argmax())
    assert error < 2e-3 * picked.std(), f"{case}: token {at + 1} has log-probability {got[at]:.5f}, expected {picked[at]:.5f}"
    next(ours.generate_tokens(tokens, max_tokens=1), None)
    last = np.asarray(ours.logits(), np.float64)
    np.testing.assert_allclose(last, logits[-1].numpy(), atol=2e-3 * float(logits[-1].std()), rtol=0, err_msg=case)
