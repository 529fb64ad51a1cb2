"""Pages and pictures of a run: ``write_report(run_dir)`` makes ``report.html``, ``write_samples`` the samples."""

from unit_fast.report.html import write_report
from unit_fast.report.predictions import write_samples

__all__ = ["write_report", "write_samples"]
