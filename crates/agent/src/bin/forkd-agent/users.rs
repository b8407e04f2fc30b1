//! Users of the image, from /etc/passwd and /etc/group.
//!
//! root is known without looking: reading two files costs milliseconds where system calls are slow,
//! and user 0 with home /root is the rule of every distribution.

use std::fs;
use std::io;

use crate::spawn::Credentials;

/// Longest passwd or group file read, in bytes.
const MAX_FILE: u64 = 4 << 20;
/// Most supplementary groups (Linux's NGROUPS_MAX).
const MAX_GROUPS: usize = 65_536;

/// A user that a process can run as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// Name.
    pub name: String,
    /// Home directory.
    pub home: String,
    /// Login shell.
    pub shell: String,
    /// Ids.
    pub credentials: Credentials,
}

/// A user cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// Not in /etc/passwd.
    #[error("no user {0:?} in /etc/passwd")]
    Unknown(String),
    /// A file cannot be read.
    #[error("cannot read {0}: {1}")]
    Read(&'static str, io::Error),
}

/// The user of this name, or number.
///
/// # Errors
///
/// There is none, or /etc/passwd cannot be read.
pub fn lookup(name: &str) -> Result<User, UserError> {
    if name == "root" || name == "0" {
        return Ok(User {
            name: "root".into(),
            home: "/root".into(),
            shell: "/bin/sh".into(),
            credentials: Credentials { uid: 0, gid: 0, groups: vec![0] },
        });
    }
    let passwd = read("/etc/passwd")?;
    let mut user = parse_passwd(&passwd, name).ok_or_else(|| UserError::Unknown(name.into()))?;
    // An image without groups is one without supplementary groups.
    let group = read("/etc/group").unwrap_or_default();
    user.credentials.groups.extend(parse_groups(&group, &user.name, user.credentials.gid));
    Ok(user)
}

fn read(path: &'static str) -> Result<String, UserError> {
    use std::io::Read as _;
    let read = || {
        let mut bytes = Vec::new();
        fs::File::open(path)?.take(MAX_FILE).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    read().map_err(|e| UserError::Read(path, e))
}

fn parse_passwd(text: &str, wanted: &str) -> Option<User> {
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        let (name, _password) = (fields.next()?, fields.next()?);
        let (uid, gid) = (fields.next()?, fields.next()?);
        if name != wanted && uid != wanted {
            return None;
        }
        let (_gecos, home, shell) = (fields.next()?, fields.next()?, fields.next().unwrap_or(""));
        let (uid, gid) = (uid.parse().ok()?, gid.parse().ok()?);
        Some(User {
            name: name.into(),
            home: if home.is_empty() { "/" } else { home }.into(),
            shell: if shell.is_empty() { "/bin/sh" } else { shell }.into(),
            credentials: Credentials { uid, gid, groups: vec![gid] },
        })
    })
}

fn parse_groups(text: &str, user: &str, primary: u32) -> Vec<u32> {
    let gids = text.lines().filter_map(|line| {
        let mut fields = line.split(':').skip(2);
        let (gid, members) = (fields.next()?.parse().ok()?, fields.next()?);
        (gid != primary && members.split(',').any(|member| member == user)).then_some(gid)
    });
    gids.take(MAX_GROUPS - 1).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\n\
                          broken\nuser:x:1000:1001:,,,:/home/user:/bin/zsh\nbare:x:7:7:::\n";

    #[test]
    fn fields_of_passwd() {
        let user = parse_passwd(PASSWD, "user").unwrap();
        assert_eq!((user.home.as_str(), user.shell.as_str()), ("/home/user", "/bin/zsh"));
        assert_eq!((user.credentials.uid, user.credentials.gid), (1000, 1001));
        assert_eq!(parse_passwd(PASSWD, "1000").unwrap(), user);
        let bare = parse_passwd(PASSWD, "bare").unwrap();
        assert_eq!((bare.home.as_str(), bare.shell.as_str()), ("/", "/bin/sh"));
        assert_eq!(parse_passwd(PASSWD, "broken"), None);
        assert_eq!(parse_passwd(PASSWD, "nobody"), None);
    }

    #[test]
    fn groups_of_a_member() {
        let text = "a:x:10:user,b\nb:x:11:other\nc:x:1001:user\nd:x:bad:user\ne:x:12:user\n";
        assert_eq!(parse_groups(text, "user", 1001), [10, 12]);
    }

    #[test]
    fn root_needs_no_file() {
        assert_eq!(lookup("root").unwrap().credentials.uid, 0);
        assert!(matches!(lookup("no such user"), Err(UserError::Unknown(_))));
    }
}
