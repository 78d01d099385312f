"""`Sparse24Linear`: nn.Linear with a packed 2:4 weight.

    N, K   outputs, inputs        rows   rows of the weight: N, or 2N with SwiGLU (gate first, then up)

The weight exists once. Before `prepare`, `weight` and `metadata` are row-major (2-D), as in a checkpoint; then they are
in fragment order (4-D) on a GPU, in tiles (3-D) on a CPU where the compiled kernels run. Moving the module converts
them; `state_dict` is always row-major.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import dispatch, ops
from .cpu import layout, linear
from .gpu import prefill
from .gpu.fragment import from_fragments, to_fragments
from .reference import Packed, pack, unpack


class Sparse24Linear(nn.Module):
    """y = x Wᵀ + bias for a packed 2:4 W, on any device.

    State: `weight` (rows, K/2) floats, `metadata` (rows, ceil(K/8)) uint8, both as defined in reference.py; `bias`
    (rows,). With `swiglu` the weight has 2N rows and y = silu(gate) · up. There are no gradients: the kernels are for
    inference.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        swiglu: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """An uninitialised layer, to be loaded from a checkpoint.

        Raises ValueError if `in_features` is not divisible by 4.
        """
        super().__init__()
        if in_features % 4:
            raise ValueError(f"2:4 needs in_features divisible by 4, got {in_features}; keep this layer dense")
        self.in_features, self.out_features, self.swiglu = in_features, out_features, swiglu
        rows = self.rows
        values = torch.empty(rows, in_features // 2, device=device, dtype=dtype)
        self.weight = nn.Parameter(values, requires_grad=False)
        self.register_buffer("metadata", torch.zeros(rows, -(-in_features // 8), dtype=torch.uint8, device=device))
        self.register_buffer("prefill_copy", None, persistent=False)
        empty_bias = torch.empty(rows, device=device, dtype=dtype) if bias else None
        self.bias = None if empty_bias is None else nn.Parameter(empty_bias, requires_grad=False)

    @classmethod
    def from_packed(cls, values: torch.Tensor, metadata: torch.Tensor, bias: torch.Tensor | None = None, *,
                    swiglu: bool = False, prefill_copy: bool = False) -> "Sparse24Linear":
        """A layer of row-major packed tensors, prepared for their device.

        values: (rows, K/2). metadata: (rows, ceil(K/8)) uint8. bias: (rows,).
        """
        rows, k = values.shape[0], 2 * values.shape[1]
        layer = cls(
            k,
            rows // 2 if swiglu else rows,
            bias is not None,
            swiglu=swiglu,
            device="meta",
            dtype=values.dtype,
        )
        layer.weight = nn.Parameter(values.detach(), requires_grad=False)
        layer.metadata = metadata
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return layer.prepare(prefill_copy=prefill_copy)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, prefill_copy: bool = False) -> "Sparse24Linear":
        """Pack an nn.Linear with a 2:4 weight. Raises ValueError naming row and columns if it is not 2:4."""
        values, metadata, _ = pack(linear.weight)
        return cls.from_packed(values, metadata, linear.bias, prefill_copy=prefill_copy)

    def forward(
        self,
        x: torch.Tensor,
        *,
        residual: torch.Tensor | None = None,
        norm_gain: torch.Tensor | None = None,
        norm_eps: float = 0.0,
    ) -> torch.Tensor:
        """x (..., K) -> (..., N). norm_gain: (K,), applies an RMSNorm to x first. residual: (..., N), is added last."""
        options = (self.bias, residual, norm_gain, norm_eps, self.swiglu, self.prefill_copy)
        eager = self.weight.ndim == 3 and not torch.compiler.is_compiling()
        if eager and not (x.requires_grad and torch.is_grad_enabled()):  # as `ops.linear`, without torch's dispatcher:
            return ops.compute(x, self.weight, self.metadata, self.out_features, *options)  # 10 to 20 µs less a call
        return ops.linear(x, self.weight, self.metadata, self.out_features, *options)

    @property
    def rows(self) -> int:
        """The number of rows of the weight."""
        return self.out_features * self._row_blocks

    @property
    def packed(self) -> Packed:
        """The weight in the on-disk format, whatever its order in memory."""
        if self.weight.ndim == 2:
            return Packed(self.weight.data, self.metadata, (self.rows, self.in_features))
        if self.weight.ndim == 3:
            return layout.from_tiles(self.weight.data, self.metadata, self.rows, self.in_features)
        return from_fragments(self.weight.data, self.metadata, self.rows, self.in_features, self._row_blocks)

    def dense(self) -> torch.Tensor:
        """The weight as a dense (rows, K) matrix with its zeros."""
        return unpack(self.packed.values, self.packed.metadata)

    def prepare(self, *, prefill_copy: bool | None = None) -> "Sparse24Linear":
        """Put the weight in the order that its device needs; call it after loading. Idempotent; returns self.

        prefill_copy: True keeps a copy for cuSPARSELt (another 0.5625 of the dense bytes), False drops it, None changes
        nothing. Raises ValueError if cuSPARSELt cannot be used with this layer.
        """
        self._arrange(dispatch.dimensions(self.weight.dtype, self.weight.device))
        if prefill_copy:
            if reason := self.prefill_refuses():
                raise ValueError(f"prefill_copy=True cannot work here: {reason}")
            self.prefill_copy = prefill.compress(self.dense())
        elif prefill_copy is False:
            self.prefill_copy = None
        return self

    def _arrange(self, wanted: int) -> None:
        """Put the weight in another order: 2 row-major, 3 tiles, 4 fragments (the dimensions of `weight`)."""
        cast = self.weight.ndim == 3 and not layout.is_native(self.weight, linear.lanes())
        if self.weight.ndim == wanted and not cast:
            return
        tensors = packed = self.packed
        if wanted == 4:
            tensors = to_fragments(packed, self._row_blocks)
        elif wanted == 3:
            tensors = layout.to_tiles(packed, linear.lanes())
        self.weight, self.metadata = nn.Parameter(tensors[0], requires_grad=False), tensors[1]

    def prefill_refuses(self) -> str | None:
        """Why this layer cannot have a prefill copy on its device, or None if it can."""
        return prefill.sparselt_refuses(self.rows, self.in_features, self.weight.dtype, self.weight.device)

    def problem(self, tokens: int) -> dispatch.Problem:
        """The Problem that `dispatch.choose` decides on, for this many tokens."""
        has_copy = self.prefill_copy is not None
        at = (self.rows, self.in_features, self.weight.dtype, self.weight.device)
        return dispatch.Problem(tokens, *at, self.weight.ndim == 4, has_copy, self.swiglu,
                                *dispatch.on_cpu(self.weight))

    @property
    def _row_blocks(self) -> int:
        return 2 if self.swiglu else 1

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "Sparse24Linear":
        had_copy = self.prefill_copy is not None
        self.prefill_copy = None  # opaque bytes, which are rebuilt and never cast or moved
        if self.weight.ndim == 3:
            self._arrange(2)  # tiles depend on the dtype
        super()._apply(fn, recurse)
        if self.weight.is_meta:
            return self
        return self.prepare(prefill_copy=had_copy and self.prefill_refuses() is None)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"], destination[prefix + "metadata"] = self.packed[:2]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        was_prepared = self.weight.ndim != 2
        self._arrange(2)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if was_prepared:
            self.prepare(prefill_copy=True if self.prefill_copy is not None else None)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        order = {2: "row-major", 3: "tiles", 4: "fragments"}[self.weight.ndim]
        swiglu = ", swiglu" if self.swiglu else ""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}{swiglu}, 2:4 {order}"
