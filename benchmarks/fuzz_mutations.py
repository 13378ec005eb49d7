"""How `fuzz.py` spoils a value, a text or bytes: by seed, with what has broken readers before."""

from __future__ import annotations

import copy
import random
from typing import Any

import yaml

NUMBERS = [0, 1, -1, 2, 7, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 32, (1 << 61), (1 << 63) - 1, 1 << 63, 1 << 64,
           -(1 << 63), 10**30,
           10**400, 0.0, -0.0, 0.5, 1e-320, 1e38, 1e308, float("inf"), float("-inf"), float("nan")]
STRINGS = ["", " ", "\x00", "a" * 5000, "../../etc/passwd", "/etc/passwd", "..", ".", "~root", "con",
           "<script>alert(1)</script>",
           "<img src=x onerror=alert(1)>", "\x1b[31mred\x1b[0m", "\r\n\r\n", "é" * 50, "\u202eabc", "%s%n", "${HOME}",
           "$(reboot)",
           "{{7*7}}", "null", "true", "F32", "BF16", "I64", "F8_E4M3", "U4", "q_proj", "all-linear", "(", "[a-", "(a+)+$",
           r"(?:[\w.]+)+!", r"(.*)*x", "(" * 200, "a{1,65535}" * 3, "base", "org/name", "org/name@main", "demo",
           "file:///etc/passwd",
           "part-1.safetensors", "./part-1.safetensors", "sub/part-1.safetensors", "model.layers.0.mlp.up_proj",
           "lora_A", "-1", "1e999"]
SNIPPETS = [
    "!!python/object/apply:os.system ['true']\n", "!!python/name:os.system\n", "&a [*a]\n", "*nowhere\n", "<<: *a\n",
    "? [a, b]\n: c\n",
    "!!binary aGVsbG8=\n", "!!set {a, b}\n", "!!timestamp 2026-01-01\n", "a: &x {b: *x}\n", "%YAML 9.9\n---\n",
    "---\n---\n", "\t- x\n",
    "x: !!int \"9" + "9" * 5000 + "\"\n", "x: " + "[" * 3000 + "\n", "x: " + "{a: " * 1500 + "\n", "x: 1e400\n",
    "x: .nan\n", "y: 0x7fffffffffff\n",
    "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(f"a{i}: &a{i} [" + ",".join([f"*a{i - 1}"] * 9) + "]\n" for i in range(1, 9)),
    "b0: &b0 {k: v}\n" + "".join(f"b{i}: &b{i} {{p: *b{i - 1}, q: *b{i - 1}}}\n" for i in range(1, 30)),
    "x: &m {a: 1}\ny: {<<: [*m, *m, *m], b: 2}\n", "\ufeffkind: merge\n", "k\x00: v\n", "\x85: a\n", "x: 'open\n",
    "x: |\n" + " " * 3 + "t\n",
]


def junk(rng: random.Random) -> Any:
    """A value that nobody asked for."""
    kind = rng.randrange(9)
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind < 6:
        return rng.choice(STRINGS)
    if kind == 6:
        return nested(rng.choice([5, 50, 250]), rng)
    return rng.choice([None, True, False, [], {}, [[]], [{}], {"": None}, [1] * 2000, {str(i): i for i in range(500)},
                       [1 << 61, 0], [0, 1 << 61], [1 << 31, 1 << 31, 0], [-1, 4], [[1.0, 0]], {"0": 1}])


def nested(depth: int, rng: random.Random) -> Any:
    value: Any = rng.choice([1, "x", []])
    for _ in range(depth):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every node."""
    if len(path) > 8:
        return [path]
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *[place for key, each in inner for place in places(each, (*path, key))]]


def mutate_tree(value: Any, rng: random.Random) -> Any:
    """``value`` with one to three nodes replaced, removed, renamed, repeated or swapped."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        known = places(value)
        *parents, last = [*rng.choice(known)] or [None]
        if last is None:
            if rng.random() < 0.1:
                return junk(rng)
            continue
        node = value
        for key in parents:
            node = node[key]
        kind = rng.randrange(8)
        if kind < 4:
            node[last] = junk(rng)
        elif kind == 4:
            del node[last]
        elif kind == 5 and isinstance(node, dict):
            node[str(rng.choice([junk(rng), f"{last}x", str(last).upper()]))[:6000]] = node.pop(last)
        elif kind == 6 and isinstance(node, list):
            node.append(copy.deepcopy(node[last]))
        else:
            node[last] = copy.deepcopy(_at(value, rng.choice(known)))
    return value


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """``data`` with bytes flipped, cut, repeated, inserted or overwritten."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at, kind = rng.randrange(len(out) + 1), rng.randrange(6)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[at:]
        elif kind == 2:
            del out[at : at + rng.randrange(1, 40)]
        elif kind == 3:
            out[at:at] = out[at : at + rng.randrange(1, 200)]
        elif kind == 4:
            out[at:at] = rng.choice([b"\xff\xfe", b"\x00" * 9, b"\xc3\x28", b"]" * 20, b"{" * 2000, b"[" * 3000,
                b"9" * 5000, b"\n", b'"', b"\\u0000"])
        elif kind == 5:
            out[at : at + 8] = rng.choice([b"\xff" * 8, b"\x00" * 8, b"\x7f" + b"\xff" * 7, (1 << 40).to_bytes(8, "little")])
        if not out:
            return bytes(out)
    return bytes(out)


def mutate_yaml(value: Any, rng: random.Random) -> bytes:
    """A recipe's text: spoiled values, hostile snippets, or spoiled bytes."""
    kind = rng.randrange(3)
    spoiled = mutate_tree(value, rng) if kind != 1 else value
    try:
        text = yaml.safe_dump(spoiled, sort_keys=False, allow_unicode=True).encode("utf-8", "surrogatepass")
    except RecursionError:
        text = b"kind: merge\n"
    if kind == 1:
        lines = text.splitlines(keepends=True)
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(SNIPPETS).encode())
        text = b"".join(lines)
    return mutate_bytes(text, rng) if kind == 2 else text
