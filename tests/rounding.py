"""Commands that round, in the tests of `--quantise`."""

import json

import tiny

LINEAR = "model.layers.1.mlp.down_proj"


def command(place, *more, **changed):
    given = {"method": "sparsegpt", "quantise": "int4:32", "evaluate": "none"} | changed
    return tiny.main(*tiny.flags(place, "--no-dense", *more, **given))


def killed(place, at, after, text):
    """A folder whose run was interrupted after so many blocks and went on, proved to be, bit for bit, as without."""
    def run(name):
        return command(place, save=at / name, results=at / f"{name}.runs", quantise=text)
    assert run("whole") == 0
    with tiny.interrupted(after):
        assert run("cut") == 130
    assert run("cut") == 0
    for file in ("model.safetensors", "scales.safetensors"):
        assert (at / "whole" / file).read_bytes() == (at / "cut" / file).read_bytes()
    return at / "cut"


def the_record(folder):
    [file] = folder.glob("*.json")
    return json.loads(file.read_text())
