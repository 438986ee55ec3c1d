#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["openlineage-python==1.54.0"]
# ///
"""Reports a run to an OpenLineage receiver, such as Marquez: jobs, tables, columns, row counts and quality.

    OPENLINEAGE_URL=http://localhost:5000 python data_pipeline.py --after-publish "uv run integrations/lineage.py"
    uv run integrations/lineage.py ~/pipeline-data           the last run, for example one that has failed

All is taken from the run record and the contract. The receiver is named as OpenLineage's client expects it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import threading
import uuid
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from openlineage.client import OpenLineageClient
from openlineage.client.event_v2 import InputDataset, Job, OutputDataset, Run, RunEvent, RunState
from openlineage.client.facet_v2 import column_lineage_dataset as lineage
from openlineage.client.facet_v2 import data_quality_assertions_dataset as tests
from openlineage.client.facet_v2 import data_quality_metrics_input_dataset as metrics
from openlineage.client.facet_v2 import error_message_run, parent_run
from openlineage.client.facet_v2 import output_statistics_output_dataset as statistics
from openlineage.client.facet_v2 import schema_dataset as schema

NAMESPACE = os.environ.get("OPENLINEAGE_NAMESPACE", "data_pipeline")
TIMEOUT = 10.0  # seconds for all events together
# For each table of silver and gold: the columns that each column is made from, and those that decide which rows and
# groups there are.
LINEAGE: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def input_facets(record: dict[str, Any], table: str) -> dict[str, Any]:
    """Returns metrics of the columns of a bronze table that arrived, and its rules as tests."""
    from data_pipeline import TABLES, key_rules

    layer, _, name = table.partition(".")
    if layer != "bronze" or name not in record["quality"]:
        return {}
    rules = {rule.name: (rule.column, rule.severity) for rule in (*TABLES[name].rules, *key_rules(TABLES[name]))}
    rules |= {rule: (None, severity) for rule, severity in record["rules"].get(name, {}).items()}
    results = []
    for rule, rows in record["quality"][name]["violations"].items():
        column, severity = rules.get(rule, (None, ""))
        kind = "warn" if severity == "warn" else "error"
        results.append(tests.Assertion(rule, success=not rows, column=column, severity=kind, actual=str(rows)))
    of_columns = {
        column: metrics.ColumnMetrics(found["nulls"], found["distinct"], count=found["rows"])
        for column, found in record["profile"].get(name, {}).items()
    }
    return {
        "dataQualityMetrics": metrics.DataQualityMetricsInputDatasetFacet(of_columns, record["rows"].get(table)),
        "dataQualityAssertions": tests.DataQualityAssertionsDatasetFacet(results),
    }


def events(record: dict[str, Any]) -> Iterator[RunEvent]:
    """Returns the events of a run: its start, start and end of each table, and its end."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from data_pipeline import SNAPSHOT_TABLES

    root, began = urlsplit(record["data_dir"]), datetime.fromisoformat(record["started_at"])
    namespace = f"{root.scheme}://{root.netloc}" if root.scheme else "file"
    app, whole = record["config"]["app_name"], str(uuid.uuid5(uuid.NAMESPACE_URL, record["run_id"]))
    parent = parent_run.ParentRunFacet(parent_run.Run(whole), parent_run.Job(NAMESPACE, app))
    good, error = record["result"] == "succeeded", record["error"] or {}
    message = error.get("message", record["result"])  # a run that was killed has no error
    failure = error_message_run.ErrorMessageRunFacet(message, "Python", error.get("traceback"))

    def name_of(table: str) -> str:
        return f"{root.path}/{table.replace('.', '/')}"

    def event(state: str, time: datetime, job: str, inputs: Any = (), outputs: Any = ()) -> RunEvent:
        run_id = whole if job == app else str(uuid.uuid5(uuid.NAMESPACE_URL, f"{record['run_id']}/{job}"))
        facets = ({"parent": parent} if job != app else {}) | ({"errorMessage": failure} if state == "FAIL" else {})
        of = {"run": Run(run_id, facets), "job": Job(NAMESPACE, job), "inputs": [*inputs], "outputs": [*outputs]}
        return RunEvent(eventTime=time.isoformat(), producer="urn:data_pipeline", eventType=RunState(state), **of)

    def columns(listed: list[str], kind: str) -> list[lineage.InputField]:
        parts, kinds = (name.rpartition(".") for name in listed), [lineage.Transformation(kind)]
        return [lineage.InputField(namespace, name_of(table), column, kinds) for table, _, column in parts]

    yield event("START", began, app)
    for layer, table in SNAPSHOT_TABLES:
        name = f"{layer}.{table.name}"
        if name not in record["rows"] and (good or record["current_step"] != name):
            continue
        read = {f"bronze.{table.name}": None} if layer == "quarantine" else {}
        fields = [schema.SchemaDatasetFacetFields(column, kind) for column, kind in table.columns(layer)]
        facets: dict[str, Any] = {"schema": schema.SchemaDatasetFacet(fields)}
        if name in LINEAGE:
            made, rows = LINEAGE[name]["columns"], LINEAGE[name]["rows"]
            read = dict.fromkeys(of.rpartition(".")[0] for of in itertools.chain(*made.values(), rows))
            direct = {column: lineage.Fields(columns(given, "DIRECT")) for column, given in made.items()}
            facets["columnLineage"] = lineage.ColumnLineageDatasetFacet(direct, columns(rows, "INDIRECT"))
        inputs = [InputDataset(namespace, name_of(of), inputFacets=input_facets(record, of)) for of in read]
        if layer == "bronze":
            folder = os.path.abspath(os.path.expanduser(record["config"].get("source_dir") or ""))
            inputs = [InputDataset("file", f"{folder}/{source}") for source in record["delivery"]]
        counts = statistics.OutputStatisticsOutputDatasetFacet(record["rows"].get(name), record["bytes"].get(name))
        output = OutputDataset(namespace, name_of(name), facets=facets, outputFacets={"outputStatistics": counts})
        start = began + timedelta(seconds=record["started_after"].get(name, 0))
        yield event("START", start, name, inputs, [output])
        end = start + timedelta(seconds=record["seconds"].get(name, 0))
        yield event("COMPLETE" if name in record["rows"] else "FAIL", end, name, inputs, [output])
    finished = datetime.fromisoformat(record["finished_at"]) if record["finished_at"] else datetime.now(timezone.utc)
    yield event("COMPLETE" if good else "FAIL", finished, app)


def main() -> str | None:
    """Sends the events of a run. Returns what went wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data_dir", nargs="?", help="data folder, to report its last run (default: PIPELINE_RECORD)")
    folder, record_file = parser.parse_args().data_dir, os.environ.get("PIPELINE_RECORD")
    runs = sorted(Path(folder).expanduser().glob("runs/*.json")) if folder else [Path(f) for f in [record_file] if f]
    if not runs:
        parser.error(f"there is no run record in {folder}" if folder else "name a data folder, or run this as a hook")
    record, problems = json.loads(runs[-1].read_text(encoding="utf-8")), [f"no answer within {TIMEOUT:g} seconds"]
    if record["result"] == "running":
        return f"lineage: run {record['run_id']} has not ended, or was killed: the next run records that"

    def send() -> None:
        try:
            client = OpenLineageClient()
            for event in events(record):
                client.emit(event)
            problems.clear()
        except Exception as error:
            problems[:] = [str(error)]

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    sender.join(TIMEOUT)
    return f"lineage: run {record['run_id']} is not reported: {problems[0]}" if problems else None


if __name__ == "__main__":
    sys.exit(main())
