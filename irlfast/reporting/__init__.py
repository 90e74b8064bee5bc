"""A run as one page: read its folder, draw its curves and histograms, colour its samples."""

from .page import render_report, write_report
from .run import Run, read_run

__all__ = ["Run", "read_run", "render_report", "write_report"]
