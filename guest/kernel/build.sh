#!/usr/bin/env bash
# Builds forkd's guest kernel from Debian's kernel source, patches/ and forkd.config.
#
#   guest/kernel/build.sh [stock|pvm]     build unless cached; the last line of stdout is the path of vmlinux
#   FORKD_JOBS=2 guest/kernel/build.sh
#
# Flavours: stock runs everywhere; pvm (forkd.config and pvm.config) only on PVM hosts with native kernel mode.
# The result is cached under ${FORKD_CACHE:-${XDG_CACHE_HOME:-~/.cache}/forkd}/kernels/<digest>/, where
# the digest covers the config, the patches, the version of the source package, and RECIPE. kernels/current points
# to the newest of stock, kernels/current-pvm to that of pvm. All progress goes to stderr. README.md tells more.
set -euo pipefail

# Raise it when a change to this script changes the kernel that comes out.
readonly RECIPE=1
readonly SOURCE_PACKAGE=linux-source-6.12
readonly SOURCE_TAR=/usr/src/$SOURCE_PACKAGE.tar.xz
readonly BUILD_PACKAGES=(bc binutils bison flex gcc libc6-dev libelf-dev libssl-dev make patch perl xz-utils)
# Room for the unpacked source and the objects.
readonly NEED_MIB=2500

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly FLAVOUR=${1:-stock}
case $FLAVOUR in
stock) FRAGMENTS=("$here/forkd.config") LINK=current ;;
pvm) FRAGMENTS=("$here/forkd.config" "$here/pvm.config") LINK=current-pvm ;;
*)
    printf 'kernel: error: unknown flavour "%s": stock or pvm\n' "$FLAVOUR" >&2
    exit 2
    ;;
esac
readonly FRAGMENTS LINK
# Lines of output of each flavour's build: "flavour number".
readonly STEPS=$here/steps
readonly PATCHES=("$here"/patches/*.patch)
readonly CACHE=${FORKD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/forkd}
readonly KERNELS=$CACHE/kernels

staging=
make_pid=

say() { printf 'kernel: %s\n' "$*" >&2; }

die() {
    printf 'kernel: error: %s\n' "$*" >&2
    exit 1
}

cleanup() {
    if [[ -n $make_pid ]]; then
        kill "$make_pid" 2>/dev/null || true
        wait "$make_pid" || true
    fi
    if [[ -n $staging ]]; then rm -rf "$staging"; fi
}

# Prints the version of an installed package; fails if it is not installed.
installed_version() {
    local state version
    read -r state version < <(dpkg-query -W -f '${db:Status-Status} ${Version}\n' "$1" 2>/dev/null) || return 1
    [[ $state == installed ]] && printf '%s\n' "$version"
}

# Installs those of the packages that are missing.
install_packages() {
    local package missing=()
    for package in "$@"; do
        installed_version "$package" >/dev/null || missing+=("$package")
    done
    if ((${#missing[@]} == 0)); then return; fi
    ((EUID == 0)) || die "missing Debian packages; as root run: apt-get install ${missing[*]}"
    say "installing Debian packages: ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    local install=(apt-get install -y --no-install-recommends "${missing[@]}")
    if ! "${install[@]}" >"$log" 2>&1; then
        say "package lists are stale or absent: apt-get update"
        apt-get update >>"$log" 2>&1 || fail_with_log "apt-get update failed"
        "${install[@]}" >>"$log" 2>&1 || fail_with_log "cannot install ${missing[*]}"
    fi
}

# Keeps the log of what failed, and shows its end.
fail_with_log() {
    local kept=$CACHE/kernel-build.log
    cp "$log" "$kept"
    tail -n 40 "$log" >&2
    die "$1; the whole log is $kept"
}

# Prints the digest that names a kernel made from the given source version.
digest_for() {
    {
        printf '%s\n%s\n' "$RECIPE" "$1"
        cat "${FRAGMENTS[@]}" "${PATCHES[@]}"
    } | sha256sum | cut -c1-16
}

# Points the flavour's link to the digest, and prints the kernel's path.
publish() {
    if [[ $(readlink "$KERNELS/$LINK" || true) != "$1" ]]; then
        ln -sfn "$1" "$KERNELS/.$LINK.$$"
        mv -T "$KERNELS/.$LINK.$$" "$KERNELS/$LINK"
    fi
    printf '%s\n' "$KERNELS/$1/vmlinux"
}

# Names each option of the fragments that differs in the final .config; fails if there are any. Of two lines for one
# option, the later counts.
verify_config() {
    awk '
        function value(line,    at) {
            if (line ~ /^# CONFIG_[A-Za-z0-9_]+ is not set$/) { split(line, word, " "); key = word[2]; return "n" }
            if (line !~ /^CONFIG_/) { key = ""; return "" }
            at = index(line, "="); key = substr(line, 1, at - 1); return substr(line, at + 1)
        }
        { got = value($0) }
        key == "" { next }
        FNR == NR { final[key] = got; next }
        { wanted[key] = got }
        END {
            for (key in wanted) {
                have = (key in final) ? final[key] : "n"
                if (have == wanted[key]) continue
                printf "kernel:   %s: asked for %s, got %s\n", key, wanted[key], have
                bad = 1
            }
            exit bad
        }
    ' "$1" "${FRAGMENTS[@]}" >&2
}

# Prints how many lines of output a build of this flavour has, as the last one that was looked at had; or nothing.
expected_steps() { awk -v flavour="$FLAVOUR" '$1 == flavour { print $2 }' "$STEPS"; }

# Runs make in the background, with a line of progress every few seconds.
compile() {
    local started=$SECONDS shown=0 target expected steps
    expected=$(expected_steps)
    make "${make_args[@]}" "-j$jobs" vmlinux >"$log" 2>&1 &
    make_pid=$!
    while kill -0 "$make_pid" 2>/dev/null; do
        sleep 1
        if ((SECONDS - started < shown + 5)); then continue; fi
        shown=$((SECONDS - started))
        target=$(tail -n 1 "$log" | sed 's/^ *//; s/  */ /g')
        steps=$(wc -l <"$log")
        say "$(printf '%3d %%, %d s: %s' "$((steps < expected ? 100 * steps / expected : 99))" "$shown" "$target")"
    done
    if wait "$make_pid"; then make_pid=; else
        make_pid=
        fail_with_log "the kernel did not compile"
    fi
    steps=$(wc -l <"$log")
    if ((steps * 50 > expected * 51 || steps * 50 < expected * 49)); then
        say "it took $steps steps, and $STEPS says ${expected:-nothing}: the percentages were wrong, correct the file"
    fi
}

[[ $(uname -m) == x86_64 ]] || die "only x86_64 is supported, this is $(uname -m)"
for file in "${FRAGMENTS[@]}" "$STEPS"; do [[ -r $file ]] || die "cannot read $file"; done

# The usual case: the kernel is there. One dpkg-query and one sha256sum.
if version=$(installed_version "$SOURCE_PACKAGE"); then
    digest=$(digest_for "$version")
    if [[ -s $KERNELS/$digest/vmlinux ]]; then
        publish "$digest"
        exit 0
    fi
fi

mkdir -p "$KERNELS" "$CACHE/build" || die "cannot create $CACHE; set FORKD_CACHE to a directory that can be written"
exec 9>"$KERNELS/.lock"
if ! flock -n 9; then
    say "waiting for another build to end"
    flock 9
fi
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# The lock is ours: whatever earlier builds left behind is dead.
rm -rf "$CACHE"/build/kernel.*
staging=$(mktemp -d "$CACHE/build/kernel.XXXXXX")
log=$staging/log

install_packages "$SOURCE_PACKAGE" "${BUILD_PACKAGES[@]}"
version=$(installed_version "$SOURCE_PACKAGE") || die "$SOURCE_PACKAGE is not installed"
digest=$(digest_for "$version")
if [[ -s $KERNELS/$digest/vmlinux ]]; then
    publish "$digest"
    exit 0
fi

free_mib=$(df --output=avail -BM "$staging" | tail -n 1 | tr -dc 0-9)
((free_mib >= NEED_MIB)) || die "$CACHE/build has $free_mib MiB free, the build needs $NEED_MIB; free some or set FORKD_CACHE"

say "building the flavour $FLAVOUR of $SOURCE_PACKAGE $version, digest $digest"
say "unpacking $SOURCE_TAR"
# Other architectures and the largest driver are never compiled; Kconfig and Makefiles stay.
tar -C "$staging" -xf "$SOURCE_TAR" --strip-components=1 --one-top-level=source \
    --exclude='*/arch/*/boot/dts' --exclude='*/drivers/gpu/drm/amd/*.h' --exclude='*/drivers/gpu/drm/*.c' \
    --exclude='*/tools/testing' --exclude='*/tools/perf' >"$log" 2>&1 || fail_with_log "cannot unpack $SOURCE_TAR"

for patch in "${PATCHES[@]}"; do
    say "applying ${patch##*/}"
    # No fuzz: a hunk that has to be guessed at is one to look at.
    patch -d "$staging/source" -p1 --fuzz=0 --batch <"$patch" >"$log" 2>&1 || fail_with_log "${patch##*/} does not apply to $SOURCE_PACKAGE $version"
done

jobs=${FORKD_JOBS:-$(nproc)}
object=$staging/object
mkdir "$object"
# Nothing of this machine or moment goes into the image.
export KBUILD_BUILD_USER=forkd KBUILD_BUILD_HOST=forkd KBUILD_BUILD_TIMESTAMP='Thu Jan  1 00:00:00 UTC 1970'
export KBUILD_BUILD_VERSION=1 LC_ALL=C
make_args=(-C "$staging/source" "O=$object")

say "configuring"
{
    make "${make_args[@]}" tinyconfig
    "$staging/source/scripts/kconfig/merge_config.sh" -m -O "$object" "$object/.config" "${FRAGMENTS[@]}"
    make "${make_args[@]}" olddefconfig
} >"$log" 2>&1 || fail_with_log "cannot configure the kernel"
verify_config "$object/.config" || die "these options of ${FRAGMENTS[*]} did not take effect (a dependency is missing, or another option selects them)"

say "compiling with $jobs jobs"
compile

result=$staging/result
mkdir "$result"
objcopy --strip-all "$object/vmlinux" "$result/vmlinux"
cp "$object/System.map" "$result/System.map"
cp "$object/.config" "$result/config"
sync -f "$result/vmlinux"
rm -rf "${KERNELS:?}/$digest"
mv -T "$result" "$KERNELS/$digest"
say "$version built in $SECONDS s, $(du -h --apparent-size "$KERNELS/$digest/vmlinux" | cut -f1)"
publish "$digest"
