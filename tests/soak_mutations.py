"""Mutations: what can become of a JSON file or a safetensors file, one kind a function. For the soak.

A mutation of JSON takes (draw, place, key) and changes place[key], some value anywhere in the file.
"""

import json
import random
from pathlib import Path


def places(data, found=None):
    """[(container, key)] of every value in a JSON tree."""
    found = [] if found is None else found
    for key in data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        found.append((data, key))
        places(data[key], found)
    return found


def rename(draw, place, key):
    if isinstance(place, dict):
        place[key + "x"] = place.pop(key)
    else:
        place.insert(key, place[key])


def swap(draw, place, key):
    other = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
    place[key], place[other] = place[other], place[key]


def put(value):
    def apply(draw, place, key):
        place[key] = value
    return apply


def change(draw, place, key):
    value = place[key]
    place[key] = (not value if isinstance(value, bool) else value + draw.choice((-1, 1, 7)) if isinstance(value, int)
                  else value * draw.choice((0.5, 2)) if isinstance(value, float)
                  else value[::-1] + "x" if isinstance(value, str) else None)


JSON = {
    "dropped": lambda draw, place, key: place.pop(key), "renamed or doubled": rename, "swapped": swap,
    "changed": change, "null": put(None), "abc": put("abc"), "-1": put(-1), "0": put(0), "1e300": put(1e300),
    "10^30": put(10**30),
    "[]": put([]), "{}": put({}), "true": put(True), "NaN": put(float("nan")), "half an emoji": put("\ud83d"),
    "../x": put("../x"), "nested": put(json.loads("[" * 500 + "]" * 500)),
}
TEXT = {
    "cut off": lambda draw, text: text[:draw.randrange(1, len(text))], "empty": lambda draw, text: b"",
    "an array": lambda draw, text: b"[]", "a number": lambda draw, text: b"3",
    "no UTF-8": lambda draw, text: text[:len(text) // 2] + b"\xff\xfe" + text[len(text) // 2:],
    "nested too deep": lambda draw, text: b"[" * 100_000, "zeros": lambda draw, text: bytes(len(text)),
    "twice": lambda draw, text: text + text,
}


def json_file(draw: random.Random, file: Path) -> str:
    """Change a JSON file in one of these ways; which. It always differs from what it was."""
    text = file.read_bytes()
    while True:
        if draw.random() < 0.25:
            kind = draw.choice(sorted(TEXT))
            new = TEXT[kind](draw, text)
        else:
            kind, data = draw.choice(sorted(JSON)), json.loads(text)
            JSON[kind](draw, *draw.choice(places(data)))
            new = json.dumps(data, indent=1).encode()
        if not same_json(new, text):
            file.write_bytes(new)
            return kind


def same_json(one: bytes, other: bytes) -> bool:
    try:
        return json.loads(one) == json.loads(other)
    except (ValueError, RecursionError):
        return one == other


def safetensors_file(draw: random.Random, file: Path) -> str:
    """Change a safetensors file: its header, its length, or whole tensors; how."""
    text = file.read_bytes()
    length = int.from_bytes(text[:8], "little")
    header, body = json.loads(text[8:8 + length]), text[8 + length:]
    names = sorted(name for name in header if name != "__metadata__")
    a, b = draw.sample(names, 2)
    kind = draw.choice(["two names exchanged", "another dtype", "another shape", "a name gone", "a name changed",
                        "cut off", "longer", "length of the header", "overlapping", "zeros", "tensors exchanged",
                        "random bytes", "no metadata", "metadata changed"])
    if kind == "two names exchanged":
        header[a], header[b] = header[b], header[a]
    elif kind == "another dtype":
        header[a]["dtype"] = draw.choice(["F32", "F16", "I8", "U8", "BF16", "BOOL", "X9"])
    elif kind == "another shape":
        header[a]["shape"] = draw.choice([header[a]["shape"][::-1], [*header[a]["shape"], 1], [0], [10**12], [-1]])
    elif kind == "a name gone":
        header.pop(a)
    elif kind == "a name changed":
        header[a + "x"] = header.pop(a)
    elif kind == "overlapping":
        header[a]["data_offsets"] = header[b]["data_offsets"]
    elif kind == "no metadata":
        header.pop("__metadata__", None)
    elif kind == "metadata changed":
        header["__metadata__"] = draw.choice([{}, {"format": "tf"}, {"format": 3}, [], {"run_id": "x"}])
    elif kind == "tensors exchanged":
        body = exchanged(header, body, a, b)
    elif kind == "zeros":
        begin, until = header[a]["data_offsets"]
        body = body[:begin] + bytes(until - begin) + body[until:]
    elif kind == "random bytes":
        begin, until = header[a]["data_offsets"]
        body = body[:begin] + draw.randbytes(until - begin) + body[until:]
    packed = json.dumps(header).encode()
    packed += b" " * (-len(packed) % 8)
    size = len(packed) if kind != "length of the header" else draw.choice([0, 1, len(packed) - 8, 2**40, 2**63])
    new = size.to_bytes(8, "little") + packed + body
    new = new[:draw.randrange(len(new))] if kind == "cut off" else new + b"\0" * 8 if kind == "longer" else new
    file.write_bytes(new)
    return kind


def exchanged(header, body, a, b):
    """The body with the bytes of two tensors of one size exchanged; of any where there are no two."""
    size = {name: header[name]["data_offsets"][1] - header[name]["data_offsets"][0] for name in (a, b)}
    width = min(size.values())
    (i, _), (j, _) = header[a]["data_offsets"], header[b]["data_offsets"]
    new = bytearray(body)
    new[i:i + width], new[j:j + width] = body[j:j + width], body[i:i + width]
    return bytes(new)
