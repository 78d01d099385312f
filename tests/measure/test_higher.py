"""Each measurement says which of its metrics are better when higher; the tables mark their best by that."""

from oneshot import measure
from oneshot.report import higher_is_better

HIGHER = ("top1_agreement", "acc", "acc_norm", "exact_match,strict", "f1", "starts_with", "contains", "chosen",
          "prefill_speedup", "decode1_speedup", "decode8_speedup")
LOWER = ("ppl", "kl", "kl_p99", "flips", "prefill_ms", "decode1_ms", "perplexity", "worst")


def test_of_every_metric():
    assert [name for name in (*HIGHER, *LOWER) if higher_is_better(f"some text/{name}")] == list(HIGHER)


def test_a_measurement_says_so_itself(monkeypatch):
    """Nothing else has a list of them: a new measurement is one file."""
    monkeypatch.setattr(measure.module("perplexity"), "higher", ("ppl",), raising=False)
    assert higher_is_better("some text/ppl")
    monkeypatch.delattr(measure.module("divergence"), "higher")
    assert not higher_is_better("some text/top1_agreement")
