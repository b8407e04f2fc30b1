//! File systems that go wrong: one that counts operations and does something at the k-th, and one
//! that knows what would be on the disk if the power went.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use forkd_snapshot::io::{Io, Kernel, Renaming};

use super::PAGE;

/// An operation that is about to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    MakeDir,
    Create,
    Write,
    Punch,
    SyncFile,
    SyncDir,
    Rename,
    Unlink,
    RemoveDir,
}

impl Op {
    /// Whether it needs room on the disk.
    pub fn needs_room(self) -> bool {
        matches!(self, Self::MakeDir | Self::Create | Self::Write)
    }
}

/// What is to happen at an operation.
pub enum Fate {
    Done,
    Fails(io::Error),
    /// Of a write, the first half is done before it fails.
    Tears(io::Error),
}

/// Decides what happens at the n-th operation, from 0.
pub trait Judge: Send + Sync {
    fn judge(&self, count: u64, op: Op) -> Fate;
    /// After the first half of a torn write.
    fn torn(&self) {}
}

/// Asks a judge about every operation.
pub struct Judged<J> {
    pub judge: J,
    count: AtomicU64,
    under: Box<dyn Io>,
}

impl<J> std::fmt::Debug for Judged<J> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Judged")
    }
}

impl<J: Judge> Judged<J> {
    pub fn new(judge: J, under: impl Io + 'static) -> Self {
        Self { judge, count: AtomicU64::new(0), under: Box::new(under) }
    }

    pub fn count(&self) -> u64 {
        self.count.load(Ordering::SeqCst)
    }

    fn ask(&self, op: Op) -> io::Result<()> {
        match self.judge.judge(self.count.fetch_add(1, Ordering::SeqCst), op) {
            Fate::Done => Ok(()),
            Fate::Fails(error) | Fate::Tears(error) => Err(error),
        }
    }
}

impl<J: Judge> Io for Judged<J> {
    fn make_dir(&self, path: &Path) -> io::Result<()> {
        self.ask(Op::MakeDir)?;
        self.under.make_dir(path)
    }

    fn create(&self, path: &Path, len: u64) -> io::Result<File> {
        self.ask(Op::Create)?;
        self.under.create(path, len)
    }

    fn write_at(&self, file: &File, path: &Path, bytes: &[u8], offset: u64) -> io::Result<()> {
        match self.judge.judge(self.count.fetch_add(1, Ordering::SeqCst), Op::Write) {
            Fate::Done => self.under.write_at(file, path, bytes, offset),
            Fate::Fails(error) => Err(error),
            Fate::Tears(error) => {
                self.under.write_at(file, path, &bytes[..bytes.len() / 2], offset)?;
                self.judge.torn();
                Err(error)
            }
        }
    }

    fn punch(&self, file: &File, path: &Path, offset: u64, len: u64) -> io::Result<()> {
        self.ask(Op::Punch)?;
        self.under.punch(file, path, offset, len)
    }

    fn sync_file(&self, file: &File, path: &Path) -> io::Result<()> {
        self.ask(Op::SyncFile)?;
        self.under.sync_file(file, path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.ask(Op::SyncDir)?;
        self.under.sync_dir(path)
    }

    fn rename(&self, from: &Path, to: &Path, how: Renaming) -> io::Result<()> {
        self.ask(Op::Rename)?;
        self.under.rename(from, to, how)
    }

    fn unlink(&self, path: &Path) -> io::Result<()> {
        self.ask(Op::Unlink)?;
        self.under.unlink(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.ask(Op::RemoveDir)?;
        self.under.remove_dir(path)
    }
}

/// Nothing goes wrong; for counting.
pub struct Mercy;

impl Judge for Mercy {
    fn judge(&self, _count: u64, _op: Op) -> Fate {
        Fate::Done
    }
}

fn errno(errno: rustix::io::Errno) -> io::Error {
    errno.into()
}

/// From the k-th operation on, all that need room fail, or, if it needs none, it alone does.
pub struct Trouble {
    pub at: u64,
    pub over: AtomicBool,
    pub hit: Mutex<Option<Op>>,
}

impl Trouble {
    pub fn new(at: u64) -> Self {
        Self { at, over: AtomicBool::new(false), hit: Mutex::new(None) }
    }
}

impl Judge for Trouble {
    fn judge(&self, count: u64, op: Op) -> Fate {
        if count < self.at || self.over.load(Ordering::SeqCst) {
            return Fate::Done;
        }
        let mut hit = self.hit.lock().expect("no panic");
        let first = *hit.get_or_insert(op);
        let full = first.needs_room();
        match (full, count == self.at) {
            (true, _) if op == Op::Write => Fate::Tears(errno(rustix::io::Errno::NOSPC)),
            (true, _) if op.needs_room() => Fate::Fails(errno(rustix::io::Errno::NOSPC)),
            (false, true) => Fate::Fails(errno(rustix::io::Errno::IO)),
            _ => Fate::Done,
        }
    }
}

/// At the k-th operation the process is killed; a write may be half done by then.
pub struct Kill {
    pub at: u64,
    pub torn: bool,
}

fn kill_this_process() {
    rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)
        .expect("kill");
}

impl Judge for Kill {
    fn judge(&self, count: u64, op: Op) -> Fate {
        if count != self.at {
            return Fate::Done;
        }
        if self.torn && op == Op::Write {
            return Fate::Tears(errno(rustix::io::Errno::IO));
        }
        kill_this_process();
        Fate::Done
    }

    fn torn(&self) {
        kill_this_process();
    }
}

/// From the k-th operation on nothing happens any more.
pub struct Off {
    pub at: u64,
}

impl Judge for Off {
    fn judge(&self, count: u64, op: Op) -> Fate {
        match (count < self.at, count == self.at && op == Op::Write) {
            (true, _) => Fate::Done,
            (false, true) => Fate::Tears(errno(rustix::io::Errno::IO)),
            (false, false) => Fate::Fails(errno(rustix::io::Errno::IO)),
        }
    }
}

type Ino = u64;
/// Names that change together: directory, name, and what has it then.
type Change = Vec<(Ino, String, Option<Ino>)>;

/// A file's bytes: pages that were written.
#[derive(Debug, Clone, Default)]
struct Content {
    len: u64,
    pages: BTreeMap<usize, Vec<u8>>,
}

impl Content {
    fn write(&mut self, bytes: &[u8], offset: u64) {
        let offset = offset as usize;
        let mut done = 0;
        while done < bytes.len() {
            let (index, at) = ((offset + done) / PAGE, (offset + done) % PAGE);
            let piece = (PAGE - at).min(bytes.len() - done);
            let page = self.pages.entry(index).or_insert_with(|| vec![0; PAGE]);
            page[at..at + piece].copy_from_slice(&bytes[done..done + piece]);
            done += piece;
        }
        self.len = self.len.max((offset + bytes.len()) as u64);
    }

    fn save(&self, path: &Path) {
        use std::os::unix::fs::FileExt;
        let file = File::create_new(path).expect("create");
        file.set_len(self.len).expect("set the length");
        for (index, page) in &self.pages {
            let at = (index * PAGE) as u64;
            let len = self.len.saturating_sub(at).min(PAGE as u64) as usize;
            file.write_all_at(&page[..len], at).expect("write");
        }
    }
}

#[derive(Debug, Default)]
struct Model {
    next: Ino,
    /// As processes see it, and as the disk has it.
    now: HashMap<Ino, BTreeMap<String, Ino>>,
    kept: HashMap<Ino, BTreeMap<String, Ino>>,
    files_now: HashMap<Ino, Content>,
    files_kept: HashMap<Ino, Content>,
    /// Name changes that the disk may or may not have yet, each wholly or not.
    pending: Vec<Change>,
}

/// Keeps a book of what is durable: the bytes of a file when it was synced, the names in a directory
/// when that was synced. Harsher than journaling file systems are: of what was not synced, any part
/// may be there and any other not.
#[derive(Debug)]
pub struct Disk {
    root: PathBuf,
    model: Mutex<Model>,
}

const ROOT: Ino = 0;

impl Disk {
    pub fn new(root: &Path) -> Self {
        let mut model = Model { next: 1, ..Model::default() };
        model.now.insert(ROOT, BTreeMap::new());
        model.kept.insert(ROOT, BTreeMap::new());
        Self { root: root.to_owned(), model: Mutex::new(model) }
    }

    /// The directory and name of a path, and what has it.
    fn find(&self, model: &Model, path: &Path) -> Option<(Ino, String, Option<Ino>)> {
        let mut names: Vec<String> = path
            .strip_prefix(&self.root)
            .expect("all is in the store")
            .iter()
            .map(|name| name.to_string_lossy().into_owned())
            .collect();
        let name = names.pop()?;
        let mut dir = ROOT;
        for name in names {
            dir = *model.now.get(&dir)?.get(&name)?;
        }
        let ino = model.now.get(&dir)?.get(&name).copied();
        Some((dir, name, ino))
    }

    fn ino(&self, model: &Model, path: &Path) -> Option<Ino> {
        if path == self.root { Some(ROOT) } else { self.find(model, path)?.2 }
    }

    fn change(model: &mut Model, change: Change) {
        apply(&mut model.now, &change);
        model.pending.push(change);
    }

    fn add(&self, path: &Path, dir: bool, len: u64) {
        let mut model = self.model.lock().expect("no panic");
        let Some((parent, name, None)) = self.find(&model, path) else {
            panic!("{} is made in a directory that is there", path.display());
        };
        let ino = model.next;
        model.next += 1;
        if dir {
            model.now.insert(ino, BTreeMap::new());
            model.kept.insert(ino, BTreeMap::new());
        } else {
            model.files_now.insert(ino, Content { len, ..Content::default() });
            model.files_kept.insert(ino, Content::default());
        }
        Self::change(&mut model, vec![(parent, name, Some(ino))]);
    }

    fn remove(&self, path: &Path) {
        let mut model = self.model.lock().expect("no panic");
        // Lock files are not in the book.
        if let Some((dir, name, Some(_))) = self.find(&model, path) {
            Self::change(&mut model, vec![(dir, name, None)]);
        }
    }

    /// Makes in `to` what is found after the power is back; `seed` 0 is when nothing that was not
    /// synced is there, 1 when all of it is, and others are in between.
    pub fn after_the_cut(&self, to: &Path, seed: u64) {
        let model = self.model.lock().expect("no panic");
        let mut dice = Dice(seed);
        let mut kept = model.kept.clone();
        for change in &model.pending {
            if dice.roll() {
                apply(&mut kept, change);
            }
        }
        build(&model, &kept, ROOT, to, &mut dice);
    }
}

fn apply(dirs: &mut HashMap<Ino, BTreeMap<String, Ino>>, change: &Change) {
    for (dir, name, ino) in change {
        let names = dirs.entry(*dir).or_default();
        match ino {
            Some(ino) => names.insert(name.clone(), *ino),
            None => names.remove(name),
        };
    }
}

fn build(
    model: &Model,
    kept: &HashMap<Ino, BTreeMap<String, Ino>>,
    dir: Ino,
    to: &Path,
    dice: &mut Dice,
) {
    for (name, ino) in &kept[&dir] {
        let path = to.join(name);
        if kept.contains_key(ino) {
            std::fs::create_dir(&path).expect("make");
            build(model, kept, *ino, &path, dice);
            continue;
        }
        let (old, new) = (&model.files_kept[ino], &model.files_now[ino]);
        let mut content = old.clone();
        content.len = if dice.roll() { new.len } else { old.len };
        for (index, page) in &new.pages {
            if dice.roll() {
                content.pages.insert(*index, page.clone());
            }
        }
        content.save(&path);
    }
}

/// Seeded: 0 always says no, 1 always yes.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> bool {
        if self.0 < 2 {
            return self.0 == 1;
        }
        // SplitMix64, of which 0 and 1 as states are as good as never.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) & 1 == 1
    }
}

impl Io for Disk {
    fn make_dir(&self, path: &Path) -> io::Result<()> {
        Kernel.make_dir(path)?;
        self.add(path, true, 0);
        Ok(())
    }

    fn create(&self, path: &Path, len: u64) -> io::Result<File> {
        let file = Kernel.create(path, len)?;
        self.add(path, false, len);
        Ok(file)
    }

    fn write_at(&self, file: &File, path: &Path, bytes: &[u8], offset: u64) -> io::Result<()> {
        Kernel.write_at(file, path, bytes, offset)?;
        let mut model = self.model.lock().expect("no panic");
        let ino = self.ino(&model, path).expect("a file");
        model.files_now.get_mut(&ino).expect("a file").write(bytes, offset);
        Ok(())
    }

    fn punch(&self, file: &File, path: &Path, offset: u64, len: u64) -> io::Result<()> {
        Kernel.punch(file, path, offset, len)?;
        let mut model = self.model.lock().expect("no panic");
        let ino = self.ino(&model, path).expect("a file");
        model.files_now.get_mut(&ino).expect("a file").write(&vec![0; len as usize], offset);
        Ok(())
    }

    fn sync_file(&self, file: &File, path: &Path) -> io::Result<()> {
        Kernel.sync_file(file, path)?;
        let mut model = self.model.lock().expect("no panic");
        let ino = self.ino(&model, path).expect("a file");
        let content = model.files_now[&ino].clone();
        model.files_kept.insert(ino, content);
        Ok(())
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        Kernel.sync_dir(path)?;
        let mut model = self.model.lock().expect("no panic");
        let dir = self.ino(&model, path).expect("a directory");
        let (done, pending): (Vec<Change>, Vec<Change>) = std::mem::take(&mut model.pending)
            .into_iter()
            .partition(|change| change.iter().any(|(touched, ..)| *touched == dir));
        model.pending = pending;
        done.iter().for_each(|change| apply(&mut model.kept, change));
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path, how: Renaming) -> io::Result<()> {
        Kernel.rename(from, to, how)?;
        let mut model = self.model.lock().expect("no panic");
        let (from_dir, from_name, ino) = self.find(&model, from).expect("a place");
        let (to_dir, to_name, other) = self.find(&model, to).expect("a place");
        assert_eq!(other.is_some(), how == Renaming::Exchange);
        Self::change(&mut model, vec![(from_dir, from_name, other), (to_dir, to_name, ino)]);
        Ok(())
    }

    fn unlink(&self, path: &Path) -> io::Result<()> {
        Kernel.unlink(path)?;
        self.remove(path);
        Ok(())
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        Kernel.remove_dir(path)?;
        self.remove(path);
        Ok(())
    }
}
