# The load of `forkd bench branch`: processes that write to pages of rings, and watch the clock while they do.
#
# Each writer owns a ring of memory, which is populated before the snapshot is taken, and sleeps on a pipe until
# `start`. From then on it never sleeps, and makes no system call: after each page, or each turn in which no page
# is due, it reads the clock (the vDSO) and compares it with the last tick of all writers. If they are THRESHOLD apart,
# none of them ran in between, and the gap is noted. Whatever stops the VM is such a gap, and with one vCPU, whatever
# stops that.
#
# Shared words: 0 the pace of each writer in pages a second (-1: no limit); 1 the number of the last burst, 2 its pages of
# each writer (0: all of the ring), 3 whether it writes. Then a block for each writer: its last tick, the pages
# that it has written, the number of the burst that it has done, how many gaps it has noted, and the last LOG of them.
import ctypes, json, mmap, os, time

PAGE = 4096
HUGE = 2 << 20
THRESHOLD = 100_000
LOG = 2048
HEAD = 8
BLOCK = HEAD + 2 * LOG


class Load:
    def __init__(self, writers, ring_bytes):
        self.writers = writers
        self.words = memoryview(mmap.mmap(-1, 8 * (HEAD + writers * BLOCK))).cast('q')
        self.seen = [0] * writers
        # rdtsc; shl rdx, 32; or rax, rdx; ret: tells the host at which instant a report was made.
        self.code = mmap.mmap(-1, PAGE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        self.code.write(bytes.fromhex('0f3148c1e2204809d0c3'))
        at = ctypes.addressof(ctypes.c_char.from_buffer(self.code))
        self.tsc = ctypes.CFUNCTYPE(ctypes.c_uint64)(at)
        self.bells = []
        told, tell = os.pipe()
        for me in range(writers):
            waits, bell = os.pipe()
            if os.fork() == 0:
                try:
                    self._write(me, ring_bytes // writers // HUGE * HUGE, waits, tell)
                finally:
                    os._exit(1)
            os.close(waits)
            self.bells.append(bell)
        os.close(tell)
        for _ in range(writers):
            if os.read(told, 1) != b'.':
                raise RuntimeError('a writer ended before its ring was there')
        os.close(told)

    def start(self):
        for bell in self.bells:
            os.write(bell, b'.')

    def pace(self, pages_per_second):
        self.words[0] = pages_per_second

    def burst(self, pages, write):
        self.words[2], self.words[3] = pages, write
        self.words[1] += 1

    def take(self):
        gaps, lost = [], 0
        for me in range(self.writers):
            at = HEAD + me * BLOCK
            count = self.words[at + 3]
            first = max(self.seen[me], count - LOG)
            lost += first - self.seen[me]
            for n in range(first, count):
                slot = at + HEAD + n % LOG * 2
                gaps.append((self.words[slot], self.words[slot + 1]))
            self.seen[me] = count
        blocks = [HEAD + me * BLOCK for me in range(self.writers)]
        pages = sum(self.words[at + 1] for at in blocks)
        bursts = min(self.words[at + 2] for at in blocks)
        now, tsc = time.perf_counter_ns(), self.tsc()
        print(json.dumps({'now': now, 'tsc': tsc, 'lost': lost, 'pages': pages,
                          'busy': bursts < self.words[1], 'gaps': gaps}))

    def _write(self, me, ring_bytes, waits, tell):
        os.nice(19)
        # Aligned, so that the guest's kernel uses huge pages: where it is emulated, a small one takes milliseconds.
        room = mmap.mmap(-1, ring_bytes + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        room.madvise(mmap.MADV_HUGEPAGE)
        skip = -ctypes.addressof(ctypes.c_char.from_buffer(room)) % HUGE
        ring = memoryview(room)[skip:skip + ring_bytes].cast('Q')
        for word in range(0, ring_bytes // 8, PAGE // 8):
            ring[word] = 1
        words, clock = self.words, time.perf_counter_ns
        at = HEAD + me * BLOCK
        for word in range(at, at + BLOCK):
            words[word] = 0
        os.write(tell, b'.')
        if not os.read(waits, 1):
            os._exit(0)
        ticks = [HEAD + other * BLOCK for other in range(self.writers)]
        size, step = ring_bytes // 8, PAGE // 8
        word, value, written, gaps = 0, 2, 0, 0
        pace, begun, owed = 0, clock(), 0
        burst, left, stores = 0, 0, 1
        while True:
            # The clock first: a writer that loses its turn between the two then finds a tick that is later.
            now = clock()
            last = max([words[tick] for tick in ticks])
            words[at] = now
            if now - last > THRESHOLD and last:
                slot = at + HEAD + gaps % LOG * 2
                words[slot], words[slot + 1] = last, now
                gaps += 1
                words[at + 3] = gaps
            if left:
                left -= 1
                if stores:
                    ring[word] = value
                    written += 1
                    words[at + 1] = written
                else:
                    ring[word]
                if not left:
                    words[at + 2] = burst
                    begun, owed = now, written
            elif words[1] != burst:
                burst, left, stores = words[1], words[2] or size // step, words[3]
                word, value = 0, value + 1
                continue
            elif words[0] != pace:
                pace, begun, owed = words[0], now, written
                continue
            elif pace < 0 or (written - owed) * 1_000_000_000 < pace * (now - begun):
                ring[word] = value
                written += 1
                words[at + 1] = written
            else:
                continue
            word += step
            if word >= size:
                word, value = 0, value + 1
