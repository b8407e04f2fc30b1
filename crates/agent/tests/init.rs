//! `POST /init`: identity and fork notice. In test mode the machine is a directory.

#![allow(clippy::unwrap_used, reason = "these are tests, helpers included")]

mod support;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use forkd_agent::client::process::CallOptions;
use forkd_agent::protocol::init::{Identity, InitFault, InitRequest, Reason};
use forkd_agent::protocol::interpreter::ExecuteRequest;
use forkd_agent::protocol::process::ProcessSelector;
use support::{TestAgent, bash, follow};

fn notice(name: &str, reason: Reason) -> InitRequest {
    InitRequest {
        identity: Some(Identity {
            id: name.into(),
            hostname: name.into(),
            generation: 1,
            machine_id: "0123456789abcdef0123456789abcdef".into(),
        }),
        entropy: vec![7; 64],
        realtime_unix_ns: Some(1),
        reason,
        ..Default::default()
    }
}

/// Sends a notice as a VMM does: status and body.
fn send(agent: &TestAgent, request: &InitRequest) -> (u16, String) {
    send_bytes(agent, &serde_json::to_vec(request).unwrap())
}

fn send_bytes(agent: &TestAgent, body: &[u8]) -> (u16, String) {
    let mut stream = UnixStream::connect(agent.path().join("49983")).unwrap();
    write!(stream, "POST /init HTTP/1.1\r\nContent-Length: {}\r\n\r\n", body.len()).unwrap();
    stream.write_all(body).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head[9..12].parse().unwrap(), body.to_owned())
}

fn eval(agent: &TestAgent, code: &str) -> String {
    let request = ExecuteRequest { code: code.into(), ..Default::default() };
    let execution = agent.interpreter().execute(&request, &mut |_| ()).unwrap();
    assert_eq!(execution.error, None);
    execution.text().unwrap_or_default().to_owned()
}

fn read(agent: &TestAgent, name: &str) -> String {
    std::fs::read_to_string(agent.path().join(name)).unwrap()
}

#[test]
fn the_machine_becomes_another() {
    let agent = TestAgent::start();
    assert_eq!(send(&agent, &notice("one", Reason::Boot)).0, 204);
    assert_eq!(read(&agent, "hostname"), "one");
    assert_eq!(read(&agent, "machine-id"), "0123456789abcdef0123456789abcdef\n");
    assert_eq!(read(&agent, "realtime"), "1");
    assert_eq!(std::fs::read(agent.path().join("entropy")).unwrap(), [7; 64]);
    let mut second = notice("two", Reason::Fork);
    second.identity.as_mut().unwrap().machine_id = "f".repeat(32);
    assert_eq!(send(&agent, &second).0, 204);
    assert_eq!(read(&agent, "hostname"), "two");
    assert_eq!(read(&agent, "machine-id"), format!("{}\n", "f".repeat(32)));
}

#[test]
fn malformed_notices_change_nothing() {
    let agent = TestAgent::start();
    let mut bad = notice("x", Reason::Fork);
    bad.entropy.clear();
    let (status, body) = send(&agent, &bad);
    let fault: InitFault = serde_json::from_str(&body).unwrap();
    assert_eq!((status, fault.code), (400, 400));
    assert!(fault.message.contains("entropy"), "{}", fault.message);
    assert_eq!(send_bytes(&agent, b"{").0, 400);
    assert!(!agent.path().join("hostname").exists());
    // E2B's orchestrator sends no identity.
    assert_eq!(send_bytes(&agent, br#"{"envVars":{"A":"1"},"timestamp":"x"}"#).0, 204);
    assert_eq!(follow(agent.bash("echo $A")).stdout(), "1\n");
    assert!(!agent.path().join("hostname").exists());
}

const DRAW: &str = "import random\nrandom.random()";

#[test]
fn idle_interpreters_draw_other_numbers() {
    let agent = TestAgent::start();
    // Seeded alike, so that without reseeding they would go on alike.
    let seeded = "import random\nrandom.seed(1)\nnp = None\n\
        try:\n    import numpy as np\n    np.random.seed(1)\nexcept ImportError: pass\n\
        want = random.random(), np and np.random.rand()\n\
        random.seed(1)\nif np: np.random.seed(1)";
    let same = "got = random.random(), np and np.random.rand()\n\
        want[0] == got[0], np and want[1] == got[1]";
    eval(&agent, seeded);
    let unchanged = eval(&agent, same);
    assert!(unchanged.starts_with("(True, "), "{unchanged}");
    eval(&agent, seeded);
    assert_eq!(send(&agent, &notice("child", Reason::Fork)).0, 204);
    let changed = eval(&agent, same);
    let numpy = unchanged.ends_with("True)");
    assert_eq!(changed, if numpy { "(False, False)" } else { "(False, None)" });
}

#[test]
fn threads_of_an_idle_interpreter_draw_other_numbers_without_a_request() {
    let agent = TestAgent::start();
    let fifo = agent.path().join("fifo");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    // The thread draws when it is told to, with no request in between.
    let code = format!(
        "import random, threading\nrandom.seed(1)\nwant = random.random()\nrandom.seed(1)\n\
         def draw():\n    global got\n    open({:?}).read()\n    got = random.random()\n\
         thread = threading.Thread(target=draw)\nthread.start()",
        fifo.display()
    );
    eval(&agent, &code);
    assert_eq!(send(&agent, &notice("child", Reason::Fork)).0, 204);
    std::fs::write(&fifo, "go").unwrap();
    assert_eq!(eval(&agent, "thread.join()\ngot != want"), "True");
}

#[test]
fn a_busy_interpreter_draws_other_numbers_too_and_goes_on() {
    let agent = TestAgent::start();
    let fifo = agent.path().join("fifo");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let code = format!(
        "import random, sys\nrandom.seed(1)\nwant = random.random()\nrandom.seed(1)\n\
         print('on')\nopen({:?}).read()\nwhile (got := random.random()) == want: random.seed(1)\n\
         sys.modules['__main__'].got = got",
        fifo.display()
    );
    let client = agent.interpreter();
    let (started, wait) = std::sync::mpsc::channel();
    let runner = std::thread::spawn(move || {
        let request = ExecuteRequest { code, ..Default::default() };
        client.execute(&request, &mut |_| started.send(()).unwrap())
    });
    wait.recv().unwrap();
    wait.recv().unwrap();
    // It waits in open(); the notice does not wait for it.
    assert_eq!(send(&agent, &notice("child", Reason::Fork)).0, 204);
    // Its client belongs to the parent.
    assert!(runner.join().unwrap().is_err());
    std::fs::write(&fifo, "go").unwrap();
    assert_eq!(eval(&agent, "got != want"), "True");
}

#[test]
fn clients_from_before_the_fork_are_let_go_and_processes_go_on() {
    let agent = TestAgent::start();
    let mut request = bash("read x; echo got $x");
    request.stdin = Some(true);
    let mut stream = agent.processes().start(&request, &CallOptions::default()).unwrap();
    let selector = ProcessSelector::pid(stream.pid());
    let mut idle = UnixStream::connect(agent.path().join("49983")).unwrap();
    idle.write_all(b"GET /hea").unwrap();
    // A request on another connection shows that the agent has seen that one.
    agent.agent().health().unwrap();
    assert_eq!(send(&agent, &notice("child", Reason::Fork)).0, 204);
    let error = stream.next().unwrap().unwrap_err();
    assert!(error.to_string().contains("forked"), "{error}");
    assert!(matches!(idle.read(&mut [0; 16]), Ok(0) | Err(_)));
    let again = agent.processes().connect(selector.clone(), &CallOptions::default()).unwrap();
    let input =
        forkd_agent::protocol::process::ProcessInput { stdin: Some(b"it\n".to_vec()), pty: None };
    agent.processes().send_input(selector, input).unwrap();
    assert_eq!(follow(again).stdout(), "got it\n");
}

#[test]
fn a_boot_notice_leaves_clients_alone() {
    let agent = TestAgent::start();
    let stream = agent.bash("sleep 0.2; echo still here");
    assert_eq!(send(&agent, &notice("vm", Reason::Boot)).0, 204);
    assert_eq!(follow(stream).stdout(), "still here\n");
}

#[test]
fn the_environment_reaches_processes_and_running_interpreters() {
    let agent = TestAgent::start();
    assert_eq!(eval(&agent, "import os\nos.environ.get('TOKEN')"), "");
    let mut request = notice("vm", Reason::Fork);
    request.env = BTreeMap::from([("TOKEN".into(), "a=b c".into())]);
    assert_eq!(send(&agent, &request).0, 204);
    assert_eq!(eval(&agent, "os.environ.get('TOKEN')"), "'a=b c'");
    assert_eq!(follow(agent.bash("echo $TOKEN")).stdout(), "a=b c\n");
    // Made afterwards.
    let context = agent.interpreter().create_context(&Default::default()).unwrap();
    let request = ExecuteRequest {
        code: "import os; os.environ['TOKEN']".into(),
        context_id: Some(context.id),
        ..Default::default()
    };
    let execution = agent.interpreter().execute(&request, &mut |_| ()).unwrap();
    assert_eq!(execution.text(), Some("'a=b c'"));
}

#[test]
fn an_interpreter_that_does_not_answer_fails_the_notice() {
    let agent = TestAgent::start();
    // It has a thread, so that the notice has to wait for it.
    eval(
        &agent,
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()",
    );
    // Stopped: it cannot reseed.
    let python = rustix::process::Pid::from_raw(agent.children()[0]).unwrap();
    rustix::process::kill_process(python, rustix::process::Signal::STOP).unwrap();
    let (status, body) = send(&agent, &notice("child", Reason::Fork));
    assert_eq!(status, 500);
    assert!(body.contains("not reseeded"), "{body}");
    rustix::process::kill_process(python, rustix::process::Signal::CONT).unwrap();
    assert_eq!(send(&agent, &notice("child", Reason::Fork)).0, 204);
    eval(&agent, DRAW);
}
