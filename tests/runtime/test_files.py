"""Files: what says that one cannot be written becomes one line, and nothing else does."""

import errno
import resource

import pytest
import torch
from safetensors.torch import save_file

from oneshot.runtime.distributed import Lost
from oneshot.runtime.files import writing


def too_large(write, most):
    """What `write` raises where no file may have more than so many bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        with writing("--save", "there"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("most", [0, 100, 5000, 39_900, 40_040])
@pytest.mark.parametrize("name", ["plain", "torch", "torch, many", "safetensors"])
def test_a_full_disk_is_one_line(name, most, tmp_path):
    t, many = torch.zeros(10_000), [torch.zeros(10) for _ in range(500)]
    writes = {"plain": lambda: (tmp_path / "x").write_bytes(bytes(50_000)),
              "torch": lambda: torch.save(t, tmp_path / "x"),
              "torch, many": lambda: torch.save(many, tmp_path / "x"),
              "safetensors": lambda: save_file({"t": t}, tmp_path / "x")}
    with pytest.raises(ValueError, match=r"^--save there: cannot be written \(.*; give the command again once it can"):
        too_large(writes[name], most)


@pytest.mark.parametrize("error", [Lost("another process has ended"), RuntimeError("a size that does not fit"),
                                   KeyError("name"), ValueError("--model: is empty")], ids=repr)
def test_what_has_another_cause_is_left_as_it_is(error):
    with pytest.raises(type(error)) as raised, writing("--save", "there"):
        raise error
    assert raised.value is error


def test_what_cannot_be_read_by_torch_is_not_said_to_be_unwritable(tmp_path):
    torch.save([torch.zeros(500)], tmp_path / "x")
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:1500])
    with pytest.raises(RuntimeError, match="PytorchStreamReader"), writing("--save", "there"):
        torch.load(tmp_path / "x")


def test_a_disk_without_room_names_the_reason():
    with pytest.raises(ValueError, match=r"^--save there: cannot be written .No space left on device"), \
            writing("--save", "there"):
        raise OSError(errno.ENOSPC, "No space left on device")
