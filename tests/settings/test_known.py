"""What is known of every flag; names that were used before; run_ids that stay what they were."""

import families
import jobs
import pytest

import oneshot
from oneshot.runtime.flag import BEARS_ON
from oneshot.settings import flags
from oneshot.settings.known import known, todays_names

HEALED = "block,distil --block.steps 7 --block.lr 0.03 --distil.lr 0.01 --dense-target 0.5"  # the rates of that time
FIRST_RELEASE = {  # a command line: its run_id before the stages had their folders, on one model and one text
    "--method wanda --pattern 2:4": "demo-wanda-2of4-f35693a9",
    "--method sparsegpt+refit --pattern 0.6 --sparsegpt.damping 0.1 --seed 3": "demo-sparsegpt+refit-0.6-b26117a0",
    "--method best --effort 2 --pattern 2:4": "demo-alps-2of4-e5ccf4c3",
    f"--method alps --pattern 2:4 --recover {HEALED}": "demo-alps-2of4-14b8c1f2",
    f"--method alps --pattern 2:4 --heal {HEALED}": "demo-alps-2of4-14b8c1f2",
    "--method wanda --pattern 0.5 --allocate owl --gram-budget 2 --divergence": "demo-wanda-0.5-78461336",
    "--method dense": "demo-dense-8ea00068",
}


@pytest.mark.parametrize("line", FIRST_RELEASE)
def test_finished_runs_are_found_again(line):
    """A record and a checkpoint of the first release are this command's still, whatever its flags are called."""
    cfg = flags.parse([*line.split(), "--device", "cpu"])[0]
    assert cfg.run_id("weights", "data") == FIRST_RELEASE[line]


@pytest.mark.parametrize("name", known())
def test_every_flag_says_what_is_to_be_known_of_it(name):
    """Made by runtime.flag.flag: nothing is looked up of a flag that declares less."""
    flag = known()[name]
    assert flag.metadata["help"] and flag.metadata["bears_on"] in BEARS_ON and name == flag.name
    assert flag.option.startswith("--") and "_" not in flag.option
    if not flag.chosen_by:
        assert flag.metadata["section"], "--help has no place for it"
    if flag.metadata["choices"] and flag.default is not None:
        assert flag.default in flag.metadata["choices"]


def test_a_name_of_before_is_an_alias():
    """On the command line and in Python."""
    assert flags.parse(["--method", "wanda", "--pattern", "2:4", "--recover", "block"])[0].heals == ["block"]
    assert todays_names({"recover": "block", "seed": 1}) == {"heal": "block", "seed": 1}
    record = oneshot.prune(families.tiny("llama"), method="wanda", calibration=jobs.tokens(4), recover="block",
                           progress=False, parts={"block.steps": 1})
    assert record["settings"]["heal"] == "block" and "recover" not in record["settings"]


def test_options_differ():
    options = [option for flag in known().values() for option in flag.options]
    assert len(set(options)) == len(options)
