//! `forkd image build|ls|rm`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Subcommand;
use forkd_image::recipe::DebianRecipe;
use forkd_image::{BuiltImage, ImageError, ImageStore, Recipe};

use crate::cli::OutputArgs;
use crate::commands::info::short_digest;
use crate::paths::Paths;
use crate::progress::Step;
use crate::{output, registry};

/// Tag of the image of the built-in recipe.
pub const PYTHON: &str = "python";

/// Build, list and remove root images
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Build(Build),
    Ls(Ls),
    Rm(Rm),
}

/// Build a root image
///
/// From a Debian suite, a directory, a tar archive or a recipe file; without any of these, Debian with Python
/// and numpy. What was built before is not built again.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  forkd image build                                       Debian, Python, numpy; tagged \"python\"
  forkd image build --tag node --debian bookworm --package nodejs
  forkd image build --tag mine --dir ./rootfs
  forkd image build --tag alpine --tar alpine-minirootfs.tar.gz
  forkd image build --tag python --recipe guest/rootfs/python.json")]
struct Build {
    /// Tag of the image; an image that had it loses it
    #[arg(short, long)]
    tag: Option<String>,
    /// Debian suite, such as bookworm
    #[arg(long, value_name = "SUITE", group = "source")]
    debian: Option<String>,
    /// Debian package beside the essential ones; may be given more than once
    #[arg(short, long, value_name = "NAME", requires = "debian")]
    package: Vec<String>,
    /// Debian mirror; by default what this host's apt uses
    #[arg(long, value_name = "URL", requires = "debian")]
    mirror: Option<String>,
    /// Directory to pack as it is
    #[arg(long, group = "source")]
    dir: Option<PathBuf>,
    /// Tar archive: plain, .gz, .xz or .zst
    #[arg(long, value_name = "FILE", group = "source")]
    tar: Option<PathBuf>,
    /// Recipe file, see guest/rootfs/README.md
    #[arg(long, value_name = "FILE", group = "source")]
    recipe: Option<PathBuf>,
    #[command(flatten)]
    output: OutputArgs,
}

/// List root images
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  forkd image ls
  forkd image ls --json")]
struct Ls {
    #[command(flatten)]
    output: OutputArgs,
}

/// Remove root images
///
/// By tag: the tag, and with its last tag the image. By digest: the image and all its tags.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  forkd image rm node
  forkd image rm 3f9c2b71a0de")]
struct Rm {
    /// Tags, digests, or unique starts of digests
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<String>,
    #[command(flatten)]
    output: OutputArgs,
}

impl Args {
    /// Runs the verb.
    ///
    /// # Errors
    /// What could not be done to which image.
    pub fn run(self, paths: &Paths) -> Result<ExitCode> {
        match self.verb {
            Verb::Build(build) => build.run(paths),
            Verb::Ls(ls) => ls.run(paths),
            Verb::Rm(rm) => rm.run(paths),
        }
    }
}

impl Build {
    fn run(self, paths: &Paths) -> Result<ExitCode> {
        let recipe = self.recipe()?;
        let built_in = self.debian.is_none()
            && self.dir.is_none()
            && self.tar.is_none()
            && self.recipe.is_none();
        let tag = self.tag.as_deref().or(built_in.then_some(PYTHON));
        let built = build(paths, &recipe, tag, self.output.json)?;
        let image = &built.image;
        if self.output.json {
            output::json(&built)?;
        } else {
            let tags = if image.tags.is_empty() {
                String::new()
            } else {
                format!("  {}", image.tags.join(", "))
            };
            let size = output::bytes(image.record.size_bytes);
            output::line(&format!("{}  {size}{tags}", short_digest(&image.record.digest)))?;
        }
        Ok(ExitCode::SUCCESS)
    }

    fn recipe(&self) -> Result<Recipe> {
        if let Some(suite) = &self.debian {
            return Ok(Recipe::Debian(DebianRecipe {
                suite: suite.clone(),
                packages: self.package.clone(),
                exclude: Vec::new(),
                mirror: self.mirror.clone(),
            }));
        }
        if let Some(dir) = &self.dir {
            return Ok(Recipe::Directory(dir.clone()));
        }
        if let Some(tar) = &self.tar {
            return Ok(Recipe::Tar(tar.clone()));
        }
        match &self.recipe {
            Some(file) => Ok(Recipe::read(file)?),
            None => Ok(Recipe::python()?),
        }
    }
}

/// Builds an image, showing progress unless `quiet`.
///
/// # Errors
/// Those of the store.
pub fn build(paths: &Paths, recipe: &Recipe, tag: Option<&str>, quiet: bool) -> Result<BuiltImage> {
    let store = ImageStore::open(&paths.data)?;
    let mut step = Step::begin(&format!("root image: {}", recipe.summary()), quiet);
    let built = store.build(recipe, tag, &mut |line| step.at(line))?;
    step.done(if built.cached { "was built before" } else { "" });
    Ok(built)
}

impl Ls {
    fn run(self, paths: &Paths) -> Result<ExitCode> {
        let images = ImageStore::open(&paths.data)?.list()?;
        if self.output.json {
            output::json(&images)?;
        } else if images.is_empty() {
            output::line("no images; `forkd image build` builds one")?;
        } else {
            let rows = images.iter().map(|image| {
                vec![
                    if image.tags.is_empty() { "-".to_string() } else { image.tags.join(", ") },
                    short_digest(&image.record.digest).to_string(),
                    output::bytes(image.record.size_bytes),
                    output::age(image.record.created_unix_s.saturating_mul(1000)),
                    image.record.recipe.summary(),
                ]
            });
            output::line(&output::table(&["tag", "digest", "size", "age", "built from"], rows))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Rm {
    fn run(self, paths: &Paths) -> Result<ExitCode> {
        let store = ImageStore::open(&paths.data)?;
        let mut removed = Vec::new();
        for image in &self.images {
            // Read anew for each: what can't be read counts as used, or a living VM could lose its root.
            let users = |digest: &str| {
                registry::users_of_image(paths, digest)
                    .unwrap_or_else(|e| vec![format!("({})", output::error_line(&e))])
            };
            match store.remove(image, &users) {
                Ok(done) => removed.push(done),
                Err(e @ ImageError::NotFound(_)) if removed.is_empty() => return Err(e.into()),
                Err(e) => bail!("{e}{}", already(&removed)),
            }
        }
        if self.output.json {
            output::json(&removed)?;
        } else {
            for done in &removed {
                let tags = done.tags.join(", ");
                output::line(&match (done.image_removed, tags.is_empty()) {
                    (true, true) => short_digest(&done.digest).to_string(),
                    (true, false) => format!("{}  {tags}", short_digest(&done.digest)),
                    (false, _) => format!("tag {tags}; the image has other tags"),
                })?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn already(removed: &[forkd_image::Removed]) -> String {
    match removed.len() {
        0 => String::new(),
        n => format!(" ({n} removed before)"),
    }
}
