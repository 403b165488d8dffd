# shellcheck shell=bash
# Sourced by the other scripts: where the project is, how it fails, and the pinned uv.
set -euo pipefail

root="$(CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

# The name of a Python that is new enough for the project.
find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    die "Python 3.11 or newer is needed, but python3 is $(python3 --version 2>&1 || true)" \
        "and neither python3.13, python3.12 nor python3.11 runs. Install one of them and try again."
}

# Without a writable home folder the tools have nowhere to cache: then they download into a temporary folder.
use_caches_if_writable() {
    local caches="${XDG_CACHE_HOME:-${HOME:-/dev/null}/.cache}"
    if [[ -z "${UV_CACHE_DIR:-}" ]] && ! { mkdir -p "$caches" && [[ -w "$caches" ]]; } 2>/dev/null; then
        export UV_NO_CACHE=1 PIP_NO_CACHE_DIR=1
    fi
}

# Where the system has a certificate store, a proxy's own certificate is in it and not among those that uv carries.
trust_system_certificates() {
    if [[ "$(uname -s)" == Darwin || -n "$(ls /etc/ssl/certs /etc/pki/tls/certs 2>/dev/null)" ]]; then
        export UV_SYSTEM_CERTS="${UV_SYSTEM_CERTS:-1}"
    fi
}

# Makes .venv-uv, which holds the pinned, hash-checked uv and nothing else, and sets $uv.
# It has its own environment so that syncing .venv can never remove the tool that does it.
ensure_uv() {
    local wanted="config/lock/uv.txt" made_from=".venv-uv/made-from" python
    uv="$root/.venv-uv/bin/uv"
    use_caches_if_writable
    trust_system_certificates
    if cmp -s "$wanted" "$made_from" && "$uv" --version >/dev/null 2>&1; then
        return
    fi
    python="$(find_python)"
    say "Installing uv ..."
    rm -rf .venv-uv
    "$python" -m venv .venv-uv || die "'$python -m venv' failed: install Python's venv module" \
        "(on Debian and Ubuntu the package python3-venv) and try again."
    .venv-uv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary=:all: \
        -r "$wanted" || die "pip could not install uv: is a package registry reachable from here?"
    cp "$wanted" "$made_from"
}
