"""Artefacts behind a URL: what comes back is what was written, or one line; half-written is not there; no file twice."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paft.adapter import read_adapter
from paft.errors import MismatchError, NotFoundError, PaftError, ResourceError, UsageError
from paft.store import NOTE, Bucket, Store, fetched, is_url
from paft.store.artefacts import LIST
from paft.store.cache import home

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(params=["file", "memory", *filter(None, [os.environ.get("PAFT_TEST_URL")])])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place behind a URL; PAFT_TEST_URL names one more, such as s3://bucket of a test server."""
    where = {"file": f"file://{tmp_path}", "memory": "memory:/"}.get(request.param, request.param)
    return f"{where}/{secrets.token_hex(4)}/bucket"


def files_in(directory: Path) -> dict[str, bytes]:
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def write(directory: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)


def elsewhere(monkeypatch: pytest.MonkeyPatch, name: str = "other") -> None:
    """From here on this is another machine."""
    monkeypatch.setenv("PAFT_CACHE", str(home().with_name(name)))


FILES = {"paft.json": b"{}", "weights.safetensors": os.urandom(3 << 20), "deep/in/side.txt": b"x", "empty": b""}


def test_an_artefact_comes_back_as_it_was(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(url)
    write(store.here / "adapters/a", FILES)
    store.push("adapters/a")
    elsewhere(monkeypatch)
    assert not store.here.exists() and store.names() == ["adapters/a"] and store.pull("adapters/a")
    assert files_in(store.here / "adapters/a") == FILES
    assert not store.pull("adapters/b")


def test_a_changed_artefact_replaces_the_old_one(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, changed = Store(url), {"paft.json": b"{ }", "weights.safetensors": FILES["weights.safetensors"], "new": b"n"}
    write(store.here / "a", FILES)
    store.push("a")
    first = home()
    elsewhere(monkeypatch)
    store.pull("a")
    for name in FILES.keys() - changed.keys():
        (store.here / "a" / name).unlink()
    write(store.here / "a", {"paft.json": b"{ }", "new": b"n"})
    store.push("a")
    monkeypatch.setenv("PAFT_CACHE", str(first))
    assert store.pull("a") and files_in(store.here / "a") == changed
    assert {name for name in store.bucket.files() if name != f"a/{LIST}"} == {f"a/{name}" for name in changed}


def test_a_removed_artefact_leaves_nothing_but_the_note_of_the_driver(url: str) -> None:
    """Nor the empty directories of a disk, one of which lost its files before."""
    store = Store(url)
    write(store.here / "a", FILES)
    store.push("a")
    (store.here / "a/deep/in/side.txt").unlink()
    store.push("a")
    store.bucket.write(f"a/{NOTE}", b"{}")
    store.remove("a")
    assert list(store.bucket.files()) == [f"a/{NOTE}"] and store.stands() and not (store / "a").stands()
    store.bucket.inside("a").remove(NOTE)
    store.remove("a")
    assert not store.bucket.files() and (not url.startswith("file") or not Path(url.removeprefix("file://"), "a").exists())


def test_what_is_here_is_neither_fetched_nor_written_again(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, moved = Store(url), []
    write(store.here / "a", FILES)
    write(store.here / "b", FILES)
    store.push("a")
    for name in ("get", "put"):
        plain = getattr(Bucket, name)
        monkeypatch.setattr(Bucket, name, lambda *args, plain=plain, name=name: (moved.append((name, args[1:])), plain(*args))[1])
    store.push("a")
    assert store.pull("a") and moved == []
    store.push("b")
    assert len(moved) == len(FILES)
    elsewhere(monkeypatch)
    assert store.pull("a") and store.pull("b")
    assert len(moved) == 2 * len(FILES)  # the same content under another name lies in the cache


def test_half_written_is_not_there(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(url)
    write(store.here / "a", FILES)
    store.push("a")
    (store.here / "a" / "paft.json").write_bytes(b"{ }")

    def broken(self: Bucket, file: Path, name: str) -> None:
        raise ResourceError("the service is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "put", broken)
        with pytest.raises(ResourceError):
            store.push("a")
    assert store.names() == [] and not store.pull("a")
    store.push("a")
    assert store.names() == ["a"]


def test_what_was_changed_behind_the_url_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(url)
    write(store.here / "a", FILES)
    store.push("a")
    store.bucket.write("a/paft.json", b"{}!")
    elsewhere(monkeypatch)
    with pytest.raises(MismatchError, match="not what was written there"):
        store.pull("a")
    assert not (store.here / "a").exists() and not list(store.here.rglob("*"))


@pytest.mark.parametrize("listed", [
    b"", b"[]", b'{"files": 1}', b'{"files": {"../../x": "%s"}}' % (b"0" * 64), b'{"files": {"x": "../../../etc/passwd"}}',
    b'{"files": {"/x": "%s"}}' % (b"0" * 64), b'{"files": {"x": 3}}'])
def test_a_hostile_list_is_refused(url: str, listed: bytes) -> None:
    store = Store(url)
    store.bucket.write(f"a/{LIST}", listed)
    with pytest.raises(MismatchError, match="not a list of files"):
        store.pull("a")
    assert not store.here.exists()


@given(data=st.binary(min_size=1, max_size=300), cut=st.tuples(st.integers(0, 300), st.integers(0, 300)))
@settings(max_examples=30, deadline=None)
def test_a_range_is_the_slice(data: bytes, cut: tuple[int, int]) -> None:
    bucket, (start, stop) = Bucket("memory://ranges"), sorted(min(each, len(data)) for each in cut)
    bucket.write("x", data)
    if start < stop:
        assert bucket.read("x", start, stop) == data[start:stop]
    assert bucket.read("x") == data and bucket.files()["x"].size == len(data)


def test_a_directory_behind_a_url_is_fetched_once_and_again_when_it_changes(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = Bucket(url)
    for name in ("config.json", "model.safetensors", "sub/notes.txt"):
        bucket.write(name, name.encode())
    found = fetched(url, ["*.json", "*.safetensors"])
    assert found.name == "bucket"
    assert files_in(found) == {"config.json": b"config.json", "model.safetensors": b"model.safetensors"}
    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "get", None)
        assert fetched(url, ["*.json", "*.safetensors"]) == found
    bucket.write("config.json", b"of another length")
    assert files_in(fetched(url, ["*.json"])) == {"config.json": b"of another length"}
    assert fetched(f"{url}/sub/notes.txt").read_bytes() == b"sub/notes.txt"


def test_an_adapter_by_its_url(tmp_path: Path, make_adapter: object, tiny_base: Path) -> None:
    adapter = make_adapter(tiny_base, 1)  # type: ignore[operator]
    one, two = read_adapter(f"file://{adapter}"), read_adapter(str(adapter))
    assert one.factors.keys() == two.factors.keys() and one.base_model == two.base_model


@pytest.mark.parametrize(("wrong", "kind"), [
    ("https://host/dir", UsageError), ("simplecache::s3://b/x", UsageError), ("s3://b/../x", UsageError),
    ("foo://b/x", UsageError), ("gs://bucket/x", ResourceError), ("memory://nothing-here", NotFoundError)])
def test_a_url_that_is_none_for_us(wrong: str, kind: type[PaftError]) -> None:
    with pytest.raises(kind):
        fetched(wrong)


def test_paths_and_hub_names_are_no_urls() -> None:
    assert not any(map(is_url, ("demo:a", "org/name@rev", "/a/b", "C:\\x", "s3:/x", "", "://x")))
    assert is_url("s3://b") and is_url("hf://buckets/org/name")
