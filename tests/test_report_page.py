"""The commands' outputs: a page that needs nothing else and shows names as text, JSON as documented, figures, the probe."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from clikit import Capture, World, assert_one_error
from conftest import AdapterFactory
from test_report_interference import meet
from test_report_sparsity import block_sparse, gaussian, report

from paft.cli import invoke
from paft.report.page import interference_page, sparsity_page

SCHEMA = Path(__file__).resolve().parents[1] / "paft" / "report" / "SCHEMA.md"
ODD = "<script>alert('x')</script>&\"<b>"
VOID = {"meta", "br", "img", "link", "input", "hr", "use", "path", "rect"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; complains of tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [str(value) for key, value in attrs if key in ("src", "href", "xlink:href", "action")]
        assert not any(key.startswith("on") for key, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def checked(path: Path) -> Page:
    """A page without scripts and without anything from elsewhere, that is as wide as a phone."""
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert not re.search(r"url\((?!#)|@import", text)
    assert 'content="width=device-width' in text and "@media print" in text
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids)), "figures share names"
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', text)) <= set(ids), "a figure refers to what is not there"
    return page


def test_the_sparsity_page_stands_alone_and_shows_names_as_text(tmp_path: Path) -> None:
    reports = [report(gaussian, 2e-6), report(block_sparse, 1e-3)]
    object.__setattr__(reports[0], "name", ODD)
    page = checked(sparsity_page(reports, tmp_path / "deep" / "page.html", [f"{ODD}: {reports[0].verdict.sentence}"]))
    assert page.text.count(ODD) >= 4
    assert page.tags.count("svg") == 2 + len(reports) and page.tags.count("details") == 3 * len(reports)
    assert reports[0].verdict.sentence in page.text


def test_the_interference_page_stands_alone(tmp_path: Path) -> None:
    found = meet([gaussian(seed=i) for i in range(6)], [gaussian(seed=9 + i) for i in range(6)])
    object.__setattr__(found, "names", (ODD, "b"))
    page = checked(interference_page([found], tmp_path / "page.html", ["said"]))
    assert ODD in page.text and page.tags.count("svg") == 2


@pytest.fixture
def world(tiny_base: Path, make_adapter: AdapterFactory, tmp_path: Path) -> World:
    return World(tiny_base, make_adapter, tmp_path)


def keys(data: Any) -> set[str]:
    if isinstance(data, list):
        return set().union(*map(keys, data)) if data else set()
    if not isinstance(data, dict):
        return set()
    return set(data) | set().union(*map(keys, data.values())) if data else set()


@pytest.mark.parametrize("line", [["sparsity-report"], ["sparsity-report", "--fast"], ["interference"],
                                  ["interference", "--fast"]], ids=" ".join)
def test_every_key_of_the_json_is_documented(world: World, capsys: Capture, line: list[str]) -> None:
    assert invoke([*line, str(world.one), str(world.two), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    documented = SCHEMA.read_text(encoding="utf-8")
    head = {"sparsity-report": "sparsity", "sparsity-report --fast": "norms"}.get(" ".join(line), "interference")
    assert data[0]["kind"] == head
    assert f'`"kind": "{head}"`, `"schema": {data[0]["schema"]}`' in documented
    assert not {key for key in keys(data) if f"`{key}`" not in documented}


def test_the_figures_are_written_beside_the_table(world: World, capsys: Capture) -> None:
    for command, more in (("sparsity-report", "--sweep"), ("interference", "--by=layer")):
        page, figure = world.folder / f"{command}.html", world.folder / f"{command}.svg"
        assert invoke([command, str(world.one), str(world.two), more, "--html", str(page), "--plot", str(figure)]) == 0
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= 80 and "\n\n\n" not in out
        checked(page)
        assert figure.read_text().startswith("<?xml")


def test_directories_with_markup_in_their_names(world: World, capsys: Capture) -> None:
    odd = world.folder / "<b>[red]x"
    shutil.copytree(world.one, odd)
    assert invoke(["sparsity-report", str(odd), "--markdown"]) == 0
    assert "&lt;b>[red]x" in capsys.readouterr().out
    assert invoke(["sparsity-report", str(odd), "--html", str(world.folder / "x.html")]) == 0
    assert "<b>[red]x: dense" in capsys.readouterr().out
    assert "<b>[red]x" in checked(world.folder / "x.html").text


@pytest.mark.parametrize("more, said", [
    (["--plot", "x.gif"], "x.gif"), (["--fast", "--html", "x.html"], "--fast"), (["--probe", "data.jsonl"], "base"),
    (["--threshold", "-1"], "threshold"),
])  # fmt: skip
def test_wrong_options_are_refused_before_the_work(world: World, capsys: Capture, more: list[str], said: str) -> None:
    assert_one_error(capsys, invoke(["sparsity-report", str(world.one), *more]), 2, said)
    assert not Path("x.html").exists()


def test_the_probe_is_the_loss_of_the_merged_models(world: World, capsys: Capture) -> None:
    """On, half and double equal `paft eval` of merges with weights 1, 1/2 and 2; off is the base."""
    from paft.candidates import score
    from paft.merge.engine import merge

    line = ["sparsity-report", str(world.one), "--base", str(world.base), "--probe", str(world.chat), "--rows", "8", "--json"]
    assert invoke(line) == 0
    found = json.loads(capsys.readouterr().out)[0]["probe"]
    names = []
    for weight in (1.0, 0.5, 2.0):
        out = world.folder / f"merged-{weight}"
        merge([str(world.one)], base=str(world.base), method="task_arithmetic", parameters={}, weights=[weight], out=out)
        names.append(str(out))
    rows = score(names, base=str(world.base), sft_data=str(world.chat), pref_data=None, text=None, beta=0.1, generate=0, rows=8,
                 batch_size=16, quiet=True)
    wanted = dict(zip(("off", "on", "half", "double"), (row["sft_loss"] for row in rows), strict=True))
    for state, loss in wanted.items():
        assert found["losses"][state] == pytest.approx(loss, abs=2e-5)
    assert 0.3 < found["kept"] < 0.6 and found["losses"]["pruned"] not in wanted.values()
    assert found["gain"] == pytest.approx(wanted["off"] - wanted["on"], abs=4e-5)


def test_the_probe_takes_preferences_and_tells_of_an_adapter_that_does_nothing(world: World, capsys: Capture) -> None:
    from safetensors.torch import load_file, save_file

    file = world.one / "adapter_model.safetensors"
    save_file({key: tensor * 1e-3 for key, tensor in load_file(file).items()}, file, {"format": "pt"})
    line = ["sparsity-report", str(world.one), "--base", str(world.base), "--probe", str(world.pairs), "--rows", "8"]
    assert invoke(line) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "dpo_loss" in out and "off 0.693" in out and "next to nothing" in out
