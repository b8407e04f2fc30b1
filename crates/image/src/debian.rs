//! A root directory of a Debian suite, made by mmdebstrap.

use std::fs;
use std::path::Path;

use crate::apt;
use crate::error::{ImageError, require_space};
use crate::recipe::DebianRecipe;
use crate::tools::{MMDEBSTRAP, Run, UNSHARE};

/// Never unpacked: nobody reads them in a microVM, and each 4 KiB costs memory in each guest.
const EXCLUDED: [&str; 10] = [
    "/usr/share/man/*",
    "/usr/share/doc/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
    "/usr/share/lintian/*",
    "/usr/share/bug/*",
    "/usr/share/doc-base/*",
    "/usr/share/bash-completion/*",
    "/usr/share/pixmaps/*",
    "/usr/lib/*.a",
];
/// Room for the unpacked packages, their archives, and the packed image.
const NEED_MIB: u64 = 1024;
/// Times that Debian's tools write become this one.
const SOURCE_DATE_EPOCH: &str = "1700000000";

/// Keeps out usrmerge, which would bring Perl along only to convert a system that is merged already. In
/// suites without it the pin has no effect.
const SETUP: &str = r#"
mkdir -p "$1/etc/apt/preferences.d"
printf 'Package: usrmerge\nPin: release *\nPin-Priority: -1\n' >"$1/etc/apt/preferences.d/forkd"
"#;

/// Leaves out the test suites of Python packages, compiles the rest, and removes what the build left:
/// state of this host, caches, and files that differ from build to build.
const CUSTOMIZE: &str = r#"
set -eu
root=$1
for dir in "$root"/usr/lib/python3/dist-packages; do
    [ -d "$dir" ] || continue
    find "$dir" -depth -type d -name tests -exec rm -rf {} +
done
for python in "$root"/usr/bin/python3.[0-9] "$root"/usr/bin/python3.[0-9][0-9]; do
    [ -x "$python" ] || continue
    name=${python##*/}
    # Sources that do not compile (some are made for other versions) are left as they are.
    PYTHONHASHSEED=0 chroot "$root" "/usr/bin/$name" -m compileall -q -f --invalidation-mode unchecked-hash \
        "/usr/lib/$name" /usr/lib/python3/dist-packages >/dev/null || true
done
rm -f "$root"/etc/apt/preferences.d/forkd "$root"/etc/resolv.conf "$root"/etc/hostname
rm -f "$root"/var/lib/dpkg/*-old "$root"/var/cache/ldconfig/aux-cache
rm -rf "$root"/var/cache/debconf/*-old "$root"/var/log/*
: >"$root"/etc/machine-id
"#;

/// Makes the suite's root in `target`, an empty directory.
pub(crate) fn bootstrap(
    recipe: &DebianRecipe,
    target: &Path,
    progress: &mut dyn FnMut(&str),
) -> Result<(), ImageError> {
    if !rustix::process::geteuid().is_root() {
        return Err(ImageError::NeedsRoot("building a Debian image"));
    }
    UNSHARE.require()?;
    require_space(target, NEED_MIB)?;
    let sources = match &recipe.mirror {
        Some(mirror) => vec![format!("deb {mirror} {} main", recipe.suite)],
        None => apt::sources(&recipe.suite),
    };
    let mut run = Run::new(MMDEBSTRAP)
        .own_mounts()
        .env("SOURCE_DATE_EPOCH", SOURCE_DATE_EPOCH)
        .args(["--mode=root", "--variant=essential", "--format=directory"])
        .arg("--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr")
        .arg(format!("--setup-hook={SETUP}"))
        .arg(format!("--customize-hook={CUSTOMIZE}"));
    // So that apt does not solve usrmerge's place by nothing at all.
    let mut packages = vec!["usr-is-merged".to_string()];
    packages.extend(recipe.packages.iter().cloned());
    run = run.arg(format!("--include={}", packages.join(",")));
    run = run.args(apt::options().iter().map(|o| format!("--aptopt={o}")));
    let excluded = EXCLUDED.iter().copied().chain(recipe.exclude.iter().map(String::as_str));
    run = run.args(excluded.map(|path| format!("--dpkgopt=path-exclude={path}")));
    let mut steps = |line: &str| {
        if let Some(step) = step(line) {
            progress(&step);
        }
    };
    run.arg(&recipe.suite)
        .arg(target)
        .args(&sources)
        .progress(&mut steps)
        .finish(&format!("cannot build Debian {} from {}", recipe.suite, mirrors(&sources)))
        .map_err(|e| e.or_disk_full(target))?;
    // mmdebstrap's own leftovers, empty but in the way of equal bytes.
    for dir in ["var/cache/apt", "var/lib/apt/lists"] {
        let path = target.join(dir);
        match fs::remove_dir_all(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(ImageError::io("cannot remove", &path, e));
            }
            _ => {}
        }
    }
    Ok(())
}

/// The addresses in lines of sources.list, each once.
fn mirrors(sources: &[String]) -> String {
    let mut addresses: Vec<&str> = sources
        .iter()
        .flat_map(|line| line.split_whitespace())
        .filter(|word| word.contains("://"))
        .collect();
    addresses.dedup();
    addresses.join(" and ")
}

/// What a line of mmdebstrap's tells of its progress.
fn step(line: &str) -> Option<String> {
    if let Some(info) = line.strip_prefix("I: ") {
        let told = [
            "running apt-get update",
            "downloading",
            "extracting",
            "installing",
            "running --custom",
            "cleaning",
        ];
        if !told.iter().any(|t| info.starts_with(t)) {
            return None;
        }
        if info.starts_with("running --custom") {
            return Some("compiling Python, removing caches".to_string());
        }
        return Some(info.trim_end_matches('.').to_string());
    }
    line.strip_prefix("Setting up ")
        .map(|rest| format!("setting up {}", rest.trim_end_matches(" ...")))
}

#[cfg(test)]
mod tests {
    use super::{mirrors, step};

    #[test]
    fn mirrors_are_named_once() {
        let lines = [
            "deb [signed-by=/k] http://a b main",
            "deb http://a b-updates main",
            "deb http://c d main",
        ];
        assert_eq!(mirrors(&lines.map(str::to_string)), "http://a and http://c");
    }

    #[test]
    fn steps_are_told_and_noise_is_not() {
        assert_eq!(step("I: extracting archives...").as_deref(), Some("extracting archives"));
        assert_eq!(
            step("Setting up python3 (3.11.2-1+b1) ...").as_deref(),
            Some("setting up python3 (3.11.2-1+b1)")
        );
        assert_eq!(
            step("I: running --customize-hook in shell: sh -c '").as_deref(),
            Some("compiling Python, removing caches")
        );
        assert_eq!(step("I: chroot architecture amd64 is equal to the host's architecture"), None);
        assert_eq!(step("Selecting previously unselected package x"), None);
    }
}
