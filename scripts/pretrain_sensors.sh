#!/usr/bin/env bash
# Pretrains one model a sensor; see --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.bash"

usage() {
    cat <<'END'
Pretrains one model a sensor, all from one base, one after another or side by side on this machine.

usage: scripts/pretrain_sensors.sh --corpora DIR --runs DIR --base WEIGHTS [options]
                                   [--config FILE.yaml] [KEY=VALUE ...]

  --corpora DIR      folder or URL with one corpus a sensor: DIR/hirise, DIR/ctx, DIR/themis
  --runs DIR         the runs go to DIR/hirise and so on; with --parallel their output to DIR/hirise.log
  --base WEIGHTS     weights all start from: of momo pretrain init, or a checkpoint of a joint run
  --sensors A,B,C    names of the corpora and runs [hirise,ctx,themis]
  --sequential       one after another, each on all GPUs (the default)
  --parallel         side by side, each on its share of the GPUs, or of the processor's cores where there is no GPU
  --gpus N           GPUs to use in all; without it all there are
  --ranks N          ranks of each job on a machine without a GPU
  --config, KEY=VALUE   for every job, as for momo pretrain

The same command continues what is unfinished. A job that fails does not stop the others. SIGTERM, SIGUSR1 and Ctrl-C
save the state of what runs; nothing more is started. Ends with one line a job. Exit code: 0 all done or stopped by a
signal (130 after Ctrl-C), else that of the first job that failed.
END
}

corpora="" runs="" base="" sensors=hirise,ctx,themis parallel="" gpus="" ranks="" arguments=()
while (($#)); do
    case $1 in
        -h | --help) usage && exit 0 ;;
        --corpora | --runs | --base | --sensors | --gpus | --ranks)
            need_value "$1" $#
            declare "${1#--}=$2"
            shift 2
            ;;
        --sequential) parallel="" && shift ;;
        --parallel) parallel=1 && shift ;;
        out=* | base=* | data.corpora=*) fail "a key is the same for no two jobs, or for all" "$1" \
            "--runs, --base and --corpora say it" "leave it out" ;;
        *) arguments+=("$1") && shift ;;
    esac
done
[[ -n $corpora && -n $runs && -n $base ]] || fail "the jobs are not described" \
    "--corpora '$corpora' --runs '$runs' --base '$base'" \
    "all three; without a shared base the models cannot be merged" "see --help; momo pretrain init makes a base"
[[ -z $gpus ]] || need_number --gpus "$gpus"
[[ -z $ranks ]] || need_number --ranks "$ranks"
IFS=, read -ra names <<<"$sensors"
find_momo
export MOMO=$momo

# start_job NUMBER [WORD ...]: in the background, with words such as "taskset -c 0,1" before the command.
start_job() {
    local name=${names[$1]}
    "${@:2}" "$home/scripts/pretrain.sh" ${job_gpus:+--gpus "$job_gpus"} ${ranks:+--ranks "$ranks"} \
        ${arguments[@]+"${arguments[@]}"} "out=$runs/$name" "data.corpora=[$corpora/$name]" "base=$base" &
    pids+=($!)
    labels+=("$name")
}

# Sets cores[] to those this process may run on.
list_cores() {
    local ranges range
    ranges=$(sed -n 's/^Cpus_allowed_list:[[:space:]]*//p' /proc/self/status)
    for range in ${ranges//,/ }; do mapfile -t -O "${#cores[@]}" cores < <(seq "${range%-*}" "${range#*-}"); done
}

# deal COUNT JOB ITEM ...: the items of one of COUNT jobs, by comma.
deal() {
    local share=$((($# - 2) / $1))
    local items=("${@:3}")
    (IFS=, && printf '%s' "${items[*]:share*$2:share}")
}

start_side_by_side() {
    local count=${#names[@]} devices number place=()
    devices=$(list_gpus)
    local cards=() cores=()
    IFS=, read -ra cards <<<"$devices"
    [[ -z $gpus ]] || cards=("${cards[@]:0:gpus}")
    ((${#cards[@]} == 0 || ${#cards[@]} >= count)) || fail "there are too few GPUs to run side by side" \
        "${#cards[@]} for $count jobs" "at least one for each job" "use --sequential"
    job_gpus=$((${#cards[@]} / count))
    ((job_gpus)) || job_gpus=""
    list_cores
    mkdir -p "$runs"
    for number in "${!names[@]}"; do
        if [[ -n $job_gpus ]]; then
            place=(env "CUDA_VISIBLE_DEVICES=$(deal "$count" "$number" "${cards[@]}")")
        elif ((${#cores[@]} >= count)) && command -v taskset >/dev/null; then
            place=(taskset -c "$(deal "$count" "$number" "${cores[@]}")")
        fi
        echo "${names[number]}: starts${place[*]:+ with ${place[*]}}; output in $runs/${names[number]}.log"
        start_job "$number" ${place[@]+"${place[@]}"} >>"$runs/${names[number]}.log" 2>&1
    done
    wait_each
}

start_in_turn() {
    local number
    job_gpus=$gpus
    for number in "${!names[@]}"; do
        [[ -z $stopping ]] || return 0
        echo "--- ${names[number]} ($((number + 1)) of ${#names[@]})"
        start_job "$number"
        wait_each
    done
}

# tell NUMBER: one line about a job.
tell() {
    local run=$runs/${names[$1]} state loss
    case ${codes[$1]:-none} in
        none) state="not started" ;;
        0 | 13? | 143) if run_complete "$run"; then state=complete; else state=stopped; fi ;;
        *) state="FAILED (exit code ${codes[$1]})" ;;
    esac
    # Only our own signal is a stop.
    [[ $state != stopped || ${codes[$1]} -eq 0 || -n $stopping ]] || state="FAILED (exit code ${codes[$1]})"
    # The first loss of the line is that of all tiles.
    loss=$({ grep '"event": "val"' "$run/metrics.jsonl" 2>/dev/null || true; } | tail -n 1 |
        { grep -o '"loss": [^,}]*' || true; } | head -n 1 | cut -d ' ' -f 2)
    printf '%-10s %-28s %11d samples  val loss %-9.6s %s\n' "${names[$1]}" "$state" "$(run_samples "$run")" \
        "${loss:--}" "$run"
}

pass_on_signals
if [[ -n $parallel ]]; then start_side_by_side; else start_in_turn; fi
echo "---"
code=0
for number in "${!names[@]}"; do
    tell "$number"
    status=${codes[number]:-0}
    # Ended by our own signal before it could save: nothing is lost.
    [[ -z $stopping || $status -lt 129 ]] || status=0
    ((code)) || code=$status
done
[[ $stopping != INT || $code -ne 0 ]] || code=130
exit "$code"
