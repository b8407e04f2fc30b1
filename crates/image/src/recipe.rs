//! What goes into an image: a Debian suite with packages, a directory, or a tar.

use std::fs::File;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::ImageError;

/// The recipe of the image that `forkd quickstart` uses: guest/rootfs/python.json.
const PYTHON: &str = include_str!("../../../guest/rootfs/python.json");
/// Raise it when the same Debian recipe comes to give another image.
const DEBIAN_REVISION: u32 = 1;
/// Most packages or excluded paths of one recipe.
const MAX_LIST: usize = 4096;
/// Longest recipe file.
const MAX_RECIPE_BYTES: u64 = 1 << 20;

/// What goes into an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Recipe {
    /// Packages of a Debian suite.
    Debian(DebianRecipe),
    /// A directory, as it is.
    Directory(PathBuf),
    /// A tar archive: plain, or compressed by gzip, xz or zstd.
    Tar(PathBuf),
}

/// Packages of a Debian suite.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DebianRecipe {
    /// Suite or code name, e.g. `bookworm`.
    pub suite: String,
    /// Packages beside the essential ones.
    #[serde(default)]
    pub packages: Vec<String>,
    /// Paths not to unpack, as dpkg's path-exclude takes them, beside those that are always left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,
    /// Mirror to load from; by default what this host's apt uses for the suite.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mirror: Option<String>,
}

impl Recipe {
    /// Debian with Python and numpy, as built into forkd.
    ///
    /// # Errors
    /// Never, while guest/rootfs/python.json is a recipe, which a test shows.
    pub fn python() -> Result<Self, ImageError> {
        Self::parse(PYTHON, "guest/rootfs/python.json")
    }

    /// Reads a recipe file. Relative paths in it are relative to the file.
    ///
    /// # Errors
    /// The file can't be read, or is no recipe.
    pub fn read(path: &Path) -> Result<Self, ImageError> {
        let file = File::open(path).map_err(|e| ImageError::io("cannot open recipe", path, e))?;
        let text = std::io::read_to_string(std::io::Read::take(file, MAX_RECIPE_BYTES))
            .map_err(|e| ImageError::io("cannot read recipe", path, e))?;
        let base = path.parent().unwrap_or(Path::new("."));
        Ok(match Self::parse(&text, &path.display().to_string())? {
            Self::Directory(dir) => Self::Directory(base.join(dir)),
            Self::Tar(tar) => Self::Tar(base.join(tar)),
            debian => debian,
        })
    }

    fn parse(text: &str, name: &str) -> Result<Self, ImageError> {
        let recipe: Self = serde_json::from_str(text)
            .map_err(|e| ImageError::Recipe(format!("{name} is no recipe: {e}")))?;
        recipe.check()?;
        Ok(recipe)
    }

    /// Checks names before anything is run or written.
    ///
    /// # Errors
    /// Names the word that can't be right.
    pub fn check(&self) -> Result<(), ImageError> {
        let Self::Debian(debian) = self else { return Ok(()) };
        let bad = |what: &str, word: &str| {
            Err(ImageError::Recipe(format!("{word:?} is no valid {what}")))
        };
        if !is_name(&debian.suite, "-._/") {
            return bad("Debian suite", &debian.suite);
        }
        if debian.packages.len() > MAX_LIST || debian.exclude.len() > MAX_LIST {
            return Err(ImageError::Recipe(format!(
                "a list of the recipe is longer than {MAX_LIST}"
            )));
        }
        if let Some(word) = debian.packages.iter().find(|p| !is_name(p, "-.+:")) {
            return bad("Debian package name", word);
        }
        let ill =
            |p: &&String| !p.starts_with('/') || p.chars().any(|c| c.is_control() || c == '\'');
        if let Some(word) = debian.exclude.iter().find(ill) {
            return bad("path to exclude (it must be absolute)", word);
        }
        let ill = |m: &&String| {
            m.starts_with('-')
                || m.chars().any(|c| c.is_control() || c.is_whitespace() || c == '\'')
        };
        match debian.mirror.iter().find(ill) {
            Some(word) => bad("mirror", word),
            None => Ok(()),
        }
    }

    /// Digest that stands for the image this will give, for the cache of builds. A directory has none: to
    /// read it all costs as much as packing it.
    ///
    /// # Errors
    /// A tar that can't be read.
    pub(crate) fn digest(&self) -> Result<Option<String>, ImageError> {
        let mut hasher = blake3::Hasher::new();
        match self {
            Self::Directory(_) => return Ok(None),
            Self::Tar(path) => {
                let file = File::open(path).map_err(|e| ImageError::io("cannot open", path, e))?;
                hasher.update(b"tar 1\0");
                hasher.update_reader(file).map_err(|e| ImageError::io("cannot read", path, e))?;
            }
            Self::Debian(debian) => {
                let text = serde_json::to_vec(debian)
                    .map_err(|e| ImageError::Recipe(format!("cannot write the recipe: {e}")))?;
                hasher.update(format!("debian {DEBIAN_REVISION}\0").as_bytes()).update(&text);
            }
        }
        Ok(Some(hasher.finalize().to_hex().to_string()))
    }

    /// One line for people.
    pub fn summary(&self) -> String {
        match self {
            Self::Debian(d) if d.packages.is_empty() => format!("Debian {}", d.suite),
            Self::Debian(d) => format!("Debian {} with {}", d.suite, d.packages.join(", ")),
            Self::Directory(path) => format!("directory {}", path.display()),
            Self::Tar(path) => format!("tar {}", path.display()),
        }
    }
}

/// Letters, digits and the characters of `more`; the first a letter or digit.
fn is_name(word: &str, more: &str) -> bool {
    word.len() <= 128
        && word.chars().next().is_some_and(|c| c.is_ascii_alphanumeric())
        && word.chars().all(|c| c.is_ascii_alphanumeric() || more.contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn debian(suite: &str, packages: &[&str]) -> Recipe {
        Recipe::Debian(DebianRecipe {
            suite: suite.into(),
            packages: packages.iter().map(ToString::to_string).collect(),
            exclude: Vec::new(),
            mirror: None,
        })
    }

    #[test]
    fn the_built_in_recipe_is_one() {
        let Recipe::Debian(python) = Recipe::python().unwrap() else { panic!("no Debian recipe") };
        assert!(python.packages.contains(&"python3-numpy".to_string()));
    }

    #[test]
    fn words_that_would_be_options_or_code_are_refused() {
        for recipe in [
            debian("", &[]),
            debian("--help", &[]),
            debian("bookworm; id", &[]),
            debian("bookworm", &["-o=x"]),
            debian("bookworm", &["a b"]),
        ] {
            assert!(recipe.check().is_err(), "{recipe:?}");
        }
        assert!(debian("bookworm", &["g++", "libc6:amd64"]).check().is_ok());
    }

    #[test]
    fn unknown_fields_are_errors_that_name_the_file() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("r.json");
        std::fs::write(&path, r#"{"debian": {"suite": "sid", "pakages": []}}"#).unwrap();
        let error = Recipe::read(&path).unwrap_err().to_string();
        assert!(error.contains("r.json") && error.contains("pakages"), "{error}");
    }

    #[test]
    fn relative_paths_are_relative_to_the_file() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("r.json");
        std::fs::write(&path, r#"{"tar": "x.tar"}"#).unwrap();
        assert_eq!(Recipe::read(&path).unwrap(), Recipe::Tar(tmp.path().join("x.tar")));
    }

    #[test]
    fn the_digest_follows_the_content() {
        let tmp = tempfile::tempdir().unwrap();
        let (a, b) = (tmp.path().join("a"), tmp.path().join("b"));
        std::fs::write(&a, "same").unwrap();
        std::fs::write(&b, "same").unwrap();
        let digest = |p: &Path| Recipe::Tar(p.to_path_buf()).digest().unwrap().unwrap();
        assert_eq!(digest(&a), digest(&b));
        std::fs::write(&b, "other").unwrap();
        assert_ne!(digest(&a), digest(&b));
        assert_ne!(
            debian("sid", &["a"]).digest().unwrap(),
            debian("sid", &["b"]).digest().unwrap()
        );
    }
}
