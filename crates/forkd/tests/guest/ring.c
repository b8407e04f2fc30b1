/* A checksummed, sequence-numbered ring, at once in memory and on a disk.
 *
 *   ring serve FILE DISK   writes for ever, in the background: record s goes into slot s % SLOTS of FILE (memory that is
 *                          shared with the other verbs), then into the same slot of DISK (O_DIRECT), then head = s
 *   ring verify FILE DISK  makes the writer go on for a few records, then stop; then reads every slot of both and
 *                          prints the last record's number
 *   ring head FILE         prints the last record's number
 *
 * Every byte of a record follows from its number, so a page or a block of another time, of another VM, or torn, shows. */
#define _GNU_SOURCE
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SLOTS 64u
#define MEMORY_RECORD (32u << 10)
#define DISK_RECORD (4u << 10)
/* Records that must be written after the verifier came: the writer goes on, and its disk works. */
#define PROGRESS 8u

struct header {
    volatile uint64_t head; /* last whole record; the first has the number 1 */
    volatile uint64_t stop; /* the writer is to end */
    volatile uint64_t stopped;
    volatile uint64_t failed; /* errno of the write that failed */
    char pad[4096 - 32];
};

#define SIZE (sizeof(struct header) + (size_t)SLOTS * MEMORY_RECORD)

static uint64_t next(uint64_t *x) {
    *x ^= *x << 13;
    *x ^= *x >> 7;
    *x ^= *x << 17;
    return *x;
}

/* Words: number, checksum of the rest, rest. */
static void make(uint64_t *record, uint64_t seq, size_t bytes) {
    uint64_t x = seq * 0x9e3779b97f4a7c15ull + 1, sum = 0xcbf29ce484222325ull ^ seq;
    for (size_t i = 2; i < bytes / 8; i++) {
        record[i] = next(&x);
        sum = (sum ^ record[i]) * 0x100000001b3ull;
    }
    record[0] = seq;
    record[1] = sum;
}

static void check(const char *where, const uint64_t *record, uint64_t seq, size_t bytes) {
    static uint64_t expected[MEMORY_RECORD / 8];
    make(expected, seq, bytes);
    if (!memcmp(record, expected, bytes)) return;
    size_t at = 0;
    while (record[at] == expected[at]) at++;
    wrong("%s slot %lu: word %zu is %#lx, not %#lx (record %lu, found %lu)", where, seq % SLOTS, at, record[at],
          expected[at], seq, record[0]);
}

static int open_disk(const char *path) {
    int fd = open(path, O_RDWR | O_DIRECT | O_CLOEXEC);
    if (fd < 0) die("open %s", path);
    return fd;
}

static uint64_t *disk_buffer(void) {
    void *at;
    if (posix_memalign(&at, 4096, DISK_RECORD)) wrong("no memory");
    return at;
}

static uint64_t *slot(struct header *ring, uint64_t seq) {
    return (uint64_t *)((char *)(ring + 1) + (seq % SLOTS) * MEMORY_RECORD);
}

static int serve(struct header *ring, const char *disk) {
    int fd = open_disk(disk);
    uint64_t *block = disk_buffer();
    into_background(&ring->head);
    for (uint64_t seq = ring->head + 1; !ring->stop; seq++) {
        make(slot(ring, seq), seq, MEMORY_RECORD);
        make(block, seq, DISK_RECORD);
        if (pwrite(fd, block, DISK_RECORD, (off_t)(seq % SLOTS) * DISK_RECORD) != DISK_RECORD) {
            ring->failed = errno ? errno : EIO;
            break;
        }
        __atomic_store_n(&ring->head, seq, __ATOMIC_SEQ_CST);
    }
    ring->stopped = 1;
    return 0;
}

static int verify(struct header *ring, const char *disk) {
    uint64_t begin = now_ms(), first = ring->head;
    while (ring->head < first + PROGRESS && !ring->failed)
        if (now_ms() - begin > 60000) wrong("the writer stands still at record %lu", ring->head);
        else pause_ms();
    ring->stop = 1;
    while (!ring->stopped)
        if (now_ms() - begin > 90000) wrong("the writer does not stop; its last record is %lu", ring->head);
        else pause_ms();
    if (ring->failed) wrong("the disk failed at record %lu: %s", ring->head + 1, strerror(ring->failed));
    uint64_t head = ring->head;
    int fd = open_disk(disk);
    uint64_t *block = disk_buffer();
    for (uint64_t seq = head >= SLOTS ? head - SLOTS + 1 : 1; seq <= head; seq++) {
        check("memory", slot(ring, seq), seq, MEMORY_RECORD);
        if (pread(fd, block, DISK_RECORD, (off_t)(seq % SLOTS) * DISK_RECORD) != DISK_RECORD) die("read %s", disk);
        check("disk", block, seq, DISK_RECORD);
    }
    printf("%lu\n", head);
    return 0;
}

int ring_main(int argc, char **argv) {
    if (argc < 2) wrong("ring serve|verify FILE DISK, or ring head FILE");
    struct header *ring = share(argv[1], SIZE);
    if (!strcmp(argv[0], "head")) {
        printf("%lu\n", ring->head);
        return 0;
    }
    if (argc < 3) wrong("which disk?");
    return !strcmp(argv[0], "serve") ? serve(ring, argv[2]) : verify(ring, argv[2]);
}
