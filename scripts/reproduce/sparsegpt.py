"""SparseGPT's tables on OPT, windows of 2048. How it is run: scripts/reproduce/paper.py.

    python scripts/reproduce/sparsegpt.py --only opt-125m        # on a CPU too

The paper gives one seed; over five it saw a standard deviation of 0.075 at OPT-2.7B, 50 % (mean 13.52).
"""

import sys

from paper import Model, Paper, main

PAPER = Paper(
    title="SparseGPT", source="arXiv 2301.00774", window=2048,
    models=(Model("facebook/opt-125m", 125e6, 768, 3072, 12), Model("facebook/opt-350m", 331e6, 1024, 4096, 24),
            Model("facebook/opt-1.3b", 1.32e9, 2048, 8192, 24), Model("facebook/opt-2.7b", 2.65e9, 2560, 10240, 32),
            Model("facebook/opt-6.7b", 6.66e9, 4096, 16384, 32), Model("facebook/opt-13b", 12.85e9, 5120, 20480, 40)),
    perplexity={
        "facebook/opt-125m": {"dense": 27.66, "magnitude": {"0.5": 193.0}, "sparsegpt": {"0.5": 36.85}},
        "facebook/opt-350m": {"dense": 22.00, "magnitude": {"0.5": 97.8}, "sparsegpt": {"0.5": 31.58}},
        "facebook/opt-1.3b": {"dense": 14.62, "magnitude": {"0.5": 1.7e4}, "sparsegpt": {"0.5": 17.46}},
        "facebook/opt-2.7b": {"dense": 12.47, "sparsegpt": {"0.5": 13.48, "4:8": 14.98, "2:4": 17.18}},
        "facebook/opt-6.7b": {"dense": 10.86, "sparsegpt": {"0.5": 11.55, "4:8": 12.56, "2:4": 14.20}},
        "facebook/opt-13b": {"dense": 10.13, "sparsegpt": {"0.5": 11.17, "4:8": 11.77, "2:4": 12.96}},
    })

if __name__ == "__main__":
    sys.exit(main(PAPER))
