//! The frames between the agent and an interpreter; `runner.py` is the other side and lists them.

use forkd_agent::protocol::interpreter::{ExecutionError, ResultData};

/// Longest frame of an interpreter, in bytes; the runner keeps below.
pub const MAX_FRAME: usize = 16 << 20;

/// What an interpreter says.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// It takes requests.
    Ready,
    /// A value.
    Value(Box<ResultData>),
    /// The code raised.
    Raised(ExecutionError),
    /// The request is done.
    Done {
        /// Code of the user's may run before the next request: it has threads, or a timer that is set.
        awake: bool,
    },
    /// It has reseeded.
    Seeded,
}

/// An interpreter said something that it cannot say: user code has written to its descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed frame of an interpreter: {0}")]
pub struct WireError(&'static str);

fn field(out: &mut Vec<u8>, data: &[u8]) {
    out.extend_from_slice(&u32::try_from(data.len()).unwrap_or(u32::MAX).to_le_bytes());
    out.extend_from_slice(data);
}

fn request(kind: u8, fields: &[&[u8]]) -> Vec<u8> {
    let len: usize = 1 + fields.iter().map(|f| 4 + f.len()).sum::<usize>();
    let mut out = Vec::with_capacity(4 + len);
    out.extend_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
    out.push(kind);
    for data in fields {
        field(&mut out, data);
    }
    out
}

/// Variables as one field: `NAME=value`, separated by zero bytes.
pub fn env_field<'a>(env: impl IntoIterator<Item = (&'a String, &'a String)>) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, value) in env {
        out.extend_from_slice(format!("{name}={value}\0").as_bytes());
    }
    out
}

/// Execute, or warm.
pub fn execute(warm: bool, lasting_env: &[u8], env: &[u8], name: &str, code: &str) -> Vec<u8> {
    let kind = if warm { b'W' } else { b'X' };
    request(kind, &[lasting_env, env, name.as_bytes(), code.as_bytes()])
}

/// Reseed.
pub fn reseed(lasting_env: &[u8]) -> Vec<u8> {
    request(b'S', &[lasting_env])
}

/// Takes the answer at the start of `buf`, with its length in bytes; `None` while it is incomplete.
///
/// # Errors
///
/// The interpreter cannot be understood any more.
pub fn decode(buf: &[u8]) -> Result<Option<(Answer, usize)>, WireError> {
    let Some((len, rest)) = buf.split_first_chunk::<4>() else { return Ok(None) };
    let len = u32::from_le_bytes(*len) as usize;
    if len == 0 || len > MAX_FRAME {
        return Err(WireError("its length is out of range"));
    }
    let Some(body) = rest.get(..len) else { return Ok(None) };
    let fields = fields(&body[1..])?;
    let answer = match (body[0], fields.as_slice()) {
        (b'B', []) => Answer::Ready,
        (b'D', []) => Answer::Done { awake: false },
        (b'd', []) => Answer::Done { awake: true },
        (b'S', []) => Answer::Seeded,
        (b'E', [name, value, traceback]) => Answer::Raised(ExecutionError {
            name: name.clone(),
            value: value.clone(),
            traceback: traceback.clone(),
        }),
        (b'R', [main, formats @ ..]) if formats.len() % 2 == 0 => {
            let mut value = ResultData { is_main_result: main == "1", ..Default::default() };
            for pair in formats.chunks_exact(2) {
                let [name, data] = pair else { continue };
                if name == "json" {
                    value.json = serde_json::from_str(data).ok();
                } else if let Some(format) = value.text_format(name) {
                    *format = Some(data.clone());
                }
            }
            Answer::Value(Box::new(value))
        }
        _ => return Err(WireError("its kind or its fields are unknown")),
    };
    Ok(Some((answer, 4 + len)))
}

/// Whether this is the write that ends an execution and nothing else: `D` or `d`, alone or after the main
/// value or the error.
pub fn is_last_write(buf: &[u8]) -> bool {
    const DONE: &[u8] = b"\x01\0\0\0D";
    const DONE_AWAKE: &[u8] = b"\x01\0\0\0d";
    let Some(first) = buf.strip_suffix(DONE).or_else(|| buf.strip_suffix(DONE_AWAKE)) else {
        return false;
    };
    let Some((len, body)) = first.split_first_chunk::<4>() else { return first.is_empty() };
    let whole = u32::from_le_bytes(*len) as usize == body.len();
    whole && (body.starts_with(b"E") || body.starts_with(b"R\x01\0\0\x001"))
}

fn fields(mut body: &[u8]) -> Result<Vec<String>, WireError> {
    let short = WireError("a field is longer than its frame");
    let mut fields = Vec::new();
    while !body.is_empty() {
        let (len, rest) = body.split_first_chunk::<4>().ok_or(short)?;
        let (data, rest) = rest.split_at_checked(u32::from_le_bytes(*len) as usize).ok_or(short)?;
        fields.push(String::from_utf8_lossy(data).into_owned());
        body = rest;
    }
    Ok(fields)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(Some((_, len))) = decode(&bytes) {
                prop_assert!(len <= bytes.len());
            }
        }
    }

    #[test]
    fn the_last_write_is_told_from_others() {
        for done in [request(b'D', &[]), request(b'd', &[])] {
            last_write(&done);
        }
    }

    fn last_write(done: &[u8]) {
        let main = request(b'R', &[b"1", b"text", b"2"]);
        let shown = request(b'R', &[b"0", b"text", b"2"]);
        let error = request(b'E', &[b"a", b"b", b"c"]);
        for last in [&[][..], &main, &error] {
            assert!(is_last_write(&[last, done].concat()));
        }
        for other in [
            vec![],
            main.clone(),
            [shown.as_slice(), done].concat(),
            [shown.as_slice(), &main, done].concat(),
            [request(b'S', &[]).as_slice(), done].concat(),
        ] {
            assert!(!is_last_write(&other), "{other:?}");
        }
    }

    #[test]
    fn answers() {
        let value = request(b'R', &[b"1", b"text", b"2", b"html", b"<b>", b"json", b"[1]"]);
        let (answer, len) = decode(&value).unwrap().unwrap();
        assert_eq!(len, value.len());
        let Answer::Value(data) = answer else { panic!("{answer:?}") };
        assert_eq!((data.text.as_deref(), data.html.as_deref()), (Some("2"), Some("<b>")));
        assert!(data.is_main_result && data.json.is_some());
        assert_eq!(decode(&value[..value.len() - 1]), Ok(None));
        for (kind, awake) in [(b'D', false), (b'd', true)] {
            assert_eq!(decode(&request(kind, &[])), Ok(Some((Answer::Done { awake }, 5))));
        }
        for bad in [request(b'D', &[b"x"]), request(b'E', &[b"x"]), vec![0; 4], vec![0xff; 8]] {
            assert!(decode(&bad).is_err(), "{bad:?}");
        }
    }
}
