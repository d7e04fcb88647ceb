"""Draw the figures of scans, sweeps and comparisons; the only modules that import matplotlib.

    sheet.py           the sheet, its style and the marks
    scan_figure.py     a scan
    curve_figures.py   a sweep, a comparison

Importing the package does not load matplotlib.
"""

from swsurgery.scanning.figures.curve_figures import plot_comparison, plot_sweep
from swsurgery.scanning.figures.scan_figure import plot_scan
from swsurgery.scanning.figures.sheet import check_figure_path

__all__ = ["check_figure_path", "plot_comparison", "plot_scan", "plot_sweep"]
