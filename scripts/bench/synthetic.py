"""A Llama of any size with random weights, written shard by shard: making it takes the memory of one shard.

    python scripts/bench/synthetic.py build/llama-3b --size 3b

It has the built-in model's tokenizer, of which a larger vocabulary leaves most tokens unused. What it says is noise;
what pruning it costs is what pruning a trained one costs.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig

from oneshot import models
from oneshot.models.intake import INDEX
from oneshot.runtime.command import Parser, exit_code
from oneshot.runtime.files import write_json

SIZES = {  # Llama 3.2's 1B and 3B, 2's 7B, 3.1's 70B; the first two with Llama 2's vocabulary
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 4096},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 32000},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
           "num_key_value_heads": 8, "vocab_size": 32000},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32000},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8, "vocab_size": 128256},
}
SHARD = 5 * 10**8  # bytes


def config(size: str) -> LlamaConfig:
    """The config of a Llama of one of SIZES."""
    return LlamaConfig(**SIZES[size], max_position_embeddings=4096, tie_word_embeddings=False, dtype="bfloat16",
                       bos_token_id=0, eos_token_id=0, architectures=["LlamaForCausalLM"])


def shapes(c: LlamaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor, in order."""
    H, I, kv = c.hidden_size, c.intermediate_size, c.num_key_value_heads * c.head_dim
    yield "model.embed_tokens.weight", (c.vocab_size, H)
    for n in range(c.num_hidden_layers):
        own = {"self_attn.q_proj": (H, H), "self_attn.k_proj": (kv, H), "self_attn.v_proj": (kv, H),
               "self_attn.o_proj": (H, H), "mlp.gate_proj": (I, H), "mlp.up_proj": (I, H), "mlp.down_proj": (H, I),
               "input_layernorm": (H,), "post_attention_layernorm": (H,)}
        yield from ((f"model.layers.{n}.{name}.weight", shape) for name, shape in own.items())
    yield "model.norm.weight", (H,)
    yield "lm_head.weight", (c.vocab_size, H)


def make(folder: Path, size: str, shard: int = SHARD) -> Path:
    """Write the model and its tokenizer; returns the folder. Whatever is there is written again.

    shard: bytes of a file, beyond which the next one begins; a block may lie in two.
    """
    folder.mkdir(parents=True, exist_ok=True)
    c, generator = config(size), torch.Generator().manual_seed(0)
    parts, room = [[]], shard
    for name, shape in shapes(c):
        room -= 2 * torch.Size(shape).numel()
        if room < 0 and parts[-1]:
            parts.append([])
            room = shard
        parts[-1].append((name, shape))
    where = {}
    for number, part in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        save_file({name: values(shape, generator) for name, shape in part}, folder / file, metadata={"format": "pt"})
        where |= {name: file for name, _ in part}
    total = sum(2 * torch.Size(shape).numel() for _, shape in shapes(c))
    write_json({"metadata": {"total_size": total}, "weight_map": where}, folder / INDEX)
    AutoTokenizer.from_pretrained(models.DEMO).save_pretrained(folder)
    c.save_pretrained(folder)
    return folder


def values(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """bfloat16: ones for a norm, else normal numbers that keep the size of what they are applied to."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=shape[1] ** -0.5, generator=generator)


def is_made(folder: Path, size: str) -> bool:
    """Whether a folder holds the whole model of that size: the config is written last."""
    file = folder / "config.json"
    return file.is_file() and json.loads(file.read_text()).items() >= SIZES[size].items()


def main(argv: list[str] | None = None) -> int:
    """Exit code."""
    p = Parser(prog="python scripts/bench/synthetic.py", description=__doc__,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path, help="where to write it")
    p.add_argument("--size", choices=SIZES, default="3b", help="which Llama (default: %(default)s)")
    args = p.parse_args(argv)
    return exit_code(lambda: print(make(args.folder, args.size)))


if __name__ == "__main__":
    raise SystemExit(main())
