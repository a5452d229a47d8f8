#!/usr/bin/env bash
# Pretrains on several machines; see --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.bash"

usage() {
    cat <<'END'
Pretrains on several machines, all ranks in one job.

usage: scripts/pretrain_multinode.sh --hostfile FILE [options] [--config FILE.yaml] [KEY=VALUE ...]
       scripts/pretrain_multinode.sh --no_ssh --nnodes N --node_rank R --master_addr A [options] [...]

  --hostfile FILE    one line a node, as DeepSpeed has it: HOST slots=RANKS. Starts all nodes by ssh (no passwords),
                     in this folder: repository, environment, corpora and base have the same paths everywhere
  --no_ssh           starts this node alone; call it once on each node, with the same arguments but for --node_rank
  --nnodes N         number of nodes
  --node_rank R      number of this node, from 0; node 0 writes the run
  --master_addr A    node 0 as the others reach it; with --hostfile its first host
  --master_port P    a free port there [29500]
  --gpus N           ranks of every node, one a GPU; without it all GPUs of this machine
  --ranks N[,N...]   the same for nodes without GPUs; a list when the nodes differ
  --config, KEY=VALUE   as for momo pretrain

Ranks are numbered node by node. A signal (SIGTERM, SIGUSR1, Ctrl-C) to any node, or to the command with the hostfile,
saves the state on all and exits 0 (130 after Ctrl-C); the same command continues the run, on any number of nodes. When
a rank fails its node ends the others, and exits with its code. With --no_ssh, end the other nodes yourself when node 0
refuses to start.
MOMO names the momo command, MOMO_SSH the ssh command [ssh]; PATH, LD_LIBRARY_PATH, DS_ACCELERATOR and variables named
NCCL_*, GLOO_*, TORCH_*, OMP_*, PYTHON*, CUDA_* and AWS_* are passed on to the nodes.
END
}

hostfile="" no_ssh="" nnodes="" node_rank="" master_addr="" master_port=29500 gpus="" ranks="" follow="" arguments=()
while (($#)); do
    case $1 in
        -h | --help) usage && exit 0 ;;
        --hostfile | --nnodes | --node_rank | --master_addr | --master_port | --gpus | --ranks)
            need_value "$1" $#
            declare "${1#--}=$2"
            shift 2
            ;;
        --no_ssh) no_ssh=1 && shift ;;
        --follow_stdin) follow=1 && shift ;; # how --hostfile reaches its nodes
        *) arguments+=("$1") && shift ;;
    esac
done
need_number --master_port "$master_port"

# --- one node -------------------------------------------------------------------------------------------------------

# Reads signals from the ssh connection; when that breaks, the state is saved as on SIGTERM.
follow_stdin() {
    local word
    while read -r word; do
        if [[ $word == KILL ]]; then signal_all KILL; else kill -s TERM $$; fi
    done
    kill -s TERM $$
}

# Sets each[] to the number of ranks of every node.
count_ranks() {
    local number
    IFS=, read -ra each <<<"$ranks"
    for number in "${each[@]}"; do need_number --ranks "$number"; done
    if ((${#each[@]} == 1)); then
        for ((number = 1; number < nnodes; number++)); do each+=("${each[0]}"); done
    fi
    ((${#each[@]} == nnodes)) || fail "ranks and nodes do not fit" "--ranks $ranks, --nnodes $nnodes" \
        "one number, or one for each node" "correct one of them"
}

start_node() {
    local first=0 world=0 node number here
    [[ -n $nnodes && -n $node_rank && -n $master_addr ]] || fail "the nodes are not described" \
        "--nnodes '$nnodes' --node_rank '$node_rank' --master_addr '$master_addr'" \
        "--no_ssh needs all three, on every node" "see --help"
    need_number --nnodes "$nnodes"
    if [[ ! $node_rank =~ ^[0-9]+$ ]] || ((node_rank >= nnodes)); then
        fail "--node_rank is out of range" "$node_rank" "from 0 to $((nnodes - 1)), a different one on every node" \
            "correct it"
    fi
    here=$(count_items "$(list_gpus)")
    ranks=${ranks:-${gpus:-$here}}
    [[ $ranks != 0 ]] || fail "the number of ranks is not known" "no GPU was found" \
        "one rank a GPU, or as many as --ranks says" "give --ranks N"
    count_ranks
    ((here == 0 || each[node_rank] <= here)) || fail "there are not so many GPUs" \
        "${each[node_rank]} ranks, $here GPUs on node $node_rank" "one rank a GPU" "give a smaller --gpus"
    for ((node = 0; node < nnodes; node++)); do
        ((node >= node_rank)) || first=$((first + each[node]))
        world=$((world + each[node]))
    done
    find_momo
    export MASTER_ADDR=$master_addr MASTER_PORT=$master_port WORLD_SIZE=$world
    export LOCAL_SIZE=${each[node_rank]} LOCAL_WORLD_SIZE=${each[node_rank]} CROSS_RANK=$node_rank CROSS_SIZE=$nnodes
    pass_on_signals
    for ((number = 0; number < each[node_rank]; number++)); do
        RANK=$((first + number)) LOCAL_RANK=$number "$momo" pretrain ${arguments[@]+"${arguments[@]}"} "ranks=$world" \
            </dev/null 3<&- &
        pids+=($!)
        labels+=("rank $((first + number)) on node $node_rank ($(hostname))")
    done
}

# --- all nodes by ssh -----------------------------------------------------------------------------------------------

# Sets hosts[] and each[] from the hostfile.
read_hostfile() {
    local line number=0
    [[ -f $hostfile ]] || fail "the hostfile does not exist" "$hostfile" "one line a node: HOST slots=RANKS" "write it"
    while IFS= read -r line || [[ -n $line ]]; do
        number=$((number + 1)) line=${line%%#*}
        [[ -n ${line//[[:space:]]/} ]] || continue
        [[ $line =~ ^[[:space:]]*([^[:space:]]+)[[:space:]]+slots=([1-9][0-9]*)[[:space:]]*$ ]] || fail \
            "a line of the hostfile cannot be read" "$hostfile, line $number: '$line'" "HOST slots=RANKS" "correct it"
        hosts+=("${BASH_REMATCH[1]}") each+=("${BASH_REMATCH[2]}")
    done <"$hostfile"
    ((${#hosts[@]})) || fail "the hostfile names no host" "$hostfile" "one line a node: HOST slots=RANKS" "write it"
}

# remote_command NODE: what ssh runs there, quoted for its shell.
remote_command() {
    local name exports=()
    while IFS= read -r name; do
        case $name in
            NCCL_* | GLOO_* | TORCH_* | OMP_* | PYTHON* | AWS_* | CUDA_* | DS_ACCELERATOR | PATH | LD_LIBRARY_PATH)
                exports+=("$name=${!name}") ;;
        esac
    done < <(compgen -e)
    local list
    list=$(IFS=, && printf '%s' "${each[*]}")
    printf 'cd %q && exec env' "$PWD"
    printf ' %q' ${exports[@]+"${exports[@]}"} "MOMO=$momo" bash "$home/scripts/pretrain_multinode.sh" --no_ssh \
        --follow_stdin --nnodes "${#hosts[@]}" --node_rank "$1" --master_addr "$master_addr" \
        --master_port "$master_port" --ranks "$list" ${arguments[@]+"${arguments[@]}"}
}

# The nodes are told signals through their standard input, which ssh carries; a signal to ssh would not get there.
start_nodes() {
    local node fifo control fd
    [[ -z $nnodes$node_rank$gpus$ranks ]] || fail "options do not fit together" \
        "--hostfile with --nnodes, --node_rank, --gpus or --ranks" "the hostfile says which nodes and how many ranks" \
        "leave them out"
    read_hostfile
    find_momo
    master_addr=${master_addr:-${hosts[0]}}
    read -ra ssh <<<"${MOMO_SSH:-ssh}"
    control=$(mktemp -d)
    pass_on_signals
    for node in "${!hosts[@]}"; do
        fifo=$control/$node
        mkfifo "$fifo"
        (
            # Held open here, the other nodes would not see this command end.
            for fd in ${controls[@]+"${controls[@]}"}; do exec {fd}>&-; done
            # In a group of its own, or Ctrl-C would cut the connection.
            exec setsid "${ssh[@]}" -o BatchMode=yes -o ServerAliveInterval=30 "${hosts[node]}" "$(remote_command "$node")" \
                <"$fifo"
        ) &
        pids+=($!)
        labels+=("node $node (${hosts[node]})")
        exec {fd}>"$fifo"
        controls+=("$fd")
    done
    rm -r "$control"
}


hosts=() each=() controls=()
if [[ -n $hostfile && -z $no_ssh ]]; then
    trap '' PIPE
    # Takes the place of the function of launch.bash.
    signal_all() {
        local fd
        for fd in "${controls[@]}"; do { printf '%s\n' "$1" >&"$fd"; } 2>/dev/null || true; done
    }
    start_nodes
elif [[ -n $no_ssh && -z $hostfile ]]; then
    exec 3<&0
    start_node
    if [[ -n $follow ]]; then
        follow_stdin <&3 &
        follower=$!
    fi
else
    fail "it is not said how the nodes are started" "--hostfile '$hostfile', --no_ssh ${no_ssh:-not} given" \
        "one of the two" "see --help"
fi
code=0
wait_together || code=$?
[[ -z ${follower:-} ]] || kill "$follower" 2>/dev/null || true
if ((code && code != 2)) && [[ -z $stopping ]]; then
    echo "momo: the same command continues the run from its last state" >&2
fi
exit "$code"
