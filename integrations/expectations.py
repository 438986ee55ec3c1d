#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["great_expectations==1.24.1", "pyarrow==26.0.1"]
# ///
"""Validates a snapshot by suites of Great Expectations, and refuses the run if an expectation fails.

    uv run integrations/expectations.py --write suites       writes a suite for each table of silver and gold
    python data_pipeline.py --before-publish "uv run integrations/expectations.py --suites suites"
    uv run integrations/expectations.py --suites suites ~/pipeline-data/current        validates what is published

A suite is a file <layer>.<table>.json, as Great Expectations writes it. Change the suites, or add your own. A failed
expectation only warns if its `severity` is warning, in its `meta` or its own. Data Docs are in <data folder>/data_docs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["GX_ANALYTICS_ENABLED"] = "false"  # before the import, or it reports to its makers

import great_expectations as gx
from great_expectations.data_context.types.base import ProgressBarsConfig
from pyarrow import parquet

PROJECT = Path(__file__).resolve().parent.parent
TYPES = {  # the types of the contract, as pandas reads them
    "string": ["str"], "bigint": ["int", "int64"], "int": ["int", "int32"], "double": ["float", "float64"],
    "decimal": ["Decimal"], "date": ["date"], "boolean": ["bool", "bool_"],
}  # fmt: skip
BOUNDS = {
    "hour": (0, 23), "day_of_week": (1, 7), "transaction_month": (1, 12), "age": (0, 120), "revenue_share": (0, 1),
    "usage_share": (0, 1), "total_spent": (0, None), "total_orders": (0, None), "customer_count": (1, None),
    "transaction_count": (1, None), "product_count": (1, None), "stock_quantity": (1, None), "price": (0, None),
}  # fmt: skip


def contract_expectations(table: Any, nullable: set[str], sets: dict[str, list[str]]) -> Iterator[tuple[str, dict]]:
    """Returns the type and the arguments of each expectation that follows from the declaration of a table."""
    columns = dict(table.columns())
    yield "expect_table_columns_to_match_ordered_list", {"column_list": list(columns)}
    if len(table.key) > 1:
        yield "expect_compound_columns_to_be_unique", {"column_list": list(table.key)}
    else:
        yield "expect_column_values_to_be_unique", {"column": table.key[0]}
    for column, kind in columns.items():
        if (kind := kind.partition("(")[0]) in TYPES:
            yield "expect_column_values_to_be_in_type_list", {"column": column, "type_list": TYPES[kind]}
        if column not in nullable:
            yield "expect_column_values_to_not_be_null", {"column": column}
        if column in sets:
            yield "expect_column_values_to_be_in_set", {"column": column, "value_set": sets[column]}
        if column in BOUNDS:
            low, high = BOUNDS[column]
            yield "expect_column_values_to_be_between", {"column": column, "min_value": low, "max_value": high}
    if table.name == "transactions_clean":
        yield "expect_column_values_to_be_in_set", {"column": "status", "value_set": ["completed"]}
        yield "expect_column_values_to_be_between", {"column": "amount", "min_value": 0, "strict_min": True}


def write_suites(folder: Path) -> Iterator[str]:
    """Writes a suite for each table of silver and gold, from the contract and its description."""
    sys.path.insert(0, str(PROJECT))
    from data_pipeline import AGE_GROUPS, GOLD, PRICE_BANDS, SEGMENTS, SILVER, STOCK_STATUSES, UNKNOWN, tables

    words = {"customer_segment": [*SEGMENTS, UNKNOWN], "age_group": [*AGE_GROUPS]}
    words |= {"price_band": [*PRICE_BANDS], "stock_status": [*STOCK_STATUSES]}
    described = (PROJECT / "docs/tables.md").read_text(encoding="utf-8").split("\n### ")[1:]
    nullable = {text.split()[0]: set(re.findall(r"^\| `(\w+)` \?", text, re.MULTILINE)) for text in described}
    folder.mkdir(parents=True, exist_ok=True)
    for table in (*tables(SILVER), *tables(GOLD)):
        found = contract_expectations(table, nullable[table.name], words)
        expectations = [{"type": kind, "kwargs": kwargs, "meta": {}} for kind, kwargs in found]
        suite = gx.ExpectationSuite(name=f"{table.layer}.{table.name}", expectations=expectations)
        (folder / f"{suite.name}.json").write_text(json.dumps(suite.to_json_dict(), indent=1) + "\n")
        yield f"{folder / suite.name}.json: {len(expectations)} expectations"


def new_context(docs: Path) -> Any:
    """Returns a context without files of its own, with Data Docs in a folder."""
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    for site in list(context.get_site_names()):
        context.delete_data_docs_site(site)
    store = {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs.absolute())}
    site = {"store_backend": store, "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"}}
    context.add_data_docs_site("data_docs", site | {"class_name": "SiteBuilder", "show_how_to_buttons": False})
    return context


def validate(context: Any, path: Path, snapshot: Path) -> list[Any]:
    """Returns the results of a suite on its table of a snapshot."""
    suite = context.suites.add(gx.ExpectationSuite(**json.loads(path.read_text(encoding="utf-8")) | {"id": None}))
    rows = parquet.read_table(snapshot.joinpath(*path.stem.split("."))).to_pandas(integer_object_nulls=True)
    rows = rows.astype({name: object for name, kind in rows.dtypes.items() if kind == "str"})  # so that types are found
    asset = context.data_sources.add_pandas(path.stem).add_dataframe_asset(path.stem)
    batch = asset.add_batch_definition_whole_dataframe("whole")
    definition = context.validation_definitions.add(gx.ValidationDefinition(name=path.stem, data=batch, suite=suite))
    checkpoint = context.checkpoints.add(gx.Checkpoint(name=path.stem, validation_definitions=[definition]))
    return next(iter(checkpoint.run(batch_parameters={"dataframe": rows}).run_results.values())).results


def describe(name: str, result: Any) -> str:
    """Describes a failed expectation, with the values that it did not expect."""
    expected, found = result.expectation_config, result.result
    values = found.get("partial_unexpected_list") or found.get("observed_value") or result.exception_info
    where = expected.kwargs.get("column") or expected.kwargs.get("column_list") or ""
    rows = f"{found['unexpected_count']} rows, for example " if found.get("unexpected_count") else ""
    return f"{name}: {expected.type} {where}: {rows}{str(values)[:200]}"


def main() -> str | None:
    """Does what the command line asks for. Returns what refuses the run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    snapshot = os.environ.get("PIPELINE_SNAPSHOT", os.path.expanduser("~/pipeline-data/current"))
    parser.add_argument("snapshot", nargs="?", type=Path, default=snapshot, help="folder (default: PIPELINE_SNAPSHOT)")
    work = parser.add_mutually_exclusive_group(required=True)
    work.add_argument("--suites", type=Path, metavar="FOLDER", help="validate the snapshot by these suites")
    work.add_argument("--write", type=Path, metavar="FOLDER", help="write suites from the contract of the pipeline")
    arguments = parser.parse_args()
    if arguments.write:
        return print(*write_suites(arguments.write), sep="\n")
    snapshot = arguments.snapshot.resolve()
    context, failed, count = new_context(snapshot.parent.parent / "data_docs"), [], 0
    paths = sorted(arguments.suites.glob("*.json")) or parser.error(f"there are no suites in {arguments.suites}")
    for path in paths:
        for result in validate(context, path, snapshot):
            count += 1
            if not result.success:
                expected, line = result.expectation_config, describe(path.stem, result)
                is_warning = "warning" in (expected.meta.get("severity"), getattr(expected.severity, "value", ""))
                print(f"{'warning' if is_warning else 'failed'}: {line}")
                failed += [] if is_warning else [line]
    print(f"Data Docs: {context.build_data_docs()['data_docs']}")
    problem = f"{len(failed)} of {count} expectations failed: {failed[0]}" if failed else None
    return problem or print(f"{count} expectations hold")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError) as error:  # no such table, or a suite that is not one
        sys.exit(f"expectations: {' '.join(str(error).split())}")
