//! Arbitrary bytes as a client's and as a server's side of an HTTP connection.
//!
//! The first byte says how the rest is split. What must hold: nothing panics; limits hold; however
//! the bytes are split, the same requests come out, and the same error; what comes out can be sent
//! again and is understood as the same.
#![no_main]

use forkd_api::http::{
    HttpError, Limits, Request, RequestParser, Response, ResponseEvent, ResponseParser,
    encode_request,
};
use forkd_api::types::{
    Action, ForkRequest, ForkResponse, VmConfig, VmInfo, VmStateChange, ZygoteRequest,
};
use libfuzzer_sys::fuzz_target;

const LIMITS: Limits = Limits { head: 2048, body: 4096 };

fuzz_target!(|data: &[u8]| {
    let Some((&split, stream)) = data.split_first() else { return };
    let whole = requests(stream, stream.len().max(1));
    let pieces = requests(stream, usize::from(split % 31) + 1);
    assert_eq!(whole, pieces, "splitting has made a difference");
    for request in &whole.0 {
        assert!(request.body.len() as u64 <= LIMITS.body);
        send_again(request);
        decode_bodies(&request.body);
    }
    if let Some(error) = &whole.1 {
        let mut bytes = Vec::new();
        Response::fault(error.status(), &error.to_string()).encode(&mut bytes);
        assert_eq!(responses(&bytes, 7), Ok(bytes_of_body(&bytes)));
    }
    let one = responses(stream, stream.len().max(1));
    assert_eq!(one.is_ok(), responses(stream, usize::from(split % 29) + 1).is_ok());
});

/// The requests that a stream makes up, and the error that ends them.
fn requests(stream: &[u8], piece: usize) -> (Vec<Request>, Option<HttpError>) {
    let mut parser = RequestParser::new(LIMITS);
    let mut requests = Vec::new();
    for bytes in stream.chunks(piece) {
        parser.feed(bytes);
        loop {
            match parser.next() {
                Ok(Some(request)) => requests.push(request),
                Ok(None) => break,
                Err(error) => return (requests, Some(error)),
            }
        }
        parser.take_continue();
    }
    (requests, None)
}

fn send_again(request: &Request) {
    let mut headers = forkd_api::http::Headers::new();
    for (name, value) in request.headers.iter() {
        let framing = ["content-length", "transfer-encoding"];
        if !framing.iter().any(|framing| name.eq_ignore_ascii_case(framing)) {
            headers.push(name, value);
        }
    }
    let mut bytes = Vec::new();
    encode_request(&mut bytes, &request.method, &request.target, &headers, Some(&request.body));
    let mut parser = RequestParser::new(Limits::default());
    parser.feed(&bytes);
    let again = match parser.next() {
        Ok(Some(again)) => again,
        // A Host and a Content-Length more may be too many headers.
        Err(HttpError::TooManyHeaders { .. }) => return,
        other => panic!("{other:?} for {:?}", String::from_utf8_lossy(&bytes)),
    };
    assert_eq!((&again.method, &again.body), (&request.method, &request.body));
    assert_eq!(parser.buffered(), 0);
}

/// The bodies of all whole responses of a stream, joined.
fn responses(stream: &[u8], piece: usize) -> Result<Vec<u8>, HttpError> {
    let mut parser = ResponseParser::new(LIMITS);
    let mut body = Vec::new();
    for bytes in stream.chunks(piece) {
        parser.feed(bytes);
        while let Some(event) = parser.next()? {
            if let ResponseEvent::Body(data) = event {
                body.extend_from_slice(&data);
            }
        }
    }
    parser.finish()?;
    Ok(body)
}

fn bytes_of_body(bytes: &[u8]) -> Vec<u8> {
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n");
    end.map(|end| bytes[end + 4..].to_vec()).unwrap_or_default()
}

/// Bodies as every type that a server or a client decodes: they are refused or come back the same.
fn decode_bodies(body: &[u8]) {
    fn through<T>(body: &[u8])
    where
        T: serde::Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug,
    {
        if let Ok(value) = serde_json::from_slice::<T>(body) {
            let text = serde_json::to_vec(&value).expect("what was decoded encodes");
            let again: T = serde_json::from_slice(&text).expect("what was encoded decodes");
            assert_eq!(value, again);
        }
    }
    through::<ForkRequest>(body);
    through::<ForkResponse>(body);
    through::<ZygoteRequest>(body);
    through::<VmStateChange>(body);
    through::<Action>(body);
    through::<VmConfig>(body);
    through::<VmInfo>(body);
}
