//! Root images: build, content-addressed store, initramfs.
//!
//! A root image is one EROFS file. It is made from a [`Recipe`] (a Debian suite with packages, a directory,
//! or a tar) and packed so that equal content gives equal bytes: no clock, no random id. The BLAKE3 of
//! those bytes is the image's digest, and the digest is its name in the [`ImageStore`]. Tags are links
//! to digests. The guest maps the file as persistent memory (DAX), so it is never compressed, and each
//! file's data starts on a 4 KiB boundary.
//!
//! Nothing of forkd is in an image. The guest agent travels in an initramfs, see [`initramfs`].
#![forbid(unsafe_code)]

mod apt;
pub mod cpio;
mod debian;
pub mod erofs;
mod error;
pub mod initramfs;
pub mod recipe;
mod store;
pub mod tools;
mod unpack;

pub use error::ImageError;
pub use recipe::Recipe;
pub use store::{BuiltImage, Image, ImageRecord, ImageStore, Removed};

/// Checks the name of a snapshot or an image: 1 to 63 of `a-z 0-9 . _ -`, the first a letter or digit.
///
/// # Errors
/// One line that says what is wrong with it.
pub fn check_tag(tag: &str) -> Result<(), String> {
    let bad = |why: &str| Err(format!("{tag:?} is no valid tag: {why}"));
    let mut chars = tag.chars();
    match chars.next() {
        None => return bad("it is empty"),
        Some(c) if !(c.is_ascii_lowercase() || c.is_ascii_digit()) => {
            return bad("it must start with a letter a-z or a digit");
        }
        Some(_) => {}
    }
    if tag.contains('/') {
        return bad("a slash is not allowed");
    }
    if !chars.all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-".contains(c)) {
        return bad("only a-z, 0-9, '.', '_' and '-' are allowed");
    }
    if tag.len() > 63 {
        return bad("it is longer than 63 characters");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::check_tag;

    #[test]
    fn tags_are_plain_names() {
        for good in ["a", "0", "py-3.11_numpy", &"a".repeat(63)] {
            assert_eq!(check_tag(good), Ok(()));
        }
        for bad in ["", "a/b", "../x", ".a", "-a", "A", "a b", "ä", "a\n", &"a".repeat(64)] {
            assert!(check_tag(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_slash_is_named_in_the_error() {
        assert!(check_tag("a/b").unwrap_err().contains("slash"));
    }
}
