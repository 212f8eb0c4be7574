# What the templates share; sourced by them in the batch shell, which runs on the first node.
# shellcheck shell=bash
set -uo pipefail

say() { echo "[$(date '+%F %T')] $*"; }

die() {
    say "$*" >&2
    exit 1
}

# ---- Where things are

job=$SLURM_JOB_ID  # of one task of an array, too: the bare number may stand for the whole array
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
logs=$SLURM_SUBMIT_DIR/$SLURM_JOB_NAME-$job  # one log for each node; the job's own is beside the folder
mkdir -p "$logs" || die "$logs cannot be made: submit from a folder that all nodes can write"
# shellcheck source=slurm/site.sh
. "$DS_SFT_HOME/slurm/site.sh"
if [ -z "${PYTHON:-}" ]; then
    PYTHON=$(command -v python3)
    [ -n "${VIRTUAL_ENV:-}" ] || [ ! -x "$DS_SFT_HOME/.venv/bin/python" ] || PYTHON=$DS_SFT_HOME/.venv/bin/python
fi
export DS_SFT_HOME PYTHONFAULTHANDLER=1
if [ -f "$DS_SFT_HOME/ds_sft/train.py" ]; then  # a clone
    package=$DS_SFT_HOME
    program=("$DS_SFT_HOME/ds_sft/train.py")
    export PYTHONPATH=$DS_SFT_HOME${PYTHONPATH:+:$PYTHONPATH}
else  # `ds-sft init --slurm` has written the templates: the package is one of that Python's
    package=$("$PYTHON" -c 'import os, ds_sft; print(os.path.dirname(ds_sft.__file__))' 2>/dev/null) ||
        die "${PYTHON:-python3} has no ds_sft: name its environment in slurm/site.sh, or activate it before sbatch"
    program=(-m ds_sft train)
fi

# ---- Ranks

set_ranks() {
    gpus=${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-}}  # the second says that a job asked for none, the first not
    gpus=${gpus##*:}                                      # of KIND:NUMBER
    gpus=${gpus:-$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU')}
    ranks=$((gpus > 0 ? gpus : ${SLURM_NTASKS_PER_NODE:-1}))  # on a node
    cores=$((SLURM_CPUS_ON_NODE / ranks))                      # of a rank
    ((cores > 0)) || die "$ranks ranks on a node, but $SLURM_CPUS_ON_NODE cores: ask for more (--cpus-per-task)"
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000))  # below the ports that systems hand out by themselves
    export MASTER_ADDR MASTER_PORT
}

# What a reader of the log wants to know, by name: the whole environment would hold keys and tokens.
say_job() {
    say "Job $job ($SLURM_JOB_NAME), start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST"
    say "$SLURM_NNODES nodes x $ranks ranks ($gpus GPUs a node), $cores cores a rank; rank 0 at $MASTER_ADDR:$MASTER_PORT"
    say "Logs of the nodes: $logs/; Python: $PYTHON; code: $package"
    local name
    for name in CUDA_VISIBLE_DEVICES OMP_NUM_THREADS HF_HOME HF_HUB_OFFLINE TORCH_EXTENSIONS_DIR DS_SFT_CACHE \
        NCCL_DEBUG NCCL_SOCKET_IFNAME NCCL_IB_HCA NCCL_P2P_DISABLE GLOO_SOCKET_IFNAME SWANLAB_MODE VIRTUAL_ENV; do
        [ -z "${!name:-}" ] || say "  $name=${!name}"
    done
}

# on_ranks [FLAG...] -- ARGUMENT...: Python as one process for each rank. If one fails, Slurm ends all.
on_ranks() {
    local flags=() bind=()
    while [ "$1" != -- ]; do
        flags+=("$1")
        shift
    done
    shift
    ((gpus == 0)) || bind=(--gpu-bind=none)  # every rank sees all GPUs of its node and takes its own
    unset SLURM_CPUS_PER_GPU SLURM_MEM_PER_CPU SLURM_MEM_PER_GPU
    srun --nodes="$SLURM_NNODES" --ntasks=$((SLURM_NNODES * ranks)) --ntasks-per-node="$ranks" \
        --cpus-per-task="$cores" --distribution=block --mpi=none --export=ALL "${bind[@]}" \
        --kill-on-bad-exit=1 --wait=300 --label "${flags[@]}" \
        "${SRUN_FLAGS[@]}" "$DS_SFT_HOME/slurm/task.sh" "${CONTAINER[@]}" "$PYTHON" "$@"
}

# ---- A run that stops and goes on

# Slurm's USR1 (time limit) reaches this shell alone. The request goes to the ranks as a file: it is neither lost on a
# Python that is still starting, nor a second signal to one that has heard Slurm's own TERM.
export DS_SFT_STOP_FILE=$logs/stop
stop() {
    say "Slurm sent $1: asking the ranks to save and stop"
    : >"$DS_SFT_STOP_FILE"
}

# await PID: its exit code. `wait` returns early when a signal was handled.
await() {
    local code=0 last
    while kill -0 "$1" 2>/dev/null; do
        wait "$1"
        code=$?
    done
    wait "$1" 2>/dev/null  # it may have ended just after a signal; 127 says that its code is known already
    last=$?
    ((last == 127)) || code=$last
    return "$code"
}

requeue() { "$PYTHON" -m ds_sft.checkpoints.requeue "$1" --starts "$logs/starts.jsonl" "${@:2}"; }

# train CONFIG [--key value ...]
train() {
    [[ ${1:---} != --* ]] || die "usage: sbatch ... CONFIG.yaml [--key value ...]"
    local code
    rm -f "$DS_SFT_STOP_FILE"
    trap 'stop USR1' USR1  # first: without them either ends this shell, and with it the job
    trap 'stop TERM' TERM
    set_ranks
    say_job
    requeue begin --config "$@" || exit
    if [ "${DS_SFT_DOCTOR:-yes}" = yes ]; then
        on_ranks -- -m ds_sft doctor "$@" &
        await $! || give_up $? "The doctor found what would stop this run (DS_SFT_DOCTOR=no starts it all the same)"
    fi
    on_ranks --output="$logs/%N.log" --open-mode=append -- "${program[@]}" --config "$@" &
    await $!
    code=$?
    requeue end --config "$@"
    case $? in
        0) still_ours "$code" && go_on ;;
        3) ;;        # it was not stopped
        4) exit 1 ;; # no progress, which it has said
        *) give_up 1 "It could not be found out whether the run was stopped; nothing is requeued" ;;
    esac
    ((code == 0)) || give_up "$code" "The run failed; the first error is in $logs/" "$logs"/*.log
    say "The run is complete"
}

# give_up CODE MESSAGE [LOG...]: the end of a job that failed, unless it is not for this shell to say.
give_up() {
    local code=$1 message=$2
    shift 2
    still_ours "$code"
    if ! nodes_answer; then
        say "A node does not answer"
        go_on
    fi
    (($# == 0)) || tail -n 15 "$@"
    say "$message" >&2
    exit "$code"
}

# still_ours CODE: exits if somebody else has decided what becomes of the job: scancel, scontrol requeue, preemption.
still_ours() {
    local state
    state=$(job_state)
    [ -n "$state" ] || say "slurmctld does not answer: the job is taken to be running"
    [ "${state:-RUNNING}" = RUNNING ] && return
    say "The job is $state: Slurm decides what happens to it"
    exit "$1"
}

# job_state: empty if slurmctld did not answer for five minutes, as long as a restart or a failover takes.
job_state() {
    local state
    for _ in {1..20}; do
        state=$(scontrol show job "$job" 2>/dev/null | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p')
        [ -z "$state" ] || break
        sleep 15
    done
    echo "$state"
}

go_on() {
    say "Requeueing job $job"
    # A second time only if nobody was there to answer the first.
    scontrol requeue "$job" || { still_ours 0 && scontrol requeue "$job"; } ||
        die "Slurm refused to requeue (was the job submitted with --no-requeue?)"
    exit 0
}

nodes_answer() { timeout 60 srun --overlap --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --mpi=none true; }

# prepare CONFIG [--key value ...]
prepare() {
    say "Job $job ($SLURM_JOB_NAME) on $SLURM_JOB_NODELIST, $SLURM_CPUS_ON_NODE cores; Python: $PYTHON; code: $package"
    exec srun --nodes=1 --ntasks=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" --mpi=none --export=ALL --kill-on-bad-exit=1 \
        "${SRUN_FLAGS[@]}" "${CONTAINER[@]}" "$PYTHON" -m ds_sft prepare "$@"
}

# unless_given --KEY VALUE: adds a key to the array `keys` unless it is there.
unless_given() {
    local word
    for word in "${keys[@]}"; do
        [[ $word != "$1" && $word != "$1="* ]] || return 0
    done
    keys+=("$1" "$2")
}
