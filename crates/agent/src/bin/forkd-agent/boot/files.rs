//! Files of /etc that programs expect and an image may lack, because containers get them from outside.

use std::fs::OpenOptions;
use std::io::{self, Write as _};

const DEFAULTS: [(&str, &str); 2] = [
    ("/etc/hosts", "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"),
    ("/etc/resolv.conf", "nameserver 1.1.1.1\nnameserver 8.8.8.8\n"),
];

/// Writes those that are missing.
///
/// # Errors
///
/// One cannot be written.
pub fn defaults() -> io::Result<()> {
    for (path, text) in DEFAULTS {
        let mut open = OpenOptions::new();
        let file = open.write(true).create_new(true);
        match file.open(path) {
            Ok(mut file) => file.write_all(text.as_bytes())?,
            // A link to nowhere exists as well: systemd's images have one for resolv.conf.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                std::fs::create_dir_all("/etc")?;
                file.open(path)?.write_all(text.as_bytes())?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
