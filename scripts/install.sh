#!/bin/sh
# Sets up .venv with the packages of requirements.lock and, editable, this project. `make install` runs it.
# PYTHON names the interpreter, where the first suitable one is not wanted. A failure is one line and exit code 2.
set -u
cd "$(dirname "$0")/.." || exit 2

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

space() {
    df -Ph "$@" 2>/dev/null | awk 'NR == 2 { print $4 }'
}

# Runs a command silently; should it fail, says what was found, what is needed and what to do.
attempt() {
    output=$("$@" 2>&1) && return
    case $output in
    *"No space left on device"* | *"Disk quota exceeded"* | *"No usable temporary directory"*)
        tmp=${TMPDIR:-/tmp}
        fail "the disk is full: $(space .venv .) left for $PWD/.venv, $(space "$tmp") for temporary files in $tmp;" \
            "installing takes 3 GB (8 GB with torch for CUDA): make room, or set TMPDIR to a folder on a larger" \
            "disk, and repeat the command"
        ;;
    *"connection broken by"*"No matching distribution"* | *"Read timed out"* | *"Connection broken"*)
        reason=$(printf '%s\n' "$output" | sed -n "s/.*\[Errno [-0-9]*\] \([^']*\)'.*/\1/p" | tail -n 1)
        fail "no package index within reach (${reason:-connection lost}), and installing downloads from one: check" \
            "the network, or set HTTPS_PROXY to a proxy or PIP_INDEX_URL to a mirror, and repeat the command"
        ;;
    *)
        reason=$(printf '%s\n' "$output" | sed -n 's/^E[Rr][Rr][Oo][Rr]: //p' | tail -n 1)
        fail "setting up .venv failed: ${reason:-$output}; .venv/install.log has the details: mend the cause and" \
            "repeat the command"
        ;;
    esac
}

# The first Python that is new enough. Each is run, for a name on the PATH may be a shim with nothing behind it.
[ -n "${PYTHON:-}" ] && set -- "$PYTHON" || set -- python3.11 python3.12 python3.13 python3
probe='import platform, sys; print(platform.python_version()); sys.exit(sys.version_info < (3, 11))'
found="none of $* runs"
for python; do
    version=$("$python" -c "$probe" 2>/dev/null) && break
    [ -z "$version" ] || found="$python is $version"
    python=
done
[ -n "$python" ] ||
    fail "Python 3.11 or newer is needed, but $found; install it (on Debian 12 or newer: apt-get install" \
        "python3-venv), or name another with PYTHON=/path/to/python3.11"
"$python" -c 'from ensurepip import version; import venv' 2>/dev/null ||
    fail "$python ($version) has no venv module, which .venv is made with; install it (Debian: apt-get install" \
        "python${version%.*}-venv), or name another Python with PYTHON=/path/to/python3.11"

# What an interrupted run left is no base to build on: pip takes a half-written package for a whole one.
[ -e .venv/.incomplete ] && clear=--clear || clear=
attempt "$python" -m venv --without-pip $clear .venv
rm -f .venv/.installed
attempt touch .venv/.incomplete

echo "Installing $(grep -c == requirements.lock) pinned packages into .venv: this takes a few minutes, once."
attempt .venv/bin/python -m ensurepip --default-pip
attempt .venv/bin/python -m pip install --quiet --no-input --retries 2 --log .venv/install.log -r requirements.lock
attempt .venv/bin/python -m pip install --quiet --log .venv/install.log --no-deps --no-build-isolation -e .
mv .venv/.incomplete .venv/.installed
