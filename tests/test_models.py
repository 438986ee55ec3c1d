"""The ready models in models/: each runs on its sample and gives the figures worked out by hand."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pytest
from conftest import ENGINE, THOROUGH, one, open_tables
from pyspark.sql import SparkSession

from data_pipeline import DataPipelineConfig, RunRecord, run_pipeline

MODELS = Path(__file__).parent.parent / "models"
AS_OF = date(2026, 3, 1)

# A second run of a model takes six seconds on Spark, and half a second on Sail.
variant = pytest.mark.skipif(ENGINE != "sail", reason="Sail runs it")

Config = Callable[..., DataPipelineConfig]
Run = Callable[..., tuple[RunRecord, duckdb.DuckDBPyConnection]]


@pytest.fixture(scope="module")
def run_model(small: Config, spark: SparkSession) -> Run:
    """Runs a ready model on its sample or another folder, and keeps each run."""
    runs: dict[tuple[str, str], tuple[RunRecord, duckdb.DuckDBPyConnection]] = {}

    def run(system: str, source: Path | None = None) -> tuple[RunRecord, duckdb.DuckDBPyConnection]:
        folder = str(source or MODELS / system / "sample")
        if (system, folder) not in runs:
            config = small(source_dir=folder, models=system, settle_seconds=0, as_of_date=AS_OF)
            record = run_pipeline(config, spark)
            runs[system, folder] = record, open_tables(record.data_dir)
        return runs[system, folder]

    return run


def by_key(db: duckdb.DuckDBPyConnection, query: str) -> dict[Any, Any]:
    """Returns the first column of a query as keys, and the others as values."""
    return {key: values[0] if len(values) == 1 else tuple(values) for key, *values in db.sql(query).fetchall()}


def totals(record: RunRecord) -> tuple[Decimal | None, Decimal | None, int | None, int | None]:
    """Returns revenue, refunds, returns and orders of a run."""
    return record.revenue, record.refunds, record.returns, record.orders


def categories(db: duckdb.DuckDBPyConnection) -> dict[str, tuple[Decimal, int, int]]:
    """Returns revenue, rows and units by category."""
    query = "SELECT product_category, total_revenue, transaction_count, units_sold FROM category_analytics"
    return by_key(db, query)


def payments(db: duckdb.DuckDBPyConnection) -> dict[str, tuple[Decimal, int]]:
    """Returns revenue and rows by payment method."""
    return by_key(db, "SELECT payment_method, total_amount, usage_count FROM payment_analytics")


def spending(db: duckdb.DuckDBPyConnection) -> dict[str | None, Decimal]:
    """Returns the spending of customers by e-mail address; None holds those without one."""
    return by_key(
        db, "SELECT lower(email), sum(total_spent) FROM customers_enriched GROUP BY 1 HAVING sum(total_spent) > 0"
    )


def amounts(db: duckdb.DuckDBPyConnection, order: str) -> list[Decimal]:
    """Returns the amounts of an order's completed lines, ordered by position."""
    query = "SELECT amount FROM transactions_clean WHERE order_id = $order ORDER BY transaction_id"
    return [amount for (amount,) in db.execute(query, {"order": order}).fetchall()]


def rejected(db: duckdb.DuckDBPyConnection) -> list[tuple[Any, ...]]:
    """Returns the transactions in quarantine, with the reasons."""
    return db.sql("SELECT transaction_id, _reasons FROM quarantine_transactions").fetchall()


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, records: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


# ── Shopify ──────────────────────────────────────────────────────────────────────────────────────────────────────
# Prices without tax; 8 % tax and shipping come on top.
#   #1001  ann   2 × 12.00 Mug, 19.99 Tee                                     43.99
#   #1002  ben   19.99 Tee + 12.00 Mug + 8.50 Candle = 40.49, less 10.00      30.49
#                  30.49 × 19.99 / 40.49 = 15.0530 → 15.05
#                  30.49 × 31.99 / 40.49 = 24.0893 → 24.09, so 9.04; 30.49 − 24.09 = 6.40
#   #1003  guest 6.25 Notebook, paid in cash                                   6.25
#   #1004  cora  2 × 19.99 Tee, 12.00 Mug                                     51.98
#                  refund of 12.96, of which 51.98 / (51.98 + 4.16 tax): 12.00 returned
#   #1005  ann   35.00 Canvas Bag, no longer in the catalogue                 35.00; returned, without 5.00 shipping
#   #1006  dan   pending; #1007 eve voided; #1011 Gus, without e-mail, authorized
#   #1008  ben   19.99 Tee − 5.00, a free Sticker, 8.50 Candle                23.49: 14.99, 8.50
#   #1009  fay   19.99 Tee | 2 × 12.00 Mug, 8.50 Candle in the other file, less 10.50   41.99
#                  41.99 × 19.99 / 52.49 = 15.9912 → 15.99
#                  41.99 × 43.99 / 52.49 = 35.1903 → 35.19, so 19.20; 41.99 − 35.19 = 6.80
#   #1010  cora  12.00 Mug, discount of 100 %                                  0.00: no row
#   #1012  cora  15.00 Poster, paid, cancelled two days later                 15.00; returned
#   #1013  eve   19.99 Tee, partially paid                                    19.99
#   #1014  ben   12.00 Mug twice, as two lines                                24.00
# 43.99 + 30.49 + 6.25 + 51.98 + 35.00 + 23.49 + 41.99 + 15.00 + 19.99 + 24.00 = 292.18
# returned: 12.00 + 35.00 + 15.00 = 62.00


@pytest.mark.slow
def test_shopify_revenue_and_refunds_are_those_of_the_sales_report(run_model: Run) -> None:
    record, db = run_model("shopify")
    assert totals(record) == (Decimal("292.18"), Decimal("62.00"), 3, 10)
    assert one(db, "SELECT count(*) FROM bronze_transactions") == 24  # 21 lines with a value, 3 refunds
    assert rejected(db) == []
    returned = "SELECT transaction_id, quantity, amount FROM transactions_returned ORDER BY transaction_id"
    assert db.sql(returned).fetchall() == [
        ("#1004/refund", -1, Decimal("-12.00")),
        ("#1005/refund", -1, Decimal("-35.00")),
        ("#1012/refund", -1, Decimal("-15.00")),
    ]
    by_status = by_key(db, "SELECT status, count(*) FROM bronze_transactions GROUP BY status")
    assert by_status == {"completed": 18, "returned": 3, "pending": 2, "cancelled": 1}
    assert one(db, "SELECT any_value(currency) FROM bronze_transactions") == "USD"


@THOROUGH
@pytest.mark.slow
def test_shopify_gold(run_model: Run) -> None:
    _, db = run_model("shopify")
    assert categories(db) == {
        "Apparel": (Decimal("125.99"), 6, 7),  # 19.99 + 15.05 + 39.98 + 14.99 + 15.99 + 19.99
        "Kitchen": (Decimal("88.24"), 6, 8),  # 24.00 + 9.04 + 12.00 + 19.20 + 12.00 + 12.00
        "Unknown": (Decimal("35.00"), 1, 1),  # the bag, of which only orders know
        "Candles": (Decimal("21.70"), 3, 3),  # 6.40 + 8.50 + 6.80; the last level of the product category
        "Posters": (Decimal("15.00"), 1, 1),
        "Stationery": (Decimal("6.25"), 1, 1),
    }
    assert payments(db) == {
        "shopify_payments": (Decimal("218.45"), 12),  # 43.99 + 30.49 + 51.98 + 35.00 + 41.99 + 15.00
        "paypal_express_checkout": (Decimal("47.49"), 4),  # 23.49 + 24.00
        "bank_deposit": (Decimal("19.99"), 1),
        "cash": (Decimal("6.25"), 1),
    }
    assert spending(db) == {
        "ann@example.com": Decimal("78.99"),  # 43.99 + 35.00, the latter under ANN@example.com
        "ben@example.com": Decimal("77.98"),  # 30.49 + 23.49 + 24.00
        "cora@example.com": Decimal("66.98"),  # 51.98 + 15.00
        "fay@example.com": Decimal("41.99"),
        "eve@example.com": Decimal("19.99"),
        None: Decimal("6.25"),
    }


@THOROUGH
def test_shopify_lines_add_up_to_the_subtotal(run_model: Run) -> None:
    _, db = run_model("shopify")
    assert amounts(db, "#1002") == [Decimal("15.05"), Decimal("9.04"), Decimal("6.40")]
    assert amounts(db, "#1008") == [Decimal("14.99"), Decimal("8.50")]
    assert amounts(db, "#1009") == [Decimal("15.99"), Decimal("19.20"), Decimal("6.80")]  # over two files
    sums = by_key(db, "SELECT order_id, sum(amount) FROM bronze_transactions WHERE amount > 0 GROUP BY order_id")
    sample = MODELS / "shopify" / "sample"
    lines = [line for file in sorted(sample.glob("orders_*.csv")) for line in read_csv(file)]
    subtotals = {line["Name"]: Decimal(line["Subtotal"]) for line in lines if line["Subtotal"]}
    assert sums == {name: subtotal for name, subtotal in subtotals.items() if subtotal}
    assert len(subtotals) == 14


@THOROUGH
def test_shopify_customers_and_products_of_orders_alone(run_model: Run) -> None:
    _, db = run_model("shopify")
    names = by_key(db, "SELECT email, first_name, last_name FROM bronze_customers WHERE email IS NOT NULL")
    assert len(names) == 7
    assert names["fay@example.com"] == ("Fay", "O'Hara, Jr.")  # of the customers export
    assert names["dan@example.com"] == ("Dan", "Egan")  # of an order
    assert names["eve@example.com"] == (None, "Eve")
    products = by_key(db, "SELECT product_id, product_name, price, stock_quantity, is_active FROM bronze_products")
    assert len(products) == 9
    assert products["TEE-M"] == ('Tee "Classic", organic - M / Black', Decimal("19.99"), 8, True)
    assert products["MUG-RED"] == ("Mug - Red", Decimal("12.00"), 0, True)  # oversold
    assert products["00125"] == ("Notebook", Decimal("6.25"), 100, True)  # '00125 in the products export
    assert products["GIFT-STK"] == ("Sticker", None, 500, False)  # a draft
    assert products["OLD-BAG"] == ("Canvas Bag", Decimal("35.00"), None, False)


@THOROUGH
@variant
@pytest.mark.slow
def test_shopify_orders_alone_are_enough(run_model: Run, tmp_path: Path) -> None:
    for file in (MODELS / "shopify" / "sample").glob("orders_*.csv"):
        shutil.copy(file, tmp_path)
    record, db = run_model("shopify", tmp_path)
    assert (record.revenue, record.refunds) == (Decimal("292.18"), Decimal("62.00"))
    assert categories(db) == {"Unknown": (Decimal("292.18"), 18, 21)}
    assert spending(db) == spending(run_model("shopify")[1])
    assert one(db, "SELECT count(*) FROM bronze_products WHERE is_active IS NULL") == 9


@THOROUGH
@variant
@pytest.mark.slow
def test_shopify_export_that_overlaps_changes_only_what_has_changed(run_model: Run, tmp_path: Path) -> None:
    shutil.copytree(MODELS / "shopify" / "sample", tmp_path, dirs_exist_ok=True)
    lines = [line for line in read_csv(tmp_path / "orders_export_2.csv") if line["Name"] != "#1009"]
    for line in lines:
        if line["Name"] == "#1006":
            line["Financial Status"] = "paid"
    write_csv(tmp_path / "orders_export_3.csv", lines)
    record, db = run_model("shopify", tmp_path)
    before = run_model("shopify")[1]
    query = "SELECT transaction_id, status, quantity, amount, product_id, customer_id FROM bronze_transactions"
    assert set(db.sql(query).fetchall()) ^ set(before.sql(query).fetchall()) == {
        (id, status, 1, Decimal("19.99"), "TEE-M", customer)
        for status in ("pending", "completed")
        for id, customer in db.sql(
            "SELECT transaction_id, customer_id FROM bronze_transactions WHERE order_id = '#1006'"
        ).fetchall()
    }
    assert (record.revenue, record.refunds) == (Decimal("312.17"), Decimal("62.00"))  # 292.18 + 19.99


@THOROUGH
@variant
@pytest.mark.slow
def test_shopify_order_with_fewer_lines_than_before(run_model: Run, tmp_path: Path) -> None:
    shutil.copytree(MODELS / "shopify" / "sample", tmp_path, dirs_exist_ok=True)
    lines = [line for line in read_csv(tmp_path / "orders_export_2.csv") if line["Name"] == "#1002"][:2]
    lines[0]["Subtotal"] = "21.99"
    write_csv(tmp_path / "orders_export_3.csv", lines)
    record, db = run_model("shopify", tmp_path)
    # 21.99 × 19.99 / 31.99 = 13.7410 → 13.74; 21.99 − 13.74 = 8.25
    assert amounts(db, "#1002") == [Decimal("13.74"), Decimal("8.25")]
    assert record.revenue == Decimal("283.68")  # 292.18 − 30.49 + 21.99


# ── Olist ────────────────────────────────────────────────────────────────────────────────────────────────────────
# Prices in BRL without freight. Ana and the others order under a new customer_id each time.
#   1  ana    delivered   2 × 49.90 perfume, 120.00 shelf      219.80   credit card 202.34, voucher 60.00
#   2  ana    delivered   52.00 perfume                         52.00   boleto
#   3  bruno  shipped     35.50 console                         35.50   credit card 19.60, vouchers 15.00 + 15.00
#   4  carla  canceled    120.00 shelf; 5 bruno unavailable, without items; 6 davi created, 35.50
#   7  carla  invoiced    15.00 nameless, 9.99 not in products  24.99   debit card
#   8  davi   processing  118.00 shelf                         118.00   no payment in the data
# 219.80 + 52.00 + 35.50 + 24.99 + 118.00 = 450.29


@THOROUGH
@pytest.mark.slow
def test_olist(run_model: Run) -> None:
    record, db = run_model("olist")
    assert totals(record) == (Decimal("450.29"), Decimal(0), 0, 5)
    assert rejected(db) == []
    assert categories(db) == {
        "furniture_decor": (Decimal("238.00"), 2, 2),  # 120.00 + 118.00
        "perfumery": (Decimal("151.80"), 3, 3),  # 49.90 + 49.90 + 52.00
        "pc_gamer": (Decimal("35.50"), 1, 1),  # has no translation
        "Unknown": (Decimal("24.99"), 2, 2),
    }
    assert payments(db) == {
        "credit_card": (Decimal("219.80"), 3),
        "unknown": (Decimal("118.00"), 1),
        "boleto": (Decimal("52.00"), 1),
        "voucher": (Decimal("35.50"), 1),  # 30.00 of 49.60
        "debit_card": (Decimal("24.99"), 2),
    }
    assert by_key(db, "SELECT city, total_orders, total_spent FROM customers_enriched") == {
        "campinas": (2, Decimal("271.80")),  # ana, who has moved: 219.80 + 52.00
        "rio de janeiro": (1, Decimal("35.50")),
        "belo horizonte": (1, Decimal("24.99")),
        "salvador": (1, Decimal("118.00")),
    }
    assert by_key(db, "SELECT status, count(*) FROM bronze_transactions GROUP BY status") == {
        "completed": 8,
        "cancelled": 1,
        "pending": 1,
    }
    assert one(db, "SELECT any_value(currency) FROM bronze_transactions") == "BRL"
    perfume = "SELECT price, weight_kg FROM bronze_products WHERE category = 'perfumery'"
    assert db.sql(perfume).fetchall() == [(Decimal("52.00"), 0.32)]  # the last price


# ── UCI Online Retail ────────────────────────────────────────────────────────────────────────────────────────────
#   489901   13001  12 × 6.95, 4 × 3.39 twice, postage left out    83.40 + 13.56 + 13.56 = 110.52
#   489902   guest  6 × 4.25, 1 × 0.001 left out                    25.50
#   C489903  13001  −2 × 6.95 and a discount of 10.00              −13.90 − 10.00 returned
#   489904   adjustments of stock; A489905 bad debt; 489907 bank charges: left out
#   489906   13002  45.00 manual, 10 × 2.95                         74.50
#   536901   13001  6 × 6.95, 2 × 3.39, in both files               48.48
#   536902   13002  24 × 0.42                                       10.08
#   C536903  13002  −12 × 0.42                                      −5.04 returned
# 110.52 + 25.50 + 74.50 + 48.48 + 10.08 = 269.08; returned: 13.90 + 10.00 + 5.04 = 28.94


@THOROUGH
@pytest.mark.slow
def test_uci(run_model: Run) -> None:
    record, db = run_model("uci")
    assert totals(record) == (Decimal("269.08"), Decimal("28.94"), 3, 5)
    assert rejected(db) == []
    assert categories(db) == {"Unknown": (Decimal("269.08"), 9, 69)}  # 12 + 4 + 4 + 6 + 1 + 10 + 6 + 2 + 24
    assert payments(db) == {"unknown": (Decimal("269.08"), 9)}
    assert by_key(db, "SELECT customer_id, total_spent FROM customers_enriched") == {
        13001: Decimal("159.00"),  # 110.52 + 48.48
        13002: Decimal("84.58"),  # 74.50 + 10.08
        0: Decimal("25.50"),
    }
    assert amounts(db, "489901") == [Decimal("83.40"), Decimal("13.56"), Decimal("13.56")]  # the same line twice
    returned = "SELECT transaction_id, product_id, quantity, amount FROM transactions_returned ORDER BY transaction_id"
    assert db.sql(returned).fetchall() == [
        ("C489903/1", "21001A", -2, Decimal("-13.90")),
        ("C489903/2", "Unknown", -1, Decimal("-10.00")),
        ("C536903/1", "84077", -12, Decimal("-5.04")),
    ]
    prices = by_key(db, "SELECT product_id, price FROM bronze_products")
    assert prices == {"21001A": Decimal("6.95"), "22105": Decimal("3.39"), "84077": Decimal("0.42")}


@THOROUGH
@variant
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dates", "expected"),
    [
        (("12/1/2010 8:26", "12/13/2010 8:45"), ("2010-12-01 08:26:00", "2010-12-13 08:45:00")),
        (("12/1/10 8:26", "12/2/10 18:45"), ("2010-12-01 08:26:00", "2010-12-02 18:45:00")),
        (("01/12/2009 07:45", "02/12/2009 10:00"), ("2009-12-01 07:45:00", "2009-12-02 10:00:00")),
        (("01/12/2009 07:45:30", "13/12/2009 10:00:00"), ("2009-12-01 07:45:30", "2009-12-13 10:00:00")),
    ],
)
def test_uci_dates_with_slashes(
    run_model: Run, tmp_path: Path, dates: tuple[str, str], expected: tuple[str, str]
) -> None:
    sample = read_csv(MODELS / "uci" / "sample" / "Online Retail.csv")
    lines = [line for line in sample if line["InvoiceNo"] in ("536901", "536902")]
    for line in lines:
        line["InvoiceDate"] = dates[line["InvoiceNo"] == "536902"]
    # The same invoice further down, as in copies that join both sheets, counts once.
    write_csv(tmp_path / "online_retail.csv", [*lines, *lines[:2]])
    record, db = run_model("uci", tmp_path)
    assert (record.revenue, record.orders) == (Decimal("58.56"), 2)  # 48.48 + 10.08
    times = db.sql("SELECT DISTINCT CAST(timestamp AS VARCHAR) FROM transactions_clean ORDER BY 1").fetchall()
    assert [time[:19] for (time,) in times] == list(expected)


# ── Stripe ───────────────────────────────────────────────────────────────────────────────────────────────────────
# Two payments in EUR, with a balance in USD.
#   X  ann   50.00, Y 30.00 without an e-mail address, 10.00 of it refunded    80.00; 10.00 returned
#   1  ben   100.00 EUR = 108.50                                              108.50
#   2  cora  20.00, refunded                                                   20.00; 20.00 returned
#   6  cus_inventedC, without an e-mail address, by bank account               25.25
#   7  ben   40.00 EUR = 43.40, of which 10.00 EUR = 10.85 refunded            43.40; 10.85 returned
#   9  ann   8.00, without a customer id                                        8.00
#   3  failed; 4 authorized; 5 never tried; 8 authorized and released
# 80.00 + 108.50 + 20.00 + 25.25 + 43.40 + 8.00 = 285.15; returned: 10.00 + 20.00 + 10.85 = 40.85


@THOROUGH
@pytest.mark.slow
def test_stripe(run_model: Run) -> None:
    record, db = run_model("stripe")
    assert totals(record) == (Decimal("285.15"), Decimal("40.85"), 3, 7)
    assert rejected(db) == []
    assert categories(db) == {"Payments": (Decimal("285.15"), 7, 7)}
    assert payments(db) == {
        "visa": (Decimal("186.50"), 4),  # 50.00 + 108.50 + 20.00 + 8.00
        "american_express": (Decimal("43.40"), 1),
        "mastercard": (Decimal("30.00"), 1),
        "us_bank_account": (Decimal("25.25"), 1),
    }
    assert spending(db) == {
        "ben@example.com": Decimal("151.90"),  # 108.50 + 43.40
        "ann@example.com": Decimal("88.00"),  # 50.00 + 30.00 + 8.00
        None: Decimal("25.25"),
        "cora@example.com": Decimal("20.00"),
    }
    assert by_key(
        db, "SELECT transaction_id, amount, left(CAST(timestamp AS VARCHAR), 16) FROM transactions_returned"
    ) == {
        "ch_invented2/refund": (Decimal("-20.00"), "2026-01-12 09:00"),
        "ch_invented7/refund": (Decimal("-10.85"), "2026-01-25 08:00"),
        "ch_inventedY/refund": (Decimal("-10.00"), "2025-12-31 23:59"),
    }
    by_status = by_key(db, "SELECT status, count(*) FROM bronze_transactions GROUP BY status")
    assert by_status == {"completed": 7, "returned": 3, "pending": 2, "cancelled": 2}
    assert one(db, "SELECT string_agg(DISTINCT currency) FROM bronze_transactions WHERE status = 'completed'") == "USD"


# ── WooCommerce ──────────────────────────────────────────────────────────────────────────────────────────────────
# Amounts without tax of 10 % and without shipping of 5.00.
#   901   ann   14.00 Mug twice, as two items                              28.00
#   902   fay   19.99 Tee, refunded by item                                19.99; 19.99 returned
#   1001  ann   39.98 Tees, 12.00 Mug                                      51.98
#   1002  bob   17.99 Tee, 10.80 Mug, 7.65 Candle, after a coupon of 10 %  36.44
#   1003  ann   12.00 Mug, as a guest                                      12.00
#   1004  cara  36.00 Mugs, 19.99 Tee                                      55.99; 12.00 returned of 18.20 refunded
#   1005  dan   40.00 Lamp, since deleted                                  40.00; 49.00 refunded, of which 40.00 goods
#   1006  dan   on hold; 1007 bob cancelled; 1008 bob failed; 1011 eve pending
#   1009  guest 17.00 Candles                                              17.00; 5.50 × 17.00 / 18.70 = 5.00 returned
#   1010  fay   a free Sticker, 8.50 Candle                                 8.50
# 28.00 + 19.99 + 51.98 + 36.44 + 12.00 + 55.99 + 40.00 + 17.00 + 8.50 = 269.90
# returned: 19.99 + 12.00 + 40.00 + 5.00 = 76.99


@THOROUGH
@pytest.mark.slow
def test_woocommerce(run_model: Run) -> None:
    record, db = run_model("woocommerce")
    assert totals(record) == (Decimal("269.90"), Decimal("76.99"), 4, 9)
    assert rejected(db) == []
    assert categories(db) == {
        "Kitchen": (Decimal("98.80"), 6, 8),  # 14.00 + 14.00 + 12.00 + 10.80 + 12.00 + 36.00
        "T-Shirts": (Decimal("97.95"), 4, 5),  # 19.99 + 39.98 + 17.99 + 19.99; the category of the parent
        "Unknown": (Decimal("40.00"), 1, 1),  # the lamp, of which only orders know
        "Candles": (Decimal("33.15"), 3, 4),  # 7.65 + 17.00 + 8.50
    }
    assert payments(db) == {
        "stripe": (Decimal("172.90"), 9),  # 19.99 + 51.98 + 36.44 + 55.99 + 8.50
        "paypal": (Decimal("80.00"), 4),  # 28.00 + 12.00 + 40.00
        "cod": (Decimal("17.00"), 1),
    }
    assert spending(db) == {
        "ann@example.com": Decimal("91.98"),  # 28.00 + 51.98 + 12.00, the latter as a guest
        "cara@example.com": Decimal("55.99"),
        "dan@example.com": Decimal("40.00"),
        "bob@example.com": Decimal("36.44"),
        "fay@example.com": Decimal("28.49"),  # 19.99 + 8.50
        None: Decimal("17.00"),
    }
    returned = "SELECT order_id, product_id, quantity, amount FROM transactions_returned"
    assert by_key(db, returned) == {
        "902": ("TEE-S", -1, Decimal("-19.99")),
        "1004": ("MUG", -1, Decimal("-12.00")),
        "1005": ("Unknown", -1, Decimal("-40.00")),
        "1009": ("Unknown", -1, Decimal("-5.00")),
    }
    by_status = by_key(db, "SELECT status, count(*) FROM bronze_transactions GROUP BY status")
    assert by_status == {"completed": 14, "returned": 4, "pending": 2, "cancelled": 2}
    products = by_key(db, "SELECT product_id, product_name, price, stock_quantity, is_active FROM bronze_products")
    assert products == {
        "TEE-S": ("T-shirt - S", Decimal("19.99"), 14, True),
        "MUG": ("Mug", Decimal("12.00"), 30, True),  # the sale price
        "13": ('Candle, "vanilla"', Decimal("8.50"), 0, True),  # has no SKU, and is on backorder
        "STICKER": ("Sticker", None, 500, True),
        "MAP": ("Map", Decimal("6.00"), 5, False),  # not published
        "Desk lamp": ("Desk lamp", None, None, False),
    }


@THOROUGH
@variant
@pytest.mark.slow
def test_woocommerce_later_export_replaces_the_items_of_an_order(run_model: Run, tmp_path: Path) -> None:
    shutil.copytree(MODELS / "woocommerce" / "sample", tmp_path, dirs_exist_ok=True)
    lines = [line for line in read_csv(tmp_path / "orders-export-2026.csv") if line["order_id"] in ("1004", "1006")]
    for line in lines:
        line["status"] = "refunded" if line["order_id"] == "1004" else "processing"
    write_csv(tmp_path / "orders-export-2026-02.csv", lines)
    (tmp_path / "orders-export-2026.csv").rename(tmp_path / "orders-export-2026-01.csv")
    record, _ = run_model("woocommerce", tmp_path)
    # 1006 adds 12.00; 1004 now returns 43.99 more, the rest of 55.99.
    assert totals(record) == (Decimal("281.90"), Decimal("120.98"), 5, 10)


@THOROUGH
@variant
@pytest.mark.slow
@pytest.mark.parametrize("system", ["shopify", "woocommerce"])
def test_refund_that_is_no_number_is_rejected_with_its_text(
    system: str, small: Config, spark: SparkSession, tmp_path: Path
) -> None:
    """It would be missing from the returns otherwise."""
    source = shutil.copytree(MODELS / system / "sample", tmp_path / system)
    column = {"shopify": "Refunded Amount", "woocommerce": "refunded_total"}[system]
    for path in source.glob("*order*.csv"):
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            if row[column].strip("0."):
                row[column] += " EUR"
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    config = small(source_dir=str(source), models=system, settle_seconds=0, as_of_date=AS_OF, max_quarantine_rate=1)
    record = run_pipeline(config, spark)
    with open_tables(record.data_dir) as db:
        found = db.sql("SELECT DISTINCT _reasons FROM quarantine_transactions WHERE _rescued_data LIKE '% EUR%'")
        assert found.fetchall() == [(["amount_malformed"],)]
