"""The order of responsibilities in run_pipeline, and what the layers share: steps, parallel work, cached rows."""

from __future__ import annotations

import copy
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ENGINE, at_close
from pyspark.sql import SparkSession
from test_gate import started_run

import data_pipeline
from data_pipeline import DataPipelineConfig, LockedError, PipelineError, Run, RunRecord, Store, run_pipeline

Small = Callable[..., DataPipelineConfig]
TINY = {"num_customers": 20, "num_transactions": 100, "num_products": 5}


@pytest.fixture
def run(config: DataPipelineConfig, spark: SparkSession, report: RunRecord) -> Run:
    return started_run(config, spark, copy.deepcopy(report))


def result_on_disk(config: DataPipelineConfig) -> str:
    [path] = Path(config.root, "runs").glob("*.json")
    result: str = json.loads(path.read_text(encoding="utf-8"))["result"]
    return result


@pytest.mark.usefixtures("no_layers")
def test_engine_that_does_not_stop_is_a_warning(
    small: Small, spark: SparkSession, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("Java does not answer")

    at_close(monkeypatch, fail)
    config, started = small(**TINY), list[RunRecord]()
    record = run_pipeline(config, spark, on_start=started.append)
    assert started == [record]
    assert record.result == result_on_disk(config) == "succeeded"
    assert Store(config.root).published() is not None
    assert "The engine did not stop" in caplog.text


def test_bad_configuration_leaves_no_lock_and_no_record(small: Small, spark: SparkSession) -> None:
    started: list[RunRecord] = []
    for bad in ({"num_products": 0}, {"gold_above": 1}):
        config = small(**TINY | bad)
        with pytest.raises(PipelineError):
            run_pipeline(config, spark, on_start=started.append)
        assert list(Path(config.root).iterdir()) == []
    config = small(**TINY)
    store = Store(config.root)
    store.check(0)
    with store.lock(0), pytest.raises(LockedError):
        run_pipeline(config, spark, on_start=started.append)
    assert started == []
    assert list(Path(config.root, "runs").iterdir()) == []


class Finalized:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_interrupt_that_python_loses_is_raised_again(capsys: pytest.CaptureFixture[str]) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(KeyboardInterrupt, match="stopped by SIGINT"), data_pipeline.stoppable(lambda: False):
            finalized = Finalized()
            del finalized
            time.sleep(30)
            pytest.fail("the interrupt is lost")
        assert "Traceback" not in capsys.readouterr().err
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_parallel_returns_results_by_item(run: Run) -> None:
    assert run.parallel(lambda number: number * number, range(40)) == {number: number * number for number in range(40)}


def test_parallel_raises_the_first_error_and_awaits_the_rest(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled, ended = threading.Event(), []
    monkeypatch.setattr(run.engine, "cancel_jobs", cancelled.set)

    def work(name: str) -> None:
        with run.step(name):
            if name == "first":
                time.sleep(0.2)
                raise ValueError("the reason")
            assert cancelled.wait(30)
            time.sleep(0.2)
            ended.append(name)
            raise RuntimeError("job cancelled")

    with pytest.raises(ValueError, match="the reason"), run.step("layer"):
        run.parallel(work, ["second", "first", "third"])
    assert sorted(ended) == ["second", "third"], "nothing works on when the error is raised"
    assert run.record.current_step == "first", "the failed step is recorded once"
    assert not {"first", "second", "third", "layer"} & set(run.record.seconds)


def test_parallel_cancels_jobs_until_all_have_ended(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that is between two jobs starts the next one after the others were cancelled."""
    cancelled, ended = threading.Semaphore(0), []
    monkeypatch.setattr(run.engine, "cancel_jobs", cancelled.release)

    def work(jobs: int) -> None:
        for _ in range(jobs):
            assert cancelled.acquire(timeout=5), "a job that nobody cancels"
        ended.append(jobs)
        raise ValueError

    with pytest.raises(ValueError):
        run.parallel(work, [3, 0])
    assert ended == [0, 3]


class Rows:
    """Rows that only note whether they are cached."""

    is_cached = False

    def persist(self) -> Rows:
        self.is_cached = True
        return self

    def unpersist(self) -> None:
        self.is_cached = False


def test_what_a_layer_caches_is_released_at_its_end(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.engine, "keeps_rows", True)
    rows: Any = Rows()
    with run.layer("silver", "of a test"):
        assert run.cached(rows).is_cached
    assert not rows.is_cached
    with pytest.raises(ValueError), run.layer("gold", "of a test"):
        assert run.cached(rows).is_cached
        raise ValueError
    assert not rows.is_cached


def test_rows_that_a_layer_stores_are_removed_at_its_end(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.engine, "keeps_rows", False)
    before = os.listdir(run.snapshot.path())
    with run.layer("silver", "of a test"):
        stored = run.cached(run.engine.spark.range(3))
        assert sorted(row["id"] for row in stored.collect()) == [0, 1, 2]
        assert run.cached(run.engine.spark.range(0)).count() == 0
        assert len(os.listdir(run.snapshot.path())) == len(before) + 2
    assert os.listdir(run.snapshot.path()) == before


def test_step_names_what_failed(run: Run) -> None:
    with run.step("one"):
        assert run.record.current_step == "one"
    assert run.record.seconds["one"] >= 0
    with pytest.raises(KeyError), run.step("outer"), run.step("inner"):
        raise KeyError
    with run.step("cleaning up"):
        pass
    assert run.record.current_step == "inner"


def test_interrupt_keeps_the_table_that_the_run_works_on(run: Run) -> None:
    with pytest.raises(KeyboardInterrupt), run.step("layer"):
        with run.step("table"):
            pass
        raise KeyboardInterrupt
    assert run.record.current_step == "table"


def test_run_whose_record_cannot_be_saved_sends_one_alert(
    small: Small, spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run has not begun then, so the command line reports it."""

    def full(_: Store, record: RunRecord) -> None:
        raise OSError(28, "No space left on device")

    sent: list[str] = []
    monkeypatch.setattr(data_pipeline.RunRecords, "save", full)
    monkeypatch.setattr(data_pipeline, "send_alert", lambda webhook, text: sent.append(text))
    root = small(**TINY).data_dir
    assert data_pipeline.main(["--engine", ENGINE, "--data-dir", root, "--alert-webhook", "http://127.0.0.1:9/x"]) == 1
    [text] = sent
    assert "No run of the data pipeline" in text and "No space left on device" in text


@pytest.mark.usefixtures("no_layers")
def test_run_whose_lock_was_replaced_ends_with_an_error_of_its_own(
    small: Small, spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run, which removing the lock file lets in, takes the first one's snapshot for that of a dead run."""
    config = small(**TINY)
    store = Store(config.root)

    def second_run(run: Run) -> None:
        Path(config.root, ".lock").unlink()
        with store.lock(0):
            store.recover()

    monkeypatch.setattr(data_pipeline, "summarize", second_run)
    with pytest.raises(LockedError, match="lock was removed or replaced"):
        run_pipeline(config, spark)
    assert result_on_disk(config) == "failed"
    assert store.published() is None
