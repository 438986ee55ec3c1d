"""What shops export: each kind gives the figures that a person works out by hand, or one line that says what to do."""

from __future__ import annotations

import gzip
import io
import re
import zipfile
from collections.abc import Callable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from conftest import THOROUGH, one, open_tables
from pyspark.sql import SparkSession

from data_pipeline import (
    ConfigurationError,
    DataPipelineConfig,
    NotPublishedError,
    RunRecord,
    open_source,
    run_pipeline,
)

HEADER = "transaction_id,customer_id,product_id,quantity,amount,timestamp,payment_method,status"
CUSTOMERS = "customer_id,first_name,last_name\n1,Ann,Lee\n2,Bo,Kim\n"
PRODUCTS = "product_id,product_name,category\nlamp,Lamp,Home\nkite,Kite,Toys\nmug,Mug,Kitchen\n"
# Two orders of several lines and one of a single line: 2 × 20.00 + 45.00 + 9.00, 18.00 + 36.80, 18.00.
LINES = [
    "1001,1,lamp,2,40.00,2026-01-05 10:00:00,Cash,completed",
    "1001,1,kite,1,45.00,2026-01-05 10:00:00,Cash,completed",
    "1001,1,mug,1,9.00,2026-01-05 10:00:00,Cash,completed",
    "1002,2,mug,2,18.00,2026-01-06 11:00:00,card,completed",
    "1002,2,kite,1,36.80,2026-01-06 11:00:00,card,completed",
    "1003,1,mug,2,18.00,2026-01-07 12:00:00,card,completed",
]
REVENUE = Decimal("166.80")
LINES_MODEL = """
    SELECT concat(transaction_id, '/', product_id) AS transaction_id, transaction_id AS order_id, customer_id,
        product_id, quantity, amount, timestamp, payment_method, status, _delivery, _source_file, _source_row
    FROM transactions"""


def csv_of(*lines: str, header: str = HEADER) -> str:
    return "\n".join([header, *lines, ""])


@pytest.fixture
def published_from(
    small: Callable[..., DataPipelineConfig], spark: SparkSession, tmp_path: Path
) -> Callable[..., RunRecord]:
    """Publishes what these files hold, with a good list of customers and of products besides."""

    def run(files: Mapping[str, str | bytes], **values: Any) -> RunRecord:
        for name, content in {"customers.csv": CUSTOMERS, "products.csv": PRODUCTS, **files}.items():
            path = tmp_path / "exports" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        folders = {"source_dir": str(tmp_path / "exports"), "data_dir": str(tmp_path / "data")}
        return run_pipeline(small(**folders, settle_seconds=0, **values), spark)

    return run


def revenue_by_category(record: RunRecord) -> dict[str, Decimal]:
    with open_tables(record.data_dir) as db:
        return dict(db.sql("SELECT product_category, total_revenue FROM category_analytics").fetchall())


@THOROUGH
@pytest.mark.parametrize("parts", [1, pytest.param(2, marks=pytest.mark.slow)], ids=["one file", "two part files"])
def test_order_lines_under_the_number_of_their_order_are_refused(
    parts: int, published_from: Callable[..., RunRecord]
) -> None:
    """Each line is rejected, also where the lines of an order lie in two files; the line says what to write."""
    files = {f"transactions/{part}.csv": csv_of(*LINES[part::parts]) for part in range(parts)}
    with pytest.raises(NotPublishedError) as failure:
        published_from(files)
    message = str(failure.value)
    assert "transactions.max_quarantine_rate (5 of 6 rows are quarantined, 83.33%" in message
    assert re.search(
        r"transaction_id_conflict 5 \(for example transaction_id '1001', transactions/\d.csv row \d\)", message
    )
    assert "if they are order lines, make the key of order and line in transactions.sql" in message
    assert "concat(transaction_id, '/', product_id) AS transaction_id" in message
    if parts == 1:
        return
    record = published_from({**files, "transactions.sql": LINES_MODEL})
    assert (record.revenue, record.orders) == (REVENUE, 3)
    assert revenue_by_category(record) == {
        "Home": Decimal("40.00"),
        "Toys": Decimal("81.80"),
        "Kitchen": Decimal("45.00"),
    }
    with open_tables(record.data_dir) as db:
        spent = db.sql("SELECT customer_id, total_orders, total_spent, avg_order_value FROM customers_enriched")
        assert spent.order("customer_id").fetchall() == [
            (1, 2, Decimal("112.00"), Decimal("56.00")), (2, 1, Decimal("54.80"), Decimal("54.80")),
        ]  # fmt: skip


@THOROUGH
@pytest.mark.slow
def test_currencies_are_not_added_up(published_from: Callable[..., RunRecord]) -> None:
    """Those of completed orders count, in any spelling; with one named, orders in others are rejected."""
    cancelled = "1004,1,mug,1,9.00,2026-01-05 10:00:00,card,cancelled"
    returned = "1006,1,mug,-1,-9.00,2026-01-05 10:00:00,card,returned"
    currencies = {LINES[0]: "EUR", LINES[3]: "USD", LINES[5]: " eur ", cancelled: "CHF", returned: "USD"}
    unnamed = "1005,1,mug,1,9.00,2026-01-05 10:00:00,card,completed"
    lines = [f"{line},{currency}" for line, currency in {**currencies, unnamed: ""}.items()]
    files = {"transactions.csv": csv_of(*lines, header=f"{HEADER},currency")}
    with pytest.raises(
        NotPublishedError, match="the orders and returns are in several currencies, EUR 2, USD 2: convert"
    ):
        published_from(files)
    record = published_from(files, currency="eur", max_quarantine_rate=0.5)
    assert (record.revenue, record.currency) == (Decimal(67), "EUR")
    assert record.quality["transactions"].violations["currency_other"] == 3
    assert "revenue: €67.00" in repr(record)


ORPHANS = [
    "1,1,mug,1,9.00,2026-01-05 10:00:00,card,completed",
    "2,,mug,1,10.00,2026-01-05 10:00:00,card,completed",  # a guest
    "3,77,mug,1,11.00,2026-01-05 10:00:00,card,completed",  # a customer who was deleted
    "4,1,vase,1,12.00,2026-01-05 10:00:00,card,completed",  # a product that is no longer sold
    "5,2,,1,13.00,2026-01-05 10:00:00,,completed",
]


@pytest.mark.slow
def test_guests_and_what_is_no_longer_there_keep_their_revenue(published_from: Callable[..., RunRecord]) -> None:
    record = published_from({"transactions.csv": csv_of(*ORPHANS)})
    assert record.revenue == 55
    assert revenue_by_category(record) == {"Kitchen": 30, "Unknown": 25}
    with open_tables(record.data_dir) as db:
        columns = "customer_id, full_name, total_spent, customer_segment, is_inferred"
        customers = db.sql(f"SELECT {columns} FROM customers_enriched")
        assert customers.order("customer_id").fetchall() == [
            (0, "Unknown", 10, "Unknown", True), (1, "Ann Lee", 21, "Bronze", False),
            (2, "Bo Kim", 13, "Bronze", False),
            (77, "Unknown", 11, "Bronze", True),
        ]  # fmt: skip
        segments = (
            "SELECT customer_segment, sum(customer_count), sum(segment_revenue) FROM customer_analytics GROUP BY 1"
        )
        assert sorted(db.sql(segments).fetchall()) == [("Bronze", 3, 45), ("Unknown", 1, 10)]
        methods = dict(db.sql("SELECT payment_method, total_amount FROM payment_analytics").fetchall())
        assert methods == {"card": 42, "unknown": 13}
    violations = record.quality["transactions"].violations
    assert (violations["customer_id_missing"], violations["customer_id_unknown"]) == (1, 1)
    assert (violations["product_id_missing"], violations["product_id_unknown"]) == (1, 1)
    kept = {
        row["rule"]: row["rows"] for row in record.violated(warnings=True) if row["rule"].startswith("transactions")
    }
    assert kept["transactions: customer_id_unknown"] == 1, "counted and kept, as the report says"
    # When the parents arrive, they take the place of the inferred ones.
    record = published_from({"customers.csv": CUSTOMERS + "77,Cy,Ott\n", "products.csv": PRODUCTS + "vase,Vase,Home\n"})
    assert revenue_by_category(record) == {"Kitchen": 30, "Home": 12, "Unknown": 13}
    with open_tables(record.data_dir) as db:
        assert db.sql("SELECT customer_id FROM customers_enriched WHERE is_inferred").fetchall() == [(0,)]


@THOROUGH
@pytest.mark.slow
def test_orphans_are_rejected_where_that_is_wanted(published_from: Callable[..., RunRecord]) -> None:
    with pytest.raises(
        NotPublishedError, match=r"4 of 5 rows are quarantined.*land the customers, or keep such orders with"
    ):
        published_from({"transactions.csv": csv_of(*ORPHANS)}, orphans="reject")


@THOROUGH
@pytest.mark.slow
def test_attributes_are_optional(published_from: Callable[..., RunRecord]) -> None:
    """A list of ids is enough; what a shop does not track does not cost it its orders."""
    files = {"products.csv": "product_id,price\nlamp,\nkite,-1\nmug,9.00\n", "customers.csv": "customer_id\n1\n2\n"}
    record = published_from({**files, "transactions.csv": csv_of(LINES[0], LINES[3])})
    assert (record.revenue, record.quality["products"].quarantined) == (Decimal(58), 0)
    assert revenue_by_category(record) == {"Unknown": 58}
    with open_tables(record.data_dir) as db:
        products = db.sql("SELECT product_id, product_name, price, supplier, stock_quantity FROM products_active")
        assert products.order("product_id").fetchall() == [
            ("kite", "Unknown", None, None, None), ("lamp", "Unknown", None, None, None),
            ("mug", "Unknown", Decimal("9.00"), None, None),
        ]  # fmt: skip
        assert db.sql("SELECT * FROM product_analytics").fetchall() == [("Unknown", "Unknown", 3, 9, 0, 0)]


@THOROUGH
@pytest.mark.slow
def test_negative_lines_are_returns(published_from: Callable[..., RunRecord]) -> None:
    """They lie beside the revenue; a negative amount alone is an error."""
    returns = [
        "1003R,1,mug,-1,-9.00,2026-01-09 12:00:00,card,returned",
        "1002R,,kite,-1,-36.80,2026-01-09 12:00:00,card,completed",
    ]
    wrong = "1004,1,mug,1,-9.00,2026-01-09 12:00:00,card,completed"
    record = published_from({"transactions.csv": csv_of(LINES[4], LINES[5], *returns, wrong)}, max_quarantine_rate=0.2)
    assert (record.revenue, record.returns, record.refunds, record.net_revenue) == (
        Decimal("54.80"), 2, Decimal("45.80"), Decimal("9.00"),
    )  # fmt: skip
    assert record.quality["transactions"].violations["amount_not_positive"] == 1
    with open_tables(record.data_dir) as db:
        assert one(db, "SELECT sum(amount) FROM transactions_returned") == Decimal("-45.80")
        assert (
            one(db, "SELECT count(*) FROM transactions_returned ANTI JOIN customers_enriched USING (customer_id)") == 0
        )


@THOROUGH
def test_payment_method_that_is_not_accepted_is_named_with_its_flag(published_from: Callable[..., RunRecord]) -> None:
    files = {"transactions.csv": csv_of(LINES[0], LINES[5])}
    with pytest.raises(NotPublishedError) as failure:
        published_from(files, payment_methods="card")
    said = "payment_method_unknown 1 (for example payment_method 'Cash', transactions.csv row 1): "
    assert said + "name it in --payment-methods" in str(failure.value)


@THOROUGH
@pytest.mark.slow
def test_files_of_several_conventions_lie_together(published_from: Callable[..., RunRecord]) -> None:
    """Delimiters and encodings are found per file; so are the files within an archive, and a zone after a space."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("e.csv", csv_of("5,1,mug,1,5.00,2026-01-05 10:00:00 UTC,card,completed"))
        archive.writestr("__MACOSX/._e.csv", "no data")
    files = {
        "a.csv": csv_of("1,1,mug,1,1.00,2026-01-05 10:00:00,card,completed"),
        "b.csv": csv_of("2,1,mug,1,2.00,2026-01-05 10:00:00,card,completed").replace(",", ";"),
        "c.txt.csv": csv_of("3,1,mug,1,3.00,2026-01-05 10:00:00,Überweisung,completed")
        .replace(",", "\t")
        .encode("utf-16"),
        "d.csv": "sep=|\n" + csv_of("4,1,mug,1,4.00,2026-01-05 10:00:00 Z,card,completed").replace(",", "|"),
        "e.zip": packed.getvalue(),
        "f.csv.gz": gzip.compress(csv_of("6,1,mug,1,6.00,2026-01-05 05:00:00 -0500,card,completed").encode()),
    }
    record = published_from({f"transactions/{name}": content for name, content in files.items()})
    assert (record.revenue, record.orders) == (Decimal(21), 6)
    with open_tables(record.data_dir) as db:
        assert one(db, "SELECT count(DISTINCT timestamp) FROM transactions_clean") == 1
        assert one(db, "SELECT count(*) FROM payment_analytics WHERE payment_method = 'überweisung'") == 1


@THOROUGH
def test_ids_that_a_spreadsheet_has_damaged_are_rejected_by_name(published_from: Callable[..., RunRecord]) -> None:
    lines = [
        line.replace("100", "1.23E+11", 1) for line in ("100,1,mug,1,9.00,2026-01-05 10:00:00,card,completed",) * 2
    ]
    with pytest.raises(NotPublishedError) as failure:
        published_from({"transactions.csv": csv_of(*lines, LINES[5])})
    said = "transaction_id_scientific 2 (for example transaction_id '1.23E+11', transactions.csv row 1): "
    assert said + "export the ids as text" in str(failure.value)


@THOROUGH
@pytest.mark.slow
def test_what_is_rejected_below_the_limit_is_a_warning(
    published_from: Callable[..., RunRecord], caplog: pytest.LogCaptureFixture
) -> None:
    orders = [f"{n},1,mug,1,9.00,2026-01-05 10:00:00,card,completed" for n in range(30)]
    lost = '30,1,mug,1,"5000,00",2026-01-05 10:00:00,card,completed'
    assert published_from({"transactions.csv": csv_of(*orders, lost)}).revenue == 270
    warned = (
        "transactions: 1 of 31 rows are quarantined: amount_malformed 1 (for example amount '5000,00', transactions.csv"
    )
    assert f"{warned} row 31): convert it in transactions.sql" in caplog.text


MISTAKES: dict[str, tuple[dict[str, str | bytes], dict[str, Any], str]] = {
    "empty": ({"notes.docx": "x"}, {}, "no file in .* can be read: land CSV, JSON lines"),
    "name of controls": ({"transactions.csv": csv_of(), "Controls.CSV": "period"}, {}, "looks like control totals"),
    "decimal commas": (
        {"orders_export.csv": "Name\n"}, {"models": "shopify", "source_decimal": ","}, "with a decimal point",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake_of_the_folder_is_one_line(case: str, small: Callable[..., DataPipelineConfig], tmp_path: Path) -> None:
    files, values, message = MISTAKES[case]
    for name, content in files.items():
        (tmp_path / name).write_text(str(content))
    with pytest.raises(ConfigurationError, match=message):
        open_source(small(source_dir=str(tmp_path), **values))


def test_files_of_one_name_in_an_archive_are_refused(small: Callable[..., DataPipelineConfig], tmp_path: Path) -> None:
    """One of them would be read twice, and the other not at all."""
    with (
        zipfile.ZipFile(tmp_path / "transactions.zip", "w") as archive,
        pytest.warns(UserWarning, match="Duplicate name"),
    ):
        for order in LINES[:2]:
            archive.writestr("a.csv", csv_of(order))
    with pytest.raises(ConfigurationError, match=r"two of its files are called a\.csv: unzip it"):
        open_source(small(source_dir=str(tmp_path)))


@THOROUGH
def test_blank_fields_are_missing_ones(published_from: Callable[..., RunRecord], tmp_path: Path) -> None:
    """Three orders without a number are three orders; a blank city and a blank device are unknown ones."""
    lines = [line.replace(",Cash,", ",card,") for line in LINES[:3]]
    orders = [f'T{number}{line[4:]},"",""' for number, line in enumerate(lines)]
    files = {
        "transactions.csv": csv_of(*orders, header=f"{HEADER},order_id,device"),
        "customers.csv": 'customer_id,first_name,last_name,city\n1,Ann,Lee,""\n2,Bo,Kim,\n',
    }
    record = published_from(files)
    assert (record.orders, record.revenue) == (3, Decimal("94.00"))
    with open_tables(record.data_dir) as db:
        assert one(db, "SELECT total_orders FROM customers_enriched WHERE customer_id = 1") == 3
        assert one(db, "SELECT string_agg(DISTINCT city) FROM customer_analytics") == "Unknown"
        assert one(db, "SELECT string_agg(device || transaction_count) FROM device_analytics") == "Unknown3"


@THOROUGH
def test_file_that_only_sounds_like_control_totals(published_from: Callable[..., RunRecord]) -> None:
    record = published_from({"transactions.csv": csv_of(LINES[5]), "control-group.csv": "customer_id\n1\n"})
    assert record.revenue == Decimal("18.00")
