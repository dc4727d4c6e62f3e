"""Compare next-token distributions with transformers in float32 on the same dequantised weights.

    python check_llm.py LIBATTN.so MODEL.gguf TEXT [--tokens N] [--cache f32|f16|bf16|i8]

Prints the mean and the largest Kullback-Leibler divergence and how often the most probable token is the same; fails above a mean
of 1e-3. Needs torch, transformers, gguf and llama-cpp-python (whose tokenizer it uses); is skipped without them.
"""

import argparse
import ctypes
import os
import sys

try:
    import gguf
    import llama_cpp
    import numpy as np
    import torch
    import transformers
except ImportError as error:
    print(f"skipped: {error}")
    sys.exit(77)

CACHES = {"f32": 0, "f16": 1, "bf16": 2, "i8": 3}


class Settings(ctypes.Structure):
    _fields_ = [("length", ctypes.c_int64), ("sequences", ctypes.c_int), ("chunk", ctypes.c_int64),
                ("threads", ctypes.c_int), ("cache", ctypes.c_int), ("progress", ctypes.c_void_p),
                ("user", ctypes.c_void_p)]


class Batch(ctypes.Structure):
    _fields_ = [("sequence", ctypes.c_int), ("tokens", ctypes.c_void_p), ("count", ctypes.c_int64)]


EACH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.POINTER(ctypes.c_float))


def our_logits(library, path, tokens, vocabulary, cache, chunk=512):
    lib = ctypes.CDLL(library)
    lib.attn_last_error.restype = ctypes.c_char_p

    def check(status):
        if status != 0:
            sys.exit(f"libattn: {lib.attn_last_error().decode()}")

    model, context = ctypes.c_void_p(), ctypes.c_void_p()
    check(lib.attn_model_open(ctypes.byref(model), path.encode(), None))
    settings = Settings(length=len(tokens), cache=CACHES[cache], chunk=chunk)
    check(lib.attn_context_create(ctypes.byref(context), model, ctypes.byref(settings)))
    out = np.empty((len(tokens), vocabulary), np.float32)
    array = np.asarray(tokens, np.int32)
    batch = Batch(0, array.ctypes.data, len(tokens))

    @EACH
    def each(_, item, index, logits):
        ctypes.memmove(out[index].ctypes.data, logits, vocabulary * 4)
        return 0

    check(lib.attn_context_eval(context, ctypes.byref(batch), 1, each, None))
    lib.attn_context_destroy(context)
    lib.attn_model_close(model)
    return out


NAMES = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
         "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
         "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj", "ffn_norm": "post_attention_layernorm"}
GEMMA_NAMES = {"post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
               "post_ffw_norm": "post_feedforward_layernorm"}


def reference_model(path):
    """The model of transformers with the file's weights in float32."""
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer")}
    arch = fields["general.architecture"]

    def get(key, standard=None):
        return fields.get(f"{arch}.{key}", standard)

    heads, width = get("attention.head_count"), get("embedding_length")
    head_width = get("attention.key_length", width // heads)
    tensors = {t.name: t for t in reader.tensors}
    base = get("rope.freq_base", 10000.0)
    common = dict(hidden_size=width, num_hidden_layers=get("block_count"), num_attention_heads=heads, head_dim=head_width,
                  num_key_value_heads=get("attention.head_count_kv", heads), intermediate_size=get("feed_forward_length"),
                  rms_norm_eps=get("attention.layer_norm_rms_epsilon"), max_position_embeddings=get("context_length"),
                  vocab_size=int(tensors["token_embd.weight"].shape[1]),
                  tie_word_embeddings="output.weight" not in tensors, attn_implementation="eager")
    if arch == "gemma3":
        config = transformers.Gemma3TextConfig(
            **common, sliding_window=get("attention.sliding_window"), query_pre_attn_scalar=head_width,
            layer_types=["full_attention" if (i + 1) % 6 == 0 else "sliding_attention"
                         for i in range(common["num_hidden_layers"])],
            rope_parameters={"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                             "full_attention": {"rope_type": "default", "rope_theta": base}})
        model = transformers.Gemma3ForCausalLM(config)
    else:
        kinds = {"llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
                 "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
                 "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM)}
        config_class, model_class = kinds[arch]
        model = model_class(config_class(**common, rope_parameters={"rope_type": "default", "rope_theta": base}))
    names = {**NAMES, **(GEMMA_NAMES if arch == "gemma3" else {})}
    state = {}
    for name, tensor in tensors.items():
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        weight = torch.from_numpy(data.reshape([int(n) for n in reversed(tensor.shape)]).copy())
        parts = name.split(".")
        if name.startswith("blk."):
            target = f"model.layers.{parts[1]}.{names[parts[2]]}.{parts[3]}"
            if arch == "llama" and parts[2] in ("attn_q", "attn_k"):
                # Neighbouring rotary pairs in the file, halves here.
                weight = weight.reshape(-1, head_width // 2, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
        else:
            target = {"token_embd.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight",
                      "output_norm.weight": "model.norm.weight"}[name]
        if arch == "gemma3" and "norm" in name:
            weight = weight - 1
        state[target] = weight
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or [m for m in missing if m != "lm_head.weight"]:
        sys.exit(f"transformers: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model.float().eval()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("library")
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--cache", choices=CACHES, default="f32")
    parser.add_argument("--chunk", type=int, default=512)
    args = parser.parse_args()

    text = open(args.text, "rb").read(args.tokens * 16)
    tokenizer = llama_cpp.Llama(args.model, vocab_only=True, verbose=False)
    tokens = tokenizer.tokenize(text)[:args.tokens]
    name = os.path.basename(args.model)
    reference = reference_model(args.model)
    with torch.no_grad():
        expected = reference(torch.tensor([tokens])).logits[0].double()
    got = torch.from_numpy(our_logits(args.library, args.model, tokens, expected.shape[-1], args.cache, args.chunk)).double()
    p, q = torch.log_softmax(expected, -1), torch.log_softmax(got, -1)
    divergence = (p.exp() * (p - q)).sum(-1)
    same = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    targets = torch.tensor(tokens[1:])
    loss = [-x[:-1].gather(1, targets[:, None]).mean().item() for x in (p, q)]
    print(f"{name}: {len(tokens)} tokens, cache {args.cache}: mean KL {divergence.mean():.2e}, largest "
          f"{divergence.max():.2e}, same top token {same:.4f}, loss {loss[1]:.5f} (transformers {loss[0]:.5f})")
    sys.exit(0 if divergence.mean() <= 1e-3 else 1)


if __name__ == "__main__":
    main()
