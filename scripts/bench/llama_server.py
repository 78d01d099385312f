"""A real llama.cpp, as the package xllamacpp brings it, in a process of its own; everything is asked over HTTP.

The process is killed when it is no longer needed: in about one of a hundred starts or stops xllamacpp hangs.
"""

import contextlib
import json
import select
import subprocess
import sys
import urllib.request
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SERVE = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_parallel, params.n_gpu_layers = 512, 1, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[2])
params.warmup, params.verbosity = False, 0
params.fit_params, params.cache_prompt = False, False
params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, "GGML_TYPE_" + sys.argv[3])
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
print("at " + server.listening_address, flush=True)
sys.stdin.read()
"""
PATIENCE = 30  # seconds for a start


class Hung(Exception):
    """llama.cpp did not start or answer in time."""


@contextlib.contextmanager
def named(flag: str) -> Iterator[None]:
    """Within the context, what goes wrong with llama.cpp raises ValueError naming the flag that asked for it."""
    try:
        yield
    except (Hung, ChildProcessError) as error:
        raise ValueError(f"{flag}: {error}; start it again, or leave it out") from None


def ways_of(text: str, names: Sequence[str]) -> dict[tuple[str, str], Path]:
    """{(a name, what its rows are called): GGUF file} of `[NAME=]FILE`, by commas; NAME by default the first one.

    Raises ValueError naming `--gguf` for a file that is not there, or whose rows another's would replace.
    """
    found = {}
    for part in filter(None, text.split(",")):
        start, _, rest = part.partition("=")
        name, file = (start, Path(rest)) if rest and start in names else (names[0], Path(part))
        way = name, f"llama.cpp {'cut ' * (name == 'cut')}{file.absolute().parent.name}/{file.name}"
        if not file.is_file():
            raise ValueError(f"--gguf {part}: no such file; give [NAME=]FILE, NAME one of {', '.join(names)}")
        if way in found:
            raise ValueError(f"--gguf {part}: a file before it has the same folder's and file's name; rename one")
        found[way] = file
    return found


class Server:
    """A GGUF file that llama.cpp serves. threads: of its products. cache: type of keys and values, F32 or F16.

    Raises Hung where it does not start, ChildProcessError with the exit code (negative: a signal) where it refuses.
    """

    def __init__(self, file: str | Path, threads: int = 1, cache: str = "F32") -> None:
        process = subprocess.Popen([sys.executable, "-c", SERVE, str(file), str(threads), cache],
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.end = weakref.finalize(self, process.kill)
        while select.select([process.stdout], [], [], PATIENCE)[0] and (line := process.stdout.readline()):
            if line.startswith("at "):
                self.address = line.removeprefix("at ").strip()
                return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=2)
        code = process.returncode
        self.end()
        if code is not None:
            raise ChildProcessError(code, f"llama.cpp refuses {file}")
        raise Hung(f"llama.cpp hung when it was started with {file}")

    def ask(self, path: str, **body: Any) -> dict:
        """The answer of the server. Raises Hung after a minute without one."""
        request = urllib.request.Request(self.address + path, json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read())
        except TimeoutError:
            raise Hung("llama.cpp hung: no answer within a minute") from None

    def complete(self, ids: list[int], n: int, **options: Any) -> dict:
        """What llama.cpp says of the n tokens that follow, greedy; none of them ends the text."""
        return self.ask("/completion", prompt=ids, n_predict=n, temperature=0, return_tokens=True, cache_prompt=False,
                        ignore_eos=True, **options)
