"""A report of three seeds, shared by the tests of this folder."""

import pytest

from harmful_unlearn.reporting import plots
from harmful_unlearn.reporting.report import write_report
from tests.helpers.comparisons import comparison, report_text


@pytest.fixture(scope="package")
def three(tmp_path_factory):
    """The report's folder."""
    folder = tmp_path_factory.mktemp("three")
    write_report(comparison(), folder)
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures without content: drawing them takes most of a report's time."""
    monkeypatch.setattr(plots, "_svg", lambda figure: '<svg height="1pt"></svg>')


@pytest.fixture(scope="package")
def text(three):
    return report_text(three)
