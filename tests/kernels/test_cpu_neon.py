"""The NEON variant as it is shipped, cross-compiled and run by qemu, against float64; skipped where one is missing.

    apt install g++-aarch64-linux-gnu qemu-user
"""

import functools
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oneshot_kernels import pack, reference
from oneshot_kernels.cpu import build, column_loop, integers, layout
from oneshot_kernels.cpu.codes import emulate, round_groups, round_rows
from oneshot_kernels.cpu.linear import TYPES

CROSS, QEMU = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
SYSTEM = Path(CROSS or "/usr/bin/x").parents[1] / "aarch64-linux-gnu"  # its C library
pytestmark = pytest.mark.skipif(not CROSS, reason="NEON is not even compiled here: no cross compiler (apt install "
                                                  "g++-aarch64-linux-gnu)")
needs_qemu = pytest.mark.skipif(not QEMU or not (SYSTEM / "lib" / "ld-linux-aarch64.so.1").exists(),
                                reason="NEON is only compiled here, not run: needs qemu-aarch64 and the C library of "
                                       "aarch64 (apt install qemu-user)")
LANES = 4


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """library(name): the file of a library, compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONESHOT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield functools.cache(lambda name: build.build(name, build.VARIANTS["neon"].flags, using=CROSS))


@pytest.mark.parametrize("name", sorted(p.stem for p in build.HERE.glob("*.cpp")))
def test_aarch64_compiles(library, name):
    content = library(name).read_bytes()
    assert content[:4] == b"\x7fELF" and content[18:20] == b"\xb7\x00"  # EM_AARCH64


@pytest.fixture(scope="module")
def run(library, tmp_path_factory):
    """run(library, arrays, numbers, like): the C function's result, as a tensor like `like`."""
    folder = tmp_path_factory.mktemp("neon")

    def call(name, arrays, numbers, like):
        program, given, got = (folder / f"{name}{end}" for end in ("", ".in", ".out"))
        if not program.exists():
            subprocess.run([CROSS, "-std=c++17", f"-I{build.HERE}", f"-D{name.upper()}",
                            str(Path(__file__).with_name("neon_main.cpp")), str(library(name)), "-o", str(program)],
                           check=True)
        blobs = [b"" if a is None else a.contiguous().view(torch.uint8).numpy().tobytes() for a in arrays]
        given.write_bytes(struct.pack(f"<{1 + len(blobs)}q", len(blobs), *map(len, blobs)) + b"".join(blobs)
                          + struct.pack("<8q", *numbers, *[0] * (8 - len(numbers))))
        subprocess.run([QEMU, "-L", str(SYSTEM), str(program), str(given), str(got)], check=True)
        return torch.frombuffer(bytearray(got.read_bytes()), dtype=like.dtype).view(like.shape)
    return call


@needs_qemu
@pytest.mark.parametrize("dtype", list(TYPES))
def test_linear(run, dtype):
    g = torch.Generator().manual_seed(0)
    n, k, m = 23, 172, 15
    weight = reference.random_24(n, k, dtype, g)
    x, bias = torch.randn(m, k, generator=g).to(dtype), torch.randn(n, generator=g).to(dtype)
    truth = F.linear(x.double(), weight.double(), bias.double())
    plain = (F.linear(x, weight, bias) - truth).norm()
    for form in (layout.to_tiles(pack(weight), LANES), (layout.dense_tiles(weight, LANES), None)):
        y = run("linear", (x, *form, bias, torch.zeros(m, n, dtype=dtype)), (m, n, k, TYPES[dtype]),
                torch.empty(m, n, dtype=dtype))
        assert (y - truth).norm() <= 2 * plain


@needs_qemu
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("sparse", [True, False])
def test_integers(run, sparse, bits):
    g = torch.Generator().manual_seed(0)
    n, k, m = 23, 172, 15
    weight = reference.random_24(n, k, torch.float32, g)
    codes, scale = round_rows(weight) if bits == 8 else round_groups(weight)
    x, bias = torch.randn(m, k, generator=g), torch.randn(n, generator=g)
    made = integers.prepare(codes, scale, sparse=sparse, bits=bits, lanes=LANES)
    for plain in (False, True):
        given = (x, *made[:2], bias, torch.zeros(m, n))
        y = run("integers", given, (m, n, k, 0, bits, sparse, plain), torch.empty(m, n))
        assert reference.relative_error(y, emulate(x, codes, scale, bias, plain)) < 1e-6


@needs_qemu
@pytest.mark.parametrize("nm", [(2, 4), (3, 5), None])
def test_column_loop(run, nm):
    g = torch.Generator().manual_seed(0)
    b, R = 40, 37
    W, mask = torch.randn(b, R, generator=g), torch.rand(b, R, generator=g) < 0.5
    U = torch.randn(b, b, generator=g).triu_(1) / b**0.5 + torch.diag(torch.rand(b, generator=g) + 0.5)
    want = W.double()
    column_loop.reference(want, U.double(), mask.clone(), nm)
    got = run("column_loop", (W, U, mask), (b, R, *(nm or (0, 0))), W)
    assert reference.relative_error(got, want) < 1e-5


@needs_qemu
@pytest.mark.parametrize("dtype", list(TYPES))
def test_the_tokens_of_a_model(run, dtype):
    """Three tokens, through two blocks of dense rows."""
    g, eps, scaling = torch.Generator().manual_seed(0), 1e-5, 0.3

    def random(*shape):
        return (torch.randn(shape, generator=g) / shape[-1] ** 0.5).to(dtype)
    shapes = {"q": (80, 37), "k": (40, 37), "v": (40, 37), "o": (37, 80), "gate": (45, 37), "up": (45, 37),
              "down": (37, 45), "before": (37,), "after": (37,), "q_norm": (20,), "k_norm": (20,)}
    blocks = [{name: random(*shape) for name, shape in shapes.items()} for _ in range(2)]
    norm, head, x = random(37), random(51, 37), random(3, 37)
    angles = torch.randn(2, 3, 20, generator=g)
    logits = torch.full((3, 51), torch.nan, dtype=dtype)
    arrays = (*(t for block in blocks for t in block.values()), norm, head, *angles, x, logits)
    said, past = run("step", arrays, (37, 4, 2, 20, 45, TYPES[dtype], 3, 51), logits), [None, None]
    for t in range(3):
        want = reference.llama_token(x[t], blocks, past, tuple(angles[:, t]), heads=4, eps=eps, scaling=scaling)
        want = reference.rms_norm(want, norm.double(), eps) @ head.double().T
        assert reference.relative_error(said[t], want) < 8 * torch.finfo(dtype).eps
