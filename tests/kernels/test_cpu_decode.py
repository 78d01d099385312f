"""`fast_decode`: transformers' generate with one compiled call a token, against float64 and against transformers."""

import copy

import pytest
import torch
import variants
from decoding import BIAS, FAMILIES, PROMPT, ROPES, install, make, say
from oneshot_kernels import reference, sparsify
from oneshot_kernels.cpu import integers, step
from oneshot_kernels.cpu.decode import fast_decode
from torch import nn
from transformers import DynamicCache
from variants import needs_compiler

pytestmark = needs_compiler
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_errs_at_most_twice_as_much_as_transformers(family, dtype):
    """Against float64 on the very weights, token by token behind prompts of several lengths."""
    model = make(family, dtype, **BIAS.get(family, {}))
    truth = copy.deepcopy(model).double()
    fast = copy.deepcopy(model)
    assert fast_decode(fast) is None
    ours = theirs = size = 0.0
    for n in (1, 5, 90):
        ids = torch.randint(3, 211, (1, n + 6), generator=torch.Generator().manual_seed(n))
        caches = [DynamicCache(config=model.config) for _ in range(3)]
        with torch.no_grad():
            for m, cache in zip((truth, model, fast), caches, strict=True):
                m(input_ids=ids[:, :n], past_key_values=cache)
            for t in range(n, n + 6):
                want, plain, got = (m(input_ids=ids[:, t : t + 1], past_key_values=cache).logits
                                    for m, cache in zip((truth, model, fast), caches, strict=True))
                assert got.dtype == plain.dtype and got.shape == plain.shape
                ours += float((got - want).square().sum())
                theirs += float((plain - want).square().sum())
                size += float(want.square().sum())
    assert 0 < ours <= 4 * theirs < 0.1 * size


@pytest.mark.parametrize("name", variants.NAMES)
def test_every_variant_is_the_reference(name, monkeypatch):
    """The reference in float64 (reference.llama_token), which the library's own test compares with."""
    variants.use(step, "step", name, monkeypatch)
    assert step._self_test(step._library()) is None


def test_the_reference_is_transformers_llama():
    model = make("qwen3").double()
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp

    def weights(layer):
        parts = {name: getattr(layer.self_attn, f"{name}_proj") for name in "qkvo"}
        parts |= {name: getattr(layer.mlp, f"{name}_proj") for name in ("gate", "up", "down")}
        parts |= {"before": layer.input_layernorm, "after": layer.post_attention_layernorm,
                  "q_norm": layer.self_attn.q_norm, "k_norm": layer.self_attn.k_norm}
        return {name: part.weight for name, part in parts.items()}
    assert attention.scaling == 24**-0.5 and type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
    past = [None, None]
    cosine, sine = model.model.rotary_emb(torch.empty(1, 1, dtype=torch.float64), torch.arange(5)[None])
    blocks = [weights(layer) for layer in model.model.layers]
    for t in range(5):
        x = reference.llama_token(model.model.embed_tokens(PROMPT[0, t]), blocks, past, (cosine[0, t], sine[0, t]),
                                  heads=4, eps=model.config.rms_norm_eps, scaling=24**-0.5)
    with torch.no_grad():
        want = model.model(input_ids=PROMPT).last_hidden_state[0, -1]
    got = reference.rms_norm(x, model.model.norm.weight, model.config.rms_norm_eps)
    assert reference.relative_error(got, want) < 1e-6


@pytest.mark.parametrize("rope", ["llama3", "yarn"])
def test_generates_what_transformers_does(rope, steps):
    model = make(rope_parameters=ROPES[rope])
    want = say(model, n=200)  # beyond the room that the cache gets at first
    assert torch.equal(say(install(model, steps), n=200), want) and len(steps) == 199


@pytest.mark.parametrize("form", ["2:4", "int8", "int4", "int8 head", "rounded int8", "rounded int4"])
def test_packed_layers_are_read_where_they_are(form, steps):
    model = make(dtype=torch.bfloat16, hidden_size=64, head_dim=16, intermediate_size=128)
    g = torch.Generator().manual_seed(1)
    for layer in model.model.layers:
        for module in (layer.self_attn, layer.mlp):
            for name, linear in list(module.named_children()):
                if not isinstance(linear, nn.Linear):
                    continue
                linear.weight.copy_(reference.random_24(*linear.weight.shape, torch.float32, g) / 8)
                if form.endswith(("int8", "int4")):
                    setattr(module, name, integers.IntegerLinear.from_linear(
                        linear, bits=int(form[-1]), sparse=True, round_inputs="rounded" in form))
    if form in ("2:4", "int8 head"):
        sparsify(model, head="int8" if "head" in form else None)
    plain = copy.deepcopy(model)
    install(model, steps)
    got, want = ([out.float() for out in say(m, return_dict_in_generate=True, output_logits=True).logits]
                 for m in (model, plain))
    assert len(steps) == 39
    assert reference.relative_error(torch.cat(got[:3]), torch.cat(want[:3])) < 0.05


def test_any_number_of_threads_gives_the_same_bits():
    model = make(hidden_size=192, intermediate_size=640, head_dim=48)
    assert fast_decode(model) is None
    ids = torch.randint(3, 200, (1, 300), generator=torch.Generator().manual_seed(0))
    prompt, before, found = DynamicCache(config=model.config), torch.get_num_threads(), []
    with torch.no_grad():
        model(input_ids=ids, past_key_values=prompt)
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                cache = copy.deepcopy(prompt)
                found.append([model(input_ids=PROMPT[:, t : t + 1], past_key_values=cache).logits for t in range(3)])
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(a, b) for own in found[1:] for a, b in zip(own, found[0], strict=True))
