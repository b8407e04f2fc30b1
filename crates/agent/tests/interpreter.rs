//! The code interpreter as a client sees it: an agent in test mode, the host's python3.

#![allow(clippy::unwrap_used, reason = "these are tests, helpers included")]

mod support;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use forkd_agent::client::ClientError;
use forkd_agent::client::interpreter::{Execution, Interpreter};
use forkd_agent::protocol::INTERPRETER_PORT;
use forkd_agent::protocol::interpreter::{
    CreateContextRequest, DEFAULT_CONTEXT, Event, ExecuteRequest, WarmRequest,
};
use support::TestAgent;

fn request(code: &str) -> ExecuteRequest {
    ExecuteRequest { code: code.into(), ..Default::default() }
}

fn run(interpreter: &Interpreter, code: &str) -> Execution {
    interpreter.execute(&request(code), &mut |_| ()).unwrap()
}

#[track_caller]
fn value(interpreter: &Interpreter, code: &str) -> String {
    let execution = run(interpreter, code);
    assert_eq!(execution.error, None);
    execution.text().unwrap().to_owned()
}

fn in_context(id: &str, code: &str) -> ExecuteRequest {
    ExecuteRequest { context_id: Some(id.into()), ..request(code) }
}

#[test]
fn values_output_and_errors_are_apart() {
    let agent = TestAgent::start();
    let py = agent.interpreter();
    let execution = run(&py, "import sys\nprint('out')\nprint('err', file=sys.stderr)\n6 * 7");
    assert_eq!((execution.stdout.as_str(), execution.stderr.as_str()), ("out\n", "err\n"));
    assert_eq!((execution.text(), execution.count), (Some("42"), 1));
    assert!(execution.results[0].is_main_result && !execution.lost);
    // No value: a statement, and None.
    assert_eq!(run(&py, "x = 5").results, []);
    assert_eq!(run(&py, "None").results, []);
    assert_eq!(value(&py, "x + _"), "47");
    assert_eq!(run(&py, "").count, 5);
    assert_eq!(value(&py, "__name__, len(__import__('sys').argv)"), "('__main__', 1)");
}

#[test]
fn what_is_written_by_any_means_arrives() {
    let agent = TestAgent::start();
    let code = "import os, subprocess, sys\n\
        print('a', flush=True)\n\
        os.write(1, b'b\\n')\n\
        subprocess.run(['sh', '-c', 'echo c; echo d >&2'])\n\
        sys.stdout.write('no newline')";
    let execution = run(&agent.interpreter(), code);
    assert_eq!(execution.stdout, "a\nb\nc\nno newline");
    assert_eq!(execution.stderr, "d\n");
    assert_eq!(execution.text(), Some("10"));
}

#[test]
fn output_comes_as_it_is_written() {
    let agent = TestAgent::start();
    let fifo = agent.path().join("go");
    let code = format!("print('first')\nopen({:?}).read()\nprint('é' * 100000)", fifo.display());
    let status = std::process::Command::new("mkfifo").arg(&fifo).status().unwrap();
    assert!(status.success());
    let mut got = String::new();
    let execution = agent.interpreter().execute(&request(&code), &mut |event| {
        if let Event::Stdout(text) = event {
            if got.is_empty() {
                // The code goes on only now that its first line has been seen.
                std::fs::write(&fifo, "go").unwrap();
            }
            got += &text.text;
            assert!(text.timestamp > 1_700_000_000_000_000_000);
        }
    });
    assert_eq!(execution.unwrap().stdout, got);
    assert_eq!(got, format!("first\n{}\n", "é".repeat(100_000)));
}

#[test]
fn tracebacks_are_pythons_own() {
    let agent = TestAgent::start();
    let py = agent.interpreter();
    let error = run(&py, "def f(x):\n    return 1 / x\n\nf(0)").error.unwrap();
    assert_eq!(
        (error.name.as_str(), error.value.as_str()),
        ("ZeroDivisionError", "division by zero")
    );
    assert!(
        error
            .traceback
            .starts_with("Traceback (most recent call last):\n  File \"<cell 1>\", line 4")
    );
    assert!(error.traceback.contains("in f\n    return 1 / x"), "{}", error.traceback);
    let error =
        run(&py, "try:\n    f(0)\nexcept Exception as e:\n    raise ValueError('v') from e").error;
    assert!(error.unwrap().traceback.contains("direct cause"));
    let error = run(&py, "if True\n  pass").error.unwrap();
    assert_eq!(error.name, "SyntaxError");
    assert!(error.traceback.contains("if True") && error.traceback.contains('^'));
    let error = run(&py, "raise SystemExit(3)").error.unwrap();
    assert_eq!((error.name.as_str(), error.value.as_str()), ("SystemExit", "3"));
    let error = run(&py, "input()").error.unwrap();
    assert_eq!(error.name, "EOFError");
    let code = "class Bad:\n    def __repr__(self): raise KeyError('no')\nBad()";
    assert_eq!(run(&py, code).error.unwrap().name, "KeyError");
    // What was written before an error arrives.
    assert_eq!(run(&py, "print('x', end='')\n1/0").stdout, "x");
    assert_eq!(value(&py, "f(1)"), "1.0");
}

#[test]
fn values_have_the_formats_that_they_offer() {
    let agent = TestAgent::start();
    let code = "class V:\n    def __repr__(self): return 'V'\n    \
        def _repr_html_(self): return '<b>'\n    def _repr_png_(self): return b'\\x89P'\n    \
        def _repr_json_(self): return {'a': [1]}\n    def _repr_latex_(self): return None\n\
        display(V())\nV()";
    let execution = run(&agent.interpreter(), code);
    assert_eq!(execution.results.len(), 2);
    let (shown, main) = (&execution.results[0], &execution.results[1]);
    assert!(!shown.is_main_result && main.is_main_result);
    assert_eq!((main.text.as_deref(), main.html.as_deref()), (Some("V"), Some("<b>")));
    assert_eq!((main.png.as_deref(), main.latex.as_deref()), (Some("iVA="), None));
    assert_eq!(main.json.as_ref().unwrap().to_string(), r#"{"a":[1]}"#);
    let long = run(&agent.interpreter(), "'x' * (20 << 20)");
    assert!(long.error.unwrap().value.contains("can be sent"));
}

#[test]
fn await_works_at_the_top() {
    let agent = TestAgent::start();
    let code = "import asyncio\nawait asyncio.sleep(0)\ny = 3\ny + 1";
    assert_eq!(value(&agent.interpreter(), code), "4");
    assert_eq!(value(&agent.interpreter(), "y"), "3");
}

#[test]
fn variables_of_one_execution_do_not_last() {
    let agent = TestAgent::start();
    let py = agent.interpreter();
    let code = "import os\nos.environ.get('A'), os.popen('echo \"$A\"').read()";
    let env = BTreeMap::from([("A".to_owned(), "1 =\n2".to_owned())]);
    let with = ExecuteRequest { env_vars: Some(env), ..request(code) };
    let execution = py.execute(&with, &mut |_| ()).unwrap();
    assert_eq!(execution.text(), Some(r"('1 =\n2', '1 =\n2\n')"));
    assert_eq!(value(&py, code), r"(None, '\n')");
    let env = BTreeMap::from([("A=".to_owned(), String::new())]);
    let bad = ExecuteRequest { env_vars: Some(env), ..request("1") };
    assert!(matches!(py.execute(&bad, &mut |_| ()), Err(ClientError::Status { status: 400, .. })));
}

#[test]
fn a_time_limit_leaves_the_interpreter_usable() {
    let agent = TestAgent::start();
    let py = agent.interpreter();
    run(&py, "kept = 1");
    for code in [
        "while True: pass",
        "import time\ntime.sleep(1000)",
        "import os\nos.system('sleep 1000')\nwhile True: pass",
        "import asyncio\nawait asyncio.sleep(1000)",
    ] {
        let limited = ExecuteRequest { timeout: Some(0.3), ..request(code) };
        let begun = Instant::now();
        let execution = py.execute(&limited, &mut |_| ()).unwrap();
        assert!(execution.timed_out(), "{code}: {execution:?}");
        assert!(execution.error.unwrap().traceback.contains("KeyboardInterrupt"));
        assert!(!execution.lost && begun.elapsed() < Duration::from_secs(14));
        assert_eq!(value(&py, "kept"), "1", "{code}");
    }
    // In time: nothing happens afterwards.
    let limited = ExecuteRequest { timeout: Some(0.3), ..request("'quick'") };
    assert_eq!(py.execute(&limited, &mut |_| ()).unwrap().text(), Some("'quick'"));
    assert_eq!(value(&py, "import time\ntime.sleep(0.5)\n'not interrupted'"), "'not interrupted'");
}

#[test]
fn what_cannot_be_interrupted_is_killed() {
    let agent = TestAgent::start();
    let py = agent.interpreter();
    run(&py, "kept = 1");
    run(&py, "import signal\n_ = signal.signal(signal.SIGINT, signal.SIG_IGN)");
    let limited = ExecuteRequest { timeout: Some(0.2), ..request("while True: pass") };
    assert!(py.execute(&limited, &mut |_| ()).unwrap().lost);
    let error = run(&py, "kept").error.unwrap();
    assert_eq!(error.name, "NameError");
}

#[test]
fn an_interpreter_that_dies_is_replaced() {
    let agent = TestAgent::start();
    let py = agent.interpreter();
    let execution = run(&py, "print('last words')\nimport os\nos._exit(3)");
    assert!(execution.lost);
    assert_eq!(execution.stdout, "last words\n");
    let execution = run(&py, "1 + 1");
    assert_eq!((execution.text(), execution.count), (Some("2"), 1));
    assert!(run(&py, "import os\nos.kill(os.getpid(), 9)").lost);
    let deadline = Instant::now() + Duration::from_secs(20);
    while !agent.children().is_empty() {
        assert!(Instant::now() < deadline, "it is not reaped");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(value(&py, "2"), "2");
}

#[test]
fn a_python_that_does_not_start_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let bin = dir.path().join("python3");
    std::fs::write(&bin, "#!/bin/sh\necho 'no libpython here' >&2\nexit 127\n").unwrap();
    std::os::unix::fs::PermissionsExt::set_mode(
        &mut std::fs::metadata(&bin).unwrap().permissions(),
        0o755,
    );
    let mut permissions = std::fs::metadata(&bin).unwrap().permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o755);
    std::fs::set_permissions(&bin, permissions).unwrap();
    let agent = TestAgent::start();
    // The path of processes is set by /init, as in a guest.
    let init = format!(r#"{{"env":{{"PATH":"{}"}}}}"#, dir.path().display());
    assert_eq!(post(agent.path(), 49983, "/init", &init).0, 204);
    let execution = run(&agent.interpreter(), "1");
    let error = execution.error.unwrap();
    assert!(error.value.contains("no libpython here"), "{error:?}");
    assert!(execution.lost);
    let init = r#"{"env":{"PATH":"/none"}}"#;
    assert_eq!(post(agent.path(), 49983, "/init", init).0, 204);
    let error = agent.interpreter().execute(&request("1"), &mut |_| ());
    let error = error.map(|e| e.error.unwrap().value).unwrap_or_else(|e| e.to_string());
    assert!(error.contains("cannot start python3"), "{error}");
}

/// A bare request: status and body.
fn post(dir: &Path, port: u32, path: &str, body: &str) -> (u16, String) {
    use std::io::Read;
    let mut stream = std::os::unix::net::UnixStream::connect(dir.join(port.to_string())).unwrap();
    write!(stream, "POST {path} HTTP/1.1\r\nConnection: close\r\n").unwrap();
    write!(stream, "Content-Length: {}\r\n\r\n{body}", body.len()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    (answer[9..12].parse().unwrap(), answer)
}

#[test]
fn contexts_are_apart() {
    let agent = TestAgent::start();
    let py = agent.interpreter();
    run(&py, "who = 'default'");
    let cwd = Some("/usr/lib".to_owned());
    let context = py.create_context(&CreateContextRequest { language: None, cwd }).unwrap();
    assert_eq!((context.language.as_str(), context.cwd.as_str()), ("python", "/usr/lib"));
    let at = |code: &str| py.execute(&in_context(&context.id, code), &mut |_| ());
    assert_eq!(at("import os\nos.getcwd()").unwrap().text(), Some("'/usr/lib'"));
    assert_eq!(at("who").unwrap().error.unwrap().name, "NameError");
    at("who = 'other'").unwrap();
    assert_eq!(value(&py, "who"), "'default'");
    assert_eq!(py.contexts().unwrap().len(), 2);
    assert_eq!(py.restart_context(&context.id).unwrap(), context);
    assert_eq!(at("who").unwrap().error.unwrap().name, "NameError");
    py.remove_context(&context.id).unwrap();
    let not_found = |e: ClientError| matches!(e, ClientError::Status { status: 404, .. });
    assert!(not_found(at("1").unwrap_err()));
    assert!(not_found(py.remove_context(&context.id).unwrap_err()));
    assert!(not_found(py.restart_context("none").unwrap_err()));
    let other = CreateContextRequest { language: Some("r".into()), cwd: None };
    let error = py.create_context(&other).unwrap_err();
    assert!(error.to_string().contains("\"r\""), "{error}");
    let other = CreateContextRequest { language: None, cwd: Some("/no/such".into()) };
    assert!(py.create_context(&other).unwrap_err().to_string().contains("/no/such"));
    assert_eq!(py.contexts().unwrap()[0].id, DEFAULT_CONTEXT);
}

#[test]
fn executions_of_one_context_wait_for_each_other_and_others_do_not() {
    let agent = TestAgent::start();
    let py = agent.interpreter();
    let context = py.create_context(&CreateContextRequest::default()).unwrap();
    run(&py, "order = []");
    let threads: Vec<_> = (0..5)
        .map(|n| {
            let py = py.clone();
            let code = format!("import time\ntime.sleep(0.1)\norder.append({n})\n{n}");
            std::thread::spawn(move || run(&py, &code).text().unwrap().to_owned())
        })
        .collect();
    let elsewhere = py.execute(&in_context(&context.id, "1"), &mut |_| ()).unwrap();
    assert_eq!(elsewhere.text(), Some("1"));
    for (n, thread) in threads.into_iter().enumerate() {
        assert_eq!(thread.join().unwrap(), n.to_string());
    }
    assert_eq!(value(&py, "sorted(order)"), "[0, 1, 2, 3, 4]");
}

#[test]
fn a_client_that_closes_interrupts_its_code() {
    let agent = TestAgent::start();
    let py = agent.interpreter();
    run(&py, "kept = 1");
    let path = agent.path().join(INTERPRETER_PORT.to_string());
    let mut stream = std::os::unix::net::UnixStream::connect(path).unwrap();
    let body = r#"{"code":"print('on')\nwhile True: pass"}"#;
    write!(stream, "POST /execute HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len())
        .unwrap();
    let mut seen = Vec::new();
    while !seen.windows(2).any(|w| w == b"on") {
        let mut buffer = [0; 1024];
        let n = std::io::Read::read(&mut stream, &mut buffer).unwrap();
        seen.extend_from_slice(&buffer[..n]);
    }
    drop(stream);
    assert_eq!(value(&py, "kept"), "1");
}

#[test]
fn warming_freezes_and_keeps_state() {
    let agent = TestAgent::start();
    let py = agent.interpreter();
    let warm = |code: &str| {
        let request = WarmRequest { code: code.into(), name: Some("/srv/warm.py".into()) };
        py.warm(&request, &mut |_| ()).unwrap()
    };
    let error = warm("print('before')\nraise RuntimeError('cold')").error.unwrap();
    assert_eq!((error.name.as_str(), error.value.as_str()), ("RuntimeError", "cold"));
    assert!(error.traceback.contains("File \"/srv/warm.py\", line 2"), "{}", error.traceback);
    assert_eq!(value(&py, "import gc\ngc.get_freeze_count()"), "0");
    assert_eq!(warm("big = list(range(1000))").error, None);
    assert_eq!(value(&py, "gc.get_freeze_count() > 1000, sum(big)"), "(True, 499500)");
}

#[test]
fn a_child_by_os_fork_says_nothing() {
    let agent = TestAgent::start();
    let py = agent.interpreter();
    let code = "import os\npid = os.fork()\nif pid: os.waitpid(pid, 0)\nprint(pid == 0)";
    let execution = run(&py, code);
    assert_eq!(execution.error, None);
    let mut lines: Vec<_> = execution.stdout.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["False", "True"]);
    assert_eq!(value(&py, "1"), "1");
    let code = "from multiprocessing import get_context\n\
        with get_context('fork').Pool(2) as p: r = p.map(abs, [-1, -2])\nr";
    assert_eq!(value(&py, code), "[1, 2]");
}

#[test]
fn threads_may_go_on_between_executions() {
    let agent = TestAgent::start();
    let py = agent.interpreter();
    let code = "import threading, time\nn = 0\ndef count():\n    global n\n    \
        while n < 10**9:\n        n += 1\n        print('noise ' * 100)\n        time.sleep(0.001)\n\
        threading.Thread(target=count, daemon=True).start()";
    run(&py, code);
    // Far more than its pipe holds: it was not blocked by a full one that nobody reads.
    let deadline = Instant::now() + Duration::from_secs(60);
    while value(&py, "n").parse::<u64>().unwrap() < 300 {
        assert!(Instant::now() < deadline);
    }
}

#[test]
fn bad_requests_are_named() {
    let agent = TestAgent::start();
    let dir = agent.path();
    for (path, body, status) in [
        ("/execute", "{", 400),
        ("/execute", "{}", 400),
        ("/execute", r#"{"code":"1","timeout":-1}"#, 400),
        ("/execute", r#"{"code":"1","language":"r"}"#, 400),
        ("/execute", r#"{"code":"1","context_id":"none"}"#, 404),
        ("/nothing", "", 404),
    ] {
        let (got, answer) = post(dir, INTERPRETER_PORT, path, body);
        assert_eq!(got, status, "{path} {body}: {answer}");
        assert!(answer.contains("\"message\""), "{answer}");
    }
    let huge = "x".repeat(6 << 20);
    let (got, _) = post(dir, INTERPRETER_PORT, "/execute", &huge);
    assert_eq!(got, 413);
    assert!(agent.children().is_empty());
}
