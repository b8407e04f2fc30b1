//! `POST /init`: who this VM is, and the fork notice.
//!
//! The VMM sends it once after every boot and every fork. The agent answers 204 only when all of it is
//! done: kernel CRNG fed and reseeded, wall clock set, host name and machine id changed, idle
//! interpreters reseeded, connections from before the fork closed. Any other answer is
//! [`InitFault`], and the VMM serves nothing: fail closed.
//!
//! E2B's own fields (`envVars`, `timestamp`, `accessToken`, ...) are read where they mean something here
//! and ignored otherwise, so that its orchestrator's requests are understood.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::base64_bytes;

/// Path of the request.
pub const PATH: &str = "/init";
/// Least entropy of a notice that has an identity, in bytes.
pub const MIN_ENTROPY: usize = 32;
/// Most entropy taken, in bytes.
pub const MAX_ENTROPY: usize = 64;
/// Longest host name (Linux's `__NEW_UTS_LEN`).
pub const MAX_HOSTNAME: usize = 64;

/// Body of `POST /init`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct InitRequest {
    /// Who this VM is now. Absent: it stays who it was (E2B's orchestrator).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity: Option<Identity>,
    /// 32 to 64 bytes from the host's CRNG, unique to this VM. Needed with an identity.
    #[serde(skip_serializing_if = "Vec::is_empty", with = "base64_bytes")]
    pub entropy: Vec<u8>,
    /// Wall clock, nanoseconds since 1970 UTC. Absent: the clock is left alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub realtime_unix_ns: Option<u64>,
    /// Environment of processes started from now on; replaces what was set before, if not empty.
    #[serde(alias = "envVars", skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Why the notice is sent.
    pub reason: Reason,
}

/// Who a VM is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Id of the VM.
    pub id: String,
    /// Host name: letters, digits, `-` and `.`, 1 to 64 bytes.
    #[serde(alias = "name")]
    pub hostname: String,
    /// Forks between the cold boot and this VM.
    #[serde(default)]
    pub generation: u32,
    /// 32 hex digits in lower case (machine-id(5)).
    pub machine_id: String,
}

/// Why a notice is sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reason {
    /// First identity after a cold boot.
    #[default]
    Boot,
    /// This VM was forked off another: nobody is at the other end of older connections.
    Fork,
}

/// Body of an answer other than 204, in envd's form.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InitFault {
    /// HTTP status.
    pub code: u16,
    /// What could not be done.
    pub message: String,
}

/// An identity is malformed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InitError {
    /// The host name would not be one.
    #[error("host name {0:?} is not 1 to {MAX_HOSTNAME} letters, digits, '-' or '.'")]
    Hostname(String),
    /// The machine id would not be one.
    #[error("machine id {0:?} is not 32 hex digits in lower case")]
    MachineId(String),
    /// Too little or too much entropy.
    #[error("entropy of {0} bytes: {MIN_ENTROPY} to {MAX_ENTROPY} are needed")]
    Entropy(usize),
    /// A variable's name is empty or has `=` or NUL, or its value has NUL.
    #[error("environment variable {0:?} has a name or value that no process could be given")]
    Env(String),
}

impl InitRequest {
    /// Checks everything that the agent relies on.
    ///
    /// # Errors
    ///
    /// Names the first field that is wrong.
    pub fn validate(&self) -> Result<(), InitError> {
        if let Some(identity) = &self.identity {
            let name = &identity.hostname;
            let ok = |c: u8| c.is_ascii_alphanumeric() || c == b'-' || c == b'.';
            if name.is_empty() || name.len() > MAX_HOSTNAME || !name.bytes().all(ok) {
                return Err(InitError::Hostname(name.clone()));
            }
            let id = &identity.machine_id;
            let hex = |c: u8| matches!(c, b'0'..=b'9' | b'a'..=b'f');
            if id.len() != 32 || !id.bytes().all(hex) {
                return Err(InitError::MachineId(id.clone()));
            }
        }
        let len = self.entropy.len();
        if len > MAX_ENTROPY || (len < MIN_ENTROPY && (len > 0 || self.identity.is_some())) {
            return Err(InitError::Entropy(len));
        }
        match self.env.iter().find(|(name, value)| !valid_env(name, value)) {
            Some((name, _)) => Err(InitError::Env(name.clone())),
            None => Ok(()),
        }
    }
}

/// Whether a process can be given this variable.
#[must_use]
pub fn valid_env(name: &str, value: &str) -> bool {
    !name.is_empty() && !name.contains(['=', '\0']) && !value.contains('\0')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> InitRequest {
        InitRequest {
            identity: Some(Identity {
                id: "vm-1".into(),
                hostname: "vm-1".into(),
                generation: 1,
                machine_id: "0123456789abcdef0123456789abcdef".into(),
            }),
            entropy: vec![7; 32],
            ..Default::default()
        }
    }

    #[test]
    fn bad_fields_are_named() {
        assert_eq!(request().validate(), Ok(()));
        assert_eq!(InitRequest::default().validate(), Ok(()));
        let with = |change: fn(&mut InitRequest)| {
            let mut request = request();
            change(&mut request);
            request.validate().unwrap_err().to_string()
        };
        assert!(with(|r| r.entropy.clear()).contains("entropy of 0 bytes"));
        assert!(with(|r| r.entropy = vec![0; 65]).contains("65"));
        assert!(with(|r| r.identity.as_mut().unwrap().hostname = "a b".into()).contains("a b"));
        assert!(with(|r| r.identity.as_mut().unwrap().machine_id = "X".into()).contains("\"X\""));
        assert!(with(|r| _ = r.env.insert("A=B".into(), String::new())).contains("A=B"));
    }

    #[test]
    fn e2bs_orchestrator_is_understood() {
        let request: InitRequest = serde_json::from_str(
            r#"{"envVars":{"A":"1"},"accessToken":"t","timestamp":"2026-01-01T00:00:00Z"}"#,
        )
        .unwrap();
        assert_eq!(request.env["A"], "1");
        assert_eq!(request.reason, Reason::Boot);
    }
}
