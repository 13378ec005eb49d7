"""Names become directories: a path first, then the demo, then the hub, and every miss says what to do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import errors as hub_errors

from paft import hub
from paft.errors import MismatchError, NotFoundError, PaftError, UsageError


def test_a_directory_wins_over_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "org/name", "with@sign"):
        Path(name).mkdir(parents=True)
        assert hub.resolve(name) == Path(name)
        assert hub.split_revision(name) == (name, None)


def test_the_demo_bases_have_names() -> None:
    bases = hub.demo_bases()
    assert hub.resolve("demo") == bases["demo:a"] and (bases["demo:a"] / "config.json").is_file()
    with pytest.raises(UsageError) as caught:
        hub.resolve("demo:aa")
    assert "demo:a" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("name", "parts"),
    [("org/name", ("org/name", None)), ("org/name@v1.0", ("org/name", "v1.0")), ("gpt2@0123abc", ("gpt2", "0123abc"))],
)
def test_a_revision_follows_the_at_sign(name: str, parts: tuple[str, str | None]) -> None:
    assert hub.split_revision(name) == parts


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(MismatchError, match="is a file"):
        hub.resolve(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("name", ["./none", "/none/at/all", "../x", "a/b/c", "~none", "a b", "-x/y", "a..b", "a--b", "org/"])
def test_what_can_be_no_hub_id_is_not_asked_for(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFoundError) as caught:
        hub.resolve(name)
    assert "check the path" in (caught.value.hint or "")


def test_offline_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(NotFoundError, match="HF_HUB_OFFLINE is set"):
        hub.resolve("no-such-org/no-such-model")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (hub_errors.GatedRepoError, "is gated"),
        (hub_errors.RepositoryNotFoundError, "that you may read"),
        (hub_errors.RevisionNotFoundError, "no revision 'v9'"),
        (hub_errors.HfHubHTTPError, "500"),
    ],
)
def test_what_the_hub_answers_becomes_one_line(error: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    response = SimpleNamespace(headers={}, request=None)  # whatever HTTP library the hub's client uses this year

    def fail(*_: object, **__: object) -> None:
        raise error("500 Server Error\n\nmore lines", response=response)  # type: ignore[call-arg]

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(PaftError) as caught:
        hub.resolve("org/name@v9")
    assert isinstance(caught.value, NotFoundError) and said in caught.value.message and "\n" not in caught.value.message
