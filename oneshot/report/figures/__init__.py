from .by_depth import *
from .by_depth import fig_layer_errors, fig_layer_sparsity, fig_perplexity, fig_damage, fig_time, fig_tasks, kind, layer_sparsity
