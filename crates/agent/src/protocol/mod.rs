//! What is said between host and guest: types and framing, without I/O.
//!
//! Three protocols share HTTP/1.1 as their carrier:
//!
//! - [`process`]: E2B's `process.Process` service in Connect's JSON form, framed by [`connect`], on
//!   [`ENVD_PORT`]; between our own ends, data is in [`raw`] frames.
//! - [`interpreter`]: E2B's code interpreter on [`INTERPRETER_PORT`], with forkd's `/warm`.
//! - [`init`]: forkd's identity and fork notice, `POST /init` on [`ENVD_PORT`].
//!
//! [`hello`] is the one message that the guest sends on its own, when its boot has ended.

pub mod connect;
pub mod hello;
pub mod init;
pub mod interpreter;
pub mod process;
pub mod raw;

/// Vsock (and TCP) port of envd's protocol.
pub const ENVD_PORT: u32 = 49983;
/// Vsock (and TCP) port of the code interpreter.
pub const INTERPRETER_PORT: u32 = 49999;
/// Vsock port of the host on which the VMM waits for [`hello::Hello`].
pub const HELLO_PORT: u32 = 49982;
/// The version of envd whose behaviour is spoken here.
pub const ENVD_VERSION: &str = "0.6.13";

/// Bytes as protobuf's JSON form has them: base64. Encodes with the standard alphabet and padding;
/// reads the standard and the URL-safe alphabet, with and without padding.
pub mod base64_bytes {
    use base64::Engine as _;
    use base64::alphabet;
    use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
    use serde::{Deserialize, Deserializer, Serializer};

    const LENIENT: GeneralPurposeConfig = GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true);
    const STANDARD: GeneralPurpose = GeneralPurpose::new(&alphabet::STANDARD, LENIENT);
    const URL_SAFE: GeneralPurpose = GeneralPurpose::new(&alphabet::URL_SAFE, LENIENT);

    /// Decodes either alphabet.
    ///
    /// # Errors
    ///
    /// The text is not base64.
    pub fn decode(text: &str) -> Result<Vec<u8>, base64::DecodeError> {
        if text.contains(['-', '_']) { URL_SAFE.decode(text) } else { STANDARD.decode(text) }
    }

    /// Appends the encoding of `bytes` to `out`, without a temporary.
    pub fn encode_into(bytes: &[u8], out: &mut Vec<u8>) {
        let start = out.len();
        // Four characters for each three bytes begun.
        let len = bytes.len().div_ceil(3) * 4;
        out.resize(start + len, 0);
        if STANDARD.encode_slice(bytes, &mut out[start..]).is_err() {
            // The slice is exactly as long as the encoding: this cannot be reached.
            out.truncate(start);
        }
    }

    /// For `#[serde(with = ...)]`.
    ///
    /// # Errors
    ///
    /// Those of the serializer.
    pub fn serialize<S: Serializer>(bytes: &[u8], s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&STANDARD.encode(bytes))
    }

    /// For `#[serde(with = ...)]`.
    ///
    /// # Errors
    ///
    /// Not a string, or not base64.
    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<u8>, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(d)?;
        decode(&text).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::base64_bytes;

    #[test]
    fn both_alphabets_with_and_without_padding() {
        for text in ["+/8=", "-_8=", "+/8", "-_8"] {
            assert_eq!(base64_bytes::decode(text).unwrap(), [0xfb, 0xff], "{text}");
        }
        assert!(base64_bytes::decode("a!").is_err());
        let mut out = b"x".to_vec();
        base64_bytes::encode_into(&[0xfb, 0xff], &mut out);
        assert_eq!(out, b"x+/8=");
    }
}
