"""Publishing on real folders and processes, without Spark."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest

import data_pipeline
from data_pipeline import (
    AUDITED,
    LAYERS,
    REFUSED,
    SNAPSHOT_TABLES,
    DataPipelineConfig,
    LockedError,
    PipelineError,
    RunRecord,
    Snapshot,
    Store,
    list_runs,
    main,
    preflight,
    roll_back,
    write_atomic,
)

IDS = [f"2026030{day}T120000Z-00a{day}" for day in range(1, 7)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    for folder in ("runs", "snapshots"):
        (tmp_path / folder).mkdir()
    return Store(str(tmp_path))


def add(store: Store, run_id: str, mark: str | None = AUDITED, result: str = "succeeded") -> None:
    """A snapshot in which each table is a file that holds the run's id, and its record."""
    for layer, table in SNAPSHOT_TABLES:
        folder = Path(store.path("snapshots", run_id, layer, table.name))
        folder.mkdir(parents=True)
        (folder / "part-0.parquet").write_text(run_id)
    if mark:
        store.set_status(run_id, mark)
    rows = {"bronze.customers": 1_000, "bronze.products": 200, "gold.customer_analytics": 9}
    record = {"run_id": run_id, "result": result, "started_at": "2026-03-01T12:00:00+00:00", "rows": rows}
    save(store, run_id, record | {"config": {"as_of_date": "2026-02-28"}})


def save(store: Store, run_id: str, record: dict[str, Any]) -> None:
    write_atomic(store.runs.path(run_id), json.dumps(record))


def result_of(store: Store, run_id: str) -> str:
    record = store.runs.get(run_id)
    assert record is not None
    return record.result


def seen(store: Store) -> set[str]:
    """The run ids that a reader finds behind the layers."""
    return {next(Path(store.path(layer)).glob("*/*.parquet")).read_text() for layer in LAYERS}


def test_all_layers_switch_at_once(store: Store) -> None:
    for run_id in IDS[:3]:
        add(store, run_id)
        store.switch_to(run_id)
        assert seen(store) == {run_id}
        assert store.published() == run_id


PUBLISH_FOREVER = """
import itertools, sys
from data_pipeline import Store
store = Store(sys.argv[1])
for run_id in itertools.cycle(sys.argv[2:]):
    store.switch_to(run_id)
"""


@pytest.mark.slow
def test_publisher_killed_at_any_instant_leaves_a_whole_snapshot(store: Store) -> None:
    for run_id in IDS[:2]:
        add(store, run_id)
    environment = os.environ | {"PYTHONPATH": str(Path(data_pipeline.__file__).parent)}
    for seed in range(20):
        command = [sys.executable, "-c", PUBLISH_FOREVER, store.root, *IDS[:2]]
        with subprocess.Popen(command, env=environment) as process:
            deadline = time.monotonic() + 30
            while not store.published():
                assert time.monotonic() < deadline
            end = time.monotonic() + 0.3 + random.Random(seed).random() / 10
            while time.monotonic() < end:
                # A reader resolves the link once, and then reads one snapshot whatever happens.
                current = Path(store.path("current")).resolve()
                assert {file.read_text() for file in current.glob("*/*/*.parquet")} == {current.name}
            process.kill()
        assert len(seen(store)) == 1
        assert seen(store) < set(IDS)


def test_retention_keeps_the_newest_and_the_published(store: Store) -> None:
    for run_id in IDS[:4]:
        add(store, run_id)
    add(store, IDS[4], REFUSED)
    add(store, IDS[5], REFUSED)
    store.switch_to(IDS[0])
    store.expire_snapshots(2)
    assert store.snapshots() == [IDS[0], IDS[2], IDS[3], IDS[5]]


def test_old_run_records_are_removed_but_not_those_of_snapshots(store: Store) -> None:
    for run_id in IDS[:5]:
        save(store, run_id, {})
        Path(store.runs.spark_log(run_id)).touch()
    others = [Path(store.path("runs", name)) for name in ("notes.json", f"{IDS[1]}.txt", f"{IDS[1]}-copy.json")]
    for path in others:
        path.touch()
    add(store, IDS[0])
    store.switch_to(IDS[0])
    add(store, IDS[2], REFUSED)
    with pytest.raises(LookupError), store.snapshot(RunRecord(IDS[5], "", store.root, {}, {}), keep=3, keep_runs=2):
        save(store, IDS[5], {})
        raise LookupError
    left = {path.name for path in Path(store.path("runs")).iterdir()} - {path.name for path in others}
    kept = [IDS[n] for n in (0, 2, 4, 5)]
    assert left == {f"{run_id}.json" for run_id in kept} | {f"{run_id}.spark.log" for run_id in kept[:-1]}
    assert all(path.exists() for path in others), "what no run made is left alone"


def test_leftovers_of_a_dead_run_are_removed_and_said(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    add(store, IDS[0])
    store.switch_to(IDS[0])
    add(store, IDS[1], mark=None, result="running")
    others = [Path(store.path("snapshots", name)) for name in ("notes of the team", f"{IDS[2]}.backup")]
    for other in others:
        other.mkdir()
    store.recover()
    store.expire_snapshots(1)
    assert store.snapshots() == [IDS[0]]
    assert all(other.is_dir() for other in others), "what no run made is left alone"
    assert result_of(store, IDS[1]) == "killed"
    assert f"Run {IDS[1]} was killed, before its data was published" in caplog.text


def test_run_killed_after_publishing_has_succeeded(store: Store) -> None:
    add(store, IDS[0], result="running")
    store.switch_to(IDS[0])
    store.recover()
    assert result_of(store, IDS[0]) == "succeeded"
    assert seen(store) == {IDS[0]}


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"result": "succeeded"}', "[]", "\x00\xff"],
)
def test_unreadable_record_is_named_and_passed_over(text: str, store: Store) -> None:
    add(store, IDS[0])
    Path(store.path("runs", f"{IDS[1]}.json")).write_text(text)
    store.switch_to(IDS[0])
    store.recover()
    lines = list(list_runs(store))
    assert any(line.startswith(f"* {IDS[0]}") for line in lines)
    assert any(line.startswith(f"  {IDS[1]} unreadable record") for line in lines)


def test_list_of_runs(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    add(store, IDS[0])
    add(store, IDS[1])
    add(store, IDS[2], REFUSED, result="refused")
    store.switch_to(IDS[1])
    assert main(["--list-runs", "--data-dir", store.root]) == 0
    _, first, second, third, _ = capsys.readouterr().out.splitlines()
    assert first == f"+ {IDS[0]} 2026-03-01T12:00:00  2026-02-28           1,200  full         succeeded"
    assert second.startswith(f"* {IDS[1]}")
    assert third.startswith(f"  {IDS[2]}")
    assert third.endswith("refused")


def test_list_of_runs_where_there_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list-runs", "--data-dir", str(tmp_path / "nothing")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert not (tmp_path / "nothing").exists()


@pytest.fixture(scope="module")
def empty_tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tables of a snapshot, as real files without rows."""
    folder = tmp_path_factory.mktemp("empty")
    types = {"string": "VARCHAR", "timestamp": "TIMESTAMPTZ", "array<string>": "VARCHAR[]"}
    for layer, table in SNAPSHOT_TABLES:
        (folder / layer / table.name).mkdir(parents=True)
        columns = (f"CAST(NULL AS {types.get(kind, kind)}) AS {name}" for name, kind in table.columns(layer))
        path = folder / layer / table.name / "part-0.parquet"
        duckdb.sql(f"COPY (SELECT {', '.join(columns)} WHERE false) TO '{path}' (FORMAT parquet)")
    return folder


def add_whole(store: Store, run_id: str, tables: Path, **changes: Any) -> Path:
    """A published snapshot with real files and their record; returns its folder."""
    folder = Path(store.path("snapshots", run_id))
    shutil.copytree(tables, folder)
    store.set_status(run_id, AUDITED)
    rows = {f"{layer}.{table.name}": 0 for layer, table in SNAPSHOT_TABLES}
    record = RunRecord(run_id, "2026-03-01T12:00:00+00:00", store.root, {}, {}, result="succeeded", rows=rows)
    record.sha256 = Snapshot(store, record.run_id).checksums()
    store.runs.save(dataclasses.replace(record, **changes))
    store.switch_to(run_id)
    return folder


def test_old_snapshot_that_cannot_be_removed_is_a_warning_only(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The run has been published by then, so it must not fail."""
    add(store, IDS[0])
    real = Path.unlink

    def unlink(path: Path, *arguments: Any, **options: Any) -> None:
        if path.parent.name == IDS[0]:
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path))
        real(path, *arguments, **options)

    monkeypatch.setattr(Path, "unlink", unlink)
    with store.lock(0), store.snapshot(record := RunRecord(IDS[1], "", store.root, {}, {}), keep=1, keep_runs=9):
        add(store, IDS[1])
        store.publish(record)
    assert store.published() == IDS[1]
    assert store.snapshots(AUDITED) == [IDS[0], IDS[1]]
    assert f"Cannot remove {store.path('snapshots', IDS[0])}: [Errno 1] Operation not permitted" in caplog.text


def test_rollback(store: Store, empty_tables: Path) -> None:
    for run_id in IDS[:3]:
        add_whole(store, run_id, empty_tables)
    assert roll_back(store, "", 0) == store.published() == IDS[1]
    assert roll_back(store, "", 0) == store.published() == IDS[0]
    assert roll_back(store, IDS[2], 0) == store.published() == IDS[2]
    assert {path.name for path in Path(store.path("snapshots", IDS[2])).iterdir()} == {*LAYERS, AUDITED}


def overwrite(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def add_file(file: Path) -> None:
    shutil.copy(file, file.with_name("part-1.parquet"))


def remove_folder(file: Path) -> None:
    shutil.rmtree(file.parent)


@pytest.mark.parametrize("damage", [overwrite, add_file, Path.unlink, remove_folder])
def test_rollback_to_a_damaged_snapshot_is_refused(
    damage: Callable[[Path], None], store: Store, empty_tables: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add_whole(store, IDS[0], empty_tables)
    damaged = add_whole(store, IDS[1], empty_tables)
    add_whole(store, IDS[2], empty_tables)
    damage(damaged / "gold" / "device_analytics" / "part-0.parquet")
    with pytest.raises(PipelineError, match=f"snapshot {IDS[1]} is damaged: .*: gold/device_analytics") as raised:
        roll_back(store, IDS[1], 0)
    assert store.published() == IDS[2]
    assert roll_back(store, "", 0) == store.published() == IDS[0], "where none is named, the newest that is whole"
    assert caplog.messages == [f"Passed over: {raised.value}"]


def test_rollback_where_none_is_whole(store: Store, empty_tables: Path, caplog: pytest.LogCaptureFixture) -> None:
    for run_id in IDS[:3]:
        add_whole(store, run_id, empty_tables)
    add_whole(store, IDS[3], empty_tables)
    store.switch_to(IDS[2])
    os.unlink(store.path("runs", f"{IDS[1]}.json"))
    overwrite(Path(store.path("snapshots", IDS[0], "gold", "device_analytics", "part-0.parquet")))
    assert main(["--rollback", "--data-dir", store.root]) == 2
    first, second, last = caplog.messages
    assert first.startswith(f"Passed over: snapshot {IDS[1]} cannot be checked: its run record is missing")
    assert second.startswith(
        f"Passed over: snapshot {IDS[0]} is damaged: not as they were written: gold/device_analytics"
    )
    assert last.startswith(
        f"no snapshot that is intact and older than the published one in {store.root}: there are {IDS[0]}, "
    )
    assert store.published() == IDS[2], "not a later one, which somebody has gone back from"


def test_rollback_needs_a_record_with_checksums(store: Store, empty_tables: Path) -> None:
    add_whole(store, IDS[0], empty_tables, sha256={})
    add_whole(store, IDS[1], empty_tables)
    message = f"snapshot {IDS[0]} cannot be checked: its run record is missing, unreadable or of the first version"
    with pytest.raises(PipelineError, match=message):
        roll_back(store, IDS[0], 0)
    os.unlink(store.path("runs", f"{IDS[0]}.json"))
    with pytest.raises(PipelineError, match=message):
        roll_back(store, IDS[0], 0)


def test_published_snapshot_that_is_gone(store: Store, empty_tables: Path) -> None:
    for run_id in IDS[:3]:
        add_whole(store, run_id, empty_tables)
    store.switch_to(IDS[0])
    assert not [line for line in list_runs(store) if "gone" in line]
    os.unlink(store.path("runs", f"{IDS[0]}.json"))
    [line] = [line for line in list_runs(store) if "gone" in line]
    assert line.startswith(f"* {IDS[0]} is published, but runs/{IDS[0]}.json is gone")
    assert roll_back(store, "", 0) == IDS[2], "the newest: nothing is known of the one to go back from"
    store.switch_to(IDS[0])
    shutil.rmtree(store.path("snapshots", IDS[0]))
    assert f"snapshots/{IDS[0]} is gone" in "\n".join(list_runs(store))
    assert roll_back(store, "", 0) == IDS[2], "the newest, since there is none to go back from"
    os.unlink(store.path("current"))
    assert roll_back(store, "", 0) == IDS[2]


def test_rollback_that_cannot_be(store: Store, tmp_path: Path) -> None:
    add(store, IDS[0])
    add(store, IDS[1], REFUSED)
    add(store, IDS[2])
    store.switch_to(IDS[0])
    for wanted, message in (
        (
            "",
            f"no snapshot that is intact and older than the published one in {store.root}: "
            f"there are {IDS[0]}, {IDS[2]}",
        ),
        (IDS[1], f"no snapshot {IDS[1]}"),
        ("../..", "no snapshot ../.."),
    ):
        with pytest.raises(PipelineError, match=message.replace(".", r"\.")):
            roll_back(store, wanted, 0)
    assert main(["--rollback", "--data-dir", str(tmp_path / "nothing")]) == 2
    assert main(["--rollback", "--data-dir", "s3a://bucket/shop"]) == 2
    assert seen(store) == {IDS[0]}


@pytest.mark.parametrize("name", ["bronze", "quarantine", "current"])
def test_folder_that_is_not_ours_is_refused_and_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "precious.txt").write_text("years of work")
    with pytest.raises(PipelineError, match=rf"{tmp_path}/{name} was not made by this pipeline.*move it away"):
        preflight(DataPipelineConfig(data_dir=str(tmp_path)))
    assert (tmp_path / name / "precious.txt").read_text() == "years of work"


def test_run_ids_rise_though_the_clock_is_set_back(store: Store) -> None:
    first, second = store.next_run_id(), store.next_run_id()
    future = "20991231T235959Z-abcd"
    save(store, future, {})
    third = store.next_run_id()
    assert max(first, second) < future < third
    assert third.startswith("21000101T000000Z-")


def test_second_writer_is_refused_at_once_or_waits(store: Store) -> None:
    with store.lock(0):
        started = time.monotonic()
        with pytest.raises(
            LockedError, match=rf"another run is writing to .*process {os.getpid()} on .*--lock-timeout"
        ):
            with Store(store.root).lock(0):
                pass
        assert time.monotonic() - started < 1
        with pytest.raises(LockedError):
            with Store(store.root).lock(0.3):
                pass
        assert time.monotonic() - started > 0.3
        assert main(["--rollback", "--data-dir", store.root]) == LockedError.exit_code == 4
    with store.lock(0):
        pass


HOLD = """
import sys, time
from data_pipeline import Store
with Store(sys.argv[1]).lock(0):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_lock_of_a_killed_process_does_not_block(store: Store) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(data_pipeline.__file__).parent)}
    command = [sys.executable, "-c", HOLD, store.root]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(LockedError, match=f"process {process.pid}"):
            with store.lock(0):
                pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        with store.lock(5):
            pass


def test_record_is_replaced_whole(store: Store) -> None:
    record = RunRecord(IDS[0], "2026-03-01T12:00:00+00:00", store.root, {"size": "x" * 100_000}, {})
    store.runs.save(record)
    with pytest.raises(TypeError):
        store.runs.save(dataclasses.replace(record, config={("not", "a", "key"): 1}))  # type: ignore[dict-item]
    assert store.runs.get(IDS[0]) == record


def test_replaced_lock_is_noticed_before_publishing(store: Store) -> None:
    for name, replace in (("removed", os.unlink), ("replaced", lambda path: os.replace(Path(store.root, "new"), path))):
        Path(store.root, "new").touch()
        record = RunRecord(IDS[0], "2026-03-01T12:00:00+00:00", store.root, {}, {})
        with store.lock(0), store.snapshot(record, keep=3, keep_runs=3):
            assert store.lost_lock() is None
            replace(store.path(".lock"))
            with pytest.raises(LockedError, match=r"\.lock was removed or replaced .* nothing is published"):
                store.publish(record)
        assert store.published() is None, name


@pytest.fixture
def of_root() -> Iterator[Path]:
    """A folder of root, for whose owner the test runs as another user; elsewhere one that is read-only."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for part in ("runs", "snapshots"):
            (folder / part).mkdir(mode=0o755)
        (folder / ".lock").touch(0o444)
        (folder / "metrics.prom").touch(0)
        folder.chmod(0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            os.seteuid(user)
            folder.chmod(0o755)


def test_folder_of_another_user_is_named(of_root: Path) -> None:
    store = Store(str(of_root))
    with pytest.raises(PipelineError, match=rf"cannot write to .*Permission denied: {of_root}.*;.*run this as"):
        store.check(0)
    with pytest.raises(PipelineError, match=rf"Permission denied: {of_root}/.lock;.*run this as"):
        with store.lock(0):
            pass


def test_hdfs_that_does_not_answer_is_named_and_a_name_of_several_servers_is_left_to_hadoop() -> None:
    for server in ("localhost:9", "no.invalid:9"):
        with pytest.raises(PipelineError, match=rf"no HDFS at {server} \(.*\): start it, or correct data_dir"):
            Store(f"hdfs://{server}/shop").check(0)
    for server in ("nameservice.invalid", "localhost", ""):
        Store(f"hdfs://{server}/shop").check(0)


@pytest.mark.parametrize("name", ["runs", "snapshots"])
def test_part_that_is_a_file_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(PipelineError, match=rf"cannot write to data_dir: File exists: {tmp_path}/{name};"):
        Store(str(tmp_path)).check(0)


def test_lock_that_is_no_file_is_named(store: Store) -> None:
    os.mkfifo(store.path(".lock"))
    with pytest.raises(PipelineError, match=rf"cannot lock data_dir: .*seekable.*: {store.root}/\.lock;"):
        with store.lock(0):
            pass


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, which a test can fill."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no right to mount a disk here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(folder: Path) -> None:
    with pytest.raises(OSError, match="No space left"), (folder / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4_096))


def test_rollback_on_a_full_disk(full_disk: Path, empty_tables: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It returns to the snapshot before; it ends with one line if a killed run's record cannot be corrected."""
    for folder in ("runs", "snapshots"):
        (full_disk / folder).mkdir()
    store = Store(str(full_disk))
    for run_id in IDS[:3]:
        add_whole(store, run_id, empty_tables)
    fill(full_disk)
    assert main(["--rollback", "--data-dir", store.root]) == 0
    assert store.published() == IDS[1]
    assert f"{store.root}/.lock does not name this process: [Errno 28] No space left on device" in caplog.messages
    assert f"Published again: {IDS[1]}" in caplog.messages
    (full_disk / "filler").unlink()
    killed = {"run_id": IDS[3], "result": "running", "started_at": "", "config": {}, "rows": {}}
    save(store, IDS[3], killed)
    fill(full_disk)
    caplog.clear()
    assert main(["--rollback", "--data-dir", store.root]) == 2
    assert f"data_dir: No space left on device: {store.runs.path(IDS[3])};" in caplog.text
    assert "or free some room" in caplog.text


def test_full_disk_names_the_file_and_what_to_do(full_disk: Path) -> None:
    fill(full_disk)
    path = str(full_disk / "page")
    with pytest.raises(PipelineError, match=f"data_dir: No space left on device: {path};.* or free some room"):
        write_atomic(path, "text" * 10_000)


@pytest.mark.parametrize("flag", ["--list-runs", "--rollback"])
def test_storage_without_records_says_so(flag: str, caplog: pytest.LogCaptureFixture) -> None:
    assert main([flag, "--data-dir", "s3a://bucket/shop"]) == 2
    assert re.search("has no run records|has no link to switch", caplog.text)


@pytest.mark.parametrize("flag", ["--list-runs", "--rollback"])
def test_folder_that_cannot_be_read_is_one_line(flag: str, of_root: Path, caplog: pytest.LogCaptureFixture) -> None:
    user = os.geteuid()
    os.seteuid(os.getuid())
    for part in ("runs", "snapshots"):
        (of_root / part).chmod(0)
    os.seteuid(user)
    assert main([flag, "--data-dir", str(of_root)]) == 2
    [line] = caplog.records
    assert "Permission denied" in line.getMessage() or "not permitted" in line.getMessage()
    assert str(of_root) in line.getMessage()


def test_list_of_runs_that_cannot_be_written_is_one_line(store: Store) -> None:
    command = [sys.executable, data_pipeline.__file__, "--list-runs", "--data-dir", store.root]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "cannot read or write standard output: No space left on device" in done.stderr
