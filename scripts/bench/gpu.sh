#!/usr/bin/env bash
# Measures pretraining on a GPU; see --help.
set -euo pipefail

usage() {
    cat <<'END'
Measures pretraining on one GPU: ViT-B/16 and ViT-L/16 at 224 px in bf16, batch sizes up to the end of the memory, with
and without compilation and activation checkpointing; then the real trainer and loader on a generated corpus.

usage: scripts/bench/gpu.sh [--wheels DIR] [--out DIR] [options of gpu.py]

  --wheels DIR   works without a network: makes an environment in OUT/venv from the wheels in DIR and what Python has
                 already. Fill DIR on a machine of the same kind, in momo's repository, with
                     pip wheel --wheel-dir DIR '.[pretrain]' setuptools
                 Without this option the present environment is used
  --out DIR      where gpu.json and gpu.md go [bench-gpu]
  options of gpu.py: --models base,large  --modes plain,compile,checkpointing,both  --first-batch 64
                 --max-batch 4096  --steps 10  --workers 0,4,8  --peak TFLOPS  --device cpu (a trial with a pico model)

MOMO_PYTHON names the Python to use [python3]. gpu.json is written after every measurement.
END
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${MOMO_PYTHON:-python3} wheels="" out=bench-gpu rest=()
while (($#)); do
    case $1 in
        -h | --help) usage && exit 0 ;;
        --wheels | --out)
            if (($# < 2)); then
                echo "momo: error: an option has no value: $1. Rule: $1 is followed by a folder. Next: see --help." >&2
                exit 2
            fi
            declare "${1#--}=$2"
            shift 2
            ;;
        *) rest+=("$1") && shift ;;
    esac
done
mkdir -p "$out"
if [[ -n $wheels ]]; then
    if ! compgen -G "$wheels/*.whl" >/dev/null; then
        echo "momo: error: there are no wheels: $wheels. Rule: the folder holds .whl files. Next: see --help." >&2
        exit 2
    fi
    "$python" -m venv --system-site-packages "$out/venv"
    python=$out/venv/bin/python
    # Built from a copy, so that nothing is left in the repository.
    copy=$(mktemp -d)
    trap 'rm -rf "$copy"' EXIT
    cp -r "$root"/{momo,data_prep,merge,eval,setup.cfg,pyproject.toml,README.md,LICENSE} "$copy"
    pip() { "$python" -m pip --disable-pip-version-check --quiet install --no-index --find-links "$wheels" "$@"; }
    pip setuptools
    pip --no-build-isolation "${copy}[pretrain]"
fi
"$python" "$root/scripts/bench/gpu.py" --out "$out" ${rest[@]+"${rest[@]}"}
