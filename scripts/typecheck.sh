#!/usr/bin/env bash
# Runs mypy over momo as it is installed: the stage folders of the top level seen as momo.data_prep, momo.merge, momo.eval.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
tree=$root/build/typed
rm -rf "$tree"
mkdir -p "$tree/momo"
ln -s "$root"/momo/* "$tree/momo/"
for stage in data_prep merge eval; do ln -s "$root/$stage" "$tree/momo/$stage"; done
cd "$tree"
mypy --config-file "$root/setup.cfg" --cache-dir "$root/.mypy_cache" momo
