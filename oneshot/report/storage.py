"""Storage: what a record says of shares and bytes of the whole model, and of what is never pruned. Pure functions."""


def whole_sparsity(record: dict) -> float | None:
    """Share of zeros among ALL weights of the model, what is never pruned included; None where that is not known."""
    model, found = record.get("model") or {}, record.get("sparsity")
    if found is None or not model.get("parameters") or model.get("prunable") is None:
        return None
    return found * model["prunable"] / model["parameters"]


def whole_bytes(record: dict) -> tuple[float, float] | None:
    """(stored, dense) bytes of the whole model, its prunable weights in the smallest simple format of their pattern,
    the output head on its grid if it was rounded, and all others as they are; of a smaller model, "dense" is the model
    it was made from. None where that is not known."""
    model, linears = record.get("model") or {}, record.get("bytes") or {}
    if not linears.get("dense") or not model.get("parameters") or not model.get("prunable"):
        return None
    each, shrunk = linears["dense"] / model["prunable"], record.get("shrunk") or {}
    rest = (model["parameters"] - model["prunable"]) * each
    gone = ((shrunk.get("parameters_before") or 0) - (shrunk.get("parameters") or 0)) * each
    head = record.get("head") or {}
    saved = (head.get("dense") or 0) - (head.get("stored") or 0)
    return linears["stored"] + rest - saved, linears["dense"] + rest + gone


def left_dense(record: dict) -> list[tuple[str, float]]:
    """[(reason, share of the model's weights)] of what is never pruned, the largest first; [] where not known. An
    output head that was rounded is not among it."""
    total, shares = (record.get("model") or {}).get("parameters"), {}
    for row in record.get("skipped") or []:
        if total and row.get("weights") and not (record.get("head") and "output head" in str(row["reason"])):
            shares[str(row["reason"])] = shares.get(str(row["reason"]), 0.0) + row["weights"] / total
    return sorted(shares.items(), key=lambda item: -item[1])


def dense_in_blocks(record: dict) -> float | None:
    """Share of the transformer blocks' weights, vectors included, that is never pruned; None where not known."""
    model = record.get("model") or {}
    if not model.get("in_blocks") or model.get("prunable") is None:
        return None
    return 1 - model["prunable"] / model["in_blocks"]
