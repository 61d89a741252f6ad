"""Pages about what was judged: one run, or several beside each other. All are views of a `Judgement` and its tables."""

from perturbjax.report.index import write_reports
from perturbjax.report.run import REPORT, write_report

__all__ = ["REPORT", "write_report", "write_reports"]
