#!/bin/sh
# Prints the path of a Python that can make an environment for this project, or one sentence that says what to install.
#   tools/find_python.sh [VERSION...]      default: 3.11 3.12;  PYTHON=/path looks at that one only
wanted=${*:-3.11 3.12}
no_venv= other=

if [ -n "${PYTHON:-}" ]; then
    set -- "$PYTHON"
else
    set -- python3 python3.12 python3.11 "$HOME"/.pyenv/versions/3.12*/bin/python3 "$HOME"/.pyenv/versions/3.11*/bin/python3
fi
for candidate in "$@"; do
    # Asked, not looked up: a pyenv shim exists for versions that it refuses to run.
    version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
    case " $wanted " in
    *" $version "*)
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            exec "$candidate" -c 'import sys; print(sys.executable)'
        fi
        no_venv=$version ;;
    *) other="${other:+$other, }$version ($candidate)" ;;
    esac
done

needed=$(echo $wanted | sed 's/ / or /g')
if [ -n "$no_venv" ]; then
    echo "Python $no_venv has no venv module: install it (Debian, Ubuntu: sudo apt install python$no_venv-venv) and run this again." >&2
elif [ -n "$other" ]; then
    echo "Found Python $other, but $needed is needed: install python${needed##* } (Debian, Ubuntu: sudo apt install python${needed##* } python${needed##* }-venv), or name one with PYTHON=/path/to/python." >&2
elif [ -n "${PYTHON:-}" ]; then
    echo "PYTHON=$PYTHON does not run: name a Python $needed." >&2
else
    echo "No Python found: install Python $needed with its venv module (Debian, Ubuntu: sudo apt install python${needed##* } python${needed##* }-venv)." >&2
fi
exit 1
