"""Uneven: models whose layers differ in width, or lack attention or MLP, which no ordinary config says.

    import oneshot                                                 # registers the format with transformers
    model = AutoModelForCausalLM.from_pretrained("llama-uneven")   # the family's class, some linears of other shapes

The config says which linears have which shape (`shapes`), and of which attentions or MLPs nothing is left but the
consumer with no columns (`gone`). Without `import oneshot`, transformers warns of an unknown quantisation method,
builds linears of the config's own shapes, finds tensors of other shapes and raises: it never runs with made-up weights.
The config holds names and numbers, never code.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .intake import UNEVEN

METHOD = UNEVEN
HINT = "run `import oneshot` before from_pretrained"
ATTENTION, MLP = "attention", "mlp"


class Gone(nn.Module):
    """Stands in place of an attention or MLP that was removed as a whole: its consumer without columns, so only a bias.

    attention: whether it takes the place of one, which returns (output, attention weights).
    """

    def __init__(self, name: str, rows: int, bias: bool, attention: bool, like: torch.Tensor) -> None:
        super().__init__()
        self.consumer, self.attention = name, attention
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is nothing to initialise
            made = nn.Linear(0, rows, bias, device="meta")
        made.weight = nn.Parameter(torch.empty(rows, 0, device=like.device, dtype=like.dtype), requires_grad=False)
        if bias:
            made.bias = nn.Parameter(torch.empty(rows, device=like.device, dtype=like.dtype), requires_grad=False)
        self.add_module(name, made)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor | tuple[torch.Tensor, None]:
        """The consumer's bias for every token, or zeros."""
        x = args[0] if args else kwargs["hidden_states"]
        out = self.get_submodule(self.consumer)(x[..., :0])
        return (out, None) if self.attention else out


@register_quantization_config(METHOD)
class UnevenConfig(QuantizationConfigMixin):
    """The `quantization_config` of an uneven checkpoint: {linear: its shape as stored}, {module: what it was}."""

    def __init__(self, shapes: Mapping[str, list[int]] | None = None, gone: Mapping[str, str] | None = None,
                 to_load: str = HINT, **kwargs: Any) -> None:
        self.quant_method = METHOD
        self.shapes, self.gone, self.to_load = dict(shapes or {}), dict(gone or {}), to_load
        if unknown := set(kwargs) - {"quant_method"}:
            raise ValueError(f"quantization_config of {METHOD}: unknown entries {', '.join(sorted(unknown))}")


@register_quantizer(METHOD)
class UnevenQuantizer(HfQuantizer):
    """Gives linears their own shapes before transformers loads the files into them."""

    requires_calibration = True  # in transformers' terms: a model of even shapes does not become uneven by loading

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        reshape(model, self.quantization_config.shapes, self.quantization_config.gone)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether the model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether the model can be compiled."""
        return True


def reshape(model: nn.Module, shapes: Mapping[str, list[int]], gone: Mapping[str, str]) -> nn.Module:
    """Give a model's linears other shapes, uninitialised, and take attentions and MLPs out, in place.

    shapes: {linear: shape of its weight as stored}. gone: {module's name: "attention" or "mlp", a colon, its consumer's
    name in it}.

    Raises ValueError for a name that the model does not have.
    """
    for name, what in gone.items():
        kind, _, consumer = str(what).partition(":")
        own = found(model, f"{name}.{consumer}")
        if kind not in (ATTENTION, MLP):
            raise ValueError(f"quantization_config: {name} was {kind}, neither {ATTENTION} nor {MLP}")
        rows = own.weight.shape[1] if isinstance(own, Conv1D) else own.weight.shape[0]
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, Gone(consumer, rows, own.bias is not None, kind == ATTENTION,
                                                        own.weight))
    for name, shape in shapes.items():
        own = found(model, name)
        if len(shape) != 2 or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise ValueError(f"quantization_config: {name} has no shape {shape}")
        own.weight = nn.Parameter(own.weight.new_empty(shape), requires_grad=False)
        outputs = shape[1] if isinstance(own, Conv1D) else shape[0]
        if isinstance(own, Conv1D):
            own.nx, own.nf = shape
        else:
            own.out_features, own.in_features = shape
        if own.bias is not None and len(own.bias) != outputs:
            own.bias = nn.Parameter(own.bias.new_empty(outputs), requires_grad=False)
    return model


def found(model: nn.Module, name: str) -> nn.Module:
    """The linear named `name`. Raises ValueError when the model has none."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear | Conv1D):
        raise ValueError(f"quantization_config names {name}, which is not a linear of {type(model).__name__}")
    return module


def mark(model: nn.Module, shapes: Mapping[str, list[int]], gone: Mapping[str, str]) -> None:
    """Say in the model's config what `reshape` did to it, so that `save_pretrained` writes an uneven checkpoint."""
    model.config.quantization_config = UnevenConfig(shapes, gone)
    model.hf_quantizer = UnevenQuantizer(model.config.quantization_config, pre_quantized=True)
