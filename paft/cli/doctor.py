"""`paft doctor`."""

from __future__ import annotations

from typing import Any

import click

from paft.cli import options
from paft.errors import ResourceError


@click.command()
@options.common
def doctor(as_json: bool, **_: Any) -> None:
    """Check this machine: versions, GPU, disk, hub.

    Says what to do about what it finds; exit code 5 if something would fail.
    """
    from paft.models import quiet_libraries

    quiet_libraries()
    from paft.doctor import examine, report

    findings = examine()
    rows = [(each.state.upper() if each.state == "fail" else each.state, each.name, each.found) for each in findings]
    remedies = {each.name: each.do for each in findings if each.do}
    lines = options.hang(rows)
    if remedies:
        lines += ["", "what to do:", *options.hang([(f"  {name}", do) for name, do in remedies.items()])]
    failed = [each.name for each in findings if each.state == "fail"]
    options.show(report(findings), lines if failed else [*lines, "", "next: paft run demo"], as_json=as_json)
    if failed:
        raise ResourceError(f"{', '.join(failed)} would fail")
