"""deploy.sh as a person or cron calls it, with a Python that only notes what it is asked to run."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
PYTHON = """#!/bin/sh
case "$*" in
"-m venv"*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
*load_config*) echo "$PIPELINE_DATA_DIR" ;;
*data_pipeline.py*) env -0 > ~/environment ;;
esac
"""
Result = subprocess.CompletedProcess[str]


class Machine:
    """A home folder, the script in a checkout, and nothing deployed."""

    def __init__(self, folder: Path) -> None:
        self.home, self.checkout = folder / "home", folder / "checkout"
        (self.home / "actions-runner").mkdir(parents=True)
        (self.checkout / ".github").mkdir(parents=True)
        for name in (".github/deploy.sh", "requirements.txt"):
            shutil.copy(PROJECT / name, self.checkout / name)
        python = self.home / "python"
        python.write_text(PYTHON)
        python.chmod(0o755)
        self.python = str(python)
        author = ("-c", "user.name=x", "-c", "user.email=x@example.com")
        commands: list[tuple[str, ...]] = [("init", "-q"), ("add", "."), (*author, "commit", "-qm", "first")]
        for command in commands:
            subprocess.run(["git", *command], cwd=self.checkout, check=True)

    def deploy(self, *arguments: str, **variables: str) -> Result:
        environment = {"HOME": str(self.home), "PATH": os.environ["PATH"], "PYTHON": self.python} | variables
        command = ["bash", str(self.checkout / ".github/deploy.sh"), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    def environment_of_run(self, **variables: str) -> dict[str, str]:
        for command in ("environment", "release", "run"):
            done = self.deploy(command, **variables)
            assert done.returncode == 0, done.stderr
        text = (self.home / "environment").read_text()
        return dict(line.split("=", 1) for line in text.split("\0") if line)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


DOT_ENV = r"""PIPELINE_ALERT_WEBHOOK=http://h/hook?x=1&sig=S
PIPELINE_APP_NAME=My shop
# a comment=
no variable
PIPELINE_DATA_DIR=$HOME/`touch ~/injected`; "quoted"
PIPELINE_SEED=7"""


def test_run_reads_the_file_of_the_runner_literally(machine: Machine) -> None:
    (machine.home / "actions-runner/.env").write_text(DOT_ENV)
    seen = machine.environment_of_run(PIPELINE_SEED="8")
    assert seen["PIPELINE_ALERT_WEBHOOK"] == "http://h/hook?x=1&sig=S"
    assert seen["PIPELINE_APP_NAME"] == "My shop"
    assert seen["PIPELINE_DATA_DIR"] == '$HOME/`touch ~/injected`; "quoted"'
    assert seen["PIPELINE_SEED"] == "8", "a variable that is set wins"
    assert not (machine.home / "injected").exists()


def test_within_actions_the_file_is_left_to_the_runner(machine: Machine) -> None:
    (machine.home / "actions-runner/.env").write_text(DOT_ENV)
    assert "PIPELINE_APP_NAME" not in machine.environment_of_run(GITHUB_ACTIONS="true")


def test_collect_reads_the_same_data_folder(machine: Machine, tmp_path: Path) -> None:
    (machine.home / "actions-runner/.env").write_text(f"PIPELINE_DATA_DIR={tmp_path}/data\r\n")
    assert machine.environment_of_run()["PIPELINE_DATA_DIR"] == f"{tmp_path}/data"
    (tmp_path / "data").mkdir()
    (tmp_path / "data/report.html").touch()
    assert machine.deploy("collect", str(tmp_path / "collected")).returncode == 0
    assert sorted(path.name for path in (tmp_path / "collected").iterdir()) == ["pipeline.log", "report.html"]


def test_nothing_is_written_where_other_users_write(machine: Machine) -> None:
    seen = machine.environment_of_run(DRY_RUN="true")
    assert seen["PIPELINE_DATA_DIR"] == f"{machine.home}/pipeline/dry-run"
    assert (machine.home / "pipeline/pipeline.log.started").exists()


@pytest.mark.parametrize(
    ("before", "arguments", "message"),
    [
        ([], ["run"], "there is no environment for these requirements: call 'deploy.sh environment' first"),
        (["environment"], ["run"], "call 'deploy.sh release' first"),
        ([], ["collect"], "usage: deploy.sh collect FOLDER"),
    ],
)
def test_mistake_by_hand_is_one_line(machine: Machine, before: list[str], arguments: list[str], message: str) -> None:
    for command in before:
        assert machine.deploy(command).returncode == 0
    done = machine.deploy(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("::error::") and done.stderr.count("\n") == 1
    assert message in done.stderr
