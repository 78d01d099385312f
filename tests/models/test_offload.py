"""Models on disk: the same tensors as in memory, one block at a time, whatever the files look like."""

import gc

import pytest
import tiny
import torch
from families import VOCAB, T
from families import tiny as family
from safetensors import safe_open
from transformers import LlamaForCausalLM

from oneshot import models
from oneshot.measure.losses import token_losses
from oneshot.models import loading, offload

FAMILIES = ("llama", "llama-tied-bias", "mixtral", "gpt_oss", "deepseek_v3", "gpt2", "jamba", "bamba", "gemma3")
# dense; tied; experts that transformers fuses while loading; fused on disk; with a buffer on disk; Conv1D; Mamba and
# attention, with experts, and without; buffers that no file holds


def saved(folder, name="llama", dtype=torch.bfloat16, shard="8KB"):
    """A random model of the family in a folder, in many shards; the folder."""
    family(name, dtype=dtype).save_pretrained(folder, max_shard_size=shard)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def both(folder, **how):
    """(the model in memory, the same on disk)."""
    return models.load(folder, **how)[0], models.load(folder, offload="disk", **how)[0]


def rewrite(folder, change):
    """Change the tensors of a folder of one file."""
    tiny.change_weights(folder, change)
    return folder


@pytest.mark.parametrize("dtype", ["auto", "float16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_tensors(name, dtype, tmp_path):
    here, away = both(saved(tmp_path, name), dtype=dtype)
    disk, state = models.on_disk(away), here.state_dict()
    assert models.fingerprint(here) == models.fingerprint(away)
    buffers = dict(here.named_buffers())
    assert all(t.is_meta or torch.equal(t, buffers[n]) for n, t in away.named_buffers())
    assert all(p.is_meta == (disk.block_of(n) is not None) for n, p in away.named_parameters())
    for block in models.walk(away, "cpu"):
        for n, t in block.state().items():
            mine = state[f"{block.name}.{n}"]
            assert torch.equal(t, mine) and t.dtype == mine.dtype
    ids = torch.randint(3, VOCAB, (3, T), generator=torch.Generator().manual_seed(0))
    assert torch.equal(token_losses(here, ids, batch_size=2), token_losses(away, ids, batch_size=2))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_block_s_file_holds_what_save_pretrained_writes(name, tmp_path):
    here, away = both(saved(tmp_path / "in", name))
    here.save_pretrained(tmp_path / "out")
    whole, disk, found = tiny.weights(tmp_path / "out"), models.on_disk(away), {}
    for block in models.walk(away, "cpu"):
        state = block.state()
        named = disk.named(block.number, state)
        again = disk.local(block.number, named)
        assert again.keys() == state.keys() and all(torch.equal(again[n].to(t.dtype), t) for n, t in state.items())
        found |= named
    assert found.keys() == {n for n in whole if any(part.isdecimal() for part in n.split("."))}
    assert all(torch.equal(t, whole[n]) and t.dtype == whole[n].dtype for n, t in found.items())


def test_blocks_straddle_shards(tmp_path):
    disk = models.on_disk(models.load(saved(tmp_path), offload="disk")[0])
    assert all(len(set(disk._files[number].values())) > 1 for number in range(2))


def test_never_two_blocks_at_once(tmp_path, monkeypatch):
    """By the tensors that have values, whenever one gets some, and by all that Python knows of in between."""
    others = {id(t) for t in gc.get_objects() if isinstance(t, torch.Tensor)}  # what earlier tests have left
    model = models.load(saved(tmp_path, dtype=torch.float32), offload="disk")[0]
    disk, real, counted = models.on_disk(model), offload.become, []

    def become(t, values):
        twin = real(t, values)
        there = {disk.block_of(n) for n, p in model.named_parameters() if not p.is_meta} - {None}
        counted.append(len(there))
        return twin
    monkeypatch.setattr(offload, "become", become)
    one = sum(p.numel() for p in models.blocks(model)[1][0].parameters())
    shapes = {tuple(p.shape) for p in models.blocks(model)[1].parameters()}
    for device in ("cpu", None, "cpu"):
        for block in models.walk(model, device):
            [w.get() for w in block.weights]
            gc.collect()
            alive = {t.data_ptr(): t.numel() for t in gc.get_objects()
                     if type(t) in (torch.Tensor, torch.nn.Parameter) and id(t) not in others and not t.is_meta
                     and tuple(t.shape) in shapes}
            assert sum(alive.values()) < 1.5 * one
            block.changed = device is not None
    assert counted and set(counted) == {0, 1}
    assert disk.reads == 6


def test_what_walk_changes_stays(tmp_path):
    model = models.load(saved(tmp_path), offload="disk")[0]
    for block in models.walk(model, "cpu"):
        block.weights[0].set(torch.zeros(block.weights[0].shape))
        block.changed = block.number == 1
    firsts = [block.weights[0].get() for block in models.walk(model)]
    assert firsts[0].any() and not firsts[1].any()


def test_only_walk_changes_a_block(tmp_path):
    model = models.load(saved(tmp_path), offload="disk")[0]
    first, second = (block.weights[0] for block in models.walk(model))
    with pytest.raises(RuntimeError, match="only within walk"):
        first.set(first.get())
    for _ in models.walk(model, "cpu", end=1):
        first.get()
        with pytest.raises(RuntimeError, match="only within walk"):
            second.get()
        with pytest.raises(RuntimeError, match="while block 0 is present"):
            next(models.walk(model, "cpu"))
    assert all(p.is_meta for p in models.blocks(model)[1].parameters())


def test_an_error_leaves_no_block_behind(tmp_path):
    model = models.load(saved(tmp_path), offload="disk")[0]
    with pytest.raises(KeyError):
        for _ in models.walk(model, "cpu"):
            raise KeyError
    assert all(p.is_meta for p in models.blocks(model)[1].parameters())


@pytest.mark.parametrize("change", [
    lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}),
    lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] * 2}),
    lambda w: w.update({"lm_head.weight": w.pop("model.embed_tokens.weight")})], ids=["twice", "different", "head"])
def test_tied_weights_as_files_have_them(change, tmp_path):
    here, away = both(rewrite(saved(tmp_path, "llama-tied-bias", shard="5GB"), change))
    assert models.fingerprint(here) == models.fingerprint(away)
    heads = [m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (here, away)]
    assert heads[0] == heads[1]
    assert torch.equal(here.lm_head.weight, away.lm_head.weight)


def test_names_without_the_prefix(tmp_path):
    """As GPT-2 is published."""
    def bare(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
    here, away = both(rewrite(saved(tmp_path, "gpt2", shard="5GB"), bare))
    assert models.fingerprint(here) == models.fingerprint(away)


def test_files_that_change_meanwhile(tmp_path):
    folder = saved(tmp_path, shard="5GB")
    model = models.load(folder, offload="disk")[0]
    with safe_open(folder / "model.safetensors", "pt") as f:
        name = next(n for n in f.keys() if ".1.mlp" in n)  # noqa: SIM118
    rewrite(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=r"--model .*must not change during a run"):
        models.fingerprint(model)



@pytest.mark.parametrize("refused, said", [
    ("remote", "brings code of its own"), ("shared", "its blocks share weights"), ("gguf", "is a GGUF file"),
    ("fp8", "stored by fp8")])
def test_what_cannot_stay_on_disk(refused, said, tmp_path, monkeypatch):
    path = saved(tmp_path / "model")
    if refused == "gguf":
        path = tmp_path / "a.gguf"
        path.write_bytes(b"GGUF")
    elif refused == "fp8":
        monkeypatch.setattr(loading.intake, "quantisation", lambda config: "fp8")
    elif refused == "shared":
        monkeypatch.setattr(loading, "shares_weights", lambda model: True)
    else:
        monkeypatch.setattr(LlamaForCausalLM, "is_remote_code", classmethod(lambda cls: True))
    with pytest.raises(ValueError, match=rf"--model .*{said}.*offload disk"):
        models.load(path, offload="disk")


def test_what_another_machine_does_not_see(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "a")
    (tmp_path / "b").write_bytes(b"half")
    assert offload.visible({"a": tmp_path / "a"}) and offload.visible({})
    assert not any(offload.visible(files) for files in (
        {"b": tmp_path / "a"}, {"a": tmp_path / "b"}, {"a": tmp_path / "c"}, {"a": tmp_path}))


def test_a_step_that_needs_the_whole_model_says_so(tmp_path):
    model = models.load(saved(tmp_path), offload="disk")[0]
    with pytest.raises(ValueError, match="--offload disk: a step"), models.resident(model, "cpu"):
        pass
