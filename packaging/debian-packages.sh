#!/usr/bin/env bash
# Installs the Debian packages that a part of forkd needs, unless they are there.
#
#   packaging/debian-packages.sh build|image|test|plot...
#
# The guest kernel's packages are named in guest/kernel/build.sh.
set -euo pipefail

die() {
    printf 'packages: error: %s\n' "$*" >&2
    exit 1
}

packages=()
for part in "$@"; do
    case $part in
    # The C compiler is for blake3's assembly and for linking.
    build) packages+=(gcc libc6-dev make) ;;
    # Also what unpacks tar archives of all kinds.
    image) packages+=(mmdebstrap erofs-utils debian-archive-keyring gzip tar util-linux xz-utils zstd) ;;
    # cpio checks our initramfs; g++ builds libFuzzer; strace makes system calls fail.
    test) packages+=(cpio g++ procps shellcheck strace) ;;
    plot) packages+=(python3-matplotlib) ;;
    *) die "unknown part \"$part\": build, image, test or plot" ;;
    esac
done
((${#packages[@]} > 0)) || die "usage: packaging/debian-packages.sh build|image|test|plot..."

missing=()
for package in "${packages[@]}"; do
    status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
    [[ $status == installed ]] || missing+=("$package")
done
((${#missing[@]} > 0)) || exit 0

command -v apt-get >/dev/null || die "this is no Debian; install the counterparts of: ${missing[*]}"
((EUID == 0)) || die "missing Debian packages; as root run: apt-get install ${missing[*]}"
printf 'packages: installing %s\n' "${missing[*]}" >&2
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
install=(apt-get install -y --no-install-recommends "${missing[@]}")
if ! "${install[@]}" >"$log" 2>&1; then
    printf 'packages: lists are stale or absent: apt-get update\n' >&2
    if ! { apt-get update && "${install[@]}"; } >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        die "cannot install ${missing[*]}"
    fi
fi
