"""README and docs: the dictionary of the tables equals the contract, and each command and snippet works."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import pytest
from conftest import ENGINE, one
from pyspark.sql import SparkSession
from test_cluster import free_port
from test_publish import IDS, add_whole, empty_tables  # noqa: F401 - a fixture

import data_pipeline
from data_pipeline import (
    ABORT,
    BRONZE,
    ORPHAN,
    QUARANTINE,
    SILVER,
    TABLES,
    WARN,
    DataPipelineConfig,
    RunRecord,
    Store,
    key_rules,
    load_config,
    parse_arguments,
    tables,
)

PROJECT = Path(data_pipeline.__file__).parent
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]


class Block(NamedTuple):
    """A block of code: in which file, what the comment above it says, its language and its text."""

    page: str
    remark: str
    language: str
    text: str


def blocks() -> list[Block]:
    pattern = re.compile(r"(?:^<!-- (.*) -->\n)?^```(.*)\n([\s\S]*?)^```$", re.MULTILINE)
    return [Block(page.name, *found) for page in PAGES for found in pattern.findall(page.read_text())]


BLOCKS = blocks()
COMMANDS = [block for block in BLOCKS if block.language == "bash" and not block.remark]


class Row(NamedTuple):
    column: str
    type: str
    unit: str
    meaning: str
    example: str


def sections() -> dict[str, str]:
    """The text of each table in docs/tables.md, by its name; that of quarantine is the last one."""
    parts = re.split(r"^##+ (\w+).*\n", (PROJECT / "docs/tables.md").read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def cells(text: str, header: str) -> list[list[str]]:
    """The rows of the Markdown table with this header."""
    body = text.partition(f"| {header} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in body]


def documented(name: str) -> list[Row]:
    return [Row(*row) for row in cells(sections()[name], "column | type | unit | meaning | example")]


def test_readme_is_short() -> None:
    assert len((PROJECT / "README.md").read_text().splitlines()) <= 120


def test_tables_are_those_of_the_contract() -> None:
    assert list(sections()) == [
        "Bronze", "customers", "products", "transactions",
        "Silver", *(table.name for table in tables(SILVER)),
        "Gold", *(table.name for table in tables("gold")), "Quarantine",
    ]  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_columns_and_key_are_those_of_the_contract(name: str) -> None:
    table = TABLES[name]
    found = documented(name)
    names_and_types = [(row.column.removesuffix(" ?").strip("`"), row.type.lower()) for row in found]
    assert names_and_types == table.columns(table.layer)
    assert all(row.meaning for row in found)
    [key] = re.findall(r"^One row per .*\. Key: (`\w+`(?:, `\w+`)*)", sections()[name], re.MULTILINE)
    assert tuple(key.replace("`", "").split(", ")) == table.key
    for row in found:  # what has a unit by its type alone
        assert row.unit or not row.type.startswith(("DECIMAL", "TIMESTAMP", "DATE", "DOUBLE")), row


def test_quarantine_adds_its_reasons() -> None:
    [row] = documented("Quarantine")
    added = set(TABLES["customers"].columns(QUARANTINE)) - set(TABLES["customers"].columns(BRONZE))
    assert {(row.column.strip("`"), row.type.lower())} == added


@pytest.mark.parametrize("name", [table.name for table in tables(BRONZE)])
def test_rules_are_those_of_the_contract(name: str) -> None:
    table = TABLES[name]

    def effect(rule: data_pipeline.Rule) -> str:
        if rule.severity == ORPHAN:
            return "is kept, or goes to quarantine (`--orphans`)"
        if rule.severity == WARN:
            return "is kept" + (f", without its `{rule.column}` in silver" if rule.nullify else "")
        return "goes to quarantine" + (", and nothing is published" if rule.severity == ABORT else "")

    rules = [*table.rules, *key_rules(table)]
    found = cells(sections()[name], "rule | violated when | the row")
    assert [(rule, row) for rule, _, row in found] == [(f"`{rule.name}`", effect(rule)) for rule in rules]
    for rule, (_, condition, _) in zip(rules, found, strict=True):
        assert f"`{rule.column}`" in condition


@pytest.mark.parametrize("name", [table.name for table in (*tables(SILVER), *tables("gold"))])
def test_null_is_where_the_dictionary_allows_it(name: str, db: duckdb.DuckDBPyConnection) -> None:
    """A received value may be null unless a rule rejects its absence or silver fills it; no unmarked column has one."""
    marked = {row.column.removesuffix(" ?").strip("`"): row.column.endswith(" ?") for row in documented(name)}
    for column, may_be_null in marked.items():
        if not may_be_null:
            assert one(db, f"SELECT count(*) FROM {name} WHERE {column} IS NULL") == 0, column
    table = TABLES[name]
    if table.layer == SILVER:
        source = TABLES[table.from_table]
        required = {rule.column for rule in source.rules if rule.severity != WARN and rule.name.endswith("_missing")}
        received = {column for column, _ in source.columns()} & set(marked)
        filled = {row.column.strip("`") for row in documented(name) if re.search("nknown`|always true", row.meaning)}
        assert {column for column in received if marked[column]} == received - required - filled


@pytest.mark.parametrize("name", [*TABLES, "Quarantine"])
def test_examples_have_their_type_and_occur(name: str, db: duckdb.DuckDBPyConnection) -> None:
    for row in documented(name):
        column, example = row.column.removesuffix(" ?").strip("`"), row.example.strip("`")
        kind = row.type.replace("STRING", "VARCHAR").replace("ARRAY<VARCHAR>", "VARCHAR[]")
        cast = one(db, f"SELECT CAST(CAST('{example}' AS {kind}) AS VARCHAR)")
        assert cast == example, f"{name}.{column}: {example} is read as {cast}"
        # Where there are few values, the example is one of those of the small run.
        view = f"bronze_{name}" if name in TABLES and TABLES[name].layer == BRONZE else name
        few = kind == "VARCHAR" and name != "Quarantine" and not column.startswith("_")
        if few and 1 <= one(db, f"SELECT count(DISTINCT {column}) FROM {view}") <= 30:
            assert one(db, f"SELECT count(*) FROM {view} WHERE {column} = '{example}'"), f"{name}.{column}: {example}"
        if name == "Quarantine":
            reason = example.strip("[]")
            assert one(db, f"SELECT count(*) FROM quarantine_transactions WHERE list_contains({column}, '{reason}')")


def test_every_block_is_run_or_says_why_not() -> None:
    assert len(BLOCKS) > 10
    for block in BLOCKS:
        assert block.language in ("python", "bash", "sql", "text"), block
        assert re.fullmatch("|run by: .+|not run: .{20,}", block.remark), block
        if program := block.remark.partition("run by: ")[2]:
            assert (PROJECT / program).is_file(), block
    assert not [block for block in BLOCKS if block.language == "python" and block.remark], "snippets are all run"
    for page in PAGES:
        fences = len(re.findall(r"^ *```", page.read_text(), re.MULTILINE))
        assert fences == 2 * sum(block.page == page.name for block in BLOCKS), f"a block of {page.name} is not found"


@pytest.mark.skipif(ENGINE == "sail", reason="the snippets are of Spark, whatever the engine of the tests")
def test_python_snippets(
    report: RunRecord, spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """After a run with the default data folder, on the tests' session; those of docs/ run the pipeline, on less."""
    shutil.copytree(report.data_dir, tmp_path / "pipeline-data", symlinks=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    at_exit: list[Callable[[], None]] = []
    monkeypatch.setattr(data_pipeline, "atexit", types.SimpleNamespace(register=at_exit.append))
    smaller = functools.partial(DataPipelineConfig, num_transactions=1_000, num_products=20, shuffle_partitions=2)
    smaller.__dataclass_fields__ = DataPipelineConfig.__dataclass_fields__  # type: ignore[attr-defined]
    snippets = {page: [block.text for block in BLOCKS if (block.language, block.page) == ("python", page)]
                for page in dict.fromkeys(block.page for block in BLOCKS)}  # fmt: skip
    readme = snippets.pop("README.md")
    assert len(readme) >= 3
    with warnings.catch_warnings(action="ignore"):
        exec("\n".join(readme), {})  # noqa: S102 - our own
    [close] = at_exit
    close()
    assert spark.range(3).count() == 3, "a session that was there is left running"
    shown = capsys.readouterr().out
    for column in ("product_category", "payment_method", "customer_segment"):
        assert column in shown
    others = [text for texts in snippets.values() for text in texts]
    assert len(others) >= 1
    monkeypatch.setattr(data_pipeline, "DataPipelineConfig", smaller)
    names: dict[str, Any] = {}
    for snippet in others:
        exec(snippet, names)  # noqa: S102 - our own
    assert Store(str(tmp_path / "pipeline-data")).published() != report.run_id, "one of them runs the pipeline"


def in_parts(line: str) -> tuple[dict[str, str], list[str]]:
    """The variables that a command sets, and the flags of the pipeline that it runs."""
    words = shlex.split(line, comments=True)
    command = words.index(".venv/bin/python")
    assert words[command + 1] == "data_pipeline.py", line
    return dict(word.split("=", 1) for word in words[:command]), words[command + 2 :]


@pytest.mark.parametrize("line", [line for block in COMMANDS for line in block.text.splitlines()])
def test_commands(line: str, tmp_path: Path, empty_tables: Path) -> None:  # noqa: F811
    """What lists or rolls back is run; of the settings of a run, which would be a large one, the check is."""
    environment, flags = in_parts(line)
    config = load_config(parse_arguments(flags), environment)
    data_pipeline.check_config(config)
    if {"--list-runs", "--rollback"} & set(flags):
        store = Store(str(tmp_path / "pipeline-data"))
        for folder in ("runs", "snapshots"):
            os.makedirs(store.path(folder))
        for run_id in IDS[:2]:
            add_whole(store, run_id, empty_tables)
        done = subprocess.run(
            [sys.executable, data_pipeline.__file__, *flags],
            env=os.environ | {"HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert store.published() == IDS["--list-runs" in flags]


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "bash"])
def test_commands_that_are_not_run_are_right(block: Block) -> None:
    """Bash can parse them, and the pipeline has the flags."""
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True) if "data_pipeline.py --" in line else ["data_pipeline.py"]
        data_pipeline.check_config(load_config(parse_arguments(words[words.index("data_pipeline.py") + 1 :]), {}))


@pytest.mark.slow
@pytest.mark.skipif(ENGINE == "sail", reason="Sail runs within one process")
def test_cluster_on_one_machine(tmp_path: Path) -> None:
    [block] = [block for block in BLOCKS if block.page == "cluster.md" and block.remark == "run by: tests/test_docs.py"]
    script = block.text.replace("7077", str(free_port())).replace("/tmp/spark-work", f"{tmp_path}/work")  # noqa: S108
    script = script.replace(".venv/bin/python", sys.executable).replace("data_pipeline.py", data_pipeline.__file__)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIPELINE_", "SPARK_"))}
    with open(tmp_path / "log", "w+") as log:
        process = subprocess.Popen(
            ["bash", "-ec", script],
            env=kept | {"HOME": str(tmp_path), "PIPELINE_FAST_START": "no"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            assert process.wait(timeout=600) == 0, (tmp_path / "log").read_text()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert Store(str(tmp_path / "pipeline-cluster")).published()
    assert "Executors on spark://127.0.0.1:" in (tmp_path / "log").read_text()


@functools.cache
def texts() -> list[str]:
    """The texts of the program, `…` in place of values, and the deployment script."""
    found = [(PROJECT / ".github/deploy.sh").read_text()]
    for node in ast.walk(ast.parse(Path(data_pipeline.__file__).read_text())):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def messages() -> list[str]:
    """The messages that *A run failed: what now?* explains."""
    rows = cells((PROJECT / "docs/operations.md").read_text(), "message | what to do")
    return [message for row in rows for message in re.findall("`([^`]+)`", row[0])]


@pytest.mark.parametrize("message", messages())
def test_messages_are_those_of_the_program(message: str) -> None:
    assert any(all(part in text for part in message.split("…")) for text in texts()), message


def test_fields_of_the_run_record_are_explained() -> None:
    rows = cells((PROJECT / "docs/operations.md").read_text(), "field | content")
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row[0])} | {"schema_version"}
    assert named == {field.name for field in dataclasses.fields(RunRecord)}


def test_import_from_another_folder(tmp_path: Path) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(PROJECT)!r})
from data_pipeline import DataPipelineConfig, RunRecord, job_summary
config = DataPipelineConfig(num_customers=7)
print(job_summary(RunRecord("r", "2026-01-01T00:00:00+00:00", "/data", config.redacted(), {{}})))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "Pipeline run r: running" in done.stdout, done.stderr


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
