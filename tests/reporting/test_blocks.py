"""Blocks as Markdown: nothing in a text is taken for markup, and a table stays a table."""

from harmful_unlearn.reporting.blocks import code, plain, table
from harmful_unlearn.reporting.report import write_report
from tests.helpers.comparisons import cells, lean, report_text


def test_tables_survive_pipes_and_newlines(undrawn, tmp_path):
    piped = lean()
    piped.methods["ft"]["label"] = "F|T\nnew"
    write_report(piped, tmp_path)
    rows = cells(report_text(tmp_path), "Results")
    assert rows[3][0] == "F\\|T<br>new" and len({len(row) for row in rows}) == 1


def test_code_closes_only_where_it_ends(undrawn, tmp_path):
    write_report(lean(command="a ``` b"), tmp_path)
    assert "````\na ``` b\n````" in report_text(tmp_path)
    assert code("title", "plain").markdown == "**title**\n\n```\nplain\n```\n"


def test_plain_text_has_no_markup_of_its_own():
    assert plain(" *a*_b_ `c` [d](e) ~f~ $g$ \\h\n<i> & ") == (
        "\\*a\\*\\_b\\_ \\`c\\` \\[d\\](e) \\~f\\~ \\$g\\$ \\\\h<br>&lt;i&gt; &amp;"
    )


def test_a_table_without_a_name_has_no_csv():
    assert table(None, ["what"], [["it"]]).files == {}
    assert table("facts", ["what"], [["it"]]).files == {"facts.csv": "what\nit\n"}
