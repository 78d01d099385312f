"""Load a model and its tokenizer; identify its weights by a fingerprint."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..runtime.flag import flag as new_flag

DEMO = Path(__file__).parent.parent / "demo" / "model"
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LoadOptions:
    """Flags of loading a model."""

    model: str = new_flag("demo", "local folder, name on the hub, or demo (the small model shipped with oneshot)",
                          section="what", bears_on="loading", shown=False, python=False)
    dtype: str = new_flag("auto", "dtype in which weights are kept and saved; on a CPU all computing is in float32",
                          section="machine", bears_on="loading", python=False, choices=DTYPES)
    model_revision: str | None = new_flag(None, "revision of a hub model", section="machine", bears_on="loading",
                                          python=False)
    cache_dir: str | None = new_flag(None, "Hugging Face cache folder", section="machine", bears_on="output",
                                     python=True)
    trust_remote_code: bool = new_flag(False, "run code from the model's repository; off by default, as such code can "
                                              "do anything", section="machine", bears_on="loading", python=False,
                                       rows=("pruned",))

    def check(self) -> None:
        """Raise ValueError naming the flag whose value cannot be used."""
        if not self.model:
            raise ValueError("--model: is empty")


def load(name: str | Path, *, dtype: str = "auto", revision: str | None = None, cache_dir: str | None = None,
         trust_remote_code: bool = False, attn_implementation: str | None = None,
         flag: str = "--model") -> tuple[nn.Module, Tokenizer]:
    """(model, tokenizer) from a local folder, a name on the hub or "demo", on the CPU, in evaluation mode.

    dtype: "auto" (as stored) or the name of a torch dtype. revision, cache_dir, trust_remote_code, attn_implementation:
    as for transformers' `from_pretrained`. Only safetensors weights are read.

    Raises ValueError naming `flag` when the model cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = DEMO if str(name) == "demo" else Path(name)
    local, said = path.is_dir(), f"{flag} {name}".strip()
    if local:
        check_folder(path, said)
    elif str(name).count("/") > 1 or str(name).startswith((".", "/", "~")) or path.exists():
        raise ValueError(f"{said}: no such folder")
    options = {"revision": revision, "cache_dir": cache_dir, "trust_remote_code": trust_remote_code}
    source = str(path) if local else str(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, attn_implementation=attn_implementation,
            output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        first_line = str(error).strip().split("\n")[0]
        where = "" if local else "no such folder here, and as a hub name it "
        raise ValueError(f"{said}: {where}cannot be loaded ({first_line})") from error
    if info["missing_keys"]:  # transformers would initialise them at random
        missing = sorted(info["missing_keys"])
        raise ValueError(f"{said}: its files lack {len(missing)} tensors, such as {missing[0]}; fetch it again")
    return model.eval().requires_grad_(False), tokenizer


def quiet() -> None:
    """Turn off transformers' progress bars and log messages; what matters in them is an error or a warning of oneshot.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def check_folder(path: Path, said: str) -> None:
    """Raise ValueError, its message beginning with `said`, unless `path` holds a config and safetensors weights."""
    if not (path / "config.json").is_file():
        raise ValueError(f"{said}: no config.json in this folder, so it is no Hugging Face model")
    if not any(path.glob("*.safetensors")):
        pickles = any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth"))
        raise ValueError(f"{said}: " + (
            "its weights are pickle files, which can run code when loaded; save it as safetensors first"
            if pickles else "no safetensors weights in this folder"))


def fingerprint(model: nn.Module) -> str:
    """sha256 (hex) over every parameter's name, dtype, shape and bytes: identifies the weights a run starts from."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        digest.update(f"{name} {p.dtype} {tuple(p.shape)}".encode())
        digest.update(p.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy())
    return digest.hexdigest()
