"""The plain model, run as transformers runs it, with hooks: what the tests compare with."""

import families
import jobs
import torch
from families import T
from torch import nn
from transformers.pytorch_utils import Conv1D

from oneshot import models

FAMILIES = [n for n in families.FAMILIES if n not in families.REFUSED]
B = 2  # windows a batch; five windows make three batches, the last one short
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def tokens(n=5):
    return jobs.tokens(n, seed=1)


def padding(n=5):
    """bool (n, T): batches with left padding, right padding, both, and none."""
    mask = torch.ones(n, T, dtype=torch.bool)
    mask[0, :7] = False
    mask[1, 15:] = False
    mask[4, :3] = False
    return mask


def batches(ids, mask, size=B):
    """The arguments of the model itself, batch by batch."""
    for i in range(0, len(ids), size):
        inputs = {"input_ids": ids[i : i + size], "use_cache": False}
        yield inputs if mask is None else inputs | {"attention_mask": mask[i : i + size].long()}


def independent_inputs(model, ids, mask, size=B):
    """[{weight's name: [x (tokens, C), one a batch]} for every block], padding dropped, on the plain model."""
    _, block_list = models.blocks(model)
    seen, handles, real = [{} for _ in block_list], [], []

    def keep(b, name, x, rows=None):
        x = x.reshape(-1, x.shape[-1])
        where = real[-1] if rows is None else real[-1][rows]
        seen[b].setdefault(name, []).append(x[where])

    def experts(b, name, module, args, kwargs):
        if "Llama4" in type(module).__name__:  # every expert is fed all tokens, those of others as zeros
            for e, x in enumerate(args[0].view(module.num_experts, -1, args[0].shape[-1])):
                rows = x.any(-1).nonzero()[:, 0]
                gate, up = (x[rows] @ module.gate_up_proj[e]).chunk(2, dim=-1)
                keep(b, f"{name}.gate_up_proj.{e}", x[rows], rows)
                keep(b, f"{name}.down_proj.{e}", up * module.act_fn(gate), rows)
            return
        x, chosen = [*args, *kwargs.values()][:2]
        up_name = "gate_up_proj" if module.has_gate else "up_proj"
        for e in range(module.num_experts):
            rows = (chosen == e).any(-1).nonzero()[:, 0]
            if len(rows):
                keep(b, f"{name}.{up_name}.{e}", x[rows], rows)
                keep(b, f"{name}.down_proj.{e}", gated(module, up_name, e, x[rows]), rows)

    for b, block in enumerate(block_list):
        for name, m in block.named_modules():
            if isinstance(m, (nn.Linear, Conv1D)):
                handles.append(m.register_forward_pre_hook(lambda _, a, b=b, name=name: keep(b, name, a[0])))
            elif models.is_experts(m):
                handles.append(m.register_forward_pre_hook(
                    lambda m, a, k, b=b, name=name: experts(b, name, m, a, k), with_kwargs=True))
    for inputs in batches(ids, mask, size):
        ones = torch.ones_like(inputs["input_ids"])
        real.append(inputs.get("attention_mask", ones).reshape(-1).bool())
        model(**inputs)
    for handle in handles:
        handle.remove()
    return seen


def gated(module, up_name, e, x):
    """What expert e's down projection is fed, written out for the layouts there are."""
    weight = getattr(module, up_name)[e]
    y = x @ (weight if module.is_transposed else weight.T)
    if not module.is_transposed:
        gate, up = y.chunk(2, dim=-1)
        return module.act_fn(gate) * up
    y = y + module.gate_up_proj_bias[e]  # GPT-OSS: gate and up take turns, and are clamped
    gate, up = y[..., ::2].clamp(max=7.0), y[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def written_plainly(model, tokenizer, prompt, new):
    """The greedy continuation, the whole text run anew for each token."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    while len(ids) < start + new:
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    return tokenizer.decode(ids[start:], skip_special_tokens=True)
