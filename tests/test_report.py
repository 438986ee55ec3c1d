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
from typing import Any

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
    for line in ("| Revenue | €1,000.50 |", "| Refunds | €100.25 |", "| Net revenue | €900.25 |",
                 "| Returns | 3 |", "| Completed orders | 7 |"):  # fmt: skip
        assert line in page
    html = re.sub(r"<[^>]+>", " ", html_report([run], run))
    for figure in ("€1,000.50", "€100.25", "€900.25"):
        assert figure in html
    assert "$" not in html
    assert "  revenue €1,000.50 - €100.25 of 3 returns = €900.25 net" in list(run.summary())
    assert "Refunds" not in job_summary(report), "without any return there is nothing to show"
    assert "revenue: 1,000.50" in repr(dataclasses.replace(run, currency=None))
    assert "net revenue: -CHF 99.75" in repr(dataclasses.replace(run, currency="CHF", revenue=Decimal("0.50")))


def test_last_complete_week_is_compared_with_the_week_before(report: RunRecord) -> None:
    """In the week of 16 February there were no sales, and the week of the as-of date is incomplete."""
    figures = [
        ("2026-02-02", 9, "90.00", "0.00"), ("2026-02-09", 4, "200.00", "10.00"), ("2026-02-23", 5, "150.00", "30.00"),
        ("2026-03-02", 1, "20.00", "0.00"),
    ]  # fmt: skip
    weeks = [dict(zip(("week", "orders", "revenue", "refunds"), week, strict=True)) for week in figures]

    def page(weeks: list[dict[str, Any]]) -> str:
        run = dataclasses.replace(report, returns=3, refunds=Decimal("40.00"), summaries={"revenue_by_week": weeks})
        return " ".join(re.sub(r"<[^>]+>", " ", html_report([run], run)).split())

    text = "The week from 2026-02-23, compared with the week before: Revenue $150.00 Refunds $30.00 Net revenue $120.00"
    assert text + " Orders 5 All weeks together" in page(weeks), "the week before has no sales to compare with"
    weeks[2]["week"] = "2026-02-16"
    text = "Revenue $150.00 ▼ 25.0% Refunds $30.00 ▲ 200.0% Net revenue $120.00 ▼ 36.8% Orders 5 ▲ 25.0%"
    assert text in page([*weeks[:3]])
    assert "The week from 2026-02-09: Revenue $200.00 Refunds" in page(weeks[:2]), "the first week may be incomplete"
    for week in weeks:
        del week["refunds"]  # as in the record of an earlier release
    assert "Revenue $150.00 ▼ 25.0% Orders 5 ▲ 25.0%" in page(weeks[:3])


def test_report_says_that_conflicting_orders_are_left_out(report: RunRecord) -> None:
    conflicts = report.quality["transactions"].violations["transaction_id_conflict"]
    assert conflicts > 0
    assert f"⚠ {conflicts} rows of orders are not in these figures" in html_report([report], report)


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
