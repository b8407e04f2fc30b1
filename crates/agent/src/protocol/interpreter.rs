//! The code interpreter: E2B's `/execute` and `/contexts`, and forkd's `/warm`.
//!
//! An answer to `/execute` is a run of [`Event`]s, one JSON object a line. E2B's SDK gives any object
//! to `Result(**data)`, so optional fields are left out rather than null.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// `POST /execute`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ExecuteRequest {
    /// Code; the value of a last expression is the result.
    pub code: String,
    /// Which context; absent means the default one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context_id: Option<String>,
    /// Only Python is spoken: `python`, `python3` or absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub language: Option<String>,
    /// Environment for this execution alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub env_vars: Option<BTreeMap<String, String>>,
    /// Seconds that it may take; absent or 0 means no limit. forkd's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<f64>,
}

/// `POST /warm`: runs code in the default context, then collects and freezes garbage, so that
/// forked children leave its pages alone.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WarmRequest {
    /// Code.
    pub code: String,
    /// Name for tracebacks, a file's path for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// `POST /contexts`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CreateContextRequest {
    /// Only Python.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub language: Option<String>,
    /// Working directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
}

/// A context, as `/contexts` tells it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContextInfo {
    /// Id.
    pub id: String,
    /// Always `python`.
    pub language: String,
    /// Working directory it was started in.
    pub cwd: String,
}

/// Id of the context that is used when none is named.
pub const DEFAULT_CONTEXT: &str = "default";
/// The one language.
pub const PYTHON: &str = "python";

/// One line of the answer to `/execute`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Event {
    /// First line: how many executions this context has begun.
    NumberOfExecutions {
        /// Counts from 1.
        execution_count: u64,
    },
    /// Text written to standard output.
    Stdout(Text),
    /// Text written to standard error.
    Stderr(Text),
    /// A value: that of the last expression, or one given to `display`.
    Result(Box<ResultData>),
    /// The code raised.
    Error(ExecutionError),
    /// Last line: the context is ready again.
    EndOfExecution,
    /// Last line: the interpreter is gone; a new one takes its place.
    UnexpectedEndOfExecution,
    /// A newer agent said something.
    #[serde(other)]
    Other,
}

/// Output.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Text {
    /// The text; bytes that are no UTF-8 are replaced.
    pub text: String,
    /// Nanoseconds since 1970.
    #[serde(default)]
    pub timestamp: u64,
}

/// A value in the formats that it offers (`_repr_html_` and the like).
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ResultData {
    /// `repr()`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// `_repr_html_`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub html: Option<String>,
    /// `_repr_markdown_`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub markdown: Option<String>,
    /// `_repr_svg_`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub svg: Option<String>,
    /// `_repr_png_`, base64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub png: Option<String>,
    /// `_repr_jpeg_`, base64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jpeg: Option<String>,
    /// `_repr_pdf_`, base64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pdf: Option<String>,
    /// `_repr_latex_`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latex: Option<String>,
    /// `_repr_json_`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub json: Option<serde_json::Value>,
    /// `_repr_javascript_`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub javascript: Option<String>,
    /// It is the value of the last expression.
    pub is_main_result: bool,
}

impl ResultData {
    /// The field of this name, for formats that are text.
    pub fn text_format(&mut self, name: &str) -> Option<&mut Option<String>> {
        Some(match name {
            "text" => &mut self.text,
            "html" => &mut self.html,
            "markdown" => &mut self.markdown,
            "svg" => &mut self.svg,
            "png" => &mut self.png,
            "jpeg" => &mut self.jpeg,
            "pdf" => &mut self.pdf,
            "latex" => &mut self.latex,
            "javascript" => &mut self.javascript,
            _ => return None,
        })
    }
}

/// What the code raised.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecutionError {
    /// Name of the exception's type.
    pub name: String,
    /// Its `str()`.
    pub value: String,
    /// As Python prints it.
    pub traceback: String,
}

/// Name of the error that stands for an expired time limit.
pub const TIMEOUT_ERROR: &str = "TimeoutError";

/// Body of an error answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// HTTP status.
    pub code: u16,
    /// What is wrong.
    pub message: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_what_the_sdk_parses() {
        let text = |event: &Event| serde_json::to_string(event).unwrap();
        assert_eq!(
            text(&Event::NumberOfExecutions { execution_count: 1 }),
            r#"{"type":"number_of_executions","execution_count":1}"#
        );
        let result =
            ResultData { text: Some("2".into()), is_main_result: true, ..Default::default() };
        assert_eq!(
            text(&Event::Result(Box::new(result))),
            r#"{"type":"result","text":"2","is_main_result":true}"#
        );
        assert_eq!(
            text(&Event::Stdout(Text { text: "a\n".into(), timestamp: 5 })),
            r#"{"type":"stdout","text":"a\n","timestamp":5}"#
        );
        assert_eq!(text(&Event::EndOfExecution), r#"{"type":"end_of_execution"}"#);
        let unknown: Event = serde_json::from_str(r#"{"type":"chart"}"#).unwrap();
        assert_eq!(unknown, Event::Other);
    }
}
