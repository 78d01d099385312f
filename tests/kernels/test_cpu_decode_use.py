"""`fast_decode` in use: what is left to transformers, caches, copies, changed models, threads, refusals."""

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from decoding import PROMPT, ROPES, install, make, say
from oneshot_kernels import Sparse24Linear, reference
from oneshot_kernels.cpu import cache as room
from oneshot_kernels.cpu import library, step
from oneshot_kernels.cpu.decode import fast_decode
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache
from variants import needs_compiler

pytestmark = needs_compiler


def several(model):
    """What is not a single token behind a plain cache."""
    two, padded = PROMPT.repeat(2, 1), torch.cat((torch.zeros(1, 3, dtype=torch.long), PROMPT), 1)
    yield lambda: model.generate(two, attention_mask=torch.ones_like(two), max_new_tokens=6, do_sample=False)
    yield lambda: model.generate(padded, attention_mask=(padded > 0).long(), max_new_tokens=6, do_sample=False)
    yield lambda: say(model, n=6, cache_implementation="static")
    yield lambda: say(model, n=6, num_beams=2)
    yield lambda: say(model, n=6, use_cache=False)
    yield lambda: model(PROMPT).logits
    yield lambda: model(input_ids=PROMPT, labels=PROMPT).loss
    yield lambda: say(model, n=6, return_dict_in_generate=True, output_hidden_states=True).hidden_states[1][1]


@pytest.mark.parametrize("number", range(8))
def test_everything_else_is_transformers_own(number, steps):
    model, plain = make(), make()
    install(model, steps)
    got, want = (list(several(m))[number]() for m in (model, plain))
    assert torch.equal(got, want) and not steps


def test_a_cache_may_be_cropped_shared_and_used_by_others(steps):
    model, plain = make(), make()
    install(model, steps)
    ids = torch.randint(3, 200, (1, 40), generator=torch.Generator().manual_seed(3))
    caches = {m: [DynamicCache(config=m.config) for _ in range(2)] for m in (model, plain)}
    found = {}
    with torch.no_grad():
        for m, (one, other) in caches.items():
            logits = [m(input_ids=ids[:, :4], past_key_values=one).logits,
                      m(input_ids=ids[:, 9:20], past_key_values=other).logits]
            for t in range(4, 9):  # two texts by turns
                logits += [m(input_ids=ids[:, t : t + 1], past_key_values=cache).logits for cache in (one, other)]
            one.crop(-3)
            logits += [m(input_ids=ids[:, t : t + 1], past_key_values=one).logits for t in range(20, 24)]
            logits.append(m(input_ids=ids[:, 24:30], past_key_values=one).logits)  # several tokens: transformers
            logits += [m(input_ids=ids[:, t : t + 1], past_key_values=one).logits for t in range(30, 33)]
            found[m] = torch.cat([part.flatten(0, 1) for part in logits])
    assert len(steps) == 5 * 2 + 4 + 3
    assert reference.relative_error(found[model], found[plain].double()) < 1e-5


def test_a_cache_that_grows_keeps_what_it_holds(monkeypatch):
    monkeypatch.setattr(room, "ROOM", 2)
    model = make()
    want = say(model, n=70)
    assert fast_decode(model) is None and torch.equal(say(model, n=70), want)


def test_a_copy_and_what_is_saved_are_as_before(tmp_path, steps):
    model = make()
    keys = list(model.state_dict())
    install(model, steps)
    assert list(model.state_dict()) == keys and type(model).__name__ == "LlamaForCausalLM"
    say(copy.deepcopy(model), n=4)
    assert not steps
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.architectures == ["LlamaForCausalLM"] and torch.equal(say(again, n=9), say(model, n=9))


def exchange(model, what):
    """Change a model in one way."""
    layer, other = model.model.layers[1], copy.deepcopy(model.model.layers[0])
    if what == "linear":
        layer.mlp.up_proj = nn.Linear(48, 100, bias=False)
    elif what == "weight":
        layer.mlp.up_proj.weight = nn.Parameter(layer.mlp.up_proj.weight * 2)
    elif what == "block":
        model.model.layers[1] = other
    elif what == "attention":
        layer.self_attn = other.self_attn
    elif what == "norm":
        layer.input_layernorm.weight = nn.Parameter(layer.input_layernorm.weight * 2)
    elif what == "embedding":
        model.model.embed_tokens.weight = nn.Parameter(model.model.embed_tokens.weight.flip(0))
    elif what == "hook":
        layer.mlp.register_forward_hook(lambda module, args, out: 2 * out)
    else:
        model.double()


@pytest.mark.parametrize("what", ["linear", "weight", "block", "attention", "norm", "embedding", "hook", "moved"])
def test_a_model_that_was_changed_is_noticed(what, steps):
    model = make()
    install(model, steps)
    before = say(model, n=20)
    steps.clear()
    exchange(model, what)
    with pytest.warns(RuntimeWarning, match="changed since fast_decode"):
        got = say(model, n=20)
    plain = make()
    torch.manual_seed(0)
    if what == "linear":
        plain.model.layers[1].mlp.up_proj = model.model.layers[1].mlp.up_proj
    else:
        exchange(plain, what)
    assert torch.equal(got, say(plain, n=20)) and not steps
    assert what == "moved" or not torch.equal(got, before)


def test_threads_that_share_a_model_take_turns():
    model = make()
    texts = [torch.randint(3, 200, (1, n), generator=torch.Generator().manual_seed(n)) for n in (3, 30, 90, 140)]
    want = [say(model, ids) for ids in texts]
    assert fast_decode(model) is None
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            got = list(pool.map(lambda ids: say(model, ids), texts))
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_blocks_of_several_widths():
    model = make()
    for name in ("gate_proj", "up_proj"):
        linear = getattr(model.model.layers[0].mlp, name)
        linear.weight = nn.Parameter(linear.weight[:60], requires_grad=False)
    down = model.model.layers[0].mlp.down_proj
    down.weight, down.in_features = nn.Parameter(down.weight[:, :60].contiguous(), requires_grad=False), 60
    want = say(model)
    assert fast_decode(model) is None and torch.equal(say(model), want)


def test_a_model_that_lacks_a_part_is_refused():
    model = make()
    model.model.layers[1].mlp = nn.Identity()
    assert "is not there" in fast_decode(model)
    assert "is not there" in fast_decode(nn.Linear(3, 3))


def test_a_model_is_freed_and_can_be_pickled():
    model = make()
    assert fast_decode(model) is None
    again = pickle.loads(pickle.dumps(model))
    assert type(again).__name__ == "LlamaForCausalLM" and torch.equal(say(again, n=9), say(model, n=9))
    there = weakref.ref(model)
    del model
    gc.collect()
    assert there() is None


def test_hidden_states_that_the_config_asks_for_are_transformers(steps):
    model = make(output_hidden_states=True)
    install(model, steps)
    out = say(model, n=4, return_dict_in_generate=True, output_hidden_states=True)
    assert len(out.hidden_states) == 4 and not steps


def test_weights_that_change_where_they_are_count(steps):
    model = make()
    install(model, steps)
    model.model.layers[0].mlp.up_proj.weight.mul_(2)
    got = say(model, n=9)
    assert len(steps) == 8 and torch.equal(got, say(copy.deepcopy(model), n=9))


@pytest.mark.parametrize("family, changed, said", [
    ("gpt2", {}, "gpt2 is not among"), ("gemma", {"head_dim": 16}, "gemma is not among"),
    ("llama", {"hidden_act": "relu"}, "with SiLU"),
    ("llama", {"rope_parameters": ROPES["dynamic"]}, "depend on the length"),
    ("mistral", {"sliding_window": 16}, "sliding windows")])
def test_what_it_does_not_know_it_refuses(family, changed, said, steps):
    model = make(family, **changed)
    assert said in fast_decode(model)
    steps.clear()
    say(model, n=3)
    assert not steps


def test_a_model_that_computes_something_else_is_refused(monkeypatch):
    """The same parts, another forward."""
    model = make()
    model.model.layers[1].mlp.forward = lambda x: 2 * x
    assert "something else" in fast_decode(model)


def test_row_major_2_4_layers_are_refused(monkeypatch):
    model = make(dtype=torch.bfloat16)
    sparse = nn.Linear(48, 100, bias=False, dtype=torch.bfloat16)
    sparse.weight = nn.Parameter(reference.random_24(100, 48, torch.bfloat16, torch.Generator()), requires_grad=False)
    layer = Sparse24Linear.from_linear(sparse)
    layer._arrange(2)
    model.model.layers[0].mlp.up_proj = layer
    assert "another kind" in fast_decode(model)


def test_without_a_compiler_it_says_so(monkeypatch):
    monkeypatch.setattr(step, "_library", lambda: None)
    model = make()
    assert fast_decode(model).startswith("no compiled kernel") and library.why("step")
    assert say(model, n=3).shape == (1, 8)


def test_a_variant_that_computes_wrong_is_found(monkeypatch):
    class Wrong:
        @staticmethod
        def step(*args):
            return 0  # and writes nothing
    assert "relative error" in step._self_test(Wrong())


def test_nan_passes_through(steps):
    model = make()
    install(model, steps)
    model.model.layers[0].mlp.down_proj.weight[3, 4] = torch.nan
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=PROMPT, past_key_values=cache)
        assert model(input_ids=PROMPT[:, :1], past_key_values=cache).logits.isnan().all() and steps
