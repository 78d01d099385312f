"""Flags of making a model smaller, and of measuring its time."""

from oneshot.measure import latency
from oneshot.prune import linear
from oneshot.structured import depth, search, spread
from wires import SMALLER as TWO_TRIES
from wires import differ, wire

SMALLER = TWO_TRIES | {"tries": 1}  # neurons alone


@wire("shrink")
def _(b):
    for share in (0.7, 0.5):
        found = b.record(**SMALLER | {"shrink": share})["shrunk"]
        assert share - 0.1 < found["parameters"] / found["parameters_before"] <= share


@wire("by")
def _(b):
    """2:4 has 0.5625 of the bytes at 16 bits, and 0.53 at 32: neurons need to give the rest only."""
    given = {**SMALLER, "pattern": "2:4", "method": "magnitude", "shrink": 0.5}
    by_bytes, by_parameters = (b.record(**given, by=by)["shrunk"]["share"] for by in ("bytes", "parameters"))
    assert by_bytes > 0.8 > 0.5 >= by_parameters
    with b.monkeypatch.context() as patch:  # a time that is as long as there are parameters, without noise
        patch.setattr(latency, "compare", lambda named, *_, **__: {"model": {"decode1": {
            "speedup": named["dense"].num_parameters() / named["model"].num_parameters()}}})
        found = b.record(**SMALLER | {"shrink": 0.9}, by="latency")
    assert 0.85 < found["model"]["parameters"] / (found["model"]["parameters"] + found["shrunk"]["parameters_before"]
                                                  - found["shrunk"]["parameters"]) <= 0.9


@wire("layers")
def _(b):
    given = {key: value for key, value in SMALLER.items() if key not in ("shrink", "tries")}
    assert b.record(**given, layers=2)["model"]["blocks"] == 2


@wire("drop")
def _(b):
    given = {key: value for key, value in SMALLER.items() if key not in ("shrink", "tries")}
    assert b.record(**given, drop="0,2")["shrunk"]["kept_blocks"] == [1]


@wire("kv_groups")
def _(b):
    given = {key: value for key, value in SMALLER.items() if key not in ("shrink", "tries")}
    found = b.record(**given, kv_groups=1)["shrunk"]
    assert {row["kind"]: row["left"] for row in found["units"]} == {"KV groups": 1}
    assert found["cut"] == {"dropped": [], "kept": {"KV groups": 1}, "own": {}}
    both = b.record(**given | {"shrink": 0.6}, kv_groups=1)["shrunk"]
    assert both["cut"]["kept"]["KV groups"] == 1 and 0.5 < both["share"] <= 0.6 and not both["tried"]
    assert b.code(**given, kv_groups=2) == 2 and "--kv-groups 2: the model has 2" in b.capfd.readouterr().err


@wire("query_heads")
def _(b):
    given = {key: value for key, value in SMALLER.items() if key not in ("shrink", "tries")}
    found = b.record(**given, query_heads=1)["shrunk"]
    assert {(row["kind"], row["of"], row["left"]) for row in found["units"]} == {("query heads", 4, 2)}  # of 2 groups
    assert b.code(**given, query_heads=1, kv_groups=1) == 2 and "--query-heads: an attention" in \
        b.capfd.readouterr().err


@wire("shrink_method")
def _(b):
    assert differ(b.weights(**SMALLER, shrink_method="magnitude", heal="none"), b.weights(**SMALLER, heal="none"))


@wire("order")
def _(b):
    given = {**SMALLER, "tries": 2}
    for order, other in (("influence", "by_kl"), ("kl", "by_influence")):
        with b.seen(depth, f"by_{order}", lambda *_: 1) as found, b.seen(depth, other, lambda *_: 1) as none:
            b.record(**given, order=order)
        assert found and not none


@wire("tries")
def _(b):
    for tries in (1, 3):
        with b.seen(search, "measured", lambda *_: 1) as found:
            b.record(**SMALLER | {"tries": tries})
        assert len(found) == (tries if tries > 1 else 0)


@wire("shrink_target")
def _(b):
    with b.seen(linear, "towards_dense", lambda args, *_: args[2]) as shares:
        b.record(**SMALLER, shrink_target=0.3)
    assert set(shares) == {0.3}


@wire("latency")
def _(b):
    record = b.record("--latency", method="magnitude", evaluate="none")
    assert {"latency/prefill_ms", "latency/decode1_speedup", "latency/decode8_ms"} <= record["metrics"].keys()
    assert record["latency"]["dense"]["parameters"] == record["latency"]["model"]["parameters"]
    assert not any("latency" in name for name in b.record(method="magnitude")["metrics"])


@wire("uneven")
def _(b):
    with b.seen(spread, "spread", lambda *_: 1) as found:
        b.record("--uneven", **SMALLER | {"tries": 2})
    assert found
    with b.seen(spread, "spread", lambda *_: 1) as found:
        b.record(**SMALLER)
    assert not found


@wire("experts")
def _(b):
    """The tiny model has none: the flag arrives where they would be chosen."""
    assert b.code("--experts", "2", method="obs", pattern="dense") == 2
    assert "no mixture of experts" in b.capfd.readouterr().err
