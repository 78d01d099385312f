"""Damage done on purpose is found where it was done, and nowhere else."""

import json

import pytest
import tiny
import torch
from tiny import plain_pages  # noqa: F401

from oneshot import data, models
from oneshot.measure import damage as module
from oneshot.measure.compared import Compared, compare
from oneshot.measure.damage import damage
from oneshot.report import figures
from oneshot.report.page import html

WORDS = ["the", "river", "of", "Paris", "held", "12", "boats", ".", "Then", ",", "mills", "1940"]


class Plain:
    """A tokenizer whose token i is WORDS[i] with a space before it."""

    def decode(self, ids, **_):
        return "".join(f" {WORDS[i]}" for i in ids)

    def convert_ids_to_tokens(self, i):
        return WORDS[i]


def synthetic(ids, increase, mask=None):
    """(texts, compared) as if the pruned model's loss on ids (n, T) were higher by `increase` (n, T-1)."""
    real = torch.ones(increase.shape, dtype=torch.bool) if mask is None else mask[:, 1:] & mask[:, :-1]
    none, base = torch.zeros_like(real), torch.full(increase.shape, 2.0)
    made = Compared(base + increase, base, none.float(), none, none, none, real)
    return {"t": data.Tokens(ids, mask, "", "")}, {"t": made}


def sampled(n=40, T=33, seed=0, words=12):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(words, (n, T), generator=draw), 0.1 * torch.randn(n, T - 1, generator=draw)


def found(result):
    """{slice: verdict} of those that differ from the whole."""
    return {s["name"]: s["verdict"] for s in result["slices"] if s["verdict"]}


# ---------------------------------------------------------------- what is found

def test_numbers_hurt_are_found():
    ids, noise = sampled()
    result = damage(Plain(), *synthetic(ids, noise + 0.5 * torch.isin(ids[:, 1:], torch.tensor([5, 11]))))
    assert found(result)["numbers"] == "more" and found(result)["all other words"] == "less"
    [told] = [text for text in result["found"] if text.startswith("numbers")]
    assert told.startswith("numbers lost 0.5") and told.endswith("nats, the text as a whole 0.0812")
    assert {t["token"] for t in result["tokens"][:2]} == {" 12", " 1940"}


def test_a_place_in_the_window_is_found():
    ids, noise = sampled()
    noise[:, 3:15] += 1
    assert found(damage(Plain(), *synthetic(ids, noise))).get("after 4-15 tokens") == "more"


def test_a_named_text_is_found():
    (ids, noise), (other, calm) = sampled(seed=1), sampled(seed=2)
    texts, compared = synthetic(ids, noise + 0.2)
    more, also = synthetic(other, calm)
    result = damage(Plain(), {"code": texts["t"], "prose": more["t"]}, {"code": compared["t"], "prose": also["t"]})
    assert {s["name"]: s["verdict"] for s in result["slices"] if s["kind"] == "text"} == {
        "text code": "more", "text prose": "less"}
    assert {p["text"] for p in result["passages"]} == {"code"}


def test_a_frequent_token_is_found_in_its_tenth():
    ids, noise = sampled(words=10)
    ids[torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)) < 0.08] = 9  # a little more than the others
    result = damage(Plain(), *synthetic(ids, noise + (ids[:, 1:] == 9)))
    worse = [s for s in result["slices"] if s["kind"] == "frequency" and s["verdict"] == "more"]
    assert [s["name"] for s in worse] == [[s for s in result["slices"] if s["kind"] == "frequency"][-1]["name"]]
    assert worse[0]["tokens"] == int((ids[:, 1:] == 9).sum())


def test_calibration_tells_frequencies_too():
    ids, noise = sampled(words=10)
    calibration = data.given(torch.full((4, 50), 3))
    with_it = damage(Plain(), *synthetic(ids, noise + (ids[:, 1:] == 3)), calibration)
    assert found(with_it)["commonest tenth"] == "more" and "calibration" in with_it["frequency_from"]
    assert "calibration" not in damage(Plain(), *synthetic(ids, noise))["frequency_from"]


def test_no_damage_no_slice():
    ids, _ = sampled()
    result = damage(Plain(), *synthetic(ids, torch.zeros(40, 32)))
    assert found(result) == {} and result["found"] == result["tokens"] == result["passages"] == []
    assert all(s["increase"] == s["half"] == 0 for s in result["slices"])


def test_chance_alone_is_rarely_taken_for_damage():
    """Equal damage everywhere, windows hanging together: about one interval in twenty errs."""
    verdicts = []
    for seed in range(40):
        ids, noise = sampled(n=20, seed=seed)
        noise += 0.2 * torch.randn(20, 1, generator=torch.Generator().manual_seed(seed))
        result = damage(Plain(), *synthetic(ids, noise))
        verdicts += [bool(s["verdict"]) for s in result["slices"]]
    assert sum(verdicts) / len(verdicts) < 0.08


def test_slices_cover_every_token_once():
    ids, noise = sampled()
    slices = damage(Plain(), *synthetic(ids, noise))["slices"]
    for kind in ("frequency", "position"):
        assert sum(s["tokens"] for s in slices if s["kind"] == kind) == noise.numel()
        assert sum(s["tokens"] * s["increase"] for s in slices if s["kind"] == kind) == pytest.approx(
            noise.double().sum().item(), abs=1e-4)  # the losses are float32


# ---------------------------------------------------------------- what is not there

def test_empty_slices_few_windows_and_padding_are_said():
    ids = torch.zeros(3, 9, dtype=torch.long)
    mask = torch.arange(9) < torch.tensor([[9], [4], [1]])
    result = damage(Plain(), *synthetic(ids, torch.ones(3, 8), mask))
    assert result["overall"] == {"tokens": 11, "windows": 2, "increase": 1.0, "half": None}
    assert {"numbers", "names", "punctuation"} <= set(result["empty"]["content"])
    assert len(result["empty"]["frequency"]) == 9 and "text" not in result["empty"]
    assert all(s["half"] is None and s["verdict"] is None for s in result["slices"])
    json.dumps(result)
    assert [p["window"] for p in result["passages"]] == [0]  # window 1 has too few tokens
    record = {"settings": {"method": "wanda", "pattern": "2:4"}, "damage": result}
    assert "No token in" in html([record]) and figures.fig_damage([record]).axes


def test_a_broken_model_is_said():
    ids, noise = sampled()
    noise[0, 0] = torch.nan
    result = damage(Plain(), *synthetic(ids, noise))
    assert "1 of 1280 tokens is not finite" in result["found"][0] and result["slices"] == []
    assert "not finite" in html([{"damage": result}])


# ---------------------------------------------------------------- parts

def test_words():
    text = 'The river of Paris. "Then I saw Rome", he said. 3.5 km\nJoan'
    tokens = ["The", " riv", "er", " of", " Par", "is", ".", ' "', "Then", " I", " saw", " Rome", '",', " he", " said",
              ".", " 3", ".", "5", " km", "\n", "Joan"]
    pieces = module.Pieces(None)
    pieces.update(enumerate(tokens))
    assert "".join(tokens) == text
    words = {word: rest for word, *rest in pieces.words(range(len(tokens)))}
    assert words["river"] == [1, 2, True, True] and words["Paris"] == [4, 5, True, True]
    assert words["Rome"][-1] and words["3.5"][:2] == [16, 18]
    assert not any(words[w][-1] for w in ("The", "Then", "3.5", "Joan"))
    assert not words["The"][2] and not words["Joan"][2], "cut by an edge"


def test_content():
    ids = torch.tensor([[0, 1, 2, 3, 7, 8, 4, 5, 6, 9, 10]])  # the river of Paris . Then held 12 boats , mills
    real = torch.ones(1, 10, dtype=torch.bool)
    parts = module.by_content(ids, real, torch.tensor([1, 2, 4, 8, 6]), module.Pieces(Plain()))
    assert {name: [WORDS[i] for i in ids[0, 1:][member[0]]] for name, member in parts.items()} == {
        "numbers": ["12"], "names": ["Paris"], module.RARE: ["Paris"], "punctuation": [".", ","],
        "all other words": ["river", "of", "Then", "held", "boats", "mills"]}  # mills: at the window's edge


@pytest.mark.parametrize(("nu", "quantile"), [(4, 2.7764), (9, 2.2622), (30, 2.0423), (10**6, 1.9600)])
def test_student(nu, quantile):
    assert module.student(nu) == pytest.approx(quantile, abs=2e-3)  # tables


# ---------------------------------------------------------------- on models

def test_a_model_that_forgot_its_digits():
    """The demo model with the output rows of all digit tokens moved."""
    model, tokenizer = models.load("demo")
    dense, _ = models.load("demo")
    digits = [i for i in range(len(tokenizer)) if any(c.isdigit() for c in tokenizer.decode([i]))]
    head = model.get_output_embeddings().weight.data.clone()  # tied: the input side stays as it was
    head[digits] *= 0.5
    model.get_output_embeddings().weight = torch.nn.Parameter(head, requires_grad=False)
    tokens = data.evaluation(tokenizer, "builtin:prose", seqlen=64, max_windows=60)
    compared = {"prose": compare(model, dense, tokens.ids)}
    result = damage(tokenizer, {"prose": tokens}, compared)
    assert result["found"][0].startswith("numbers lost")
    assert {t["token"].strip() for t in result["tokens"][:3]} <= {tokenizer.decode([i]).strip() for i in digits}


@pytest.mark.usefixtures("plain_pages")
def test_a_run_records_it_and_its_page_shows_it(tmp_path):
    place = tiny.make(tmp_path)
    argv = tiny.flags(place, "--damage", evaluate=f"a={place / 'evaluation.txt'},b={place / 'calibration.txt'}",
                      eval_windows=20)
    assert tiny.main(*argv) == 0
    records = tiny.records(place / "runs")
    record = records["wanda", "2:4"]
    assert "damage" not in records["dense", "dense"] and "a/kl" not in record["metrics"]
    assert {"text a", "text b"} <= {s["name"] for s in record["damage"]["slices"]}
    assert record["damage"]["overall"]["tokens"] == 2 * 20 * (tiny.WINDOW - 1)
    mean = sum(torch.tensor(r["metrics"][f"{t}/ppl"]).log() * sign for t in "ab"
               for r, sign in ((record, 0.5), (records["dense", "dense"], -0.5)))
    assert record["damage"]["overall"]["increase"] == pytest.approx(float(mean), abs=1e-5)
    text = next((place / "runs").glob("*.html")).read_text()
    assert "Tokens hurt most" in text and "Passages hurt most" in text
    drawn = figures.svg(figures.fig_damage([record]))
    assert all(s["name"] in drawn for s in record["damage"]["slices"])
