from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from datetime import timedelta
from decimal import Decimal

import duckdb
import pytest
from conftest import ENGINE, SMALL, THOROUGH, one
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

import data_pipeline
from data_pipeline import (
    MILLION,
    TABLES,
    Batch,
    DataPipelineConfig,
    RunRecord,
    _records,
    _with_defect,
    generate_customers,
    generate_products,
    generate_transactions,
    name_pools,
)

GENERATORS = [generate_customers, generate_products, generate_transactions]
# What is found for each kind that is planted: the rule that such a row breaks.
FOUND_AS = {
    "missing_email": "email_missing",
    "malformed_email": "email_malformed",
    "impossible_age": "age_impossible",
    "missing_amount": "amount_missing",
    "future_timestamp": "timestamp_in_future",
    "unknown_customer": "customer_id_unknown",
    "unknown_product": "product_id_unknown",
    "untidy_payment_method": "payment_method_untidy",
    "unknown_payment_method": "payment_method_unknown",
}


def injected_defects(table: str, rows: int, defect_rate: float) -> Mapping[str, int]:
    """Returns the number of records with each kind of defect that the generator makes in so many rows."""
    kinds = TABLES[table].defects
    total = rows * round(defect_rate * MILLION) // MILLION
    return {kind: (total + len(kinds) - 1 - turn) // len(kinds) for turn, kind in enumerate(kinds)}


@pytest.mark.parametrize("generate", GENERATORS)
def test_rows_do_not_depend_on_partitions(
    generate: Callable[..., DataFrame],
    spark: SparkSession,
    small: Callable[..., DataPipelineConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, found = small(**SMALL), []
    for partitions in (1, 2, 8):
        monkeypatch.setattr(data_pipeline, "partition_count", lambda *_, n=partitions: n)
        rows = generate(spark, config)
        if ENGINE == "spark":  # Sail deals a single partition out to its threads
            assert rows.select(F.spark_partition_id()).distinct().count() == partitions
        found.append(sorted(map(str, rows.collect())))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) > 0


def test_another_seed_gives_other_rows(spark: SparkSession, small: Callable[..., DataPipelineConfig]) -> None:
    one_seed, other_seed = (generate_transactions(spark, small(seed=seed)) for seed in (1, 2))
    assert one_seed.select("amount", "timestamp").intersect(other_seed.select("amount", "timestamp")).count() < 5


def test_vocabulary_is_drawn_once_and_repeatable() -> None:
    first = name_pools(7)
    assert name_pools(7) is first
    name_pools.cache_clear()
    assert name_pools(7) == first
    assert name_pools(8) != first
    assert len(first.cities) == 25
    assert min(first.cities.values()) >= 1


@pytest.mark.parametrize("rate", [0.02, 0.013, 0.5])
def test_planted_kinds_are_as_many_as_said(
    rate: float, spark: SparkSession, small: Callable[..., DataPipelineConfig]
) -> None:
    config = small(defect_rate=rate)
    for table, rows in (("customers", config.num_customers), ("transactions", config.num_transactions)):
        planted = injected_defects(table, rows, rate)
        records = _with_defect(_records(spark, Batch(0, rows)), table, config).where("defect IS NOT NULL")
        assert {row["defect"]: row["count"] for row in records.groupBy("defect").count().collect()} == planted
        assert set(planted) == set(TABLES[table].defects)
        assert sum(planted.values()) == int(rows * rate)
        assert max(planted.values()) - min(planted.values()) <= 1


def test_every_planted_defect_is_found(config: DataPipelineConfig, report: RunRecord) -> None:
    customers = injected_defects("customers", config.num_customers, config.defect_rate)
    transactions = injected_defects("transactions", config.num_transactions, config.defect_rate)
    planted = {**customers, **transactions}
    found = {**report.quality["customers"].violations, **report.quality["transactions"].violations}
    for kind, rule in FOUND_AS.items():
        assert found.pop(rule) == planted.pop(kind) > 0, kind
    assert found.pop("amount_not_positive") == planted.pop("zero_amount") + planted.pop("negative_amount")
    assert report.quality["transactions"].duplicates == planted.pop("exact_duplicate") + planted.pop("changed_status")
    assert found.pop("transaction_id_conflict") == 2 * planted.pop("other_product") > 0, "both records of a key"
    assert not planted, "a kind that nothing finds"
    assert not any(found.values()), "found, but never planted"


def test_changed_status_is_later_and_wins(db: duckdb.DuckDBPyConnection, config: DataPipelineConfig) -> None:
    versions = """
        SELECT transaction_id, count(*) n, count(DISTINCT status) s, count(DISTINCT timestamp) t,
            arg_max(status, timestamp) AS last
        FROM bronze_transactions GROUP BY 1 HAVING n > 1 AND count(DISTINCT product_id) = 1"""
    planted = injected_defects("transactions", config.num_transactions, config.defect_rate)
    assert one(db, f"SELECT count(*) FROM ({versions}) WHERE s = 1 AND t = 1") == planted["exact_duplicate"]
    assert one(db, f"SELECT count(*) FROM ({versions}) WHERE s = 2 AND t = 2") == planted["changed_status"]
    kept_of_changed = f"({versions}) v JOIN transactions_clean t USING (transaction_id) WHERE s = 2"
    assert one(db, f"SELECT count(*) FROM {kept_of_changed} AND last <> 'completed'") == 0
    completed_last = f"SELECT count(*) FROM ({versions}) WHERE s = 2 AND last = 'completed'"
    assert one(db, f"SELECT count(*) FROM {kept_of_changed}") == one(db, completed_last) > 0


@THOROUGH
def test_no_defects_when_none_are_asked_for(spark: SparkSession, small: Callable[..., DataPipelineConfig]) -> None:
    config = small(defect_rate=0)
    customers, products, transactions = (generate(spark, config).cache() for generate in GENERATORS)
    assert customers.where("email IS NULL OR age NOT BETWEEN 18 AND 80").count() == 0
    assert transactions.select("transaction_id").distinct().count() == config.num_transactions
    assert transactions.join(customers, "customer_id", "left_anti").count() == 0
    assert transactions.join(products, "product_id", "left_anti").count() == 0
    wrong = (
        transactions.join(products, "product_id")
        .join(customers, "customer_id")
        .where("amount <> price * quantity OR to_date(timestamp) < signup_date OR to_date(timestamp) < created_date")
    )
    assert wrong.count() == 0
    first, last = transactions.selectExpr("to_date(min(timestamp))", "to_date(max(timestamp))").collect()[0]
    assert config.first_day <= first < config.first_day + timedelta(days=60)
    assert last == config.as_of_date


@pytest.mark.parametrize("history_days", [1, 8, 30])
def test_short_histories(history_days: int, spark: SparkSession, small: Callable[..., DataPipelineConfig]) -> None:
    config = small(history_days=history_days, defect_rate=0, num_customers=3)
    rows = generate_transactions(spark, config).selectExpr("to_date(timestamp) AS day", "customer_id").collect()
    by_day = Counter(row["day"] for row in rows)
    assert config.first_day == min(by_day) and max(by_day) == config.as_of_date
    assert {row["customer_id"] for row in rows} <= {1, 2, 3}
    assert len(by_day) == history_days
    assert max(by_day.values()) < 8 * config.num_transactions / history_days / 2 or history_days == 1


@THOROUGH
def test_default_size_looks_real(spark: SparkSession) -> None:
    from data_pipeline import customers_enriched, transactions_clean

    config = DataPipelineConfig(as_of_date="2026-03-04", defect_rate=0)  # type: ignore[arg-type]
    customers, products, transactions = (generate(spark, config).cache() for generate in GENERATORS)
    clean = transactions_clean(transactions, products).cache()
    enriched = customers_enriched(customers, clean, clean.limit(0), config)
    segments = {row["customer_segment"]: row["count"] for row in enriched.groupBy("customer_segment").count().collect()}
    assert set(segments) == set(config.segments)
    assert min(segments.values()) >= 0.05 * config.num_customers, segments
    assert transactions.where("status = 'completed'").count() > 0.8 * config.num_transactions
    by_day = {row["day_of_week"]: row["count"] for row in clean.groupBy("day_of_week").count().collect()}
    assert by_day[6] > 1.3 * by_day[2]
    by_hour = {row["hour"]: row["count"] for row in clean.groupBy("hour").count().collect()}
    assert by_hour[20] > 4 * by_hour[3]
    assert clean.select("amount").agg(F.min("amount")).collect()[0][0] >= Decimal("3.99")


def test_ids_get_the_digits_they_need(spark: SparkSession, small: Callable[..., DataPipelineConfig]) -> None:
    config = small(num_transactions=20_000_000_000, num_products=1_000_000, defect_rate=0)
    rows = generate_transactions(spark, config).limit(3).select("transaction_id", "product_id").collect()
    assert {len(row["transaction_id"]) for row in rows} == {len("TXN_") + 11}
    assert {len(row["product_id"]) for row in rows} == {len("PROD_") + 7}
    assert generate_products(spark, small()).selectExpr("min(product_id)").collect()[0][0] == "PROD_0001"
