"""Commands that round, in the tests of `--quantise`."""

import json

import tiny

LINEAR = "model.layers.1.mlp.down_proj"


def command(place, *more, **changed):
    given = {"method": "sparsegpt", "quantise": "int4:32", "evaluate": "none"} | changed
    return tiny.main(*tiny.flags(place, "--no-dense", *more, **given))


def the_record(folder):
    [file] = folder.glob("*.json")
    return json.loads(file.read_text())
