"""Text sampled from the model: by its own distribution, the likeliest kept, the seed alone decides."""

from pathlib import Path

import pytest
import torch
import transformers
from characters import calibrate, character_tokenizer
from tqdm import tqdm

from oneshot.data import sample_self

MODEL = str(Path(__file__).resolve().parent / "stories260k")


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer(bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=120,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=24,
        initializer_range=0.5,  # far from uniform, so that likely and unlikely samples differ
    )
    return transformers.LlamaForCausalLM(config).eval()


def test_sampled_text_depends_on_the_seed_alone(tokenizer, model):
    state = torch.random.get_rng_state()
    first, again, other = (
        calibrate(tokenizer, "self", nsamples=6, seqlen=20, seed=seed, model=model, batch_size=3)
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.ids.shape == (6, 20) and first.mask is None and "sampled" in first.source
    assert first.sha256 == again.sha256 != other.sha256
    rows = {tuple(row) for tokens in (first, other) for row in tokens.ids.tolist()}
    assert len(rows) == 12  # neither batches of a run nor neighbouring seeds repeat each other
    assert all(row[0] == tokenizer.bos_token_id for row in rows)


def test_the_likeliest_samples_are_kept(tokenizer, model, monkeypatch):
    drawn, sample_batch = [], sample_self._sample_batch

    def record(*args):
        drawn.append(sample_batch(*args))
        return drawn[-1]

    monkeypatch.setattr(sample_self, "_sample_batch", record)
    tokens = calibrate(tokenizer, "self", nsamples=6, seqlen=20, model=model, batch_size=3)
    ids, surprise = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    with torch.no_grad():  # in one forward pass, without a cache
        log_p = model(ids).logits[:, :-1].log_softmax(-1)
    expected = -log_p.gather(2, ids[:, 1:, None]).sum((1, 2))
    torch.testing.assert_close(surprise, expected)
    worst = set(expected.topk(2).indices.tolist())
    assert torch.equal(tokens.ids, ids[[i for i in range(8) if i not in worst]])


def test_sampling_follows_the_models_distribution(tokenizer, model):
    first = torch.zeros(4000, 1, dtype=torch.int64)
    with tqdm(disable=True) as bar, torch.no_grad():
        ids, _ = sample_self._sample_batch(model, first, 2, torch.Generator().manual_seed(0), bar)
        p = model(first[:1]).logits[0, -1].softmax(-1)
    frequency = ids[:, 1].bincount(minlength=120) / 4000
    assert (frequency - p).abs().max() < 5 * 0.5 / 4000**0.5  # five standard deviations at the worst p


def test_sampling_leaves_the_models_mode_alone(tokenizer, model):
    model.train()
    calibrate(tokenizer, "self", nsamples=1, seqlen=4, model=model)
    assert model.training
    model.eval()


@pytest.mark.parametrize("special, allowed", [({"eos_token": "</s>"}, {1}), ({"unk_token": "<unk>"}, None)])
def test_first_token_without_bos(model, special, allowed):
    tokenizer = character_tokenizer(bos=False, **special)
    first = set(calibrate(tokenizer, "self", nsamples=30, seqlen=2, model=model).ids[:, 0].tolist())
    assert first == allowed if allowed else len(first) > 3 and 2 not in first


def test_sampling_errors(tokenizer, model):
    with pytest.raises(ValueError, match="--calibration self: the model has 24 positions; use --seqlen 24"):
        calibrate(tokenizer, "self", seqlen=25, model=model)
    broken = transformers.LlamaForCausalLM(model.config)
    torch.nn.init.constant_(broken.lm_head.weight, torch.nan)
    with pytest.raises(ValueError, match=r"--calibration self: .* not finite"):
        calibrate(tokenizer, "self", model=broken)


@pytest.mark.parametrize("name", ["stories260k", "craftgpt-5m"])
def test_real_models_speak_their_own_language(shared, name):
    """The text a model writes surprises it far less than uniform tokens would: log(vocabulary)."""
    folder = MODEL if name == "stories260k" else str(shared("models", name))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = calibrate(tokenizer, "self", nsamples=3, seqlen=48, model=model)
    with torch.no_grad():
        loss = model(tokens.ids, labels=tokens.ids).loss.item()
    assert loss < 0.5 * torch.tensor(float(len(tokenizer))).log().item()
