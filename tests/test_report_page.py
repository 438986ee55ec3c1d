"""report.html, in a real browser: what it shows, that it asks for nothing, and that it can be read anywhere."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pytest
from conftest import one

from data_pipeline import (
    DataPipelineConfig,
    RunRecord,
    Store,
    anomalies,
    html_report,
    save_report,
    tables,
    write_atomic,
)

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
# Where to leave pictures of the page, to look at.
SCREENSHOTS = os.environ.get("SCREENSHOTS")


def history(report: RunRecord, *others: dict[str, Any]) -> list[dict[str, Any]]:
    """The files of a few runs' records, the real one first, the others with other values."""
    first = json.loads(report.to_json())
    return [first, *(first | {"run_id": f"20990101T00000{n}Z-0000"} | other for n, other in enumerate(others))]


def as_read(record: dict[str, Any]) -> RunRecord:
    return RunRecord.from_json(json.dumps(record))


def save(store: Store, record: dict[str, Any]) -> None:
    write_atomic(store.runs.path(record["run_id"]), json.dumps(record))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not BROWSER:
        pytest.skip("needs Chromium (Debian: apt install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        browser = playwright.chromium.launch(executable_path=BROWSER, args=options)
        yield browser
        browser.close()


@pytest.fixture(params=[("light", 1280), ("dark", 1280), ("light", 390), ("dark", 390)], ids=lambda p: f"{p[0]}-{p[1]}")
def page(request: pytest.FixtureRequest, browser: Any, report: RunRecord, config: DataPipelineConfig) -> Iterator[Any]:
    """The report of the run, opened offline; what the browser complained about or asked for is noted."""
    scheme, width = request.param
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900}, offline=True)
    page = context.new_page()
    page.complaints, page.requests = [], []
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("request", lambda asked: page.requests.append(asked.url))
    page.goto(Path(config.data_dir, "report.html").as_uri())
    yield page
    if SCREENSHOTS:
        page.screenshot(path=Path(SCREENSHOTS, f"report-{scheme}-{width}.png"), full_page=True)
    context.close()


# Relative luminance and contrast by WCAG 2.1; the first background that is not transparent counts.
CONTRAST = """() => {
    const rgb = text => text.match(/[\\d.]+/g).map(Number);
    const luminance = ([r, g, b]) => [r, g, b].map(c => c / 255)
        .map(c => c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
    const ground = node => { const c = rgb(getComputedStyle(node).backgroundColor);
        return c.length == 4 && c[3] == 0 && node.parentElement ? ground(node.parentElement) : c };
    const found = [];
    for (const node of document.querySelectorAll("body *")) {
        const text = [...node.childNodes].some(n => n.nodeType == 3 && n.textContent.trim());
        const bar = node.tagName == "I";
        if (!text && !bar) continue;
        const style = getComputedStyle(node);
        const one = luminance(rgb(bar ? style.backgroundColor : style.color));
        const other = luminance(ground(bar ? node.parentElement : node));
        const ratio = (Math.max(one, other) + .05) / (Math.min(one, other) + .05);
        if (ratio < (bar ? 3 : 4.5)) found.push(node.textContent.trim().slice(0, 40) + " " + ratio.toFixed(2));
    }
    return found;
}"""


def test_page_in_the_browser(
    page: Any, report: RunRecord, config: DataPipelineConfig, db: duckdb.DuckDBPyConnection
) -> None:
    assert page.complaints == []
    assert page.requests == [page.url, "data:,"] or page.requests == [page.url]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wider than the screen"
    wide = "[...document.querySelectorAll('.card')].filter(c => c.scrollWidth > c.clientWidth).map(c => c.innerText)"
    assert page.evaluate(wide) == [], "wider than its card"
    assert page.evaluate(CONTRAST) == []
    for bar in page.locator("table.bars i").all():
        assert bar.bounding_box()["height"] > 5
    for figure in page.locator("figure svg").all():
        box = figure.bounding_box()
        assert box["width"] > 200 and box["height"] > 50
        assert len(figure.locator("polyline").get_attribute("points").split()) > 1
    longest = page.locator("table.bars").first.locator("i").first.bounding_box()["width"]
    second = page.locator("table.bars").first.locator("i").nth(1).bounding_box()["width"]
    revenues = db.sql("SELECT total_revenue::DOUBLE FROM category_analytics ORDER BY 1 DESC").fetchall()
    assert second / longest == pytest.approx(revenues[1][0] / revenues[0][0], abs=0.05)


def test_print_from_a_dark_screen_is_dark_on_white(browser: Any, report: RunRecord, config: DataPipelineConfig) -> None:
    page = browser.new_page(color_scheme="dark", viewport={"width": 700, "height": 1000})
    page.goto(Path(config.data_dir, "report.html").as_uri())
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate(CONTRAST) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wider than the paper"
    page.close()


def figures(page: Any, caption: str) -> list[list[str]]:
    """The rows of the table with the caption, the bars left out."""
    rows = page.locator("table", has=page.locator("caption", has_text=caption)).first.locator("tbody tr").all()
    return [row.locator("th, td:not([aria-hidden])").all_inner_texts() for row in rows]


def test_figures_equal_gold(
    browser: Any, report: RunRecord, config: DataPipelineConfig, db: duckdb.DuckDBPyConnection
) -> None:
    page = browser.new_page()
    page.goto(Path(config.data_dir, "report.html").as_uri())

    def expected(query: str) -> list[list[str]]:
        return [list(map(str, row)) for row in db.sql(query).fetchall()]

    dollars = "format('${{:,}}.{{:02}}', (100 * {0})::BIGINT // 100, (100 * {0})::BIGINT % 100)"
    count, percent = "format('{{:,}}', ({})::BIGINT)", "format('{{:.1f}}%', 100 * {})"
    assert figures(page, "Revenue by category") == expected(
        f"SELECT product_category, {dollars.format('total_revenue')}, {percent.format('revenue_share')}"
        " FROM category_analytics ORDER BY total_revenue DESC"
    )
    assert sorted(figures(page, "Customers and revenue by segment")) == sorted(
        expected(
            f"SELECT customer_segment, {count.format('count(*)')}, {dollars.format('sum(total_spent)')}"
            " FROM customers_enriched GROUP BY ALL"
        )
    )
    assert figures(page, "Leading cities") == expected(
        f"SELECT city, {count.format('sum(customer_count)')}, {dollars.format('sum(segment_revenue)')}"
        " FROM customer_analytics GROUP BY ALL ORDER BY sum(segment_revenue) DESC, city LIMIT 10"
    )
    assert figures(page, "Stock by category") == expected(
        f"SELECT category, {count.format('sum(stock_quantity)')}, {dollars.format('sum(inventory_value)')}"
        " FROM products_active GROUP BY ALL ORDER BY sum(inventory_value) DESC"
    )
    *weeks, (running, so_far) = db.sql(
        "SELECT date_trunc('week', transaction_date)::DATE::VARCHAR, sum(amount) FROM transactions_clean"
        " GROUP BY ALL ORDER BY 1"
    ).fetchall()
    week = page.locator("section", has=page.locator("figcaption", has_text="Revenue by week"))
    week.locator("summary").click()
    shown = [[row.locator("th").inner_text(), row.locator("td").inner_text()] for row in week.locator("tbody tr").all()]
    assert shown == [[monday, f"${revenue:,.2f}"] for monday, revenue in weeks]
    assert running == "2026-03-02", "the as-of date is the Wednesday after"
    assert week.locator("p.now").inner_text().startswith(f"${weeks[-1][1]:,.2f}"), "the last week that was over"
    assert f"The week from {running} was not over: ${so_far:,.2f} so far" in week.inner_text()
    assert page.locator("section figcaption, section caption").first.inner_text() == "Revenue by week"
    methods = {row[0] for row in figures(page, "Payment methods")}
    assert {"Credit card", "Paypal"} < methods
    assert figures(page, "Devices and browsers")[0][0] == "Mobile, Chrome"
    refused = one(db, "SELECT count(*) FROM quarantine_transactions WHERE list_contains(_reasons, 'amount_missing')")
    assert ["transactions: amount_missing", str(refused)] in figures(page, "Quarantined rows by reason")
    page.close()


def test_page_is_small_and_whole(report: RunRecord, config: DataPipelineConfig) -> None:
    text = Path(config.data_dir, "report.html").read_text(encoding="utf-8")
    assert len(text) < 150_000
    for name in ("<script", "src=", "url(", "@import"):
        assert name not in text
    for table in tables("bronze"):
        assert f"Completeness of {table.name}" in text


def test_title(report: RunRecord) -> None:
    assert "<h1>EcommerceDataPipeline</h1>" in html_report([report], report)
    named = dataclasses.replace(report, config={**report.config, "report_title": "Ada's <shop>"})
    assert "<h1>Ada&#39;s &lt;shop&gt;</h1>" in html_report([named], named)


@pytest.mark.parametrize("result", ["succeeded", "running"])
def test_notebook_shows_a_few_figures(report: RunRecord, result: str) -> None:
    """Of a run that has not got to its figures, too."""
    begun = RunRecord(report.run_id, report.started_at, "/data/<shop>", report.config, report.versions)
    record = report if result == "succeeded" else begun
    assert len(repr(record)) < 400
    assert f" {result}, as of: 2026-03-04, rows received: {record.received:,}, " in repr(record)
    if result == "succeeded":
        assert f"revenue: ${report.revenue:,}" in repr(record)


@pytest.mark.parametrize("width", [360, 1280])
def test_figures_of_tiles_are_on_one_line(browser: Any, report: RunRecord, width: int, tmp_path: Path) -> None:
    """Amounts of a large shop in another currency, and a source with a long name."""
    large = dataclasses.replace(
        report, revenue=Decimal("998904754.30"), refunds=Decimal("10904754.30"), returns=23_456, currency="CHF",
        delivery={"orders_of_the_shop_in_zurich": {"files": 3, "rows": 9, "bytes": 12_345_678_901, "left_out": []}},
    )  # fmt: skip
    path = tmp_path / "report.html"
    path.write_text(html_report([large], large), encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(path.as_uri())
    tiles = page.locator(".facts dd").all()
    assert "CHF 998,904,754.30" in [tile.inner_text() for tile in tiles]
    for tile in tiles:
        lines = tile.evaluate("e => { const r = document.createRange(); r.selectNodeContents(e);"
                              " return new Set([...r.getClientRects()].map(b => b.top)).size }")  # fmt: skip
        assert lines <= 1, tile.inner_text()
    assert page.evaluate("[...document.querySelectorAll('.facts > div')].every(e => e.scrollWidth <= e.clientWidth)")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wider than the screen"
    if SCREENSHOTS:
        page.screenshot(path=Path(SCREENSHOTS, f"tiles-{width}.png"), full_page=True)
    page.close()


def test_failed_run_shows_what_is_published(report: RunRecord) -> None:
    error = {"type": "NotPublishedError", "message": "GATE <b>MISSED</b>", "traceback": ""}
    failed = {
        "result": "refused",
        "error": error,
        "quality": {},
        "profile": {},
        "rows": {},
        "previews": {},
        "revenue": None,
    }
    records = [as_read(record) for record in history(report, failed)]
    page = html_report(records, records[0])
    assert "GATE &lt;b&gt;MISSED&lt;/b&gt;" in page, "what was in the data is text"
    assert f"Published is run {report.run_id}" in page
    assert "Revenue by category" in page
    assert "Revenue by category" not in html_report(records[1:], None)


@pytest.mark.parametrize("lacks", [field.name for field in dataclasses.fields(RunRecord)][6:])
def test_records_of_an_older_version(
    report: RunRecord, tmp_path: Path, caplog: pytest.LogCaptureFixture, lacks: str
) -> None:
    """What an older record lacks is left out of the page; as the last one, and as the published one."""
    store = Store(str(tmp_path))
    os.makedirs(store.path("runs"))
    older, newer = history(report, {})
    for record in (older, newer) if lacks not in ("result", "rows") else ():
        del record[lacks]
    for record in (older, newer):
        os.makedirs(store.path("snapshots", record["run_id"]))
        save(store, record)
        store.switch_to(record["run_id"])
        save_report(store, store.runs.history())
    assert caplog.text == ""
    assert newer["run_id"] in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "data_pipeline_last_run_result" in (tmp_path / "metrics.prom").read_text()
    assert anomalies(report, [as_read(older)] * 3, factor=2.0) == []


def test_record_of_version_1_is_read_by_its_own_names(report: RunRecord, tmp_path: Path) -> None:
    """A run that an earlier release has recorded counts for trends, anomalies and the report."""
    store = Store(str(tmp_path))
    os.makedirs(store.path("runs"))
    today, _ = history(report, {})
    names = {
        "current_step": "at", "started_after": "offsets", "previews": "highlights", "gate_failures": "missed",
        "accepted": "kept", "violations": "failed",
    }  # fmt: skip
    older = {names.get(name, name): value for name, value in today.items()} | {"schema_version": 1}
    older["quality"] = {
        table: {names.get(name, name): value for name, value in found.items()}
        for table, found in today["quality"].items()
    }
    assert {"at", "offsets", "highlights", "missed"} < set(older) and "kept" in older["quality"]["customers"]
    save(store, older)
    assert store.runs.history() == [as_read(today)]
    save_report(store, store.runs.history())
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"{report.quality['transactions'].accepted:,} accepted" in page
    assert "rule_failing_rows" in (tmp_path / "metrics.prom").read_text()


def test_thirty_runs(report: RunRecord, tmp_path: Path) -> None:
    """The page of a long history is as long as that of thirty runs, and keeps the last of them."""
    store = Store(str(tmp_path))
    os.makedirs(store.path("runs"))
    [record] = history(report)
    for n in range(50):
        run_id, started = f"209901{n // 24 + 1:02}T{n % 24:02}0000Z-0000", f"2099-01-{n // 24 + 1:02}T{n % 24:02}:00:00"
        save(store, record | {"run_id": run_id, "started_at": started})
    save_report(store, store.runs.history())
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "2099-01-03 01:00" in page
    assert "2099-01-01 20:00" in page
    assert "2099-01-01 19:00" not in page
