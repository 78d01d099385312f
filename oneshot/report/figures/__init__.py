"""Pictures: every public `fig_*` is a function of records that returns a matplotlib Figure; one file for each kind.

    drawing      what they share: colours, scales, legends; `svg` and `save` turn a figure into a page's part or a file
    depth        fig_layer_errors, fig_layer_sparsity: by depth of the block
    sparsity     fig_perplexity: a metric against sparsity
    size         fig_bytes: a metric against the bytes of the model, with the Pareto front
    damage       fig_damage: where in the text the loss increase sits
    sensitivity  fig_sensitivity: which linears the model can least spare
    tasks        fig_tasks: results of lm-eval tasks
    speed        fig_speed: a metric against the measured speedup
    path         fig_path, fig_candidates: the rounds of `oneshot fit`, and what each block can spare
    healing      fig_healing: the held-out loss against the tokens trained on
    time         fig_time: where the seconds went

In all of them a series (a method, with the settings in which its runs differ) has one colour; N:M patterns have
markers of their own, unstructured patterns are dots on a line; the kind of a linear is its name within the block
("self_attn.q_proj"), without the numbers of experts.
"""

from .damage import fig_damage
from .depth import fig_layer_errors, fig_layer_sparsity
from .drawing import COLOURS, save, svg
from .healing import fig_healing
from .path import fig_candidates, fig_path
from .sensitivity import fig_sensitivity
from .size import fig_bytes
from .sparsity import fig_perplexity
from .speed import fig_speed
from .tasks import fig_tasks
from .time import fig_time

__all__ = ["COLOURS", "fig_bytes", "fig_candidates", "fig_damage", "fig_healing", "fig_layer_errors",
           "fig_layer_sparsity", "fig_path", "fig_perplexity", "fig_sensitivity", "fig_speed", "fig_tasks", "fig_time",
           "save", "svg"]
