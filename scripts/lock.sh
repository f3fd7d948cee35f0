#!/bin/sh
# Writes requirements-cpu.lock and requirements-cuda.lock: what pretrain runs with, S3 included, with the hash of every
# file, for images and for installing with `pip install --require-hashes`. The versions are those of requirements.lock.
# `make locks` runs it.
#
# Needs uv (pip install uv) and PyPI. torch for the CPU is a build of its own, torch==VERSION+cpu, which PyPI does not have:
#   CPU_TORCH=/folder/or/page/with/its/wheels make locks
set -eu
cd "$(dirname "$0")/.."

uv=$(command -v uv || echo .venv/bin/uv)
torch=$(grep '^torch==' requirements.lock)
overrides=$(mktemp)
trap 'rm -f "$overrides"' EXIT

lock() { # KIND TORCH [OPTION...]
    kind=$1
    echo "$2" >"$overrides"
    shift 2
    {
        echo "# What pretrain runs with, torch for $kind, with hashes (Python 3.11, Linux): written by \`make locks\`."
        "$uv" pip compile --quiet --no-header --no-annotate --generate-hashes --no-emit-index-url --no-emit-find-links \
            --python-version 3.11 --python-platform linux --overrides "$overrides" --constraints requirements.lock \
            --extra s3 "$@" pyproject.toml
    } >"requirements-$kind.lock.partial"
    mv "requirements-$kind.lock.partial" "requirements-$kind.lock"
    echo "requirements-$kind.lock: $(grep -c '==' "requirements-$kind.lock") packages"
}

lock cuda "$torch"
lock cpu "$torch+cpu" --extra cpu --find-links "${CPU_TORCH:?names no folder or page with the wheels of $torch+cpu}"
