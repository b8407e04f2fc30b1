/* Checksummed, sequence-numbered rings, at once in memory and on a disk.
 *
 *   ring serve FILE DISK [WRITERS]  writes for ever, in the background: record s goes into slot s % SLOTS of FILE (memory
 *                                   that is shared with the other verbs), then into the same slot of DISK (O_DIRECT),
 *                                   then head = s. Each writer is a thread with a ring of its own
 *   ring verify FILE                lets the writers go on for a few records, then stop; then the last of them reads every
 *                                   slot of both, and this prints how many records were written
 *   ring head FILE                  prints how many records were written
 *
 * The writers' process checks because it has the rings mapped: under PVM a process pays milliseconds for each page that it
 * maps, seconds for all.
 *
 * Every byte of a record follows from its writer and number, so a page or a block of another time, of another VM, or
 * torn, shows. */
#define _GNU_SOURCE
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define SLOTS 64u
#define MEMORY_RECORD (32u << 10)
#define DISK_RECORD (4u << 10)
/* Records that must be written after the verifier came: the writer goes on, and its disk works. */
#define PROGRESS 8u

#define MAX_WRITERS 16u

enum { PENDING, RIGHT, WRONG };

struct ring {
    volatile uint64_t head;   /* last whole record; the first has the number 1 */
    volatile uint64_t stop;   /* the writer is to end */
    volatile uint64_t failed; /* errno of the write that failed */
    /* In the first only: */
    volatile uint64_t writers; /* how many rings there are */
    volatile uint64_t stopped; /* how many writers have ended */
    volatile uint64_t verdict; /* of the last one to end */
    char why[256];             /* what is wrong */
    char pad[4096 - 48 - 256];
    char slots[SLOTS][MEMORY_RECORD];
};

/* What a writer thread works on. */
struct writer {
    struct ring *ring;
    unsigned number;
    int fd;
    uint64_t *block;
};

/* For the check, touched ahead: that of a branch need not wait for memory. */
static uint64_t expected[MEMORY_RECORD / 8];
static char *blocks;

static uint64_t next(uint64_t *x) {
    *x ^= *x << 13;
    *x ^= *x >> 7;
    *x ^= *x << 17;
    return *x;
}

/* Words: number, checksum of the rest, rest. */
static void make(uint64_t *record, unsigned writer, uint64_t seq, size_t bytes) {
    uint64_t x = (seq * MAX_WRITERS + writer) * 0x9e3779b97f4a7c15ull + 1, sum = 0xcbf29ce484222325ull ^ seq;
    for (size_t i = 2; i < bytes / 8; i++) {
        record[i] = next(&x);
        sum = (sum ^ record[i]) * 0x100000001b3ull;
    }
    record[0] = seq;
    record[1] = sum;
}

/* Whether a record is the one that it should be; what is wrong goes into `why`. */
static int check(char *why, size_t room, const char *where, const uint64_t *record, unsigned writer, uint64_t seq,
                 size_t bytes) {
    make(expected, writer, seq, bytes);
    if (!memcmp(record, expected, bytes)) return 1;
    size_t at = 0;
    while (record[at] == expected[at]) at++;
    snprintf(why, room, "%s of writer %u slot %lu: word %zu is %#lx, not %#lx (record %lu, found %lu)", where, writer,
             seq % SLOTS, at, record[at], expected[at], seq, record[0]);
    return 0;
}

static int open_disk(const char *path) {
    int fd = open(path, O_RDWR | O_DIRECT | O_CLOEXEC);
    if (fd < 0) die("open %s", path);
    return fd;
}

static uint64_t *disk_buffer(size_t bytes) {
    void *at;
    if (posix_memalign(&at, 4096, bytes)) wrong("no memory");
    return at;
}

static uint64_t *slot(struct ring *ring, uint64_t seq) {
    return (uint64_t *)ring->slots[seq % SLOTS];
}

static off_t place(unsigned writer, uint64_t seq) {
    return (off_t)(writer * SLOTS + seq % SLOTS) * DISK_RECORD;
}

/* All writers stand still. Whether memory and disk have what they should; if not, the first ring has the reason. */
static int all_right(struct ring *rings, int fd) {
    char *why = rings->why;
    const size_t room = sizeof rings->why;
    for (unsigned i = 0; i < rings->writers; i++) {
        struct ring *ring = rings + i;
        if (ring->failed) {
            snprintf(why, room, "the disk failed at record %lu: %s", ring->head + 1, strerror(ring->failed));
            return 0;
        }
        if (pread(fd, blocks, SLOTS * DISK_RECORD, place(i, 0)) != SLOTS * DISK_RECORD) {
            snprintf(why, room, "reading the disk: %s", strerror(errno));
            return 0;
        }
        /* What was never written has no record that is looked for. */
        for (uint64_t seq = ring->head >= SLOTS ? ring->head - SLOTS + 1 : 1; seq <= ring->head; seq++)
            if (!check(why, room, "memory", slot(ring, seq), i, seq, MEMORY_RECORD) ||
                !check(why, room, "disk", (uint64_t *)(blocks + seq % SLOTS * DISK_RECORD), i, seq, DISK_RECORD))
                return 0;
    }
    return 1;
}

static void *write_records(void *of) {
    struct writer *w = of;
    struct ring *ring = w->ring, *rings = ring - w->number;
    for (uint64_t seq = ring->head + 1; !ring->stop; seq++) {
        make(slot(ring, seq), w->number, seq, MEMORY_RECORD);
        make(w->block, w->number, seq, DISK_RECORD);
        if (pwrite(w->fd, w->block, DISK_RECORD, place(w->number, seq)) != DISK_RECORD) {
            ring->failed = errno ? errno : EIO;
            break;
        }
        __atomic_store_n(&ring->head, seq, __ATOMIC_SEQ_CST);
    }
    if (__atomic_add_fetch(&rings->stopped, 1, __ATOMIC_SEQ_CST) == rings->writers)
        __atomic_store_n(&rings->verdict, all_right(rings, w->fd) ? RIGHT : WRONG, __ATOMIC_SEQ_CST);
    return NULL;
}

static uint64_t written(const struct ring *rings) {
    uint64_t all = 0;
    for (unsigned i = 0; i < rings->writers; i++) all += rings[i].head;
    return all;
}

static int serve(const char *file, const char *disk, uint64_t writers) {
    if (writers < 1 || writers > MAX_WRITERS) wrong("1 to %u writers", MAX_WRITERS);
    struct ring *rings = share(file, writers * sizeof *rings);
    rings->writers = writers;
    static struct writer all[MAX_WRITERS];
    blocks = (char *)disk_buffer(SLOTS * DISK_RECORD);
    memset(blocks, 0, SLOTS * DISK_RECORD);
    make(expected, 0, 0, MEMORY_RECORD);
    for (unsigned i = 0; i < writers; i++)
        all[i] = (struct writer){.ring = rings + i, .number = i, .fd = open_disk(disk), .block = disk_buffer(DISK_RECORD)};
    /* The last to begin has the least to show. */
    into_background(&rings[writers - 1].head);
    for (unsigned i = 1; i < writers; i++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, write_records, all + i)) _exit(1);
    }
    write_records(all);
    /* The process ends with its last writer. */
    pthread_exit(NULL);
}

/* Longer than pause_ms: each wake-up takes a millisecond under PVM, and the writers get what is left. */
static void rest(void) {
    struct timespec wait = {0, 20000000};
    nanosleep(&wait, NULL);
}

static int verify(struct ring *rings) {
    uint64_t begin = now_ms(), first[MAX_WRITERS];
    for (unsigned i = 0; i < rings->writers; i++) first[i] = rings[i].head;
    for (unsigned i = 0; i < rings->writers; i++)
        while (rings[i].head < first[i] + PROGRESS && !rings[i].failed)
            if (now_ms() - begin > 60000) wrong("writer %u stands still at record %lu", i, rings[i].head);
            else rest();
    for (unsigned i = 0; i < rings->writers; i++) rings[i].stop = 1;
    while (rings->verdict == PENDING)
        if (now_ms() - begin > 90000) wrong("%lu of %lu writers stopped", rings->stopped, rings->writers);
        else rest();
    if (rings->verdict != RIGHT) wrong("%s", rings->why);
    printf("%lu\n", written(rings));
    return 0;
}

int ring_main(int argc, char **argv) {
    if (argc < 2) wrong("ring serve FILE DISK [WRITERS], or ring verify|head FILE");
    if (!strcmp(argv[0], "serve")) {
        if (argc < 3) wrong("which disk?");
        return serve(argv[1], argv[2], argc > 3 ? number(argv[3]) : 1);
    }
    struct ring *rings = share(argv[1], sizeof *rings);
    if (rings->writers < 1 || rings->writers > MAX_WRITERS) wrong("nobody writes to %s", argv[1]);
    rings = share(argv[1], rings->writers * sizeof *rings);
    if (!strcmp(argv[0], "head")) {
        printf("%lu\n", written(rings));
        return 0;
    }
    return verify(rings);
}
