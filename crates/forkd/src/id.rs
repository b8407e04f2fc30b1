//! Ids and names of VMs.

use anyhow::{Context, Result, bail};

/// Crockford's base 32 in lower case: no i, l, o, u.
const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
/// Random characters of an id: 50 bits.
const LEN: usize = 10;
/// A name is also the guest's host name, whose labels have 63 characters at most (RFC 1035).
const MAX_NAME: usize = 63;

/// A new id: `vm-` and ten random characters.
///
/// # Errors
/// The kernel gives no random bytes.
pub fn new() -> Result<String> {
    let mut bytes = [0u8; LEN];
    forkd_sys::random::fill(&mut bytes).context("cannot get random bytes")?;
    let mut id = String::from("vm-");
    id.extend(bytes.iter().map(|b| char::from(ALPHABET[usize::from(b & 31)])));
    Ok(id)
}

/// Checks a name that a user gives: a host name label.
///
/// # Errors
/// One line that says what is wrong with it.
pub fn check_name(name: &str) -> Result<()> {
    let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if name.is_empty() || name.len() > MAX_NAME {
        bail!("{name:?} is no valid name: it must have 1 to {MAX_NAME} characters");
    }
    if !name.chars().all(good) || name.starts_with('-') || name.ends_with('-') {
        bail!(
            "{name:?} is no valid name: it is the guest's host name, so only a-z, 0-9 and inner '-' are allowed"
        );
    }
    Ok(())
}

/// Names of `count` children: the prefix itself for one, `prefix-1`... for more; their ids without one.
///
/// # Errors
/// The names would not be valid.
pub fn child_names(prefix: Option<&str>, ids: &[String]) -> Result<Vec<String>> {
    let Some(prefix) = prefix else { return Ok(ids.to_vec()) };
    let names: Vec<String> = match ids.len() {
        1 => vec![prefix.to_string()],
        count => (1..=count).map(|n| format!("{prefix}-{n}")).collect(),
    };
    names.iter().try_for_each(|name| check_name(name))?;
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_crockford_and_differ() {
        let (a, b) = (new().unwrap(), new().unwrap());
        assert_ne!(a, b);
        assert_eq!(a.len(), 13);
        assert!(a.starts_with("vm-") && a[3..].bytes().all(|c| ALPHABET.contains(&c)));
        check_name(&a).unwrap();
    }

    #[test]
    fn names_are_host_names() {
        for good in ["a", "web-1", &"a".repeat(63)] {
            check_name(good).unwrap();
        }
        for bad in ["", "-a", "a-", "a.b", "a_b", "A", "a/b", "ä", &"a".repeat(64)] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn children_are_numbered_if_there_are_more() {
        let ids = ["vm-1".to_string(), "vm-2".to_string()];
        assert_eq!(child_names(Some("w"), &ids).unwrap(), ["w-1", "w-2"]);
        assert_eq!(child_names(Some("w"), &ids[..1]).unwrap(), ["w"]);
        assert_eq!(child_names(None, &ids).unwrap(), ids);
        assert!(child_names(Some(&"w".repeat(62)), &ids).is_err());
    }
}
