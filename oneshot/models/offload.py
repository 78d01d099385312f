"""Offload: a model larger than memory. Its blocks stay on disk; `walk` reads one at a time and drops it again.

Such a model is a skeleton: the tensors of its blocks are on the meta device, which knows names, shapes and dtypes and
has no values. What lies outside the blocks (embeddings, last norm, head) is in memory. transformers' own conversion is
applied to the tensors of one block at a time, so whatever it renames, fuses or casts while loading is the same here.

    on disk    the tensors of a block lie in safetensors files: the input's, or the one that holds the pruned block
    present    the block's tensors are in memory, in their stored dtype; never those of two blocks at once

A block that was changed goes into a file of its own, under the names that `save_pretrained` gives: the file can be a
shard of the checkpoint as it is.

Of several processes (torchrun), each reads the block that it runs its windows on; only rank 0 writes, and the others
read its files from then on. What they read is compared with what rank 0 has, which gives them what differs: so a
machine that does not see rank 0's files works as well.
"""

import contextlib
import copy
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..runtime import distributed, together

OFFLOAD = ("none", "disk")
State = dict[str, torch.Tensor]


class OnDisk:
    """Where the tensors of a model's blocks are on disk, and which block is present.

    model: loaded with all tensors on the meta device. path: the full name of its list of blocks. files: the
    checkpoint's safetensors files. said: the start of error messages.

    Everything outside the blocks is read at once. held: the number of the block that is present, or None. reads: how
    often a block has been read.
    """

    def __init__(self, model: nn.Module, path: str, files: Iterable[Path], said: str) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        self._model, self.path, self.said = weakref.ref(model), path, said
        self._mapping = get_model_conversion_mapping(model)
        self._files: dict[int | None, dict[str, Path]] = {}  # {block: {tensor's name in a file: the file}}
        self._twins: list[tuple[torch.Tensor, torch.Tensor]] = []  # what is present, and its place on the meta device
        self._pinned = self._filed = False
        self._spill: tempfile.TemporaryDirectory | None = None
        self.held: int | None = None
        self.reads = 0
        state = model.state_dict()
        for file in files:
            with safe_open(file, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    self._files.setdefault(self.block_of(self._named(key, state)), {})[key] = file
        fill_buffers(model)
        for p, t in self._read(None, self._tensors(None)):
            become(p, t)
        model.tie_weights(missing_keys=set(), recompute_mapping=False)  # a file may hold both of a tied pair
        _ON_DISK[model] = self

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self._model()

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return len(self.model.get_submodule(self.path))

    def _named(self, key: str, state: State) -> str:
        """The name in the model of a tensor's name in a file, as transformers finds it; see `_read`."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        name, _ = rename_source_key(key, renamings, converters, self.model.base_model_prefix, state)
        if name not in state and key in state:
            name, _ = rename_source_key(key, [], [], self.model.base_model_prefix, state)
        return name

    def block_of(self, name: str) -> int | None:
        """The number of the block that a tensor of the model belongs to; None outside the blocks."""
        number = name.removeprefix(f"{self.path}.").partition(".")[0] if name.startswith(f"{self.path}.") else ""
        return int(number) if number.isdecimal() else None

    def _tensors(self, number: int | None) -> dict[str, torch.Tensor]:
        """{full name: tensor} of what has no values now, of one block or of all that is outside the blocks."""
        model = self.model
        names = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        return {name: t for name, t in names if t.is_meta and self.block_of(name) == number}

    def _read(self, number: int | None, wanted: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """[(tensor of the model, its values)] from the files; each once."""
        own = self._files.get(number, {})
        with contextlib.ExitStack() as stack:
            try:
                opened = {file: stack.enter_context(safe_open(file, "pt")) for file in dict.fromkeys(own.values())}
                slices = {key: opened[file].get_slice(key) for key, file in own.items()}
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{self.said}: {error}; its files must not change during a run") from None
            return self._converted(slices, wanted)

    def _converted(self, state: dict[str, Any],
                   wanted: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """[(tensor of the model, its values)] of what transformers makes of a part of a checkpoint.

        state: {name in the checkpoint: tensor or safetensors slice}. transformers puts new tensors into the modules;
        those that were there go back.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        model, conversions = self.model, self.model._weight_conversions
        places = {name: place(model, name) for name in wanted}
        try:
            info, _ = convert_and_load_state_dict_in_model(model, state, LoadStateDictConfig(
                weight_mapping=copy.deepcopy(self._mapping)))
            found = {name: own[last] for name, (own, last) in places.items()}
        finally:
            model._weight_conversions = conversions
            for name, (own, last) in places.items():
                own[last] = wanted[name]
        if info.conversion_errors or info.mismatched_keys:
            key = next(iter([*info.conversion_errors, *(entry[0] for entry in info.mismatched_keys)]))
            raise ValueError(f"{self.said}: {key} cannot be read again as it was loaded; fetch it again")
        values = {}
        for name, t in wanted.items():
            if found[name] is not t:
                values.setdefault(id(t), (t, found[name].data))
        if lacking := [name for name, t in wanted.items() if id(t) not in values]:
            raise ValueError(f"{self.said}: {lacking[0]} is not in its files any more; they must not change during a "
                             "run")
        return list(values.values())

    @contextlib.contextmanager
    def present(self, number: int, changed: Callable[[], bool]) -> Iterator[None]:
        """Within the context, the tensors of a block are present. changed: whether they are to be kept, asked last.

        Processes that work together come here at the same time.
        """
        if self._pinned:
            raise RuntimeError(f"block {number} was asked for while block {self.held} is present")
        self._fill(number)
        self._pinned, self._filed = True, False
        try:
            if distributed.ranks() > 1:
                together.same_weights(self.model.get_submodule(f"{self.path}.{number}"))
            yield
            if changed():
                self._keep(number)
        finally:
            self._pinned = False
            self.drop()

    def fetch(self, number: int, to_write: bool = False) -> None:
        """Let a block be present until another one is asked for, for reading; nothing where it is resident.

        Raises RuntimeError where it is to be changed: only within `walk` is that kept.
        """
        if self._pinned and self.held == number:
            return
        if to_write or self._pinned:
            raise RuntimeError(f"block {number} of a model on disk is looked at alone, and changed only within walk")
        self._fill(number)

    def _fill(self, number: int) -> None:
        """Read a block, unless it is present, after dropping the one that is."""
        if self.held == number:
            return
        self.drop()
        self.held, self.reads = number, self.reads + 1
        for p, t in self._read(number, self._tensors(number)):
            self._twins.append((p, become(p, t)))

    def drop(self) -> None:
        """Drop the tensors of the block that is present."""
        if self.held is None:
            return
        for p, twin in self._twins:
            become(p, twin.data)
        self._twins.clear()
        self.held = None

    def _keep(self, number: int) -> None:
        """Let the block that is present be read, from now on, from a file that holds it as it is now."""
        if not self._filed and (distributed.ranks() == 1 or not distributed.rank()):
            self._file(number)
        files = distributed.first(self._files.get(number, {}))
        if visible(files):  # else they are another machine's, and rank 0 gives what differs
            self._files[number] = files

    def _file(self, number: int) -> None:
        """Write the block that is present into a file of its own, for a run that saves nothing."""
        self._spill = self._spill or tempfile.TemporaryDirectory(prefix="oneshot-offload-")
        file = Path(self._spill.name) / f"block_{number:05d}.safetensors"
        state = self.model.get_submodule(f"{self.path}.{number}").state_dict()
        part = file.with_suffix(".part")
        save_file({name: t.contiguous() for name, t in self.named(number, state).items()}, part)
        part.replace(file)
        self.moved(number, file)

    def moved(self, number: int, file: Path) -> None:
        """From now on, a block is read from this file, which holds what `named` gave."""
        with safe_open(file, "pt") as opened:
            self._files[number] = dict.fromkeys(opened.keys(), file)
        self._filed = True

    def named(self, number: int, state: State) -> State:
        """The state dict of a block under the names, and in the shapes, that `save_pretrained` gives its tensors."""
        from transformers.core_model_loading import revert_weight_conversion

        left_out = {*(getattr(self.model, "all_tied_weights_keys", None) or {}),
                    *(getattr(self.model, "_keys_to_ignore_on_save", None) or ())}
        full = {f"{self.path}.{number}.{name}": t for name, t in state.items()}
        return revert_weight_conversion(self.model, {name: t for name, t in full.items() if name not in left_out})

    def local(self, number: int, state: State) -> State:
        """The inverse of `named`: the state dict of a block from what its file holds."""
        prefix, module = f"{self.path}.{number}.", self.model.get_submodule(f"{self.path}.{number}")
        wanted = {f"{prefix}{name}": t for name, t in module.state_dict(keep_vars=True).items()}
        names = {id(t): name.removeprefix(prefix) for name, t in wanted.items()}
        return {names[id(p)]: t for p, t in self._converted(state, wanted)}


_ON_DISK: weakref.WeakKeyDictionary[nn.Module, OnDisk] = weakref.WeakKeyDictionary()


def on_disk(model: nn.Module) -> OnDisk | None:
    """Where the blocks of a model are on disk; None for a model that is in memory."""
    return _ON_DISK.get(model)


def visible(files: dict[str, Path]) -> bool:
    """Whether this machine sees these files, {name of a tensor: its file}, and they hold tensors of these names."""
    there: set[str] = set()
    try:
        for file in set(files.values()):
            with safe_open(file, "pt") as opened:
                there.update(opened.keys())
    except (OSError, SafetensorError):
        return False
    return files.keys() <= there


def become(t: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Give a tensor other values, on whatever device they are; it stays the same object.

    Returns a tensor with what it had before.
    """
    twin = nn.Parameter(values, requires_grad=False) if isinstance(t, nn.Parameter) else values
    twin.__dict__.update(t.__dict__)
    torch.utils.swap_tensors(t, twin)
    return twin


def place(model: nn.Module, name: str) -> tuple[dict[str, torch.Tensor | None], str]:
    """(the dict of a module that holds a parameter or buffer, its name there)."""
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    return (module._buffers if last in module._buffers else module._parameters), last


def fill_buffers(model: nn.Module) -> None:
    """Compute the buffers that no checkpoint holds, such as rotary frequencies, from the config, in memory."""
    for name, buffer in list(model.named_non_persistent_buffers()):
        own, last = place(model, name)
        own[last] = torch.empty_like(buffer, device="cpu")
        model.get_submodule(name.rpartition(".")[0])._is_hf_initialized = False
    model.initialize_weights()
