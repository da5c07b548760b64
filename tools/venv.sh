#!/bin/sh
# Create the development environment in the folder $1 from the pins in constraints.txt.
# Uses $PYTHON (default python3.11, then python3); touches nothing outside the folder, except
# that root on Debian may get the missing venv module from apt.
set -eu

venv=$1
fail() {
    echo "venv: $1" >&2
    exit 1
}

python=
for candidate in "${PYTHON:-python3.11}" python3.11 python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || fail "Python 3.11 or newer is needed; set PYTHON to its path"

create() {
    if "$python" -c 'import ensurepip' 2>/dev/null; then
        "$python" -m venv "$venv"
    elif "$python" -m virtualenv --version >/dev/null 2>&1; then
        "$python" -m virtualenv -q "$venv"
    elif "$python" -m pip --version >/dev/null 2>&1; then
        # Debian's python3-pip without python3-venv: that pip can fill a venv it is not part of.
        "$python" -m venv --without-pip "$venv"
        "$python" -m pip --python "$venv/bin/python" install -q -c constraints.txt pip
    elif [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        { apt-get update -q && apt-get install -yq --no-install-recommends python3-venv; } >&2 ||
            fail "cannot install python3-venv with apt-get"
        "$python" -m venv "$venv"
    else
        fail "$python has neither ensurepip nor pip: install python3-venv (apt-get install python3-venv)"
    fi
}

pip() {
    "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$@"
}

[ -x "$venv/bin/python" ] && pip --version >/dev/null 2>&1 || { rm -rf "$venv"; create; }
# The build backend is pinned too, so it is installed first and used in place.
pip install -q -c constraints.txt hatchling editables
pip install -q -c constraints.txt --no-build-isolation -e ".[dev,uvloop]"
