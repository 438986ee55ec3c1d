"""What GitHub Actions is told of a run: the page and the annotations."""

from __future__ import annotations

import ast
import dataclasses
import errno
import logging
import os
import re
import sys
from decimal import Decimal
from pathlib import Path

import duckdb
import pytest
from conftest import one

import data_pipeline
from data_pipeline import (
    GOLD,
    PREVIEW_ROWS,
    Annotations,
    RunRecord,
    html_report,
    job_summary,
    logger,
    tables,
)


def test_record_holds_the_first_rows_of_gold(report: RunRecord, db: duckdb.DuckDBPyConnection) -> None:
    assert report.revenue == one(db, "SELECT sum(amount) FROM transactions_clean")
    for table in tables(GOLD):
        expected = db.sql(f"FROM {table.name} LIMIT {PREVIEW_ROWS}")
        found = report.previews[table.name]
        assert [list(map(str, row.values())) for row in found] == [
            [str(value) for value in row] for row in expected.fetchall()
        ]
        assert list(found[0]) == expected.columns


def test_page_of_a_good_run(report: RunRecord, db: duckdb.DuckDBPyConnection) -> None:
    page = job_summary(report)
    assert f"## ✅ Pipeline run {report.run_id}: succeeded" in page
    assert f"| Revenue | \\${one(db, 'SELECT sum(amount) FROM transactions_clean'):,} |" in page
    for category, revenue in db.sql("SELECT product_category, total_revenue FROM category_analytics").fetchall():
        assert f'    "{category}" : {revenue}\n' in page
    for name, rows in report.rows.items():
        assert f"| {name.replace('_', chr(92) + '_')} | {rows:,} |" in page
    quality = report.quality["transactions"]
    assert f"| transactions | {quality.received:,} | {quality.accepted:,} | {quality.quarantined:,} | " in page


def test_returns_are_shown_beside_the_revenue_in_its_currency(report: RunRecord) -> None:
    run = dataclasses.replace(
        report, revenue=Decimal("1000.50"), returns=3, refunds=Decimal("100.25"), currency="EUR", orders=7
    )
    page = job_summary(run)
    for line in ("| Revenue | EUR 1,000.50 |", "| Refunds | EUR 100.25 |", "| Net revenue | EUR 900.25 |",
                 "| Returns | 3 |", "| Completed orders | 7 |"):  # fmt: skip
        assert line in page
    html = re.sub(r"<[^>]+>", " ", html_report([run], run))
    for figure in ("EUR 1,000.50", "EUR 100.25", "EUR 900.25"):
        assert figure in html
    assert "$" not in html
    assert "  revenue EUR 1,000.50 - EUR 100.25 of 3 returns = EUR 900.25 net" in list(run.summary())
    assert "Refunds" not in job_summary(report), "without any return there is nothing to show"
    assert "revenue: 1,000.50" in repr(dataclasses.replace(run, currency=None))


def test_page_of_a_run_that_failed_at_once(report: RunRecord) -> None:
    failed = RunRecord(report.run_id, report.started_at, report.data_dir, report.config, report.versions)
    failed = dataclasses.replace(failed, result="failed", seconds={"total": 1.0})
    failed.error = {"type": "OSError", "message": "a | b\n<img src=x> @all", "traceback": ""}
    page = job_summary(failed)
    assert f"## ❌ Pipeline run {report.run_id}: failed" in page
    assert "a \\| b \\<img src=x\\> \\@all" in page, "no value can become markup"
    assert "| table |" not in page


def test_folder_with_a_backtick_does_not_become_markup(report: RunRecord) -> None:
    page = job_summary(dataclasses.replace(report, data_dir="/srv/`<img src=x>`"))
    assert "/srv/\\`\\<img src=x\\>\\`" in page


def test_page_takes_any_category(report: RunRecord) -> None:
    odd = {"product_category": 'Toys "R" #1; 50 % | <b>', "total_revenue": Decimal("1.00"), "revenue_share": 1.0}
    page = job_summary(dataclasses.replace(report, previews={"category_analytics": [odd]}))
    assert '    "Toys  R   1  50 % | <b>" : 1.00\n' in page
    assert 'Toys "R" \\#1; 50 % \\| \\<b\\>, 100.0% of the revenue' in page


def test_annotations(capsys: pytest.CaptureFixture[str]) -> None:
    handler = Annotations(logging.WARNING)
    logger.addHandler(handler)
    try:
        logger.info("nothing to see")
        logger.warning("100 %\nof it")
        try:
            raise ValueError("first\nsecond")
        except ValueError:
            logger.error("It failed", exc_info=sys.exc_info())
    finally:
        logger.removeHandler(handler)
    assert capsys.readouterr().out == "::warning::100 %25%0Aof it\n::error::It failed: ValueError: first\n"


def test_operations_quotes_the_messages_that_there_are() -> None:
    """Each message of the troubleshooting table is one of the pipeline's or of the deployment's."""
    project = Path(data_pipeline.__file__).parent
    code = ast.parse((project / "data_pipeline.py").read_text())
    strings = [node.value for node in ast.walk(code) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    said = "\n".join(strings) + (project / ".github/deploy.sh").read_text() + os.strerror(errno.EACCES)
    table = (
        (project / "docs/operations.md")
        .read_text()
        .partition("| message | what to do |\n|---|---|\n")[2]
        .partition("\n\n")[0]
    )
    messages = re.findall(r"^\| `(.+?)` \|", table, re.MULTILINE)
    assert len(messages) > 15
    for message in messages:
        for part in message.split("…"):
            assert part.strip(": ") in said, message
