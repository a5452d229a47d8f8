#!/usr/bin/env bash
# Makes the environment momo runs in: a virtual environment with momo and all its extras, and the system's GDAL.
# Running it again when nothing changed takes a second.
#
#   MOMO_VENV    where the virtual environment is made (default: .venv in the repository)
#   MOMO_PYTHON  the Python it is made from (default: python3; 3.10 or newer)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${MOMO_VENV:-$root/.venv}
python=${MOMO_PYTHON:-python3}
stamp=$venv/momo-setup.stamp

say() { printf 'setup: %s\n' "$*"; }

# What decides the environment's contents, and which checkout is installed in it.
fingerprint() {
    { cat "$root/setup.cfg" "$root/pyproject.toml" "$root/scripts/setup.sh"; echo "$root"; } | sha256sum | cut -d' ' -f1
}

if [[ -f $stamp && $(cat "$stamp") == "$(fingerprint)" && -x $venv/bin/momo ]]; then
    say "ready: $venv"
    exit 0
fi

install_gdal() {
    if command -v gdal-config >/dev/null && command -v g++ >/dev/null; then
        return
    fi
    local elevate=""
    if [[ $(id -u) -ne 0 ]]; then
        if command -v sudo >/dev/null && sudo -n true 2>/dev/null; then elevate="sudo"; else elevate="no"; fi
    fi
    if command -v apt-get >/dev/null && [[ $elevate != no ]]; then
        say "installing libgdal with apt (a minute)"
        $elevate apt-get update -qq
        DEBIAN_FRONTEND=noninteractive $elevate apt-get install -y -qq libgdal-dev g++ >/dev/null
        return
    fi
    cat >&2 <<'END'
setup: the GDAL library (libgdal with its headers) and a C++ compiler are needed and not here.
Install them with one of these, then run the same command again:
    apt:    sudo apt-get install libgdal-dev g++
    conda:  conda install -c conda-forge libgdal gxx
    brew:   brew install gdal
END
    exit 2
}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    printf 'setup: %s is not Python 3.10 or newer; set MOMO_PYTHON to one that is\n' "$python" >&2
    exit 2
fi
install_gdal

if [[ ! -x $venv/bin/python ]]; then
    say "making $venv"
    "$python" -m venv "$venv"
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }

# GDAL's Python package must be of the library's version and is compiled against numpy, so both come first.
wanted=$(gdal-config --version)
if [[ $("$venv/bin/python" -c 'from osgeo import gdal, gdal_array; print(gdal.__version__)' 2>/dev/null) != "$wanted" ]]; then
    say "compiling the Python package of GDAL $wanted"
    pip install "setuptools<70" wheel "numpy>=1.26,<2.4"
    pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps "GDAL==$wanted"
fi

say "installing momo with all extras (PyTorch among them: some minutes the first time)"
pip install --editable "${root}[all]"

# DeepSpeed compiles its shared-memory collectives at first use; better here than in the first training run.
say "compiling DeepSpeed's collectives for the CPU (once)"
DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} "$venv/bin/python" - >/dev/null 2>&1 <<'END' || say "skipped: they are compiled in the first run"
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

ShareMemCommBuilder().load()
END

"$venv/bin/python" -c 'from osgeo import gdal_array; import momo'
fingerprint >"$stamp"
say "ready: $venv"
