//! forkd's own frames for what processes read and write: bytes as they are, rather than base64 in JSON.
//!
//! E2B's clients never see them. A client of forkd's sends the header [`HEADER`] with `Start` or `Connect`; an agent that knows
//! the frames answers with the same header, may send data so from then on, and takes it so in `StreamInput`. An older
//! agent, in an older snapshot, does not answer it, and both go on in JSON.
//!
//! A frame is Connect's, with [`FLAG`] set. Its payload is one byte, the channel, and then data.

use super::connect::{FLAG_END, Frame, encode_with};

/// Header of request and answer; its value is [`VERSION`].
pub const HEADER: &str = "Forkd-Raw";
/// The only version so far.
pub const VERSION: &str = "1";
/// Flag of such a frame: one that Connect leaves undefined.
pub const FLAG: u8 = 0x80;

/// Where data comes from or goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Channel {
    /// Standard input.
    Stdin = 0,
    /// Standard output.
    Stdout = 1,
    /// Standard error.
    Stderr = 2,
    /// A terminal, either way.
    Terminal = 3,
}

/// Appends a frame.
pub fn encode(out: &mut Vec<u8>, channel: Channel, data: &[u8]) {
    encode_with(out, FLAG, |out| {
        out.push(channel as u8);
        out.extend_from_slice(data);
    });
}

/// Channel and data of a frame; `None` if it is another kind of frame. `Some(Err)`: there is no such channel.
pub fn split<'a>(frame: &Frame<'a>) -> Option<Result<(Channel, &'a [u8]), UnknownChannel>> {
    if frame.flags & FLAG == 0 || frame.flags & FLAG_END != 0 {
        return None;
    }
    Some(match frame.payload.split_first() {
        Some((0, data)) => Ok((Channel::Stdin, data)),
        Some((1, data)) => Ok((Channel::Stdout, data)),
        Some((2, data)) => Ok((Channel::Stderr, data)),
        Some((3, data)) => Ok((Channel::Terminal, data)),
        Some(_) | None => Err(UnknownChannel),
    })
}

/// A raw frame has no channel, or one that is not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a raw frame is of no known channel")]
pub struct UnknownChannel;

#[cfg(test)]
mod tests {
    use super::super::connect::{self, decode};
    use super::*;

    #[test]
    fn data_survives_and_other_frames_are_left_alone() {
        for channel in [Channel::Stdin, Channel::Stdout, Channel::Stderr, Channel::Terminal] {
            let mut wire = Vec::new();
            encode(&mut wire, channel, b"\x00\xff{}");
            let frame = decode(&wire).unwrap().unwrap();
            assert_eq!(split(&frame), Some(Ok((channel, &b"\x00\xff{}"[..]))));
        }
        let mut wire = Vec::new();
        connect::encode(&mut wire, 0, b"{}");
        assert_eq!(split(&decode(&wire).unwrap().unwrap()), None);
        connect::encode_end(&mut wire, None);
        assert_eq!(split(&decode(&wire[7..]).unwrap().unwrap()), None);
    }

    #[test]
    fn a_channel_that_is_not_known_is_an_error() {
        for payload in [&b"\x04x"[..], b""] {
            let mut wire = Vec::new();
            connect::encode(&mut wire, FLAG, payload);
            assert_eq!(split(&decode(&wire).unwrap().unwrap()), Some(Err(UnknownChannel)));
        }
    }
}
