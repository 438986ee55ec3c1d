"""The pipeline's work in DuckDB, made as fast as DuckDB can be: the benchmark's measure of another engine.

Tables are written and read back as Parquet, which is faster here than tables in memory: DuckDB decodes only the columns
that a query needs, computes on their dictionaries, and knows counts, minima and maxima from the files' statistics. Only
the few rows that are refused or repeated, and the valid customers and products, are held in memory.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import duckdb
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

# Spark's types that have other names here; its TIMESTAMP is a moment, as DuckDB's is with a time zone.
TYPES = {"timestamp": "timestamptz", "array<string>": "string[]"}

# What the rules call Spark's functions. With a time zone DuckDB computes slowly, and all times are in UTC.
MACROS = f"""
    CREATE MACRO utc(t) AS make_timestamp(epoch_us(t));
    CREATE MACRO to_date(t) AS utc(t)::DATE;
    CREATE MACRO year(t) AS date_part('year', utc(t));
    -- A regular expression takes 200 ns, and most payment methods are tidy.
    CREATE MACRO tidy(method) AS CASE WHEN method IN {tuple(PAYMENT_METHODS)} THEN method
        ELSE regexp_replace(lower(trim(method)), '[ _-]+', '_', 'g') END;
    CREATE MACRO known(t) AS CASE WHEN trim(t) <> '' THEN t ELSE '{UNKNOWN}' END;
    -- Half up, in whole numbers.
    CREATE MACRO quotient(total, n) AS CASE WHEN n = 0 THEN 0 ELSE (2 * total + n) // (2 * n) END;
    CREATE MACRO mean_or_zero(amount, n) AS quotient((amount * 100)::HUGEINT, n) * 0.01::DECIMAL(2, 2);
"""


def sql(spark_sql: str) -> str:
    """An expression in Spark SQL as DuckDB understands it."""
    tidy = spark_sql.replace(PAYMENT_METHOD, "tidy(payment_method)")
    tidy = tidy.replace("get_json_object(", "json_extract_string(")
    # SIMILAR TO compares the whole text, and the patterns are anchored at both ends.
    return tidy.replace(" RLIKE ", " SIMILAR TO ").replace("\\\\", "\\")


def literal(value: Any) -> str:
    """A value as SQL."""
    return "'" + str(value).replace("'", "''") + "'" if not isinstance(value, int) else str(value)


def band(value: str, bounds: Mapping[str, Any]) -> str:
    """The first label whose bound the value does not exceed; null for null."""
    cases = (
        f"WHEN {value} {'IS NOT NULL' if bound is None else f'<= {bound}'} THEN '{name}'"
        for name, bound in bounds.items()
    )
    return f"CASE {' '.join(cases)} END"


# ── Generate ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class SeededRandom:
    """Repeatable randomness, as SQL, for the rows numbered by `row`."""

    seed: int
    row: str

    def bits(self, name: str) -> str:
        """64 random bits."""
        return f"hash(xor({self.row}, {salt(self.seed, name)}))"

    def randrange(self, name: str, bound: int | str) -> str:
        """A whole number from 0 to `bound` - 1."""
        # The bits are unsigned; with a signed bound DuckDB would divide in 128 bits.
        return f"({self.bits(name)} % ({bound})::UBIGINT)::BIGINT"

    def choice(self, name: str, words: Iterable[Any]) -> str:
        """One of the words; a mapping gives their weights."""
        words = weighted(words)
        return f"[{', '.join(map(literal, words))}][{self.randrange(name, len(words))} + 1]"


def records(rows: int) -> str:
    """The numbers from 1 to `rows` as `id`: a range for each core, because one range is made by one core."""
    parts = os.cpu_count() or 1
    bounds = [rows * part // parts + 1 for part in range(parts + 1)]
    ranges = (f"FROM range({start}, {end})" for start, end in itertools.pairwise(bounds))
    return f"({' UNION ALL '.join(ranges)}) AS record(id)"


def defect(table: str, config: DataPipelineConfig) -> str:
    """The kind of defect that the record `id` is given, null for most."""
    kinds, rate = TABLES[table].defects, round(config.defect_rate * MILLION)
    number, before = (f"({row}) * {rate} // {MILLION}" for row in ("id", "id - 1"))
    return f"CASE WHEN {number} > {before} THEN {list(kinds)}[({number} - 1) % {len(kinds)} + 1] END"


def padded(prefix: str, number: str, digits: int, largest: int) -> str:
    """An id such as PROD_0001."""
    return f"'{prefix}' || lpad(({number})::VARCHAR, {max(digits, len(str(largest)))}, '0')"


def customers(config: DataPipelineConfig) -> str:
    """One row per customer record."""
    draw, words = SeededRandom(config.seed, "id"), name_pools(config.seed)
    return f"""
        WITH person AS (
            SELECT
                id, {defect("customers", config)} AS defect,
                {draw.choice("first name", words.first_names)} AS first_name,
                {draw.choice("last name", words.last_names)} AS last_name,
                lower(first_name || '.' || last_name) AS mailbox,
                {draw.choice("customer domain", ("example.com", "example.org", "example.net"))} AS domain,
                18 + {draw.randrange("customer age", 32)} + {draw.randrange("customer age too", 32)} AS years
            FROM {records(config.num_customers)}
        )
        SELECT
            id AS customer_id, first_name, last_name,
            CASE WHEN defect = 'malformed_email' THEN mailbox || '(at)' || domain
                WHEN defect IS DISTINCT FROM 'missing_email' THEN mailbox || id || '@' || domain END AS email,
            CASE WHEN defect = 'impossible_age' THEN years + 200 ELSE years END AS age,
            {draw.choice("customer city", words.cities)} AS city,
            DATE '{config.first_day}' + ((id - 1) * {config.history_days} // {config.num_customers})::INT
                AS signup_date
        FROM person"""


def products(config: DataPipelineConfig) -> str:
    """One row per product record."""
    draw, words = SeededRandom(config.seed, "id"), name_pools(config.seed)
    names = weighted({name: category.weight for name, category in CATEGORIES.items()})
    kinds = {name: {**kind._asdict(), "nouns": list(kind.nouns)} for name, kind in CATEGORIES.items()}
    return f"""
        WITH kind AS (
            SELECT id, {draw.choice("product category", names)} AS category, MAP {kinds}[category] AS kind,
                {draw.randrange("product price", 1024)} * {draw.randrange("product price too", 1024)} AS rank
            FROM {records(config.num_products)}
        )
        SELECT
            {padded("PROD_", "id", 4, config.num_products)} AS product_id,
            concat_ws(' ', {draw.choice("product adjective", words.adjectives)},
                kind.nouns[{draw.randrange("product noun", "len(kind.nouns)")} + 1]) AS product_name,
            category,
            kind.lowest_price + ((kind.highest_price - kind.lowest_price) * rank >> 20) + 0.99 AS price,
            CASE WHEN {draw.randrange("product in stock", 100)} < 95
                THEN {draw.randrange("product stock", 500)} + 1 ELSE 0 END AS stock_quantity,
            {draw.choice("product supplier", words.suppliers)} AS supplier,
            ({draw.randrange("product weight", 2000)} + 5) / 100 AS weight_kg,
            DATE '{config.first_day}' - ({draw.randrange("product age", 365)} + 1)::INT AS created_date,
            {draw.randrange("product active", 100)} < 92 AS is_active
        FROM kind"""


def transactions(config: DataPipelineConfig) -> str:
    """One row per transaction record; a product's id and price are looked up by its number."""
    draw, words, days = SeededRandom(config.seed, "number"), name_pools(config.seed), config.history_days
    weeks = math.ceil(days / 7)
    weekdays = {ago: WEEKDAY_WEIGHTS[(config.as_of_date.weekday() - ago) % 7] for ago in range(7)}
    signed_up = f"(({days} - days_ago) * {config.num_customers} + {days - 1}) // {days}"
    loyalty = (SeededRandom(config.seed, one).bits("loyalty") for one in ("one", "other"))
    devices, browsers = zip(*(pair.split("/") for pair in weighted(DEVICES_AND_BROWSERS)), strict=True)
    midnight = (config.as_of_date - date(1970, 1, 1)).days
    return f"""
        WITH numbered AS (
            SELECT defect, CASE WHEN defect IN ('exact_duplicate', 'changed_status', 'other_product')
                THEN id - 1 ELSE id END AS number
            FROM (SELECT id, {defect("transactions", config)} AS defect FROM {records(config.num_transactions)})
        ), dated AS (
            SELECT *,
                (least({draw.randrange("week", weeks)}, {draw.randrange("week too", weeks)}) * 7
                    + {draw.choice("weekday", weekdays)}) % {days} AS days_ago
            FROM numbered
        ), candidates AS (
            SELECT *,
                {draw.randrange("customer", signed_up)} + 1 AS one,
                {draw.randrange("customer too", signed_up)} + 1 AS other
            FROM dated
        ), drawn AS (
            SELECT *,
                CASE WHEN {" > ".join(loyalty)} THEN one ELSE other END AS customer,
                ({draw.randrange("product", config.num_products)}
                    + CASE WHEN defect = 'other_product' THEN 1 ELSE 0 END) % {config.num_products} + 1 AS product,
                {draw.choice("quantity", QUANTITIES)} AS quantity,
                {draw.choice("payment method", PAYMENT_METHODS)} AS method,
                {draw.choice("status", STATUSES)} AS first_status,
                CASE WHEN defect = 'future_timestamp'
                    THEN -1 - {draw.randrange("days ahead", 30)} ELSE days_ago END AS ago,
                {draw.choice("hour", dict(enumerate(HOUR_WEIGHTS)))} * 3600 + {draw.randrange("second", 3540)}
                    + CASE WHEN defect = 'changed_status' THEN 60 ELSE 0 END AS second
            FROM candidates
        )
        SELECT
            {padded("TXN_", "number", 7, config.num_transactions)} AS transaction_id,
            CASE WHEN defect = 'unknown_customer' THEN customer + {config.num_customers} ELSE customer END
                AS customer_id,
            CASE WHEN defect = 'unknown_product' THEN {padded("PROD_", "0", 4, config.num_products)} ELSE product_id END
                AS product_id,
            quantity,
            CASE WHEN defect = 'zero_amount' THEN 0 WHEN defect = 'negative_amount' THEN -price * quantity
                WHEN defect IS DISTINCT FROM 'missing_amount' THEN price * quantity END AS amount,
            make_timestamptz((({midnight} - ago) * 86400 + second) * {MILLION}) AS timestamp,
            CASE WHEN defect = 'untidy_payment_method' THEN '  ' || upper(replace(method, '_', ' ')) || ' '
                WHEN defect = 'unknown_payment_method' THEN 'seashells' ELSE method END AS payment_method,
            CASE WHEN defect IS DISTINCT FROM 'changed_status' THEN first_status
                WHEN first_status = 'completed' THEN 'refunded' ELSE 'completed' END AS status,
            {draw.choice("device and browser", devices)} AS device,
            {draw.choice("device and browser", browsers)} AS browser,
            CASE WHEN {draw.randrange("at home", 10)} < 9
                THEN {SeededRandom(config.seed, "customer").choice("customer city", words.cities)}
                ELSE {draw.choice("location", words.cities)} END AS location,
            NULL AS order_id, 'USD' AS currency
        FROM drawn JOIN priced USING (product)"""


# ── Refine ───────────────────────────────────────────────────────────────────────────────────────────────────────

TRANSACTIONS = """
    SELECT transactions.* REPLACE (coalesce(nullif(tidy(payment_method), ''), 'unknown') AS payment_method),
        known(category) AS product_category,
        to_date(timestamp) AS transaction_date, year(timestamp) AS transaction_year,
        month(utc(timestamp)) AS transaction_month, isodow(utc(timestamp)) AS day_of_week,
        hour(utc(timestamp)) AS hour, isodow(utc(timestamp)) >= 6 AS is_weekend
    FROM transactions JOIN products USING (product_id)"""

PRODUCTS_ACTIVE = f"""
    SELECT * REPLACE (known(product_name) AS product_name, known(category) AS category, true AS is_active),
        {band("price", PRICE_BANDS)} AS price_band,
        {band("stock_quantity", STOCK_STATUSES)} AS stock_status,
        price * stock_quantity AS inventory_value
    FROM products
    WHERE {ON_SALE}"""


def customers_enriched(config: DataPipelineConfig) -> str:
    """One row per customer."""
    return f"""
        WITH orders AS (
            SELECT customer_id, count(*) AS orders, sum(amount) AS spent,
                min(transaction_date) AS first_order_date, max(transaction_date) AS last_order_date
            FROM transactions_clean GROUP BY customer_id
        )
        SELECT * REPLACE (known(first_name) AS first_name, known(last_name) AS last_name),
            known(trim(concat_ws(' ', first_name, last_name))) AS full_name, {band("age", AGE_GROUPS)} AS age_group,
            coalesce(orders, 0) AS total_orders, coalesce(spent, 0) AS total_spent,
            {band("total_spent", config.segments)} AS customer_segment,
            DATE '{config.as_of_date}' - signup_date AS tenure_days,
            mean_or_zero(total_spent, total_orders) AS avg_order_value, false AS is_inferred
        FROM customers LEFT JOIN orders USING (customer_id)"""


SALES = """
    SELECT product_category, payment_method, coalesce(device, 'Unknown') AS device,
        coalesce(browser, 'Unknown') AS browser, count(*) AS orders, sum(amount) AS revenue,
        sum(quantity) AS units, min(amount) AS least, max(amount) AS most
    FROM transactions_clean GROUP BY ALL"""

GOLD_QUERIES = {
    "customer_analytics": """
        SELECT customer_segment, coalesce(city, 'Unknown') AS city, count(*) AS customer_count,
            quotient(10 * sum(age), count(age)) * 0.1::DECIMAL(1, 1) AS avg_age,
            sum(total_spent) AS segment_revenue, mean_or_zero(segment_revenue, customer_count) AS avg_total_spent,
            mean_or_zero(segment_revenue, sum(total_orders)) AS avg_order_value
        FROM customers_enriched GROUP BY ALL""",
    "category_analytics": """
        SELECT product_category, sum(orders) AS transaction_count, sum(revenue) AS total_revenue,
            mean_or_zero(total_revenue, transaction_count) AS avg_transaction_value, min(least) AS min_transaction,
            max(most) AS max_transaction, sum(units) AS units_sold,
            total_revenue::DOUBLE / (sum(total_revenue) OVER ())::DOUBLE AS revenue_share
        FROM sales GROUP BY product_category""",
    "payment_analytics": """
        SELECT payment_method, sum(orders) AS usage_count, sum(revenue) AS total_amount,
            mean_or_zero(total_amount, usage_count) AS avg_amount,
            usage_count::DOUBLE / (sum(usage_count) OVER ())::DOUBLE AS usage_share
        FROM sales GROUP BY payment_method""",
    "device_analytics": """
        SELECT device, browser, sum(orders) AS transaction_count, sum(revenue) AS total_revenue,
            mean_or_zero(total_revenue, transaction_count) AS avg_transaction_value, sum(units) AS units_sold
        FROM sales GROUP BY device, browser""",
    "product_analytics": """
        SELECT category, known(supplier) AS supplier, count(*) AS product_count,
            mean_or_zero(coalesce(sum(price), 0), count(price)) AS avg_price,
            coalesce(sum(stock_quantity), 0) AS total_stock, coalesce(sum(inventory_value), 0) AS inventory_value
        FROM products_active GROUP BY ALL""",
}


def judged(table: Table) -> str:
    """Finds the conflicts among the checked rows: they are refused, and their keys are `_disputed`.

    Records of one key are in conflict that differ in a constant, or as several latest ones in anything.
    """
    checked = f"FROM {table.name}_checked"
    if not table.constant:
        return f"SELECT *, false AS _disputed {checked}"
    latest_first = ", ".join(f"{sql(by)} DESC NULLS LAST" for by in (*table.sequence_by, "_delivery"))
    constants, values = (", ".join(names) for names in (table.constant, (name for name, _ in table.columns())))
    of_key = f"PARTITION BY {', '.join(table.key)}, _reasons = []"
    return f"""
        SELECT * REPLACE (CASE WHEN _conflict THEN {conflict_reasons(table)} ELSE _reasons END AS _reasons),
            bool_or(_conflict) OVER ({of_key}) AS _disputed
        FROM (
            SELECT *, _reasons = [] AND (count(DISTINCT row({constants})) OVER ({of_key}) > 1
                OR _rank = 1 AND count(DISTINCT row({values})) FILTER (_rank = 1) OVER ({of_key}) > 1) AS _conflict
            FROM (SELECT *, rank() OVER ({of_key} ORDER BY {latest_first}) AS _rank {checked})
        )"""


class DuckDB(Peer):
    """A run in DuckDB."""

    def __init__(self, config: DataPipelineConfig) -> None:
        super().__init__(config)
        # What does not fit in memory goes beside the data; the default is the working folder.
        self.db = duckdb.connect(config={"temp_directory": str(self.root / ".tmp")})
        # Rows are in no order but in gold, whose queries say so.
        self.db.execute(f"SET TimeZone = 'UTC'; SET preserve_insertion_order = false; {MACROS}")

    def one(self, query: str) -> tuple[Any, ...]:
        """The only row that a query gives."""
        [row] = self.db.execute(query).fetchall()
        return row

    def save(self, layer: str, table: Table, query: str) -> None:
        """Writes a table with the declared columns, types and order."""
        declared = table.columns(layer)
        typed = ", ".join(f"{name}::{TYPES.get(kind, kind)} AS {name}" for name, kind in declared)
        order = [f"{sql(by[1:])} DESC" if by.startswith("-") else sql(by) for by in table.order]
        ordered = f"ORDER BY {', '.join(order)}" if order else ""
        folder = self.path(layer, table.name)
        folder.mkdir(parents=True)
        to = literal(folder / "part-0.parquet")
        # The newer encodings take less time, to write and to read.
        options = "FORMAT parquet, PARQUET_VERSION v2"
        [rows] = self.one(f"COPY (SELECT {typed} FROM ({query}) {ordered}) TO {to} ({options})")
        self.wrote(layer, table.name, rows)

    def read(self, layer: str, table: Table) -> str:
        """A written table."""
        return f"read_parquet({literal(self.path(layer, table.name) / '*.parquet')})"

    def bronze(self) -> None:
        queries = {"customers": customers, "products": products, "transactions": transactions}
        lineage = f"""TIMESTAMPTZ '{self.ingested_at}' AS _ingested_at, '{self.run_id}' AS _run_id,
            {delivery(self.config)} AS _delivery, NULL AS _source_file, NULL AS _source_row, NULL AS _rescued_data"""
        for table in tables(BRONZE):
            self.save(BRONZE, table, f"SELECT *, {lineage} FROM ({queries[table.name](self.config)})")
            if table.name == "products":
                number = "replace(product_id, 'PROD_', '')::BIGINT AS product"
                priced = f"SELECT {number}, product_id, price FROM {self.read(BRONZE, table)}"
                self.db.execute(f"CREATE TEMP TABLE priced AS {priced}")

    def silver(self) -> None:
        for table in tables(BRONZE):
            self.divide(table)
        self.gate()
        queries = {
            "products_active": PRODUCTS_ACTIVE,
            "transactions_clean": f"{TRANSACTIONS} WHERE {COMPLETED}",
            "transactions_returned": f"{TRANSACTIONS} WHERE {RETURNED}",
            "customers_enriched": customers_enriched(self.config),
        }
        for table in tables(SILVER):
            self.save(SILVER, table, queries[table.name])
            self.db.execute(f"CREATE VIEW {table.name} AS FROM {self.read(SILVER, table)}")

    def divide(self, table: Table) -> None:
        """Divides bronze into refused rows, which are written, and valid ones, one per key, called as the table.

        One pass sets aside the rows that are refused or repeated. The others are those whose key is not set aside.
        A hash is grouped faster than a text; keys that share one are set aside too, which does no harm.
        """
        name, [key] = table.name, table.key
        fails = {rule.name: self.violation(rule) for rule in (*table.rules, *reference_rules(table))}
        refusing = {rule.name: fails[rule.name] for rule in rejecting_rules(table, self.config)}
        reasons = ", ".join(f"CASE WHEN {condition} THEN '{rule}' END" for rule, condition in refusing.items())
        parents = " ".join(
            f"LEFT JOIN (SELECT {column}, true AS _{column}_known FROM {parent}) USING ({column})"
            for column, parent in table.foreign_keys.items()
        )
        columns = [column for column, _ in table.columns(BRONZE)]
        cleared = {
            rule.column: f"CASE WHEN {fails[rule.name]} THEN NULL ELSE {rule.column} END" for rule in clears(table)
        }
        mended = ", ".join(f"{cleared.get(column, column)} AS {column}" for column in columns)
        order = ", ".join(f"{sql(by)} DESC NULLS LAST" for by in (*table.sequence_by, "_delivery", *columns))
        # Only what others refer to is worth its memory.
        kind = "VIEW" if table.foreign_keys else "TABLE"
        self.db.execute(f"""
            CREATE VIEW {name}_received AS FROM {self.read(BRONZE, table)};
            CREATE TEMP TABLE {name}_repeated AS
                SELECT hash({key}) FROM {name}_received GROUP BY ALL HAVING count(*) > 1;
            CREATE TEMP TABLE {name}_checked AS
                SELECT *, list_filter([{reasons}], lambda reason: reason IS NOT NULL) AS _reasons
                FROM {name}_received {parents}
                WHERE {" OR ".join(refusing.values())} OR hash({key}) IN (FROM {name}_repeated);
            CREATE TEMP TABLE {name}_set_aside AS {judged(table)};
            CREATE TEMP VIEW {name}_once AS
                FROM {name}_received ANTI JOIN {name}_set_aside USING ({key}) WHERE {key} IS NOT NULL;
            CREATE TEMP TABLE {name}_latest AS
                SELECT {mended} FROM (FROM {name}_set_aside WHERE _reasons = [] AND NOT _disputed
                    QUALIFY row_number() OVER (PARTITION BY {key} ORDER BY {order}) = 1);
            CREATE TEMP {kind} {name} AS SELECT {mended} FROM {name}_once UNION ALL FROM {name}_latest""")
        self.save(QUARANTINE, table, f"FROM {name}_set_aside WHERE _reasons <> []")
        self.account_for(table, fails, [*refusing, *conflict_reasons(table)])

    def account_for(self, table: Table, fails: Mapping[str, str], refusing: Sequence[str]) -> None:
        """Counts what became of a bronze table's rows. The rows that break a `refusing` rule are all set aside."""
        name = table.name
        warnings = [rule for rule in fails if rule not in refusing]
        warned = ", ".join(f"count(*) FILTER ({fails[rule]})" for rule in warnings)
        refused = ", ".join(f"count(*) FILTER ('{rule}' IN _reasons)" for rule in refusing)
        received, *warned_rows = self.one(f"SELECT count(*), {warned} FROM {name}_received")
        valid, *refused_rows = self.one(f"SELECT count(*) FILTER (_reasons = []), {refused} FROM {name}_set_aside")
        columns = ", ".join(column for column, _ in table.columns())
        latest, kept, versions, repeated = self.one(f"""
            SELECT (SELECT count(*) FROM {name}_latest), (SELECT count(*) FROM {name}),
                (SELECT count(*) FROM {name}_set_aside WHERE _reasons = [] AND _disputed) + (SELECT count(*)
                    FROM (SELECT DISTINCT {columns} FROM {name}_set_aside WHERE _reasons = [] AND NOT _disputed)),
                (SELECT coalesce(sum(times - 1), 0)::BIGINT
                    FROM (SELECT count(*) AS times FROM {name}_set_aside GROUP BY {table.key[0]}))""")
        counted = dict(zip((*warnings, *refusing), (*warned_rows, *refused_rows), strict=True))
        quality = Quality(
            received=received,
            accepted=kept,
            quarantined=self.rows[f"{QUARANTINE}.{name}"],
            duplicates=valid - latest,
            violations=counted,
            superseded=versions - latest,
        )
        self.account(table, quality, self.profiles(table), repeated)

    def violation(self, rule: Rule) -> str:
        """Whether a row breaks the rule."""
        return "(" + sql(parameters(rule, self.config)) + ")"

    def profiles(self, table: Table) -> dict[str, ColumnProfile]:
        """The profile of each column of a bronze table."""
        source = f"{table.name}_received"
        names = profiled(table)
        counts = self.one(f"SELECT {', '.join(f'approx_count_distinct({name})' for name in names)} FROM {source}")
        found = {}
        for name, distinct in zip(names, counts, strict=True):
            # Such a query is answered by the files' statistics, unless it asks for more.
            bounds = (f"{bound}({name})" for bound in ("min", "max"))
            text = (f"{f'utc({bound})' if name == 'timestamp' else bound}::VARCHAR" for bound in bounds)
            count, least, most = self.one(f"SELECT count({name}), {', '.join(text)} FROM {source}")
            found[name] = ColumnProfile(count, distinct, least, most)
        return found

    def gold(self) -> None:
        self.db.execute(f"CREATE TEMP TABLE sales AS {SALES}")
        for table in tables(GOLD):
            self.save(GOLD, table, GOLD_QUERIES[table.name])

    def read_back(self) -> dict[str, Audited]:
        found = {}
        for layer, table in SNAPSHOT_TABLES:
            keys = "NULL" if table.layer == BRONZE else f"count(DISTINCT ({', '.join(table.key)}))"
            revenue = f"coalesce(sum({table.revenue}), 0)::DECIMAL(28, 2)" if table.revenue else "NULL"
            # Reads every value: a count alone reads no more than the files' statistics.
            values = f"max(hash({', '.join(name for name, _ in table.columns(table.layer))}))"
            *figures, _ = self.one(f"SELECT count(*), {keys}, {revenue}, {values} FROM {self.read(layer, table)}")
            found[f"{layer}.{table.name}"] = Audited(*figures)
        return found


if __name__ == "__main__":
    sys.exit(main(DuckDB))
