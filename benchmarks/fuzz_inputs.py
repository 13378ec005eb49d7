"""What `fuzz.py` feeds to the readers: small sound inputs of every kind, each with something broken in it by seed."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

from fuzz_mutations import mutate_bytes, mutate_tree, mutate_yaml

H, R = 8, 2  # hidden size and rank of the world
LINEAR = ("self_attn.q_proj", "mlp.up_proj")
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": H, "intermediate_size": H,
          "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 16, "tie_word_embeddings": False}
ADAPTER = {"peft_type": "LORA", "r": R, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"], "rank_pattern": {},
           "alpha_pattern": {"up_proj": 8}, "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "use_dora": False,
           "modules_to_save": None, "base_model_name_or_path": "base", "revision": None, "init_lora_weights": True,
           "target_parameters": None, "trainable_token_indices": None, "lora_bias": False, "layers_to_transform": None}
INDEX = {"metadata": {"total_size": 4 * H * H}, "weight_map": {}}
SFT = [{"prompt": f"what is {i}", "completion": f"it is {i}"} for i in range(4)]
CHAT = [{"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]} for i in range(4)]
PAIRS = [{"prompt": f"p{i}", "chosen": "yes", "rejected": "no"} for i in range(4)]
RECIPES: list[dict[str, Any]] = [
    {"kind": "train-sft", "model": "demo", "data": "demo:sft", "l1": 1e-3, "lora": {"r": 4, "targets": ["q_proj"]},
     "trainer": {"max_steps": 5}},
    {"kind": "train-dpo", "model": "demo", "data": [{"source": "demo:pref", "weight": 1}], "loss": {"sigmoid": 1, "sft": 0.5}},
    {"kind": "train-joint", "model": "demo", "sft_data": "demo:sft", "pref_data": "demo:pref", "method": "maxright", "lam": 0.5},
    {"kind": "merge", "adapters": ["a", {"adapter": "b", "weight": 0.5}], "method": "ties",
     "parameters": {"density": [0.5, 0.2]}},
    {"kind": "run", "name": "x", "model": "demo", "data": {"sft": "demo:sft", "pref": {"train": "demo:pref"}},
     "train": {"sft": {"objective": "sft"}, "dpo": {"objective": "dpo", "on": "sft"}},
     "merge": {"ties": {"of": ["sft", "dpo"], "method": "ties"}}},
    {"merge_method": "ties", "base_model": "b", "models": [{"model": "a", "parameters": {"density": 0.5}}], "dtype": "bfloat16"},
]


def tensors(shapes: dict[str, list[int]], rng: random.Random) -> dict[str, Any]:
    """A safetensors header for float32 tensors of these shapes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        size = 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    return header


def pack(header: Any, size: int, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    values = bytes(range(1, 61)) * (size // 60 + 1)  # small finite float32
    return (len(text) if length is None else length).to_bytes(8, "little") + text + values[:size]


def hostile_file(shapes: dict[str, list[int]], rng: random.Random) -> bytes:
    """A safetensors file with something wrong in its header, its length or its bytes."""
    header, size = tensors(shapes, rng), sum(4 * a * b for a, b in shapes.values())
    kind = rng.randrange(4)
    if kind == 0:
        return mutate_bytes(pack(header, size), rng)
    if kind == 1:
        return pack(header, size, rng.choice([0, 1, 7, 1 << 20, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]))
    if kind == 2:
        text = json.dumps(header)
        first = next(iter(shapes))
        twice = text[:-1] + f', "{first}": ' + json.dumps(header[first]) + "}"
        return pack(rng.choice([twice, "[" * 100_000, '{"a":' * 50_000, text + " " * 99, "\ufeff" + text]).encode(), size)
    return pack(mutate_tree(header, rng), max(0, size + rng.choice([0, 0, 0, -4, 4, 100])))


def base_shapes() -> dict[str, list[int]]:
    names = [f"model.layers.0.{name}.weight" for name in LINEAR]
    return {"model.embed_tokens.weight": [16, H], **{name: [H, H] for name in names}, "lm_head.weight": [16, H]}


def adapter_shapes() -> dict[str, list[int]]:
    prefix = "base_model.model.model.layers.0."
    return {f"{prefix}{name}.lora_{side}.weight": ([R, H] if side == "A" else [H, R]) for name in LINEAR for side in "AB"}


def write_base(path: Path, rng: random.Random) -> None:
    path.mkdir(exist_ok=True)
    shapes = base_shapes()
    (path / "model.safetensors").write_bytes(pack(tensors(shapes, rng), sum(4 * a * b for a, b in shapes.values())))
    (path / "config.json").write_text(json.dumps(CONFIG))


def make_base(room: Path, rng: random.Random) -> None:
    """A base with a broken file, index or configuration."""
    write_base(room / "base", rng)
    kind = rng.randrange(3)
    if kind == 0:
        (room / "base" / "model.safetensors").write_bytes(hostile_file(base_shapes(), rng))
    elif kind == 1:
        (room / "base" / "model.safetensors").rename(room / "base" / "part-1.safetensors")
        index = INDEX | {"weight_map": dict.fromkeys(base_shapes(), "part-1.safetensors")}
        (room / "base" / "model.safetensors.index.json").write_bytes(_json(index, rng))
    else:
        (room / "base" / "config.json").write_bytes(_json(CONFIG, rng))


def make_adapter(room: Path, rng: random.Random) -> None:
    """An adapter with a broken file or configuration, over a sound base."""
    write_base(room / "base", rng)
    path, shapes, which = room / "adapter", adapter_shapes(), rng.randrange(2)
    path.mkdir()
    sound = pack(tensors(shapes, rng), sum(4 * a * b for a, b in shapes.values()))
    (path / "adapter_model.safetensors").write_bytes(hostile_file(shapes, rng) if which else sound)
    (path / "adapter_config.json").write_bytes(json.dumps(ADAPTER).encode() if which else _json(ADAPTER, rng))
    if rng.random() < 0.1:
        (path / "paft.json").write_bytes(_json({"schema": 1, "base": {"name": "b", "content_sha256": "0" * 64}}, rng))


def _json(value: Any, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return mutate_bytes(json.dumps(value).encode(), rng)
    return json.dumps(mutate_tree(value, rng)).encode("utf-8", "surrogatepass")


def make_delta(room: Path, rng: random.Random) -> None:
    """A delta file whose record or arrays are broken."""
    from paft.checkpoint import Checkpoint
    from paft.merge.deltafile import sample_hash

    write_base(room / "base", rng)
    name, path = "model.layers.0.mlp.up_proj.weight", room / "adapter"
    path.mkdir()
    record = {"shape": [H, H], "base_sample_sha256": sample_hash(Checkpoint.open(room / "base"), name)}
    low = record | {"format": "low_rank", "ranks": [1, 1], "terms": [[1.0, 0], [0.5, [[2.0, 1]]]]}
    csr = record | {"format": "csr"}
    config = {"schema": 1, "base": {"name": "base"}, "tensors": {name: rng.choice([low, csr])}}
    broken = rng.randrange(2)
    shapes = {f"{name}#left": [H, 2], f"{name}#right": [2, H]}
    sound = pack(tensors(shapes, rng), 128)
    (path / "delta.safetensors").write_bytes(hostile_file(shapes, rng) if broken else sound)
    (path / "paft_delta.json").write_bytes(json.dumps(config).encode() if broken else _json(config, rng))


def make_recipe(room: Path, rng: random.Random) -> None:
    """A recipe with wrong values, tags, anchors, bombs or bytes."""
    (room / "recipe.yaml").write_bytes(mutate_yaml(rng.choice(RECIPES), rng))


def make_rows(room: Path, rng: random.Random) -> None:
    """Data rows of any format, broken in a value, in the text or in the bytes."""
    rows = rng.choice([SFT, CHAT, PAIRS])
    rows = mutate_tree(rows, rng) if rng.random() < 0.6 else rows
    rows = rows if isinstance(rows, list) else [rows]
    suffix = rng.choice([".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".txt"])
    data = _packed(rows, suffix)
    (room / f"rows{suffix}").write_bytes(mutate_bytes(data, rng) if rng.random() < 0.6 else data)


def _packed(rows: list[Any], suffix: str) -> bytes:
    lines = "\n".join(json.dumps(row) for row in rows).encode("utf-8", "surrogatepass")
    if suffix == ".json":
        return json.dumps(rows).encode()
    if suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        out = io.BytesIO()
        try:
            parquet.write_table(pa.Table.from_pylist(rows), out)
        except Exception:  # rows that Arrow cannot hold: the text will do
            return lines
        return out.getvalue()
    if suffix in (".csv", ".tsv"):
        text = io.StringIO()
        writer = csv.writer(text, "excel" if suffix == ".csv" else "excel-tab")
        with contextlib.suppress(csv.Error):
            writer.writerows([list(row), *[row.values()]] if isinstance(row, dict) else [row] for row in [*rows])
        return text.getvalue().encode("utf-8", "surrogatepass")
    return gzip.compress(lines) if suffix.endswith(".gz") else lines


def make_artefact(room: Path, rng: random.Random) -> None:
    """Something to verify whose manifest or files are broken."""
    from paft.provenance import write_manifest

    write_base(room / "base", rng)
    inputs = [{"name": "a", "content_sha256": "0"}]
    write_manifest(room / "base", command="run", recipe={"train": {"a": {}}}, seed=0, inputs=inputs)
    if rng.random() < 0.5:
        text = json.loads((room / "base" / "paft.json").read_text())
        (room / "base" / "paft.json").write_bytes(_json(text, rng))
    else:
        (room / "base" / "model.safetensors").write_bytes(hostile_file(base_shapes(), rng))
