"""Laws of oneshot.data, on a tokenizer with one token per character, so that windows can be read as text."""

import csv
import json
import random
import string
import sys
import time
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from tqdm import tqdm

from oneshot import data
from oneshot.data import TextOptions, sample_self, sources, windows

MODEL = str(Path(__file__).resolve().parent / "stories260k")
SEPARATE = TextOptions(documents="separate")
STORIES = ["once upon a time", "the end", "x", "", 'a dog, "Rex", ran\nand ran', "žluťoučký kůň"]


def character_tokenizer(bos=True, **special):
    vocabulary = {c: i for i, c in enumerate(["<s>", "</s>", "<unk>", *string.printable, *"žťčýůň"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=8, **special)


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer(bos_token="<s>", eos_token="</s>")


@pytest.fixture
def text(tmp_path):
    """A file of 1999 random letters: no window of ten comes twice."""
    letters = random.Random(7).choices(string.ascii_letters, k=1999)
    path = tmp_path / "letters.txt"
    path.write_text("".join(letters))
    return path


def spell(tokenizer, ids):
    return "".join(tokenizer.convert_ids_to_tokens(ids))


def calibrate(tokenizer, spec, nsamples=5, seqlen=10, seed=0, **more):
    return data.calibration(
        tokenizer, str(spec), nsamples=nsamples, seqlen=seqlen, seed=seed, progress=False, **more
    )


# ---------------------------------------------------------------------------------------------------- windows


def test_calibration_windows_are_distinct_pieces_of_the_stream(tokenizer, text):
    tokens = calibrate(tokenizer, text, nsamples=50)
    stream = ["<s>", *text.read_text()]
    pieces = [stream[i : i + 10] for i in range(0, 2000, 10)]
    found = [pieces.index(tokenizer.convert_ids_to_tokens(row)) for row in tokens.ids]
    assert tokens.ids.shape == (50, 10) and tokens.ids.dtype == torch.int64 and tokens.mask is None
    assert len(set(found)) == 50
    assert tokens.n_tokens == 500 and tokens.warnings == ()


def test_seed_decides(tokenizer, text):
    first, again, other = (calibrate(tokenizer, text, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.ids, again.ids) and first.sha256 == again.sha256 and first.source == again.source
    assert not torch.equal(first.ids, other.ids) and first.sha256 != other.sha256


def test_global_random_state_decides_nothing_and_is_left_alone(tokenizer, text):
    random.seed(3)
    first = calibrate(tokenizer, text)
    state = random.getstate()
    second = calibrate(tokenizer, text)
    assert first.sha256 == second.sha256 and random.getstate() == state


def test_all_windows_and_a_warning_when_there_are_too_few(tokenizer, text):
    tokens = calibrate(tokenizer, text, nsamples=500)
    assert len(tokens.ids) == 200 == len(set(map(tuple, tokens.ids.tolist())))
    [warning] = tokens.warnings
    assert "200" in warning and "500" in warning


def test_calibration_reads_no_more_text_than_it_may(tokenizer, tmp_path, monkeypatch):
    path = write(tmp_path / "t.jsonl", ["a" * 90, "b" * 90, "c" * 90, "d" * 90])
    monkeypatch.setattr(windows, "MAX_CHARACTERS", 149)  # of "a..a", blank line, "b..b" without its end
    tokens = calibrate(tokenizer, path, nsamples=5, seqlen=50, seed=0)
    assert len(tokens.ids) == 5 and tokens.warnings == ()  # as much as may be needed is read in any case
    tokens = calibrate(tokenizer, path, nsamples=3, seqlen=3, seed=0)
    assert "3 random of 50 windows" in tokens.source and "149" in tokens.warnings[0]


def test_evaluation_is_the_stream_in_order_without_its_tail(tokenizer, text):
    tokens = data.evaluation(tokenizer, str(text), seqlen=30)
    assert tokens.ids.shape == (66, 30)  # 2000 tokens
    assert spell(tokenizer, tokens.ids.flatten()) == "<s>" + text.read_text()[:1979]
    first = data.evaluation(tokenizer, str(text), seqlen=30, max_windows=4)
    assert torch.equal(first.ids, tokens.ids[:4])


def test_join_glues_documents_with_a_blank_line_and_one_bos(tokenizer, tmp_path):
    path = tmp_path / "stories.json"
    path.write_text(json.dumps(STORIES))
    tokens = data.evaluation(tokenizer, str(path), seqlen=10)
    joined = "<s>" + "\n\n".join(STORIES)
    assert joined.startswith(spell(tokenizer, tokens.ids.flatten()))


def test_separate_pads_cuts_and_masks(tokenizer, tmp_path):
    path = tmp_path / "stories.json"
    path.write_text(json.dumps(STORIES))
    tokens = data.evaluation(tokenizer, str(path), seqlen=10, options=SEPARATE)
    kept = [story for story in STORIES if story]  # the empty one has but its bos
    assert [spell(tokenizer, row[mask]) for row, mask in zip(tokens.ids, tokens.mask, strict=True)] == [
        ("<s>" + story)[: len("<s>") + 9] for story in kept
    ]
    assert (tokens.ids[~tokens.mask] == tokenizer.eos_token_id).all()  # there is no pad token
    assert not (tokens.mask[:, 1:] & ~tokens.mask[:, :-1]).any()  # padding is on the right
    assert tokens.n_tokens == sum(min(len(story) + 1, 10) for story in kept)
    assert "3 of them cut" in tokens.source


def test_separate_needs_no_mask_when_nothing_is_padded(tokenizer, tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("a line of more than ten\nanother of more than ten")
    options = TextOptions(documents="separate", per_line=True)
    assert data.evaluation(tokenizer, str(path), seqlen=10, options=options).mask is None


def test_separate_draws_documents_once_each(tokenizer, tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"line {i}\n" for i in range(30)))
    options = TextOptions(documents="separate", per_line=True)
    seen = set()
    for seed in (0, 1):
        tokens = calibrate(tokenizer, path, nsamples=20, seqlen=12, seed=seed, options=options)
        lines = [spell(tokenizer, row[m]) for row, m in zip(tokens.ids, tokens.mask, strict=True)]
        assert len(set(lines)) == 20 and all(line.startswith("<s>line ") for line in lines)
        seen.add(tuple(lines))
    assert len(seen) == 2
    assert "30" in calibrate(tokenizer, path, nsamples=31, seqlen=12, options=options).warnings[0]


@pytest.mark.parametrize("special, pad", [({"pad_token": "<unk>", "eos_token": "</s>"}, 2), ({}, 0)])
def test_pad_token(special, pad, tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("abc")
    tokens = data.evaluation(character_tokenizer(bos=False, **special), str(path), seqlen=5, options=SEPARATE)
    assert tokens.ids[0, 3:].tolist() == [pad, pad]


def test_hash_tells_ids_mask_and_shape_apart():
    ids = torch.arange(12).view(3, 4)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[0, 3] = False
    variants = [(ids, None), (ids + 1, None), (ids.view(4, 3), None), (ids, mask), (ids, ~mask)]
    assert len({windows._tokens(*variant, "").sha256 for variant in variants}) == 5


def test_token_warning_counts_real_tokens_only():
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[:, :5] = True
    tokens = windows._tokens(torch.zeros(2, 8, dtype=torch.int64), mask, "")
    assert data.token_warning(tokens, 10) is None
    warning = data.token_warning(tokens, 11)
    assert "10" in warning and "11" in warning and "--nsamples" in warning


def test_no_warning_about_the_models_length(tokenizer, text, capfd):
    calibrate(tokenizer, text)
    assert "longer" not in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------------ files


def write(path, rows, column="text"):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"n": 1, column: row}) for row in rows) + "\n\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"n": 1, column: row} for row in rows]))
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([[column], *([row] for row in rows)])  # all columns of a csv are text
    else:
        datasets.Dataset.from_dict({"n": [1] * len(rows), column: rows}).to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
@pytest.mark.parametrize("column, options", [("text", {}), ("story", {}), ("story", {"column": "story"})])
def test_every_kind_of_file_gives_the_same_text(tokenizer, tmp_path, suffix, column, options):
    plain = tmp_path / "plain.txt"
    plain.write_text("\n\n".join(STORIES), encoding="utf-8")
    path = write(tmp_path / f"file.{suffix}", STORIES, column)
    tokens = data.evaluation(tokenizer, str(path), seqlen=10, options=TextOptions(**options))
    assert tokens.sha256 == data.evaluation(tokenizer, str(plain), seqlen=10).sha256
    assert f"file.{suffix}" in tokens.source and str(tmp_path) not in tokens.source


def test_jsonl_of_strings_nulls_and_windows_line_ends(tokenizer, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'\xef\xbb\xbf"abcd"\r\nnull\r\n"efgh"\r\n')
    assert spell(tokenizer, data.evaluation(tokenizer, str(path), seqlen=11).ids[0]) == "<s>abcd\n\nefgh"


def test_text_file_is_one_document_or_one_a_line(tokenizer, tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(b"abc\r\nde\r\n")
    whole = data.evaluation(tokenizer, str(path), seqlen=10, options=SEPARATE)
    lines = data.evaluation(
        tokenizer, str(path), seqlen=10, options=TextOptions(documents="separate", per_line=True)
    )
    assert [spell(tokenizer, row[mask]) for row, mask in zip(whole.ids, whole.mask, strict=True)] == [
        "<s>abc\nde\n"
    ]
    assert [spell(tokenizer, row[mask]) for row, mask in zip(lines.ids, lines.mask, strict=True)] == [
        "<s>abc",
        "<s>de",
    ]


def test_builtin_text(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DEMO", tmp_path)
    for name in ("calibration", "evaluation_sampled", "evaluation_prose"):
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 3)

    def evaluate(spec):
        return spell(tokenizer, data.evaluation(tokenizer, spec, seqlen=10).ids.flatten())

    assert spell(tokenizer, calibrate(tokenizer, "builtin", nsamples=1, seqlen=37).ids[0]).count("calib") == 3
    assert "sampled" in evaluate("builtin:sampled") and "prose" not in evaluate("builtin:sampled")
    assert "prose" in evaluate("builtin:prose") and "sampled" not in evaluate("builtin:prose")
    assert "prose" in evaluate("builtin") and "sampled" in evaluate("builtin")


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "name, content, options, says",
    [
        ("short.txt", "abc", {}, ["4 tokens", "window of 10", "--seqlen 4"]),
        ("empty.txt", " \n", {}, ["no text"]),
        ("empty.json", "[]", {}, ["no text"]),
        ("empty.jsonl", "\n", {}, ["no text"]),
        ("binary.txt", b"\xff\xfe\x00", {}, ["binary.txt", "UTF-8"]),
        ("bad.jsonl", '"a"\n\n{"text": \n', {}, ["line 3", "JSON"]),
        ("bad.json", "[1, ", {}, ["JSON"]),
        ("lines.json", '"a"\n"b"', {}, ["JSON", ".jsonl"]),
        ("object.json", '{"text": "a"}', {}, ["dict", "list"]),
        ("numbers.json", "[1, 2]", {}, ["record 1", "int"]),
        ("column.jsonl", '{"a": "x", "b": "y"}', {"column": "c"}, ["'c'", "--column", "a, b"]),
        ("which.jsonl", '{"a": "x", "b": "y"}', {}, ["--column", "a, b"]),
        ("none.jsonl", '{"a": 1, "b": 2}', {}, ["--column", "a, b"]),
        ("missing.jsonl", '{"text": "x"}\n{"b": "y"}', {}, ["record 2", "'text'"]),
        ("type.jsonl", '{"text": "x"}\n{"text": 5}', {}, ["record 2", "int", "--column"]),
        ("which.csv", "a,b\nx,y\n", {}, ["--column", "a, b"]),
        ("fields.csv", "text,b\nx,y\nx,y,z\n", {}, ["record 2", "quote"]),
        ("bad.parquet", "no parquet", {}, ["bad.parquet", "parquet", "check"]),
        ("notes.md", "abc", {}, [".txt, .jsonl, .json, .parquet, .csv"]),
        ("letters.txt", "a" * 99, {"documents": "apart"}, ["--documents", "apart", "join or separate"]),
    ],
)
@pytest.mark.parametrize("flag", ["--calibration", "--evaluate"])
def test_bad_files_give_one_clear_line(tokenizer, tmp_path, flag, name, content, options, says):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(tokenizer, flag, path, says, **options)


def assert_refused(tokenizer, flag, spec, says, seqlen=10, **options):
    options = TextOptions(**options)
    with pytest.raises(ValueError) as error:
        if flag == "--calibration":
            calibrate(tokenizer, spec, seqlen=seqlen, options=options)
        else:
            data.evaluation(tokenizer, str(spec), seqlen=seqlen, options=options)
    message = str(error.value)
    assert message.startswith(f"{flag} {spec}: ") and "\n" not in message
    for part in says:
        assert part in message


@pytest.mark.parametrize("flag", ["--calibration", "--evaluate"])
def test_unknown_names_and_files(tokenizer, tmp_path, flag):
    assert_refused(
        tokenizer, flag, "wikitext3", ["unknown", "wikitext2", "c4", "ptb", "builtin", "owner/name"]
    )
    for suffix in ("txt", "parquet"):
        assert_refused(tokenizer, flag, tmp_path / f"absent.{suffix}", [f"absent.{suffix}", "No such file"])
    assert_refused(tokenizer, flag, tmp_path, [".txt"])  # a folder
    table = write(tmp_path / "table.parquet", ["x"], "a")
    assert_refused(tokenizer, flag, table, ["'c'", "--column", "n, a"], column="c")


def test_what_is_for_one_flag_only(tokenizer):
    assert_refused(tokenizer, "--evaluate", "self", ["unknown"])
    assert_refused(tokenizer, "--calibration", "builtin:prose", ["unknown", "builtin"])
    assert_refused(tokenizer, "--calibration", "self", ["model"])


def test_sizes(tokenizer, text):
    assert_refused(tokenizer, "--evaluate", text, ["--seqlen"], seqlen=1)
    with pytest.raises(ValueError, match="--nsamples is 0"):
        calibrate(tokenizer, text, nsamples=0)


def test_separate_without_a_usable_document(tokenizer, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('"a"')
    no_bos = character_tokenizer(bos=False)
    with pytest.raises(ValueError, match="two tokens"):
        data.evaluation(no_bos, str(path), seqlen=10, options=SEPARATE)


# -------------------------------------------------------------------------------------------------------- hub


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
    monkeypatch.setattr(sources, "hub_away", lambda: None)
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


def test_missing_packages_are_named(tokenizer, tmp_path, monkeypatch):
    table = write(tmp_path / "table.parquet", ["x"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert_refused(tokenizer, "--calibration", "c4", ["pip install datasets", "`self`"])
    assert_refused(tokenizer, "--evaluate", table, ["pip install pyarrow"])


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


# ------------------------------------------------------------------------------------------------------- self


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


# -------------------------------------------------------------------------------------- real models and texts


def test_tinystories_with_a_real_tokenizer(shared, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    stories = json.loads(shared("data", "tinystories_1000.json").read_text())[:200]
    path = str(tmp_path / "stories.json")
    Path(path).write_text(json.dumps(stories))
    tokens = calibrate(tokenizer, path, nsamples=16, seqlen=256)
    stream = tokenizer("\n\n".join(stories))["input_ids"]
    stream = torch.tensor(stream[: len(stream) // 256 * 256]).view(-1, 256)
    assert all((row == stream).all(1).sum() == 1 for row in tokens.ids)
    assert torch.equal(data.evaluation(tokenizer, path, seqlen=256).ids, stream)


def test_craftgpt_dialogues_each_in_a_window(shared):
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(shared("models", "craftgpt-5m")))
    path = str(shared("data", "craftgpt_selfgen.txt"))
    options = TextOptions(documents="separate", per_line=True)
    tokens = calibrate(tokenizer, path, nsamples=32, seqlen=64, options=options)
    lines = {tuple(tokenizer(line)["input_ids"][:64]) for line in Path(path).read_text().split("\n")}
    mask = torch.ones_like(tokens.ids, dtype=torch.bool) if tokens.mask is None else tokens.mask
    assert all(tuple(row[m].tolist()) in lines for row, m in zip(tokens.ids, mask, strict=True))


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
