#!/bin/sh
# Makes one of the project's environments, or does nothing when it is up to date.
#   tools/make_venv.sh core    .venv        what running needs, and matplotlib
#   tools/make_venv.sh dev     .venv        what testing needs besides: torch, transformers, ruff, pyright ...
#   tools/make_venv.sh tf4     .venv-tf4    transformers 4 without torch, to read what we export
#   tools/make_venv.sh smoke   .venv-smoke  the core and pytest on Python 3.12, hence on a newer JAX
# PYTHON=/path chooses the interpreter; TORCH_INDEX=https://... names a package index for torch alone.
set -eu
cd "$(dirname "$0")/.."
kind=$1

case $kind in
core | dev) venv=.venv ;;
tf4 | smoke) venv=.venv-$kind ;;
*) echo "$0: unknown environment '$kind': core, dev, tf4 or smoke" >&2; exit 2 ;;
esac

# A stamp holds what it was made from, the folder included: an environment does not survive being moved.
made_from="$PWD ${PYTHON:-} $(cat pyproject.toml requirements.txt constraints/*.txt tools/make_venv.sh | cksum)"
current() { [ -x "$venv/bin/python" ] && [ "$(cat "$venv/installed-$1" 2>/dev/null)" = "$made_from" ]; }
stamp() { printf '%s\n' "$made_from" >"$venv/installed-$1"; }
if current "$kind"; then exit 0; fi

if [ "$kind" = smoke ]; then python=$(tools/find_python.sh 3.12); else python=$(tools/find_python.sh); fi
version=$("$python" -c 'import sys; print("%d%d" % sys.version_info[:2])')
if [ -t 1 ]; then quiet=; else quiet=-qq; fi
pip_install() { "$venv/bin/python" -m pip --disable-pip-version-check install $quiet "$@"; }

# Sizes for Linux on x86-64, added up from the wheels that constraints/ names.
case $kind in
core) size="about 300 MB" ;;
dev) if [ -n "${TORCH_INDEX:-}" ]; then size="about 800 MB"; else size="about 3.3 GB, 2.7 GB of it torch with its GPU \
libraries (about 800 MB in all with TORCH_INDEX=URL naming an index of CPU builds)"; fi ;;
tf4) size="about 50 MB" ;;
smoke) size="about 300 MB" ;;
esac
echo "Setting up $venv with Python ${version%??}.${version#?}: a download of $size."

rm -f "$venv"/installed-*
if ! [ -x "$venv/bin/python" ] || ! "$venv/bin/python" -c "import sys; sys.exit('%d%d' % sys.version_info[:2] != '$version')"; then
    rm -rf "$venv"
    "$python" -m venv "$venv" || { echo "Could not make $venv: see the message above." >&2; exit 1; }
fi
constraints=constraints/py$version.txt
case $kind in
core)
    pip_install -c "$constraints" -e ".[plots]" ;;
dev)
    # Torch alone may come from another index; its dependencies and everything else come from the usual one.
    if [ -n "${TORCH_INDEX:-}" ]; then pip_install --no-deps --index-url "$TORCH_INDEX" torch==2.13.0; fi
    pip_install -c "$constraints" -e ".[dev,plots]"
    stamp core ;;
tf4)
    pip_install "transformers>=4.57,<5" ;;
smoke)
    pip_install -c "$constraints" -e . pytest hypothesis ;;
esac
stamp "$kind"
