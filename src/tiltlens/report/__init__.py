"""Run folder -> one HTML page, its figures and a grid of its images."""

from tiltlens.report import figures
from tiltlens.report.answers import find_warnings
from tiltlens.report.image_grid import grid
from tiltlens.report.page import write_report
from tiltlens.report.unit_run import UnitRun, read_units

__all__ = ["UnitRun", "figures", "find_warnings", "grid", "read_units", "write_report"]
