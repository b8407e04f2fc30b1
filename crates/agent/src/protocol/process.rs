//! `process.Process`, E2B's service for commands and terminals, in protobuf's JSON form.
//!
//! Protobuf's rules for JSON hold: a field that is absent or null has its default, an unknown field is
//! ignored, names are camelCase but the original snake_case is read too, bytes are base64, an integer
//! may be written as a string, an enum by name or number.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

use super::base64_bytes;

/// Path of the service; the method's name follows.
pub const SERVICE: &str = "/process.Process/";

/// What to run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProcessConfig {
    /// Program: a path, or a name that is looked up in `PATH`.
    #[serde(deserialize_with = "or_default")]
    pub cmd: String,
    /// Arguments after the program's name.
    #[serde(deserialize_with = "or_default")]
    pub args: Vec<String>,
    /// Environment, over what the sandbox and the user give.
    #[serde(deserialize_with = "or_default")]
    pub envs: BTreeMap<String, String>,
    /// Working directory; the user's home if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
}

/// Size of a terminal.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PtySize {
    /// Columns.
    #[serde(deserialize_with = "flexible_u32")]
    pub cols: u32,
    /// Rows.
    #[serde(deserialize_with = "flexible_u32")]
    pub rows: u32,
}

/// A terminal is wanted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Pty {
    /// Its size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<PtySize>,
}

/// `Start`: run a command and stream its events.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StartRequest {
    /// What to run.
    #[serde(deserialize_with = "or_default")]
    pub process: ProcessConfig,
    /// On a terminal, rather than pipes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pty: Option<Pty>,
    /// Name by which it can be selected.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// Whether standard input is a pipe; absent means yes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stdin: Option<bool>,
}

/// Which process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProcessSelector {
    /// By process id.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "flexible_opt_u32")]
    pub pid: Option<u32>,
    /// By tag.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
}

impl ProcessSelector {
    /// Selects by process id.
    #[must_use]
    pub const fn pid(pid: u32) -> Self {
        Self { pid: Some(pid), tag: None }
    }
}

/// The request that has a selector alone: `Connect`, `CloseStdin`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SelectRequest {
    /// Which process.
    #[serde(deserialize_with = "or_default")]
    pub process: ProcessSelector,
}

/// `Update`: resize the terminal.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct UpdateRequest {
    /// Which process.
    #[serde(deserialize_with = "or_default")]
    pub process: ProcessSelector,
    /// The new size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pty: Option<Pty>,
}

/// Input: to a pipe or to a terminal.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProcessInput {
    /// To standard input.
    #[serde(skip_serializing_if = "Option::is_none", with = "opt_bytes")]
    pub stdin: Option<Vec<u8>>,
    /// To the terminal.
    #[serde(skip_serializing_if = "Option::is_none", with = "opt_bytes")]
    pub pty: Option<Vec<u8>>,
}

/// `SendInput`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SendInputRequest {
    /// Which process.
    #[serde(deserialize_with = "or_default")]
    pub process: ProcessSelector,
    /// What.
    #[serde(deserialize_with = "or_default")]
    pub input: ProcessInput,
}

/// One message of `StreamInput`: first `start`, then any number of `data`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StreamInputRequest {
    /// Selects the process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start: Option<SelectRequest>,
    /// Input for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<StreamInputData>,
    /// Keeps the connection up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keepalive: Option<Empty>,
}

/// Data of [`StreamInputRequest`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StreamInputData {
    /// What.
    #[serde(deserialize_with = "or_default")]
    pub input: ProcessInput,
}

/// A message without fields.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Empty {}

/// A signal: E2B names two; forkd's agent takes any number from 1 to 64.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Signal(pub i32);

impl Serialize for Signal {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            15 => s.serialize_str("SIGNAL_SIGTERM"),
            9 => s.serialize_str("SIGNAL_SIGKILL"),
            n => s.serialize_i32(n),
        }
    }
}

impl<'de> Deserialize<'de> for Signal {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form {
            Number(i32),
            Name(String),
        }
        match Form::deserialize(d)? {
            Form::Number(n) => Ok(Self(n)),
            Form::Name(name) => match name.as_str() {
                "SIGNAL_SIGTERM" => Ok(Self(15)),
                "SIGNAL_SIGKILL" => Ok(Self(9)),
                "SIGNAL_UNSPECIFIED" => Ok(Self(0)),
                other => Err(serde::de::Error::custom(format_args!("unknown signal {other:?}"))),
            },
        }
    }
}

/// `SendSignal`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SendSignalRequest {
    /// Which process.
    #[serde(default, deserialize_with = "or_default")]
    pub process: ProcessSelector,
    /// Which signal; absent means unspecified, which is refused.
    #[serde(default)]
    pub signal: Option<Signal>,
}

/// Answer to `List`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ListResponse {
    /// Those that run.
    pub processes: Vec<ProcessInfo>,
}

/// One running process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProcessInfo {
    /// How it was started.
    pub config: ProcessConfig,
    /// Its id.
    #[serde(deserialize_with = "flexible_u32")]
    pub pid: u32,
    /// Its tag.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
}

/// A message of the streams `Start` and `Connect`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamResponse {
    /// The event.
    pub event: ProcessEvent,
}

/// What happened to a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProcessEvent {
    /// It runs. Always the first event.
    Start(StartEvent),
    /// It wrote.
    Data(DataEvent),
    /// It ended. Always the last event.
    End(EndEvent),
    /// Nothing happened for a while.
    Keepalive(Empty),
}

/// A process runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartEvent {
    /// Its id.
    #[serde(default, deserialize_with = "flexible_u32")]
    pub pid: u32,
}

/// A process wrote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DataEvent {
    /// To standard output.
    Stdout(#[serde(with = "base64_bytes")] Vec<u8>),
    /// To standard error.
    Stderr(#[serde(with = "base64_bytes")] Vec<u8>),
    /// To its terminal.
    Pty(#[serde(with = "base64_bytes")] Vec<u8>),
}

/// A process ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct EndEvent {
    /// Exit status; -1 if a signal ended it.
    #[serde(alias = "exit_code")]
    pub exit_code: i32,
    /// It exited, rather than being ended by a signal.
    pub exited: bool,
    /// In words: `exit status 0`, `signal: killed`.
    pub status: String,
    /// Same words where the end is no success.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    d: D,
) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(d)?.unwrap_or_default())
}

fn flexible_u32<'de, D: Deserializer<'de>>(d: D) -> Result<u32, D::Error> {
    Ok(flexible_opt_u32(d)?.unwrap_or(0))
}

fn flexible_opt_u32<'de, D: Deserializer<'de>>(d: D) -> Result<Option<u32>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Form {
        Number(u32),
        Text(String),
    }
    match Option::<Form>::deserialize(d)? {
        None => Ok(None),
        Some(Form::Number(n)) => Ok(Some(n)),
        Some(Form::Text(text)) => text.parse().map(Some).map_err(serde::de::Error::custom),
    }
}

mod opt_bytes {
    use serde::{Deserialize, Deserializer, Serializer};

    use super::base64_bytes;

    pub(super) fn serialize<S: Serializer>(
        value: &Option<Vec<u8>>,
        s: S,
    ) -> Result<S::Ok, S::Error> {
        match value {
            Some(bytes) => base64_bytes::serialize(bytes, s),
            None => s.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        d: D,
    ) -> Result<Option<Vec<u8>>, D::Error> {
        let text = Option::<std::borrow::Cow<'de, str>>::deserialize(d)?;
        text.map(|text| base64_bytes::decode(&text).map_err(serde::de::Error::custom)).transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_sdk_sends() {
        let request: StartRequest = serde_json::from_str(
            r#"{"process":{"cmd":"/bin/bash","args":["-l","-c","ls"],"envs":{"A":"1"}},"stdin":false}"#,
        )
        .unwrap();
        assert_eq!(request.process.args, ["-l", "-c", "ls"]);
        assert_eq!(request.stdin, Some(false));
        assert_eq!(request.pty, None);

        let request: SendInputRequest =
            serde_json::from_str(r#"{"process":{"pid":"7"},"input":{"stdin":"aGk"}}"#).unwrap();
        assert_eq!(request.process.pid, Some(7));
        assert_eq!(request.input.stdin.unwrap(), b"hi");

        let request: SendSignalRequest =
            serde_json::from_str(r#"{"process":{"tag":"t"},"signal":"SIGNAL_SIGKILL"}"#).unwrap();
        assert_eq!(request.signal, Some(Signal(9)));
        assert!(serde_json::from_str::<SendSignalRequest>(r#"{"signal":"SIGNAL_X"}"#).is_err());
    }

    #[test]
    fn null_is_the_default() {
        let request: StartRequest = serde_json::from_str(
            r#"{"process":{"cmd":"x","args":null,"envs":null,"cwd":null},"pty":null,"tag":null,"extra":1}"#,
        )
        .unwrap();
        assert_eq!(request.process, ProcessConfig { cmd: "x".into(), ..Default::default() });
    }

    #[test]
    fn events_have_protobufs_form() {
        let text = |event| serde_json::to_string(&StreamResponse { event }).unwrap();
        assert_eq!(
            text(ProcessEvent::Data(DataEvent::Stdout(b"hi".to_vec()))),
            r#"{"event":{"data":{"stdout":"aGk="}}}"#
        );
        assert_eq!(text(ProcessEvent::Keepalive(Empty {})), r#"{"event":{"keepalive":{}}}"#);
        let end = EndEvent {
            exit_code: -1,
            exited: false,
            status: "signal: killed".into(),
            error: Some("signal: killed".into()),
        };
        assert_eq!(
            text(ProcessEvent::End(end)),
            r#"{"event":{"end":{"exitCode":-1,"exited":false,"status":"signal: killed","error":"signal: killed"}}}"#
        );
    }
}
