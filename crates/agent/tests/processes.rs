//! `process.Process` as a client sees it: an agent in test mode, real programs.

#![allow(clippy::unwrap_used, reason = "these are tests, helpers included")]

mod support;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::time::{Duration, Instant};

use forkd_agent::client::ClientError;
use forkd_agent::client::process::CallOptions;
use forkd_agent::protocol::ENVD_PORT;
use forkd_agent::protocol::connect::{self, Code, STREAM_TYPE};
use forkd_agent::protocol::process::{
    ProcessConfig, ProcessEvent, ProcessInput, ProcessSelector, Pty, PtySize, StartRequest,
    StreamResponse,
};
use forkd_agent::protocol::raw::Channel;
use forkd_api::http::{Limits, ResponseEvent, ResponseParser};
use support::{Outcome, TestAgent, bash, follow, read_until};

fn stdin(data: &[u8]) -> ProcessInput {
    ProcessInput { stdin: Some(data.to_vec()), pty: None }
}

fn pty(data: &[u8]) -> ProcessInput {
    ProcessInput { stdin: None, pty: Some(data.to_vec()) }
}

#[track_caller]
fn code_of<T>(result: Result<T, ClientError>) -> Code {
    match result {
        Err(ClientError::Rpc(error)) => error.code,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("no error"),
    }
}

#[test]
fn streams_are_apart_and_the_end_is_told() {
    let agent = TestAgent::start();
    let outcome = follow(agent.bash("echo out; echo err >&2; exit 3"));
    assert_eq!(
        (outcome.stdout.as_slice(), outcome.stderr.as_slice()),
        (&b"out\n"[..], &b"err\n"[..])
    );
    let end = outcome.end.unwrap();
    assert_eq!((end.exit_code, end.exited), (3, true));
    assert_eq!(
        (end.status.as_str(), end.error.as_deref()),
        ("exit status 3", Some("exit status 3"))
    );
    let end = follow(agent.bash("kill -SEGV $$")).end.unwrap();
    assert_eq!((end.exit_code, end.exited), (-1, false));
    assert_eq!(end.status, "signal: segmentation fault");
    let end = follow(agent.bash("true")).end.unwrap();
    assert_eq!((end.exit_code, end.error), (0, None));
}

#[test]
fn environment_directory_and_user() {
    let agent = TestAgent::start();
    let mut request = bash("echo $A $HOME $USER; pwd; id -u");
    request.process.envs = BTreeMap::from([("A".into(), "x y".into())]);
    request.process.cwd = Some("/usr/lib".into());
    let root = CallOptions { user: Some("root".into()), ..Default::default() };
    let outcome = follow(agent.processes().start(&request, &root).unwrap());
    let uid = rustix::process::geteuid().as_raw();
    assert_eq!(outcome.stdout(), format!("x y /root root\n/usr/lib\n{uid}\n"));

    let nobody = CallOptions { user: Some("no such user".into()), ..Default::default() };
    assert_eq!(code_of(agent.processes().start(&request, &nobody)), Code::Unauthenticated);
    if uid == 0 {
        let user = CallOptions { user: Some("nobody".into()), ..Default::default() };
        let mut request = bash("id -un; id -u; cat /proc/self/status | grep Groups");
        request.process.cwd = Some("/".into());
        let outcome = follow(agent.processes().start(&request, &user).unwrap());
        assert!(outcome.stdout().starts_with("nobody\n65534\n"), "{}", outcome.stdout());
        assert!(!outcome.stdout().contains(" 0 "), "{}", outcome.stdout());
    }
}

#[test]
fn what_cannot_be_started_is_named() {
    let agent = TestAgent::start();
    let start = |request: &StartRequest| agent.processes().start(request, &CallOptions::default());
    let mut request = bash("");
    request.process.cmd = "no-such-program".into();
    let error = start(&request).err().unwrap();
    assert!(error.to_string().contains("no-such-program"), "{error}");
    assert_eq!(code_of::<()>(Err(error)), Code::InvalidArgument);
    let mut request = bash("");
    request.process.cwd = Some("/no/such/dir".into());
    let error = start(&request).err().unwrap();
    assert!(error.to_string().contains("/no/such/dir"), "{error}");
    let mut request = bash("");
    request.process.envs.insert("A=B".into(), String::new());
    assert_eq!(code_of(start(&request)), Code::InvalidArgument);
    assert_eq!(code_of(start(&StartRequest::default())), Code::InvalidArgument);
    assert!(agent.children().is_empty());
    let missing = ProcessSelector::pid(999_999);
    assert_eq!(code_of(agent.processes().send_signal(missing.clone(), 9)), Code::NotFound);
    assert_eq!(
        code_of(agent.processes().connect(missing, &CallOptions::default())),
        Code::NotFound
    );
}

#[test]
fn a_program_is_found_in_the_requests_path() {
    let agent = TestAgent::start();
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("/bin/echo", dir.path().join("say")).unwrap();
    let request = StartRequest {
        process: ProcessConfig {
            cmd: "say".into(),
            args: vec!["hi".into()],
            envs: BTreeMap::from([("PATH".into(), format!("/none:{}", dir.path().display()))]),
            cwd: None,
        },
        ..Default::default()
    };
    let outcome = follow(agent.processes().start(&request, &CallOptions::default()).unwrap());
    assert_eq!(outcome.stdout(), "hi\n");
}

#[test]
fn input_comes_in_order_and_closing_it_is_the_end() {
    let agent = TestAgent::start();
    let processes = agent.processes();
    let mut request = bash("cat; echo done");
    request.stdin = None;
    request.tag = Some("cat".into());
    let stream = processes.start(&request, &CallOptions::default()).unwrap();
    let tag = ProcessSelector { pid: None, tag: Some("cat".into()) };
    processes.send_input(tag.clone(), stdin(b"one ")).unwrap();
    let mut input = processes.stream_input(ProcessSelector::pid(stream.pid())).unwrap();
    for word in ["two ", "three\n"] {
        input.send(stdin(word.as_bytes())).unwrap();
    }
    input.finish().unwrap();
    assert_eq!(code_of(processes.send_input(tag.clone(), pty(b"x"))), Code::FailedPrecondition);
    let listed = processes.list().unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].pid, listed[0].tag.as_deref()), (stream.pid(), Some("cat")));
    assert_eq!(listed[0].config, request.process);
    processes.close_stdin(tag.clone()).unwrap();
    let outcome = follow(stream);
    assert_eq!(outcome.stdout(), "one two three\ndone\n");
    assert_eq!(code_of(processes.send_input(tag, stdin(b"x"))), Code::NotFound);
}

#[test]
fn a_client_that_does_not_ask_for_raw_frames_gets_json() {
    let agent = TestAgent::start();
    let message = r#"{"process":{"cmd":"head","args":["-c","100000","/dev/zero"]},"stdin":false}"#;
    let mut body = Vec::new();
    connect::encode(&mut body, 0, message.as_bytes());
    let head = format!(
        "POST /process.Process/Start HTTP/1.1\r\nContent-Type: {STREAM_TYPE}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    let mut stream = agent.agent().open(ENVD_PORT, Duration::from_secs(10)).unwrap();
    stream.write_all(&[head.as_bytes(), &body].concat()).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let mut parser = ResponseParser::new(Limits::STREAMING);
    parser.feed(&answer);
    let Some(ResponseEvent::Head(head)) = parser.next().unwrap() else { panic!("no head") };
    assert_eq!(head.headers.get("Forkd-Raw"), None);
    let mut frames = Vec::new();
    while let Some(ResponseEvent::Body(data)) = parser.next().unwrap() {
        frames.extend(data);
    }
    let (mut rest, mut outcome, mut ended) = (frames.as_slice(), Outcome::default(), false);
    while let Some(frame) = connect::decode(rest).unwrap() {
        rest = &rest[frame.encoded_len()..];
        // 64 KiB in base64, and some JSON.
        assert!(frame.payload.len() <= 90_000);
        ended = frame.is_end();
        if !ended {
            assert_eq!(frame.flags, 0);
            let event: StreamResponse = serde_json::from_slice(frame.payload).unwrap();
            if !matches!(event.event, ProcessEvent::Start(_)) {
                outcome.take(event.event);
            }
        }
    }
    assert!(ended && outcome.stdout == vec![0; 100_000]);
    assert_eq!(outcome.code(), 0);
}

#[test]
fn raw_input_is_taken_byte_for_byte_and_refused_where_json_is() {
    let agent = TestAgent::start();
    let processes = agent.processes();
    let mut request = bash("cat");
    request.stdin = Some(true);
    let stream = processes.start(&request, &CallOptions::default()).unwrap();
    assert!(stream.takes_raw());
    let selector = ProcessSelector::pid(stream.pid());
    let bytes: Vec<u8> = (0..300_000u32).map(|n| (n % 251) as u8).collect();
    let (sent, client, selected) = (bytes.clone(), agent.processes(), selector.clone());
    let sender = std::thread::spawn(move || {
        let mut input = client.stream_input(selected.clone()).unwrap();
        for piece in sent.chunks(70_000) {
            input.send_raw(Channel::Stdin, piece).unwrap();
        }
        input.finish().unwrap();
        let mut input = client.stream_input(selected.clone()).unwrap();
        input.send_raw(Channel::Terminal, b"x").unwrap();
        assert_eq!(code_of(input.finish()), Code::FailedPrecondition);
        client.close_stdin(selected).unwrap();
    });
    assert!(follow(stream).stdout == bytes);
    sender.join().unwrap();
}

#[test]
fn a_sender_is_stopped_when_its_input_is_refused() {
    let agent = TestAgent::start();
    let mut request = bash("exec <&-; sleep 30");
    request.stdin = Some(true);
    let stream = agent.processes().start(&request, &CallOptions::default()).unwrap();
    let selector = ProcessSelector::pid(stream.pid());
    let mut input = agent.processes().stream_input(selector.clone()).unwrap();
    let until = Instant::now() + Duration::from_secs(10);
    while input.send_raw(Channel::Stdin, b"x").is_ok() {
        assert!(Instant::now() < until, "input is taken for ever");
    }
    agent.processes().send_signal(selector, 9).unwrap();
}

#[test]
fn input_waits_for_a_process_that_does_not_read() {
    let agent = TestAgent::start();
    let processes = agent.processes();
    let mut request = bash("read go < $FIFO; wc -c");
    request.stdin = Some(true);
    let fifo = agent.path().join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    request.process.envs.insert("FIFO".into(), fifo.display().to_string());
    let stream = processes.start(&request, &CallOptions::default()).unwrap();
    let selector = ProcessSelector::pid(stream.pid());
    let (sent, client, selected) = (vec![b'x'; 3 << 20], agent.processes(), selector.clone());
    let sender = std::thread::spawn(move || {
        client.send_input(selected.clone(), stdin(&sent)).unwrap();
        let mut input = client.stream_input(selected).unwrap();
        for _ in 0..32 {
            input.send(stdin(&vec![b'y'; 1 << 16])).unwrap();
        }
        input.finish().unwrap();
    });
    // Other requests are served while that one waits.
    assert_eq!(follow(agent.bash("echo hi")).stdout(), "hi\n");
    std::fs::write(&fifo, "go\n").unwrap();
    sender.join().unwrap();
    processes.close_stdin(selector).unwrap();
    assert_eq!(follow(stream).stdout(), format!("{}\n", (3 << 20) + (2 << 20)));
}

#[test]
fn input_to_a_process_that_ends_is_an_error() {
    let agent = TestAgent::start();
    let mut request = bash("read x; exit 0");
    request.stdin = Some(true);
    let stream = agent.processes().start(&request, &CallOptions::default()).unwrap();
    let selector = ProcessSelector::pid(stream.pid());
    let big = [b"\n".as_slice(), &vec![b'x'; 1 << 20]].concat();
    let code = code_of(agent.processes().send_input(selector, stdin(&big)));
    assert_eq!(code, Code::FailedPrecondition);
    assert_eq!(follow(stream).code(), 0);
}

#[test]
fn a_terminal_is_one() {
    let agent = TestAgent::start();
    let processes = agent.processes();
    let mut request = bash("tty; stty size; read x; echo \"<$x>\"; stty size; cat");
    request.pty = Some(Pty { size: Some(PtySize { cols: 100, rows: 30 }) });
    let mut stream = processes.start(&request, &CallOptions::default()).unwrap();
    let selector = ProcessSelector::pid(stream.pid());
    let mut outcome = Outcome::default();
    read_until(&mut stream, &mut outcome, b"30 100\r\n", |o| &o.pty);
    assert!(outcome.pty.starts_with(b"/dev/pts/"));
    processes.resize(selector.clone(), PtySize { cols: 50, rows: 20 }).unwrap();
    processes.send_input(selector.clone(), pty(b"hello\n")).unwrap();
    read_until(&mut stream, &mut outcome, b"<hello>\r\n20 50\r\n", |o| &o.pty);
    assert_eq!(code_of(processes.close_stdin(selector.clone())), Code::FailedPrecondition);
    assert_eq!(
        code_of(processes.send_input(selector.clone(), stdin(b"x"))),
        Code::FailedPrecondition
    );
    // Ctrl+C reaches the job in the foreground: cat, once it has answered.
    processes.send_input(selector.clone(), pty(b"y\n")).unwrap();
    read_until(&mut stream, &mut outcome, b"y\r\ny\r\n", |o| &o.pty);
    processes.send_input(selector, pty(b"\x03")).unwrap();
    for event in stream {
        outcome.take(event.unwrap());
    }
    assert_eq!(outcome.end.unwrap().status, "signal: interrupt");
    let error = processes.resize(ProcessSelector::pid(1), PtySize { cols: 1, rows: 1 });
    assert_eq!(code_of(error), Code::NotFound);
}

#[test]
fn signals_reach_the_process_and_what_it_started() {
    let agent = TestAgent::start();
    let mut stream = agent.bash("sleep 1000 & echo $!; wait");
    let mut outcome = Outcome::default();
    read_until(&mut stream, &mut outcome, b"\n", |o| &o.stdout);
    let sleeper: i32 = outcome.stdout().trim().parse().unwrap();
    let selector = ProcessSelector::pid(stream.pid());
    assert_eq!(code_of(agent.processes().send_signal(selector.clone(), 0)), Code::InvalidArgument);
    assert_eq!(code_of(agent.processes().send_signal(selector.clone(), 65)), Code::InvalidArgument);
    agent.processes().send_signal(selector, libc::SIGTERM).unwrap();
    assert_eq!(follow(stream).end.unwrap().status, "signal: terminated");
    wait_until("the group has ended", || {
        !std::path::Path::new(&format!("/proc/{sleeper}")).exists()
    });
}

/// For what has no signal of its own: other processes' entries in /proc.
#[track_caller]
fn wait_until(what: &str, check: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !check() {
        assert!(Instant::now() < deadline, "{what}: not within 20 s");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_process_dies_at_its_time_limit() {
    let agent = TestAgent::start();
    let options = CallOptions { timeout: Some(Duration::from_millis(200)), ..Default::default() };
    let mut stream = agent.processes().start(&bash("trap '' TERM; sleep 1000"), &options).unwrap();
    let Some(Ok(ProcessEvent::End(end))) = stream.next() else { panic!("no end") };
    assert_eq!((end.exit_code, end.status.as_str()), (-1, "signal: killed"));
    assert!(end.error.unwrap().contains("signal: killed"));
    assert_eq!(code_of(stream.next().unwrap()), Code::DeadlineExceeded);
    assert!(stream.next().is_none());
}

#[test]
fn a_process_outlives_its_client_but_not_its_limit() {
    let agent = TestAgent::start();
    let options = CallOptions { timeout: Some(Duration::from_secs(2)), ..Default::default() };
    let request = bash("while :; do echo x; sleep 0.01; done");
    let stream = agent.processes().start(&request, &options).unwrap();
    let pid = stream.pid();
    drop(stream);
    let again = agent.processes().connect(ProcessSelector::pid(pid), &CallOptions::default());
    let outcome: Vec<_> = again.unwrap().collect();
    let data = |e: &Result<ProcessEvent, ClientError>| matches!(e, Ok(ProcessEvent::Data(_)));
    assert!(outcome.iter().any(data));
    let ended = outcome.iter().any(|e| matches!(e, Ok(ProcessEvent::End(_))));
    assert!(ended);
}

#[test]
fn a_watcher_leaves_at_its_limit_and_the_process_goes_on() {
    let agent = TestAgent::start();
    let first = agent.bash("read -t 30 x < <(sleep 1000); echo never");
    let selector = ProcessSelector::pid(first.pid());
    let options = CallOptions { timeout: Some(Duration::from_millis(100)), ..Default::default() };
    let mut second = agent.processes().connect(selector.clone(), &options).unwrap();
    assert_eq!(code_of(second.next().unwrap()), Code::DeadlineExceeded);
    assert_eq!(agent.processes().list().unwrap().len(), 1);
    agent.processes().send_signal(selector, libc::SIGKILL).unwrap();
    assert_eq!(follow(first).end.unwrap().status, "signal: killed");
}

#[test]
fn late_watchers_get_start_and_end() {
    let agent = TestAgent::start();
    let stream = agent.bash("echo lost; exit 7");
    let pid = stream.pid();
    follow(stream);
    let stream =
        agent.processes().connect(ProcessSelector::pid(pid), &CallOptions::default()).unwrap();
    assert_eq!(stream.pid(), pid);
    let outcome = follow(stream);
    assert_eq!((outcome.code(), outcome.stdout()), (7, ""));
}

#[test]
fn two_watchers_see_the_same() {
    let agent = TestAgent::start();
    let mut request = bash("read x; seq 1 20000; echo end");
    request.stdin = Some(true);
    let one = agent.processes().start(&request, &CallOptions::default()).unwrap();
    let selector = ProcessSelector::pid(one.pid());
    let two = agent.processes().connect(selector.clone(), &CallOptions::default()).unwrap();
    agent.processes().send_input(selector, stdin(b"go\n")).unwrap();
    let other = std::thread::spawn(move || follow(two));
    let (one, two) = (follow(one), other.join().unwrap());
    assert!(one.stdout().ends_with("20000\nend\n"));
    assert_eq!(one.stdout, two.stdout);
}

#[test]
fn silence_is_told() {
    let agent = TestAgent::start();
    let options = CallOptions { keepalive: Some(Duration::from_secs(1)), ..Default::default() };
    let outcome = follow(agent.processes().start(&bash("sleep 2.5"), &options).unwrap());
    assert!((1..=2).contains(&outcome.keepalives), "{}", outcome.keepalives);
}

#[test]
fn a_slow_client_slows_the_process_and_loses_nothing() {
    let agent = TestAgent::start();
    let total: usize = 24 << 20;
    let script = format!("head -c {total} /dev/zero; echo written >&2");
    let mut stream = agent.bash(&script);
    // Nothing is read: the agent's buffers fill, and the process stops.
    std::thread::sleep(Duration::from_millis(300));
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.child.id())).unwrap();
    let rss = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap();
    let kib: usize = rss.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(kib < 12 << 10, "the agent has grown to {kib} KiB");
    assert_eq!(agent.processes().list().unwrap().len(), 1);
    let mut outcome = Outcome::default();
    for event in stream.by_ref() {
        outcome.take(event.unwrap());
    }
    assert_eq!(outcome.stdout.len(), total);
    assert_eq!(outcome.stderr, b"written\n");
}

#[test]
fn what_runs_in_the_background_holds_nobody_up_and_is_not_killed() {
    let agent = TestAgent::start();
    let file = agent.path().join("still-here");
    let script =
        format!("(sleep 0.3; echo noise; echo noise; echo $? > {}) & echo started", file.display());
    let begun = Instant::now();
    assert_eq!(follow(agent.bash(&script)).stdout(), "started\n");
    assert!(begun.elapsed() < Duration::from_millis(250));
    wait_until("the background job has gone on", || file.exists());
    wait_until("its status is written", || std::fs::read(&file).unwrap() == b"0\n");
}

#[test]
fn many_at_once_do_not_block_one_another() {
    let agent = TestAgent::start();
    let begun = Instant::now();
    for count in [8, 64] {
        let streams: Vec<_> =
            (0..count).map(|n| agent.bash(&format!("sleep 0.5; echo {n}"))).collect();
        for (n, stream) in streams.into_iter().enumerate() {
            assert_eq!(follow(stream).stdout(), format!("{n}\n"));
        }
    }
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    assert!(agent.children().is_empty());
}

#[test]
fn orphans_are_reaped() {
    let agent = TestAgent::start();
    // Three that are orphaned while they run, and end at different times.
    let outcome = follow(
        agent.bash("for n in 1 2 3; do (setsid sleep 0.$n >/dev/null 2>&1 &); done; echo ok"),
    );
    assert_eq!(outcome.stdout(), "ok\n");
    wait_until("no child is left", || agent.children().is_empty());
}
