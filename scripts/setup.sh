#!/usr/bin/env bash
# Install the Debian packages that a target needs: scripts/setup.sh build|demo|check|sanitize|format
# Says what it will install, uses sudo when the user is not root, does nothing when everything is there.
set -eu

build="gcc make meson ninja-build pkg-config libc6-dev libcjson-dev libpcre2-dev libpng-dev"
demo="$build python3 python3-pip ca-certificates"
check="$demo g++ libcmocka-dev python3-venv python3-dev gcc-aarch64-linux-gnu libc6-dev-arm64-cross"
sanitize="$check clang libomp-dev libclang-rt-14-dev llvm"

case "${1:-}" in
build) packages=$build ;;
demo) packages=$demo ;;
check) packages=$check ;;
sanitize) packages=$sanitize ;;
format) packages="clang-format" ;;
*)
    echo "usage: scripts/setup.sh build|demo|check|sanitize|format" >&2
    exit 2
    ;;
esac

# A tool that is on the PATH already (from a virtual environment, say) need not come from the system.
have() {
    case "$1" in
    meson) command -v meson >/dev/null ;;
    ninja-build) command -v ninja >/dev/null ;;
    python3-pip) python3 -m pip --version >/dev/null 2>&1 ;;
    python3-venv) python3 -c 'import ensurepip' >/dev/null 2>&1 ;;
    python3-dev) python3 -c 'import os,sysconfig,sys; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' >/dev/null 2>&1 ;;
    *) dpkg-query -W -f='${Status}' "$1" 2>/dev/null | grep -q 'ok installed' ;;
    esac
}

if ! command -v dpkg-query >/dev/null; then
    echo "This is not a Debian system. Install the equivalents of these packages yourself: $packages" >&2
    exit 0
fi
missing=""
for package in $packages; do
    have "$package" || missing="$missing $package"
done
if [ -z "$missing" ]; then
    exit 0
fi
echo "Installing Debian packages:$missing"
sudo=""
if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null; then
        echo "You are not root and there is no sudo. As root, run:  apt-get install$missing" >&2
        exit 1
    fi
    sudo="sudo"
fi
install() {
    # shellcheck disable=SC2086
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >"$log" 2>&1
}
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! install && ! { $sudo apt-get update -qq >>"$log" 2>&1 && install; }; then
    tail -n 5 "$log" >&2
    echo "The packages could not be installed. When the network is up and 'apt-get update' works, run the same command again." >&2
    echo "Or install them yourself:  apt-get install$missing" >&2
    exit 1
fi
