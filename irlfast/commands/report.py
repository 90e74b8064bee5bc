"""``irlfast report``: a page of a run for a person to read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from irlfast.reporting import write_report


@dataclass(frozen=True, kw_only=True)
class ReportCommand:
    """Write one self-contained HTML page of a run: curves, warnings, reward histograms, best and worst samples."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run, finished or not."""
    output: Path | None = None
    """Where to write the page; by default report.html in that folder."""


def run_report(command: ReportCommand) -> int:
    """Write the page and say where it is."""
    page = command.output or command.run / "report.html"
    write_report(command.run, page)
    print(f"The report is {page}")
    return 0
