"""A tiny random model with a tiny tokenizer in a folder, texts to prune and measure it on, and the program in-process.

The tokenizer knows every letter of ALPHABET as one token, so the number of tokens of a text is its length.
"""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from oneshot import checkpoint
from oneshot.pipeline import run
from oneshot.report import page

SPECIAL = ["<unk>", "<s>", "</s>"]
ALPHABET = "abcdefghijklmnopqrstuvwxyz .\n"
BLOCKS, POSITIONS, WINDOW = 3, 64, 16
SIZES = {  # hidden 32, MLP 48: 4:8 fits everywhere, 2:5 nowhere
    "llama": {"hidden_size": 32, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "num_key_value_heads": 2,
              "intermediate_size": 48, "max_position_embeddings": POSITIONS},
    "gpt2": {"n_embd": 32, "n_layer": BLOCKS, "n_head": 4, "n_positions": POSITIONS},
}


def tokenizer():
    """One token per letter."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *ALPHABET])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def save_model(folder, kind="llama", dtype=torch.float32, seed=0):
    """A random model of the family and its tokenizer, saved as anyone would; the folder."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, vocab_size=len(SPECIAL) + len(ALPHABET), bos_token_id=1, eos_token_id=2,
                                  **SIZES[kind])
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:  # larger than a fresh model's, so that pruning shows in the perplexity
                p.normal_(std=p.shape[-1] ** -0.5)
    model.to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_text(path, seed, n=1500):
    """Random words of `n` letters in all; the path."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 7))) for _ in range(n)]
    path.write_text(" ".join(words)[:n])
    return path


def make(folder):
    """model/, calibration.txt and evaluation.txt in the folder; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder / "model")
    save_text(folder / "calibration.txt", 1)
    save_text(folder / "evaluation.txt", 2)
    return folder


def flags(place, *more, **changed):
    """The command line of a small run on what `make` wrote; `changed` replaces a flag's value, None drops the flag."""
    given = {"model": place / "model", "method": "wanda", "pattern": "2:4", "calibration": place / "calibration.txt",
             "evaluate": place / "evaluation.txt", "nsamples": 8, "seqlen": WINDOW, "batch_size": 4,
             "results": place / "runs"} | changed
    more = (*more, "--trust-task-code") if "task_path" in changed else more
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in given.items() if value is not None]
    return [*(part for pair in pairs for part in pair), "--no-progress", *map(str, more)]


def main(*argv):
    """Exit code of the program, run in this process."""
    return run.main([str(arg) for arg in argv])


def said(stderr):
    """The lines of a command's stderr, but for the one that names the device."""
    return [line for line in stderr.splitlines() if not line.startswith("device: ")]


def python(*command):
    """A finished process: Python with one thread, offline, that finds the same modules as this one."""
    path = os.pathsep.join(filter(None, sys.path))
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=500,
                          env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})


def records(results):
    """The records in a results folder: {(method, pattern): record}."""
    found = [json.loads(file.read_text()) for file in sorted(results.glob("*.json"))]
    return {(r["settings"]["method"], r["settings"]["pattern"]): r for r in found}


def weights(folder):
    """All tensors of a checkpoint, in one file or several."""
    return {name: t for file in sorted(folder.glob("model*.safetensors")) for name, t in load_file(file).items()}


def change_weights(folder, change):
    """Rewrite a checkpoint's tensors: `change(tensors)` alters the dict in place."""
    tensors = weights(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def copy(folder, to):
    """A copy of a folder that a test may spoil."""
    return shutil.copytree(folder, to)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """model/, calibration.txt and evaluation.txt, made once for a file of tests."""
    return make(tmp_path_factory.mktemp("place"))


@contextlib.contextmanager
def no_pictures():
    """Within the context, pages have no pictures: drawing one takes longer than a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "_pictures", lambda records: [])
        yield


@pytest.fixture
def plain_pages():
    """See `no_pictures`; a fixture for more than one test enters that by itself."""
    with no_pictures():
        yield


@contextlib.contextmanager
def interrupted(after):
    """Within the context, a run is interrupted when it saves one more block than so many."""
    real, calls = checkpoint.Folder.save_block, []

    def save_block(folder, *args):
        calls.append(args[0])
        if len(calls) > after:
            raise KeyboardInterrupt
        return real(folder, *args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.Folder, "save_block", save_block)
        yield
