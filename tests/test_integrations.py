"""The scripts of integrations/, with the libraries that they are for, each in an environment of its own.

uv makes the environments outside the project, from the head of each script, and keeps them. Run by
`pytest -m integration`. ENGINE=sail is faster.
"""

from __future__ import annotations

import ast
import http.server
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import tomllib
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest
from conftest import AS_OF
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from test_gate import refused
from test_incremental import Shop, first_night, new_config

import data_pipeline
from data_pipeline import (
    GOLD,
    LAYERS,
    SILVER,
    TABLES,
    DataPipelineConfig,
    RunRecord,
    Store,
    customers_enriched,
    customers_history,
    orders_by_dimension,
    roll_back,
    run_pipeline,
    tables,
)

PROJECT = Path(__file__).parent.parent
SCRIPTS = [PROJECT / "integrations" / f"{name}.py" for name in ("delta", "expectations", "lineage")]
UV = [found] if (found := shutil.which("uv")) else [sys.executable, "-m", "uv"]
RUN = [*UV, "run", "--no-project", "--quiet", "--python", sys.executable]
Small = Callable[..., DataPipelineConfig]


def head_of(script: Path) -> dict[str, Any]:
    """The metadata at the head of a script."""
    [head] = re.findall(r"^# /// script\n((?:#.*\n)+?)# ///$", script.read_text(), re.MULTILINE)
    return tomllib.loads(re.sub("^# ?", "", head, flags=re.MULTILINE))


def with_packages_of(script: str, *more: str) -> list[str]:
    """A command that runs Python with the packages of a script, and more."""
    packages = [*head_of(PROJECT / "integrations" / script)["dependencies"], *more]
    return [*RUN, *(f"--with={package}" for package in packages), "python"]


def command(script: str, *arguments: str | Path) -> str:
    """A command for a hook that runs a script."""
    return " ".join([*RUN, "--script", str(PROJECT / "integrations" / script), *map(str, arguments)])


def run(*words: str | Path, expect: int = 0, **variables: str) -> str:
    """Runs a command, and returns its output."""
    # A session of Sail in this process leaves a mark in the environment.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIPELINE_", "SPARK_CONNECT_"))}
    done = subprocess.run(words, capture_output=True, text=True, env=kept | variables, check=False)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_scripts_are_a_page_and_stand_alone(script: Path) -> None:
    text = script.read_text()
    assert len(text.splitlines()) <= 150
    assert head_of(script)["requires-python"] == ">=3.11"
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", package) for package in head_of(script)["dependencies"])
    at_the_top = {node.module for node in ast.parse(text).body if isinstance(node, ast.ImportFrom)}
    assert "data_pipeline" not in at_the_top, "it works where the pipeline is not installed"
    page = (PROJECT / f"docs/{script.stem}.md").read_text()
    assert f"integrations/{script.name}" in page
    for package in head_of(script)["dependencies"]:
        assert package in page, f"docs/{script.stem}.md does not say how pip installs {package}"
    assert importlib.util.find_spec(script.stem) is None, "the tests import no script"


@pytest.mark.integration
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_help(script: Path) -> None:
    assert "usage: " in run(*RUN, "--script", script, "--help")


def add_column(file: Path) -> None:
    """Writes a file of a snapshot again, with another column: another version of the pipeline could have done so."""
    duckdb.sql(f"COPY (SELECT *, 7 AS added FROM '{file}') TO '{file}.next' (FORMAT parquet)")
    os.replace(f"{file}.next", file)


@pytest.fixture(scope="module")
def delta_history(
    small: Small, spark: SparkSession, tmp_path_factory: pytest.TempPathFactory
) -> tuple[DataPipelineConfig, list[str]]:
    """Five runs that become versions, and one without the hook between them. One of the five is rolled back to, and one
    has another schema and is killed between two commits."""
    folder = tmp_path_factory.mktemp("delta")
    (folder / "exports").mkdir()
    shop, nights = Shop(new_config(small, folder), spark), iter(range(1, 9))
    shop.config.keep_snapshots = 20
    store = Store(shop.config.root)

    def next_night(*hooks: str) -> RunRecord:
        night = next(nights)
        shop.land(
            "transactions",
            f"night-{night}",
            f"N{night},1,P1,1,{night}.50,2026-0{1 + night % 3}-0{night} 10:00:00,paypal,completed",
        )
        record = shop.run(days=night, after_publish=hooks or None)
        assert record.kind == "incremental"
        assert [ran["failure"] for ran in record.hooks] == ["" for _ in hooks]
        return record

    hook = command("delta.py")
    shop.config.after_publish = (hook,)
    first = first_night(shop)
    second = next_night(hook)
    next_night()
    assert roll_back(store, first.run_id, 0, shop.config) == first.run_id
    third = next_night(hook)
    killed = next_night()
    for table in ("bronze/transactions", "gold/device_analytics"):
        files = Path(store.path("snapshots", killed.run_id, table)).glob("*.parquet")
        add_column(max(files, key=lambda file: file.stat().st_mtime_ns))
    kill_after_five = f"""
import os, sys
sys.path.insert(0, '{PROJECT}/integrations')
import delta
real, calls = delta.synchronize, []
def synchronize(*arguments, **values):
    calls.append(arguments)
    return real(*arguments, **values) if len(calls) < 6 else os.abort()
delta.synchronize, sys.argv = synchronize, ['delta.py', '{store.root}']
delta.main()
"""
    with pytest.raises(AssertionError):
        run(*with_packages_of("delta.py"), "-c", kill_after_five)
    in_part = run(*command("delta.py", store.root, "--versions", killed.run_id).split(), expect=1)
    assert f"run {killed.run_id} is not in {store.root}/delta, or was only committed in part" in in_part
    assert "gold/device_analytics: version 4" in run(*command("delta.py", store.root).split())
    last = next_night(hook)
    return shop.config, [first.run_id, second.run_id, third.run_id, killed.run_id, last.run_id]


def commits(config: DataPipelineConfig, table: str) -> list[dict[str, Any]]:
    """The actions of each version of a table, by their kind."""
    logs = sorted(Path(config.root, "delta", table, "_delta_log").glob("*.json"))
    return [{next(iter(action)): action for action in map(json.loads, log.read_text().splitlines())} for log in logs]


@pytest.mark.integration
def test_delta_tables_are_the_snapshots(delta_history: tuple[DataPipelineConfig, list[str]]) -> None:
    """Each version, read by deltalake, pandas, Polars and DuckDB, has the rows of the snapshot of its run."""
    config, runs = delta_history
    first, second, third, killed, last = runs
    packages = ("duckdb", "pandas", "polars")
    seen = run(*with_packages_of("delta.py", *packages), PROJECT / "tests/compare_delta.py", config.root, *runs)
    assert len(seen.splitlines()) == 5 * 16
    by_run = {name: [commit["commitInfo"]["commitInfo"]["run_id"] for commit in commits(config, name)]
              for name in ("gold/device_analytics", "bronze/transactions", "bronze/products")}  # fmt: skip
    assert by_run["gold/device_analytics"] == [first, second, first, third, killed, last]
    assert by_run["bronze/transactions"] == [first, second, first, third, killed, last]
    assert by_run["bronze/products"] == [first], "an unchanged table has no commit"
    changed = ["metaData" in commit for commit in commits(config, "gold/device_analytics")]
    assert changed == [True, False, False, False, True, True], "the column came and went"
    sizes = {layer: len(list(Path(config.root, "delta", layer).iterdir())) for layer in LAYERS}
    assert sizes == {"bronze": 3, "silver": 5, "gold": 5, "quarantine": 3}


@pytest.mark.integration
def test_delta_notices_what_others_change(delta_history: tuple[DataPipelineConfig, list[str]], tmp_path: Path) -> None:
    """An UPDATE is not overwritten in silence. VACUUM does not count."""
    config, runs = delta_history
    root = tmp_path / "data"
    shutil.copytree(config.root, root, symlinks=True)
    update = (
        f"from deltalake import DeltaTable; table = DeltaTable('{root}/delta/silver/products_active')\n"
        "table.vacuum(0, enforce_retention_duration=False, dry_run=False, full=True)\n"
        "table.update(updates={'supplier': \"'me'\"})\n"
    )
    run(*with_packages_of("delta.py"), "-c", update)
    Store(str(root)).switch_to(runs[0])
    refused = run(*command("delta.py", root).split(), expect=1)
    assert f"somebody else has changed {root}/delta/silver/products_active, version " in refused
    assert " (UPDATE): keep copies, then use --overwrite" in refused
    assert "gold" not in refused, "nothing is committed"
    assert "silver/products_active: version" in run(*command("delta.py", root, "--overwrite").split())
    again = run(*command("delta.py", root).split())
    assert again.splitlines() == [f"delta: all tables are run {runs[0]}"]
    run(*command("delta.py", root, "--vacuum", "0").split())
    compare = [*with_packages_of("delta.py", "duckdb", "pandas", "polars"), str(PROJECT / "tests/compare_delta.py")]
    run(*compare, root, runs[0])


@pytest.mark.integration
@pytest.mark.parametrize("reader", ["spark", "sail"])
def test_delta_tables_in_spark_and_sail(reader: str, delta_history: tuple[DataPipelineConfig, list[str]]) -> None:
    """By the versions that docs/delta.md shows. Spark gets Delta from Maven Central."""
    config, runs = delta_history
    versions = {
        run_id: json.loads(run(*command("delta.py", config.root, "--versions", run_id).split())) for run_id in runs
    }
    program = """
import json, sys
from pathlib import Path
reader, root, versions = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
if reader == "spark":
    from pyspark.sql import SparkSession
    builder = SparkSession.builder.master("local[2]").config("spark.jars.packages", "io.delta:delta-spark_2.12:3.3.2")
    builder = builder.config("spark.sql.extensions", "io.delta.sql.DeltaSparkSessionExtension")
    builder = builder.config("spark.ui.enabled", "false").config("spark.databricks.delta.snapshotPartitions", "1")
    spark = builder.config(
        "spark.sql.catalog.spark_catalog", "org.apache.spark.sql.delta.catalog.DeltaCatalog").getOrCreate()
else:
    from pysail.spark import SparkConnectServer
    from pyspark.sql import SparkSession
    server = SparkConnectServer("127.0.0.1", 0)
    server.start(background=True)
    spark = SparkSession.builder.remote("sc://localhost:%d" % server.listening_address[1]).getOrCreate()
spark.conf.set("spark.sql.session.timeZone", "UTC")
compared = 0
for run, tables in versions.items():
    for name, version in tables.items():
        files = sorted(Path(root, "snapshots", run, name).glob("*.parquet"), key=lambda file: file.stat().st_mtime_ns)
        columns = spark.read.parquet(str(files[-1])).schema
        schema = ", ".join(f"{column.name} {column.dataType.simpleString()}" for column in columns)  # all nullable
        expected = spark.read.schema(schema).parquet(*map(str, files))
        found = spark.read.format("delta").option("versionAsOf", version).load(f"{root}/delta/{name}")
        assert found.columns == expected.columns, (run, name, found.columns)
        assert sorted(map(str, found.collect())) == sorted(map(str, expected.collect())), (run, name)
        compared += 1
print("compared", compared)
"""
    found = run(sys.executable, "-c", program, reader, config.root, json.dumps(versions))
    assert "compared 80" in found


@pytest.fixture(scope="module")
def suites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The suites that follow from the contract."""
    folder = tmp_path_factory.mktemp("suites")
    written = run(*command("expectations.py", "--write", folder).split()).splitlines()
    assert len(written) == 10
    return folder


def add_expectation(suite: Path, kind: str, **kwargs: Any) -> dict[str, Any]:
    """Adds an expectation to a suite as a user would: in its file. Returns it, to be changed and saved again."""
    text = json.loads(suite.read_text())
    text["expectations"].append({"type": kind, "kwargs": kwargs, "meta": {}})
    suite.write_text(json.dumps(text))
    return text  # type: ignore[no-any-return]


@pytest.mark.integration
def test_suites_are_those_of_the_contract(suites: Path) -> None:
    found = {path.stem: json.loads(path.read_text())["expectations"] for path in suites.glob("*.json")}
    assert set(found) == {f"{table.layer}.{table.name}" for table in (*tables(SILVER), *tables(GOLD))}

    def of(table: str, kind: str) -> list[Any]:
        return [made["kwargs"] for made in found[table] if made["type"] == f"expect_{kind}"]

    assert {"column": "customer_id"} in of("silver.customers_enriched", "column_values_to_be_unique")
    assert {"column": "email"} not in of("silver.customers_enriched", "column_values_to_not_be_null")
    assert {"column": "full_name"} in of("silver.customers_enriched", "column_values_to_not_be_null")
    [keys] = of("gold.device_analytics", "compound_columns_to_be_unique")
    assert keys == {"column_list": ["device", "browser"]}


@pytest.mark.integration
def test_expectations_as_a_gate(
    published: DataPipelineConfig, spark: SparkSession, suites: Path, tmp_path: Path
) -> None:
    """A good run passes, and is published. A defect refuses the next one, and what was published stays."""
    changed = Path(shutil.copytree(suites, tmp_path / "suites"))
    published.before_publish = (command("expectations.py", "--suites", changed),)
    store = Store(published.root)
    good = run_pipeline(published, spark)
    assert [ran["failure"] for ran in good.hooks] == [""]
    assert store.published() == good.run_id
    page = Path(published.root, "data_docs/index.html").read_text()
    assert "silver.customers_enriched" in page

    # An expectation that this data does not meet, first as a warning and then as it is by default.
    suite = changed / "gold.payment_analytics.json"
    text = add_expectation(suite, "expect_column_values_to_be_in_set", column="payment_method", value_set=["paypal"])
    text["expectations"][-1]["meta"] = {"severity": "warning"}
    suite.write_text(json.dumps(text))
    assert run_pipeline(published, spark).result == "succeeded"
    before = store.published()
    text["expectations"][-1]["meta"] = {}
    suite.write_text(json.dumps(text))
    failed = r"1 of 231 expectations failed: gold\.payment_analytics: expect_column_values_to_be_in_set payment_method"
    refused(published, spark, f"HOOK REFUSED, nothing is published: .*{failed}: 5 rows, for example .*'apple_pay'")
    assert store.published() == before


@pytest.mark.integration
def test_expectations_find_planted_defects(published: DataPipelineConfig, suites: Path) -> None:
    """In a copy of a snapshot, by the suites of the contract alone."""
    folder = Path(published.root, "current/silver/customers_enriched").resolve()
    planted = {
        "customer_segment": "CASE WHEN customer_id = 7 THEN 'Brass' ELSE customer_segment END",
        "full_name": "CASE WHEN customer_id <> 7 THEN full_name END",
        "customer_id": "CASE WHEN customer_id = 7 THEN 8 ELSE customer_id END",
        "age": "CASE WHEN customer_id = 7 THEN 130 ELSE age END",
        "total_spent": "CAST(total_spent AS DOUBLE)",
    }
    changes = ", ".join(f"{change} AS {column}" for column, change in planted.items())
    rows = f"SELECT * REPLACE ({changes}) FROM '{folder}/*.parquet'"
    duckdb.sql(f"COPY ({rows}) TO '{folder}.parquet' (FORMAT parquet)")
    shutil.rmtree(folder)
    folder.mkdir()
    os.replace(f"{folder}.parquet", folder / "changed.parquet")
    seen = run(*command("expectations.py", "--suites", suites, folder.parent.parent).split(), expect=1)
    found = [line for line in seen.splitlines() if line.startswith("failed: ")]
    assert sorted(
        line.removeprefix("failed: silver.customers_enriched: expect_column_values_to_") for line in found
    ) == [
        "be_between age: 1 rows, for example [130]",
        "be_in_set customer_segment: 1 rows, for example ['Brass']",
        "be_in_type_list total_spent: float64",
        "be_unique customer_id: 2 rows, for example [8, 8]",
        "not_be_null full_name: 1 rows, for example [nan]",
    ]
    assert seen.splitlines()[-1].startswith("5 of 230 expectations failed: silver.customers_enriched: expect_")


@pytest.fixture
def receiver() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that receives events, its address, and the events."""
    events: list[dict[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            events.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(201)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", events
    server.shutdown()
    server.server_close()


def check_schemas(events: list[dict[str, Any]]) -> None:
    """Validates events and their facets by the JSON schemas of OpenLineage's repository."""
    folder = os.environ["OPENLINEAGE_SPEC"]
    program = """
import json, sys
from pathlib import Path
from jsonschema import Draft202012Validator, FormatChecker
from referencing import Registry, Resource
folder = Path(sys.argv[1])
files = [json.loads(path.read_text()) for path in (*folder.glob("*.json"), *folder.glob("facets/*.json"))]
registry = Registry().with_resources((file["$id"], Resource.from_contents(file)) for file in files if "$id" in file)
newest = {file["$id"].rpartition("/")[2]: file["$id"] for file in files if "$id" in file}
def check(value, schema):
    page, _, part = schema.partition("#")
    found = newest[page.rpartition("/")[2]] + "#" + part
    Draft202012Validator({"$ref": found}, registry=registry, format_checker=FormatChecker()).validate(value)
    return 1
def facets(value):
    if isinstance(value, dict):
        if "_schemaURL" in value:
            yield value
        for inner in value.values():
            yield from facets(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from facets(inner)
events = json.load(sys.stdin)
print(sum(check(e, e["schemaURL"]) for e in events), sum(check(f, f["_schemaURL"]) for e in events for f in facets(e)))
"""
    words = [*with_packages_of("lineage.py", "jsonschema[format]"), "-c", program, folder]
    done = subprocess.run(words, input=json.dumps(events), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    checked, of_facets = map(int, done.stdout.split())
    assert checked == len(events) and of_facets > len(events)


@pytest.mark.integration
def test_lineage_of_a_run(
    published: DataPipelineConfig,
    spark: SparkSession,
    receiver: tuple[str, list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Reported by the hook; that of a run that is refused, by hand."""
    url, events = receiver
    monkeypatch.setenv("OPENLINEAGE_URL", url)
    published.after_publish = (command("lineage.py"),)
    record = run_pipeline(published, spark)
    assert [ran["failure"] for ran in record.hooks] == [""]
    assert [event["eventType"] for event in events].count("START") == 17
    assert [event["eventType"] for event in events].count("COMPLETE") == 17
    whole = {event["run"]["runId"] for event in events if event["job"]["name"] == "EcommerceDataPipeline"}
    assert whole == {str(uuid.uuid5(uuid.NAMESPACE_URL, record.run_id))}
    [silver] = [e for e in events if e["job"]["name"] == "silver.customers_enriched" and e["eventType"] == "COMPLETE"]
    assert {silver["run"]["facets"]["parent"]["run"]["runId"]} == whole
    root = published.root
    inputs = {of["name"].removeprefix(f"{root}/"): of["inputFacets"] for of in silver["inputs"]}
    assert set(inputs) == {"bronze/customers", "silver/transactions_clean", "silver/transactions_returned"}
    tests = {test["assertion"]: test for test in inputs["bronze/customers"]["dataQualityAssertions"]["assertions"]}
    missing = record.quality["customers"].violations["email_missing"]
    assert tests["email_missing"] | {"params": {}} == {
        "assertion": "email_missing", "success": False, "column": "email", "severity": "warn", "actual": str(missing),
        "params": {},
    }  # fmt: skip
    assert tests["customer_id_missing"]["success"] is True
    columns = inputs["bronze/customers"]["dataQualityMetrics"]["columnMetrics"]
    assert columns["email"]["nullCount"] == record.profile["customers"]["email"]["nulls"]
    [output] = silver["outputs"]
    assert output["outputFacets"]["outputStatistics"]["rowCount"] == record.rows["silver.customers_enriched"]
    assert output["facets"]["schema"]["fields"][0] == {"name": "customer_id", "type": "bigint", "fields": []}
    spent = output["facets"]["columnLineage"]["fields"]["total_spent"]["inputFields"]
    assert [(of["name"], of["field"]) for of in spent] == [(f"{root}/silver/transactions_clean", "amount")]

    reported = [*events]
    published.max_quarantine_rate = 0.001
    failed = refused(published, spark, "GATE MISSED")
    del events[:]
    run(*command("lineage.py", root).split(), OPENLINEAGE_URL=url)
    assert (events[-1]["eventType"], events[-1]["job"]["name"]) == ("FAIL", "EcommerceDataPipeline")
    assert events[-1]["run"]["runId"] == str(uuid.uuid5(uuid.NAMESPACE_URL, failed["run_id"]))
    assert "GATE MISSED" in events[-1]["run"]["facets"]["errorMessage"]["message"]
    assert not [event for event in events if event["job"]["name"].startswith("silver")]
    if "OPENLINEAGE_SPEC" in os.environ:
        check_schemas([*reported, *events])


@pytest.mark.integration
def test_receiver_that_is_dead(
    published: DataPipelineConfig, spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It costs a warning and ten seconds."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("OPENLINEAGE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        published.after_publish = (command("lineage.py"),)
        record = run_pipeline(published, spark)
    [ran] = record.hooks
    assert record.result == "succeeded"
    assert f"lineage: run {record.run_id} is not reported: " in ran["failure"]
    assert ran["seconds"] < 20


PERTURBED = {  # other values of the same type, by type
    "string": "concat({0}, '~')", "bigint": "{0} + 1000000", "int": "{0} + 1", "double": "{0} + 1",
    "decimal": "CAST({0} + 600 AS DECIMAL(12,2))", "date": "date_add({0}, 40)",
    "timestamp": "{0} + INTERVAL 40 DAYS 1 HOUR", "boolean": "NOT {0}",
}  # fmt: skip


@pytest.mark.integration
@pytest.mark.parametrize("name", json.loads((PROJECT / "integrations/lineage.json").read_text()))
def test_declared_columns_are_those_that_change(name: str, report: RunRecord, spark: SparkSession) -> None:
    """A change of an input column changes exactly the columns that are declared to be made from it.

    If the input column decides which rows and groups there are, others may change too.
    """
    declared = json.loads((PROJECT / "integrations/lineage.json").read_text())[name]
    table = name.partition(".")[2]
    assert list(declared["columns"]) and {*declared["columns"]} == dict(TABLES[table].columns()).keys()
    config = DataPipelineConfig(as_of_date=AS_OF, orphans="keep")
    used = {of for given in (*declared["columns"].values(), declared["rows"]) for of in given}
    inputs = {}
    for source in sorted({of.rpartition(".")[0] for of in used}):
        rows = spark.read.schema(TABLES[source.rpartition(".")[2]].schema_in(source.partition(".")[0])).parquet(
            f"{report.data_dir}/{source.replace('.', '/').replace('returned', 'clean')}"  # there are no returns
        )
        if source.startswith("bronze"):
            key = TABLES[source.rpartition(".")[2]].key
            rows = rows.where(" AND ".join(f"{column} IS NOT NULL" for column in key)).dropDuplicates([*key])
        if source == "bronze.transactions":  # generated data has no returns and no numbers of orders
            sign = "CASE WHEN quantity % 2 = 0 THEN -1 ELSE 1 END" if table == "transactions_returned" else "1"
            amount = f"CAST(amount * {sign} AS DECIMAL(12,2))"
            rows = rows.withColumns({"order_id": F.col("transaction_id"), "amount": F.expr(amount)})
        if source == "silver.transactions_clean":
            rows = rows.withColumn("order_id", F.expr("substring(transaction_id, 5, 6)"))
        inputs[source] = rows.cache()

    def made(changed: str = "", expression: str = "") -> dict[str, list[str]]:
        source, _, column = changed.rpartition(".")
        frames = {
            of.rpartition(".")[2]: rows.withColumn(column, F.expr(expression)) if of == source else rows
            for of, rows in inputs.items()
        }
        if table == "customers_history":
            every_third = frames["customers"].where("customer_id % 3 = 0")
            moved = {"_changed_at": F.expr("TIMESTAMP'2026-03-01 00:00:00'"), "city": F.lit("Ulm"), "_order": F.lit(1)}
            versions = every_third.withColumn("_order", F.lit(2)).unionByName(every_third.withColumns(moved))
            result = customers_history(frames["customers"].where("customer_id % 3 > 0"), versions)
        elif table == "customers_enriched":
            orders, returns = frames["transactions_clean"], frames["transactions_returned"]
            result = customers_enriched(frames["customers"], orders, returns, config, has_order_ids=True)
        elif table in ("category_analytics", "payment_analytics", "device_analytics"):
            result = getattr(data_pipeline, table)(orders_by_dimension(frames["transactions_clean"]))
        else:
            names = ("transactions", "products", "customers_enriched", "products_active")
            result = getattr(data_pipeline, table)(*(frames[of] for of in names if of in frames))
        found = result.collect()
        return {column: sorted(str(row[column]) for row in found) for column in result.columns}

    before = made()
    assert before[next(iter(before))]
    for source, rows in inputs.items():
        for column, kind in rows.dtypes:
            if column.startswith("_"):
                continue
            full = f"{source}.{column}"
            expression = "substring(order_id, 1, 1)" if column == "order_id" else PERTURBED[kind.partition("(")[0]]
            after = made(full, expression.format(column))
            changed = {name for name in before if after[name] != before[name]}
            expected = {name for name, given in declared["columns"].items() if full in given}
            if full in declared["rows"]:
                assert changed and changed >= expected, full
            else:
                assert changed == expected, f"{full} changes {changed}, not {expected}"
