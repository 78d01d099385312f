"""One side of versus_llmcompressor.py: prune a saved model and save it, in an environment that has either program.

    python scripts/bench/one_side.py oneshot|llmcompressor MODEL TOKENS METHOD DTYPE COMPUTES OUT

MODEL: a folder. TOKENS: calibration token ids (n, T), a .pt file. METHOD: sparsegpt or wanda, to 2:4. DTYPE: that the
weights are loaded in. COMPUTES: that of computing, which for llm-compressor is the same. OUT: the folder to save to;
measured.json in it holds, of the pruning alone: seconds, processor seconds, peak resident memory in bytes (of the
process, loading included), versions.
"""

import argparse
import importlib.metadata
import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def main(argv: list[str] | None = None) -> None:
    """Load, prune, save, and write what was measured."""
    p = argparse.ArgumentParser(prog="python scripts/bench/one_side.py", description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("side", "source", "tokens", "method", "dtype", "computes", "out"):
        p.add_argument(name, metavar={"source": "model"}.get(name, name).upper())
    side, source, tokens, method, dtype, computes, out = vars(p.parse_args(argv)).values()
    ids, folder = torch.load(tokens), Path(out)
    program = {"oneshot": by_oneshot, "llmcompressor": by_llmcompressor}[side]
    prune = program(method, source, computes)  # imports, before the clock starts
    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype)).eval()
    loaded = resident("VmHWM")
    began, used = time.perf_counter(), time.process_time()
    prune(model, ids)
    measured = {"side": side, "method": method, "dtype": dtype, "computes": computes,
                "seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - used,
                "loaded_bytes": loaded, "peak_bytes": max(loaded, resident("VmHWM")),
                "threads": torch.get_num_threads(), "version": importlib.metadata.version(side),
                "torch": torch.__version__, "transformers": importlib.metadata.version("transformers")}
    model.save_pretrained(folder)
    (folder / "measured.json").write_text(json.dumps(measured))


def by_oneshot(method: str, source: str, computes: str):
    """prune(model, ids) by this program, whose CPU computes in float32 unless asked."""
    import oneshot

    compute = "auto" if computes == "float32" else "stored"
    return lambda model, ids: oneshot.prune(model, method=method, pattern="2:4", calibration=ids, compute=compute,
                                            progress=False)


def by_llmcompressor(method: str, source: str, computes: str):
    """prune(model, ids) by llm-compressor, with its own defaults and pipeline."""
    from datasets import Dataset
    from llmcompressor import oneshot as run
    from llmcompressor.modifiers import pruning
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)  # it asks for one, though the windows are tokens already
    kind = {"sparsegpt": "SparseGPTModifier", "wanda": "WandaPruningModifier"}[method]
    recipe = getattr(pruning, kind)(sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["re:.*lm_head"])

    def prune(model: torch.nn.Module, ids: torch.Tensor) -> None:
        rows = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
        run(model=model, processor=tokenizer, dataset=rows, recipe=recipe, max_seq_length=ids.shape[1],
            num_calibration_samples=len(ids), shuffle_calibration_samples=False)
    return prune


def resident(field: str) -> int:
    """A line of /proc/self/status in bytes; VmHWM: the most memory that the process has had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


if __name__ == "__main__":
    main()
