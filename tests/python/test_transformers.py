"""Unchanged Hugging Face models with the library's attention: the same logits and the same greedy text as with `sdpa`."""

import pytest
from conftest import MODEL, needs_model, needs_torch, optional, torch

import attn

transformers = optional("transformers") if torch is not None else None
pytestmark = [needs_torch, pytest.mark.skipif(transformers is None, reason="Transformers is not installed")]

if transformers is not None:
    import attn.transformers

SMALL = dict(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=None, pad_token_id=0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The folder of a small Llama with random weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, initializer_range=0.2)
    folder = tmp_path_factory.mktemp("llama")
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def load(folder, implementation):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation).eval()


def tokens(count=40, batch=1):
    torch.manual_seed(1)
    return torch.randint(2, 128, (batch, count))


def logits(model, *arguments, **options):
    with torch.no_grad():
        return model(*arguments, **options).logits


def generate(model, ids, **options):
    return model.generate(ids, max_new_tokens=24, do_sample=False, **options).tolist()


def test_same_as_sdpa(llama):
    ids = tokens()
    want, got = load(llama, "sdpa"), load(llama, "attn:dense")
    assert (logits(got, ids) - logits(want, ids)).abs().max() < 1e-4
    assert generate(got, ids) == generate(want, ids)


def test_padding(llama):
    ids = tokens(batch=2)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    want, got = load(llama, "sdpa"), load(llama, "attn:dense")
    shown = mask.bool()
    difference = logits(got, ids, attention_mask=mask) - logits(want, ids, attention_mask=mask)
    assert difference[shown].abs().max() < 1e-4
    assert generate(got, ids, attention_mask=mask) == generate(want, ids, attention_mask=mask)


def test_chunked_prefill(llama):
    model, ids = load(llama, "attn:dense"), tokens()
    with torch.no_grad():
        first = model(ids[:, :25], use_cache=True)
        second = model(ids[:, 25:], past_key_values=first.past_key_values)
    want = logits(load(llama, "sdpa"), ids)
    assert (torch.cat([first.logits, second.logits], 1) - want).abs().max() < 1e-4


def test_static_cache(llama):
    ids = tokens()
    want = generate(load(llama, "sdpa"), ids)
    assert generate(load(llama, "attn:dense"), ids, cache_implementation="static", disable_compile=True) == want


def test_training(llama):
    ids = tokens()
    grads = []
    for name in ("sdpa", "attn:dense"):
        model = load(llama, name).train()
        model(ids, labels=ids).loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-4)


def test_sliding_window_model():
    torch.manual_seed(0)
    config = transformers.MistralConfig(**SMALL, sliding_window=8, initializer_range=0.2)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    want, ids = logits(model, tokens()), tokens()
    model.set_attn_implementation("attn:dense")
    assert (logits(model, ids) - want).abs().max() < 1e-4


@pytest.mark.skipif("streaming" not in attn.list(), reason="this library has no streaming")
def test_layers(llama):
    ids = tokens(120)
    dense = logits(load(llama, "attn:dense"), ids)
    some = logits(load(llama, "attn:1-=streaming:sinks=1,recent=8;dense"), ids)
    every = logits(load(llama, "attn:streaming:sinks=1,recent=8"), ids)
    none = logits(load(llama, "attn:3,7-9=streaming:sinks=1,recent=8"), ids)
    assert torch.equal(none, dense)
    assert (some - dense).abs().max() > 1e-3 and (every - some).abs().max() > 1e-3
    assert len(generate(load(llama, "attn:streaming:sinks=1,recent=8"), ids)[0]) == 144


@pytest.mark.skipif("flexprefill" not in attn.list(), reason="this library has no flexprefill")
def test_prompts_only(llama):
    ids = tokens(100)
    want = generate(load(llama, "sdpa"), ids)
    assert generate(load(llama, "attn:flexprefill:block=16,gamma=1"), ids) == want


def test_not_causal(llama):
    with pytest.raises(ValueError, match="not causal"):
        logits(load(llama, "attn:disendiff.attention"), tokens())


def test_errors(llama):
    for name, text in (("attn:nothing", "no mechanism"), ("attn:dense:widow=1", "widow"), ("attn:", "expected"),
                       ("attn:dense:softcap=-1", "softcap"), ("attn:0-2", "no mechanism")):
        with pytest.raises(ValueError, match=text):
            load(llama, name)
    with pytest.raises(ValueError, match="not supported"):
        load(llama, "nothing")


@needs_model
@pytest.mark.skipif(not (optional("gguf") and optional("accelerate")), reason="gguf or accelerate is not installed")
def test_real_model():
    """SmolLM2 from its GGUF file."""
    folder, name = str(MODEL.parent), MODEL.name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, attn_implementation="sdpa").eval()
    ids = torch.tensor([[504, 3575, 282, 4649, 314, 260, 2420, 28, 284, 260, 3575, 282, 7437, 314]])
    want, want_text = logits(model, ids), generate(model, ids)
    model.set_attn_implementation("attn:dense")
    assert (logits(model, ids) - want).abs().max() < 1e-4
    assert generate(model, ids) == want_text
