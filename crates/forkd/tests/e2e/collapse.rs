//! A source whose memory is in small pages: made huge ones before the pause of a fork.

use anyhow::{Context, Result, ensure};

use crate::fixture::Suite;
use crate::runner::{Test, tests};
use crate::vm::{Branched, Vm};

pub const TESTS: &[Test] = tests!["collapse":
    a_large_source_in_small_pages_is_collapsed_before_its_pause 300,
];

const TAG: &str = "spread";
const MEM_MIB: u64 = 1536;
/// Forks until one of them has to be quick.
const MOST: usize = 8;
/// Enough small pages for a fork that is worth it, and few enough for a guest whose kernel is emulated.
const BUFFER: &str = "
import mmap
buffer = mmap.mmap(-1, 480 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
buffer.madvise(mmap.MADV_HUGEPAGE)
words = memoryview(buffer).cast('Q')
for at in range(0, len(words), 512): words[at] = 1
";
/// A write to each page. All are shared with the snapshot's zygote, so each is copied, and is small from then on.
const WRITE: &str = "for at in range(0, len(words), 512): words[at] = at";
/// Whether it is as it was written.
const AS_WRITTEN: &str = "words[::512].tolist() == list(range(0, len(words), 512))";

fn branch<'s>(suite: &'s Suite, vm: &Vm<'_>, more: &[&str]) -> Result<Branched<'s>> {
    let args = ["branch", vm.id.as_str(), "--json"].into_iter().chain(more.iter().copied());
    Branched::read(suite, suite.forkd(args).output()?)
}

fn a_large_source_in_small_pages_is_collapsed_before_its_pause(suite: &Suite) -> Result<()> {
    suite.create_with(TAG, 1, MEM_MIB, BUFFER)?;
    let source = suite.fork_of(TAG, 1)?.pop().context("one child")?;
    source.guest(&["ring", "serve", "/tmp/ring", "/dev/vda"])?;
    source.run(WRITE)?;

    // What allows for the pause has it as it is.
    let long = branch(suite, &source, &["--max-pause", "10s"])?;
    let long_pause = long.pause.context("a pause")?;
    ensure!(long_pause.pages_collapsed == 0, "10 s allow for any fork: {long_pause:?}");
    long.children.iter().try_for_each(Vm::kill)?;

    // Two at once: one waits for the other, or comes after it.
    let first = suite.forkd(["branch", &source.id, "--json"]).spawn()?;
    let second = branch(suite, &source, &[])?;
    let first = Branched::read(suite, first.wait()?)?;
    let pauses = [first.pause.context("a pause")?, second.pause.context("a pause")?];
    println!("    before {long_pause:?}\n    after {pauses:?}");
    let collapsed: u64 = pauses.iter().map(|pause| pause.pages_collapsed).sum();
    ensure!(collapsed > 0 && pauses.iter().any(|p| p.collapse_us > 0), "{pauses:?}");

    let branches = [first.children, second.children].concat();
    for vm in branches.iter().chain([&source]) {
        vm.guest(&["ring", "verify", "/tmp/ring"]).with_context(|| vm.id.clone())?;
        ensure!(vm.value(AS_WRITTEN)? == "True", "{} has lost what was written", vm.id);
    }

    branches.iter().try_for_each(Vm::kill)?;

    // A busy host may not get all of it done at once; without the branches the rest can be taken.
    let mut forks = Vec::new();
    while !forks.iter().any(|fork_us| fork_us * 3 < long_pause.fork_us) {
        ensure!(forks.len() < MOST, "the forks took {forks:?} us, {long_pause:?}");
        let branched = branch(suite, &source, &[])?;
        forks.push(branched.pause.context("a pause")?.fork_us);
        branched.children.iter().try_for_each(Vm::kill)?;
    }
    println!("    and then forks of {forks:?} us");
    ensure!(source.value(AS_WRITTEN)? == "True", "the source has lost what was written");

    // What cannot be is refused, whatever is done before.
    suite.forkd(["branch", &source.id, "--max-pause", "1us"]).output()?.status_is(1)?;
    suite.kill_all()?;
    suite.forkd(["snapshot", "rm", TAG]).ok().map(drop)
}
