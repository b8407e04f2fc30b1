use proptest::prelude::*;

use super::*;

/// What a parser makes of a stream: the requests, then the error if there is one.
type Outcome = (Vec<Request>, Option<HttpError>);

fn parse_in_pieces(bytes: &[u8], cuts: &[usize], limits: Limits) -> Outcome {
    let mut parser = RequestParser::new(limits);
    let mut requests = Vec::new();
    for piece in pieces(bytes, cuts) {
        parser.feed(piece);
        loop {
            match parser.next() {
                Ok(Some(request)) => requests.push(request),
                Ok(None) => break,
                Err(error) => {
                    assert_eq!(parser.next(), Err(error.clone()), "an error is final");
                    return (requests, Some(error));
                }
            }
        }
    }
    (requests, None)
}

fn pieces<'a>(bytes: &'a [u8], cuts: &[usize]) -> Vec<&'a [u8]> {
    let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (bytes.len() + 1)).collect();
    cuts.extend([0, bytes.len()]);
    cuts.sort_unstable();
    cuts.windows(2).map(|ends| &bytes[ends[0]..ends[1]]).collect()
}

fn parse(bytes: &[u8]) -> Outcome {
    parse_in_pieces(bytes, &[], Limits::body(1000))
}

fn one(bytes: &[u8]) -> Request {
    let (mut requests, error) = parse(bytes);
    assert_eq!((requests.len(), error), (1, None));
    requests.remove(0)
}

/// Streams that look like HTTP: several requests, some of them wrong somewhere.
fn streams() -> impl Strategy<Value = Vec<u8>> {
    let line = prop_oneof![
        Just("GET / HTTP/1.1\r\n".to_owned()),
        Just("PUT /a?b=c HTTP/1.0\r\n".to_owned()),
        Just("POST /x HTTP/1.1\n".to_owned()),
        "[A-Z]{0,4} [!-~]{0,8} HTTP/[0-9]\\.[0-9]\r\n",
    ];
    let header = prop_oneof![
        (0usize..20).prop_map(|n| format!("Content-Length: {n}\r\n")),
        Just("Transfer-Encoding: chunked\r\n".to_owned()),
        Just("Expect: 100-continue\r\n".to_owned()),
        Just("Connection: close\r\n".to_owned()),
        "[A-Za-z-]{1,8}: [ -~]{0,12}\r\n",
        "[ -~]{0,12}\n",
    ];
    let body = prop_oneof![
        Just(String::new()),
        "[a-z]{0,20}",
        "[0-9a-f]{1,2}\r\n[a-z]{0,20}\r\n0\r\n\r\n",
        Just("3\r\nabc\r\n2;e=1\r\nde\r\n0\r\nT: x\r\n\r\n".to_owned()),
    ];
    let message = (line, proptest::collection::vec(header, 0..4), body)
        .prop_map(|(line, headers, body)| format!("{line}{}\r\n{body}", headers.concat()));
    proptest::collection::vec(message, 0..4).prop_map(|messages| messages.concat().into_bytes())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn splitting_makes_no_difference(stream in streams(), cuts: Vec<usize>) {
        let limits = Limits { head: 120, body: 40 };
        let whole = parse_in_pieces(&stream, &[], limits);
        prop_assert_eq!(parse_in_pieces(&stream, &cuts, limits), whole.clone());
        let bytes: Vec<usize> = (0..stream.len()).collect();
        prop_assert_eq!(parse_in_pieces(&stream, &bytes, limits), whole);
    }

    #[test]
    fn garbage_never_panics_and_limits_hold(stream: Vec<u8>, cuts: Vec<usize>, text in streams()) {
        for bytes in [&stream, &text] {
            let limits = Limits { head: 64, body: 16 };
            let (requests, _) = parse_in_pieces(bytes, &cuts, limits);
            for request in requests {
                prop_assert!(request.body.len() <= 16);
                prop_assert!(request.headers.len() <= MAX_HEADERS);
                prop_assert!(request.target.len() <= 64);
            }
            let mut parser = ResponseParser::new(limits);
            let mut body = 0;
            for piece in pieces(bytes, &cuts) {
                parser.feed(piece);
                while let Ok(Some(event)) = parser.next() {
                    match event {
                        ResponseEvent::Head(_) => body = 0,
                        ResponseEvent::Body(data) => body += data.len(),
                        ResponseEvent::End => prop_assert!(body <= 16),
                    }
                }
            }
            drop(parser.finish());
        }
    }

    #[test]
    fn requests_come_back_as_they_were_sent(
        method in "[A-Z]{1,7}",
        target in "/[a-z/]{0,20}(\\?[a-z=&]{1,9})?",
        headers in proptest::collection::vec(("[A-Za-z]{1,9}", "[!-~]([ -~]{0,9}[!-~])?"), 0..9),
        body: Option<Vec<u8>>,
        cuts: Vec<usize>,
    ) {
        let mut sent = Headers::new();
        for (name, value) in headers {
            sent.push(&format!("X-{name}"), &value);
        }
        let mut bytes = Vec::new();
        encode_request(&mut bytes, &method, &target, &sent, body.as_deref());
        let (requests, error) = parse_in_pieces(&bytes, &cuts, Limits::default());
        prop_assert_eq!((requests.len(), error), (1, None));
        prop_assert_eq!(&requests[0].method, &method);
        prop_assert_eq!(&requests[0].target, &target);
        prop_assert_eq!(&requests[0].body, &body.unwrap_or_default());
        for (name, value) in sent.iter() {
            prop_assert!(requests[0].headers.get_all(name).any(|v| v == value), "{name}: {value}");
        }
    }

    #[test]
    fn responses_come_back_as_they_were_sent(
        status in 200u16..600,
        body: Vec<u8>,
        chunks in proptest::collection::vec(any::<Vec<u8>>(), 0..5),
        cuts: Vec<usize>,
    ) {
        let whole = Response::bytes(status, "a/b", body.clone());
        let mut bytes = Vec::new();
        whole.encode(&mut bytes);
        let mut encoder = ChunkedEncoder::head(&mut bytes, 200, &Headers::new().with("X", "y"));
        for chunk in &chunks {
            encoder.chunk(&mut bytes, chunk);
        }
        encoder.end(&mut bytes);

        let mut parser = ResponseParser::new(Limits::STREAMING);
        let mut got: Vec<(u16, Vec<u8>, bool)> = Vec::new();
        for piece in pieces(&bytes, &cuts) {
            parser.feed(piece);
            while let Some(event) = parser.next().expect("valid") {
                match event {
                    ResponseEvent::Head(head) => got.push((head.status, Vec::new(), false)),
                    ResponseEvent::Body(data) => {
                        got.last_mut().expect("a head").1.extend_from_slice(&data);
                    }
                    ResponseEvent::End => got.last_mut().expect("a head").2 = true,
                }
            }
        }
        prop_assert!(!parser.is_within_message());
        let no_body = status == 204 || status == 304;
        let expected = vec![
            (status, if no_body { Vec::new() } else { body }, true),
            (200, chunks.concat(), true),
        ];
        prop_assert_eq!(got, expected);
    }
}

#[test]
fn a_request_is_understood() {
    let request = one(
        b"\r\nPOST /files?path=%2Ftmp%2Fa+b&x HTTP/1.1\r\nHost: h\r\ncontent-length: 5\r\n\r\nhello",
    );
    assert_eq!((request.method.as_str(), request.path.as_str()), ("POST", "/files"));
    assert_eq!(request.query.as_deref(), Some("path=%2Ftmp%2Fa+b&x"));
    assert_eq!(request.query_param("path").as_deref(), Some("/tmp/a b"));
    assert_eq!(request.query_param("x").as_deref(), Some(""));
    assert_eq!(request.query_param("y"), None);
    assert_eq!(request.body, b"hello");
    assert!(request.keep_alive);
    assert_eq!(one(b"GET http://h:1/p?q HTTP/1.1\r\n\r\n").path, "/p");
    assert_eq!(one(b"GET http://h HTTP/1.1\r\n\r\n").path, "/");
    assert_eq!(one(b"GET /a://b HTTP/1.1\r\n\r\n").path, "/a://b");
    assert_eq!(one(b"GET /?a=%zz%4 HTTP/1.1\r\n\r\n").query_param("a").as_deref(), Some("%zz%4"));
}

#[test]
fn connections_are_kept_as_the_version_says() {
    let keep = |text: &str| one(text.as_bytes()).keep_alive;
    assert!(keep("GET / HTTP/1.1\r\n\r\n"));
    assert!(!keep("GET / HTTP/1.1\r\nConnection: Close\r\n\r\n"));
    assert!(!keep("GET / HTTP/1.0\r\n\r\n"));
    assert!(keep("GET / HTTP/1.0\r\nConnection: x, keep-alive\r\n\r\n"));
}

#[test]
fn continue_is_wanted_once_and_only_before_the_body() {
    let head = b"PUT / HTTP/1.1\r\nExpect: 100-Continue\r\nContent-Length: 2\r\n\r\n";
    let mut parser = RequestParser::new(Limits::default());
    parser.feed(head);
    assert_eq!(parser.next(), Ok(None));
    assert!(parser.take_continue() && !parser.take_continue());
    parser.feed(b"ab");
    assert_eq!(parser.next().expect("valid").map(|r| r.body), Some(b"ab".to_vec()));
    assert!(!parser.take_continue());

    parser.feed(head);
    parser.feed(b"a");
    assert_eq!(parser.next(), Ok(None));
    assert!(!parser.take_continue(), "the body has begun");
}

#[test]
fn wrong_requests_have_a_status() {
    let status = |bytes: &[u8]| parse(bytes).1.map(|error| error.status());
    let headers = "A: b\r\n".repeat(MAX_HEADERS + 1);
    let cases: [(&[u8], u16); 11] = [
        (b"nonsense\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\n\n", 400),
        (b"GET / HTTP/2.0\r\n\r\n", 505),
        (b"GET / HTTP/1.1\r\nA : b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nA: \xff\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: 1001\r\n\r\n", 413),
        (b"GET / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3e9\r\n", 413),
        (b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nq", 400),
    ];
    for (bytes, expected) in cases {
        assert_eq!(status(bytes), Some(expected), "{}", bytes.escape_ascii());
    }
    assert_eq!(status(format!("GET / HTTP/1.1\r\n{headers}\r\n").as_bytes()), Some(431));
    assert_eq!(status(&vec![b'a'; (16 << 10) + 1]), Some(431));
    assert_eq!(status(&vec![b'a'; 16 << 10]), None, "it may still become a request");
}

#[test]
fn a_head_fed_byte_by_byte_costs_no_more_than_its_length() {
    // Quadratic work would be 10^9 steps here and take minutes in a debug build.
    let mut bytes = b"GET / HTTP/1.1\r\nA: ".to_vec();
    bytes.resize(30_000, b'x');
    bytes.extend_from_slice(b"\r\n\r\n");
    let mut parser = RequestParser::new(Limits { head: 40_000, body: 0 });
    for byte in &bytes[..bytes.len() - 1] {
        parser.feed(&[*byte]);
        assert_eq!(parser.next(), Ok(None));
    }
    parser.feed(b"\n");
    assert!(parser.next().expect("valid").is_some());
}

#[test]
fn interim_responses_are_skipped_and_streams_end_bodies() {
    let mut parser = ResponseParser::new(Limits::default());
    parser.feed(CONTINUE);
    parser.feed(b"HTTP/1.1 200 OK\r\n\r\nto the ");
    assert!(
        matches!(parser.next(), Ok(Some(ResponseEvent::Head(h))) if h.status == 200 && !h.keep_alive)
    );
    assert_eq!(parser.next(), Ok(Some(ResponseEvent::Body(b"to the ".to_vec()))));
    parser.feed(b"end");
    assert_eq!(parser.next(), Ok(Some(ResponseEvent::Body(b"end".to_vec()))));
    assert_eq!(parser.next(), Ok(None));
    assert_eq!(parser.finish(), Ok(Some(ResponseEvent::End)));
    assert_eq!(parser.finish(), Ok(None));
}

#[test]
fn a_stream_that_ends_within_a_message_is_truncated() {
    for bytes in ["HTTP/1.1 200 OK\r\nContent-Le", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab"]
    {
        let mut parser = ResponseParser::new(Limits::default());
        parser.feed(bytes.as_bytes());
        while parser.next().expect("valid so far").is_some() {}
        assert_eq!(parser.finish(), Err(HttpError::Truncated));
        assert_eq!(parser.next(), Err(HttpError::Truncated));
    }
}

#[test]
fn faults_are_in_the_form_of_firecracker() {
    let mut bytes = Vec::new();
    Response::fault(400, "no \"such\" thing").closing().encode(&mut bytes);
    let text = String::from_utf8(bytes).expect("text");
    let body = r#"{"fault_message":"no \"such\" thing"}"#;
    assert_eq!(
        text,
        format!(
            "HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nConnection: close\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        )
    );
}
