from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime
from decimal import Decimal
from typing import Any

import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

import data_pipeline
from data_pipeline import (
    AGE_GROUPS,
    TABLES,
    DataPipelineConfig,
    band,
    category_analytics,
    customer_analytics,
    customers_enriched,
    device_analytics,
    mean_or_zero,
    orders_by_dimension,
    payment_analytics,
    product_analytics,
    products_active,
    transactions_clean,
    transactions_returned,
)

Frame = Callable[..., DataFrame]


def schema(table: str) -> str:
    return " ".join(TABLES[table].schema.split())


def rows(frame: DataFrame) -> list[dict[str, Any]]:
    return [row.asDict() for row in frame.collect()]


def enriched(frame: Frame, config: DataPipelineConfig, *orders: tuple[int, str], **customer: Any) -> dict[str, Any]:
    """A customer, 1, with orders of these amounts."""
    known = {"customer_id": 1, "first_name": "Ann", "last_name": "Lee", **customer}
    orders_and_returns = orders_of(frame, *orders), orders_of(frame)
    [row] = rows(customers_enriched(frame(schema("customers"), known), *orders_and_returns, config))
    return row


def orders_of(frame: Frame, *orders: tuple[int, str]) -> DataFrame:
    """Orders of these customers and amounts, one a day."""
    clean = [
        {"customer_id": buyer, "amount": Decimal(amount), "transaction_date": date(2026, 1, day)}
        for day, (buyer, amount) in enumerate(orders, start=1)
    ]
    return frame(schema("transactions_clean"), *clean)


def test_segment_borders(frame: Frame, config: DataPipelineConfig) -> None:
    """Each customer has two orders, and one is of somebody else."""
    expected = {
        "500.00": "Bronze", "500.01": "Silver", "1500.00": "Silver", "1500.01": "Gold",
        "3000.00": "Gold", "3000.01": "Premium", "0.01": "Bronze",
    }  # fmt: skip
    customers = [{"customer_id": number, "first_name": "Ann", "last_name": "Lee"} for number in range(len(expected))]
    orders = [(-1, "9999.00")]
    for number, spent in enumerate(map(Decimal, expected)):
        first = (spent / 2).quantize(Decimal("0.01"))
        orders += [(number, str(first)), (number, str(spent - first))]
    orders_and_returns = orders_of(frame, *orders), orders_of(frame)
    found = rows(customers_enriched(frame(schema("customers"), *customers), *orders_and_returns, config))
    assert {str(row["total_spent"]): row["customer_segment"] for row in found} == expected


def test_thresholds_are_configuration(frame: Frame, small: Callable[..., DataPipelineConfig]) -> None:
    config = small(silver_above="0.99", gold_above=2, premium_above=3)
    assert enriched(frame, config, (1, "1.00"))["customer_segment"] == "Silver"


def test_customer_without_orders(frame: Frame, config: DataPipelineConfig) -> None:
    row = enriched(frame, config, (2, "10.00"), age=17, signup_date=date(2026, 3, 1))
    assert (row["total_orders"], row["total_spent"], row["avg_order_value"]) == (0, Decimal("0.00"), Decimal("0.00"))
    assert (row["first_order_date"], row["last_order_date"]) == (None, None)
    assert (row["customer_segment"], row["age_group"], row["tenure_days"]) == ("Bronze", "Under 18", 3)
    assert row["full_name"] == "Ann Lee"


def test_orders_of_a_customer(frame: Frame, config: DataPipelineConfig) -> None:
    row = enriched(frame, config, (1, "0.01"), (1, "0.02"), (2, "7.00"), (1, "0.02"))
    assert (row["total_orders"], row["total_spent"], row["avg_order_value"]) == (3, Decimal("0.05"), Decimal("0.02"))
    assert (row["first_order_date"], row["last_order_date"]) == (date(2026, 1, 1), date(2026, 1, 4))
    assert (row["age_group"], row["tenure_days"]) == (None, None)


def test_unknown_members(frame: Frame, small: Callable[..., DataPipelineConfig]) -> None:
    """Customers that only orders or returns know, and one for the orders of nobody: all revenue has a customer."""
    customers = frame(schema("customers"), {"customer_id": 1, "first_name": "Ann", "last_name": " "})
    orders = orders_of(frame, (0, "600.00"), (1, "1.00"), (7, "501.00"), (0, "9.00"))
    returns = orders_of(frame, (8, "-2.00"), (1, "-1.00"))
    found = {
        row["customer_id"]: row for row in rows(customers_enriched(customers, orders, returns, small(orphans="keep")))
    }
    columns = ("full_name", "total_orders", "total_spent", "customer_segment", "is_inferred")
    assert {key: tuple(row[column] for column in columns) for key, row in found.items()} == {
        0: ("Unknown", 2, Decimal("609.00"), "Unknown", True),
        1: ("Ann", 1, Decimal("1.00"), "Bronze", False),
        7: ("Unknown", 1, Decimal("501.00"), "Silver", True),
        8: ("Unknown", 0, Decimal("0.00"), "Bronze", True),
    }  # fmt: skip
    assert (found[7]["first_name"], found[7]["last_name"], found[7]["email"], found[7]["city"]) == (
        "Unknown", "Unknown", None, None,
    )  # fmt: skip
    assert found[1]["last_name"] == "Unknown"


def test_lines_of_one_order_are_one_order(frame: Frame, config: DataPipelineConfig) -> None:
    """A row without an order_id is an order of its own."""
    lines = [("A", "1.00"), ("A", "2.00"), ("B", "4.00"), (None, "8.00"), (None, "16.00")]
    clean = [
        {"customer_id": 1, "amount": Decimal(amount), "order_id": order, "transaction_date": date(2026, 1, 1)}
        for order, amount in lines
    ]
    customers = frame(schema("customers"), {"customer_id": 1})
    orders = frame(schema("transactions_clean"), *clean)
    [row] = rows(customers_enriched(customers, orders, orders_of(frame), config, has_order_ids=True))
    assert (row["total_orders"], row["total_spent"], row["avg_order_value"]) == (4, Decimal("31.00"), Decimal("7.75"))


def test_age_groups(frame: Frame) -> None:
    expected = {
        17: "Under 18",
        18: "18-24",
        24: "18-24",
        25: "25-34",
        64: "55-64",
        65: "65+",
        120: "65+",
        None: None,
    }
    ages = frame("age INT", *({"age": age} for age in expected))
    assert {
        row["age"]: row["group"] for row in ages.select("age", band(F.col("age"), AGE_GROUPS).alias("group")).collect()
    } == expected


def test_average_rounds_half_up(frame: Frame) -> None:
    expected = {
        ("0.05", 2): "0.03",
        ("0.01", 2): "0.01",
        ("0.01", 3): "0.00",
        ("10.00", 3): "3.33",
        ("0.00", 0): "0.00",
    }
    sums = frame(
        "total DECIMAL(20,2), count BIGINT", *({"total": Decimal(total), "count": count} for total, count in expected)
    )
    found = sums.select("total", "count", mean_or_zero(F.col("total"), F.col("count")).alias("mean")).collect()
    assert {(str(row["total"]), row["count"]): str(row["mean"]) for row in found} == expected


def test_transactions_clean(frame: Frame) -> None:
    products = frame(schema("products"), {"product_id": "PROD_0001", "category": "Toys", "is_active": False})
    order = {"product_id": "PROD_0001", "payment_method": " Credit Card ", "amount": Decimal("1.00"), "quantity": 1,
             "customer_id": 5}  # fmt: skip
    transactions = [
        {**order, "transaction_id": f"TXN_{day}", "timestamp": datetime(2026, 3, day, 23, 30), "status": status}
        for day, status in ((1, "completed"), (2, "completed"), (7, "completed"), (3, "refunded"), (4, "pending"))
    ]
    result = rows(transactions_clean(frame(schema("transactions"), *transactions), products).orderBy("timestamp"))
    assert [row["transaction_id"] for row in result] == ["TXN_1", "TXN_2", "TXN_7"]
    assert [row["day_of_week"] for row in result] == [7, 1, 6], "1 March 2026 was a Sunday"
    assert [row["is_weekend"] for row in result] == [True, False, True]
    first = result[0]
    assert (first["payment_method"], first["product_category"], first["hour"]) == ("credit_card", "Toys", 23)
    assert (first["transaction_date"], first["transaction_year"], first["transaction_month"]) == (
        date(2026, 3, 1),
        2026,
        3,
    )


def test_orders_of_unknown_products_and_customers(frame: Frame) -> None:
    products = frame(schema("products"), {"product_id": "A", "category": None}, {"product_id": "B", "category": "Toys"})
    order = {"payment_method": None, "amount": Decimal("1.00"), "quantity": 1, "status": "completed"}
    orders = [{**order, "product_id": name, "transaction_id": f"T{name}"} for name in ("A", "B", "gone", None, " ")]
    found = rows(transactions_clean(frame(schema("transactions"), *orders), products))
    assert sorted((row["transaction_id"], row["product_id"], row["product_category"]) for row in found) == [
        ("T ", "Unknown", "Unknown"), ("TA", "A", "Unknown"), ("TB", "B", "Toys"), ("TNone", "Unknown", "Unknown"),
        ("Tgone", "gone", "Unknown"),
    ]  # fmt: skip
    assert {(row["customer_id"], row["payment_method"]) for row in found} == {(0, "unknown")}


def test_returns_are_apart_from_orders(frame: Frame) -> None:
    products = frame(schema("products"), {"product_id": "A", "category": "Toys"})
    cases = [(status, sign) for status in data_pipeline.STATUSES for sign in (1, -1)]
    moves = [
        {"transaction_id": f"{status} {sign}", "product_id": "A", "status": status, "quantity": sign,
         "amount": sign * Decimal("2.00")}
        for status, sign in cases
    ]  # fmt: skip
    received = frame(schema("transactions"), *moves)
    clean, returned = (rows(build(received, products)) for build in (transactions_clean, transactions_returned))
    assert [row["transaction_id"] for row in clean] == ["completed 1"]
    assert sorted(row["transaction_id"] for row in returned) == ["completed -1", "refunded -1", "returned -1"]
    assert {(row["amount"], row["quantity"], row["product_category"]) for row in returned} == {
        (Decimal("-2.00"), -1, "Toys")
    }


def test_what_is_not_known_of_a_product(frame: Frame) -> None:
    """It is sold, as far as one knows; in gold it is counted, and adds nothing else."""
    full = {"product_id": "a", "price": Decimal("4.00"), "stock_quantity": 3, "supplier": "Ford", "category": "Toys"}
    unnamed = {"product_id": "b", "supplier": "Ford", "category": "Toys", "product_name": " "}
    oversold = {"product_id": "d", "stock_quantity": -2}
    found = products_active(frame(schema("products"), full, unnamed, {"product_id": "c"}, oversold))
    known = {row["product_id"]: row for row in rows(found)}
    assert sorted(known) == ["a", "b", "c"]
    assert all(row["is_active"] for row in known.values())
    unknown = known["c"]
    assert (unknown["product_name"], unknown["category"], unknown["supplier"]) == ("Unknown", "Unknown", None)
    assert (unknown["price_band"], unknown["stock_status"], unknown["inventory_value"]) == (None, None, None)
    assert [tuple(row.values()) for row in rows(product_analytics(found).orderBy("category"))] == [
        ("Toys", "Ford", 2, Decimal("4.00"), 3, Decimal("12.00")),
        ("Unknown", "Unknown", 1, Decimal("0.00"), 0, Decimal("0.00")),
    ]


def test_products_active(frame: Frame) -> None:
    def product(name: str, price: str, stock: int, active: bool = True) -> dict[str, Any]:
        return {"product_id": name, "price": Decimal(price), "stock_quantity": stock, "is_active": active}

    products = frame(
        schema("products"),
        product("a", "25.00", 20),
        product("b", "25.01", 21),
        product("c", "500.00", 100),
        product("d", "500.01", 101),
        product("sold out", "1.00", 0),
        product("withdrawn", "1.00", 9, active=False),
    )
    found = {row["product_id"]: row for row in rows(products_active(products))}
    assert {name: (row["price_band"], row["stock_status"]) for name, row in found.items()} == {
        "a": ("Budget", "Low"),
        "b": ("Standard", "Medium"),
        "c": ("Premium", "Medium"),
        "d": ("Luxury", "High"),
    }
    assert found["d"]["inventory_value"] == Decimal("50501.01")


def test_gold_names_what_is_unknown(frame: Frame) -> None:
    order = {"product_category": "Toys", "payment_method": "paypal", "amount": Decimal("2.00"), "quantity": 1}
    cube = orders_by_dimension(
        frame(schema("transactions_clean"), order, {**order, "device": "mobile", "browser": "Safari"})
    )
    devices = {(row["device"], row["browser"]) for row in device_analytics(cube).collect()}
    assert devices == {("Unknown", "Unknown"), ("mobile", "Safari")}
    customer = {"customer_segment": "Bronze", "total_orders": 0, "total_spent": Decimal("0.00")}
    [row] = rows(customer_analytics(frame(schema("customers_enriched"), customer)))
    assert (row["city"], row["customer_count"], row["avg_order_value"]) == ("Unknown", 1, Decimal("0.00"))


def test_gold_of_nothing_is_empty(frame: Frame) -> None:
    cube = orders_by_dimension(frame(schema("transactions_clean")))
    assert category_analytics(cube).count() == payment_analytics(cube).count() == device_analytics(cube).count() == 0
    assert product_analytics(frame(schema("products_active"))).count() == 0


def test_shares_add_up_to_one(frame: Frame) -> None:
    orders = [
        {"product_category": category, "payment_method": category, "amount": Decimal(amount), "quantity": 1}
        for category, amount in (("a", "1.00"), ("b", "2.00"), ("b", "5.00"))
    ]
    cube = orders_by_dimension(frame(schema("transactions_clean"), *orders))
    assert {row["product_category"]: row["revenue_share"] for row in rows(category_analytics(cube))} == {
        "a": 0.125,
        "b": 0.875,
    }
    assert sum(row["usage_share"] for row in rows(payment_analytics(cube))) == pytest.approx(1)


def test_tables_declare_columns_keys_and_order(spark: SparkSession) -> None:
    assert [table.layer for table in TABLES.values()] == ["bronze"] * 3 + ["silver"] * 5 + ["gold"] * 5
    for name, table in TABLES.items():
        assert table.name == name
        assert table.from_table in TABLES or table.layer == "bronze"
        for layer in (table.layer, *(["quarantine"] if table.layer == "bronze" else [])):
            assert spark.createDataFrame([], table.schema_in(layer)).dtypes == table.columns(layer)
        parsed = spark.createDataFrame([], table.schema)
        assert parsed.dtypes == table.columns()
        assert set(table.key) <= set(parsed.columns)
        assert bool(table.order) == (table.layer == "gold")
