#!/usr/bin/env bash
# Makes .venv, or brings it up to date: the pins of requirements/cpu.lock and this project, editable.
# A stamp in .venv says what it was made from; while that is unchanged, a call returns at once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV

uv_version=0.13.9
pytorch_cpu_index=https://download.pytorch.org/whl/cpu
stamp=.venv/gream-environment

fail() {
    echo "setup: $1" >&2
    exit 1
}

made_from=$({ pwd; cat requirements/cpu.lock requirements/install.sh pyproject.toml; } | sha256sum | cut -d " " -f 1)
if [[ -f $stamp && $(cat "$stamp") == "$made_from" ]]; then
    echo "setup: environment unchanged (.venv)"
    exit 0
fi

[[ $(uname -sm) == "Linux x86_64" ]] || fail "requirements/cpu.lock is for Linux on x86-64; this is $(uname -sm)"
PATH=$PATH:/usr/sbin:/sbin ldconfig -p | grep libnuma.so.1 >/dev/null ||
    fail "vLLM needs the library libnuma; install it with: apt-get install libnuma1"

is_3_11() {
    command -v "$1" >/dev/null && "$1" -c "import sys; sys.exit(sys.version_info[:2] != (3, 11))" 2>/dev/null
}
if ! is_3_11 .venv/bin/python; then
    python=
    for candidate in python3.11 python3; do
        if is_3_11 "$candidate"; then
            python=$candidate
            break
        fi
    done
    [[ -n $python ]] || fail "Python 3.11 is needed, and neither python3.11 nor python3 is one"
    "$python" -c "import ensurepip, venv" 2>/dev/null ||
        fail "$python cannot make virtual environments; install that with: apt-get install python3.11-venv"
    echo "setup: making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
fi

if [[ $(.venv/bin/uv --version 2>/dev/null) != "uv $uv_version"* ]]; then
    echo "setup: installing uv $uv_version"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "uv==$uv_version"
fi
export VIRTUAL_ENV=$PWD/.venv

# uv does not read pip's configuration, and that may name a place with a CPU build of torch.
sources=()
for place in ${PIP_FIND_LINKS:-$(.venv/bin/python -m pip config get global.find-links 2>/dev/null || true)}; do
    sources+=(--find-links "$place")
done
torch=$(grep "^torch==" requirements/cpu.lock)
if ! .venv/bin/uv pip install --quiet --dry-run --no-deps "${sources[@]}" "$torch" 2>/dev/null; then
    echo "setup: $torch is not where pip looks; PyTorch's CPU index is asked as well"
    sources+=(--index "$pytorch_cpu_index" --index-strategy unsafe-best-match)
fi

echo "setup: installing $(grep -c == requirements/cpu.lock) packages (about 3.5 GB) into .venv"
rm -f "$stamp"
.venv/bin/uv pip sync --quiet "${sources[@]}" requirements/cpu.lock
echo "setup: installing this project, editable"
.venv/bin/uv pip install --quiet --no-deps --no-build-isolation --editable .
echo "$made_from" >"$stamp"
echo "setup: done"
