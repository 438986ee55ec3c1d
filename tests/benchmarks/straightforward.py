"""The pipeline as one writes it in PySpark on the first day, with nothing done yet for its speed.

Rows are made in loops with `random`, each table is counted after it was written, each check is a job of its own, and
each table of gold is a `groupBy` over silver.
"""

from __future__ import annotations

import math
import os
import random
import sys
from collections.abc import Mapping
from datetime import datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any

from peer import (
    Audited,
    ColumnProfile,
    Peer,
    clears,
    conflict_reasons,
    delivery,
    main,
    profiled,
    reference_rules,
    rejecting_rules,
)
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from data_pipeline import (
    AGE_GROUPS,
    BRONZE,
    CATEGORIES,
    COMPLETED,
    DEVICES_AND_BROWSERS,
    GOLD,
    HOUR_WEIGHTS,
    MILLION,
    ON_SALE,
    PAYMENT_METHOD,
    PAYMENT_METHODS,
    PRICE_BANDS,
    QUANTITIES,
    QUARANTINE,
    RETURNED,
    SILVER,
    SNAPSHOT_TABLES,
    STATUSES,
    STOCK_STATUSES,
    TABLES,
    UNKNOWN,
    WEEKDAY_WEIGHTS,
    DataPipelineConfig,
    Quality,
    Table,
    name_pools,
    tables,
)

Row = tuple[Any, ...]


# ── Generate ─────────────────────────────────────────────────────────────────────────────────────────────────────


def defect_of(table: str, number: int, config: DataPipelineConfig) -> str | None:
    """The kind of defect that the record is given, None for most."""
    kinds, rate = TABLES[table].defects, round(config.defect_rate * MILLION)
    up_to, before = number * rate // MILLION, (number - 1) * rate // MILLION
    return kinds[(up_to - 1) % len(kinds)] if up_to > before else None


def make_customers(config: DataPipelineConfig) -> list[Row]:
    """One row per customer record."""
    rng, words = random.Random(config.seed), name_pools(config.seed)
    rows: list[Row] = []
    for number in range(1, config.num_customers + 1):
        defect = defect_of("customers", number, config)
        first_name, last_name = rng.choice(words.first_names), rng.choice(words.last_names)
        domain = rng.choice(("example.com", "example.org", "example.net"))
        email: str | None = f"{first_name}.{last_name}{number}@{domain}".lower()
        age = 18 + rng.randrange(32) + rng.randrange(32)
        if defect == "missing_email":
            email = None
        elif defect == "malformed_email":
            email = f"{first_name}.{last_name}(at){domain}".lower()
        elif defect == "impossible_age":
            age += 200
        [city] = rng.choices(list(words.cities), list(words.cities.values()))
        signup_date = config.first_day + timedelta(days=(number - 1) * config.history_days // config.num_customers)
        rows.append((number, first_name, last_name, email, age, city, signup_date))
    return rows


def make_products(config: DataPipelineConfig) -> list[Row]:
    """One row per product record."""
    rng, words = random.Random(config.seed + 1), name_pools(config.seed)
    digits = max(4, len(str(config.num_products)))
    rows: list[Row] = []
    for number in range(1, config.num_products + 1):
        [name] = rng.choices(list(CATEGORIES), [category.weight for category in CATEGORIES.values()])
        category = CATEGORIES[name]
        # The product of two uniform numbers: many cheap products, few dear ones.
        above = int((category.highest_price - category.lowest_price) * rng.random() * rng.random())
        rows.append(
            (
                f"PROD_{number:0{digits}}",
                f"{rng.choice(words.adjectives)} {rng.choice(category.nouns)}",
                name,
                Decimal(category.lowest_price + above) + Decimal("0.99"),
                rng.randint(1, 500) if rng.random() < 0.95 else 0,
                rng.choice(words.suppliers),
                rng.randint(5, 2004) / 100,
                config.first_day - timedelta(days=rng.randint(1, 365)),
                rng.random() < 0.92,
            )
        )
    return rows


def make_transactions(config: DataPipelineConfig, customers: list[Row], products: list[Row]) -> list[Row]:
    """One row per transaction record."""
    rng, words = random.Random(config.seed + 2), name_pools(config.seed)
    loyalty = [rng.random() for _ in customers]
    digits = max(7, len(str(config.num_transactions)))
    weeks = math.ceil(config.history_days / 7)
    weekday_weights = [WEEKDAY_WEIGHTS[(config.as_of_date.weekday() - ago) % 7] for ago in range(7)]
    rows: list[Row] = []
    for number in range(1, config.num_transactions + 1):
        defect = defect_of("transactions", number, config)
        if defect in ("exact_duplicate", "changed_status", "other_product"):
            repeated = rows[-1]
            if defect == "changed_status":
                *before, moment, method, status, device, browser, location, order_id, currency = repeated
                status = "refunded" if status == "completed" else "completed"
                moment += timedelta(minutes=1)
                repeated = (*before, moment, method, status, device, browser, location, order_id, currency)
            elif defect == "other_product":
                transaction_id, customer_id, product_id, quantity, _, *after = repeated
                product = products[int(product_id.removeprefix("PROD_")) % len(products)]
                repeated = (transaction_id, customer_id, product[0], quantity, product[3] * quantity, *after)
            rows.append(repeated)
            continue
        [weekday] = rng.choices(range(7), weekday_weights)
        days_ago = (min(rng.randrange(weeks), rng.randrange(weeks)) * 7 + weekday) % config.history_days
        signed_up = -(-(config.history_days - days_ago) * len(customers) // config.history_days)
        # Of two customers who had signed up by then the more loyal one, so that few customers buy much.
        index = max(rng.randrange(signed_up), rng.randrange(signed_up), key=loyalty.__getitem__)
        customer_id, city = index + 1, customers[index][5]
        product = rng.choice(products)
        product_id, price = product[0], product[3]
        [quantity] = rng.choices(list(QUANTITIES), list(QUANTITIES.values()))
        amount: Decimal | None = price * quantity
        [hour] = rng.choices(range(24), HOUR_WEIGHTS)
        [payment_method] = rng.choices(list(PAYMENT_METHODS), list(PAYMENT_METHODS.values()))
        [status] = rng.choices(list(STATUSES), list(STATUSES.values()))
        [session] = rng.choices(list(DEVICES_AND_BROWSERS), list(DEVICES_AND_BROWSERS.values()))
        device, browser = session.split("/")
        if rng.random() < 0.1:
            [city] = rng.choices(list(words.cities), list(words.cities.values()))
        if defect == "missing_amount":
            amount = None
        elif defect == "zero_amount":
            amount = Decimal(0)
        elif defect == "negative_amount":
            amount = -price * quantity
        elif defect == "future_timestamp":
            days_ago = -rng.randint(1, 30)
        elif defect == "unknown_customer":
            customer_id += len(customers)
        elif defect == "unknown_product":
            product_id = "PROD_" + "0" * (len(product_id) - len("PROD_"))
        elif defect == "untidy_payment_method":
            payment_method = f"  {payment_method.replace('_', ' ').title()} "
        elif defect == "unknown_payment_method":
            payment_method = "seashells"
        day = config.as_of_date - timedelta(days=days_ago)
        moment = datetime.combine(day, time(hour), timezone.utc) + timedelta(seconds=rng.randrange(3540))
        rows.append(
            (
                f"TXN_{number:0{digits}}",
                customer_id,
                product_id,
                quantity,
                amount,
                moment,
                payment_method,
                status,
                device,
                browser,
                city,
                None,
                "USD",
            )
        )
    return rows


# ── Refine ───────────────────────────────────────────────────────────────────────────────────────────────────────


def band(column: str, bounds: Mapping[str, Any]) -> Column:
    """The first label whose bound the value does not exceed; null for null."""
    labels = F.when(F.lit(False), None)
    for name, bound in bounds.items():
        labels = labels.when(F.col(column).isNotNull() if bound is None else F.col(column) <= F.lit(bound), name)
    return labels


def known(text: Column) -> Column:
    """The text; Unknown where it is missing or blank."""
    return F.when(F.trim(text) != "", text).otherwise(UNKNOWN)


def mean_or_zero(total: str, count: str) -> Column:
    """The total divided by the count; 0 where there is nothing to count."""
    return F.when(F.col(count) == 0, F.lit(0)).otherwise(F.col(total) / F.col(count))


def products_active(products: DataFrame) -> DataFrame:
    """One row per product that is active and in stock, as far as that is known."""
    return (
        products.filter(ON_SALE)
        .withColumn("product_name", known(F.col("product_name")))
        .withColumn("category", known(F.col("category")))
        .withColumn("is_active", F.lit(True))
        .withColumn("price_band", band("price", PRICE_BANDS))
        .withColumn("stock_status", band("stock_quantity", STOCK_STATUSES))
        .withColumn("inventory_value", F.col("price") * F.col("stock_quantity"))
    )


def with_category_and_date(transactions: DataFrame, products: DataFrame) -> DataFrame:
    """One row per transaction, with the category of its product and the parts of its date."""
    categories = products.select("product_id", known(F.col("category")).alias("product_category"))
    return (
        transactions.join(categories, "product_id")
        .withColumn("payment_method", F.expr(f"coalesce(nullif({PAYMENT_METHOD}, ''), 'unknown')"))
        .withColumn("transaction_date", F.to_date("timestamp"))
        .withColumn("transaction_year", F.year("timestamp"))
        .withColumn("transaction_month", F.month("timestamp"))
        .withColumn("day_of_week", F.weekday("timestamp") + 1)
        .withColumn("hour", F.hour("timestamp"))
        .withColumn("is_weekend", F.col("day_of_week") >= 6)
    )


def transactions_clean(transactions: DataFrame, products: DataFrame) -> DataFrame:
    """One row per completed order."""
    return with_category_and_date(transactions.filter(COMPLETED), products)


def transactions_returned(transactions: DataFrame, products: DataFrame) -> DataFrame:
    """One row per return."""
    return with_category_and_date(transactions.filter(RETURNED), products)


def customers_enriched(customers: DataFrame, transactions_clean: DataFrame, config: DataPipelineConfig) -> DataFrame:
    """One row per customer."""
    orders = transactions_clean.groupBy("customer_id").agg(
        F.count("*").alias("total_orders"),
        F.sum("amount").alias("total_spent"),
        F.min("transaction_date").alias("first_order_date"),
        F.max("transaction_date").alias("last_order_date"),
    )
    return (
        customers.join(orders, "customer_id", "left")
        .withColumn("total_orders", F.coalesce("total_orders", F.lit(0)))
        .withColumn("total_spent", F.coalesce("total_spent", F.lit(0)))
        .withColumn("total_spent", F.col("total_spent").cast("decimal(20,2)"))
        .withColumn("full_name", known(F.trim(F.concat_ws(" ", "first_name", "last_name"))))
        .withColumn("first_name", known(F.col("first_name")))
        .withColumn("last_name", known(F.col("last_name")))
        .withColumn("age_group", band("age", AGE_GROUPS))
        .withColumn("customer_segment", band("total_spent", config.segments))
        .withColumn("tenure_days", F.datediff(F.lit(config.as_of_date), "signup_date"))
        .withColumn("avg_order_value", mean_or_zero("total_spent", "total_orders"))
        .withColumn("is_inferred", F.lit(False))
    )


def customer_analytics(customers_enriched: DataFrame) -> DataFrame:
    """One row per segment and city."""
    return (
        customers_enriched.withColumn("city", F.coalesce("city", F.lit("Unknown")))
        .groupBy("customer_segment", "city")
        .agg(
            F.count("*").alias("customer_count"),
            F.sum("age").cast("decimal(18,0)").alias("years"),
            F.count("age").alias("ages"),
            F.sum("total_orders").alias("orders"),
            F.sum("total_spent").cast("decimal(20,2)").alias("segment_revenue"),
        )
        .withColumn("avg_age", mean_or_zero("years", "ages"))
        .withColumn("avg_total_spent", mean_or_zero("segment_revenue", "customer_count"))
        .withColumn("avg_order_value", mean_or_zero("segment_revenue", "orders"))
    )


def category_analytics(transactions_clean: DataFrame) -> DataFrame:
    """One row per product category."""
    total = transactions_clean.agg(F.sum("amount")).collect()[0][0]
    return (
        transactions_clean.groupBy("product_category")
        .agg(
            F.count("*").alias("transaction_count"),
            F.sum("amount").cast("decimal(20,2)").alias("total_revenue"),
            F.min("amount").alias("min_transaction"),
            F.max("amount").alias("max_transaction"),
            F.sum("quantity").alias("units_sold"),
        )
        .withColumn("avg_transaction_value", mean_or_zero("total_revenue", "transaction_count"))
        .withColumn("revenue_share", F.col("total_revenue").cast("double") / F.lit(float(total or 0)))
    )


def payment_analytics(transactions_clean: DataFrame) -> DataFrame:
    """One row per payment method."""
    total = transactions_clean.count()
    return (
        transactions_clean.groupBy("payment_method")
        .agg(F.count("*").alias("usage_count"), F.sum("amount").cast("decimal(20,2)").alias("total_amount"))
        .withColumn("avg_amount", mean_or_zero("total_amount", "usage_count"))
        .withColumn("usage_share", F.col("usage_count") / F.lit(total))
    )


def device_analytics(transactions_clean: DataFrame) -> DataFrame:
    """One row per device and browser."""
    return (
        transactions_clean.fillna("Unknown", ["device", "browser"])
        .groupBy("device", "browser")
        .agg(
            F.count("*").alias("transaction_count"),
            F.sum("amount").cast("decimal(20,2)").alias("total_revenue"),
            F.sum("quantity").alias("units_sold"),
        )
        .withColumn("avg_transaction_value", mean_or_zero("total_revenue", "transaction_count"))
    )


def product_analytics(products_active: DataFrame) -> DataFrame:
    """One row per category and supplier."""
    return (
        products_active.withColumn("supplier", known(F.col("supplier")))
        .groupBy("category", "supplier")
        .agg(
            F.count("*").alias("product_count"),
            F.sum("price").cast("decimal(20,2)").alias("total_price"),
            F.count("price").alias("prices"),
            F.sum("stock_quantity").alias("total_stock"),
            F.sum("inventory_value").alias("inventory_value"),
        )
        .withColumn("avg_price", mean_or_zero("total_price", "prices"))
        .fillna(0, ["total_stock", "inventory_value"])
    )


def with_conflicts(records: DataFrame, table: Table) -> DataFrame:
    """Adds whether a record is no version of the others of its key, `_conflict`, or of a key with such, `_disputed`."""
    of_key = Window.partitionBy(*table.key)
    latest_first = of_key.orderBy(*(F.expr(by).desc() for by in (*table.sequence_by, "_delivery")))
    ranked = records.withColumn("_rank", F.rank().over(latest_first))
    latest = F.when(F.col("_rank") == 1, F.struct(*(name for name, _ in table.columns())))
    constants, latest_ones = (
        F.size(F.collect_set(values).over(of_key)) for values in (F.struct(*table.constant), latest)
    )
    conflict = (constants > 1) | ((F.col("_rank") == 1) & (latest_ones > 1))
    return ranked.withColumn("_conflict", conflict).withColumn("_disputed", F.max("_conflict").over(of_key))


class Straightforward(Peer):
    """A run in PySpark without any tuning."""

    def __init__(self, config: DataPipelineConfig) -> None:
        super().__init__(config)
        # Spark's workers would take the `python3` of the PATH.
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        builder = SparkSession.builder.appName("straightforward").config("spark.sql.session.timeZone", "UTC")
        # The default, INT96, is no moment in UTC, as the tables' contract wants it.
        self.spark = builder.config("spark.sql.parquet.outputTimestampType", "TIMESTAMP_MICROS").getOrCreate()

    def save(self, layer: str, table: Table, rows: DataFrame) -> int:
        """Writes a table with the declared columns, types and order; returns its number of rows."""
        declared = table.columns(layer)
        rows = rows.select(*(F.col(name).cast(kind) for name, kind in declared))
        if table.order:
            order = [F.expr(by[1:]).desc() if by.startswith("-") else F.expr(by) for by in table.order]
            rows = rows.orderBy(*order).coalesce(1)
        rows.write.parquet(str(self.path(layer, table.name)))
        count = self.read(layer, table).count()
        self.wrote(layer, table.name, count)
        return count

    def read(self, layer: str, table: Table) -> DataFrame:
        """A written table."""
        return self.spark.read.parquet(str(self.path(layer, table.name)))

    def bronze(self) -> None:
        customers, products = make_customers(self.config), make_products(self.config)
        transactions = make_transactions(self.config, customers, products)
        for table, rows in zip(tables(BRONZE), (customers, products, transactions), strict=True):
            lineage = (self.ingested_at, self.run_id, delivery(self.config), None, None, None)
            schema = table.schema_in(BRONZE)
            self.save(BRONZE, table, self.spark.createDataFrame([row + lineage for row in rows], schema))

    def silver(self) -> None:
        valid: dict[str, DataFrame] = {}
        for table in tables(BRONZE):
            valid[table.name] = self.divide(table, valid)
        self.gate()
        active, clean, returned, enriched = tables(SILVER)
        self.save(SILVER, active, products_active(valid["products"]))
        self.save(SILVER, clean, transactions_clean(valid["transactions"], valid["products"]))
        self.save(SILVER, returned, transactions_returned(valid["transactions"], valid["products"]))
        self.save(SILVER, enriched, customers_enriched(valid["customers"], self.read(SILVER, clean), self.config))

    def gold(self) -> None:
        active, clean, _, enriched = (self.read(SILVER, table) for table in tables(SILVER))
        built = {
            "customer_analytics": customer_analytics(enriched),
            "category_analytics": category_analytics(clean),
            "payment_analytics": payment_analytics(clean),
            "device_analytics": device_analytics(clean),
            "product_analytics": product_analytics(active),
        }
        for table in tables(GOLD):
            self.save(GOLD, table, built[table.name])

    def divide(self, table: Table, valid: Mapping[str, DataFrame]) -> DataFrame:
        """Divides bronze into refused rows, which are written, and valid ones, one per key, which are returned."""
        [key] = table.key
        received = self.read(BRONZE, table)
        checked = received
        for column, parent in table.foreign_keys.items():
            known = valid[parent].select(column, F.lit(True).alias(f"_{column}_known"))
            checked = checked.join(known, column, "left")
        failed = {rule.name: received.filter(rule.is_violated(self.config)).count() for rule in table.rules}
        failed |= {rule.name: checked.filter(rule.is_violated(self.config)).count() for rule in reference_rules(table)}
        reasons = [
            F.when(F.expr(rule.is_violated(self.config)), rule.name) for rule in rejecting_rules(table, self.config)
        ]
        checked = checked.withColumn("_reasons", F.array_compact(F.array(*reasons)))
        refused, passed = checked.filter(F.size("_reasons") > 0), checked.filter(F.size("_reasons") == 0)
        outdone = 0
        for reason in conflict_reasons(table):
            flagged = with_conflicts(passed, table)
            conflicts = flagged.filter("_conflict").withColumn("_reasons", F.array(F.lit(reason)))
            failed[reason], outdone = conflicts.count(), flagged.filter("_disputed AND NOT _conflict").count()
            refused, passed = refused.unionByName(conflicts.select(*refused.columns)), flagged.filter("NOT _disputed")
        quarantined = self.save(QUARANTINE, table, refused)
        passed = passed.select(*received.columns)
        order = [F.expr(by).desc() for by in (*table.sequence_by, "_delivery", *received.columns)]
        kept = (
            passed.withColumn("_rank", F.row_number().over(Window.partitionBy(key).orderBy(*order)))
            .filter("_rank = 1")
            .drop("_rank")
        )
        for rule in clears(table):
            kept = kept.withColumn(rule.column, F.when(~F.expr(rule.is_violated(self.config)), F.col(rule.column)))
        rows, kept_rows = received.count(), kept.count()
        versions = passed.select(*(name for name, _ in table.columns())).distinct().count()
        duplicates, superseded = passed.count() + outdone - kept_rows, versions + outdone - kept_rows
        quality = Quality(rows, kept_rows, quarantined, duplicates, failed, superseded=superseded)
        self.account(table, quality, self.profiles(table), rows - received.select(key).distinct().count())
        return kept

    def profiles(self, table: Table) -> dict[str, ColumnProfile]:
        """The profile of each column of a bronze table."""
        received = self.read(BRONZE, table)
        found = {}
        for name in profiled(table):
            least, most = (bound(name).cast("string") for bound in (F.min, F.max))
            found[name] = ColumnProfile(
                *received.agg(F.count(name), F.approx_count_distinct(name), least, most).collect()[0]
            )
        return found

    def read_back(self) -> dict[str, Audited]:
        found = {}
        for layer, table in SNAPSHOT_TABLES:
            rows = self.read(layer, table)
            # Reads every value: a count alone reads no more than the files' ends.
            rows.agg(F.max(F.hash(*(name for name, _ in table.columns(table.layer))))).collect()
            keys = None if table.layer == BRONZE else rows.select(*table.key).distinct().count()
            revenue = rows.agg(F.sum(table.revenue)).collect()[0][0] or Decimal(0) if table.revenue else None
            found[f"{layer}.{table.name}"] = Audited(rows.count(), keys, revenue)
        self.spark.stop()
        return found


if __name__ == "__main__":
    sys.exit(main(Straightforward))
