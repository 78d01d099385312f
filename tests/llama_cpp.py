"""A real llama.cpp, as the package xllamacpp brings it: one thread, float32 keys and values, nothing cached.

It runs in a process of its own, which is killed when it is no longer needed: in about one of a hundred starts or stops
xllamacpp hangs, which must not be the tests' end.
"""

import importlib.util
import json
import select
import subprocess
import sys
import urllib.request
import weakref

import pytest
import torch

SERVE = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_parallel, params.n_gpu_layers = 512, 1, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.warmup, params.verbosity = False, 0
params.fit_params, params.cache_prompt = False, False
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
print("at " + server.listening_address, flush=True)
sys.stdin.read()
"""


class LlamaCpp:
    """A model that llama.cpp runs. Everything is asked over the server's own interface."""

    def __init__(self, file):
        if importlib.util.find_spec("xllamacpp") is None:
            pytest.skip("needs a real llama.cpp: pip install xllamacpp")
        self.address = started(self, file) or started(self, file)
        assert self.address, "llama.cpp did not start twice"

    def ask(self, path, **body):
        """The answer of the server."""
        request = urllib.request.Request(self.address + path, json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def tokens(self, text):
        """The ids of a text, with what the tokenizer adds."""
        return self.ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]

    def greedy(self, ids, n):
        """The n ids that follow; none of them ends the text."""
        found = self.ask("/completion", prompt=ids, n_predict=n, temperature=0, return_tokens=True, cache_prompt=False,
                         ignore_eos=True)
        return found["tokens"]

    def log_probabilities(self, ids, vocabulary):
        """log p of every token after `ids`: (vocabulary,), float32.

        The server tells it with a token, but keeps back those that are no whole character: so it has to choose "a".
        """
        found = self.ask("/completion", prompt=ids, n_predict=1, temperature=0, n_probs=vocabulary, cache_prompt=False,
                         logit_bias=[["a", 1e4]])
        top = found["completion_probabilities"][0]["top_logprobs"]
        values = torch.full((vocabulary,), float("nan"))
        values[[entry["id"] for entry in top]] = torch.tensor([entry["logprob"] for entry in top])
        return values


def started(owner, file):
    """The address of a server that lives as long as `owner`; None if it does not say it within half a minute."""
    process = subprocess.Popen([sys.executable, "-c", SERVE, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True)
    weakref.finalize(owner, process.kill)
    while select.select([process.stdout], [], [], 30)[0] and (line := process.stdout.readline()):
        if line.startswith("at "):
            return line.removeprefix("at ").strip()
    process.kill()
    return None
