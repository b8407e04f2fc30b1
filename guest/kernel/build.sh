#!/usr/bin/env bash
# Builds one flavour of forkd's guest kernel from Debian's kernel source, patches/ and the flavour's configuration.
#
#   guest/kernel/build.sh [stock|pvm]    build unless cached; the last line of stdout is the path of vmlinux
#
#   FORKD_JOBS=N                         compile N files at a time, by default one for each CPU
#   FORKD_KERNEL_PLAIN=1                 compile with gcc itself: twice the time, and all warnings, in the log
#
# The result is cached under ${FORKD_CACHE:-${XDG_CACHE_HOME:-~/.cache}/forkd}/kernels/<digest>/, where
# the digest covers the config, the patches, the version of the source package, and RECIPE. kernels/current points
# to the newest of the flavour stock, kernels/current-pvm to that of pvm. All progress goes to stderr. README.md tells
# more.
set -euo pipefail

# Raise it when a change to this script changes the kernel that comes out.
readonly RECIPE=2
readonly SOURCE_PACKAGE=linux-source-6.12
readonly SOURCE_TAR=/usr/src/$SOURCE_PACKAGE.tar.xz
readonly BUILD_PACKAGES=(bc binutils bison flex gcc libc6-dev libelf-dev libssl-dev make patch perl xz-utils)
# Room for the unpacked source and the objects.
readonly NEED_MIB=1500
# How many compiled files the average step after "LD vmlinux.o" takes as long as.
readonly LINK_STEPS=5

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly FLAVOUR=${1:-stock}
readonly PATCHES=("$here"/patches/*.patch)
readonly CACHE=${FORKD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/forkd}
readonly KERNELS=$CACHE/kernels
# The configuration, later ones over earlier ones, and the link to the newest kernel.
case $FLAVOUR in
stock) fragments=("$here/forkd.config") link=current ;;
pvm) fragments=("$here/forkd.config" "$here/pvm.config") link=current-pvm ;;
*)
    printf 'kernel: error: unknown flavour "%s"; there are: stock, pvm\n' "$FLAVOUR" >&2
    exit 2
    ;;
esac
readonly fragments link

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
        cat "${fragments[@]}" "${PATCHES[@]}"
    } | sha256sum | cut -c1-16
}

# Points the flavour's link to the digest, and prints the kernel's path.
publish() {
    if [[ $(readlink "$KERNELS/$link" || true) != "$1" ]]; then
        ln -sfn "$1" "$KERNELS/.$link.$$"
        mv -T "$KERNELS/.$link.$$" "$KERNELS/$link"
    fi
    printf '%s\n' "$KERNELS/$1/vmlinux"
}

# Prints what the flavour asks for: of lines for the same option the last counts.
asked_config() {
    # Those that come on with CPU_MITIGATIONS, by default, and more of them with each update. A flavour that turns it
    # on says which it wants.
    if [[ $FLAVOUR == pvm ]]; then
        sed -n 's/^config \(MITIGATION_[A-Z0-9_]*\)$/CONFIG_\1=n/p' "$staging/source/arch/x86/Kconfig"
    fi
    cat "${fragments[@]}"
}

# Names each option of the second file that differs in the first, the final .config; fails if there are any.
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
        { asked[key] = got }
        END {
            for (key in asked) {
                have = (key in final) ? final[key] : "n"
                if (have != asked[key]) { printf "kernel:   %s: asked for %s, got %s\n", key, asked[key], have; bad = 1 }
            }
            exit bad
        }
    ' "$1" "$2" >&2
}

# Prints how much of the work the log tells of: a step for each file that was compiled, and LINK_STEPS for each step of
# linking and of making the table of symbols.
steps_done() {
    awk -v weight="$LINK_STEPS" '
        linking { steps += weight; next }
        $1 ~ /^(CC|AS|HOSTCC)$/ { steps++ }
        $1 == "LD" && $2 == "vmlinux.o" { linking = 1 }
        END { print steps + 0 }
    ' "$log"
}

# Runs make in the background, with a line of progress every few seconds.
make_target() {
    local percent target
    make "${make_args[@]}" "-j$jobs" "$@" >>"$log" 2>&1 &
    make_pid=$!
    while kill -0 "$make_pid" 2>/dev/null; do
        sleep 1
        if ((SECONDS < shown + 5)); then continue; fi
        shown=$SECONDS
        target=$(grep '^  [A-Z]' "$log" | tail -n 1) || continue
        percent=$((100 * $(steps_done) / expected))
        say "$(printf '%3d %%, %d s: %s' "$((percent < 100 ? percent : 99))" "$SECONDS" "${target##* }")"
    done
    if wait "$make_pid"; then make_pid=; else
        make_pid=
        fail_with_log "the kernel did not compile"
    fi
}

compile() {
    local shown=$SECONDS expected steps
    expected=$(awk -v flavour="$FLAVOUR" '$1 == flavour { print $2 }' "$here/steps")
    : >"$log"
    if [[ -z ${FORKD_KERNEL_PLAIN:-} ]]; then
        # Any file that is compiled with the options that most have, none of its own.
        CC_PRECOMPILE=1 make_target mm/util.o
    fi
    make_target vmlinux
    steps=$(steps_done)
    # The percentages would drift away from the truth with each change if nobody was told.
    if ((steps * 50 < expected * 49 || steps * 50 > expected * 51)); then
        say "note: these were $steps steps; $here/steps says $expected"
    fi
}

[[ $(uname -m) == x86_64 ]] || die "only x86_64 is supported, this is $(uname -m)"

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

say "building $SOURCE_PACKAGE $version, flavour $FLAVOUR, digest $digest"
say "unpacking $SOURCE_TAR"
# What other architectures, documentation and drivers of hardware consist of is never read; Kconfig and Makefiles are.
exclude=(--anchored)
for part in 'arch/[!x]*.[chS]' 'arch/*/boot/dts' 'drivers/accel/*.[ch]' 'drivers/gpu/*.[ch]' 'drivers/iio/*.[ch]' \
    'drivers/infiniband/*.[ch]' 'drivers/media/*.[ch]' 'drivers/net/ethernet/*.[ch]' 'drivers/net/wireless/*.[ch]' \
    'drivers/scsi/*.[ch]' 'drivers/staging/*.[ch]' 'drivers/usb/*.[ch]' 'sound/*.[ch]' \
    'Documentation/*.rst' 'Documentation/*.yaml' tools/testing tools/perf; do
    exclude+=("--exclude=$SOURCE_PACKAGE/$part")
done
tar -C "$staging" -xf "$SOURCE_TAR" --strip-components=1 --one-top-level=source "${exclude[@]}" >"$log" 2>&1 ||
    fail_with_log "cannot unpack $SOURCE_TAR"

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
if [[ -z ${FORKD_KERNEL_PLAIN:-} ]]; then
    gcc -O1 -o "$staging/forkd-cc" "$here/cc.c" >"$log" 2>&1 || fail_with_log "cannot compile cc.c"
    cp -r "$here/headers" "$staging/"
    export PATH=$staging:$PATH CC_HEADERS=$staging/headers
    make_args+=(CC=forkd-cc)
fi

say "configuring"
asked_config >"$staging/asked.config"
make "${make_args[@]}" "KCONFIG_ALLCONFIG=$staging/asked.config" allnoconfig >"$log" 2>&1 || fail_with_log "cannot configure the kernel"
verify_config "$object/.config" "$staging/asked.config" ||
    die "these options of ${fragments[*]} did not take effect (a dependency is missing, or another option selects them)"

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
