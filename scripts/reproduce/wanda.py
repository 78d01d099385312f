"""Wanda's table: Llama-2, windows of 4096 in calibration and evaluation. How it is run: scripts/reproduce/paper.py.

    python scripts/reproduce/wanda.py --only 7b
"""

import sys

from paper import Model, Paper, main

PAPER = Paper(
    title="Wanda", source="arXiv 2306.11695; the README of github.com/locuslab/wanda", window=4096,
    models=(Model("meta-llama/Llama-2-7b-hf", 6.74e9, 4096, 11008, 32),
            Model("meta-llama/Llama-2-13b-hf", 13.02e9, 5120, 13824, 40),
            Model("meta-llama/Llama-2-70b-hf", 68.98e9, 8192, 28672, 80)),
    perplexity={
        "meta-llama/Llama-2-7b-hf": {
            "dense": 5.12,
            "magnitude": {"0.5": 14.89, "4:8": 16.48, "2:4": 54.59},
            "sparsegpt": {"0.5": 6.51, "4:8": 8.12, "2:4": 10.17},
            "wanda": {"0.5": 6.42, "4:8": 7.97, "2:4": 11.02}},
        "meta-llama/Llama-2-13b-hf": {
            "dense": 4.57,
            "magnitude": {"0.5": 6.37, "4:8": 6.76, "2:4": 8.33},
            "sparsegpt": {"0.5": 5.63, "4:8": 6.60, "2:4": 8.32},
            "wanda": {"0.5": 5.56, "4:8": 6.55, "2:4": 8.27}},
        "meta-llama/Llama-2-70b-hf": {
            "dense": 3.12,
            "magnitude": {"0.5": 4.98, "4:8": 5.58, "2:4": 6.33},
            "sparsegpt": {"0.5": 3.98, "4:8": 4.59, "2:4": 5.40},
            "wanda": {"0.5": 3.98, "4:8": 4.47, "2:4": 5.16}},
    })

if __name__ == "__main__":
    sys.exit(main(PAPER))
