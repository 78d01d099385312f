"""A real llama.cpp (scripts/bench/llama_server.py): one thread, float32 keys and values, nothing cached."""

import importlib.util
import signal

import pytest
import torch
from llama_server import Hung, Server


class LlamaCpp:
    """A model that llama.cpp runs; tests are skipped where there is none, or where it hangs."""

    def __init__(self, file):
        if importlib.util.find_spec("xllamacpp") is None:
            pytest.skip("needs a real llama.cpp: pip install xllamacpp")
        self.server = started(file) or started(file)
        if not self.server:
            pytest.skip("llama.cpp hung twice when it was started (it happens to xllamacpp)")

    def ask(self, path, **body):
        """The answer of the server."""
        try:
            return self.server.ask(path, **body)
        except Hung as why:
            pytest.skip(f"{why} (it happens to xllamacpp)")

    def tokens(self, text):
        """The ids of a text, with what the tokenizer adds."""
        return self.ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]

    def greedy(self, ids, n):
        """The n ids that follow; none of them ends the text."""
        try:
            return self.server.complete(ids, n)["tokens"]
        except Hung as why:
            pytest.skip(f"{why} (it happens to xllamacpp)")

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


def started(file):
    """A Server; None if it hangs. One that ends by itself has refused the file, which fails the test."""
    try:
        return Server(file)
    except Hung:
        return None
    except ChildProcessError as error:
        if error.errno == -signal.SIGILL:
            pytest.skip("xllamacpp is built for another processor")
        raise
