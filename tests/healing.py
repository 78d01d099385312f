"""Healing in the tests: models pruned by Wanda to 2:4 and healed, and how far they are from the dense one."""

import jobs
import torch
from torch.nn.functional import kl_div

from oneshot import heal
from oneshot.heal.train import held_out_windows
from oneshot.pipeline.plan import pruning_chain
from oneshot.settings import flags

SAMPLE = ("llama", "gpt2", "gemma3", "bloom", "falcon", "phi3", "mixtral", "gpt_oss", "qwen3_next")


def tokens(n=16):
    return jobs.tokens(n)


def heal_pruned(model, methods="block", mask=None, ids=None, **given):
    """Result of pruning to 2:4 by Wanda and healing by `methods`, as `--heal` names them."""
    cfg = flags.build({"method": "wanda", "pattern": "2:4", "heal": methods, **given})
    ids = tokens() if ids is None else ids
    healers = [heal.module(name).Heal(cfg.healing[name], seed=0) for name in cfg.heals]
    result = jobs.prune(model, pruning_chain(cfg), ids=ids, mask=mask, healers=healers,
                        held_out=held_out_windows(*ids.shape, 0))
    for name, healer in zip(cfg.heals, healers, strict=True):
        if info := healer.after_model(model, result.dense):
            result.heal[name] = info
    return result


def kl(dense, pruned, ids, mask=None):
    """Mean KL to the dense model, by plain forwards."""
    inputs = {"input_ids": ids, "use_cache": False} | ({} if mask is None else {"attention_mask": mask.long()})
    with torch.no_grad():
        p, q = (m(**inputs).logits.double().log_softmax(-1) for m in (dense, pruned))
    each = kl_div(q, p, reduction="none", log_target=True).sum(-1)
    return float(each.mean() if mask is None else each[mask].mean())
