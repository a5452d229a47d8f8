# shellcheck shell=bash
# What the scripts that start pretraining share; it is sourced, not run.
#
# Signals: momo's ranks save their state on SIGTERM and SIGUSR1 and exit 0, on Ctrl-C 130. DeepSpeed's and PyTorch's launchers
# kill ranks some seconds after a SIGTERM, end with an error code, and die of SIGUSR1, leaving the ranks behind. So ranks
# are started here, with the same environment variables.

home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# fail WHAT SEEN RULE NEXT: an error in momo's form, exit code 2.
fail() {
    printf 'momo: error: %s: %s. Rule: %s. Next: %s.\n' "$@" >&2
    exit 2
}

# need_value OPTION COUNT: an option is followed by its value.
need_value() {
    (($2 > 1)) || fail "an option has no value" "$1" "$1 is followed by its value" "see --help"
}

# need_number OPTION VALUE: a whole number from 1 on.
need_number() {
    [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1 is no number" "'$2'" "a whole number from 1 on" "see --help"
}

# Sets momo to the command: $MOMO, else the one on PATH, else the repository's environment.
find_momo() {
    momo=${MOMO:-$(command -v momo || true)}
    [[ -n $momo || ! -x $home/.venv/bin/momo ]] || momo=$home/.venv/bin/momo
    momo=$(command -v "${momo:-momo}") || fail "momo is not installed here" "MOMO='${MOMO:-}', PATH=$PATH" \
        "\$MOMO, PATH or the repository's .venv has it" "run scripts/setup.sh, or activate its environment"
}

# Prints the GPUs this process may use, by comma; nothing when there is none.
list_gpus() {
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        printf '%s' "$CUDA_VISIBLE_DEVICES"
    elif command -v nvidia-smi >/dev/null; then
        { nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null || true; } | paste -sd, -
    fi
}

# count_items A,B,C: how many there are.
count_items() {
    local -a items=()
    IFS=, read -ra items <<<"$1"
    printf '%d' "${#items[@]}"
}

# --- processes that are passed signals and waited for ---------------------------------------------------------------

pids=()     # processes started
labels=()   # what each is, for messages
codes=()    # their exit codes, once they have ended
stopping="" # the signal that came, if one did

# signal_all SIGNAL: to every process started that still runs.
signal_all() {
    local pid
    for pid in ${pids[@]+"${pids[@]}"}; do kill -s "$1" "$pid" 2>/dev/null || true; done
}

# A second Ctrl-C ends them without saving, as momo's own second Ctrl-C does.
_pass_on() {
    if [[ $1 == INT && $stopping == INT ]]; then
        signal_all KILL
    else
        stopping=$1
        signal_all TERM
    fi
}

pass_on_signals() {
    local name
    # shellcheck disable=SC2064 # the name is meant to be filled in now
    for name in TERM USR1 INT; do trap "_pass_on $name" "$name"; done
}

# _collect: takes the exit codes of processes that have ended; true while some run.
_collect() {
    local number status alive=1
    for number in "${!pids[@]}"; do
        [[ -z ${codes[number]:-} ]] || continue
        if kill -0 "${pids[number]}" 2>/dev/null; then
            alive=0
            continue
        fi
        status=0
        wait "${pids[number]}" || status=$?
        codes[number]=$status
        ((status < 129)) || [[ -n $stopping ]] || printf 'momo: error: a process died: %s, signal %s.\n' \
            "${labels[number]}" "$(kill -l "$status")" >&2
    done
    return "$alive"
}

_first_failure() {
    local number
    for number in "${!codes[@]}"; do ((!codes[number])) || return "${codes[number]}"; done
}

# Waits for all, one failing or not. Polls, because a signal that comes while bash waits would end the waiting.
wait_each() {
    while _collect; do sleep 0.2; done
}

# Waits for all; when one fails the others, which would wait for it for ever, are told to end and after 30 s made to.
# After a signal none is hurried: saving may take longer. Returns the exit code of the one that failed first, or 0.
wait_together() {
    local code=0 deadline=""
    while _collect; do
        if [[ -n $stopping ]]; then
            :
        elif ((!code)); then
            _first_failure || {
                code=$?
                deadline=$((SECONDS + 30))
                signal_all TERM
            }
        elif ((SECONDS > deadline)); then
            signal_all KILL
        fi
        sleep 0.2
    done
    ((code)) || _first_failure || code=$?
    [[ $stopping != INT || $code -ne 0 ]] || code=130
    return "$code"
}

# --- what a run says of itself --------------------------------------------------------------------------------------

# run_samples RUN: samples of its newest state; 0 when there is none.
run_samples() {
    local samples=""
    [[ ! -f $1/summary.json ]] || samples=$(sed -n 's/^  "samples": \([0-9]*\).*/\1/p' "$1/summary.json")
    printf '%d' "${samples:-0}"
}

# run_complete RUN: true when it has reached its end.
run_complete() {
    [[ -f $1/summary.json ]] && grep -q '^  "complete": true' "$1/summary.json"
}
