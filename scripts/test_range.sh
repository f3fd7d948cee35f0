#!/bin/sh
# Runs the tests with the lowest, or the newest, releases that pyproject.toml admits, in an environment of its own:
#   scripts/test_range.sh lowest [argument of pytest...]        `make test-lowest` and `make test-newest` run it
# PYTHON=python3.12 takes another Python, WHEELS=FOLDER a folder with wheels beside PyPI. Needs uv (pip install uv), and several
# GB, since torch of PyPI is a build for CUDA.
set -eu
cd "$(dirname "$0")/.."

case ${1:-} in
lowest) resolution=lowest-direct ;;
newest) resolution=highest ;;
*)
    echo "error: ${1:-nothing} given; name lowest or newest" >&2
    exit 2
    ;;
esac
uv=$(command -v uv || echo .venv/bin/uv)
environment=build/$1-${PYTHON:-python3.11}
shift

"$uv" venv --quiet --clear --python "${PYTHON:-python3.11}" "$environment"
"$uv" pip install --quiet --compile-bytecode --python "$environment" --resolution "$resolution" ${WHEELS:+--find-links "$WHEELS"} -e '.[dev]'
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$environment/bin/pytest" -n 2 "$@"
