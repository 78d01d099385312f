"""The layers that a tuner measures, and the part of its command line that says which."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Shape:
    """A weight (rows, k) to tune for; with `swiglu`, gate and up stacked."""

    rows: int
    k: int
    swiglu: bool = False

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """The Shape written as "6144x4096" or "28672x4096:swiglu". Raises ValueError for anything else."""
        size, _, kind = text.strip().partition(":")
        rows, x, k = size.partition("x")
        if not (rows.isdigit() and x and k.isdigit()) or kind not in ("", "swiglu"):
            raise ValueError(f"a shape looks like 6144x4096 or 28672x4096:swiglu, not {text!r}")
        return cls(int(rows), int(k), kind == "swiglu")

    @property
    def outputs(self) -> int:
        """The number of outputs of the layer."""
        return self.rows // 2 if self.swiglu else self.rows


def model_shapes(config: dict, fused: bool = True) -> list[Shape]:
    """The layers of a Llama-like model, from its config.json: qkv, o, gate and up, down, or each of these by itself.

    Raises ValueError if the config lacks an entry.
    """
    try:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        intermediate = config["intermediate_size"]
    except KeyError as error:
        raise ValueError(f"config.json has no {error}; give the layers with --shapes instead") from error
    head = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    if not fused:
        sizes = [(heads * head, hidden), (kv_heads * head, hidden), (hidden, heads * head), (intermediate, hidden),
                 (hidden, intermediate)]
        return [Shape(*size) for size in dict.fromkeys(sizes)]
    qkv = Shape((heads + 2 * kv_heads) * head, hidden)
    return [
        qkv,
        Shape(hidden, heads * head),
        Shape(2 * intermediate, hidden, swiglu=True),
        Shape(hidden, intermediate),
    ]


def arguments(parser: argparse.ArgumentParser, tokens: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    """Add the flags of every tuner: --model or --shapes, --tokens, --dtype."""
    parser.add_argument("--model", type=Path, help="folder with a Hugging Face config.json")
    parser.add_argument("--shapes", help="comma-separated ROWSxK[:swiglu]")
    parser.add_argument("--tokens", default=",".join(map(str, tokens)), help="comma-separated numbers of tokens")
    parser.add_argument("--dtype", default=dtypes[0], choices=dtypes)


def chosen(parser: argparse.ArgumentParser, args: argparse.Namespace, fused: bool = True) -> list[Shape]:
    """The shapes that the command line names. Exits with a message unless it gives either --model or --shapes, and for
    shapes that are fused where these layers are not.
    """
    if bool(args.model) == bool(args.shapes):
        parser.error("give either --model or --shapes")
    if args.model:
        return model_shapes(json.loads((args.model / "config.json").read_text()), fused)
    shapes = [Shape.parse(text) for text in args.shapes.split(",")]
    if not fused and any(shape.swiglu for shape in shapes):
        parser.error(f"{args.dtype} layers are not fused: leave out :swiglu")
    return shapes
