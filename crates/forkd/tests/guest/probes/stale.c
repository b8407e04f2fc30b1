/* Translations that are gone: one thread changes what a page is, another uses it without a pause, on another CPU if there is
 * one. From the moment at which mmap, mprotect, munmap or fork has returned, nobody may get at what was there before. */
#define _GNU_SOURCE
#include "probes.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
#define FORKS 50

static char *page;
static atomic_ulong begun, done, looks, faults;
static atomic_int stop, writable;

static int cpus(void) { return sysconf(_SC_NPROCESSORS_ONLN); }

/* Rounds: on one CPU each takes turns of the scheduler, and there is less to find. */
static unsigned long rounds(void) { return cpus() > 1 ? 1000 : 100; }

static void in_thread(void *(*run)(void *), pthread_t *thread) {
    bind_to(0);
    MUST(!pthread_create(thread, NULL, run, NULL));
}

static void elsewhere(void) {
    if (cpus() > 1) bind_to(1);
}

/* Lets the other thread get on by a few looks, also where there is one CPU. */
static void wait_for(atomic_ulong *counter, unsigned long more) {
    unsigned long from = *counter;
    while (*counter < from + more) sched_yield();
}

/* Page k of the file says k. What is seen is at least what was there when the look began, and no more than what has been
 * begun. */
static void *look_at_remaps(void *nothing) {
    elsewhere();
    while (!stop) {
        unsigned long least = done, seen = *(volatile unsigned long *)page, most = begun;
        if (seen < least || seen > most) fail("page %lu is seen when it is %lu to %lu", seen, least, most);
        looks++;
    }
    return nothing;
}

static void remap(void) {
    int file = memfd_create("pages", 0);
    const unsigned long remaps = rounds();
    MUST(file >= 0 && !ftruncate(file, (remaps + 1) * PAGE));
    for (unsigned long k = 0; k <= remaps; k++) MUST(pwrite(file, &k, sizeof k, k * PAGE) == sizeof k);
    page = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, file, 0);
    MUST(page != MAP_FAILED);
    pthread_t thread;
    in_thread(look_at_remaps, &thread);
    for (unsigned long k = 1; k <= remaps; k++) {
        begun = k;
        MUST(mmap(page, PAGE, PROT_READ, MAP_SHARED | MAP_FIXED, file, k * PAGE) == page);
        done = k;
        if (k % 4 == 0) wait_for(&looks, 2);
    }
    stop = 1;
    MUST(!pthread_join(thread, NULL));
}

/* A write that faults waits until it may; then it is done again. */
static void wait_until_writable(int signal, siginfo_t *info, void *context) {
    (void)signal, (void)context;
    if ((char *)((uint64_t)info->si_addr & ~(PAGE - 1ul)) != page) _exit(98);
    faults++;
    while (!writable) sched_yield();
}

static void *write_without_pause(void *nothing) {
    elsewhere();
    volatile unsigned long *word = (volatile unsigned long *)page;
    while (!stop) {
        ++*word;
        looks++;
    }
    return nothing;
}

static void write_protect(void) {
    struct sigaction action = {.sa_sigaction = wait_until_writable, .sa_flags = SA_SIGINFO};
    MUST(!sigaction(SIGSEGV, &action, NULL));
    page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    MUST(page != MAP_FAILED);
    writable = 1;
    pthread_t thread;
    in_thread(write_without_pause, &thread);
    volatile unsigned long *word = (volatile unsigned long *)page;
    for (unsigned long i = rounds(); i > 0; i--) {
        wait_for(&looks, 3);
        unsigned long had = faults;
        writable = 0;
        MUST(!mprotect(page, PAGE, PROT_READ));
        unsigned long before = *word;
        /* The writer does nothing else, so it has to fault now. */
        while (faults == had) sched_yield();
        if (*word != before) fail("%lu became %lu in a page that is read-only", before, *word);
        MUST(!mprotect(page, PAGE, PROT_READ | PROT_WRITE));
        writable = 1;
    }
    stop = 1;
    MUST(!pthread_join(thread, NULL));
}

/* `done` is odd while the page is gone. */
static void *look_at_unmaps(void *nothing) {
    elsewhere();
    catch_faults();
    while (!stop) {
        unsigned long before = done, seen = 0;
        int faulted = TRY("movq (%0), %%rax; movq %%rax, (%1)", "r"(page), "r"(&seen));
        unsigned long after = begun;
        if (!faulted && before % 2 && before == after) fail("a page is read that was unmapped before: %#lx", seen);
        if (!faulted && seen != 0 && seen < before / 2) fail("page %lu is seen, which is now %lu", seen, before / 2);
        if (faulted && before % 2 == 0 && before == after) fail("a page is missing that is there");
        looks++;
    }
    return nothing;
}

static void unmap(void) {
    page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char *other = mmap(NULL, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    MUST(page != MAP_FAILED && other != MAP_FAILED);
    pthread_t thread;
    in_thread(look_at_unmaps, &thread);
    for (unsigned long k = 0; k < rounds(); k++) {
        if (k % 4 == 0) wait_for(&looks, 2);
        begun = 2 * k + 1;
        MUST(!munmap(page, PAGE));
        done = 2 * k + 1;
        /* Another use of that frame, at once: whoever still got at it would see this. */
        MUST(!mprotect(other, PAGE, PROT_READ | PROT_WRITE));
        memset(other, 0xee, PAGE);
        MUST(!madvise(other, PAGE, MADV_DONTNEED));
        if (k % 4 == 0) wait_for(&looks, 2);
        begun = 2 * k + 2;
        MUST(mmap(page, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == page);
        *(volatile unsigned long *)page = k + 1;
        done = 2 * k + 2;
    }
    stop = 1;
    MUST(!pthread_join(thread, NULL));
}

/* A fork makes pages copy-on-write under a thread that writes to them: the child's stand still. */
static void fork_under_writes(void) {
    page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    MUST(page != MAP_FAILED);
    pthread_t thread;
    in_thread(write_without_pause, &thread);
    wait_for(&looks, 1);
    volatile unsigned long *word = (volatile unsigned long *)page;
    for (int i = 0; i < FORKS; i++) {
        unsigned long before = *word;
        pid_t pid = fork();
        MUST(pid >= 0);
        if (pid == 0) {
            unsigned long mine = *word;
            struct timespec nap = {0, 500000};
            for (int look = 0; look < 4; look++) {
                if (*word != mine || mine < before) fail("a child's %lu became %lu", mine, *word);
                nanosleep(&nap, NULL);
            }
            _exit(0);
        }
        int status;
        MUST(waitpid(pid, &status, 0) == pid && status == 0);
        wait_for(&looks, 1);
        MUST(*word > before);
    }
    stop = 1;
    MUST(!pthread_join(thread, NULL));
}

/* Copies of copies of huge areas, freed at once: whole-address-space flushes while another thread runs in it. */
static void flush_by_large_unmaps(void) {
    page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    MUST(page != MAP_FAILED);
    pthread_t thread;
    in_thread(write_without_pause, &thread);
    for (int i = 0; i < 100; i++) {
        const size_t size = 256 * PAGE;
        volatile char *room = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        MUST(room != MAP_FAILED);
        for (size_t at = 0; at < size; at += PAGE) room[at] = i;
        for (size_t at = 0; at < size; at += PAGE) MUST(room[at] == (char)i);
        MUST(!madvise((void *)room, size, MADV_DONTNEED));
        for (size_t at = 0; at < size; at += 8 * PAGE) MUST(room[at] == 0);
        MUST(!munmap((void *)room, size));
    }
    unsigned long written = looks;
    wait_for(&looks, 1);
    stop = 1;
    MUST(!pthread_join(thread, NULL));
    MUST(looks > written && *(unsigned long *)page == looks);
}

void stale_probes(void) {
    static const struct probe probes[] = {
        {"a page that becomes another of its file", FINE, remap},
        {"a page that becomes read-only", FINE, write_protect},
        {"a page that is unmapped", FINE, unmap},
        {"a page that is copied by a fork", FINE, fork_under_writes},
        {"much that is unmapped at once", FINE, flush_by_large_unmaps},
    };
    RUN(probes);
}
