"""Strategies that damage good input: structured values, texts and bytes."""

import copy
import json
import math
import struct
from typing import Any

from hypothesis import strategies as st

# Values that JSON libraries do not write. `dump` puts them in place of their marks.
_RAW = {
    "@nan@": "NaN",
    "@infinity@": "-Infinity",
    "@digits@": "9" * 5000,
    "@half@": '"\\ud800"',
    "@deep@": "[" * 100_000 + "]" * 100_000,
    "@unclosed@": '{"a":' * 5000,
    "@exponent@": "1e400",
}

EXTREMES: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 255, 10**9, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64),
    *(-(2**63), 10**12, 10**30, 0.0, -0.5, 0.5, 1e-300, 1e38, 1e300, -1e300),
    *("", " ", "x", "0", "1e9", "\0", "\n", "a" * 5000, "🙂", "\u202e", "é\u0301" * 50),
    *("../../x", "~nosuchuser/x", "/dev/null", "/proc/self/mem", "C:\\x", "hub:x/y", "-", "--help"),
    *("{", "{text", "{text!r}", "{0}", "{text.__class__}", "{prompt}{prompt}", "{{}}"),
    *([], {}, [[]], [None], ["a", "a"], {"": None}, {"a": {"b": {}}}, [0] * 1000, [[[[[[0]]]]]]),
    *_RAW,
]

_small_json = st.recursive(
    st.sampled_from(EXTREMES) | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)

FRAGMENTS = [
    *("&a [*a]", "*b", "<<: *a", "!!timestamp x", "!!binary x", "!!python/object:os.system x"),
    *("!!set {a}", "!!omap [a]", "!!int x", "!!float x", "? [a]", "[" * 3000, "{a: " * 3000),
    *(
        "- " * 3000,
        "a: " * 50,
        "---\na: 1\n---\nb: 2",
        "%YAML 9.9\n---",
        "\t",
        "'",
        '"',
        "|",
        ">-5",
    ),
    *("0x" + "f" * 5000, "9" * 5000, "1" + ":59" * 500, ".inf", ".nan", "1e400", '"\\ud800"'),
    *('"\\0"', "~", "null", "2001-01-01", "0o777", "0b1", "1_000", "\u0085", "\ufeff", "\x07"),
    "{a: &x [1,1,1,1,1,1,1,1,1], b: &y [*x,*x,*x,*x,*x,*x,*x,*x,*x], c: &z "
    "[*y,*y,*y,*y,*y,*y,*y,*y,*y], d: &w [*z,*z,*z,*z,*z,*z,*z,*z], e: [*w,*w,*w,*w,*w,*w,*w]}",
]
"""Texts that are special in YAML."""


def dump(value: Any) -> str:
    """Write a value as JSON, with the marks of `EXTREMES` replaced by text that is not."""
    text = json.dumps(value)
    for mark, raw in _RAW.items():
        text = text.replace(f'"{mark}"', raw)
    return text


@st.composite
def damaged_value(draw: st.DrawFn, value: Any) -> Any:
    """Replace, remove or rename one to three parts of a JSON value."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        if not isinstance(value, dict | list) or not value:
            break
        container, key = draw(_place(value))
        change = draw(st.sampled_from(["extreme", "extreme", "extreme", "any", "remove", "rename"]))
        if change == "extreme":
            container[key] = copy.deepcopy(draw(st.sampled_from(EXTREMES)))
        elif change == "any":
            container[key] = copy.deepcopy(draw(_small_json))
        elif change == "remove":
            del container[key]
        elif isinstance(container, dict):
            container[draw(st.sampled_from(["", "x", "name", "\ud800"]))] = container.pop(key)
    return value


@st.composite
def damaged_json(draw: st.DrawFn, value: Any) -> bytes:
    """A JSON file with damaged values or damaged syntax."""
    good = draw(st.integers(0, 9)) == 0
    text = dump(value if good else draw(damaged_value(value)))
    content = text.encode()
    return draw(damaged_bytes(content)) if good else content


@st.composite
def damaged_text(draw: st.DrawFn, text: str) -> bytes:
    """A text file in which fragments were inserted or lines were replaced."""
    lines = text.split("\n")
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.integers(0, len(lines) - 1))
        fragment = draw(st.sampled_from(FRAGMENTS))
        head, colon, _ = lines[place].partition(":")
        lines[place] = draw(st.sampled_from([fragment, f"{head}{colon} {fragment}", lines[place]]))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes, header: int = 4096) -> bytes:
    """A file with flipped, inserted, removed or overwritten bytes, mostly in its header."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        end = min(len(data), header if draw(st.integers(0, 9)) else len(data))
        place = draw(st.integers(0, max(end - 1, 0)))
        change = draw(st.sampled_from(["flip", "flip", "number", "cut", "insert", "remove"]))
        if change == "flip" and data:
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif change == "number":
            number = draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]))
            form = draw(st.sampled_from(["<Q", "<I"]))
            packed = struct.pack(form, number % (2**64 if form == "<Q" else 2**32))
            data[place : place + len(packed)] = packed
        elif change == "cut":
            del data[place:]
        elif change == "insert":
            data[place:place] = draw(st.binary(max_size=40))
        elif change == "remove":
            del data[place : place + draw(st.integers(1, 100))]
    return bytes(data)


@st.composite
def damaged_safetensors(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file with a damaged header, other types, or values that are not finite."""
    (length,) = struct.unpack_from("<Q", content)
    header, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    change = draw(st.sampled_from(["bytes", "header", "type", "values"]))
    if change == "bytes":
        return draw(damaged_bytes(content, header=8 + length))
    if change == "values":
        place = 4 * draw(st.integers(0, len(data) // 4 - 1))
        number = draw(st.sampled_from([math.inf, -math.inf, math.nan, 1e38, -1e38, 1e-40]))
        data[place : place + 4] = struct.pack("<f", number)
    elif change == "type":
        kinds = ["F8_E4M3", "F8_E5M2", "F64", "F16", "BF16", "I8", "I64", "BOOL", "U8", "X", "F4"]
        kind = draw(st.sampled_from(kinds))
        for name in draw(st.lists(st.sampled_from(sorted(header)), min_size=1, max_size=3)):
            if name != "__metadata__":
                header[name]["dtype"] = kind
    else:
        header = draw(damaged_value(header))
    text = dump(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


@st.composite
def _place(draw: st.DrawFn, value: Any) -> tuple[Any, Any]:
    """Choose a part of a JSON value, as its container and its key; each level counts the same."""
    while True:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = keys[draw(st.integers(0, len(keys) - 1))]
        inner = value[key]
        if not isinstance(inner, dict | list) or not inner or draw(st.integers(0, 3)) == 0:
            return value, key
        value = inner
