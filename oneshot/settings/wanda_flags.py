"""The flags of Wanda's main.py (github.com/locuslab/wanda), translated to oneshot's."""

from typing import Any

WANDA = {  # {flag of Wanda's main.py: its help}
    "prune_method": "magnitude, wanda, sparsegpt",
    "sparsity_ratio": "share of zeros (default: 0, nothing is pruned)",
    "sparsity_type": "unstructured, 2:4, 4:8",
    "save_model": "folder for the pruned model (--save is then the folder for results)",
}


def apply_wanda(given: dict[str, Any]) -> dict[str, Any]:
    """{flag: value} with the flags of Wanda's main.py translated. Raises ValueError naming the flag."""
    wanda = {name: given.pop(name) for name in WANDA if name in given}
    if given.pop("eval_zero_shot", False):
        given.setdefault("tasks", "zeroshot7")
    variant = given.pop("use_variant", False)
    if variant and wanda.get("prune_method", "wanda") == "wanda":  # main.py ignores it with other methods
        given["wanda.use_variant"] = True
    if "prune_method" not in wanda:
        for name in wanda:
            raise ValueError(f"--{name}: a flag of Wanda's main.py, it goes with --prune_method; "
                             "otherwise use --pattern and --save")
        return given
    for name in ("method", "pattern"):
        if name in given:
            raise ValueError(f"--{name}: not together with --prune_method, which is Wanda's flag for the same")
    method, pattern = wanda_method(wanda["prune_method"]), wanda_pattern(**wanda)
    pruned = pattern is not None  # main.py prunes nothing at ratio 0
    if not pruned:
        given.pop("wanda.use_variant", None)
    given |= {"method": method if pruned else "dense", "pattern": pattern or "dense", "dense": not pruned}
    there = {"calibration": "c4", "evaluate": "wikitext2"}
    if "save" in given:
        there["results"] = given.pop("save")
    if "save_model" in wanda:
        given["save"] = wanda["save_model"]
    return there | given


def wanda_method(name: str) -> str:
    """The `--method` for Wanda's `--prune_method`. Raises ValueError naming that flag for an unknown one."""
    if name not in ("magnitude", "wanda", "sparsegpt"):
        raise ValueError(f"--prune_method {name}: oneshot knows magnitude, wanda and sparsegpt under this flag")
    return name


def wanda_pattern(*, sparsity_ratio: float | None = None, sparsity_type: str = "unstructured",
                  **others: Any) -> str | None:
    """The `--pattern` for Wanda's flags, of which `others` are ignored; None if nothing is to be pruned.

    Raises ValueError naming the flag.
    """
    if sparsity_type not in ("unstructured", "2:4", "4:8"):
        raise ValueError(f"--sparsity_type {sparsity_type}: give unstructured, 2:4 or 4:8; other N:M as --pattern")
    if sparsity_type != "unstructured":
        if sparsity_ratio not in (None, 0.5):
            raise ValueError(f"--sparsity_ratio {sparsity_ratio:g}: with --sparsity_type {sparsity_type} it is 0.5")
        return sparsity_type
    if sparsity_ratio is not None and not 0 <= sparsity_ratio < 1:
        raise ValueError(f"--sparsity_ratio {sparsity_ratio:g}: give a share in [0, 1)")
    return str(sparsity_ratio) if sparsity_ratio else None
