//! Where this host's apt gets a Debian suite from, so that image builds use the same mirror and proxy.
//!
//! Both notations of sources.list(5) are read: one line a source, and deb822 stanzas. Only sources
//! whose suite is the wanted one (or its -updates or -security) and that have the component "main" are
//! taken: other archives name their suites alike.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Mirror of last resort.
const DEFAULT_MIRROR: &str = "http://deb.debian.org/debian";
/// Settings of apt that decide whether and how a mirror can be reached.
const OPTIONS: [&str; 5] = [
    "Acquire::http::Proxy",
    "Acquire::https::Proxy",
    "Acquire::Check-Date",
    "Acquire::Check-Valid-Until",
    "Acquire::https::Verify-Peer",
];

#[derive(Debug, Clone, PartialEq, Eq)]
struct Source {
    uri: String,
    suite: String,
    signed_by: Option<String>,
}

/// The sources for a suite, as lines of sources.list: the host's, or Debian's own mirror.
pub(crate) fn sources(suite: &str) -> Vec<String> {
    sources_from(Path::new("/etc/apt"), suite)
}

fn sources_from(etc: &Path, suite: &str) -> Vec<String> {
    let mut files = vec![etc.join("sources.list")];
    if let Ok(entries) = fs::read_dir(etc.join("sources.list.d")) {
        let mut more: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
        more.sort();
        files.extend(more);
    }
    let mut found = Vec::new();
    for file in files {
        // An unreadable file is apt's to complain about; the default mirror remains.
        let Ok(text) = fs::read_to_string(&file) else { continue };
        match file.extension().and_then(|e| e.to_str()) {
            Some("sources") => found.extend(deb822(&text)),
            Some("list") => found.extend(text.lines().filter_map(one_line).flatten()),
            _ => {}
        }
    }
    found.retain(|s| belongs(&s.suite, suite));
    if !found.iter().any(|s| s.suite == suite) {
        return vec![format!("deb {DEFAULT_MIRROR} {suite} main")];
    }
    let mut lines: Vec<String> = found.iter().map(Source::line).collect();
    lines.dedup();
    lines
}

impl Source {
    fn line(&self) -> String {
        let options =
            self.signed_by.as_ref().map(|k| format!("[signed-by={k}] ")).unwrap_or_default();
        format!("deb {options}{} {} main", self.uri, self.suite)
    }
}

fn belongs(source: &str, suite: &str) -> bool {
    source.strip_prefix(suite).is_some_and(|rest| ["", "-updates", "-security"].contains(&rest))
}

/// `deb [options] uri suite component...`
fn one_line(line: &str) -> Option<Vec<Source>> {
    let line = line.split('#').next()?.trim().strip_prefix("deb ")?.trim();
    let (options, rest) = match line.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => ("", line),
    };
    let mut words = rest.split_whitespace();
    let (uri, suite) = (words.next()?, words.next()?);
    if !words.any(|w| w == "main") {
        return None;
    }
    let signed_by = options.split_whitespace().find_map(|o| o.strip_prefix("signed-by="));
    Some(vec![Source {
        uri: uri.to_string(),
        suite: suite.to_string(),
        signed_by: signed_by.map(str::to_string),
    }])
}

/// Stanzas of `Field: value`, parted by empty lines.
fn deb822(text: &str) -> Vec<Source> {
    let mut found = Vec::new();
    let lines: Vec<&str> = text.lines().filter(|l| !l.starts_with('#')).collect();
    for stanza in lines.split(|l| l.trim().is_empty()) {
        let field = |name: &str| {
            stanza.iter().find_map(|l| {
                let (key, value) = l.split_once(':')?;
                key.eq_ignore_ascii_case(name).then(|| value.trim())
            })
        };
        let list = |name: &str| field(name).unwrap_or_default().split_whitespace();
        if field("Enabled") == Some("no")
            || !list("Types").any(|t| t == "deb")
            || !list("Components").any(|c| c == "main")
        {
            continue;
        }
        // A key that is written into the stanza itself has no path.
        let signed_by = field("Signed-By").filter(|k| k.starts_with('/')).map(str::to_string);
        for uri in list("URIs") {
            for suite in list("Suites") {
                let (uri, suite) = (uri.to_string(), suite.to_string());
                found.push(Source { uri, suite, signed_by: signed_by.clone() });
            }
        }
    }
    found
}

/// The host's apt settings that mmdebstrap's own apt needs as well, as `name "value";`.
pub(crate) fn options() -> Vec<String> {
    let output = Command::new("apt-config")
        .args(["dump", "--format", "%f \"%v\";%n"])
        .args(OPTIONS)
        .output();
    // Without apt-config there are no settings to carry over.
    let Ok(output) = output else { return Vec::new() };
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter(|l| OPTIONS.iter().any(|o| l.starts_with(o)) && !l.ends_with(" \"\";"))
        .map(str::to_string)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(list: &str, sources: &str) -> tempfile::TempDir {
        let tmp = tempfile::tempdir().unwrap();
        fs::create_dir(tmp.path().join("sources.list.d")).unwrap();
        fs::write(tmp.path().join("sources.list"), list).unwrap();
        fs::write(tmp.path().join("sources.list.d/debian.sources"), sources).unwrap();
        tmp
    }

    #[test]
    fn stanzas_give_one_line_for_each_suite() {
        let tmp = host(
            "",
            "# comment\nTypes: deb\nURIs: http://mirror/debian\nSuites: bookworm bookworm-updates\n\
             Components: main contrib\nSigned-By: /k.gpg\n\nTypes: deb\nURIs: http://other\n\
             Suites: nodistro\nComponents: main\n",
        );
        assert_eq!(
            sources_from(tmp.path(), "bookworm"),
            [
                "deb [signed-by=/k.gpg] http://mirror/debian bookworm main",
                "deb [signed-by=/k.gpg] http://mirror/debian bookworm-updates main",
            ]
        );
    }

    #[test]
    fn one_line_sources_are_read_and_others_left() {
        let tmp = host(
            "# deb http://no bookworm main\ndeb [arch=amd64 signed-by=/k] http://m/debian bookworm main\n\
             deb-src http://m/debian bookworm main\ndeb http://docker bookworm stable\n\
             deb http://pg bookworm-pgdg main\n",
            "",
        );
        assert_eq!(
            sources_from(tmp.path(), "bookworm"),
            ["deb [signed-by=/k] http://m/debian bookworm main"]
        );
    }

    #[test]
    fn a_suite_the_host_does_not_have_comes_from_debian() {
        let tmp = host("deb http://m/debian bookworm main\n", "");
        assert_eq!(
            sources_from(tmp.path(), "trixie"),
            ["deb http://deb.debian.org/debian trixie main"]
        );
        assert_eq!(sources_from(Path::new("/nonexistent"), "sid").len(), 1);
    }

    #[test]
    fn disabled_and_ill_formed_stanzas_are_left() {
        assert!(deb822("Enabled: no\nTypes: deb\nURIs: u\nSuites: s\nComponents: main").is_empty());
        assert!(deb822("no colon\n:\n\n::").is_empty());
        assert_eq!(one_line("deb [unclosed http://m s main"), None);
        assert_eq!(one_line("deb"), None);
    }
}
