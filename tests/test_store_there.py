"""A model that workers put behind a URL, without workers: what stays there after each way that it can end."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from paft.errors import MismatchError, ResourceError
from paft.merge.spread import There
from paft.store import NOTE, Bucket, Store, lease
from paft.store.artefacts import LIST
from paft.store.bucket import Blob
from paft.target import claim

pytestmark = pytest.mark.usefixtures("cache", "impatient")
FILE, SHA = "model-1.safetensors", "0" * 64


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"file://{tmp_path}/bucket/out")


def one(there: There, scratch: Path) -> None:
    """A worker has finished a file."""
    there.store.bucket.write(FILE, b"weights")
    (scratch.parent / "shards.json").write_text("{}")
    there.put(FILE, SHA, scratch.parent / "shards.json")
    (scratch / "config.json").write_text("{}")


@pytest.mark.parametrize(("error", "told"), [
    (OSError(errno.ENOSPC, "No space left on device"), ResourceError), (ResourceError("the network is away"), ResourceError),
    (KeyboardInterrupt(), KeyboardInterrupt), (PermissionError("the credentials are old"), PermissionError)])
def test_finished_files_stay_for_resume(error: BaseException, told: type[BaseException], store: Store) -> None:
    there = There(store)
    with pytest.raises(told) as caught, there.making(overwrite=False, resume=True) as scratch:
        one(there, scratch)
        raise error
    assert sorted(store.bucket.files()) == [".work/shards.json", ".work/there.json", FILE]
    assert not isinstance(error, KeyboardInterrupt) or "is kept there" in str(caught.value.args[0])
    again = There(store)
    with again.making(overwrite=False, resume=True) as scratch:
        assert again.standing()(FILE) and not again.standing()("model-2.safetensors")
        (scratch / "config.json").write_text("{}")
    assert sorted(store.bucket.files()) == [LIST, "config.json", FILE]


@pytest.mark.parametrize(("error", "resume"), [(MismatchError("the base has changed"), True), (KeyboardInterrupt(), False),
                                               (ResourceError("disk full"), False)])
def test_else_nothing_stays(error: BaseException, resume: bool, store: Store) -> None:
    there = There(store)
    with pytest.raises(type(error)), there.making(overwrite=False, resume=resume) as scratch:
        one(there, scratch)
        raise error
    assert not store.bucket.files() and not store.here.exists()


def test_a_driver_that_died_before_the_first_file_is_followed(store: Store) -> None:
    store.bucket.write(NOTE, b'{"id": "the dead"}')
    store.bucket.write(".work/shards.json", b"{}")  # the first that is written
    store.bucket.write(".work/logs/model-1.log", b"")
    store.bucket.write("model-1.safetensors", b"hal")
    with There(store).making(overwrite=False, resume=True):
        pass
    with pytest.raises(MismatchError, match="not empty"), There(store).making(overwrite=False, resume=False):
        raise AssertionError


def test_an_error_at_the_end_loses_no_record(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Bucket.put

    def put(self: Bucket, file: Path, name: str) -> None:
        if name == "config.json":
            raise ResourceError("the network is away")
        real(self, file, name)

    there = There(store)
    with monkeypatch.context() as patch, pytest.raises(ResourceError), there.making(overwrite=False, resume=True) as scratch:
        one(there, scratch)
        patch.setattr(Bucket, "put", put)
    assert FILE in store.bucket.files() and store.bucket.inside(".work").has("shards.json") and not there.is_whole()
    with There(store).making(overwrite=False, resume=True) as scratch:
        (scratch / "config.json").write_text("{}")
    assert There(store).is_whole()


def test_what_another_driver_has_there_is_let_alone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 60.0)  # it is found out at the end, and no renewal writes over the other's note
    there = There(store)
    with pytest.raises(MismatchError, match="the other"), there.making(overwrite=False, resume=False) as scratch:
        one(there, scratch)
        store.bucket.write(NOTE, b'{"id": "x", "who": "the other"}')
        raise OSError("a disk is broken")
    assert FILE in store.bucket.files()
    store.bucket.remove(NOTE)
    with claim(store.here / "model"), pytest.raises(MismatchError), There(store).making(overwrite=False, resume=True):
        raise AssertionError
    assert FILE in store.bucket.files()


def test_a_large_model_is_not_fetched_to_be_checked(store: Store, tmp_path: Path) -> None:
    there = There(store, {FILE: (SHA, 140 << 30, "key")})
    assert there.check(tmp_path, None) is None and not list(tmp_path.iterdir())


def test_one_file_is_told_as_all_are(store: Store) -> None:
    store.bucket.write("a/b", b"123")
    assert store.bucket.about("a/b") == store.bucket.files()["a/b"] and store.bucket.about("a/b") != Blob(3, "")
