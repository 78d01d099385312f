"""Flags that would do nothing in any run of the command are refused by name; where one does something, they pass."""

import pytest

from oneshot.pipeline import idle
from oneshot.settings import flags
from oneshot.settings.known import known


def check(*argv):
    """Refuse what would do nothing, as the command does."""
    given = flags.read(argv)
    idle.check(given, flags.expand(given))


@pytest.mark.parametrize("line", [
    "--eval-windows 4 --evaluate none", "--eval-seqlen 9 --evaluate none", "--robustness --evaluate none",
    "--eval-batch-size 2 --evaluate none", "--task-limit 5", "--task-path x", "--trust-task-code",
    "--trust-task-code --tasks boolq", "--column text", "--column text --calibration a.txt --evaluate b.txt,wikitext2",
    "--per-line", "--per-line --calibration a.jsonl", "--data-config x --calibration a.jsonl",
    "--split train --calibration a.jsonl --evaluate owner/name", "--revision v1", "--revision v1 --calibration a.txt",
    "--documents separate --calibration self --evaluate none", "--bos each --calibration self --evaluate none",
    "--activation-dtype bfloat16 --method dense", "--activations cpu --method magnitude --no-layer-errors",
    "--gram-budget 2 --method wanda,magnitude", "--gram-budget 2 --method wanda --allocate owl", "--overwrite",
    "--group row --pattern 2:4", "--method dense --group row", "--method dense --allocate owl",
    "--method dense --heal block", "--method dense --keep-dense *", "--method dense --true-sequential",
    "--method dense --dense-target 0.5",
    "--method dense --stop-on-collapse", "--method dense --shared-inputs", "--method dense --sensitivity linear",
    "--method dense --divergence", "--method dense --damage", "--method dense --format packed",
    "--model-revision v1", "--prune_method wanda --sparsity_ratio 0 --heal block",
    "--heal-cache x --heal full --heal-data a.txt --heal-loss next", "--heal-top-k 8 --heal block",
    "--heal-temperature 2 --heal full --heal-data a.txt --heal-loss next,hidden",
    "--column text --heal full --heal-data a.txt --calibration b.txt",
    "--prune_method wanda --sparsity_ratio 0.5 --save x --overwrite",  # there --save is the folder of results
])
def test_refused(line):
    words = line.split()
    flag = next(word for word in (words if words[0] != "--method" else words[2:])
                if word.startswith("--") and word not in ("--prune_method", "--sparsity_ratio", "--save"))
    with pytest.raises(ValueError, match=rf"^{flag}: would do nothing, as .*; leave it out$"):
        check(*words)


@pytest.mark.parametrize("line", [
    "", "--eval-windows 4", "--eval-windows 4 --evaluate a.txt", "--eval-batch-size 2 --evaluate none --tasks boolq",
    "--tasks x --task-path y --trust-task-code --task-limit 3", "--column text --calibration a.jsonl.gz",
    "--column text --evaluate b.parquet", "--column text --calibration owner/name", "--column text --evaluate x=b.csv",
    "--per-line --evaluate a.txt.gz", "--data-config x --evaluate owner/name", "--split train --calibration owner/name",
    "--split train --calibration c4",  # which warns that it heeds none
    "--revision v1 --calibration c4", "--method dense --revision v --calibration owner/name --evaluate owner/name",
    "--documents separate --calibration self", "--bos none", "--activation-dtype bfloat16 --method wanda",
    "--activations cpu --method magnitude", "--gram-budget 2 --method wanda,sparsegpt", "--gram-budget 2 --method best",
    "--gram-budget 2 --method wanda+refit", "--gram-budget 2 --method wanda --dense-target 0.5",
    "--group row --pattern 2:4,0.5", "--overwrite --save x",
    "--method dense --quantised --damage --divergence", "--method dense,wanda --heal block",
    "--method best --effort 2", "--model owner/name --model-revision v1", "--group matrix --pattern 0.5",
    # what scripts give to every command alike
    "--method dense --nsamples 8 --seed 3 --seqlen 64 --calibration c4", "--cache-dir x", "--tf32", "--dtype bfloat16",
    "--method dense --batch-size 4 --no-layer-errors --sensitivity none", "--method dense --no-dense --evaluate none",
    "--prune_method wanda --sparsity_ratio 0.5 --sparsity_type unstructured --save x --cache_dir y --nsamples 8",
    "--column text --method keep --pattern dense --heal full --heal-data 0.5*a.txt,b.jsonl --heal-teacher x",
    "--per-line --calibration a.jsonl --heal full --heal-data self --heal-held-out b.txt",
    "--data-config en --heal lora --heal-data owner/name", "--heal-cache x --heal full --heal-data a.txt",
    "--heal-temperature 2 --heal full --heal-data a.txt --heal-loss next,kl",
    "--prune_method wanda --sparsity_ratio 0", "--prune_method magnitude --sparsity_type 2:4 --use_variant --save x",
    "--prune_method sparsegpt --sparsity_ratio 0.5 --save_model y --save x --eval_zero_shot",
])
def test_allowed(line):
    check(*line.split())


def test_every_rule_is_of_a_flag():
    assert set(idle.RULES) <= set(known())


def test_sweeps_may_share_flags():
    """`settings.parse` makes the runs of a sweep, in which a flag of the whole sweep may do nothing for one model."""
    assert flags.parse(["--column", "text", "--calibration", "a.txt"])
