"""Train the embedded demo model: a small Llama of real English (`oneshot prune --model demo`).

    python scripts/demo/train_model.py --data ../shared/data/textbooks ../shared/data/books_public_domain.txt.xz

Reads plain text (`.txt`, `.txt.xz`), trains a byte-level BPE tokenizer on it, then the model: Muon on the matrices,
AdamW on embeddings and norms, linear warm-up and linear decay to zero. Every `--checkpoint-every` steps the whole
state is saved under `--work`; the same command continues from there. The order of the windows depends on seed and
step alone, so a resumed run sees what an uninterrupted one would have seen.

Writes `--out`: bfloat16 safetensors, tokenizer, config, and `training.json` with what was done.
"""

import argparse
import json
import lzma
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from oneshot.runtime.command import Parser, exit_code

HELD_OUT = 0.005  # tail of every file: never trained on, for the loss printed at each checkpoint


def main(argv: list[str] | None = None) -> int:
    """Exit code."""
    return exit_code(lambda: work(parse_args(argv)), interrupted=lambda: "the same command continues")


def work(args: argparse.Namespace) -> None:
    """Tokenise, train, save."""
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    files = list_files(args.data)
    tokenizer, train, held_out = tokens_of(files, args)
    model = LlamaForCausalLM(llama_config(args)).to(args.device)
    n = sum(p.numel() for p in model.parameters())
    print(f"{n / 1e6:.2f}M parameters, {train.size / 1e6:.1f}M training tokens, "
          f"{args.steps} steps x {args.batch_size} x {args.seqlen} tokens")
    loss, seconds, schedules = fit(model, train, held_out, args)
    save(model, tokenizer, files, args, {
        "parameters": n, "train_tokens": int(train.size), "held_out_loss": loss, "seconds": round(seconds),
        "schedules": schedules})


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    p = Parser(prog="python scripts/demo/train_model.py", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", nargs="+", type=Path, required=True, help="text files (.txt, .txt.xz) or folders of them")
    p.add_argument("--out", type=Path, default=Path("oneshot/demo/model"))
    p.add_argument("--work", type=Path, default=Path("build/demo_training"), help="tokens and checkpoints")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--vocab", type=int, default=2048)
    p.add_argument("--hidden", type=int, default=192)
    p.add_argument("--intermediate", type=int, default=512)
    p.add_argument("--layers", type=int, default=5)
    p.add_argument("--heads", type=int, default=6)
    p.add_argument("--kv-heads", type=int, default=3)
    p.add_argument("--seqlen", type=int, default=256)
    p.add_argument("--batch-size", type=int, default=24, help="windows per step")
    p.add_argument("--steps", type=int, default=2400)
    p.add_argument("--warmup", type=int, default=100)
    p.add_argument("--muon-lr", type=float, default=0.02)
    p.add_argument("--adam-lr", type=float, default=0.003)
    p.add_argument("--weight-decay", type=float, default=0.05, help="on the matrices")
    p.add_argument("--checkpoint-every", type=int, default=250)
    return p.parse_args(argv)


def list_files(paths: Sequence[Path]) -> list[Path]:
    """Every .txt and .txt.xz under `paths`, sorted by name (the order decides the tokens).

    Raises ValueError naming what is missing.
    """
    files = []
    for path in paths:
        files += sorted(path.glob("*.txt*")) if path.is_dir() else [path]
    missing = [str(f) for f in files if not f.is_file()]
    if missing or not files:
        raise ValueError(f"--data: no such text file: {', '.join(missing) or ', '.join(map(str, paths))}")
    return files


def read(path: Path) -> str:
    """A file's text."""
    return lzma.open(path, "rt", encoding="utf-8").read() if path.suffix == ".xz" else path.read_text(encoding="utf-8")


def tokens_of(files: Sequence[Path],
              args: argparse.Namespace) -> tuple[PreTrainedTokenizerFast, np.ndarray, np.ndarray]:
    """Tokenizer and two uint16 token streams (train, held out); cached in --work."""
    cache, tok_path = args.work / "tokens.npz", args.work / "tokenizer.json"
    if not cache.exists():
        texts = [read(f) for f in files]
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        bpe.train_from_iterator(
            (paragraph for text in texts for paragraph in text.split("\n\n")),
            trainers.BpeTrainer(vocab_size=args.vocab, special_tokens=["<|endoftext|>"],
                                initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        bpe.save(str(tok_path))
        train, held_out = [], []
        for text in tqdm(texts, desc="tokenise"):
            pieces = [text[i : i + 100_000] for i in range(0, len(text), 100_000)]
            ids = np.concatenate([np.array(e.ids, np.uint16) for e in bpe.encode_batch(pieces)])
            cut = int(ids.size * (1 - HELD_OUT))
            train += [ids[:cut], np.zeros(1, np.uint16)]  # token 0 ends a document
            held_out.append(ids[cut:])
        np.savez(cache, train=np.concatenate(train), held_out=np.concatenate(held_out))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tok_path), eos_token="<|endoftext|>",
                                        bos_token="<|endoftext|>", model_max_length=args.seqlen,
                                        clean_up_tokenization_spaces=False)
    with np.load(cache) as streams:
        return tokenizer, streams["train"], streams["held_out"]


def llama_config(args: argparse.Namespace) -> LlamaConfig:
    """The model's shape."""
    return LlamaConfig(
        vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=args.intermediate,
        num_hidden_layers=args.layers, num_attention_heads=args.heads, num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.seqlen, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
        rms_norm_eps=1e-5)


def optimizers(model: LlamaForCausalLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=args.weight_decay),
            torch.optim.AdamW(rest, lr=args.adam_lr, weight_decay=0.0, betas=(0.9, 0.95))]


def schedule(step: int, args: argparse.Namespace) -> float:
    """Share of the learning rate at a step: up over the warm-up, then down to zero."""
    return min((step + 1) / args.warmup, 1.0) * (1 - step / args.steps)


def windows(tokens: np.ndarray, starts: Sequence[int], seqlen: int, device: str) -> torch.Tensor:
    """(n, seqlen) tokens from each of n places on."""
    return torch.from_numpy(np.stack([tokens[s : s + seqlen] for s in starts]).astype(np.int64)).to(device)


def fit(model: LlamaForCausalLM, train: np.ndarray, held_out: np.ndarray,
        args: argparse.Namespace) -> tuple[float, float, list[list[int]]]:
    """Train to --steps, from the last checkpoint if there is one; (held-out loss, seconds in all, schedules)."""
    opts = optimizers(model, args)
    base = [[g["lr"] for g in o.param_groups] for o in opts]
    checkpoint, step, before = args.work / "checkpoint.pt", 0, 0.0
    schedules = [[0, args.steps]]  # [from step, --steps]: more than one when a run was continued with another --steps
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=args.device, weights_only=True)
        model.load_state_dict(state["model"])
        for o, s in zip(opts, state["optimizers"], strict=True):
            o.load_state_dict(s)
        step, before, schedules = state["step"], state["seconds"], state.get("schedules", schedules)
        if schedules[-1][1] != args.steps:
            schedules.append([step, args.steps])
    began, bar = time.time(), tqdm(total=args.steps, initial=step, desc="train", mininterval=10)
    loss = float("nan")
    while step < args.steps:
        rng = np.random.default_rng((args.seed, step))
        ids = windows(train, rng.integers(0, train.size - args.seqlen, args.batch_size), args.seqlen, args.device)
        with torch.autocast("cuda", torch.bfloat16, enabled=args.device == "cuda"):  # slower than float32 on CPU
            loss_now = model(input_ids=ids, labels=ids).loss
        loss_now.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o, lrs in zip(opts, base, strict=True):
            for group, lr in zip(o.param_groups, lrs, strict=True):
                group["lr"] = lr * schedule(step, args)
            o.step()
            o.zero_grad()
        step += 1
        bar.update()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss_now.item():.3f}")
        if step % args.checkpoint_every == 0 or step == args.steps:
            loss = held_out_loss(model, held_out, args)
            bar.write(f"step {step}: train {loss_now.item():.4f}, held out {loss:.4f}")
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in opts],
                     "step": step, "seconds": before + time.time() - began, "schedules": schedules}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
    if step and loss != loss:  # resumed a finished run
        loss = held_out_loss(model, held_out, args)
    return loss, before + time.time() - began, schedules


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokens: np.ndarray, args: argparse.Namespace) -> float:
    """Mean loss over up to 200 windows, nats a token."""
    starts = range(0, min(tokens.size - args.seqlen, 200 * args.seqlen), args.seqlen)
    ids = windows(tokens, starts, args.seqlen, args.device)
    return float(np.mean([model(input_ids=b, labels=b).loss.item() for b in ids.split(20)]))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, files: Sequence[Path], args: argparse.Namespace,
         facts: dict) -> None:
    """Write model, tokenizer and what was done. facts: go into training.json."""
    model.generation_config.update(bos_token_id=0, eos_token_id=0)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("out", "work")}
    settings["data"] = [f.name for f in files]
    record = {"settings": settings, **facts, "torch": torch.__version__}
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"saved {args.out} (held-out loss {facts['held_out_loss']:.4f})")


if __name__ == "__main__":
    sys.exit(main())
