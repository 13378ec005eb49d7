"""What has broken readers before, one by one: each is refused in one line, in bounded time and memory."""

from __future__ import annotations

import contextlib
import gzip
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from paft.checkpoint import Checkpoint, read_entries
from paft.data.load import load_rows
from paft.errors import MismatchError, PaftError, UsageError
from paft.hub import resolve
from paft.jsonfile import LIMIT, read_header, read_json
from paft.patterns import matches
from paft.yamlfile import parse_scalar, read_yaml

BOUNDED = """
import resource, sys, time
from pathlib import Path
import torch, pyarrow, fsspec, yaml, regex
import pyarrow.parquet, pandas
from paft.errors import PaftError
from paft.checkpoint import read_entries
from paft.jsonfile import read_json
from paft.data.load import load_rows
from paft.yamlfile import read_yaml
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 10**9,) * 2)
started = time.process_time()
try:
    {probe}
    print("taken")
except PaftError as error:
    assert error.exit_code in (2, 3), error.exit_code
    print("refused")
assert time.process_time() - started < 5
"""


def bounded(probe: str) -> str:
    """Run a probe in a process of its own with 1 GB to use; ``taken`` or ``refused``."""
    done = subprocess.run([sys.executable, "-c", BOUNDED.replace("{probe}", probe)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-600:]
    return done.stdout.strip()


def safetensors(file: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    file.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)
    return file


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "length"),
    [
        (b"{}", b"", (1 << 64) - 1),
        (b"{}", b"", LIMIT + 1),
        (b"[]", b"", None),
        (b'{"a": 1, "a": 1}', b"", None),
        (b"[" * 100_000, b"", None),
        (b"\xff\xfe", b"", None),
        (json.dumps({"a": entry([1], 0, 8)}).encode(), b"x" * 4, None),
        (json.dumps({"a": entry([2], 0, 4)}).encode(), b"x" * 4, None),
        (json.dumps({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}).encode(), b"x" * 4, None),
        (json.dumps({"a": entry([1], 0, 4), "b": entry([1], 2, 6)}).encode(), b"x" * 6, None),
        (json.dumps({"a": entry([1], 4, 8)}).encode(), b"x" * 8, None),
        (json.dumps({"a": entry([1], 0, 4)}).encode(), b"x" * 8, None),
        (json.dumps({"a": entry([-1], 0, 4)}).encode(), b"x" * 4, None),
        (json.dumps({"a": entry([1 << 61, 0], 0, 0)}).encode(), b"", None),
        (json.dumps({"a": entry([1] * 40, 0, 4)}).encode(), b"x" * 4, None),
        (json.dumps({"a": entry([3], 0, 4, "I64")}).encode(), b"x" * 4, None),
        (b'{"a": {"dtype": "F32", "shape": [' + b"9" * 4000 + b'], "data_offsets": [0, 4]}}', b"x" * 4, None),
    ],
)
def test_an_absurd_header_is_refused(header: bytes, data: bytes, length: int | None, tmp_path: Path) -> None:
    file = safetensors(tmp_path / "x.safetensors", header, data, length)
    with pytest.raises(MismatchError):
        list(read_entries(file))
    safetensors(file, json.dumps({"a": entry([1], 0, 4), "__metadata__": {"format": "pt"}}).encode(), b"x" * 4)
    assert [each.name for each in read_entries(file)] == ["a"] and read_header(file)[0].keys() == {"a", "__metadata__"}


def test_a_header_as_large_as_may_be_stays_in_memory(tmp_path: Path) -> None:
    safetensors(tmp_path / "x.safetensors", b'{"a": [' + b"[]," * 10_000_000 + b"[]]}")
    assert bounded(f"list(read_entries(Path({str(tmp_path / 'x.safetensors')!r})))") == "refused"


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": 1, "a": 2}', "\ufeff{}", "[" * 5000, '{"r": ' + "9" * 5000 + "}"])
def test_a_configuration_is_one_object_of_keys_that_differ(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    with pytest.raises(MismatchError):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x\0.safetensors",
                                  "tokenizer.json", "a" * 300 + ".safetensors", 7, None, ["x"]])
def test_an_index_never_leads_out_of_its_directory(name: object, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(PaftError) as caught:
        Checkpoint.open(tmp_path)
    assert caught.value.exit_code in (3, 4) and len(caught.value.message) < 600


def snapshot(tmp_path: Path, leads_to: Path) -> Path:
    repo = tmp_path / "models--org--name"
    place = repo / "snapshots" / "abc"
    place.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "blobs" / "1").write_text("{}")
    (place / "config.json").symlink_to("../../blobs/1")
    (place / "tokenizer.json").symlink_to(leads_to)
    return place


def test_a_link_out_of_a_hub_snapshot_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    with pytest.raises(MismatchError, match="leads out"):
        resolve(str(snapshot(tmp_path, tmp_path / "secret")))


def test_the_links_of_a_hub_snapshot_are_followed(tmp_path: Path) -> None:
    place = snapshot(tmp_path, Path("../../blobs/1"))
    assert resolve(str(place)) == place


def link(directory: Path, name: str, leads_to: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).symlink_to(leads_to)
    return directory


def test_weights_may_be_linked_from_anywhere_and_other_files_from_a_model(tiny_base: Path, tmp_path: Path) -> None:
    farm = tmp_path / "farm"
    for file in tiny_base.iterdir():
        link(farm, file.name, file)
    link(farm, "model-00009-of-00009.safetensors", tmp_path / "disk" / "part.safetensors")
    assert resolve(str(link(tmp_path, "link", farm) / "link")) == tmp_path / "link"  # a directory may be a link itself
    place = snapshot(tmp_path / "hub", Path("../../blobs/1"))
    (place / "config.json").resolve().write_text('{"model_type": "llama"}')
    assert resolve(str(link(tmp_path / "of-hub", "tokenizer.json", place / "tokenizer.json"))) == tmp_path / "of-hub"


@pytest.mark.parametrize("name", ["tokenizer.json", "id_rsa", "chat_template.jinja", "additional_chat_templates/x.jinja"])
@pytest.mark.parametrize("how", ["plain", "beside a config of something else", "by its own directory", "as a blob"])
def test_a_link_to_a_file_of_this_machine_is_refused(name: str, how: str, tmp_path: Path) -> None:
    home, model = tmp_path / "home", tmp_path / "model"
    home.mkdir()
    (home / Path(name).name).write_text("secret")
    (home / "config.json").write_text('{"auths": {}}')
    leads_to = home / Path(name).name
    if how == "plain":
        leads_to = leads_to.rename(home / "other")
    elif how == "by its own directory":
        link(model / "inner", Path(name).name, leads_to)
        (model / "inner" / "config.json").write_text('{"model_type": "llama"}')
        leads_to = model / "inner" / Path(name).name
    elif how == "as a blob":
        (home / "blobs").mkdir()
        model, leads_to = home / "snapshots" / "x", leads_to.rename(home / "blobs" / "1")
    place = model / name
    link(place.parent, place.name, leads_to)
    (model / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(MismatchError, match="outside"):
        resolve(str(model))


def test_a_directory_that_is_linked_is_not_copied(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    with pytest.raises(MismatchError, match="outside"):
        resolve(str(link(tmp_path / "model", "additional_chat_templates", tmp_path / "home")))


@pytest.mark.parametrize("pattern", [r"(?:[\w.]+)+[!?]", r"(\w|\w|[a-z.]+)*[!?]", r"(([\w.])+)+\2\2\2[!?]", "(", "x" * 20_000])
def test_a_pattern_of_an_adapter_ends(pattern: str) -> None:
    started = time.process_time()
    with contextlib.suppress(MismatchError):
        assert not matches(pattern, "model.layers.10.self_attn.q_proj.weight_of_all")
    assert time.process_time() - started < 2


@pytest.mark.parametrize("pattern", ["(", "[a-", "x" * 20_000, "(" * 5000, "*"])
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(MismatchError):
        matches(pattern, "a")


def test_patterns_match_as_pefts_do() -> None:
    assert matches("q_proj", "a.q_proj", tail=True) and not matches("q_proj", "a.xq_proj", tail=True)
    assert matches("q_proj|v_proj", "b.v_proj", tail=True) and matches(r".*\.(q|v)_proj", "a.v_proj")
    assert not matches("q_proj", "a.q_proj")


BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))


@pytest.mark.parametrize("text", [
    BOMB, "a: &x {b: *x}\n", "x: " + "[" * 3000, "x: !!python/object/apply:os.system [true]\n", "x: !!int '" + "9" * 5000 + "'\n",
    "- a\n", "", "x: 1\nx: 2\n", "x: 'open\n", "k: v\n" * 100_000, "\x00: 1\n", "&a a: *b\n",
])  # fmt: skip
def test_a_hostile_recipe_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UsageError) as caught:
        read_yaml(tmp_path / "x.yaml")
    assert "\n" not in caught.value.message and len(caught.value.message) < 400


@pytest.mark.parametrize("text", ["[" * 3000, "!!python/name:os.system", "9" * 5000, "*a", "'"])
def test_a_hostile_value_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_scalar(text)


@pytest.mark.parametrize("unit", [b'{"text": "', b'{"text": "a"}\n'])
def test_a_packed_bomb_is_refused(unit: bytes, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl.gz"
    with gzip.open(file, "wb") as out:
        for _ in range(24):
            out.write(unit * ((1 << 20) // len(unit)))
    assert file.stat().st_size < 2e6
    assert bounded(f"load_rows({str(file)!r}, 'sft')") == "refused"


def test_a_parquet_file_of_a_million_rows_a_byte_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    columns = pa.table({"text": pa.DictionaryArray.from_arrays(pa.array([0] * 3_000_000, pa.int8()), pa.array(["a"]))})
    parquet.write_table(columns, tmp_path / "rows.parquet", row_group_size=3_000_000)
    assert (tmp_path / "rows.parquet").stat().st_size < 30_000
    assert bounded(f"load_rows({str(tmp_path / 'rows.parquet')!r}, 'sft')") == "refused"


def test_rows_packed_as_text_packs_are_taken(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"row {i} " + "word " * 50}) for i in range(3000)]
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as out:
        out.write("\n".join(rows))
    assert len(load_rows(str(tmp_path / "rows.jsonl.gz"), "sft")) == 3000


@pytest.mark.parametrize("name", ["a" * 5000, "org/" + "b" * 300, "a\x00b"])
def test_a_name_that_no_file_can_have_is_not_found(name: str) -> None:
    with pytest.raises(PaftError) as caught:
        resolve(name)
    assert caught.value.exit_code == 4 and len(caught.value.message) < 700
    with pytest.raises(PaftError):
        load_rows(name + ".jsonl", "sft")


def test_one_message_in_place_of_a_list_of_them_is_taken_or_refused(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            {"messages": {"role": "user", "content": "a"}}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UsageError, match="no assistant turn"):
        load_rows(str(tmp_path / "rows.jsonl"), "sft")
