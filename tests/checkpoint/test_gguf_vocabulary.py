"""The tokenizer in a GGUF file: llama.cpp cuts any text as transformers does, or the tokenizer is refused."""

import json
from pathlib import Path

import families
import pytest
import torch
from llama_cpp import LlamaCpp
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as kinds
from transformers import PreTrainedTokenizerFast

import oneshot
from oneshot.checkpoint import gguf
from oneshot.checkpoint.gguf import vocabulary

pytest.importorskip("gguf", reason="pip install 'oneshot[gguf]'")
STORIES = Path(__file__).parents[1] / "data" / "stories260k"
TEXT = ["the cat said hello to the dog in 1999 and it's 12345 o'clock, isn't it? WE'LL see\n\n  two  lines\t here",
        "Das Mädchen läuft über die Straße; naïve café — “quotes” … ½ ² Ⅷ x=3.14 y_1 a/b http://a.b/c?d=e#f"] * 4
VARIED = [*TEXT[:2], "", " ", "\n", "  a", "a  ", "1", "12 345 6789",
          "日本語 テキスト 한국어 עברית", "🙂👩‍👩‍👧 e\u0301 \u00a0nbsp",
          "\r\n\r\n x\r\ty", "<s>[INST] hi [/INST]</s>", "<|user|>\nhello<|end|>\n", "I'M don'T 'tis ''s",
          "\u2581 \u2581\u2581x"]


def cuts(name):
    """The pre-tokenizer with llama.cpp's name."""
    rules = next(rules for rules, (known, _) in vocabulary.PRE.items() if known == name)
    parts = {"Split": lambda regex: pre_tokenizers.Split(Regex(regex), "isolated"),
             "Digits": lambda single: pre_tokenizers.Digits(individual_digits=single),
             "ByteLevel": lambda words: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)}
    made = [parts[kind](value) for kind, value in rules]
    return made[0] if len(made) == 1 else pre_tokenizers.Sequence(made)


def byte_level(pre, **more):
    """A byte-level BPE with such rules, learnt from TEXT."""
    core = Tokenizer(kinds.BPE(ignore_merges=more.pop("ignore_merges", dict(vocabulary.PRE.values())[pre])))
    core.pre_tokenizer, core.decoder = more.pop("pre_tokenizer", cuts(pre)), decoders.ByteLevel()
    core.normalizer = more.pop("normalizer", None)
    core.train_from_iterator(TEXT, trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<s>", "</s>", "<|user|>", "<|end|>"]))
    core.add_tokens([AddedToken("[INST]", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", **more)


def sentencepiece(change=None):
    """The tokenizer of stories260k, its tokenizer.json changed."""
    spec = json.loads((STORIES / "tokenizer.json").read_text(encoding="utf-8"))
    if change:
        change(spec)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), bos_token="<s>",
                                   eos_token="</s>", unk_token="<unk>")


def metaspace(scheme):
    def change(spec):
        spec["normalizer"] = None
        spec["pre_tokenizer"] = {"type": "Metaspace", "replacement": vocabulary.SPACE, "prepend_scheme": scheme,
                                 "split": False}
    return change


def engine(tokenizer, folder):
    """llama.cpp with this tokenizer and a random model, and what the record is told."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.FAMILIES, "any", ("llama", {"vocab_size": len(tokenizer) + 2}))
        model = families.tiny("any")
    data = {"tensors": {}}
    said = gguf.write(folder, model, tokenizer, "gguf", data, {})["warnings"]
    return LlamaCpp(folder / gguf.FILE), said


def same(found, tokenizer, texts=VARIED):
    for text in texts:
        assert found.tokens(text) == tokenizer(text)["input_ids"], text


@pytest.mark.parametrize("pre", [name for name, _ in vocabulary.PRE.values()])
def test_byte_level(pre, tmp_path):
    tokenizer = byte_level(pre)
    assert len(tokenizer("the cat said")["input_ids"]) < 8  # it merges
    found, said = engine(tokenizer, tmp_path)
    same(found, tokenizer)
    assert not said


def test_the_rules_are_the_published_ones():
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    assert (("Split", PRETOKENIZE_REGEX), ("ByteLevel", False)) in vocabulary.PRE


@pytest.mark.parametrize("scheme", [None, "always", "first", "never"])
def test_sentencepiece(scheme, tmp_path):
    tokenizer = sentencepiece(scheme and metaspace(scheme))
    found, said = engine(tokenizer, tmp_path)
    others = {None: (), "always": (" ",), "first": (" ", "<s>", "<|"), "never": ()}[scheme]  # of which it is warned
    assert len(said) == len(others[:2])
    same(found, tokenizer, [text for text in VARIED if vocabulary.SPACE not in text and not text.startswith(others)])


def test_bos_and_eos_as_the_tokenizer_adds_them(tmp_path):
    tokenizer = byte_level("gpt-2")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    found, _ = engine(tokenizer, tmp_path)
    same(found, tokenizer)
    assert found.tokens("a")[0] == 0 and found.tokens("a")[-1] == 1


def test_the_chat_template_comes_along(tmp_path):
    tokenizer = byte_level("gpt-2")
    tokenizer.chat_template = ("{% for m in messages %}<|user|>{{ m['content'] }}<|end|>\n{% endfor %}"
                               "{% if add_generation_prompt %}<s>{% endif %}")
    found, _ = engine(tokenizer, tmp_path)
    chat = [{"role": "user", "content": "hello"}]
    assert found.ask("/apply-template", messages=chat)["prompt"] == tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("tokenizer, words", [
    (lambda: byte_level("gpt-2", normalizer=normalizers.NFC()), "composes characters first"),
    (lambda: sentencepiece(metaspace("first")), "only at the very beginning"),
])
def test_what_differs_is_a_warning(tokenizer, words):
    assert any(words in line for line in vocabulary.describe(tokenizer(), 600).warnings)


def odd_merges(spec):
    merges = spec["model"]["merges"]
    del merges[len(merges) // 2]


def scattered(spec):
    merges = spec["model"]["merges"]
    made = ["".join(m) for m in merges]
    twice = next(i for i, token in enumerate(made) if made.count(token) > 1)
    merges.append(merges.pop(twice))


def unigram(spec):
    spec["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [[token, 0.0] for token in spec["model"]["vocab"]],
                     "byte_fallback": True}


@pytest.mark.parametrize("tokenizer, words", [
    (lambda: byte_level("gpt-2", pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)), "puts a space before"),
    (lambda: byte_level("gpt-2", pre_tokenizer=pre_tokenizers.Sequence([
        pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)])), "rules that it has no name"),
    (lambda: byte_level("llama-bpe", ignore_merges=False), "has ignore_merges False, llama-bpe in llama.cpp True"),
    (lambda: byte_level("gpt-2", normalizer=normalizers.Lowercase()), "normalises text"),
    (lambda: sentencepiece(odd_merges), "no order of scores"),
    (lambda: sentencepiece(scattered), "no order of scores"),
    (lambda: sentencepiece(unigram), "is of type Unigram"),
    (lambda: sentencepiece(lambda spec: spec.update(normalizer=None)), "does not write spaces"),
])
def test_refused(tokenizer, words):
    with pytest.raises(ValueError, match=f"^--format gguf: llama.cpp cannot follow this model's tokenizer .*{words}"):
        vocabulary.describe(tokenizer(), 600)


def test_more_tokens_than_the_model_has_are_refused():
    with pytest.raises(ValueError, match="has a token 511, the model only 511"):
        vocabulary.describe(sentencepiece(), 511)


def test_stories_goes_on_as_in_transformers(tmp_path):
    """Greedy, token for token."""
    model, tokenizer = oneshot.load(STORIES)
    gguf.write(tmp_path, model, tokenizer, "gguf:f32", {"tensors": {}}, {})
    found = LlamaCpp(tmp_path / gguf.FILE)
    same(found, tokenizer, ["Once upon a time, there was a little girl named Zoë 🙂.\nShe  had 2 dogs."])
    for text in ("Once upon a time", "The dog", "Lily and Tom went to the"):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            want = model.float().generate(ids, max_new_tokens=48, do_sample=False, suppress_tokens=[2])
        assert found.greedy(ids[0].tolist(), 48) == want[0, ids.shape[1]:].tolist()
