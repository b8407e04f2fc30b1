//! The image store, on small trees, with the real tools.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use forkd_image::{BuiltImage, ImageError, ImageStore, Recipe};

struct Host {
    tmp: tempfile::TempDir,
    store: ImageStore,
}

impl Host {
    fn new() -> Self {
        let tmp = tempfile::tempdir().unwrap();
        let store = ImageStore::open(&tmp.path().join("data")).unwrap();
        Self { tmp, store }
    }

    fn tree(&self, name: &str, content: &str) -> PathBuf {
        let dir = self.tmp.path().join(name);
        fs::create_dir_all(dir.join("etc")).unwrap();
        fs::write(dir.join("etc/motd"), content).unwrap();
        dir
    }

    fn tar(&self, name: &str, content: &str) -> Recipe {
        let tree = self.tree(&format!("{name}.tree"), content);
        let path = self.tmp.path().join(name);
        let status = Command::new("tar")
            .args(["--create", "--mtime=@1000000000", "--file"])
            .arg(&path)
            .arg("--directory")
            .arg(tree)
            .arg("etc")
            .status();
        assert!(status.unwrap().success());
        Recipe::Tar(path)
    }

    fn build(&self, recipe: &Recipe, tag: &str) -> BuiltImage {
        self.store.build(recipe, Some(tag), &mut |_| {}).unwrap()
    }

    fn staging(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.tmp.path().join("data/images")).unwrap();
        let paths = entries.map(|e| e.unwrap().path());
        paths.filter(|p| p.file_name().unwrap().to_string_lossy().starts_with(".staging")).collect()
    }
}

fn nobody(_: &str) -> Vec<String> {
    Vec::new()
}

#[test]
fn the_same_content_is_one_image_whatever_it_came_from() {
    let host = Host::new();
    let first = host.build(&host.tar("a.tar", "hello"), "one");
    let second = host.build(&host.tar("b.tar", "hello"), "two");
    assert_eq!(first.image.record.digest, second.image.record.digest);
    assert_eq!(second.image.tags, ["one", "two"]);
    assert_eq!(host.store.list().unwrap().len(), 1);
    let bytes = fs::read(&first.image.path).unwrap();
    assert_eq!(blake3::hash(&bytes).to_hex().as_str(), first.image.record.digest);
    host.store.verify(&first.image).unwrap();
    assert!(host.staging().is_empty());
}

#[test]
fn a_known_recipe_is_not_built_again() {
    let host = Host::new();
    let recipe = host.tar("a.tar", "hello");
    assert!(!host.build(&recipe, "x").cached);
    assert!(host.build(&recipe, "x").cached);
    host.store.remove("x", &nobody).unwrap();
    assert!(!host.build(&recipe, "x").cached, "a removed image must be built again");
}

/// A store may have its images elsewhere.
#[test]
fn an_image_that_is_a_link_is_as_good() {
    let host = Host::new();
    let first = host.build(&host.tar("a.tar", "hello"), "one");
    let home = first.image.path.parent().unwrap();
    let elsewhere = host.tmp.path().join("elsewhere");
    fs::rename(home, &elsewhere).unwrap();
    std::os::unix::fs::symlink(&elsewhere, home).unwrap();
    let second = host.build(&host.tar("b.tar", "hello"), "two");
    assert_eq!(second.image.tags, ["one", "two"]);
    assert!(home.is_symlink() && host.staging().is_empty());
    // It is the link that goes with the last tag.
    host.store.remove(&first.image.record.digest, &nobody).unwrap();
    assert!(!home.exists() && elsewhere.join("image.json").is_file());
}

#[test]
fn a_tag_moves_to_the_newer_image() {
    let host = Host::new();
    let old = host.build(&host.tar("a.tar", "old"), "t").image.record.digest;
    let new = host.build(&Recipe::Directory(host.tree("d", "new")), "t").image.record.digest;
    assert_ne!(old, new);
    assert_eq!(host.store.resolve("t").unwrap().record.digest, new);
    assert!(host.store.resolve(&old[..12]).unwrap().tags.is_empty());
}

#[test]
fn images_are_found_by_tag_digest_and_prefix() {
    let host = Host::new();
    let digest = host.build(&host.tar("a.tar", "hello"), "t").image.record.digest;
    for reference in ["t", &digest, &digest[..6]] {
        assert_eq!(host.store.resolve(reference).unwrap().record.digest, digest);
    }
    for reference in ["", "u", &digest[..5], "../t", "by-tag", "ffffffffffff"] {
        let error = host.store.resolve(reference).unwrap_err();
        assert!(matches!(error, ImageError::NotFound(_)), "{reference}: {error}");
    }
}

#[test]
fn an_image_in_use_stays() {
    let host = Host::new();
    let digest = host.build(&host.tar("a.tar", "hello"), "t").image.record.digest;
    let used = |d: &str| if d == digest { vec!["vm-1".to_string()] } else { Vec::new() };
    let error = host.store.remove("t", &used).unwrap_err();
    assert!(error.to_string().contains("vm-1"), "{error}");
    assert_eq!(host.store.resolve("t").unwrap().record.digest, digest);
}

#[test]
fn the_image_goes_with_its_last_tag_or_by_digest() {
    let host = Host::new();
    let recipe = host.tar("a.tar", "hello");
    let digest = host.build(&recipe, "t").image.record.digest;
    host.build(&recipe, "u");
    assert!(!host.store.remove("t", &nobody).unwrap().image_removed);
    assert_eq!(host.store.resolve("u").unwrap().record.digest, digest);
    assert!(host.store.remove("u", &nobody).unwrap().image_removed);
    assert!(host.store.list().unwrap().is_empty());

    host.build(&recipe, "t");
    host.build(&recipe, "u");
    assert_eq!(host.store.remove(&digest, &nobody).unwrap().tags, ["t", "u"]);
    assert!(host.store.list().unwrap().is_empty());
    assert!(host.staging().is_empty());
}

#[test]
fn damage_is_noticed() {
    let host = Host::new();
    let image = host.build(&host.tar("a.tar", "hello"), "t").image;
    let mut bytes = fs::read(&image.path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&image.path, &bytes).unwrap();
    assert!(matches!(host.store.verify(&image), Err(ImageError::Corrupt { .. })));
    fs::write(image.path.with_file_name("image.json"), "{").unwrap();
    let error = host.store.resolve("t").unwrap_err().to_string();
    assert!(error.contains("image.json") && error.contains("corrupt"), "{error}");
    host.store.remove("t", &nobody).unwrap();
}

#[test]
fn failed_builds_leave_nothing() {
    let host = Host::new();
    let empty = host.tmp.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let not_tar = host.tmp.path().join("text.tar");
    fs::write(&not_tar, vec![b'x'; 2000]).unwrap();
    let no_bytes = host.tmp.path().join("empty.tar");
    fs::write(&no_bytes, "").unwrap();
    for source in [
        Recipe::Directory(empty),
        Recipe::Directory("/nonexistent".into()),
        Recipe::Tar(not_tar),
        Recipe::Tar(no_bytes),
        Recipe::Tar("/nonexistent.tar".into()),
    ] {
        let error = host.store.build(&source, Some("t"), &mut |_| {}).unwrap_err().to_string();
        let path = match &source {
            Recipe::Directory(p) | Recipe::Tar(p) => p.clone(),
            Recipe::Debian(_) => unreachable!(),
        };
        assert!(error.contains(&path.display().to_string()), "{error}");
    }
    assert!(host.store.list().unwrap().is_empty());
    assert!(host.staging().is_empty());
    let bad_tag = host.store.build(&host.tar("a.tar", "x"), Some("a/b"), &mut |_| {});
    assert!(bad_tag.unwrap_err().to_string().contains("slash"));
}

#[test]
fn the_rest_of_a_build_that_died_is_removed() {
    let host = Host::new();
    let dead = host.tmp.path().join("data/images/.staging-dead");
    fs::create_dir_all(dead.join("tree/etc")).unwrap();
    host.build(&host.tar("a.tar", "one"), "t");
    assert!(dead.exists(), "a young one may be a build that is about to take its lock");
    fs::File::open(&dead).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
    host.build(&host.tar("b.tar", "two"), "t");
    assert!(!dead.exists());
}
