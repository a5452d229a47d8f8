#!/usr/bin/env bash
# Pretrains on this machine; see --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.bash"

usage() {
    cat <<'END'
Pretrains on this machine: one rank a GPU, or as many as asked for.

usage: scripts/pretrain.sh [--gpus N | --ranks N] [--config FILE.yaml] [KEY=VALUE ...]

  --gpus N    use the first N GPUs (of CUDA_VISIBLE_DEVICES, when that is set); without it all of them
  --ranks N   N ranks, for a machine without a GPU; without it what the configuration says
  --config, KEY=VALUE   as for momo pretrain; momo pretrain --show-config lists every key

SIGTERM, SIGUSR1 and Ctrl-C save the state; the same command continues the run. Exit codes are momo's: 0 done or
stopped by a signal, 130 after Ctrl-C, 2 something you can mend, 1 a bug. MOMO names the momo command to use.

examples:
  scripts/pretrain.sh --config configs/pretrain.yaml out=runs/ctx data.corpora=[corpora/ctx]
  scripts/pretrain.sh --ranks 2 out=runs/try data.corpora=[corpora/ctx] model.size=pico train.precision=fp32
END
}

gpus="" ranks="" arguments=()
while (($#)); do
    case $1 in
        -h | --help) usage && exit 0 ;;
        --gpus) need_value "$1" $# && gpus=$2 && shift 2 ;;
        --ranks) need_value "$1" $# && ranks=$2 && shift 2 ;;
        *) arguments+=("$1") && shift ;;
    esac
done
[[ -z $gpus || -z $ranks ]] || fail "both --gpus and --ranks are given" "--gpus $gpus --ranks $ranks" \
    "--gpus on a machine with GPUs, --ranks on one without" "leave one out"
[[ -z $gpus ]] || need_number --gpus "$gpus"
[[ -z $ranks ]] || need_number --ranks "$ranks"

here=$(count_items "$(list_gpus)")
if [[ -n $gpus ]] && ((gpus > here)); then
    fail "there are not so many GPUs" "--gpus $gpus, $here found" "one rank a GPU" \
        "use --gpus $here or less, or --ranks on a machine without a GPU"
fi
[[ -z $ranks || $here -eq 0 || $ranks -le $here ]] || fail "there are more ranks than GPUs" \
    "--ranks $ranks, $here GPUs" "one rank a GPU" "use --gpus $here or less, or hide them with CUDA_VISIBLE_DEVICES="
count=${gpus:-$ranks}
for argument in ${arguments[@]+"${arguments[@]}"}; do
    [[ $argument != ranks=* ]] || [[ -z $count ]] || fail "the number of ranks is given twice" \
        "$argument and $count" "one of ranks=, --gpus and --ranks" "leave ranks= out"
    [[ $argument != ranks=* ]] || count=${argument#ranks=}
done
[[ -n $count || $here -eq 0 ]] || count=$here
find_momo
# momo starts its ranks itself and passes signals on to them. The deepspeed command would not: it dies of SIGTERM and
# SIGUSR1 while its ranks run on (tried with DeepSpeed 0.19.8).
exec "$momo" pretrain ${arguments[@]+"${arguments[@]}"} ${count:+"ranks=$count"}
