use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use forkd_sys::unix_path;
use forkd_sys::wake::Waker;
use tempfile::TempDir;

use super::*;
use crate::client::{Client, ClientError};
use crate::types::InstanceInfo;

const BASE: u64 = 100;
const WAKE: Token = Token(1);

/// A server in an event loop of its own thread.
struct Running {
    dir: TempDir,
    waker: Waker,
    stop: Arc<AtomicBool>,
    release: mpsc::Sender<()>,
    /// One message for each request that is held.
    held: mpsc::Receiver<()>,
    thread: Option<JoinHandle<usize>>,
}

/// How the test's server answers: `/echo` with the body, `/held` when released, `/bye` closing,
/// `/large` with 8 MiB, `/info` with JSON, anything else with 404.
fn start() -> Running {
    start_with(DEFAULT_PATIENCE)
}

fn start_with(patience: Duration) -> Running {
    let dir = tempfile::tempdir().expect("a directory");
    let listener = unix_path::bind_listener(&dir.path().join("api.sock")).expect("bind");
    let waker = Waker::new().expect("a waker");
    let stop = Arc::new(AtomicBool::new(false));
    let (release, released) = mpsc::channel();
    let (hold, held) = mpsc::channel();
    let (waker2, stop2) = (waker.clone(), stop.clone());
    let thread =
        std::thread::spawn(move || run(listener, patience, &waker2, &stop2, (&released, &hold)));
    Running { dir, waker, stop, release, held, thread: Some(thread) }
}

fn run(
    listener: UnixListener,
    patience: Duration,
    waker: &Waker,
    stop: &AtomicBool,
    (released, hold): (&mpsc::Receiver<()>, &mpsc::Sender<()>),
) -> usize {
    let mut reactor = Reactor::new().expect("a reactor");
    let limits = Limits::body(100_000);
    let server = Server::new(listener, BASE).expect("a server").with_limits(limits);
    let mut server = server.with_patience(patience);
    server.register(&mut reactor).expect("register");
    reactor.add(waker, WAKE, Interest::READ).expect("add");
    let (mut ready, mut held) = (Vec::new(), Vec::new());
    while !stop.load(Ordering::Relaxed) {
        reactor.wait(&mut ready, Some(Duration::from_secs(20))).expect("wait");
        assert!(!ready.is_empty(), "nothing happened for long");
        for readiness in ready.drain(..) {
            if readiness.token == WAKE {
                waker.drain().expect("drain");
                while released.try_recv().is_ok() {
                    let id = held.remove(0);
                    server.respond(&mut reactor, id, Response::empty(204)).expect("respond");
                }
                continue;
            }
            assert!(server.owns(readiness.token));
            for (id, request) in server.handle(&mut reactor, readiness).expect("handle") {
                let response = match request.path.as_str() {
                    "/echo" => Response::bytes(200, "x/y", request.body),
                    "/held" => {
                        held.push(id);
                        hold.send(()).expect("the test runs");
                        continue;
                    }
                    "/bye" => Response::empty(204).closing(),
                    "/large" => Response::bytes(200, "x/y", vec![7; 8 << 20]),
                    "/info" => Response::json(
                        200,
                        &InstanceInfo {
                            app_name: "forkd".into(),
                            id: "vm-1".into(),
                            state: "Running".into(),
                            vmm_version: "1".into(),
                        },
                    ),
                    other => Response::fault(404, &format!("there is no {other}")),
                };
                server.respond(&mut reactor, id, response).expect("respond");
            }
        }
    }
    server.connections()
}

impl Running {
    fn path(&self) -> std::path::PathBuf {
        self.dir.path().join("api.sock")
    }

    fn client(&self) -> Client {
        Client::connect(&self.path()).expect("connect").with_timeout(Duration::from_secs(20))
    }

    fn raw(&self) -> UnixStream {
        let stream = unix_path::connect(&self.path()).expect("connect");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("timeout");
        stream
    }

    fn await_held(&self, count: usize) {
        for _ in 0..count {
            self.held.recv_timeout(Duration::from_secs(20)).expect("a request to be held");
        }
    }

    fn release_one(&self) {
        self.release.send(()).expect("the server runs");
        self.waker.wake().expect("wake");
    }

    /// Ends the loop; how many connections were open.
    fn stop(mut self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        self.waker.wake().expect("wake");
        self.thread.take().expect("it runs").join().expect("the server")
    }
}

fn read_all(stream: &mut UnixStream) -> String {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).expect("read");
    String::from_utf8_lossy(&bytes).into_owned()
}

#[test]
fn many_requests_on_one_connection() {
    let server = start();
    let mut client = server.client();
    for index in 0..50usize {
        let body = vec![b'x'; index * 1000];
        let response = client.request("POST", "/echo", Some(&body)).expect("an answer");
        assert_eq!((response.status, response.body), (200, body));
    }
    let info: InstanceInfo = client.get_json("/info").expect("info");
    assert_eq!(info.id, "vm-1");
    let error = client.get_json::<InstanceInfo>("/nowhere").expect_err("404");
    assert_eq!(error.to_string(), "there is no /nowhere (status 404)");
    assert_eq!(error.status(), Some(404));
    assert!(matches!(client.get_json::<Vec<u8>>("/info"), Err(ClientError::Decode { .. })));
    assert_eq!(client.request("GET", "/bye", None).expect("an answer").status, 204);
    assert!(matches!(client.request("GET", "/info", None), Err(ClientError::Closed)));
    drop(client);
    server.stop();
}

#[test]
fn a_deferred_answer_holds_up_nobody() {
    let server = start();
    let mut held = server.raw();
    held.write_all(b"GET /held HTTP/1.1\r\n\r\nGET /echo HTTP/1.1\r\nConnection: close\r\n\r\n")
        .expect("write");
    server.await_held(1);
    let mut client = server.client();
    for _ in 0..10 {
        client.request("GET", "/info", None).expect("an answer");
    }
    server.release_one();
    let text = read_all(&mut held);
    assert!(text.starts_with("HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 200 OK\r\n"), "{text}");
    server.stop();
}

#[test]
fn a_client_that_leaves_is_forgotten() {
    let server = start();
    let mut held = server.raw();
    held.write_all(b"GET /held HTTP/1.1\r\n\r\n").expect("write");
    server.await_held(1);
    let mut client = server.client();
    drop(held);
    client.request("GET", "/info", None).expect("an answer");
    server.release_one();
    client.request("GET", "/info", None).expect("an answer");
    drop(client);
    server.stop();
}

#[test]
fn slow_clients_lose_their_place_to_new_ones() {
    let server = start_with(Duration::from_millis(50));
    let mut slow: Vec<UnixStream> = (0..MAX_CONNECTIONS).map(|_| server.raw()).collect();
    for stream in &mut slow {
        stream.write_all(b"GET /ec").expect("write");
    }
    let mut client = server.client();
    client.request("GET", "/info", None).expect("an answer");
    let lost = slow.iter().filter(|stream| {
        stream.set_nonblocking(true).expect("nonblocking");
        let mut stream: &UnixStream = stream;
        match stream.read(&mut [0]) {
            Ok(count) => count == 0,
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        }
    });
    assert_eq!(lost.count(), 1);
    assert_eq!(server.stop(), MAX_CONNECTIONS);
}

#[test]
fn a_crowd_is_served_without_a_reset() {
    let server = start();
    let mut crowd: Vec<UnixStream> = (0..3 * MAX_CONNECTIONS)
        .map(|_| {
            let mut stream = server.raw();
            let request = b"GET /info HTTP/1.1\r\nConnection: close\r\n\r\n";
            stream.write_all(request).expect("write");
            stream
        })
        .collect();
    for stream in &mut crowd {
        assert!(read_all(stream).contains("vm-1"));
    }
    server.stop();
}

#[test]
fn when_all_wait_for_answers_a_new_client_waits_too() {
    let server = start();
    let mut held: Vec<UnixStream> = (0..MAX_CONNECTIONS).map(|_| server.raw()).collect();
    for stream in &mut held {
        stream.write_all(b"GET /held HTTP/1.1\r\nConnection: close\r\n\r\n").expect("write");
    }
    server.await_held(MAX_CONNECTIONS);
    let mut late = server.raw();
    late.write_all(b"GET /info HTTP/1.1\r\nConnection: close\r\n\r\n").expect("write");
    server.release_one();
    assert!(read_all(&mut late).contains("vm-1"));
    for _ in 1..MAX_CONNECTIONS {
        server.release_one();
    }
    for stream in &mut held {
        assert!(read_all(stream).starts_with("HTTP/1.1 204"));
    }
    server.stop();
}

#[test]
fn a_reader_that_does_not_read_stops_nobody() {
    let server = start();
    let mut lazy = server.raw();
    lazy.write_all(b"GET /large HTTP/1.1\r\nConnection: close\r\n\r\n").expect("write");
    let mut client = server.client();
    for _ in 0..5 {
        client.request("GET", "/info", None).expect("an answer");
    }
    let mut bytes = Vec::new();
    lazy.read_to_end(&mut bytes).expect("read");
    assert!(bytes.len() > 8 << 20 && bytes.ends_with(&[7; 100]));
    server.stop();
}

#[test]
fn refusals_reach_a_client_that_is_still_sending() {
    let server = start();
    let mut client = server.client();
    let response = client.request("PUT", "/echo", Some(&vec![0; 3 << 20])).expect("an answer");
    assert_eq!(response.status, 413);
    let mut wrong = server.raw();
    wrong.write_all(b"nonsense\r\n\r\n").expect("write");
    wrong.shutdown(std::net::Shutdown::Write).expect("shutdown");
    let text = read_all(&mut wrong);
    assert!(text.starts_with("HTTP/1.1 400") && text.contains("fault_message"), "{text}");
    server.stop();
}

#[test]
fn continue_is_said() {
    let server = start();
    let mut stream = server.raw();
    stream
        .write_all(b"PUT /echo HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 3\r\nConnection: close\r\n\r\n")
        .expect("write");
    let mut interim = vec![0; CONTINUE.len()];
    stream.read_exact(&mut interim).expect("interim answer");
    assert_eq!(interim, CONTINUE);
    stream.write_all(b"abc").expect("write");
    assert!(read_all(&mut stream).ends_with("\r\n\r\nabc"));
    server.stop();
}

#[test]
fn deadlines_and_absent_servers_are_told() {
    let server = start();
    let mut client = server.client().with_timeout(Duration::from_millis(30));
    let error = client.request("GET", "/held", None).expect_err("no answer");
    assert!(matches!(error, ClientError::Timeout { .. }), "{error}");
    assert!(error.to_string().contains("/held"), "{error}");
    let path = server.path();
    server.stop();
    let error = Client::connect(&path).expect_err("nobody listens");
    assert!(error.is_nobody_there() && error.to_string().contains("api.sock"), "{error}");
}

#[test]
fn an_answer_to_a_dead_request_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let listener = unix_path::bind_listener(&dir.path().join("s")).expect("bind");
    let mut reactor = Reactor::new().expect("a reactor");
    let mut server = Server::new(listener, 0).expect("a server");
    server.register(&mut reactor).expect("register");
    let mut stream = unix_path::connect(&dir.path().join("s")).expect("connect");
    stream.write_all(b"GET /a HTTP/1.1\r\n\r\nGET /b HTTP/1.1\r\n\r\n").expect("write");
    let (mut ready, mut requests) = (Vec::new(), Vec::new());
    while requests.is_empty() {
        reactor.wait(&mut ready, None).expect("wait");
        for readiness in ready.drain(..) {
            requests.extend(server.handle(&mut reactor, readiness).expect("handle"));
        }
    }
    let id = requests[0].0;
    assert!(server.respond(&mut reactor, id, Response::empty(204)).expect("respond"));
    assert!(!server.respond(&mut reactor, id, Response::empty(204)).expect("respond twice"));
    assert!(!server.owns(Token(Server::TOKENS)) && server.owns(Token(Server::TOKENS - 1)));
}
