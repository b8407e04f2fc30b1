//! The store of images, named by content.
//!
//! ```text
//! $DATA/images/<digest>/root.erofs     the image; its BLAKE3 is the digest
//! $DATA/images/<digest>/image.json     ImageRecord
//! $DATA/images/by-tag/<tag>            symlink to ../<digest>
//! $DATA/images/by-recipe/<digest>      symlink to ../<digest>: what a recipe gave last time
//! $DATA/images/.staging-*/             a build at work, or the rest of one that died
//! ```
//!
//! An image is complete before it gets its name: it is built in a staging directory, synced, and renamed.
//! A staging directory whose `lock` nobody holds is removed by the next build.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use forkd_sys::lock::FileLock;
use serde::{Deserialize, Serialize};

use crate::debian;
use crate::erofs::{self, Times};
use crate::error::{ImageError, STAGING};
use crate::recipe::Recipe;
use crate::unpack;

/// Fewest digits of a digest that name an image.
const MIN_PREFIX: usize = 6;
const DIGEST_LEN: usize = 64;
const FORMAT: u32 = 1;

/// What `image.json` says of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// Version of this record, 1.
    pub format: u32,
    /// BLAKE3 of root.erofs, 64 hex digits.
    pub digest: String,
    /// What it was first built from.
    pub recipe: Recipe,
    /// Size of root.erofs in bytes.
    pub size_bytes: u64,
    /// Unix time of the build, in seconds.
    pub created_unix_s: u64,
}

/// An image in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Image {
    /// Its record.
    #[serde(flatten)]
    pub record: ImageRecord,
    /// Its tags, sorted.
    pub tags: Vec<String>,
    /// The EROFS file.
    pub path: PathBuf,
}

/// Outcome of a build.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BuiltImage {
    /// The image.
    #[serde(flatten)]
    pub image: Image,
    /// True if nothing had to be built.
    pub cached: bool,
}

/// The images below one data directory.
#[derive(Debug, Clone)]
pub struct ImageStore {
    dir: PathBuf,
}

impl ImageStore {
    /// The store of a data directory, made if there is none.
    ///
    /// # Errors
    /// The directory can't be made.
    pub fn open(data_dir: &Path) -> Result<Self, ImageError> {
        let dir = data_dir.join("images");
        for sub in ["by-tag", "by-recipe"] {
            let path = dir.join(sub);
            fs::create_dir_all(&path).map_err(|e| ImageError::io("cannot make", &path, e))?;
        }
        Ok(Self { dir })
    }

    /// Builds the image of a recipe and tags it, or finds it built.
    ///
    /// # Errors
    /// What is wrong with the recipe, its source, the tools or the disk. Nothing is left behind.
    pub fn build(
        &self,
        recipe: &Recipe,
        tag: Option<&str>,
        progress: &mut dyn FnMut(&str),
    ) -> Result<BuiltImage, ImageError> {
        recipe.check()?;
        if let Some(tag) = tag {
            crate::check_tag(tag).map_err(ImageError::Recipe)?;
        }
        self.sweep()?;
        let recipe_digest = recipe.digest()?;
        let known = recipe_digest.as_ref().and_then(|d| self.linked("by-recipe", d));
        let (digest, cached) = match known {
            Some(digest) => (digest, true),
            None => (self.build_new(recipe, progress)?, false),
        };
        if let Some(recipe_digest) = recipe_digest {
            self.link("by-recipe", &recipe_digest, &digest)?;
        }
        if let Some(tag) = tag {
            self.link("by-tag", tag, &digest)?;
        }
        Ok(BuiltImage { image: self.load(&digest)?, cached })
    }

    fn build_new(
        &self,
        recipe: &Recipe,
        progress: &mut dyn FnMut(&str),
    ) -> Result<String, ImageError> {
        let staging = tempfile::Builder::new()
            .prefix(STAGING)
            .tempdir_in(&self.dir)
            .map_err(|e| ImageError::io("cannot make a directory in", &self.dir, e))?;
        let lock_path = staging.path().join("lock");
        let _lock = FileLock::try_exclusive(&lock_path)
            .map_err(|e| ImageError::io("cannot lock", &lock_path, io::Error::other(e)))?;
        let result = staging.path().join("image");
        fs::create_dir(&result).map_err(|e| ImageError::io("cannot make", &result, e))?;
        let packed = result.join("root.erofs");
        let own_tree = staging.path().join("tree");
        let is_root = rustix::process::geteuid().is_root();
        match recipe {
            Recipe::Debian(debian) => {
                make_tree(&own_tree)?;
                debian::bootstrap(debian, &own_tree, progress)?;
                progress("packing");
                erofs::pack(&own_tree, &packed, Times::Epoch, false)?;
            }
            Recipe::Tar(tar) => {
                make_tree(&own_tree)?;
                progress("unpacking");
                unpack::unpack(tar, &own_tree)?;
                require_content(&own_tree, tar)?;
                // The archive may have an entry for it, or not: then this is its time.
                File::open(&own_tree)
                    .and_then(|f| f.set_modified(UNIX_EPOCH))
                    .map_err(|e| ImageError::io("cannot set the time of", &own_tree, e))?;
                progress("packing");
                erofs::pack(&own_tree, &packed, Times::Keep, !is_root)?;
            }
            Recipe::Directory(dir) => {
                require_content(dir, dir)?;
                progress("packing");
                erofs::pack(dir, &packed, Times::Keep, !is_root)?;
            }
        }
        progress("hashing");
        let digest = digest_of(&packed)?;
        let size_bytes =
            fs::metadata(&packed).map_err(|e| ImageError::io("cannot stat", &packed, e))?.len();
        let record = ImageRecord {
            format: FORMAT,
            digest: digest.clone(),
            recipe: recipe.clone(),
            size_bytes,
            created_unix_s: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        };
        write_record(&result.join("image.json"), &record)?;
        sync(&packed)?;
        self.publish(&result, &digest)?;
        Ok(digest)
    }

    /// Gives a complete image its name. An image of the same digest that is there already is as good, even if it is
    /// a link to one on another disk.
    fn publish(&self, result: &Path, digest: &str) -> Result<(), ImageError> {
        let home = self.dir.join(digest);
        match fs::rename(result, &home) {
            Ok(()) => sync(&self.dir),
            Err(_) if home.join("image.json").is_file() => Ok(()),
            Err(e) => Err(ImageError::io("cannot make", &home, e)),
        }
    }

    /// All images, the newest first.
    ///
    /// # Errors
    /// The store or a record in it can't be read.
    pub fn list(&self) -> Result<Vec<Image>, ImageError> {
        let mut images = Vec::new();
        for digest in self.digests()? {
            images.push(self.load(&digest)?);
        }
        images.sort_by(|a, b| {
            (b.record.created_unix_s, &a.record.digest)
                .cmp(&(a.record.created_unix_s, &b.record.digest))
        });
        Ok(images)
    }

    /// The image of a tag, a digest, or the unique start of a digest (6 digits at least).
    ///
    /// # Errors
    /// [`ImageError::NotFound`], [`ImageError::Ambiguous`], or its record can't be read.
    pub fn resolve(&self, reference: &str) -> Result<Image, ImageError> {
        let digest = match self.tagged(reference) {
            Some(digest) => digest,
            None => self.by_prefix(reference)?,
        };
        self.load(&digest)
    }

    fn tagged(&self, reference: &str) -> Option<String> {
        crate::check_tag(reference).ok()?;
        self.linked("by-tag", reference)
    }

    fn by_prefix(&self, reference: &str) -> Result<String, ImageError> {
        let missing = || ImageError::NotFound(reference.to_string());
        let hex = reference.bytes().all(|b| b.is_ascii_hexdigit());
        if !hex || !(MIN_PREFIX..=DIGEST_LEN).contains(&reference.len()) {
            return Err(missing());
        }
        let mut fits = self.digests()?.into_iter().filter(|d| d.starts_with(reference));
        let first = fits.next().ok_or_else(missing)?;
        match fits.next() {
            Some(_) => Err(ImageError::Ambiguous(reference.to_string())),
            None => Ok(first),
        }
    }

    /// Looks whether the image is there, whole and a file system, without reading it all: what a loaded snapshot needs,
    /// whose image was verified when it booted.
    ///
    /// # Errors
    /// [`ImageError::Corrupt`], or the file can't be read.
    pub fn check(&self, image: &Image) -> Result<(), ImageError> {
        erofs::check(&image.path)?;
        let meta = fs::metadata(&image.path);
        let len = meta.map_err(|e| ImageError::io("cannot look at", &image.path, e))?.len();
        if len == image.record.size_bytes {
            return Ok(());
        }
        let reason = format!("it has {len} bytes, and should have {}", image.record.size_bytes);
        Err(ImageError::Corrupt { path: image.path.clone(), reason })
    }

    /// Reads the whole image and compares it with its digest.
    ///
    /// # Errors
    /// [`ImageError::Corrupt`], or the file can't be read.
    pub fn verify(&self, image: &Image) -> Result<(), ImageError> {
        erofs::check(&image.path)?;
        if digest_of(&image.path)? == image.record.digest {
            return Ok(());
        }
        Err(ImageError::Corrupt {
            path: image.path.clone(),
            reason: "its content is not what its digest says".to_string(),
        })
    }

    /// Removes a tag, and with its last tag the image; or, by digest, the image with all its tags. `users`
    /// tells who uses an image of a given digest.
    ///
    /// # Errors
    /// [`ImageError::InUse`], [`ImageError::NotFound`], or it can't be removed.
    pub fn remove(
        &self,
        reference: &str,
        users: &dyn Fn(&str) -> Vec<String>,
    ) -> Result<Removed, ImageError> {
        // A damaged record must not keep an image from being removed, so none is read.
        let by_tag = self.tagged(reference);
        let digest = match &by_tag {
            Some(digest) => digest.clone(),
            None => self.by_prefix(reference)?,
        };
        let tags = self.tags_of(&digest)?;
        if by_tag.is_some() && tags.len() > 1 {
            self.unlink("by-tag", reference)?;
            return Ok(Removed { digest, image_removed: false, tags: vec![reference.to_string()] });
        }
        let users = users(&digest);
        if !users.is_empty() {
            return Err(ImageError::InUse {
                image: reference.to_string(),
                users: users.join(", "),
            });
        }
        for tag in &tags {
            self.unlink("by-tag", tag)?;
        }
        // Under a staging name first: what is half removed must not pass for an image.
        let doomed = self.dir.join(format!("{STAGING}rm-{digest}"));
        let home = self.dir.join(&digest);
        fs::rename(&home, &doomed).map_err(|e| ImageError::io("cannot remove", &home, e))?;
        fs::remove_dir_all(&doomed).map_err(|e| ImageError::io("cannot remove", &doomed, e))?;
        for (name, target) in self.links("by-recipe")? {
            if target == digest {
                self.unlink("by-recipe", &name)?;
            }
        }
        Ok(Removed { digest, image_removed: true, tags })
    }

    /// Removes what builds that died have left.
    fn sweep(&self) -> Result<(), ImageError> {
        for entry in self.entries(&self.dir)? {
            let path = entry.path();
            let staged = entry.file_name().to_string_lossy().starts_with(STAGING);
            let held = forkd_sys::lock::is_held(&path.join("lock")).unwrap_or(true);
            if staged && !held && is_old(&path) {
                fs::remove_dir_all(&path).map_err(|e| ImageError::io("cannot remove", &path, e))?;
            }
        }
        Ok(())
    }

    fn load(&self, digest: &str) -> Result<Image, ImageError> {
        let dir = self.dir.join(digest);
        let path = dir.join("image.json");
        let text = fs::read(&path).map_err(|e| ImageError::io("cannot read", &path, e))?;
        let corrupt = |reason| ImageError::Corrupt { path: path.clone(), reason };
        let record: ImageRecord = serde_json::from_slice(&text)
            .map_err(|e| corrupt(format!("it is no image record: {e}")))?;
        if record.digest != digest {
            return Err(corrupt(format!("it tells of image {}", record.digest)));
        }
        Ok(Image { record, tags: self.tags_of(digest)?, path: dir.join("root.erofs") })
    }

    fn digests(&self) -> Result<Vec<String>, ImageError> {
        let names = self.entries(&self.dir)?;
        let names = names.iter().map(|e| e.file_name().to_string_lossy().into_owned());
        Ok(names.filter(|n| is_digest(n)).collect())
    }

    fn tags_of(&self, digest: &str) -> Result<Vec<String>, ImageError> {
        let links = self.links("by-tag")?;
        let mut tags: Vec<String> = links
            .into_iter()
            .filter(|(_, target)| target == digest)
            .map(|(name, _)| name)
            .collect();
        tags.sort();
        Ok(tags)
    }

    /// All links of a kind: name, digest it points to.
    fn links(&self, kind: &str) -> Result<Vec<(String, String)>, ImageError> {
        let mut links = Vec::new();
        for entry in self.entries(&self.dir.join(kind))? {
            let name = entry.file_name().to_string_lossy().into_owned();
            if let Some(digest) = self.linked(kind, &name) {
                links.push((name, digest));
            }
        }
        Ok(links)
    }

    /// The digest that a link points to, if that image is there.
    fn linked(&self, kind: &str, name: &str) -> Option<String> {
        let target = fs::read_link(self.dir.join(kind).join(name)).ok()?;
        let digest = target.file_name()?.to_str()?.to_string();
        let whole = is_digest(&digest) && self.dir.join(&digest).join("image.json").is_file();
        whole.then_some(digest)
    }

    /// Points a link to a digest, replacing what it pointed to.
    fn link(&self, kind: &str, name: &str, digest: &str) -> Result<(), ImageError> {
        let dir = self.dir.join(kind);
        let path = dir.join(name);
        let staged = dir.join(format!(".{name}.{}", std::process::id()));
        let failed = |e| ImageError::io("cannot write", &path, e);
        match fs::remove_file(&staged) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed(e)),
            _ => {}
        }
        symlink(Path::new("..").join(digest), &staged).map_err(failed)?;
        fs::rename(&staged, &path).map_err(failed)
    }

    fn unlink(&self, kind: &str, name: &str) -> Result<(), ImageError> {
        let path = self.dir.join(kind).join(name);
        fs::remove_file(&path).map_err(|e| ImageError::io("cannot remove", &path, e))
    }

    fn entries(&self, dir: &Path) -> Result<Vec<fs::DirEntry>, ImageError> {
        fs::read_dir(dir)
            .and_then(Iterator::collect)
            .map_err(|e| ImageError::io("cannot read", dir, e))
    }
}

/// What a removal did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Removed {
    /// Digest of the image.
    pub digest: String,
    /// False if only a tag went, and others keep the image.
    pub image_removed: bool,
    /// The tags that went.
    pub tags: Vec<String>,
}

fn is_digest(name: &str) -> bool {
    name.len() == DIGEST_LEN && name.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// A build takes its lock a moment after it makes the directory: leave the very young alone.
fn is_old(path: &Path) -> bool {
    let age = fs::metadata(path).and_then(|m| m.modified()).ok();
    age.and_then(|t| t.elapsed().ok()).is_some_and(|age| age.as_secs() >= 2)
}

fn make_tree(path: &Path) -> Result<(), ImageError> {
    use std::os::unix::fs::PermissionsExt;
    fs::create_dir(path)
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o755)))
        .map_err(|e| ImageError::io("cannot make", path, e))
}

/// Fails for a tree that holds nothing, which is always a mistake.
fn require_content(tree: &Path, source: &Path) -> Result<(), ImageError> {
    let mut entries = fs::read_dir(tree).map_err(|e| ImageError::io("cannot read", tree, e))?;
    match entries.next() {
        Some(_) => Ok(()),
        None => Err(ImageError::Recipe(format!("{} holds no files", source.display()))),
    }
}

fn digest_of(path: &Path) -> Result<String, ImageError> {
    let failed = |e| ImageError::io("cannot read", path, e);
    let file = File::open(path).map_err(failed)?;
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(file).map_err(failed)?;
    Ok(hasher.finalize().to_hex().to_string())
}

fn write_record(path: &Path, record: &ImageRecord) -> Result<(), ImageError> {
    let text = serde_json::to_vec_pretty(record)
        .map_err(|e| ImageError::io("cannot write", path, io::Error::other(e)))?;
    fs::write(path, text).map_err(|e| ImageError::io("cannot write", path, e))?;
    sync(path)
}

fn sync(path: &Path) -> Result<(), ImageError> {
    File::open(path).and_then(|f| f.sync_all()).map_err(|e| ImageError::io("cannot sync", path, e))
}
