//! Runs the tests, one after the other, and leaves nothing behind.
//!
//! A test is a function and a deadline. All that it starts is ended at its deadline, so a test that hangs fails by itself;
//! a watchdog ends the whole run if even that does not help. SIGINT, SIGTERM and SIGHUP end it as well. Whatever
//! happens, [`leftovers::end_all`] is the last thing done.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{ExitCode, exit};
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use forkd_sys::reactor::wait_readable;
use forkd_sys::signal::{SignalFd, SignalSet};

use crate::fixture::Suite;
use crate::leftovers;

/// SIGHUP, SIGINT, SIGTERM: signal(7).
const SIGNALS: [i32; 3] = [1, 2, 15];
/// How long after its deadline a test may take to notice. Making a snapshot is not counted.
const WATCHDOG: Duration = Duration::from_secs(900);

/// What each test's time is multiplied by: its own number is for a host that has nothing else to do.
const PATIENCE: u32 = 4;

/// One test.
#[derive(Clone, Copy)]
pub struct Test {
    /// `module::name`.
    pub name: &'static str,
    /// Seconds it may take on an idle host, beside making the snapshot.
    pub limit_s: u64,
    /// What it does.
    pub run: fn(&Suite) -> Result<()>,
}

/// A list of tests: `tests!["module": name 60, other 30]`.
macro_rules! tests {
    ($module:literal: $($name:ident $limit:literal),+ $(,)?) => {
        &[$(crate::runner::Test {
            name: concat!($module, "::", stringify!($name)),
            limit_s: $limit,
            run: $name,
        }),+]
    };
}
pub(crate) use tests;

/// What the command line asks for.
#[derive(Default)]
struct Asked {
    list: bool,
    filters: Vec<String>,
    exact: bool,
    skip: Vec<String>,
}

fn asked() -> Result<Asked> {
    let mut asked = Asked::default();
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--list" => asked.list = true,
            "--exact" => asked.exact = true,
            "--skip" => asked.skip.push(args.next().context("--skip what?")?),
            // What cargo and scripts give to every runner: tests run one at a time anyway, and show all.
            "--nocapture" | "--no-capture" | "--test-threads=1" | "-q" | "--quiet" => {}
            "--ignored" => asked.filters.push("no test is ignored".into()),
            "--include-ignored" => {}
            "--format" | "--test-threads" | "--color" => drop(args.next()),
            other if other.starts_with("--format=") || other.starts_with("--color=") => {}
            other if other.starts_with('-') => bail!("unknown option {other}"),
            _ => asked.filters.push(arg),
        }
    }
    Ok(asked)
}

impl Asked {
    fn wants(&self, test: &Test) -> bool {
        let fits =
            |f: &String| if self.exact { test.name == f } else { test.name.contains(f.as_str()) };
        (self.filters.is_empty() || self.filters.iter().any(fits)) && !self.skip.iter().any(fits)
    }
}

/// Runs what the command line asks for; the status is 0 if all of it passed.
pub fn run(tests: &[Test]) -> ExitCode {
    match try_run(tests) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("e2e: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn try_run(tests: &[Test]) -> Result<bool> {
    let asked = asked()?;
    let wanted: Vec<Test> = tests.iter().filter(|t| asked.wants(t)).copied().collect();
    let out = tests.len() - wanted.len();
    if asked.list {
        wanted.iter().for_each(|t| println!("{}: test", t.name));
        println!("\n{} tests, 0 benchmarks", wanted.len());
        return Ok(true);
    }
    println!("\nrunning {} tests", wanted.len());
    if wanted.is_empty() {
        println!(
            "\ntest result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; {out} filtered out"
        );
        return Ok(true);
    }
    let begun = Instant::now();
    let before = leftovers::Before::look()?;
    let suite: &'static Suite = Box::leak(Box::new(Suite::new()?));
    watch_signals(suite)?;
    let watchdog: &'static Watchdog = Box::leak(Box::default());
    watchdog.start(suite)?;

    let mut failed: Vec<String> = Vec::new();
    for test in &wanted {
        watchdog.expect(test.name, Duration::from_secs(test.limit_s) * PATIENCE);
        if !run_one(suite, test) {
            failed.push(test.name.to_string());
        }
    }
    watchdog.expect("leftovers::nothing_stays", Duration::from_secs(120));
    let last = Test { name: "leftovers::nothing_stays", limit_s: 120, run: |_| Ok(()) };
    let outcome = report(suite, &last, Instant::now(), leftovers::nothing_stays(suite, &before));
    if !outcome {
        failed.push(last.name.to_string());
    }
    leftovers::end_all(suite);
    summary(wanted.len() + 1, &failed, out, begun.elapsed());
    Ok(failed.is_empty())
}

fn summary(count: usize, failed: &[String], filtered_out: usize, took: Duration) {
    if !failed.is_empty() {
        println!("\nfailures:\n    {}", failed.join("\n    "));
    }
    println!(
        "\ntest result: {}. {} passed; {} failed; 0 ignored; 0 measured; {filtered_out} filtered out; \
         finished in {:.2}s\n",
        if failed.is_empty() { "ok" } else { "FAILED" },
        count - failed.len(),
        failed.len(),
        took.as_secs_f64()
    );
}

fn run_one(suite: &'static Suite, test: &Test) -> bool {
    let begun = Instant::now();
    suite.set_deadline(Duration::from_secs(test.limit_s) * PATIENCE);
    let run = test.run;
    let outcome = catch_unwind(AssertUnwindSafe(|| run(suite)))
        .unwrap_or_else(|_| bail!("the test panicked, see above"));
    report(suite, test, begun, outcome)
}

/// Prints how a test came out, and ends what it left running.
fn report(suite: &Suite, test: &Test, begun: Instant, outcome: Result<()>) -> bool {
    let tails = if outcome.is_err() { suite.tails() } else { String::new() };
    suite.set_cleanup_deadline();
    let took = begun.elapsed().as_secs_f64();
    // Not for tests without a guest: their home has no run directory yet.
    let swept = if suite.has_run() { suite.kill_all() } else { Ok(()) };
    match outcome.and(swept) {
        Ok(()) => {
            println!("test {} ... ok ({took:.2} s)", test.name);
            true
        }
        Err(error) => {
            println!("test {} ... FAILED ({took:.2} s)\n    {error:#}\n{tails}", test.name);
            false
        }
    }
}

/// Ends the run if a signal asks for it. The children have their own masks: the standard library resets them.
fn watch_signals(suite: &'static Suite) -> Result<()> {
    let set = SignalSet::of(&SIGNALS)?;
    set.block()?;
    let signals = SignalFd::new(&set)?;
    thread::spawn(move || {
        loop {
            match wait_readable(&signals, None).and_then(|_| signals.read()) {
                Ok(Some(received)) => {
                    println!("\ne2e: ended by signal {}", received.signal);
                    leftovers::end_all(suite);
                    exit(128 + received.signal);
                }
                Ok(None) => {}
                Err(_) => return,
            }
        }
    });
    Ok(())
}

/// Ends the run when a test takes far longer than it may.
#[derive(Default)]
struct Watchdog {
    expected: Mutex<Option<(&'static str, Instant)>>,
    changed: Condvar,
}

impl Watchdog {
    fn expect(&self, name: &'static str, limit: Duration) {
        let until = Instant::now() + limit + WATCHDOG;
        *self.expected.lock().unwrap_or_else(PoisonError::into_inner) = Some((name, until));
        self.changed.notify_all();
    }

    fn start(&'static self, suite: &'static Suite) -> Result<()> {
        thread::Builder::new().name("watchdog".into()).spawn(move || self.watch(suite))?;
        Ok(())
    }

    fn watch(&self, suite: &Suite) {
        let mut expected = self.expected.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let left = match *expected {
                None => WATCHDOG,
                Some((_, until)) => until.saturating_duration_since(Instant::now()),
            };
            if let (Some((name, _)), true) = (*expected, left.is_zero()) {
                println!("test {name} ... HANGS: the run is ended\n{}", suite.tails());
                leftovers::end_all(suite);
                println!("\ntest result: FAILED. 0 passed; 1 failed; 0 ignored\n");
                exit(1);
            }
            let waited = self.changed.wait_timeout(expected, left);
            expected = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
