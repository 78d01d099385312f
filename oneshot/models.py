"""Models: load one, find its blocks, see every prunable weight as an (R, C) matrix, bring a part of it to the device.

    block   one transformer layer
    view    one linear's weight, whatever way the model stores it: nn.Linear (R, C), transformers' Conv1D (C, R), or one
            expert's slice of a fused 3-D parameter (E, R, C) or (E, C, R)

Everything is found generically; what is peculiar to a family stands in the tables below and nowhere else.
"""

import contextlib
import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.pytorch_utils import Conv1D

DEMO = Path(__file__).parent / "demo" / "model"
LEFT_ALONE = {  # one of the last two parts of a linear's name: why it is never pruned
    "gate": "router", "router": "router", "shared_expert_gate": "router", "classifier": "router",
    "altup": "mixing coefficients",  # Gemma-3n: 16x4 at most, they weigh whole copies of the hidden state
}
ATTENTION = ("attn", "attention", "mamba")  # one is in the name of the block's child that mixes tokens
EXPERTS_IMPLEMENTATION = "oneshot_one_by_one"


def load(name, *, dtype="auto", revision=None, cache_dir=None, trust_remote_code=False, attn_implementation=None,
         flag="--model"):
    """(model, tokenizer) of a local folder, a hub name or "demo", on the CPU, weights in `dtype` ("auto": as stored).

    Only safetensors are read. Raises ValueError naming `flag` when there is nothing loadable.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = DEMO if str(name) == "demo" else Path(name)
    local, said = path.is_dir(), f"{flag} {name}".strip()
    if local:
        check_folder(path, said)
    elif str(name).count("/") > 1 or str(name).startswith((".", "/", "~")) or path.exists():
        raise ValueError(f"{said}: no such folder")
    options = {"revision": revision, "cache_dir": cache_dir, "trust_remote_code": trust_remote_code}
    source = str(path) if local else str(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, attn_implementation=attn_implementation,
            output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        first_line = str(error).strip().split("\n")[0]
        where = "" if local else "no such folder here, and as a hub name it "
        raise ValueError(f"{said}: {where}cannot be loaded ({first_line})") from error
    if info["missing_keys"]:  # transformers would go on with random numbers
        missing = sorted(info["missing_keys"])
        raise ValueError(f"{said}: its files lack {len(missing)} tensors, such as {missing[0]}; fetch it again")
    return model.eval().requires_grad_(False), tokenizer


def quiet():
    """Keep transformers' bars and remarks off stderr: what matters in them is an error or a warning of ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def check_folder(path, said):
    """Raise ValueError unless `path` holds a config and safetensors weights."""
    if not (path / "config.json").is_file():
        raise ValueError(f"{said}: no config.json in this folder, so it is no Hugging Face model")
    if not any(path.glob("*.safetensors")):
        pickles = any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth"))
        raise ValueError(f"{said}: " + (
            "its weights are pickle files, which can run code when loaded; save it as safetensors first"
            if pickles else "no safetensors weights in this folder"))


def fingerprint(model):
    """sha256 of every parameter's name, dtype, shape and bytes: which weights a run started from."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        digest.update(f"{name} {p.dtype} {tuple(p.shape)}".encode())
        digest.update(p.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def config_of(model):
    """The text part of a model's configuration."""
    return model.config.get_text_config(decoder=True)


def max_positions(model):
    """Longest sequence the model was made for, or None when it does not say."""
    return getattr(config_of(model), "max_position_embeddings", None)


def decoder(model):
    """The part of the model that embeds and runs the blocks, without the output head."""
    inner = model.get_decoder() if hasattr(model, "get_decoder") else None
    if inner is None or inner is model or isinstance(inner, nn.Linear):  # ModernBERT calls its output head so
        inner = model.base_model
    return inner


def blocks(model):
    """(name of the list, ModuleList of the transformer blocks).

    Raises ValueError when no ModuleList has the configuration's number of layers.
    """
    n = config_of(model).num_hidden_layers
    inner = decoder(model)
    classes = set(getattr(model, "_no_split_modules", None) or ())
    lists = [(name, m) for name, m in model.named_modules()
             if isinstance(m, nn.ModuleList) and len(m) == n and any(m is part for part in inner.modules())]
    named = [(name, m) for name, m in lists if type(m[0]).__name__ in classes]
    if not lists:
        raise ValueError(f"--model: {type(model).__name__} has no list of {n} transformer blocks; "
                         "only decoder-only transformers models can be pruned")
    return (named or lists)[0]


@dataclass
class View:
    """One linear's weight as an (R, C) matrix, rows = outputs.

    name: within the block. kind: the linear's own name without the expert. owner: the module that is fed.
    expert: its index, or None. stored: dtype in which the weight will be saved.
    """

    name: str
    kind: str
    owner: nn.Module
    parameter: nn.Parameter
    expert: int | None
    transposed: bool
    stored: torch.dtype

    @property
    def shape(self):
        R, C = self.parameter.shape[-2:]
        return (C, R) if self.transposed else (R, C)

    def _slice(self):
        w = self.parameter.data if self.expert is None else self.parameter.data[self.expert]
        return w.T if self.transposed else w

    def get(self):
        """(R, C), float32 (float64 if the parameter is), not to be written to."""
        w = self._slice()
        return w if w.dtype == torch.float64 else w.float()

    def set(self, W):
        """Write W (R, C), rounded to the stored dtype; every zero becomes +0.0."""
        self._slice().copy_(W.to(self.stored).add_(0.0))


def linears(block):
    """(views, skipped): every prunable weight of a block, and [(parameter name, why it is left alone)].

    Call it while the block is at home (not `resident`): the stored dtype is read off the parameters.
    """
    views, skipped, reached = [], [], set()
    for name, module in block.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            parameter = f"{name}.weight"
            reached.add(parameter)
            if left_alone(name):
                skipped.append((parameter, left_alone(name)))
            elif not module.weight.is_floating_point() or module.weight.element_size() < 2:
                skipped.append((parameter, f"quantised weight ({module.weight.dtype})"))
            else:
                views.append(View(name, name, module, module.weight, None, isinstance(module, Conv1D),
                                  module.weight.dtype))
        elif is_experts(module):
            for part in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
                kind, parameter = f"{name}.{part}", getattr(module, part)
                reached.add(kind)
                views += [View(f"{kind}.{e}", kind, module, parameter, e, module.is_transposed, parameter.dtype)
                          for e in range(parameter.shape[0])]
    for name, p in block.named_parameters():
        if name not in reached and p.ndim >= 2:
            owner, _, last = name.rpartition(".")
            skipped.append((name, left_alone(owner) or ("bias" if "bias" in last else
                            f"no linear this program knows, shape {tuple(p.shape)}")))
    return views, skipped


def all_views(model):
    """(full name, view) of every prunable linear of a model at home."""
    name, block_list = blocks(model)
    for b, block in enumerate(block_list):
        for view in linears(block)[0]:
            yield f"{name}.{b}.{view.name}", view


def left_alone(name):
    """Why the linear of this name is never pruned, or None."""
    return next((LEFT_ALONE[part] for part in name.split(".")[-2:] if part in LEFT_ALONE), None)


def untouched(block):
    """Names of a block's parameters that neither pruning nor recovery changes: routers, and what it does not know."""
    routers = {name for name, _ in block.named_parameters() if left_alone(name.rpartition(".")[0])}
    return routers | {name for name, _ in linears(block)[1]}


def mlp(block):
    """The views of a block's linears behind its attention (or beside it): MLP, experts, per-layer inputs.

    Raises ValueError when attention and the rest cannot be told apart.
    """
    def attends(name):
        return any(word in name.partition(".")[0] for word in ATTENTION)

    views, skipped = linears(block)
    rest = [view for view in views if not attends(view.name)]
    unknown = [name for name, why in skipped if not attends(name) and why not in ("bias", *LEFT_ALONE.values())]
    if len(rest) in (0, len(views)) or unknown:
        found = f"{unknown[0]} is no linear this program knows" if unknown else \
            f"its linears are {', '.join(view.name for view in views) or 'none'}"
        raise ValueError(f"attention and MLP of {type(block).__name__} cannot be told apart: {found}")
    return rest


@contextlib.contextmanager
def silent(views):
    """The modules that hold these views give zeros, and compute nothing."""
    def zeros(x, *_, shape, **__):
        return x.new_zeros(*x.shape[:-1], shape[0])

    owners = {id(v.owner): (v.owner, v.shape) for v in views}  # of experts, the last one's: the way down
    try:
        for owner, shape in owners.values():
            owner.forward = functools.partial(zeros, shape=shape)
        yield
    finally:
        for owner, _ in owners.values():
            del owner.forward


def is_experts(module):
    """Whether a module holds fused experts behind transformers' experts interface."""
    return all(hasattr(module, a) for a in ("has_gate", "is_transposed", "is_concatenated", "down_proj")) and \
        isinstance(module.down_proj, nn.Parameter) and module.down_proj.ndim == 3


def outside(model, block_list):
    """[(parameter name, why)] of the matrices outside the blocks: they are never pruned."""
    inside = {id(p) for p in block_list.parameters()}
    embedding, head = (getattr(m, "weight", None) for m in (model.get_input_embeddings(),
                                                            model.get_output_embeddings()))
    def why(p):
        tied = p is embedding and p is head
        return "embedding, tied to the output head" if tied else "embedding" if p is embedding else \
            "output head" if p is head else "outside the transformer blocks"
    return [(name, why(p)) for name, p in model.named_parameters() if p.ndim >= 2 and id(p) not in inside]


def compute_dtype(device, stored):
    """float32 on a CPU (half precision is emulated or crippled there), else the stored dtype."""
    return torch.float32 if torch.device(device).type == "cpu" and stored != torch.float64 else stored


@contextlib.contextmanager
def resident(tensors, device, *, write_back=False, dtype=None):
    """Bring parameters and buffers to `device` in their compute dtype; at the end put them where and as they were.

    tensors: an iterable of parameters and buffers. write_back: parameters may have changed, carry them home. Buffers
    keep their dtype (rotary frequencies are float32 on purpose). Nothing is copied where nothing changes.
    """
    away = []
    try:
        for t in {id(t): t for t in tensors}.values():
            home = t.data
            weight = isinstance(t, nn.Parameter) and t.is_floating_point()
            there = home.to(device, (dtype or compute_dtype(device, t.dtype)) if weight else t.dtype)
            if there is not home:
                away.append((t, home, weight))
                t.data = there
        yield
    finally:
        for t, home, weight in away:
            if write_back and weight:
                home.copy_(t.data)
            t.data = home


def tensors_of(module):
    """Parameters and buffers of a module."""
    return [*module.parameters(), *module.buffers()]


def rest_of(module, block_list):
    """Parameters and buffers of `module` outside the blocks."""
    inside = {id(t) for t in tensors_of(block_list)}
    return [t for t in tensors_of(module) if id(t) not in inside]


@contextlib.contextmanager
def experts_one_by_one(model):
    """Run fused experts in a loop, so that each one's inputs can be seen; the model's own way is restored at the end.

    transformers runs them as one grouped product by default. `module.observe(kind, expert, x, rows)` is called with the
    inputs x of each expert's matrices and their row numbers among the layer's tokens, where the module has it.
    """
    if not any(is_experts(m) for m in model.modules()):
        yield
        return
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, _experts_forward)
    before = model.config._experts_implementation
    model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def _experts_forward(self, hidden_states, top_k_index, top_k_weights):
    """transformers' eager expert loop for every layout of the experts interface, with the inputs shown on the way."""
    up_name = "gate_up_proj" if self.has_gate else "up_proj"
    observe = getattr(self, "observe", None)

    def linear(name, e, x, rows):
        if observe:
            observe(name, e, x, rows)
        w = getattr(self, name)[e]
        y = x @ w if self.is_transposed else x @ w.T
        return y + getattr(self, f"{name}_bias")[e] if self.has_bias else y

    out = torch.zeros_like(hidden_states)
    for e in top_k_index.unique().tolist():
        if not 0 <= e < self.num_experts:  # expert parallelism marks absent experts so
            continue
        rows, slot = torch.where(top_k_index == e)
        y = linear(up_name, e, hidden_states[rows], rows)
        y = self._apply_gate(y) if self.has_gate else self.act_fn(y)
        y = linear("down_proj", e, y, rows) * top_k_weights[rows, slot, None]
        if getattr(self, "has_post_expert_norm", False):
            raise ValueError(f"{type(self).__name__}: experts with a norm behind them are not supported")
        out.index_add_(0, rows, y.to(out.dtype))
    return out
