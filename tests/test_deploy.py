"""The deployment workflow, run for real by act, on a VM that is a temporary home folder."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytestmark = pytest.mark.deploy

PROJECT = Path(__file__).parent.parent
WORKFLOW = ".github/workflows/deploy-and-run.yml"
[UPLOAD] = re.findall(r"actions/upload-artifact@\w+", (PROJECT / WORKFLOW).read_text())
# What the real action would upload is copied to a folder instead.
STAND_IN = """
name: stand-in for upload-artifact
inputs: {name: {required: true}, path: {required: true}, retention-days: {required: true}}
runs:
  using: composite
  steps:
    - shell: bash
      env: {FILES: "${{ inputs.path }}"}
      run: cp "$FILES"/* "$ARTIFACT"
"""


class Outcome(NamedTuple):
    code: int
    output: str
    artifact: Sequence[str]
    record: Any


@functools.cache
def pip_cache() -> str:
    """The folder of packages that are not downloaded anew for each home."""
    return subprocess.check_output([sys.executable, "-m", "pip", "cache", "dir"], text=True).strip()


@dataclass(frozen=True)
class VM:
    home: Path
    repository: Path
    artifact: Path
    action: Path

    def command(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        outer = ("PIPELINE_", "GITHUB_", "SPARK_", "JAVA_", "RUNNER_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
        own = {"HOME": str(self.home), "ARTIFACT": str(self.artifact), "PIP_CACHE_DIR": pip_cache()}
        return subprocess.run(
            command,
            env=kept | own | variables,
            cwd=self.repository,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
            check=False,
        )

    def commit(self, message: str) -> str:
        self.command("git", "add", "--all").check_returncode()
        self.command(
            "git", "-c", "user.name=x", "-c", "user.email=x@example.com", "commit", "-qm", message
        ).check_returncode()
        return self.command("git", "rev-parse", "HEAD").stdout.strip()

    def act(self, event: str, *flags: str, **variables: str) -> Outcome:
        """Runs the workflow, as the runner does when the event happens."""
        shutil.rmtree(self.artifact, ignore_errors=True)
        self.artifact.mkdir()
        done = self.command(
            str(Path(sys.executable).with_name("act")),
            event,
            *("--workflows", WORKFLOW, "--platform", "self-hosted=-self-hosted"),
            *("--action-offline-mode", "--local-repository", f"{UPLOAD}={self.action}"),
            *flags,
            **variables,
        )
        files = sorted(path.name for path in self.artifact.iterdir())
        records = [json.loads((self.artifact / name).read_text()) for name in files if name.endswith(".json")]
        return Outcome(done.returncode, done.stdout, files, records[-1] if records else None)

    @property
    def in_use(self) -> str:
        return (self.home / "pipeline/current").readlink().name

    @property
    def published(self) -> str:
        return (self.home / "pipeline-data/current").readlink().name


@pytest.fixture(scope="module")
def vm(tmp_path_factory: pytest.TempPathFactory) -> VM:
    """A VM to which nothing was deployed yet, with small data."""
    folder = tmp_path_factory.mktemp("vm")
    vm = VM(folder / "home", folder / "repository", folder / "artifact", folder / "action")
    for path in (vm.home, vm.repository, vm.action):
        path.mkdir()
    (vm.action / "action.yml").write_text(STAND_IN)
    listed = subprocess.check_output(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=PROJECT, text=True
    )
    for name in filter(None, listed.split("\0")):
        (vm.repository / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / name, vm.repository / name)
    vm.command("git", "init", "--quiet", "--initial-branch", "main").check_returncode()
    vm.commit("The project")
    return vm


# What the VM's team wrote into the runner's .env file.
SMALL = {
    "PIPELINE_NUM_CUSTOMERS": "200",
    "PIPELINE_NUM_TRANSACTIONS": "1000",
    "PIPELINE_NUM_PRODUCTS": "20",
    "PIPELINE_FAST_START": "no",
}


@pytest.fixture(scope="module")
def first(vm: VM) -> Outcome:
    return vm.act("push", **SMALL)


def test_first_push_makes_everything(vm: VM, first: Outcome) -> None:
    assert first.code == 0, first.output
    assert "Created the environment" in first.output
    assert (vm.home / "spark-env/bin/python").exists()
    assert list((vm.home / "pipeline-data/gold/customer_analytics").glob("*.parquet"))
    assert first.record["result"] == "succeeded"
    assert first.record["versions"]["pipeline"] == vm.in_use, "the record names the commit that ran"
    run_id = first.record["run_id"]
    files = ["pipeline.log", "report.html", f"{run_id}.json", f"{run_id}.spark.log"]
    assert first.artifact == sorted(files), "and no tables"
    assert f"## ✅ Pipeline run {run_id}: succeeded" in first.output, "the job summary"
    assert "::error::" not in first.output


def test_second_push_reuses_the_environment(vm: VM, first: Outcome) -> None:
    before = (vm.home / "spark-env/bin").stat()
    (vm.repository / "README.md").write_text("Another commit\n")
    commit = vm.commit("Another")
    second = vm.act("push", **SMALL)
    assert second.code == 0, second.output
    assert "Reused the environment" in second.output
    assert (vm.home / "spark-env/bin").stat() == before
    assert vm.in_use == commit
    assert second.record["kind"] == "unchanged", "on the same day, with the same module, there is nothing to compute"
    assert second.record["run_id"] > vm.published == first.record["run_id"]


def test_refused_run_leaves_release_and_data(vm: VM, first: Outcome) -> None:
    in_use, published = vm.in_use, vm.published
    outcome = vm.act("push", **SMALL, PIPELINE_MAX_QUARANTINE_RATE="0", PIPELINE_INCREMENTAL="no")
    assert outcome.code == 1, outcome.output
    assert (vm.in_use, vm.published) == (in_use, published)
    assert outcome.record["result"] == "refused"
    assert "pipeline.log" in outcome.artifact
    annotation = (
        r"::error::GATE MISSED, .*transactions\.max_quarantine_rate \(\d+ of 1,000 rows are quarantined, 1.\d\d%25"
    )
    assert re.search(annotation, outcome.output)
    assert f"## ⛔ Pipeline run {outcome.record['run_id']}: refused" in outcome.output


class Tried(NamedTuple):
    before: tuple[str, str]  # the release in use, and the published run
    package: Path
    outcome: Outcome


@pytest.fixture(scope="module")
def tried(vm: VM, first: Outcome) -> Tried:
    """A commit that is tried by hand, with inputs and as a dry run, where a package of the environment is missing."""
    before = vm.in_use, vm.published
    package = next((vm.home / "spark-env/lib").glob("python*/site-packages/findspark.py"))
    package.unlink()
    (vm.repository / "README.md").write_text("A commit to try\n")
    vm.commit("To try")
    inputs = {"num_customers": "40", "num_transactions": "90", "as_of_date": "2026-03-04", "dry_run": "true"}
    flags = [part for name, value in inputs.items() for part in ("--input", f"{name}={value}")]
    return Tried(before, package, vm.act("workflow_dispatch", *flags, **SMALL))


def test_broken_environment_is_recreated(tried: Tried) -> None:
    assert tried.outcome.code == 0, tried.outcome.output
    assert "Created the environment" in tried.outcome.output
    assert "it was broken" in tried.outcome.output
    assert tried.package.exists()


def test_by_hand_with_inputs_and_as_a_dry_run(vm: VM, tried: Tried) -> None:
    assert tried.outcome.code == 0, tried.outcome.output
    config = tried.outcome.record["config"]
    assert (config["num_customers"], config["num_transactions"], config["num_products"]) == (40, 90, 20)
    assert config["as_of_date"] == "2026-03-04"
    assert (vm.in_use, vm.published) == tried.before


def test_input_that_cannot_be_used(vm: VM, first: Outcome) -> None:
    hostile = '1; touch "$HOME/taken"'
    outcome = vm.act("workflow_dispatch", "--input", f"as_of_date={hostile}", **SMALL)
    assert outcome.code == 1
    assert "::error::--as-of-date: as_of_date must be a date such as 2026-01-31" in outcome.output
    assert "## ❌ Nothing was run" in outcome.output
    assert not (vm.home / "taken").exists()


def test_only_main_is_deployed(vm: VM, first: Outcome) -> None:
    vm.command("git", "switch", "--quiet", "--create", "feature").check_returncode()
    (vm.repository / "README.md").write_text("Not merged\n")
    vm.commit("Not merged")
    outcome = vm.act("workflow_dispatch", **SMALL)
    vm.command("git", "switch", "--quiet", "main").check_returncode()
    assert "Environment setup" not in outcome.output
    assert not outcome.artifact


# What follows needs no act: the script alone, with a stub for the pipeline and without its packages.

STUB = """import os, pathlib, sys
pathlib.Path("ran").write_text(" ".join([sys.executable, *sys.argv]))
print("the log")
sys.exit(int(os.environ.get("EXIT", "0")))
"""


@pytest.fixture
def bare(tmp_path: Path) -> VM:
    """A VM whose home has a space in its name and whose ~/pipeline lies on another disk."""
    vm = VM(tmp_path / "a home", tmp_path / "repository", tmp_path / "artifact", tmp_path)
    for path in (vm.home, vm.repository / ".github", tmp_path / "disk"):
        path.mkdir(parents=True)
    (vm.home / "pipeline").symlink_to(tmp_path / "disk")
    shutil.copy(PROJECT / ".github/deploy.sh", vm.repository / ".github")
    (vm.repository / "data_pipeline.py").write_text(STUB)
    (vm.repository / "requirements.txt").write_text("# nothing to download\n")
    vm.command("git", "init", "--quiet", "--initial-branch", "main").check_returncode()
    vm.commit("The project")
    return vm


def deploy(vm: VM, *steps: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The steps of the workflow, until one fails."""
    for step in steps or ("environment", "release", "run", "switch"):
        done = vm.command(".github/deploy.sh", step, RUNNER_TEMP=str(vm.artifact.parent), **variables)
        if done.returncode:
            break
        if step == "environment":  # the packages that pip would have installed
            [packages] = (vm.home / "pipeline/environments").glob(
                f"{done.stdout.split('/')[-1][:16]}/lib/*/site-packages"
            )
            (packages / "outer.pth").write_text(sysconfig.get_path("purelib"))
    return done


def test_script_from_nothing(bare: VM) -> None:
    (bare.home / "spark-env").mkdir()  # made by hand, before
    done = deploy(bare, DEPLOY_FLAG_NUM_CUSTOMERS="5", DEPLOY_FLAG_AS_OF_DATE="", SPARK_HOME="/nowhere")
    assert done.returncode == 0, done.stdout
    assert (bare.home / "ran").read_text().split(" ", 1)[1].endswith("/data_pipeline.py --num-customers 5")
    assert (bare.home / "spark-env/bin/python").exists()
    assert list(bare.home.glob("spark-env.before-*"))
    assert "Reused" in deploy(bare, "environment").stdout


def test_script_says_which_spark_is_missing(bare: VM) -> None:
    done = deploy(bare, "environment", "release", "run", SPARK_HOME="/nowhere")
    assert done.stdout.startswith("::warning::SPARK_HOME is ignored: there is no folder /nowhere\n")


def test_failing_code_with_new_requirements_leaves_the_release_before(bare: VM) -> None:
    deploy(bare).check_returncode()
    in_use, python = bare.in_use, (bare.home / "spark-env/bin").resolve()
    (bare.repository / "requirements.txt").write_text("# other ones\n")
    bare.commit("A mistake")
    assert deploy(bare, EXIT="3").returncode == 3
    assert bare.in_use == in_use
    assert (bare.home / "spark-env/bin").resolve() == python
    assert len(list((bare.home / "pipeline/environments").iterdir())) == 2


def test_last_releases_are_kept_and_can_be_returned_to(bare: VM) -> None:
    deploy(bare).check_returncode()
    unused = bare.home / "pipeline/environments/0123456789abcdef"
    unused.mkdir()
    commits = []
    for number in range(5):
        (bare.repository / "README.md").write_text(f"Commit {number}\n")
        commits.append(bare.commit(f"Commit {number}"))
        # The run of the fourth has failed.
        deploy(bare, "release", *(["switch"] if number != 3 else [])).check_returncode()
    releases = bare.home / "pipeline/releases"
    assert {path.name for path in releases.iterdir()} == {*commits[1:]}, "what failed may still be running"
    assert unused.exists(), "so may this be about to be used"
    for path in (releases / commits[3], unused):
        os.utime(path, (0, 0))
    deploy(bare, "switch").check_returncode()
    assert {path.name for path in releases.iterdir()} == {commits[1], commits[2], commits[4]}
    assert not unused.exists()

    def back(commit: str) -> subprocess.CompletedProcess[str]:
        return bare.command("sh", "-c", f"cd; pipeline/current/.github/deploy.sh switch {commit}")

    back(commits[1]).check_returncode()
    assert bare.in_use == commits[1]
    assert (bare.home / "spark-env/bin/python").exists()
    for gone in (commits[0], commits[3], "../releases/" + commits[2]):
        assert back(gone).returncode == 2
        assert bare.in_use == commits[1]


def test_same_commit_again_takes_back_what_was_changed_by_hand(bare: VM) -> None:
    deploy(bare).check_returncode()
    module = bare.home / "pipeline/current/data_pipeline.py"
    module.write_text("a quick fix")
    deploy(bare).check_returncode()
    assert module.read_text() == STUB


@pytest.mark.parametrize("step", ["environment", "run", "switch", "collect"])
def test_no_python(bare: VM, step: str) -> None:
    deploy(bare, "environment", "release").check_returncode()
    (bare.artifact.parent / "pipeline.log").touch()
    done = bare.command(".github/deploy.sh", step, "x", PYTHON="nopython", RUNNER_TEMP=str(bare.artifact.parent))
    assert done.returncode == 2, done.stdout
    if step != "switch":  # which refuses the commit x first
        assert done.stdout.startswith("::error::no Python 3.11 or newer found")


def test_checkout_of_another_commit(bare: VM) -> None:
    done = deploy(bare, "release", GITHUB_SHA="0" * 40)
    assert done.returncode == 2
    assert done.stdout.startswith("::error::the checkout is at commit ")


def test_collect_without_a_run(bare: VM) -> None:
    done = bare.command(".github/deploy.sh", "collect", "x", RUNNER_TEMP=str(bare.artifact.parent))
    assert (done.returncode, done.stdout) == (0, "No run was started\n")
