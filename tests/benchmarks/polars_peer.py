"""The pipeline's work in Polars, made as fast as Polars can be: the benchmark's measure of another engine.

Queries are lazy and run on the streaming engine; those that need the same rows run together, so that the rows are read
or computed once. Only what is small is held in memory: the rows that are refused or repeated, the valid customers and
products.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

import polars as pl
from peer import (
    Audited,
    ColumnProfile,
    Peer,
    clears,
    conflict_reasons,
    delivery,
    main,
    parameters,
    profiled,
    reference_rules,
    rejecting_rules,
    salt,
    weighted,
)

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
    Rule,
    Table,
    name_pools,
    tables,
)

TYPES: Mapping[str, pl.DataType] = {
    "bigint": pl.Int64(),
    "int": pl.Int32(),
    "double": pl.Float64(),
    "boolean": pl.Boolean(),
    "string": pl.String(),
    "date": pl.Date(),
    "timestamp": pl.Datetime("us", "UTC"),
    "array<string>": pl.List(pl.String()),
}


def data_type(kind: str) -> pl.DataType:
    """The type that Spark calls so."""
    if precision := re.fullmatch(r"decimal\((\d+),(\d+)\)", kind):
        return pl.Decimal(*map(int, precision.groups()))
    return TYPES[kind]


def sql(spark_sql: str) -> pl.Expr:
    """An expression in Spark SQL; a normalised payment method is looked up in the column `_tidy`."""
    if ranked := re.fullmatch(r"CASE (\w+) ((?:WHEN '\w+' THEN \d+ )+)END", spark_sql):
        column, cases = ranked.groups()
        return pl.col(column).cast(pl.Enum(re.findall(r"'(.*?)'", cases)))
    polars_sql = spark_sql.replace(PAYMENT_METHOD, "_tidy").replace("\\\\", "\\")
    for pattern, replacement in (
        (r"trim\((\w+)\)", r"trim(BOTH ' ' FROM \1)"),
        (r"to_date\((\w+)\)", r"CAST(\1 AS DATE)"),
        (r"get_json_object\(_rescued_data, '\$\.(\w+)'\)", r"_rescued_\1"),
        (r"isnan\((\w+)\)", r"\1 = CAST('nan' AS DOUBLE)"),
    ):
        polars_sql = re.sub(pattern, replacement, polars_sql)
    return pl.sql_expr(polars_sql)


def band(value: pl.Expr, bounds: Mapping[str, Any]) -> pl.Expr:
    """The first label whose bound the value does not exceed; null for null."""
    labelled = pl.lit(None, pl.String)
    for name, bound in reversed(list(bounds.items())):
        labelled = (
            pl.when(value.is_not_null() if bound is None else value <= bound).then(pl.lit(name)).otherwise(labelled)
        )
    return labelled


# ── Generate ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class SeededRandom:
    """Repeatable randomness for the rows numbered by `row`."""

    seed: int
    row: pl.Expr

    def bits(self, name: str) -> pl.Expr:
        """64 random bits."""
        return self.row.hash(salt(self.seed, name))

    def randrange(self, name: str, bound: pl.Expr | int) -> pl.Expr:
        """A whole number from 0 to `bound` - 1."""
        # The bits are unsigned; with a signed bound Polars would divide in 128 bits.
        return (self.bits(name) % (pl.lit(bound) if isinstance(bound, int) else bound).cast(pl.UInt64)).cast(pl.Int64)

    def choice(self, name: str, words: Iterable[Any]) -> pl.Expr:
        """One of the words; a mapping gives their weights."""
        words = weighted(words)
        return one_of(words, self.randrange(name, len(words)))


def one_of(words: Sequence[Any] | pl.Series, index: pl.Expr) -> pl.Expr:
    """The word of that index."""
    return pl.lit(pl.Series(words)).get(index)


def records(rows: int) -> pl.LazyFrame:
    """The numbers from 1 to `rows` as `id`."""
    return pl.select(pl.int_range(1, rows + 1, dtype=pl.Int64).alias("id"), eager=False)


def defect(table: str, config: DataPipelineConfig) -> pl.Expr:
    """The kind of defect that the record `id` is given, null for most."""
    kinds, rate = TABLES[table].defects, round(config.defect_rate * MILLION)
    number, before = (row * rate // MILLION for row in (pl.col("id"), pl.col("id") - 1))
    return pl.when(number > before).then(one_of(kinds, (number - 1) % len(kinds))).alias("defect")


def has(kind: str) -> pl.Expr:
    """Whether the record is given this defect."""
    return pl.col("defect").eq_missing(pl.lit(kind))


def padded(prefix: str, number: pl.Expr, digits: int, largest: int) -> pl.Expr:
    """An id such as PROD_0001."""
    return prefix + number.cast(pl.String).str.zfill(max(digits, len(str(largest))))


def customers(config: DataPipelineConfig) -> pl.LazyFrame:
    """One row per customer record."""
    draw, words = SeededRandom(config.seed, pl.col("id")), name_pools(config.seed)
    mailbox = pl.concat_str("first_name", "last_name", separator=".").str.to_lowercase()
    domain = draw.choice("customer domain", ("example.com", "example.org", "example.net"))
    age = 18 + draw.randrange("customer age", 32) + draw.randrange("customer age too", 32)
    signed_up_after = (pl.col("id") - 1) * config.history_days // config.num_customers
    return (
        records(config.num_customers)
        .with_columns(
            defect("customers", config),
            first_name=draw.choice("first name", words.first_names),
            last_name=draw.choice("last name", words.last_names),
        )
        .select(
            pl.col("id").alias("customer_id"),
            "first_name",
            "last_name",
            email=pl.when(has("malformed_email"))
            .then(mailbox + "(at)" + domain)
            .when(~has("missing_email"))
            .then(mailbox + pl.col("id").cast(pl.String) + "@" + domain),
            age=pl.when(has("impossible_age")).then(age + 200).otherwise(age),
            city=draw.choice("customer city", words.cities),
            signup_date=config.first_day + pl.duration(days=signed_up_after),
        )
    )


def products(config: DataPipelineConfig) -> pl.LazyFrame:
    """One row per product record."""
    draw, words = SeededRandom(config.seed, pl.col("id")), name_pools(config.seed)
    kinds = weighted({name: category.weight for name, category in CATEGORIES.items()})

    def of_kind(values: Iterable[Any]) -> pl.Expr:
        """The value, of one for each category, that belongs to the product's."""
        by_name = dict(zip(CATEGORIES, values, strict=True))
        return draw.choice("product category", [by_name[kind] for kind in kinds])

    nouns = of_kind(list(category.nouns) for category in CATEGORIES.values())
    cheapest, dearest = (of_kind(category[bound] for category in CATEGORIES.values()) for bound in (1, 2))
    # The product of two uniform numbers below 2^10: many cheap products, few dear ones.
    parts = draw.randrange("product price", 1024) * draw.randrange("product price too", 1024)
    cents = (cheapest + (dearest - cheapest) * parts // 2**20) * 100 + 99
    in_stock = draw.randrange("product in stock", 100) < 95
    return records(config.num_products).select(
        product_id=padded("PROD_", pl.col("id"), 4, config.num_products),
        product_name=pl.concat_str(
            draw.choice("product adjective", words.adjectives),
            nouns.list.get(draw.randrange("product noun", nouns.list.len())),
            separator=" ",
        ),
        category=of_kind(CATEGORIES),
        price=cents / 100,
        stock_quantity=pl.when(in_stock).then(draw.randrange("product stock", 500) + 1).otherwise(0),
        supplier=draw.choice("product supplier", words.suppliers),
        weight_kg=((draw.randrange("product weight", 2000) + 5) / 100).round(2),
        created_date=config.first_day - pl.duration(days=draw.randrange("product age", 365) + 1),
        is_active=draw.randrange("product active", 100) < 92,
    )


def transactions(config: DataPipelineConfig, products: pl.LazyFrame) -> pl.LazyFrame:
    """One row per transaction record; a product's id and price are looked up by its number."""
    product_ids, prices = products.select("product_id", "price").sort("product_id").collect()
    draw, words, days = SeededRandom(config.seed, pl.col("number")), name_pools(config.seed), config.history_days
    weeks = math.ceil(days / 7)
    weekdays = {ago: WEEKDAY_WEIGHTS[(config.as_of_date.weekday() - ago) % 7] for ago in range(7)}
    weeks_ago = pl.min_horizontal(draw.randrange("week", weeks), draw.randrange("week too", weeks))
    signed_up = ((days - pl.col("days_ago")) * config.num_customers + days - 1) // days
    one, other = (draw.randrange(name, signed_up) + 1 for name in ("customer", "customer too"))
    more_loyal = SeededRandom(config.seed, pl.col("one")).bits("loyalty") > SeededRandom(
        config.seed, pl.col("other")
    ).bits("loyalty")
    midnight = (config.as_of_date - date(1970, 1, 1)).days
    ago = pl.when(has("future_timestamp")).then(-1 - draw.randrange("days ahead", 30)).otherwise("days_ago")
    second = draw.choice("hour", dict(enumerate(HOUR_WEIGHTS))) * 3600 + draw.randrange("second", 3540)
    later = pl.when(has("changed_status")).then(60).otherwise(0)
    amount = one_of(prices, pl.col("product")) * pl.col("quantity")
    method = draw.choice("payment method", PAYMENT_METHODS)
    status = draw.choice("status", STATUSES)
    changed = pl.when(status == "completed").then(pl.lit("refunded")).otherwise(pl.lit("completed"))
    devices, browsers = zip(*(pair.split("/") for pair in weighted(DEVICES_AND_BROWSERS)), strict=True)
    unknown_product = padded("PROD_", pl.lit(0), 4, config.num_products)
    repeats = pl.any_horizontal(map(has, ("exact_duplicate", "changed_status", "other_product")))
    product = draw.randrange("product", config.num_products) + has("other_product").cast(pl.Int64)
    at_home = draw.randrange("at home", 10) < 9
    home = SeededRandom(config.seed, pl.col("customer")).choice("customer city", words.cities)
    return (
        records(config.num_transactions)
        .with_columns(defect("transactions", config))
        .with_columns(number=pl.col("id") - repeats.cast(pl.Int64))
        .with_columns(
            days_ago=(weeks_ago * 7 + draw.choice("weekday", weekdays)) % days,
            product=product % config.num_products,
            quantity=draw.choice("quantity", QUANTITIES),
        )
        .with_columns(one=one, other=other)
        .with_columns(customer=pl.when(more_loyal).then("one").otherwise("other"))
        .select(
            transaction_id=padded("TXN_", pl.col("number"), 7, config.num_transactions),
            customer_id=pl.col("customer") + has("unknown_customer").cast(pl.Int64) * config.num_customers,
            product_id=pl.when(has("unknown_product"))
            .then(unknown_product)
            .otherwise(one_of(product_ids, pl.col("product"))),
            quantity="quantity",
            amount=pl.when(has("zero_amount"))
            .then(0 * amount)
            .when(has("negative_amount"))
            .then(-1 * amount)
            .when(~has("missing_amount"))
            .then(amount),
            timestamp=(((midnight - ago) * 86_400 + second + later) * MILLION).cast(TYPES["timestamp"]),
            payment_method=pl.when(has("untidy_payment_method"))
            .then("  " + method.str.to_uppercase().str.replace("_", " ", literal=True) + " ")
            .when(has("unknown_payment_method"))
            .then(pl.lit("seashells"))
            .otherwise(method),
            status=pl.when(has("changed_status")).then(changed).otherwise(status),
            device=draw.choice("device and browser", devices),
            browser=draw.choice("device and browser", browsers),
            location=pl.when(at_home).then(home).otherwise(draw.choice("location", words.cities)),
            order_id=pl.lit(None),
            currency=pl.lit("USD"),
        )
    )


# ── Refine ───────────────────────────────────────────────────────────────────────────────────────────────────────


def known(text: pl.Expr) -> pl.Expr:
    """The text; Unknown where it is missing or blank."""
    return pl.when(text.str.strip_chars(" ") != "").then(text).otherwise(pl.lit(UNKNOWN))


def cents(amount: str) -> pl.Expr:
    """An amount in dollars as a whole number of cents."""
    return (pl.col(amount) * 100).cast(pl.Int64)


def mean_or_zero(total: pl.Expr, count: str) -> pl.Expr:
    """Whole numbers divided and rounded half up; 0 where there is nothing to count."""
    return pl.when(pl.col(count) == 0).then(0).otherwise((2 * total + pl.col(count)) // (2 * pl.col(count)))


def share_of_total(column: str) -> pl.Expr:
    """The row's part of the column's total, from 0 to 1."""
    value = pl.col(column).cast(pl.Float64)
    # By a single number Polars divides as it multiplies by the inverse, which may be off by the last bit.
    return value / pl.col(column).sum().over(pl.lit(1)).cast(pl.Float64)


def products_active(products: pl.LazyFrame) -> pl.LazyFrame:
    """One row per product that is active and in stock, as far as that is known."""
    return products.filter(sql(ON_SALE)).with_columns(
        known(pl.col("product_name", "category")),
        is_active=pl.lit(value=True),
        price_band=band(pl.col("price"), PRICE_BANDS),
        stock_status=band(pl.col("stock_quantity"), STOCK_STATUSES),
        inventory_value=pl.col("price") * pl.col("stock_quantity"),
    )


def with_category_and_date(transactions: pl.LazyFrame, products: pl.LazyFrame) -> pl.LazyFrame:
    """One row per transaction, with the category of its product and the parts of its date."""
    time = pl.col("timestamp").dt
    categories = products.select("product_id", product_category=known(pl.col("category")))
    return transactions.join(categories, on="product_id").with_columns(
        payment_method=pl.when(pl.col("_tidy") != "").then("_tidy").otherwise(pl.lit("unknown")),
        transaction_date=time.date(),
        transaction_year=time.year(),
        transaction_month=time.month(),
        day_of_week=time.weekday(),
        hour=time.hour(),
        is_weekend=time.weekday() >= 6,
    )


def transactions_clean(transactions: pl.LazyFrame, products: pl.LazyFrame) -> pl.LazyFrame:
    """One row per completed order."""
    return with_category_and_date(transactions.filter(sql(COMPLETED)), products)


def transactions_returned(transactions: pl.LazyFrame, products: pl.LazyFrame) -> pl.LazyFrame:
    """One row per return."""
    return with_category_and_date(transactions.filter(sql(RETURNED)), products)


def orders(transactions_clean: pl.LazyFrame) -> pl.LazyFrame:
    """One row per customer with orders."""
    return transactions_clean.group_by("customer_id").agg(
        total_orders=pl.len().cast(pl.Int64),
        total_spent=pl.col("amount").sum(),
        first_order_date=pl.col("transaction_date").min(),
        last_order_date=pl.col("transaction_date").max(),
    )


def customers_enriched(customers: pl.LazyFrame, orders: pl.LazyFrame, config: DataPipelineConfig) -> pl.LazyFrame:
    """One row per customer."""
    full_name = pl.concat_str("first_name", "last_name", separator=" ", ignore_nulls=True)
    return (
        customers.join(orders, on="customer_id", how="left")
        .with_columns(pl.col("total_orders", "total_spent").fill_null(0))
        .with_columns(
            known(pl.col("first_name", "last_name")),
            full_name=known(full_name.str.strip_chars(" ")),
            age_group=band(pl.col("age"), AGE_GROUPS),
            customer_segment=band(pl.col("total_spent"), config.segments),
            tenure_days=(config.as_of_date - pl.col("signup_date")).dt.total_days(),
            avg_order_value=mean_or_zero(cents("total_spent"), "total_orders") / 100,
            is_inferred=pl.lit(value=False),
        )
    )


def orders_by_dimension(transactions_clean: pl.LazyFrame) -> pl.LazyFrame:
    """One row per category, payment method, device and browser."""
    keys = ("product_category", "payment_method", pl.col("device", "browser").fill_null("Unknown"))
    return transactions_clean.group_by(*keys).agg(
        orders=pl.len().cast(pl.Int64),
        revenue=pl.col("amount").sum(),
        units=pl.col("quantity").cast(pl.Int64).sum(),
        least=pl.col("amount").min(),
        most=pl.col("amount").max(),
    )


def sales_by(sales: pl.LazyFrame, *keys: str) -> pl.LazyFrame:
    """One row per value of the keys; `mean` is in dollars."""
    return (
        sales.group_by(keys)
        .agg(pl.col("orders", "revenue", "units").sum(), pl.col("least").min(), pl.col("most").max())
        .with_columns(mean=mean_or_zero(cents("revenue"), "orders") / 100)
    )


def customer_analytics(customers_enriched: pl.LazyFrame) -> pl.LazyFrame:
    """One row per segment and city."""
    return (
        customers_enriched.group_by("customer_segment", pl.col("city").fill_null("Unknown"))
        .agg(
            customer_count=pl.len().cast(pl.Int64),
            years=pl.col("age").cast(pl.Int64).sum(),
            ages=pl.col("age").count().cast(pl.Int64),
            orders=pl.col("total_orders").sum(),
            segment_revenue=pl.col("total_spent").sum(),
        )
        .with_columns(
            avg_age=mean_or_zero(10 * pl.col("years"), "ages") / 10,
            avg_total_spent=mean_or_zero(cents("segment_revenue"), "customer_count") / 100,
            avg_order_value=mean_or_zero(cents("segment_revenue"), "orders") / 100,
        )
    )


def category_analytics(sales: pl.LazyFrame) -> pl.LazyFrame:
    """One row per product category."""
    return sales_by(sales, "product_category").select(
        "product_category",
        transaction_count="orders",
        total_revenue="revenue",
        avg_transaction_value="mean",
        min_transaction="least",
        max_transaction="most",
        units_sold="units",
        revenue_share=share_of_total("revenue"),
    )


def payment_analytics(sales: pl.LazyFrame) -> pl.LazyFrame:
    """One row per payment method."""
    return sales_by(sales, "payment_method").select(
        "payment_method",
        usage_count="orders",
        total_amount="revenue",
        avg_amount="mean",
        usage_share=share_of_total("orders"),
    )


def device_analytics(sales: pl.LazyFrame) -> pl.LazyFrame:
    """One row per device and browser."""
    return sales_by(sales, "device", "browser").select(
        "device",
        "browser",
        transaction_count="orders",
        total_revenue="revenue",
        avg_transaction_value="mean",
        units_sold="units",
    )


def product_analytics(products_active: pl.LazyFrame) -> pl.LazyFrame:
    """One row per category and supplier."""
    return (
        products_active.group_by("category", known(pl.col("supplier")))
        .agg(
            product_count=pl.len().cast(pl.Int64),
            total_price=pl.col("price").sum(),
            prices=pl.col("price").count().cast(pl.Int64),
            total_stock=pl.col("stock_quantity").cast(pl.Int64).sum(),
            inventory_value=pl.col("inventory_value").sum(),
        )
        .with_columns(avg_price=mean_or_zero(cents("total_price"), "prices") / 100)
    )


Query = Callable[..., pl.LazyFrame]

BUILDERS: Mapping[str, Query] = {
    build.__name__: build
    for build in (
        customers,
        products,
        transactions,
        products_active,
        transactions_clean,
        transactions_returned,
        customers_enriched,
        customer_analytics,
        category_analytics,
        payment_analytics,
        device_analytics,
        product_analytics,
    )
}


class Polars(Peer):
    """A run in Polars."""

    def __init__(self, config: DataPipelineConfig) -> None:
        super().__init__(config)
        # What the builders may ask for, by the names of their parameters.
        self.inputs: dict[str, Any] = {"config": config}

    def build(self, table: Table) -> pl.LazyFrame:
        build = BUILDERS[table.name]
        return build(**{name: self.inputs[name] for name in inspect.signature(build).parameters})

    def save(self, layer: str, table: Table, rows: pl.LazyFrame, *more: Query) -> list[pl.DataFrame]:
        """Writes a table with the declared columns, types and order; runs `more` queries of it in the same pass."""
        declared = table.columns(layer)
        typed = rows.select(pl.col(name).cast(data_type(kind)) for name, kind in declared)
        if table.order:
            by = [sql(column.removeprefix("-")) for column in table.order]
            typed = typed.sort(by, descending=[column.startswith("-") for column in table.order])
        # The codec is what the others write by default.
        path = self.path(layer, table.name) / "part-0.parquet"
        sink = typed.sink_parquet(path, compression="snappy", mkdir=True, lazy=True)
        _, count, *found = collect(sink, typed.select(pl.len()), *(query(typed) for query in more))
        self.wrote(layer, table.name, count.item())
        return found

    def read(self, layer: str, table: Table) -> pl.LazyFrame:
        """A written table."""
        return pl.scan_parquet(self.path(layer, table.name) / "*.parquet")

    def bronze(self) -> None:
        for table in tables(BRONZE):
            rows = self.build(table).with_columns(
                _ingested_at=self.ingested_at,
                _run_id=pl.lit(self.run_id),
                _delivery=pl.lit(delivery(self.config)),
                **dict.fromkeys(("_source_file", "_source_row", "_rescued_data"), pl.lit(None)),
            )
            self.save(BRONZE, table, rows)
            self.inputs[table.name] = self.read(BRONZE, table)

    def silver(self) -> None:
        for table in tables(BRONZE):
            self.inputs[table.name] = self.divide(table)
        self.gate()
        for table in tables(SILVER):
            rows = self.build(table)
            if table.revenue == "amount":
                self.inputs["orders"], self.inputs["sales"] = (
                    found.lazy() for found in self.save(SILVER, table, rows, orders, orders_by_dimension)
                )
            else:
                self.save(SILVER, table, rows)
                self.inputs[table.name] = self.read(SILVER, table)

    def divide(self, table: Table) -> pl.LazyFrame:
        """Divides bronze into refused rows, which are written, and valid ones, one per key, which are returned.

        One pass sets aside the rows that are refused or repeated. The others are those whose key is not set aside.
        """
        [key] = table.key
        received = self.read(BRONZE, table)
        if table.foreign_keys:
            received = received.with_columns(_tidy=tidy(received))
        rescued = {name for rule in table.rules for name in re.findall(r"'\$\.(\w+)'", rule.violation)}
        data = pl.col("_rescued_data")
        received = received.with_columns(
            **{f"_rescued_{name}": data.str.json_path_match(f"$.{name}") for name in sorted(rescued)}
        )
        fails = {rule.name: self.violation(rule) for rule in (*table.rules, *reference_rules(table))}
        refusing = {rule.name: fails[rule.name] for rule in rejecting_rules(table, self.config)}
        # A hash is grouped faster than a text. Keys that share one are set aside too, which does no harm.
        key_hash = pl.col(key).hash()
        counts, profile, repeated = collect(
            received.select(pl.len(), **{rule: fails[rule].sum() for rule in fails.keys() - refusing.keys()}),
            received.select(figures(profiled(table))),
            received.group_by(key_hash.alias("_hash")).len().filter(pl.col("len") > 1),
        )
        marks = {
            f"_{column}_known": pl.when(is_any_of(column, self.inputs[parent])).then(pl.lit(value=True))
            for column, parent in table.foreign_keys.items()
        }
        again = key_hash.is_in(repeated["_hash"].implode())
        checked = received.with_columns(**marks).with_columns(_apart=pl.any_horizontal(*refusing.values(), again))
        reasons = pl.concat_list(pl.when(fails[rule]).then(pl.lit(rule)) for rule in refusing).list.drop_nulls()
        set_aside, [once_rows] = collect(
            checked.filter("_apart").with_columns(_reasons=reasons), checked.select((~pl.col("_apart")).sum())
        )
        cleared = {rule.column: pl.when(~fails[rule.name]).then(rule.column) for rule in clears(table)}
        once = received.filter(~is_any_of(key, set_aside.lazy())).with_columns(**cleared)
        refused = pl.col("_reasons").list.len() > 0
        passed = with_conflicts(set_aside.filter(~refused), table)
        conflicts = passed.filter("_conflict").with_columns(_reasons=pl.lit(conflict_reasons(table)))
        outdone = len(passed.filter("_disputed")) - len(conflicts)
        valid = passed.filter(~pl.col("_disputed")).select(once.collect_schema().names())
        versions = valid.select(name for name, _ in table.columns()).n_unique()
        latest = one_per_key(valid, table).with_columns(**cleared)
        self.save(QUARANTINE, table, pl.concat([set_aside.filter(refused), conflicts], how="diagonal").lazy())
        broken = set_aside.select(**{rule: fail.sum() for rule, fail in refusing.items()})
        counted = counts.row(0, named=True) | broken.row(0, named=True)
        counted |= dict.fromkeys(conflict_reasons(table), len(conflicts))
        quality = Quality(
            received=counted.pop("len"),
            accepted=once_rows.item() + len(latest),
            quarantined=self.rows[f"{QUARANTINE}.{table.name}"],
            duplicates=len(valid) + outdone - len(latest),
            violations=counted,
            superseded=versions + outdone - len(latest),
        )
        repetitions = len(set_aside) - set_aside[key].n_unique()
        self.account(table, quality, profiles(profile, profiled(table)), repetitions)
        rows = pl.concat([once, latest.lazy()])
        # Only what others refer to is worth its memory.
        return rows if table.foreign_keys else rows.collect(engine="streaming").lazy()

    def violation(self, rule: Rule) -> pl.Expr:
        """Whether a row breaks the rule; never null."""
        return sql(parameters(rule, self.config)).fill_null(value=False)

    def gold(self) -> None:
        for table in tables(GOLD):
            self.save(GOLD, table, self.build(table))

    def read_back(self) -> dict[str, Audited]:
        found = {}
        for layer, table in SNAPSHOT_TABLES:
            keys = pl.lit(None) if table.layer == BRONZE else pl.struct(table.key).n_unique()
            revenue = pl.col(table.revenue).sum() if table.revenue else pl.lit(None)
            # Reads every value: a count alone reads no more than the files' ends.
            values = pl.all().hash().max().name.suffix("_hash")
            rows = self.read(layer, table).select(
                pl.len().alias("rows"), keys.alias("keys"), revenue.alias("revenue"), values
            )
            found[f"{layer}.{table.name}"] = Audited(*rows.collect(engine="streaming").row(0)[:3])
        return found


def collect(*queries: pl.LazyFrame) -> list[pl.DataFrame]:
    """Runs queries together, so that what they share is read or computed once."""
    found: list[pl.DataFrame] = pl.collect_all(queries, engine="streaming")
    return found


def with_conflicts(records: pl.DataFrame, table: Table) -> pl.DataFrame:
    """Adds whether a record is no version of the others of its key, `_conflict`, or of a key with such, `_disputed`."""
    if not table.constant:
        return records.with_columns(_conflict=pl.lit(value=False), _disputed=pl.lit(value=False))
    sequence = [*map(sql, table.sequence_by), pl.col("_delivery")]
    newest = pl.all_horizontal(by.eq_missing(by.first().over(table.key)) for by in sequence)
    values = pl.struct(name for name, _ in table.columns())
    constants, latest = (
        one.n_unique().over(table.key) for one in (pl.struct(table.constant), values.filter(pl.col("_newest")))
    )
    return (
        records.sort(sequence, descending=True, nulls_last=True)
        .with_columns(_newest=newest)
        .with_columns(_conflict=(constants > 1) | (pl.col("_newest") & (latest > 1)))
        .with_columns(_disputed=pl.col("_conflict").any().over(table.key))
    )


def one_per_key(records: pl.DataFrame, table: Table) -> pl.DataFrame:
    """The greatest row of each key by `table.sequence_by`, then by delivery, then by all columns in order."""
    order = [*map(sql, table.sequence_by), "_delivery", *(name for name, _ in table.columns(table.layer))]
    ordered = records.sort(order, descending=True, nulls_last=True)
    return ordered.unique(table.key, keep="first", maintain_order=True)


def is_any_of(column: str, rows: pl.LazyFrame) -> pl.Expr:
    """Whether the value is in the column of that name of other rows; this takes a tenth of the time of a join."""
    [values] = rows.select(column).collect()
    return pl.col(column).is_in(values.implode())


def tidy(received: pl.LazyFrame) -> pl.Expr:
    """The payment method normalised, by a table of all there are: a regular expression for each row takes longer."""
    [methods] = received.select(pl.col("payment_method").unique()).collect(engine="streaming")
    normalised = methods.str.strip_chars(" ").str.to_lowercase().str.replace_all("[ _-]+", "_")
    return pl.col("payment_method").replace_strict(methods, normalised)


def figures(columns: Iterable[str]) -> Iterator[pl.Expr]:
    """What a ColumnProfile asks of each column."""
    for name in columns:
        column = pl.col(name)
        values = (column.count(), column.approx_n_unique(), column.min(), column.max())
        yield from (
            value.alias(f"{name} {figure}") for value, figure in zip(values, ColumnProfile._fields, strict=True)
        )


def profiles(found: pl.DataFrame, columns: Iterable[str]) -> dict[str, ColumnProfile]:
    """The figures of each column."""
    figures = iter(found.row(0))
    return {
        name: ColumnProfile(next(figures), next(figures), text(next(figures)), text(next(figures))) for name in columns
    }


def text(value: Any) -> str | None:
    """A value as Spark writes it."""
    if isinstance(value, datetime):
        value = value.replace(tzinfo=None)
    return None if value is None else str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    sys.exit(main(Polars))
