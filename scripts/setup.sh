#!/usr/bin/env bash
# Prepares this checkout: system programs, then .venv with the pinned packages. Safe to run again.
#
#   scripts/setup.sh            what the demo and the tests need
#   scripts/setup.sh lint       and node, which the type checker runs on
#   scripts/setup.sh vm         and QEMU, for virtual machines; their tests are skipped without it
#   scripts/setup.sh everything and what else any test wants: a browser, a registry
#
# Exit code 3 means that the machine lacks something; the last line says how to get it.
set -euo pipefail
cd "$(dirname "$0")/.."

lacking() { # why, command that mends it
  printf 'setup: %s\nsetup: run this, then try again:\n  %s\n' "$1" "$2" >&2
  exit 3
}

# Debian names of the programs that are not there yet. The sandbox runs on crun or runc as root and on
# bubblewrap as another user; root can install all three, and the tests then try each of them.
missing=()
command -v bwrap >/dev/null || missing+=(bubblewrap)
if [ "$(id -u)" = 0 ]; then
  command -v crun >/dev/null || missing+=(crun)
  command -v runc >/dev/null || missing+=(runc)
  command -v nft >/dev/null || missing+=(nftables)
fi
# The program inside every sandbox is C, linked without shared libraries.
if ! command -v musl-gcc >/dev/null; then
  missing+=(musl-tools gcc libc6-dev linux-libc-dev)
fi
if [ "${1:-}" = lint ]; then
  command -v node >/dev/null || missing+=(nodejs)
fi

if [ "${1:-}" = vm ] || [ "${1:-}" = everything ]; then
  command -v qemu-system-x86_64 >/dev/null || missing+=(qemu-system-x86 seabios)
  command -v qemu-img >/dev/null || missing+=(qemu-utils)
  command -v mke2fs >/dev/null || missing+=(e2fsprogs)
  command -v mmdebstrap >/dev/null || missing+=(mmdebstrap)
fi

if [ "${1:-}" = everything ]; then
  for program in chromium docker-registry skopeo fuse-overlayfs make git; do
    command -v "$program" >/dev/null || missing+=("$program")
  done
fi

find_python() { # the first Python >= 3.11 that can make a virtual environment
  for candidate in "${PYTHON:-}" python3 python3.12 python3.11 python3.13; do
    if [ -n "$candidate" ] && "$candidate" -c \
      'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
}
if [ ! -x .venv/bin/python ] && [ -z "$(find_python)" ]; then
  missing+=(python3 python3-venv)
fi

if [ ${#missing[@]} -gt 0 ]; then
  install="apt-get install -y --no-install-recommends ${missing[*]}"
  command -v apt-get >/dev/null ||
    lacking "not installed: ${missing[*]}" "install them with this system's package manager"
  [ "$(id -u)" = 0 ] || lacking "not installed: ${missing[*]}" "sudo $install"
  echo "setup: $install"
  log=$(mktemp)
  { apt-get update -q && DEBIAN_FRONTEND=noninteractive $install; } >"$log" 2>&1 ||
    { tail -n 20 "$log" >&2; lacking "apt-get failed (above)" "$install"; }
  rm -f "$log"
fi

stamp=.venv/.fathom-setup
wanted=$(cat pyproject.toml constraints.txt scripts/setup.sh | sha256sum)
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
  exit 0
fi

if [ ! -x .venv/bin/python ]; then
  python=$(find_python)
  [ -n "$python" ] || lacking "no Python >= 3.11 with venv" "apt-get install -y python3.11 python3.11-venv"
  echo "setup: creating .venv with $("$python" --version)"
  "$python" -m venv .venv
fi
echo "setup: installing the pinned packages into .venv (minutes on a first run)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check \
  -c constraints.txt -e '.[dev]' ||
  lacking "pip could not install the packages (above)" \
    ".venv/bin/python -m pip install -c constraints.txt -e '.[dev]'"
# Otherwise the first command would wait for it, and tests that run side by side would each do it.
echo "setup: compiling the decoder for this machine (about half a minute)"
.venv/bin/python -m fathom generate "a" --max-tokens 2 >/dev/null 2>&1 ||
  echo "setup: the decoder was not compiled; the first command will try again"
echo "$wanted" >"$stamp"
echo "setup: done"
