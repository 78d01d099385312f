"""Text from the hub: what is asked of it, how its rows are joined, what is said when it is out of reach."""

import random
import string
import time

import datasets
import huggingface_hub
import pytest
from characters import assert_refused, calibrate, character_tokenizer, spell

from oneshot import data
from oneshot.data import TextOptions, windows
from oneshot.data import hub as hub_module


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer(bos_token="<s>", eos_token="</s>")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that holds `rows`; `asked` records what was asked of it."""

    class Hub:
        rows, column, asked = [], "text", []

    def load_dataset(*args, **kwargs):
        Hub.asked.append((args, kwargs))
        return datasets.Dataset.from_dict({"url": [0] * len(Hub.rows), Hub.column: Hub.rows})

    def hf_hub_download(*args, **kwargs):
        Hub.asked.append((args, kwargs))
        return str(tmp_path / "shard.json.gz")

    Hub.asked = []
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(hub_module, "hub_away", lambda: None)
    return Hub


def test_wikitext2_joins_all_rows_empty_ones_too(tokenizer, hub):
    hub.rows = ["", " = Title = \n", "", " some text \n"] * 9
    tokens = data.evaluation(
        tokenizer, "wikitext2", seqlen=10, options=TextOptions(split="train", column="url")
    )
    assert ("<s>" + "\n\n".join(hub.rows)).startswith(spell(tokenizer, tokens.ids.flatten()))
    [(args, kwargs)] = hub.asked
    assert args == ("Salesforce/wikitext", "wikitext-2-raw-v1") and kwargs["split"] == "test"
    assert "Salesforce/wikitext" in tokens.source and "split test" in tokens.source
    calibrate(tokenizer, "wikitext2", options=TextOptions(revision="abc"))
    assert hub.asked[1][1]["split"] == "train" and hub.asked[1][1]["revision"] == "abc"


def test_ptb_is_glued_by_spaces(tokenizer, hub):
    hub.rows, hub.column = ["no it was n't", "black monday"] * 9, "sentence"
    tokens = data.evaluation(tokenizer, "ptb", seqlen=10)
    assert ("<s>" + " ".join(hub.rows)).startswith(spell(tokenizer, tokens.ids.flatten()))
    assert hub.asked[0][1]["revision"] == "refs/convert/parquet" and hub.asked[0][1]["split"] == "test"


def test_c4_calibration_draws_like_wanda(tokenizer, hub):
    lengths = random.Random(0).choices(range(1, 60), k=200)
    hub.rows = ["".join(random.Random(i).choices(string.ascii_letters, k=k)) for i, k in enumerate(lengths)]
    tokens = calibrate(tokenizer, "c4", nsamples=30, seqlen=20, seed=5)
    random.seed(5)
    for row in tokens.ids:  # get_c4 of wanda/lib/data.py
        while True:
            i = random.randint(0, len(hub.rows) - 1)
            ids = tokenizer(hub.rows[i])["input_ids"]
            if len(ids) > 20:
                break
        start = random.randint(0, len(ids) - 20 - 1)
        assert row.tolist() == ids[start : start + 20]
    assert hub.asked[0][0] == ("allenai/c4", "en/c4-train.00000-of-01024.json.gz")


def test_c4_calibration_ends_when_no_document_is_long_enough(tokenizer, hub, monkeypatch):
    hub.rows = ["short"]
    monkeypatch.setattr(windows, "MAX_DRAWS", 50)
    assert_refused(tokenizer, "--calibration", "c4", ["longer than 10 tokens", "--seqlen"])


def test_c4_evaluation_takes_256_windows_of_1100_documents(tokenizer, hub):
    hub.rows = [f"{i:04}" for i in range(1200)]
    tokens = data.evaluation(tokenizer, "c4", seqlen=10)
    stream = "<s>" + " ".join(hub.rows[:1100])
    assert tokens.ids.shape == (256, 10) and stream.startswith(spell(tokenizer, tokens.ids.flatten()))
    assert len(data.evaluation(tokenizer, "c4", seqlen=100).ids) == 55  # 5500 tokens are all there are
    assert len(data.evaluation(tokenizer, "c4", seqlen=10, max_windows=3).ids) == 3
    assert hub.asked[0][0] == ("allenai/c4", "en/c4-validation.00000-of-00008.json.gz")


def test_any_hub_data_set(tokenizer, hub):
    hub.rows, hub.column = ["some text", None, "more text"], "story"
    options = TextOptions(config="small", split="train[:9]", revision="v2", cache_dir="there")
    tokens = calibrate(tokenizer, "owner/name", nsamples=1, options=options)
    assert hub.asked == [
        (("owner/name", "small"), {"split": "train[:9]", "revision": "v2", "cache_dir": "there"})
    ]
    for part in ("owner/name", "small", "train[:9]", "v2", "column story"):
        assert part in tokens.source
    joined = data.evaluation(tokenizer, "owner/name", seqlen=23).ids[0]
    assert spell(tokenizer, joined) == "<s>some text\n\n\n\nmore text"
    assert hub.asked[1][1]["split"] == "test"


def test_hub_columns(tokenizer, hub):
    hub.rows = ["some text"] * 9
    assert_refused(tokenizer, "--calibration", "owner/name", ["'a'", "--column", "url, text"], column="a")
    assert_refused(tokenizer, "--evaluate", "owner/name", ["'url'", "not hold text"], column="url")


def test_options_that_a_fixed_set_ignores_are_named(tokenizer, hub):
    hub.rows = ["some text"] * 9
    tokens = calibrate(tokenizer, "wikitext2", options=TextOptions(split="validation"))
    assert "--split" in tokens.warnings[0] and hub.asked[0][1]["split"] == "train"


def test_failure_of_the_hub_is_one_line(tokenizer, hub, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("Unknown split.\nShould be one of [a, b]")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert_refused(tokenizer, "--calibration", "owner/name", ["Unknown split. Should be one of", "--split"])


@pytest.mark.parametrize("how", ["refused", "offline"])
@pytest.mark.parametrize("flag", ["--calibration", "--evaluate"])
@pytest.mark.parametrize("spec", ["wikitext2", "c4", "ptb", "owner/name"])
def test_hub_out_of_reach(tokenizer, monkeypatch, tmp_path, spec, flag, how):
    """For real: with HF_HUB_OFFLINE, and with an address where nobody listens."""
    if how == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    before, start = datasets.config.HF_HUB_OFFLINE, time.monotonic()
    others = "`builtin` or `self`" if flag == "--calibration" else "or `builtin`"
    says = ["not in the cache", "cannot be reached", "local file", others]
    assert_refused(tokenizer, flag, spec, says, cache_dir=str(tmp_path))
    assert time.monotonic() - start < 10 and before == datasets.config.HF_HUB_OFFLINE
