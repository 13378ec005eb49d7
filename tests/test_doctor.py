"""`paft doctor`: each thing that would fail is found, said with its remedy, and none of the checks can hang."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from clikit import Capture
from packaging.requirements import Requirement

from paft import doctor
from paft.cli import invoke


@pytest.mark.parametrize(
    ("need", "found", "known", "state"),
    [
        ("trl>=1.16", None, "1.16.0", "fail"),
        ("trl>=1.16", "1.15.9", "1.16.0", "fail"),
        ("trl>=1.16", "1.16.0", "1.16.0", "ok"),
        ("trl>=1.16", "1.16.7", "1.16.0", "ok"),  # a patch is no news
        ("trl>=1.16", "1.17.0", "1.16.0", "note"),
        ("trl>=1.16", "2.0.0", "1.16.0", "note"),
        ("torch>=2.11", "2.13.0+cu130", "2.13.0", "ok"),
        ("torch>=2.11", "2.14.0.dev20261101", "2.13.0", "note"),
        ("click", "9.0", None, "ok"),
    ],
)
def test_a_version_is_judged_by_floor_and_tested_version(need: str, found: str | None, known: str | None, state: str) -> None:
    finding = doctor.judge(Requirement(need), found, known)
    assert finding.state == state and bool(finding.do) == (state != "ok")


def test_the_tested_versions_cover_what_paft_requires() -> None:
    root = Path(__file__).resolve().parents[1]
    lines = (root / "pyproject.toml").read_text().split("dependencies = [")[1].split("]")[0].split('"')[1::2]
    needed = {doctor.normal(Requirement(line).name) for line in lines}
    assert needed <= doctor.tested().keys() and len(needed) > 10


def test_every_package_here_is_in_the_range() -> None:
    assert [finding.state for finding in doctor.packages()] == ["ok"]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: None if name == "peft" else real(name))
    [first, second] = doctor.packages()
    assert (first.state, second.state, second.name) == ("ok", "fail", "peft") and "pip install 'peft" in str(second.do)


def test_what_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken_native.py").write_text("raise OSError('libcudart.so: cannot open\\nshared object')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "LOADED", ("json", "broken_native"))
    [finding] = doctor.imports()
    assert (finding.state, finding.name) == ("fail", "broken_native") and finding.found.endswith("cannot open")


def test_no_answer_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    assert doctor.within(0.01, never.wait) == "no answer within 0 s"

    def refuse() -> int:
        raise OSError("Name or service not known")

    assert doctor.within(5, refuse) == "Name or service not known" and doctor.within(5, lambda: 200) == 200


@pytest.mark.parametrize(("status", "state"), [(200, "ok"), (401, "ok"), (502, "fail"), (407, "fail")])
def test_the_hub_is_asked_only_online(status: int, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    asked: list[str] = []

    def fetch(url: str) -> int:
        asked.append(url)
        return status

    assert doctor.hub(fetch).state == "ok" and not asked  # the tests run offline
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert doctor.hub(fetch).state == state and asked == [constants.ENDPOINT]


def test_a_disk_is_judged_by_room_and_by_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.disk("HF_HOME", tmp_path / "not" / "yet").state in ("ok", "note")
    assert list(tmp_path.iterdir()) == []
    assert doctor.disk("HF_HOME", Path("/proc/none")).state == "fail"
    monkeypatch.setattr(doctor, "ROOM", 1e18)
    assert doctor.disk("HF_HOME", tmp_path).state == "note"


def test_what_was_fetched_is_counted_once(tmp_path: Path) -> None:
    assert doctor.held(tmp_path / "none") == "" == doctor.held(tmp_path)
    with (tmp_path / "object").open("wb") as file:
        file.truncate(1 << 31)  # of which nothing is on the disk
    (tmp_path / "fetched").mkdir()
    (tmp_path / "fetched" / "model.safetensors").hardlink_to(tmp_path / "object")
    assert doctor.held(tmp_path).startswith(", 2.1 GB held")


def test_the_command_fits_the_terminal_and_says_what_next(capsys: Capture) -> None:
    assert invoke(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(len(line) < 80 or "/" in line for line in out.splitlines()) and out.endswith("next: paft run demo\n")
    assert invoke(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and {"python", "packages", "device", "memory", "HF_HOME", "hub"} <= {f["name"] for f in found["findings"]}


def test_what_would_fail_exits_5_with_its_remedy(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(doctor, "imports", lambda: [doctor.Finding("trl", "fail", "broken", "mend it")])
    assert invoke(["doctor"]) == 5
    out, err = capsys.readouterr()
    assert "FAIL" in out and "mend it" in out and err.startswith("error: trl would fail")
    assert invoke(["doctor", "--json"]) == 5
    assert json.loads(capsys.readouterr().out)["ok"] is False
