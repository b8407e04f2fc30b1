//! Root images: build, content-addressed store, initramfs.
#![forbid(unsafe_code)]
