"""Files that others land: every kind is read, nothing is lost or guessed, and what cannot be read is named."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import gzip
import hashlib
import io
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import THOROUGH, one, open_tables
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F

import data_pipeline
from data_pipeline import (
    PAYMENT_METHODS,
    TABLES,
    ConfigurationError,
    DataPipelineConfig,
    FileReader,
    LandedFile,
    LandedFiles,
    NotPublishedError,
    PipelineError,
    Run,
    RunRecord,
    Snapshot,
    Source,
    Store,
    apply_contract,
    assign_sources,
    choose_engine,
    html_report,
    ingest_bronze,
    inspect_source,
    list_files,
    metrics,
    names,
    new_record,
    open_source,
    parse_model,
    preflight,
    proposed_expression,
    proposed_model,
    run_pipeline,
    wait_until_settled,
    zip_members,
)

Small = Callable[..., DataPipelineConfig]

CUSTOMERS = "customer_id,first_name,last_name,email\n1,Ann,Lee,ann@example.com\n2,Bo,Kim,\n"
PRODUCTS = (
    "product_id,product_name,category,price,stock_quantity,supplier,created_date,is_active\n"
    "A,Lamp,Home,9.99,5,Ford,2024-01-01,true\nB,Kite,Toys,20.00,0,Ford,2024-01-01,1\n"
)
ORDERS_HEADER = "transaction_id,customer_id,product_id,quantity,amount,timestamp,payment_method,status"
ORDERS = f"{ORDERS_HEADER}\nT1,1,A,1,9.99,2026-03-01 10:00:00,paypal,completed\n"


def land(folder: Path, files: Mapping[str, str | bytes]) -> str:
    """Writes files into a folder, by their paths."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(folder)


@pytest.fixture
def landed(small: Small, tmp_path: Path) -> Callable[..., DataPipelineConfig]:
    """Lands a good shop of two customers and two products, with these files besides; returns the configuration."""

    def make(files: Mapping[str, str | bytes | None], **values: Any) -> DataPipelineConfig:
        defaults = {"customers.csv": CUSTOMERS, "products.csv": PRODUCTS, "transactions/1.csv": ORDERS}
        source = land(
            tmp_path / "source", {name: text for name, text in {**defaults, **files}.items() if text is not None}
        )
        return small(source_dir=source, settle_seconds=0, max_quarantine_rate=1, **values)

    return make


@pytest.fixture
def shop(landed: Callable[..., DataPipelineConfig], spark: SparkSession) -> Callable[..., RunRecord]:
    """Runs the pipeline on such a shop; a run leaves no view in the session."""

    def run(files: Mapping[str, str | bytes | None], **values: Any) -> RunRecord:
        before = {table.name for table in spark.catalog.listTables()}
        record = run_pipeline(landed(files, **values), spark)
        assert {table.name for table in spark.catalog.listTables()} == before
        return record

    return run


@contextlib.contextmanager
def begun(spark: SparkSession, config: DataPipelineConfig) -> Iterator[tuple[Run, Source]]:
    """A run of which nothing is done yet, and its source."""
    source, store = open_source(config), Store(config.root)
    with contextlib.closing(choose_engine(config, source, spark)) as engine:
        engine.start(os.devnull)
        record = new_record(config, store, engine)
        run = Run(config, engine, Snapshot(store, record.run_id), record)
        with run.layer("bronze", "of a test"):
            yield run, source


def delivery(spark: SparkSession, config: DataPipelineConfig, name: str) -> tuple[list[Row], RunRecord]:
    """The records of a table as its source delivers them, without a whole run, and the run record."""
    with begun(spark, config) as (run, source):
        source.receive(run)
        rows = source.delivery(run, name)
        assert rows is not None
        return rows.collect(), run.record


def delivered(spark: SparkSession, config: DataPipelineConfig, name: str = "transactions") -> list[Row]:
    return delivery(spark, config, name)[0]


def read(
    folder: Path, config: DataPipelineConfig, files: Sequence[LandedFile] = ()
) -> tuple[list[LandedFile], dict[str, list[tuple[Any, ...]]]]:
    """Reads the files of a folder without an engine; returns them, and the staged rows by what they are."""
    files = list(files) or list_files(str(folder))
    staging = folder / ".staging"
    staging.mkdir()
    rows: dict[str, list[tuple[Any, ...]]] = {"records": [], "malformed": []}
    for part in FileReader(str(folder), str(staging), config).read(files, with_models=names("bronze")):
        table = pq.read_table(part.folder).sort_by([("_delivery", "ascending"), ("_source_row", "ascending")])
        columns = [*(f"c{number}" for number in range(len(part.columns))), "_source_row"]
        staged = zip(*(table[column].to_pylist() for column in columns), strict=True)
        rows["malformed" if part.is_malformed else "records"] += staged
    return files, rows


def excel(*rows: list[Any]) -> bytes:
    """Returns an Excel file with a sheet of these rows; numbers in the third column are dates and times."""
    cells = []
    for number, row in enumerate(rows, start=1):
        cells.append(f'<row r="{number}">')
        for letter, value in zip("ABCDEF", row, strict=False):
            place, style = f'r="{letter}{number}"', ""
            if isinstance(value, str):
                cells.append(f'<c {place} t="inlineStr"><is><t xml:space="preserve">{value}</t></is></c>')
            elif value is not None:
                kind = ' t="b"' if isinstance(value, bool) else ""
                if letter == "C":
                    style = ' s="1"' if value % 1 == 0 else ' s="3"' if value < 1 else ' s="2"'
                cells.append(f"<c {place}{kind}{style}><v>{int(value) if kind else value!r}</v></c>")
        cells.append("</row>")
    main, office = "http://schemas.openxmlformats.org/spreadsheetml/2006/main", "http://schemas.openxmlformats.org"
    related, kinds = f"{office}/officeDocument/2006/relationships", f"{office}/package/2006"
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{kinds}/content-types"/>',
        "_rels/.rels": f'<Relationships xmlns="{kinds}/relationships"><Relationship Id="r1" '
        f'Type="{related}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
        "xl/workbook.xml": f'<workbook xmlns="{main}" xmlns:r="{related}"><sheets>'
        '<sheet name="Orders" sheetId="1" r:id="r1"/></sheets></workbook>',
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{kinds}/relationships">'
        f'<Relationship Id="r1" Type="{related}/worksheet" Target="worksheets/sheet1.xml"/>'
        f'<Relationship Id="r2" Type="{related}/styles" Target="styles.xml"/></Relationships>',
        "xl/styles.xml": f'<styleSheet xmlns="{main}"><cellXfs><xf numFmtId="0"/><xf numFmtId="14"/>'
        '<xf numFmtId="22"/><xf numFmtId="21"/></cellXfs></styleSheet>',
        "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{main}"><sheetData>{"".join(cells)}</sheetData></worksheet>',
    }
    return zipped({name: text.encode() for name, text in parts.items()})


def zipped(members: Mapping[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


LATIN = "id,name\n1,Zoë\n".encode("latin-1")
TEXTS: dict[str, tuple[str, str | bytes, list[tuple[Any, ...]], list[tuple[Any, ...]], dict[str, Any]]] = {
    "plain": ("t.csv", "id,name\n1,a\n2,b\n", [("1", "a", 1), ("2", "b", 2)], [], {}),
    "no newline at the end": ("t.csv", "id,name\n1,a", [("1", "a", 1)], [], {}),
    "windows": ("t.csv", "id,name\r\n1,a\r\n2,b\r\n", [("1", "a", 1), ("2", "b", 2)], [], {}),
    "both newlines": ("t.csv", "id,name\r\n1,a\n2,b\r\n", [("1", "a", 1), ("2", "b", 2)], [], {}),
    "byte order mark": ("t.csv", "\ufeffid,name\n1,ä\n", [("1", "ä", 1)], [], {}),
    "mark and bad record": ("t.csv", "\ufeffid,name\n1\n2,ä\n", [("2", "ä", 2)], [("1", 1)], {}),
    "null and empty": ("t.csv", 'id,name\n1,\n,""\n', [("1", None, 1), (None, "", 2)], [], {}),
    "null and empty, copied": ("t.csv", 'id,name\n1,\n9\n,""\n', [("1", None, 1), (None, "", 3)], [("9", 2)], {}),
    "newline within": ("t.csv", 'id,name\n1,"a\nb"\n2,c\n', [("1", "a\nb", 1), ("2", "c", 2)], [], {}),
    "quotes": ("t.csv", 'id,name\n1,"say ""hi"""\n2,5" disk\n', [("1", 'say "hi"', 1), ("2", '5" disk', 2)], [], {}),
    "space before quote": (
        "t.csv", 'id,name\n1, "a"\n ,"b"\n, "\n', [("1", ' "a"', 1), (" ", "b", 2), (None, ' "', 3)], [], {},
    ),
    "blank lines at the beginning": ("t.csv", "\r\n\r\nid,name\r\n1,a\r\n", [("1", "a", 1)], [], {}),
    "text after a quote": ("t.csv", 'id,name\n1,"a"b\n', [("1", "ab", 1)], [], {}),
    "blank lines": ("t.csv", "id,name\n\n1,a\n\n\n2,b\n\n", [("1", "a", 1), ("2", "b", 2)], [], {}),
    "too few and too many": (
        "t.csv", 'id,name\n1\n2,b\n3,"c\nd",e\n4,d\n',
        [("2", "b", 2), ("4", "d", 4)], [("1", 1), ('3,"c\nd",e', 3)], {},
    ),
    "one column": ("t.csv", 'id\n1\n\n""\n', [("1", 1), (None, 2), ("", 3)], [], {}),
    "semicolons": ("t.csv", "id;name\n1;a,b\n", [("1", "a,b", 1)], [], {"source_delimiter": ";"}),
    "semicolons are found": ("t.csv", "id;name\n1;a,b\n", [("1", "a,b", 1)], [], {}),
    "delimiter outside quotes": ("t.csv", '"id,a,b";name\n1;a\n', [("1", "a", 1)], [], {}),
    "tab in .csv, bar in .tsv": ("t.csv", "id\tname\n1\ta|b\n", [("1", "a|b", 1)], [], {}),
    "setting before header": ("t.csv", "id;a;b,name\n1,a\n", [("1", "a", 1)], [], {"source_delimiter": ","}),
    "sep=": ("t.csv", "sep=;\r\nid;name\r\n1;a,b\r\n2\r\n", [("1", "a,b", 1)], [("2", 2)], {}),
    "sep= after a mark": ("t.csv", "\ufeffsep=^\nid^name\n1^a\n", [("1", "a", 1)], [], {}),
    "setting before sep=": ("t.csv", "sep=;\nid,name\n1,a\n", [("1", "a", 1)], [], {"source_delimiter": ","}),
    "tabs": ("t.tsv", "id\tname\n1\ta\n", [("1", "a", 1)], [], {}),
    "single quotes": ("t.csv", "id,name\n1,'a,b'\n", [("1", "a,b", 1)], [], {"source_quote": "'"}),
    "latin-1": ("t.csv", LATIN, [("1", "Zoë", 1)], [], {"source_encoding": "latin-1"}),
    "utf-16": ("t.csv", "id,name\n1,ü\n".encode("utf-16"), [("1", "ü", 1)], [], {"source_encoding": "utf-16"}),
    "utf-16 by its mark": ("t.csv", "id\tname\n1\tü\n2\n".encode("utf-16"), [("1", "ü", 1)], [("2", 2)], {}),
    "utf-16, big end first": ("t.csv", "\ufeffid,name\r1,ü\r".encode("utf-16-be"), [("1", "ü", 1)], [], {}),
    "utf-8 by its mark": ("t.csv", "\ufeffid,name\n1,ä\n", [("1", "ä", 1)], [], {"source_encoding": "latin-1"}),
    "utf-16 objects": ("t.json", '{"id": "ü"}\n'.encode("utf-16"), [("ü", 1)], [], {}),
    "gzip": ("t.csv.gz", gzip.compress(b"id,name\n1,a\n"), [("1", "a", 1)], [], {}),
    "gzip, two members": (
        "t.csv.gz", gzip.compress(b"id,name\n1,a\n") + gzip.compress(b"2,b\n"), [("1", "a", 1), ("2", "b", 2)], [], {},
    ),
    "header only": ("t.csv", "id,name\n", [], [], {}),
    "nothing": ("t.csv", "", [], [], {}),
    "objects": (
        "t.jsonl",
        '{"id": 12.50, "name": null}\n\n{"id": 1e3, "more": true}\n'
        '{"id": 12345678901234567890, "more": {"a": [1.50]}}\n',
        [("12.50", None, None, 1), ("1e3", None, "true", 2), ("12345678901234567890", None, '{"a": [1.50]}', 3)],
        [], {},
    ),
    "no objects": (
        "t.json",
        '{"id": 1}\n5\n[1]\nnull\n{"id": 1, "id": 2}\n{"id": NaN}\n{"id": "\\ud800"}\n{"id":\n{"id": ""}\n',
        [("1", 1), ("", 9)],
        [("5", 2), ("[1]", 3), ('{"id": 1, "id": 2}', 5), ('{"id": NaN}', 6), ('{"id": "\\ud800"}', 7),
         ('{"id":', 8)], {},
    ),
    "lines": ("t.txt", ' a "b\n\nc\\N\n', [(' a "b', 1), ("c\\N", 2)], [], {}),
    "sheet": (
        "t.xlsx",
        excel([], ["id", "Name", "at"], [7.0, "ü", 46027.0], [], [1.5, True, 46027.4375], [0.1 + 0.2, None, " "],
              [123456789012.0, "1,5", 0.5]),
        [("7", "ü", "2026-01-05", 1), ("1,5", "true", "2026-01-05 10:30:00", 2), ("0,3", None, " ", 3),
         ("123456789012", "1,5", "12:00:00", 4)],
        [], {"source_decimal": ","},
    ),
    "sheet without records": ("t.xlsx", excel(["id", "name"]), [], [], {}),
    "sheet without cells": ("t.xlsx", excel(), [], [], {}),
}  # fmt: skip


@pytest.mark.parametrize("case", TEXTS)
def test_text_is_read_strictly(case: str, tmp_path: Path, small: Small) -> None:
    name, text, records, malformed, values = TEXTS[case]
    land(tmp_path, {name.replace("t.", "transactions."): text})
    [file], rows = read(tmp_path, small(**values))
    assert file.problem == ""
    assert rows == {"records": records, "malformed": malformed}
    assert (file.rows, file.malformed) == (len(records), len(malformed))


@given(
    rows=st.lists(
        st.lists(
            st.none() | st.text(st.sampled_from("ab,; \"'\r\n\0é\u2028\ufeff"), max_size=5), min_size=1, max_size=4
        ),
        max_size=12,
    ),
    newline=st.sampled_from(["\n", "\r\n", "\r"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    is_closed=st.booleans(),
    block=st.integers(100, 300),
)
@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_regular_text_is_read_as_the_library_of_python_does(
    rows: list[list[str | None]],
    newline: str,
    quoting: Any,
    is_closed: bool,
    block: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the values are, and wherever blocks of the file end."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=newline, quoting=quoting).writerows([["x", "y"], *rows])
    content = text.getvalue() if is_closed else text.getvalue().removesuffix(newline)
    found = [row for row in csv.reader(io.StringIO(content, newline="")) if row][1:]
    numbered = list(enumerate(found, start=1))
    monkeypatch.setattr(data_pipeline, "BLOCK", block)
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    [file], staged = read(Path(land(folder, {"transactions.csv": content.encode()})), DataPipelineConfig())
    assert file.problem == ""
    assert [tuple(value or "" for value in row[:2]) + row[2:] for row in staged["records"]] == [
        (*row, number) for number, row in numbered if len(row) == 2
    ]
    malformed = [(next(csv.reader(io.StringIO(line, newline=""))), number) for line, number in staged["malformed"]]
    assert malformed == [(row, number) for number, row in numbered if len(row) != 2]
    assert file.sha256 == hashlib.sha256(content.encode()).hexdigest()


BAD: dict[str, tuple[str, bytes, str]] = {
    "cut gzip": ("t.csv.gz", gzip.compress(b"id,name\n" + b"1,a\n" * 1000)[:-20], "ended before the end-of-stream"),
    "no gzip": ("t.csv.gz", b"id,name\n1,a\n", "Not a gzipped file"),
    "wrong encoding": ("t.csv", LATIN, "'utf-8' can't decode byte 0xeb after 'id,name\\n1,Zo' ("),
    "unclosed quote": ("t.csv", b'id,name\n1,"a\n' + b"2,b\n" * 100, "record 1 continues to the end of the file: is a"),
    "unclosed quote in the first column": ("t.csv", b'id,name\n1,a\n"2,b\n3,c\n', "record 2 continues to the end"),
    "unclosed quote in the header": ("t.csv", b'id,"name\n1,a\n', "its header cannot be read: unexpected end of data"),
    "unclosed quote in a large file": (
        "t.csv",
        b'id,name\n1,a\n2,"b\n' + b"3,cccccccccc\n" * 2**21,
        "record 2 has more than 4 MB: is a quote not",
    ),
    "wrong encoding of a malformed record": (
        "t.csv",
        b"id,name\n1,a\n2,\xff,3\n",
        "'utf-8' can't decode byte 0xff after 'id,name\\n1,a\\n2,'",
    ),
    "half of UTF-16": ("t.csv", "id,name\n1,a\n".encode("utf-16")[:-1], "'utf-16-le' can't decode"),
    "repeated column": ("t.csv", b"id,Name,name \n1,a,b\n", "two columns are called"),
    "column of ours": ("t.csv", b"id,_source_row\n1,2\n", "a column is called _source_row"),
    "JSON array": ("t.json", b'[{"id": 1},\n{"id": 2}]\n', "it is a JSON array: write one object per line"),
    "no Excel": ("t.xlsx", b"id,name\n1,a\n", "it cannot be read as an Excel file"),
    "sheet of repeated columns": ("t.xlsx", excel(["id", "ID"]), "two columns are called"),
    "Parquet without footer": ("t.parquet", b"PAR1" + b"x" * 100, "too small|footer|magic bytes|No magic"),
}


@pytest.mark.parametrize("case", BAD)
def test_file_that_cannot_be_read_is_named_with_the_reason(case: str, tmp_path: Path, small: Small) -> None:
    name, content, problem = BAD[case]
    land(tmp_path, {name.replace("t.", "transactions/a."): content, "transactions/b.csv": "id\n1\n"})
    [bad, good], rows = read(tmp_path, small())
    assert bad.is_bad and any(part in bad.problem for part in problem.split("|")), bad.problem
    assert (good.problem, rows["records"]) == ("", [("1", 1)])


def test_byte_that_an_encoding_of_single_bytes_lacks_is_named_with_the_text_before_it(
    tmp_path: Path, small: Small
) -> None:
    """Python calls all such encodings charmap."""
    land(tmp_path, {"transactions/a.csv": b"id,name\n1,a\n2,\x81\n3,c\n", "transactions/b.csv": "id\n1\n"})
    [bad, _], _ = read(tmp_path, small(source_encoding="cp1252"))
    assert bad.problem.startswith("'cp1252' can't decode byte 0x81 after 'id,name\\n1,a\\n2,' (")


def landed_members(folder: Path, archive: str) -> list[LandedFile]:
    state = (folder / archive).stat()
    return [
        LandedFile("transactions", f"{archive}/{name}", size, state.st_mtime_ns, delivery=number)
        for number, (name, size) in enumerate(zip_members(str(folder / archive)), start=1)
    ]


def test_members_of_a_zip_file_are_files(tmp_path: Path, small: Small) -> None:
    parquet = io.BytesIO()
    pq.write_table(pa.table({"id": ["5"], "name": ["e"]}), parquet)
    members = {
        "orders_1.csv": b"id;name\n1;a\n", "more/orders_2.tsv": b"id\tname\n2\tb\n",
        "3.csv.gz": gzip.compress(b"id,name\n3"), "4.xlsx": excel(["id", "name"], [4.0, "d"]),
        "5.parquet": parquet.getvalue(), "__MACOSX/._orders_1.csv": b"x", ".hidden.csv": b"", "more/": b"",
        "read me.pdf": b"",
    }  # fmt: skip
    content = zipped(members)
    land(tmp_path, {"Exports.ZIP": content, "cut.zip": content[:-30]})
    listed = [member.path for member in list_files(str(tmp_path)) if not member.problem]
    files, rows = read(
        tmp_path, small(), [file for file in landed_members(tmp_path, "Exports.ZIP") if file.path in listed]
    )
    assert [file.path.removeprefix("Exports.ZIP/") for file in files] == list(members)[:5]
    assert [(file.problem, file.size) for file in files] == [("", len(text)) for text in list(members.values())[:5]]
    assert rows == {"records": [("1", "a", 1), ("2", "b", 1), ("4", "d", 1), ("5", "e", 1)], "malformed": [("3", 1)]}
    assert [file.sha256 for file in files] == [hashlib.sha256(text).hexdigest() for text in list(members.values())[:5]]
    with pytest.raises(data_pipeline.BadFileError, match="it cannot be read as a zip file"):
        zip_members(str(tmp_path / "cut.zip"))


def test_damaged_member_of_a_zip_file_is_named(tmp_path: Path, small: Small) -> None:
    content = zipped({"a.csv": b"id\n" + os.urandom(1000).hex().encode(), "b.csv": b"id\n1\n"})
    land(tmp_path, {"exports.zip": content[:100] + b"????" + content[104:]})
    [bad, good], rows = read(tmp_path, small(), landed_members(tmp_path, "exports.zip"))
    assert bad.is_bad and re.search("Bad CRC-32|decompressing", bad.problem), bad.problem
    assert (good.problem, rows["records"][-1]) == ("", ("1", 1))


def test_files_of_different_columns_and_orders(tmp_path: Path, small: Small) -> None:
    land(tmp_path, {f"transactions/{n}.csv": text for n, text in enumerate(["a,b\n1,2\n", "b,a\n2,1\n", "a,b\n3,4\n"])})
    files, rows = read(tmp_path, small())
    assert rows["records"] == [("1", "2", 1), ("3", "4", 1), ("2", "1", 1)], "those of equal columns are read together"
    assert [file.columns for file in files] == [["a", "b"], ["b", "a"], ["a", "b"]]


def test_only_finished_files_of_known_formats_are_listed_in_natural_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = ["Orders Export (2).CSV.gz", "all.zip/a.csv", "all.zip/b/c.txt", "customers.csv.gz", "orders/1.csv",
              "transactions/a.xlsx", "transactions/a=7/2.json", "transactions/a=7/10.JSONL",
              "transactions/x [1].csv"]  # fmt: skip
    others = ["customers.csv.tmp", "transactions/.a.csv", "transactions/_a.csv", "transactions/a.csv.part",
              "transactions/a.csv._COPYING_", "transactions/_old/a.csv", "transactions.sql", "controls.csv", ".a/b.csv",
              "data/1.csv", "notes.md"]  # fmt: skip
    land(tmp_path, dict.fromkeys([*(name for name in wanted if ".zip" not in name), *others], ""))
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for name in ("a.csv", "b/c.txt", "b/.d.csv", "__MACOSX/e.csv", "f.png"):
            archive.writestr(name, "x" * 9)
    os.mkfifo(tmp_path / "transactions/pipe.csv")
    (tmp_path / "orders2.csv").symlink_to("nowhere")
    files = list_files(str(tmp_path), str(tmp_path / "data"))
    assert [file.path for file in files if not file.problem] == wanted
    assert [file.delivery for file in files] == list(range(1, len(wanted) + 2))
    assert {file.path: file.problem for file in files if file.problem} == {"orders2.csv": "No such file or directory"}
    sources = ["orders_export__2_", "all", "all", "customers", "orders", *4 * ["transactions"]]
    assert [file.source for file in files if not file.problem] == sources
    assert {file.path: file.size for file in files}["all.zip/a.csv"] == 9
    assert (
        "skipped (unknown file ending or not a regular file): notes.md, all.zip/f.png, transactions/pipe.csv"
        in caplog.text
    )


def test_large_and_odd_values_survive(tmp_path: Path, small: Small) -> None:
    """Values longer than DuckDB's and Python's own limits, and numbers of records beyond one vector."""
    long = "x" * 3_000_000
    lines = [f'{number},"{number}\n"' for number in range(1, 10_000)]
    land(tmp_path, {"transactions/[a]*?.csv": f"id,name\n0,{long}\n" + "\n".join(lines), "transactions/b.txt": long})
    files, rows = read(tmp_path, small())
    assert [file.problem for file in files] == ["", ""]
    assert rows["records"] == [("0", long, 1), *((str(n), f"{n}\n", n + 1) for n in range(1, 10_000)), (long, 1)]


# Of each type: texts with their value, and texts that do not fit it.
TYPES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "age": (
        {"5": 5, " +5 ": 5, "-5": -5, "5.0": 5, "5.": 5, "007": 7, "": None, "  ": None},
        ["5.5", "5d", "1e3", "2147483648", "five", "0x5", "5,0", "١"],
    ),
    "customer_id": ({"9223372036854775807": 2**63 - 1}, ["9223372036854775808", "A17"]),
    "amount": (
        {"12.34": Decimal("12.34"), "12.3": Decimal("12.30"), "12.3400": Decimal("12.34"), "-0.01": Decimal("-0.01"),
         "9999999999.99": Decimal("9999999999.99"), "12": Decimal(12)},
        ["12.345", "12,34", "$12", "1e3", "10000000000.00", "1 000", "NaN", ".5", "12.340000000001"],
    ),
    "weight_kg": ({"1.5": 1.5, ".5": 0.5, "1e3": 1000.0, "5": 5.0}, ["5d", "1e400", "NaN", "Infinity", "1,5"]),
    "signup_date": ({"2026-02-28": date(2026, 2, 28)}, ["2026-02-30", "2026", "2026-1-1", "28.2.2026", "2026-01-01 x"]),
    "timestamp": (
        {
            "2026-01-31 10:11:12": datetime(2026, 1, 31, 10, 11, 12), "2026-01-31": datetime(2026, 1, 31),
            "2026-01-31T10:11": datetime(2026, 1, 31, 10, 11),
            "2026-01-31T10:11:12.5Z": datetime(2026, 1, 31, 10, 11, 12, 500_000),
            "2026-01-31 10:11:12.123456": datetime(2026, 1, 31, 10, 11, 12, 123_456),
            "2026-01-31 10:11:12+02:00": datetime(2026, 1, 31, 8, 11, 12),
            "2026-01-31T10:11:12-0330": datetime(2026, 1, 31, 13, 41, 12),
            "2026-01-31 10:11:12 +02": datetime(2026, 1, 31, 8, 11, 12),
            "2026-01-31 10:11:12 -0500": datetime(2026, 1, 31, 15, 11, 12),
            "2026-01-31 10:11:12 UTC": datetime(2026, 1, 31, 10, 11, 12),
            "2026-01-31 10:11:12 Z": datetime(2026, 1, 31, 10, 11, 12),
        },
        ["12:30", "2026", "2026-02-30 10:00:00", "2026-01-31 25:00:00", "2026-01-31 10:11:12.1234567",
         "1769854272", "2026-01-31 x", "2026-01-31 UTC", "2026-01-31 10:11:12 utc"],
    ),
    "is_active": ({"true": True, "FALSE": False, "1": True, "0": False}, ["yes", "t", "2", "wahr"]),
}  # fmt: skip
OWNER = {name: table for table in names("bronze") for name, _ in TABLES[table].columns()} | {"customer_id": "customers"}


@pytest.mark.parametrize("column", TYPES)
def test_types_lose_nothing(column: str, spark: SparkSession, config: DataPipelineConfig) -> None:
    """A text becomes exactly its value, or is null and kept as text."""
    good, bad = TYPES[column]
    table = TABLES[OWNER[column]]
    texts = [*good, *bad]
    rows = spark.createDataFrame(
        [(number, text) for number, text in enumerate(texts)], f"_source_row BIGINT, {column} STRING"
    )
    found = {row["_source_row"]: row for row in apply_contract(rows, table, config).collect()}
    values = {text: found[number][column] for number, text in enumerate(texts)}
    assert values == {**good, **dict.fromkeys(bad)}
    rescued = {text: found[number]["_rescued_data"] for number, text in enumerate(texts)}
    assert rescued == {
        **dict.fromkeys(good),
        **{text: json.dumps({column: text}, separators=(",", ":"), ensure_ascii=False) for text in bad},
    }


def test_local_conventions(spark: SparkSession, small: Small) -> None:
    """Decimal commas, and timestamps in a time zone with a summer time."""
    config = small(source_decimal=",", source_time_zone="Europe/Berlin")
    texts = [("12,34", "2026-07-01 10:00:00"), ("12.34", "2026-01-01 10:00:00 UTC"), ("1.234,5", "2026-01-01 10:00")]
    rows = apply_contract(
        spark.createDataFrame(texts, "amount STRING, timestamp STRING"), TABLES["transactions"], config
    )
    assert [(row["amount"], row["timestamp"]) for row in rows.collect()] == [
        (Decimal("12.34"), datetime(2026, 7, 1, 8)),
        (None, datetime(2026, 1, 1, 10)),
        (None, datetime(2026, 1, 1, 9)),
    ]


PARQUET: dict[str, tuple[str, pa.Array, list[Any], dict[str, Any]]] = {
    "double": ("amount", pa.array([12.34, 12.345, 0.1 + 0.2, 1e15, 12345678.9, None]),
               [Decimal("12.34"), None, None, None, Decimal("12345678.90"), None], {}),
    "wide decimal": ("amount", pa.array([Decimal("12.3400"), Decimal("12.3450")], pa.decimal128(38, 4)),
                     [Decimal("12.34"), None], {}),
    "whole amount": ("amount", pa.array([12]), [Decimal("12.00")], {}),
    "double for a number": ("quantity", pa.array([2.0, 2.5]), [2, None], {}),
    "large number": ("quantity", pa.array([2, 2**40]), [2, None], {}),
    "number for a text": ("product_id", pa.array([17]), ["17"], {}),
    "number for a timestamp": ("timestamp", pa.array([1769854272]), [None], {}),
    "instant": ("timestamp", pa.array([datetime(2026, 1, 31, 10)], pa.timestamp("us", "UTC")),
                [datetime(2026, 1, 31, 10)],
                {"source_time_zone": "Europe/Berlin"}),
    "wall time": ("timestamp", pa.array([datetime(2026, 1, 31, 10)], pa.timestamp("us")), [datetime(2026, 1, 31, 9)],
                  {"source_time_zone": "Europe/Berlin"}),
    "unsigned": ("quantity", pa.array([2, 2**32 - 1], pa.uint32()), [2, None], {}),
    "large unsigned": ("customer_id", pa.array([2, 2**64 - 1], pa.uint64()), [2, None], {}),
    "bytes of text": ("product_id", pa.array(["Ä".encode()]), ["Ä"], {}),
    "dictionary": ("product_id", pa.array(["A", "B", "A"]).dictionary_encode(), ["A", "B", "A"], {}),
    "nanoseconds": ("timestamp", pa.array([datetime(2026, 1, 31, 10)], pa.timestamp("ns", "Asia/Tokyo")),
                    [datetime(2026, 1, 31, 10)], {}),
    "day": ("timestamp", pa.array([date(2026, 1, 31)]), [datetime(2026, 1, 30, 23)],
            {"source_time_zone": "Europe/Berlin"}),
    "text": ("timestamp", pa.array(["2026-01-31 10:00", "31.1.2026"]), [datetime(2026, 1, 31, 10), None], {}),
}  # fmt: skip


@pytest.mark.parametrize("case", PARQUET)
def test_typed_values_are_kept_exactly_or_as_text(case: str, spark: SparkSession, small: Small, tmp_path: Path) -> None:
    column, values, expected, options = PARQUET[case]
    source = land(tmp_path / "source", {"customers.csv": CUSTOMERS, "products.csv": PRODUCTS})
    filled = [value for value in values.to_pylist() if value is not None]
    others = {name: pa.array([None] * len(values), pa.string()) for name in ORDERS_HEADER.split(",") if name != column}
    pq.write_table(pa.table({column: values, **others}), tmp_path / "source/transactions.parquet")
    rows = delivered(spark, small(source_dir=source, settle_seconds=0, **options))
    assert [row[column] for row in rows] == expected
    malformed = sum(row["_rescued_data"] is not None for row in rows)
    assert malformed == len(filled) - sum(value is not None for value in expected)
    assert {row["_source_file"] for row in rows} == {"transactions.parquet"}


def orders_in_parquet(**columns: pa.Array) -> bytes:
    """Orders as a Parquet file, with these columns in place of their own or besides."""
    order = dict(zip(ORDERS_HEADER.split(","), ORDERS.splitlines()[1].split(","), strict=True))
    rows = len(next(iter(columns.values())))
    file = io.BytesIO()
    pq.write_table(pa.table({**{name: [value] * rows for name, value in order.items()}, **columns}), file)
    return file.getvalue()


def test_parquet_whose_values_are_damaged_is_named(shop: Callable[..., RunRecord]) -> None:
    """Its footer is good, so that it fails when its values are read."""
    damaged = bytearray(orders_in_parquet(transaction_id=pa.array([f"T{n}-{n * 7919}" for n in range(5000)])))
    damaged[100:400] = bytes(255 - byte for byte in damaged[100:400])
    good = orders_in_parquet(transaction_id=pa.array(["T2"]))
    with pytest.raises(NotPublishedError, match=r"^transactions/2\.parquet cannot be read, nothing is published: ."):
        shop({"transactions/1.csv": None, "transactions/0.parquet": good, "transactions/2.parquet": bytes(damaged)})


def test_failure_that_is_not_due_to_the_input_stays_as_it_is(
    shop: Callable[..., RunRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "write", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        shop({"transactions.sql": "SELECT * FROM transactions"})


@THOROUGH
def test_what_is_rejected_says_why_and_where_and_the_last_delivery_of_a_key_wins(
    shop: Callable[..., RunRecord],
) -> None:
    """Of the versions of a key, A, B, A ends as A; repeated rows are counted apart from superseded versions."""
    orders = f"{ORDERS_HEADER},colour\nT1,1,A,1,9.99,2026-03-01 10:00:00,paypal,completed,red\nT2,1\n"
    orders += "T3,1,A,2,19.981,2026-03-01 10:00:00,paypal,completed,\nT4,1,A,1,,2026-03-01 10:00:00,paypal,completed,\n"
    files = {"transactions/1.csv": orders, "transactions/2.jsonl": "{}\nno json\n"}
    order = "V1,1,A,{},9.99,2026-03-01 10:00:00,paypal,completed\n"
    quantities = {"1": [3], "2": [5, 5], "10": [3], "9": [7]}
    for name, versions in quantities.items():
        files[f"transactions/versions/{name}.csv"] = f"{ORDERS_HEADER}\n" + "".join(map(order.format, versions))
    record = shop(files, on_bad_file="quarantine")
    with open_tables(record.data_dir) as db:
        rows = db.sql(
            "SELECT _source_row, _reasons, _rescued_data, _source_file FROM quarantine_transactions"
        ).fetchall()
        kept = db.sql(
            "SELECT _rescued_data, _source_row, _delivery FROM bronze_transactions WHERE _rescued_data LIKE '%red%'"
        )
        assert kept.fetchall() == [('{"colour":"red"}', 1, 3)]
        accepted = db.sql("SELECT transaction_id, quantity FROM transactions_clean ORDER BY 1").fetchall()
        assert accepted == [("T1", 1), ("V1", 3)]
    assert sorted(rows) == [
        (2, ["record_malformed"], '{"_record":"T2,1"}', "transactions/1.csv"),
        (3, ["amount_malformed"], '{"amount":"19.981"}', "transactions/1.csv"),
        (4, ["amount_missing"], None, "transactions/1.csv"),
    ]
    assert "it lacks the columns transaction_id" in record.delivery["transactions"]["left_out"]["transactions/2.jsonl"]
    quality = record.quality["transactions"]
    assert quality.violations["record_malformed"] == 1
    assert (quality.received, quality.quarantined, quality.accepted) == (4 + 4, 3, 1 + 1)
    assert (quality.duplicates, quality.superseded) == (3, 2), "two files have the same content"


def exported(report: RunRecord, folder: Path) -> str:
    """Lands the bronze tables of a generated run as others would: in several formats, files and orders of columns."""
    with open_tables(report.data_dir) as db:
        for name in names("bronze"):
            columns = ", ".join(column for column, _ in TABLES[name].columns())
            db.execute(f"CREATE TABLE {name} AS SELECT {columns}, row_number() OVER () % 4 AS turn FROM bronze_{name}")
        (folder / "transactions/2026/03").mkdir(parents=True)
        (folder / "customers").mkdir()
        parts = {
            "transactions/a.csv": "SELECT * EXCLUDE turn FROM transactions WHERE turn = 0",
            "transactions/2026/03/b.csv": "SELECT status, * EXCLUDE (turn, status) FROM transactions WHERE turn = 1",
            "transactions/2026/c.parquet": "SELECT * EXCLUDE turn FROM transactions WHERE turn = 2",
            "transactions/d.ndjson": "SELECT * EXCLUDE turn FROM transactions WHERE turn = 3",
            "customers/a.jsonl": "SELECT * EXCLUDE turn FROM customers WHERE turn < 2",
            "customers/b.csv": "SELECT * EXCLUDE turn FROM customers WHERE turn >= 2",
            "products.parquet": "SELECT * EXCLUDE turn FROM products",
        }
        for path, query in parts.items():
            kind = {"csv": "csv, header", "parquet": "parquet"}.get(path.rpartition(".")[2], "json")
            db.execute(f"COPY ({query}) TO '{folder / path}' (FORMAT {kind})")
    plain = folder / "customers/b.csv"
    with gzip.open(f"{plain}.gz", "wb") as packed:
        packed.write(plain.read_bytes())
    plain.unlink()
    return str(folder)


@THOROUGH
def test_landed_records_give_the_same_tables_as_generated_ones(
    first_run: tuple[DataPipelineConfig, RunRecord], small: Small, spark: SparkSession, tmp_path: Path
) -> None:
    generated_config, report = first_run
    as_generated = {"orphans": "reject", "payment_methods": tuple(PAYMENT_METHODS)}
    config = small(source_dir=exported(report, tmp_path), settle_seconds=0, **as_generated)
    landed = run_pipeline(config, spark)
    assert landed.quality == report.quality
    assert landed.revenue == report.revenue
    with open_tables(report.data_dir) as generated, open_tables(landed.data_dir) as found:
        received = [f"{layer}_{name}" for layer in ("bronze", "quarantine") for name in names("bronze")]
        for name in [*received, *names("silver"), *names("gold")]:
            values = "CAST(COLUMNS(lambda c: c = '_reasons' OR NOT starts_with(c, '_')) AS VARCHAR)"
            query = f"SELECT {values} FROM {name} ORDER BY ALL"
            assert found.sql(query).fetchall() == generated.sql(query).fetchall(), name
    ledger = json.loads(Path(landed.data_dir, "current/_files.json").read_text())
    assert {file["path"]: file["rows"] for file in ledger}["products.parquet"] == generated_config.num_products
    assert sum(file["rows"] for file in ledger) == sum(quality.received for quality in report.quality.values())


def test_gold_is_what_the_files_say(shop: Callable[..., RunRecord]) -> None:
    """Revenue by payment method and by customer, added up from the files by Python alone."""
    generated = [
        [f"T{n}", 1 + n % 2, "AB"[n % 2], 1 + n % 3, f"{n % 97}.{n % 100:02}", f"2026-02-{1 + n % 28:02} 10:00:00",
         ("paypal", "Credit Card")[n % 2], ("completed", "pending", "refunded")[n % 3]]
        for n in range(400)
    ]  # fmt: skip
    lines = [",".join(map(str, order)) for order in generated]
    objects = [json.dumps(dict(zip(ORDERS_HEADER.split(","), order, strict=True))) for order in generated[300:]]
    files = {"transactions/1.csv": "\n".join([ORDERS_HEADER, *lines[:300]]), "transactions/2.jsonl": "\n".join(objects)}
    record = shop(files)
    orders = [*csv.DictReader(files["transactions/1.csv"].splitlines()), *map(json.loads, objects)]
    by_method: dict[str, Decimal] = defaultdict(Decimal)
    by_customer: dict[int, Decimal] = defaultdict(Decimal)
    for order in orders:
        if order["status"] == "completed" and Decimal(order["amount"]) > 0:
            by_method[order["payment_method"].lower().replace(" ", "_")] += Decimal(order["amount"])
            by_customer[int(order["customer_id"])] += Decimal(order["amount"])
    with open_tables(record.data_dir) as db:
        assert dict(db.sql("SELECT payment_method, total_amount FROM payment_analytics").fetchall()) == by_method
        assert dict(db.sql("SELECT customer_id, total_spent FROM customers_enriched").fetchall()) == by_customer


@THOROUGH
def test_bad_file_refuses_the_run_and_what_is_published_stays(
    published: DataPipelineConfig, spark: SparkSession, tmp_path: Path
) -> None:
    files = {"customers.csv": CUSTOMERS, "products.csv": PRODUCTS, "transactions/1.csv": ORDERS}
    source = land(tmp_path / "source", {**files, "transactions/2.csv.gz": gzip.compress(ORDERS.encode())[:-9]})
    config = dataclasses.replace(published, source_dir=source, settle_seconds=0, reload=True)
    first = Store(config.root).published()
    with pytest.raises(
        NotPublishedError, match=r"transactions/2\.csv\.gz cannot be read, nothing is published: .*end-of-stream"
    ):
        run_pipeline(config, spark)
    assert Store(config.root).published() == first is not None
    config.on_bad_file = "quarantine"
    record = run_pipeline(config, spark)
    assert (record.result, record.rows["silver.transactions_clean"]) == ("succeeded", 1)
    assert record.delivery["transactions"]["left_out"].keys() == {"transactions/2.csv.gz"}
    assert any("transactions/2.csv.gz is left out" in line for line in record.anomalies), "the alert says it"
    ledger = json.loads(Path(config.root, "current/_files.json").read_text())
    assert "transactions/2.csv.gz" not in {file["path"] for file in ledger}, "repaired, it is new"


def test_file_that_changes_meanwhile_is_left_for_the_next_run(
    landed: Callable[..., DataPipelineConfig], spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = landed({"transactions/2.csv": ORDERS.replace("T1", "T2")})
    read_file = FileReader._scan

    def grow(self: FileReader, file: LandedFile, *arguments: Any, **options: Any) -> None:
        read_file(self, file, *arguments, **options)
        if file.path == "transactions/2.csv":
            with open(tmp_path / "source" / file.path, "a") as growing:
                growing.write("T3,1,A,1,9.99,2026-03-01 10:00:00,paypal,completed\n")

    monkeypatch.setattr(FileReader, "_scan", grow)
    rows, record = delivery(spark, config, "transactions")
    assert [row["transaction_id"] for row in rows] == ["T1"]
    assert "changed while it was read" in record.delivery["transactions"]["left_out"]["transactions/2.csv"]
    monkeypatch.undo()
    assert sorted(row["transaction_id"] for row in delivered(spark, config)) == ["T1", "T2", "T3"]


def test_run_waits_until_the_youngest_file_has_settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    land(tmp_path, {"customers.csv": CUSTOMERS, "products.csv": PRODUCTS})
    os.utime(tmp_path / "products.csv", (0, 0))
    wait_until_settled(list_files(str(tmp_path)), 5)
    os.utime(tmp_path / "customers.csv", (0, 0))
    wait_until_settled(list_files(str(tmp_path)), 5)
    assert len(waited) == 1 and 3 < waited[0] <= 5


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    with caplog.at_level(logging.WARNING):
        yield lambda: [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_empty_and_repeated_files_are_named_in_a_warning(
    landed: Callable[..., DataPipelineConfig], spark: SparkSession, warnings: Callable[[], list[str]]
) -> None:
    files = {"transactions/2.csv": ORDERS, "transactions/3.csv": "", "transactions/4.csv": ORDERS_HEADER + "\n"}
    assert [row["_source_file"] for row in delivered(spark, landed(files))] == ["transactions/2.csv"]
    assert warnings()[-3:] == [
        "transactions/1.csv is left out: it has the same content as transactions/2.csv",
        "transactions/3.csv contains no records",
        "transactions/4.csv contains no records",
    ]


MODEL = """
    SELECT `Order No` AS transaction_id, xxhash64(who) AS customer_id, 'A' AS product_id, 1 AS quantity,
        total AS amount, to_timestamp(day, 'dd.MM.yyyy') AS timestamp, 'paypal' AS payment_method,
        lower(state) AS status, _source_file, _source_row, _delivery
    FROM transactions"""
SHEET = "Order No;who;total;day;state\n7;ann;9.99;01.03.2026;Completed\n8;bo;5.001;02.03.2026;COMPLETED\nnothing\n"


@THOROUGH
def test_staging_models_rename_fill_and_derive(shop: Callable[..., RunRecord]) -> None:
    customers = "SELECT DISTINCT xxhash64(who) AS customer_id, who AS first_name, '?' AS last_name FROM transactions"
    files = {"customers.csv": None, "customers.sql": customers + " WHERE who IS NOT NULL;", "transactions.sql": MODEL,
             "transactions/1.csv": SHEET, "products.csv": PRODUCTS.replace(",", ";")}  # fmt: skip
    record = shop(files, source_delimiter=";")
    with open_tables(record.data_dir) as db:
        orders = db.sql("SELECT transaction_id, amount, CAST(timestamp AS VARCHAR) FROM transactions_clean").fetchall()
        assert orders == [("7", Decimal("9.99"), "2026-03-01 00:00:00+00")]
        rejected = db.sql(
            "SELECT _reasons, _source_row, _source_file FROM quarantine_transactions ORDER BY 2"
        ).fetchall()
        assert rejected == [
            (["amount_malformed"], 2, "transactions/1.csv"),
            (["record_malformed"], 3, "transactions/1.csv"),
        ]
        assert db.sql("SELECT first_name, total_spent FROM customers_enriched ORDER BY 1").fetchall() == [
            ("ann", Decimal("9.99")), ("bo", Decimal("0.00")),
        ]  # fmt: skip


def orders_by_model(
    spark: SparkSession, small: Small, folder: Path, model: str, orders: str = ORDERS, **values: Any
) -> list[Row]:
    """The transactions that a model makes of a CSV file of orders."""
    files = {"customers.csv": CUSTOMERS, "products.csv": PRODUCTS}
    files |= {"transactions.sql": model, "transactions.csv": orders}
    return delivered(spark, small(source_dir=land(folder, files), settle_seconds=0, **values), "transactions")


def test_models_mean_the_same_in_all_versions_of_spark(spark: SparkSession, small: Small, tmp_path: Path) -> None:
    """Spark 4 has ANSI mode on, in which a cast, a time or a division that fails would end the run."""
    before = spark.conf.get("spark.sql.ansi.enabled", None)
    model = """
        SELECT transaction_id, product_id, payment_method, status, to_timestamp(status, 'dd.MM.yyyy') AS timestamp,
            CAST(status AS INT) AS quantity, 1 / (CAST(customer_id AS INT) - 1) AS amount,
            to_date(status) AS customer_id
        FROM transactions"""
    [row] = orders_by_model(spark, small, tmp_path, model)
    assert (row["timestamp"], row["quantity"], row["amount"], row["customer_id"]) == (None, None, None, None)
    assert spark.conf.get("spark.sql.ansi.enabled", None) == before


# What is found when bronze is written, in a run; and what a model can be said to lack before.
LOSSES: dict[str, tuple[str, str]] = {
    "WHERE": ("SELECT * FROM transactions WHERE status = 'x'", "0 rows from 1 records"),
    "stack": ("SELECT t.*, stack(2, 1, 2) AS n FROM transactions t", "2 rows from 1 records"),
    "fails": ("SELECT *, raise_error('no such') AS x FROM transactions", "transactions.sql fails .*no such.*; c"),
}
MODELS: dict[str, tuple[str, str]] = {
    "unknown column": ("SELECT nothing AS status FROM transactions", "transactions.sql cannot be used: .*nothing"),
    "no SQL": ("SELEC * FROM transactions", "transactions.sql cannot be parsed: "),
    "lacks a column": ("SELECT transaction_id, amount FROM transactions", "returns no status, quantity, timestamp"),
    "other table": ("SELECT * FROM products", "returns no transaction_id"),
    "other source": ("SELECT * FROM orders", "has no files for the table transactions: .* reads orders; l"),
}  # fmt: skip


@THOROUGH
@pytest.mark.parametrize("case", LOSSES)
def test_model_that_fails_or_loses_or_repeats_rows(case: str, shop: Callable[..., RunRecord]) -> None:
    model, message = LOSSES[case]
    with pytest.raises(PipelineError, match=message):
        shop({"transactions.sql": model})


@pytest.mark.parametrize("case", MODELS)
def test_model_that_cannot_be_used(case: str, landed: Callable[..., DataPipelineConfig], spark: SparkSession) -> None:
    model, message = MODELS[case]
    with pytest.raises(PipelineError, match=message):
        delivered(spark, landed({"transactions.sql": model}))


@pytest.mark.parametrize(
    ("model", "statement"),
    [
        ("SELECT 1;", "SELECT 1"),
        ("SELECT 1 ; -- a; b\n /* c; */ ;\n", "SELECT 1"),
        ("SELECT ';--'", "SELECT ';--'"),
        (r"SELECT '\';--' -- x", r"SELECT '\';--'"),
        ("SELECT `a;--`;", "SELECT `a;--`"),
        ("SELECT 1 -- a\n, 2;--", "SELECT 1 -- a\n, 2"),
    ],
)
def test_semicolons_and_comments_at_the_end_of_a_model(model: str, statement: str) -> None:
    assert parse_model("transactions", model).sql == statement


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ("SELECT (1", r"Expecting \)\. Line 1"),
        ("SELECT 'a", "cannot be parsed: "),
        ("SELECT 1; SELECT 2", "is not one SELECT"),
        ("SELEC x", "is not one SELECT"),
        ("DROP TABLE a", "is not one SELECT"),
        ("-- nothing", "is not one SELECT"),
    ],
)
def test_model_that_is_no_select(model: str, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^the model transactions\.sql .*{problem}"):
        parse_model("transactions", model)


@pytest.mark.parametrize(
    ("sql", "inputs"),
    [
        ("SELECT * FROM Orders", "orders"),
        ("SELECT * FROM a, `b c` AS x, (SELECT * FROM d) e JOIN f ON f.x IN (1, 2), g WHERE h", "a,b c,d,f,g"),
        ("SELECT * FROM ((a LEFT JOIN b USING (k, l)) CROSS JOIN c)", "a,b,c"),
        ("WITH t AS (SELECT * FROM t), u AS (SELECT * FROM t, v) SELECT * FROM u JOIN t", "t,v"),
        ("SELECT 'FROM a', \"JOIN b\" -- FROM c\n/* FROM d */ FROM e UNION ALL SELECT * FROM e", "e"),
        ("SELECT extract(YEAR FROM day), trim(BOTH 'x' FROM y) FROM a WHERE p IS DISTINCT FROM q", "a"),
        ("SELECT * FROM range(9), schema.name, LATERAL (SELECT 1), a LATERAL VIEW explode(x) y, VALUES (1), (b)", "a"),
        ("SELECT 1", ""),
    ],
)  # fmt: skip
def test_sources_that_a_model_reads(sql: str, inputs: str) -> None:
    assert ",".join(sorted(parse_model("transactions", sql).inputs)) == inputs


@pytest.mark.parametrize(
    ("sql", "keeps"),
    [
        ("SELECT 'DISTINCT', `group by` FROM a WHERE x IS NOT DISTINCT FROM y -- JOIN", True),
        ("SELECT DISTINCT x FROM a", False), ("SELECT x FROM a GROUP  BY x", False), ("SELECT 1", False),
        ("SELECT x FROM a JOIN b", False), ("SELECT x FROM a, a", False), ("SELECT explode(x) FROM a", False),
        ("SELECT x FROM a LATERAL VIEW stack(2, 1, 2) t", False), ("SELECT x FROM a UNION SELECT 1", False),
    ],
)  # fmt: skip
def test_model_that_reads_one_source_plainly_keeps_each_record(sql: str, keeps: bool) -> None:
    assert parse_model("transactions", sql).keeps_records is keeps


def test_head_of_a_model_names_files_and_columns(tmp_path: Path) -> None:
    """Lines within the SQL are comments alone; a file that no pattern claims is not of that source."""
    model = parse_model("transactions", """
        -- How to export: see the docs of the shop.
        -- source Orders: orders_export*, Bestellungen
        -- source orders: all/*

        --columns orders: Name, Lineitem price (net)
        SELECT * -- source sales: x
        FROM orders JOIN items""")  # fmt: skip
    assert model.patterns == {"orders": ("orders_export*", "Bestellungen", "all/*")}
    assert model.columns == {"orders": ("Name", "Lineitem price (net)")}
    paths = ["Orders_Export_1.csv", "bestellungen.csv.gz", "Bestellungen/1.csv", "orders.csv",
             "x.zip/orders_export.csv", "x.zip/items.csv", "items.zip/a.csv", "Items 2.csv"]  # fmt: skip
    files = [LandedFile(data_pipeline.source_name(path.partition("/")[0]), path, 0, 0) for path in paths]
    found = assign_sources(files, {"transactions": model}, ["orders", "items"])
    assert [file.source for file in found] == [
        "orders", "orders", "orders", "./orders.csv", "orders", "items", "items", "items_2",
    ]  # fmt: skip
    other = parse_model("products", "-- source sales: *export_1*\nSELECT * FROM sales")
    with pytest.raises(ConfigurationError, match=r"^Orders_Export_1\.csv is the source orders of tran.*sales of prod"):
        assign_sources(files, {"transactions": model, "products": other}, [])
    assert assign_sources(files, {"transactions": model, "customers": model}, [])


def test_model_joins_sources(
    landed: Callable[..., DataPipelineConfig], spark: SparkSession, caplog: pytest.LogCaptureFixture
) -> None:
    """Orders, their lines and payments in files of their own, as Olist's."""
    model = """
        -- columns payments: method
        -- columns refunds: order_id, value
        WITH paid AS (SELECT order_id, max(method) AS method FROM olist_payments GROUP BY order_id)
        SELECT concat(order_id, '/', i.line) AS transaction_id, o.customer AS customer_id, i.product AS product_id,
            1 AS quantity, CAST(i.price AS DECIMAL(12, 2)) - coalesce(CAST(r.value AS DECIMAL(12, 2)), 0) AS amount,
            o.bought AS timestamp, p.method AS payment_method, 'completed' AS status,
            i._delivery, i._source_file, i._source_row
        FROM olist_orders o JOIN `olist_items` i USING (order_id) LEFT JOIN paid p USING (order_id)
            LEFT JOIN refunds r USING (order_id)"""
    files = {
        "olist_orders.csv": "order_id,customer,bought\nA,1,2026-03-01\nB,2,2026-03-01\nC\n",
        "olist_items.csv": "order_id,line,product,price\nA,1,A,5\nA,2,B,4.5\nB,1,A,1\n",
        "olist_payments.csv": "order_id,method\nA,paypal\nA,paypal\n", "transactions.sql": model,
        "transactions/1.csv": ORDERS, "olist_sellers.csv": "x\n1\n",
    }  # fmt: skip
    config = landed(files)
    with caplog.at_level(logging.INFO), begun(spark, config) as (run, source):
        ingest_bronze(run, source)
        assert run.record.delivery["olist_orders"]["rows"] == 3
        delivery = source.delivery(run, "transactions")
        assert delivery is not None
        rows = delivery.collect()
    assert (
        "transactions: 4 rows from olist_payments 2 records, olist_orders 3 records, olist_items 3 records"
        in caplog.text
    )
    assert "no model and no table uses olist_sellers.csv, transactions" in caplog.text
    found = sorted((row["transaction_id"] or "", row["amount"], row["payment_method"]) for row in rows)
    assert found == [("", None, None), ("A/1", Decimal(5), "paypal"), ("A/2", Decimal("4.50"), "paypal"),
                     ("B/1", Decimal(1), None)]  # fmt: skip


def test_models_in_a_folder_of_their_own(
    landed: Callable[..., DataPipelineConfig], spark: SparkSession, tmp_path: Path
) -> None:
    model = MODEL
    for other, ours in (("who", "customer_id"), ("total", "amount"), ("day", "timestamp"), ("state", "status"),
                        ("`Order No`", "transaction_id")):  # fmt: skip
        model = model.replace(other, ours)
    models = land(tmp_path / "models", {"transactions.sql": model})
    with pytest.raises(PipelineError, match=r"transactions\.sql cannot be used"):
        delivered(spark, landed({"transactions.sql": "SELECT nothing FROM transactions"}))
    [row] = delivered(spark, landed({}, models=models))
    assert (row["transaction_id"], row["product_id"]) == ("T1", "A")


@THOROUGH
@pytest.mark.parametrize("content", [b"", b"\xff\n"])
def test_files_without_any_record_are_no_fault_of_the_model(content: bytes, shop: Callable[..., RunRecord]) -> None:
    """Their columns are unknown: the gate says that there are no rows."""
    with pytest.raises(NotPublishedError, match=r"transactions\.received \(no rows were received\)"):
        shop({"transactions.sql": MODEL, "transactions/1.csv": content}, on_bad_file="quarantine")


def test_source_that_cannot_be_one(small: Small, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="there is no folder"):
        open_source(small(source_dir=str(tmp_path / "none")))
    land(tmp_path, {"customers.csv": CUSTOMERS, "product.csv": PRODUCTS, "transactions.csv": ORDERS})
    with pytest.raises(ConfigurationError, match="has no files for the table products:"):
        open_source(small(source_dir=str(tmp_path)))
    land(tmp_path, {"Products.csv": PRODUCTS, "transactions.sql": MODEL})
    (tmp_path / "transactions.csv").unlink()
    with pytest.raises(ConfigurationError, match="has no files for the table transactions:"):
        open_source(small(source_dir=str(tmp_path)))


def test_old_timestamps_of_parquet(
    spark: SparkSession, landed: Callable[..., DataPipelineConfig], tmp_path: Path
) -> None:
    columns: dict[str, Any] = dict(zip(ORDERS_HEADER.split(","), ORDERS.splitlines()[1].split(","), strict=True))
    table = pa.table({name: [value] for name, value in columns.items() if name != "timestamp"})
    table = table.append_column("timestamp", pa.array([datetime(2026, 3, 1, 10)], pa.timestamp("us")))
    (tmp_path / "source/transactions").mkdir(parents=True)
    pq.write_table(table, tmp_path / "source/transactions/0.parquet", use_deprecated_int96_timestamps=True)
    [row] = delivered(spark, landed({"transactions/1.csv": None}))
    assert row["timestamp"] == datetime(2026, 3, 1, 10)


def test_text_and_parquet_of_one_table(
    spark: SparkSession, landed: Callable[..., DataPipelineConfig], tmp_path: Path
) -> None:
    """A column that is text in one file and typed in another is text first, and then typed by its text."""
    columns = {"transaction_id": ["T2"], "customer_id": [1.0], "product_id": ["A"], "quantity": [2],
               "amount": [12345678.5],
               "payment_method": ["paypal"], "status": ["completed"]}  # fmt: skip
    table = pa.table(columns).append_column("timestamp", pa.array([datetime(2026, 3, 1, 9)], pa.timestamp("us", "UTC")))
    (tmp_path / "source/transactions").mkdir(parents=True)
    pq.write_table(table, tmp_path / "source/transactions/0.parquet")
    rows = delivered(spark, landed({}, source_time_zone="Europe/Berlin"))
    assert sorted((row["transaction_id"], row["amount"], row["timestamp"], row["_rescued_data"]) for row in rows) == [
        ("T1", Decimal("9.99"), datetime(2026, 3, 1, 9), None),
        ("T2", Decimal("12345678.50"), datetime(2026, 3, 1, 9), None),
    ]


def frame_of(spark: SparkSession, schema: str, *rows: tuple[Any, ...]) -> DataFrame:
    return spark.createDataFrame(list(rows), schema)


def test_columns_are_matched_trimmed_and_in_any_case(spark: SparkSession, config: DataPipelineConfig) -> None:
    rows = frame_of(spark, "`Customer_ID ` STRING, `a``b` STRING", ("5", "x")).select(
        "*", F.lit(3).alias("_source_row")
    )
    [row] = apply_contract(rows, TABLES["customers"], config).collect()
    assert (row["customer_id"], row["_source_row"], row["_rescued_data"]) == (5, 3, '{"a`b":"x"}')


DOCS = Path(data_pipeline.__file__).parent / "docs"


@THOROUGH
def test_example_of_the_docs(small: Small, spark: SparkSession) -> None:
    config = small(source_dir=str(DOCS / "example"), as_of_date="2026-02-28", settle_seconds=0, max_quarantine_rate=0.5)
    record = run_pipeline(config, spark)
    with open_tables(record.data_dir) as db:
        orders = db.sql("SELECT transaction_id, amount, payment_method FROM transactions_clean ORDER BY 1").fetchall()
        assert orders == [("A-1", Decimal("39.90"), "paypal"), ("A-5", Decimal("39.90"), "credit_card")]
        rejected = db.sql("SELECT _reasons, _rescued_data, _source_file, _source_row FROM quarantine_transactions")
        assert rejected.fetchall() == [(["amount_malformed"], '{"amount":"24,50"}', "transactions/2026-02-27.jsonl", 3)]
        rescued = one(db, "SELECT _rescued_data FROM bronze_transactions WHERE transaction_id = 'A-4'")
        assert rescued == '{"voucher":"SPRING"}'
    assert record.quality["transactions"].superseded == 1
    page = html_report([record], record)
    assert "Quarantined rows of transactions by file" in page and "transactions/2026-02-27.jsonl" in page
    files = f'data_pipeline_delivery_files{{data_dir="{record.data_dir}",source="transactions"}} 2.0'
    assert files in metrics([record], record)


@pytest.mark.slow
def test_public_data_set(small: Small, spark: SparkSession, tmp_path: Path) -> None:
    """The purchases of CDNOW by the models of the docs, against the same figures by pandas."""
    import pandas as pd

    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(tmp_path), "lifetimes==0.11.3"]
    subprocess.run(download, check=True)
    [wheel] = tmp_path.glob("*.whl")
    text = zipfile.Path(wheel, "lifetimes/datasets/CDNOW_master.txt").read_bytes()
    source = land(tmp_path / "cdnow", {"transactions/CDNOW_master.txt": text})
    record = run_pipeline(small(source_dir=source, models=str(DOCS / "cdnow"), settle_seconds=0), spark)
    columns = ["customer", "day", "discs", "dollars"]
    bought = pd.read_csv(io.BytesIO(text), sep=r"\s+", header=0, names=columns, dtype={"dollars": str})
    bought["dollars"] = bought["dollars"].map(Decimal)
    paid = bought[bought["dollars"] > 0]
    assert record.quality["transactions"].received == len(bought) + 1
    assert record.quality["transactions"].quarantined == 1 + len(bought) - len(paid)
    assert record.quality["customers"].accepted == bought["customer"].nunique()
    assert record.revenue == paid["dollars"].sum()
    with open_tables(record.data_dir) as db:
        spent = dict(
            db.sql("SELECT customer_id, total_spent FROM customers_enriched WHERE total_orders > 0").fetchall()
        )
        assert spent == paid.groupby("customer")["dollars"].sum().to_dict()
        assert one(db, "SELECT sum(units_sold) FROM category_analytics") == paid["discs"].sum()


@THOROUGH
def test_inspection_shows_what_would_become_of_a_source(tmp_path: Path, small: Small, spark: SparkSession) -> None:
    """Its proposed model, written into the folder with one correction, is all that a first run needs."""
    sheet = "Order No;Buyer;Lineitem sku;Lineitem quantity;total;day;Financial Status;note\n"
    sheet += "7;1;A;1;9.99;01.03.2026;Completed;x\n8;2;A;1;5.001;02.03.2026;COMPLETED;y\nnothing\n"
    land(tmp_path, {"orders.csv": sheet, "notes.md": "no table"})
    config = small(source_dir=str(tmp_path), source_delimiter=";", settle_seconds=0, max_quarantine_rate=1)
    shown = "\n".join(inspect_source(config))
    assert "orders: 1 of 1 files read\n  orders.csv: 3 records, of which 1 are malformed lines" in shown
    models = dict(re.findall(r"a model to start from, (\w+\.sql):\n\n([\s\S]+?\n    FROM \w+)", shown))
    assert models["customers.sql"].endswith(
        "SELECT DISTINCT\n        Buyer AS customer_id  -- for example '2'\n    FROM orders"
    )
    model = models["transactions.sql"]
    assert "`Lineitem sku` AS product_id" in model and "lower(trim(`Financial Status`)) AS status" in model
    assert "to_timestamp_ntz(day, 'd.M.yyyy') AS timestamp" in model, "in the configured time zone"
    assert "NULL" not in model
    land(tmp_path, {"transactions.sql": model.replace("SELECT", "SELECT 'paypal' AS payment_method,")})
    land(tmp_path, {f"{name}.csv": text.replace(",", ";") for name, text in
                    {"customers": CUSTOMERS, "products": PRODUCTS}.items()})  # fmt: skip
    again = "\n".join(inspect_source(config))
    assert re.search(r"amount +decimal\(12,2\) +← amount \(string\), by transactions.sql", again)
    assert re.search(r"customer_id +bigint +← customer_id \(string\), by its name", again)
    rejected = "amount_malformed: 1 of 2 records are rejected (for example amount '5.001', orders.csv row 2): "
    assert f"{rejected}convert it in transactions.sql" in again
    assert "a model to start from, transactions" not in again
    assert run_pipeline(config, spark).revenue == Decimal("9.99")


def test_proposed_model_has_null_for_required_columns_that_nothing_looks_like(spark: SparkSession) -> None:
    records = {"sheet": spark.createDataFrame([("1", "x")], "`Lineitem quantity` STRING, colour STRING")}
    lines = list(proposed_model("transactions", records))
    assert "        NULL AS transaction_id,  -- what is it called here?" in lines
    assert "        `Lineitem quantity` AS quantity,  -- for example '1'" in lines


def test_nothing_is_proposed_for_a_source_with_the_names_of_its_table(spark: SparkSession) -> None:
    order = dict(zip(ORDERS_HEADER.split(","), ORDERS.splitlines()[1].split(","), strict=True))
    columns = ", ".join(f"`{name.title()}` STRING" for name in order)
    records = {"transactions": spark.createDataFrame([tuple(order.values())], columns)}
    assert list(proposed_model("transactions", records)) == []


def test_declared_columns_keep_their_types(
    landed: Callable[..., DataPipelineConfig], spark: SparkSession, warnings: Callable[[], list[str]]
) -> None:
    """Only those that no file has are added, as null texts."""
    model = "-- columns sales: Amount, coupon\n" + MODEL.replace("FROM transactions", "FROM sales").replace(
        "total", "amount"
    )
    model = model.replace("who", "customer_id").replace("day", "coupon").replace("state", "status")
    model = model.replace("`Order No`", "concat(transaction_id, typeof(amount), typeof(coupon))")
    files: dict[str, Any] = {"sales.parquet": orders_in_parquet(amount=pa.array([1.5])), "transactions/1.csv": None}
    [row] = delivered(spark, landed({**files, "transactions.sql": model, "custmers.csv": "x\n"}))
    assert (row["transaction_id"], row["amount"], row["timestamp"]) == ("T1doublestring", Decimal("1.50"), None)
    assert warnings() == [
        "no model and no table uses custmers.csv; did you mean customers?",
        "sales: no file has the columns coupon: they are null",
    ]


def test_archive_that_is_none_is_named_where_it_is_used(landed: Callable[..., DataPipelineConfig]) -> None:
    open_source(landed({"other.zip": "x"}))
    with pytest.raises(
        ConfigurationError, match=r"cannot read customers\.zip: it cannot be read as a zip file: File is not"
    ):
        open_source(landed({"customers.zip": "x"}))


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ready models of two invented systems."""
    folder = tmp_path / "ready"
    orders = """-- Orders of Shop One.
        -- source orders: orders_export*, orders-*
        -- columns orders: Name, Email, Financial Status, Paid at,
        -- columns orders: Lineitem sku
        SELECT Name AS transaction_id, 1 AS customer_id, `Lineitem sku` AS product_id, 1 AS quantity, 9.99 AS amount,
            '2026-03-01' AS timestamp, 'paypal' AS payment_method, lower(`Financial Status`) AS status,
            _delivery, _source_file, _source_row
        FROM orders"""
    other = "-- columns sales: Invoice, Stock\nSELECT Invoice AS transaction_id FROM sales"
    land(folder, {"one/transactions.sql": orders, "two/transactions.sql": other})
    monkeypatch.setattr(data_pipeline, "READY_MODELS", str(folder))
    return folder


EXPORT = "Name,Email,Financial Status,Paid at,Lineitem name\nT1,a@example.com,Completed,2026-03-01,Lamp\n"


def test_ready_models_by_name(ready: Path, landed: Callable[..., DataPipelineConfig], spark: SparkSession) -> None:
    """A declared column that no file has is null."""
    config = landed({"orders_export_1.csv": EXPORT, "transactions/1.csv": None}, models="one")
    [row] = delivered(spark, config)
    assert (row["transaction_id"], row["product_id"], row["status"]) == ("T1", None, "completed")
    with pytest.raises(ConfigurationError, match=r"no models onee: .* or one of one, two; did you mean one\?"):
        open_source(landed({}, models="onee"))


def test_known_exports_are_recognized(ready: Path, landed: Callable[..., DataPipelineConfig]) -> None:
    files = {"orders_export_1.csv": EXPORT, "sheet.csv": EXPORT, "transactions/1.csv": None, "stock.csv": "Stock,x\n"}
    shown = list(inspect_source(config := landed(files)))
    advice = "run with --models one, which reads files called orders_export* or orders-*"
    assert f"orders_export_1.csv looks like the orders export of one: {advice}" in shown
    assert f"sheet.csv looks like the orders export of one: {advice}" in shown
    assert not any("stock.csv looks like" in line or "model to start from" in line for line in shown)
    with pytest.raises(ConfigurationError, match=r"table transactions: .*; --inspect-source shows what is there"):
        open_source(config)


@pytest.mark.parametrize(
    ("column", "kind", "example", "expression"),
    [
        ("timestamp", "timestamp", "2026-03-04", "x"),
        ("timestamp", "timestamp", "13.4.2026 9:05", "to_timestamp_ntz(x, 'd.M.yyyy H:mm')"),
        ("signup_date", "date", "03/04/2026", "to_date(x, 'M/d/yyyy')"),
        ("created_date", "date", "20260304", "to_date(x, 'yyyyMMdd')"),
        ("created_date", "date", "", "x"),
        ("customer_id", "bigint", "17", "x"),
        ("customer_id", "bigint", "a@example.com", "CASE WHEN x <> '' THEN xxhash64(lower(trim(x))) END"),
        ("status", "string", "Paid", "lower(trim(x))"),
        ("status", "string", "completed", "x"),
    ],
)
def test_proposed_expressions(column: str, kind: str, example: str, expression: str) -> None:
    assert proposed_expression("x", column, kind, example) == expression


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
ROW = st.fixed_dictionaries({
    "transaction_id": st.none() | TEXT,
    "customer_id": st.none() | st.integers(-(2**63), 2**63 - 1),
    "product_id": st.none() | TEXT,
    "quantity": st.none() | st.integers(-(2**31), 2**31 - 1),
    "amount": st.none() | st.decimals(Decimal("-9999999999.99"), Decimal("9999999999.99"), places=2),
    "timestamp": st.none() | st.datetimes(datetime(1900, 1, 1), datetime(2100, 1, 1)),
    "payment_method": st.none() | TEXT,
    "status": st.none() | TEXT,
})  # fmt: skip


def as_csv(rows: list[dict[str, Any]]) -> str:
    """Null is an empty field, an empty text a quoted one; each value that needs it is quoted."""

    def field(value: Any) -> str:
        text = "" if value is None else str(value)
        return '"{}"'.format(text.replace('"', '""')) if isinstance(value, str) else text

    return "\n".join([",".join(rows[0]), *(",".join(map(field, row.values())) for row in rows)])


# The first example has the simplest row alone, and the others many: reading costs the same, however many there are.
@given(rows=st.lists(ROW, min_size=1, max_size=1) | st.lists(ROW, min_size=20, max_size=40))
@settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_every_format_gives_the_same_rows(
    rows: list[dict[str, Any]], spark: SparkSession, small: Small, tmp_path: Path
) -> None:
    """What is written and read back is the same, whatever the values are, in each format."""
    rows = [{name: row[name] for name in ORDERS_HEADER.split(",")} for row in rows]
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    land(folder, {"customers.csv": CUSTOMERS, "products.csv": PRODUCTS, "transactions/1.csv": as_csv(rows),
                  "transactions/2.csv.gz": gzip.compress(as_csv(rows).encode()),
                  "transactions/3.csv": as_csv(rows) + "\nx\n",
                  "transactions/4.jsonl": "\n".join(json.dumps(row, default=str) for row in rows)})  # fmt: skip
    kinds = [pa.string(), pa.int64(), pa.string(), pa.int32(), pa.decimal128(12, 2), pa.timestamp("us", "UTC")]
    schema = pa.schema(list(zip(rows[0], [*kinds, pa.string(), pa.string()], strict=True)))
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / "transactions/5.parquet")
    config = small(source_dir=str(folder), settle_seconds=0)
    found: dict[int, list[tuple[Any, ...]]] = defaultdict(list)
    for row in delivered(spark, config):
        if row["_rescued_data"] is None:  # the line that is no record
            found[row["_delivery"]].append(tuple(row[name] for name in rows[0]))
    wanted = Counter(tuple(row.values()) for row in rows)
    assert {delivery: Counter(values) for delivery, values in found.items()} == dict.fromkeys(range(3, 8), wanted)


@THOROUGH
def test_source_of_which_nothing_can_be_read_is_refused(shop: Callable[..., RunRecord]) -> None:
    """Going on without bad files must not publish empty tables."""
    with pytest.raises(NotPublishedError, match="no rows were received"):
        shop({"transactions/1.csv": b"\xff\xff"}, on_bad_file="quarantine")


@THOROUGH
def test_only_file_that_changes_is_no_reason_to_publish_nothing(
    shop: Callable[..., RunRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(self: FileReader, file: LandedFile, *_: Any, **__: Any) -> None:
        os.utime(os.path.join(self.root, file.path), (0, 0))

    monkeypatch.setattr(FileReader, "_scan", change)
    with pytest.raises(NotPublishedError, match="no rows were received"):
        shop({})


def test_decimal_commas_are_no_thousands(spark: SparkSession, small: Small, tmp_path: Path) -> None:
    """In whole numbers too; a number of JSON has its point whatever the texts beside it have."""
    header, order = ORDERS_HEADER.replace(",", ";"), "{};1;A;{};9,99;2026-03-01 10:00:00;paypal;completed\n"
    json_order = dict(
        zip(ORDERS_HEADER.split(","), ["T3", 1, "A", 2.0, 1.5, "2026-03-01", "paypal", "completed"], strict=True)
    )
    files = {"transactions/1.csv": header + "\n" + order.format("T1", "1.000") + order.format("T2", "1,0"),
             "transactions/2.jsonl": json.dumps(json_order), "customers.csv": CUSTOMERS.replace(",", ";"),
             "products.csv": PRODUCTS.replace(",", ";").replace(".", ",")}  # fmt: skip
    config = small(source_dir=land(tmp_path, files), settle_seconds=0, source_decimal=",", source_delimiter=";")
    rows = {row["transaction_id"]: (row["quantity"], row["amount"]) for row in delivered(spark, config)}
    assert rows == {"T1": (None, Decimal("9.99")), "T2": (1, Decimal("9.99")), "T3": (2, Decimal("1.50"))}


def test_keys_of_objects_are_one_column_in_any_spelling(spark: SparkSession, small: Small, tmp_path: Path) -> None:
    """Also those of a file that is left out."""
    lines = [dict(zip(ORDERS_HEADER.split(","), ORDERS.splitlines()[1].split(","), strict=True)) for _ in range(3)]
    for line, name in zip(lines, ("quantity", " Quantity", "QUANTITY"), strict=True):
        line[name] = line.pop("quantity")
    files = {f"transactions/{n}.jsonl": json.dumps({**line, "": "v"}) for n, line in enumerate(lines)}
    files |= {"transactions/x.jsonl": '{"X": 1}\n{"x": 2}\n', "customers.csv": CUSTOMERS, "products.csv": PRODUCTS}
    config = small(source_dir=land(tmp_path, files), settle_seconds=0, on_bad_file="quarantine")
    rows = delivered(spark, config)
    assert [(row["quantity"], row["_rescued_data"]) for row in rows] == [(1, '{"column_0":"v"}')] * 3


def test_names_of_files_and_folders(spark: SparkSession, small: Small, tmp_path: Path) -> None:
    """Links to folders are followed, once; each name is in `_source_file` as it is."""
    names_of_files = ["qu'ote", "back\\tslash", "a b", "%41", "[x]", "x=1/é"]
    source = tmp_path / "source"
    land(source, {"customers.csv": CUSTOMERS, "products.csv": PRODUCTS})
    (tmp_path / "elsewhere").mkdir()
    (source / "transactions").mkdir()
    (source / "transactions/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(source / "transactions")
    orders = pa.table(
        {name: [value] for name, value in zip(ORDERS_HEADER.split(","), ORDERS.splitlines()[1].split(","), strict=True)}
    )
    for number, name in enumerate(names_of_files):
        land(tmp_path / "elsewhere", {f"{name}.csv": ORDERS.replace("T1", f"T{number}")})
        pq.write_table(orders.append_column("note", pa.array([name])), tmp_path / f"elsewhere/{name}.parquet")
    rows = delivered(spark, small(source_dir=str(source), settle_seconds=0))
    wanted = [f"transactions/linked/{name}.{ending}" for name in names_of_files for ending in ("csv", "parquet")]
    assert sorted(row["_source_file"] for row in rows) == sorted(wanted)


MISTAKES: dict[str, tuple[dict[str, str | bytes], dict[str, Any], str]] = {
    "delimiter": ({}, {"source_delimiter": "|"}, "is ',' the delimiter .--source-delimiter"),
    "bytes": (
        {"transactions/2.parquet": orders_in_parquet(photo=pa.array([b"\xff"]))}, {}, "column photo is binary",
    ),
    "time of day": (
        {"transactions/2.parquet": orders_in_parquet(at=pa.array([0], pa.time64("us")))}, {},
        r"column at is time64\[us\], which Spark does not read",
    ),
    "encoding": ({"transactions/1.csv": LATIN}, {}, "'utf-8' can't decode byte 0xeb after .*; see --source-encoding"),
    "model with two columns of a name": (
        {"transactions.sql": "SELECT *, upper(status) AS status FROM transactions"}, {}, "returns two columns status",
    ),
    "model in another encoding": ({"transactions.sql": LATIN}, {}, "cannot read the model .*transactions.sql: 'utf-8'"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake_is_one_line(case: str, landed: Callable[..., DataPipelineConfig], spark: SparkSession) -> None:
    files, values, message = MISTAKES[case]
    with pytest.raises(PipelineError, match=message):
        config = landed(files, **values)
        preflight(config, spark)
        delivered(spark, config)


def test_model_as_an_editor_writes_it(landed: Callable[..., DataPipelineConfig], spark: SparkSession) -> None:
    """With a byte order mark, a WITH of its own, a join by comma, and a semicolon."""
    model = "\ufeff-- ours\nWITH t AS (SELECT * FROM transactions)\nSELECT t.* FROM t, customers c "
    model += "WHERE t.customer_id = c.customer_id;\n"
    assert len(delivered(spark, landed({"transactions.sql": model}))) == 1


def test_data_within_a_source_is_left_out(small: Small, tmp_path: Path) -> None:
    land(tmp_path, {"customers.csv": CUSTOMERS, "products.csv": PRODUCTS, "transactions/1.csv": ORDERS})
    land(tmp_path, {"transactions/data/bronze/transactions/1.parquet": b""})
    source = open_source(small(source_dir=str(tmp_path), data_dir=str(tmp_path / "transactions/data")))
    assert isinstance(source, LandedFiles)
    assert [file.path for file in source.files] == ["customers.csv", "products.csv", "transactions/1.csv"]


def test_link_that_leads_nowhere_is_named(small: Small, tmp_path: Path) -> None:
    land(tmp_path, {"customers.csv": CUSTOMERS, "products.csv": PRODUCTS})
    (tmp_path / "transactions.csv").symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigurationError, match=r"cannot read .*transactions\.csv: No such file or directory"):
        open_source(small(source_dir=str(tmp_path)))
