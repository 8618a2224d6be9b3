"""The run's report: tables, charts and moving clips in one self-contained page."""

from archipel.report.stage import report

__all__ = ["report"]
