"""oneshot: prune a language model once, prove what it cost, run it faster.

    import oneshot
    model, tokenizer = oneshot.load("demo")
    record = oneshot.prune(model, tokenizer, method="sparsegpt", pattern="2:4")
    model.save_pretrained("demo-2of4")

The command line is `python -m oneshot.run --help`.
"""

__version__ = "0.1.0"
__all__ = ["load", "perplexity", "prune"]


def __getattr__(name):
    """Import torch and transformers when they are first needed: `--help` and the version take no seconds."""
    if name == "load":
        from .models import load as found
    elif name == "prune":
        from .run import prune as found
    elif name == "perplexity":
        from .evaluate.perplexity import perplexity as found
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found
