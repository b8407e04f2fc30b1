/* Everything that a kernel does for its processes, all at once, by threads that check what they get.
 *
 *   load start FILE          for ever, in the background
 *   load check FILE ROUNDS   waits until each worker has done that many more rounds; fails if one was ever wrong; prints the
 *                            rounds of all */
#define _GNU_SOURCE
#include "guest.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct worker {
    volatile uint64_t rounds, failed;
    char kind[16], why[104];
};

struct load {
    volatile uint64_t workers;
    struct worker worker[32];
};

static __thread struct worker *me;

/* The worker stops; `load check` tells why. */
#define SHOULD(condition)                                                                                                      \
    do {                                                                                                                       \
        if (!(condition)) {                                                                                                    \
            snprintf(me->why, sizeof me->why, "%s (errno %d)", #condition, errno);                                             \
            me->failed = 1;                                                                                                    \
            pthread_exit(NULL);                                                                                                \
        }                                                                                                                      \
    } while (0)

static uint64_t monotonic_us(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000ull + now.tv_nsec / 1000;
}

static void calls(void) {
    int ends[2];
    struct stat about;
    const pid_t pid = getpid();
    const long thread = syscall(SYS_gettid);
    SHOULD(!pipe(ends));
    for (;; me->rounds++)
        for (uint64_t i = 0; i < 500; i++) {
            uint64_t sent = i * 0x9e3779b97f4a7c15ull, got = 0;
            SHOULD(write(ends[1], &sent, 8) == 8);
            SHOULD(read(ends[0], &got, 8) == 8 && got == sent);
            SHOULD(syscall(SYS_getpid) == pid && syscall(SYS_gettid) == thread);
            SHOULD(!fstat(ends[0], &about) && S_ISFIFO(about.st_mode));
            SHOULD(syscall(SYS_close, -1) == -1 && errno == EBADF);
        }
}

static void faults(void) {
    const size_t pages = 16, step = 4096 / sizeof(uint64_t);
    for (;; me->rounds++) {
        volatile uint64_t *room =
            mmap(NULL, pages * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        SHOULD(room != MAP_FAILED);
        for (size_t i = 0; i < pages; i++) SHOULD(room[i * step] == 0);
        for (size_t i = 0; i < pages; i++) room[i * step + i] = me->rounds ^ i;
        SHOULD(!mprotect((void *)room, pages / 2 * 4096, PROT_READ));
        for (size_t i = 0; i < pages; i++) SHOULD(room[i * step + i] == (me->rounds ^ i));
        SHOULD(!munmap((void *)room, pages * 4096));
    }
}

static __thread uint64_t told;
static void tell(int signal, siginfo_t *info, void *context) {
    (void)signal, (void)context;
    told = (uint64_t)info->si_value.sival_ptr;
}

static void signals(void) {
    for (;; me->rounds++)
        for (uint64_t i = 1; i < 200; i++) {
            union sigval value = {.sival_ptr = (void *)(me->rounds << 20 | i)};
            SHOULD(!pthread_sigqueue(pthread_self(), SIGRTMIN, value));
            SHOULD(told == (me->rounds << 20 | i));
        }
}

/* A timer of a millisecond has expired as often as milliseconds went by, and no sleep is too short. */
static void timers(void) {
    const uint64_t period = 1000;
    struct itimerspec every = {{0, period * 1000}, {0, period * 1000}};
    int timer = timerfd_create(CLOCK_MONOTONIC, 0);
    uint64_t expired = 0, begun = monotonic_us();
    SHOULD(timer >= 0 && !timerfd_settime(timer, 0, &every, NULL));
    const uint64_t armed = monotonic_us();
    for (;; me->rounds++) {
        uint64_t more, before = monotonic_us();
        SHOULD(read(timer, &more, 8) == 8);
        expired += more;
        SHOULD(expired * period <= monotonic_us() - begun);
        SHOULD((expired + 2) * period >= before - armed);
        struct timespec nap = {0, period * 1000};
        before = monotonic_us();
        SHOULD(!nanosleep(&nap, NULL));
        SHOULD(monotonic_us() - before >= period);
    }
}

/* A child has the parent's memory as it was, and its own from then on. */
static void processes(void) {
    volatile uint64_t *word = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    SHOULD(word != MAP_FAILED);
    for (;; me->rounds++) {
        *word = me->rounds;
        pid_t pid = fork();
        SHOULD(pid >= 0);
        if (pid == 0) {
            int right = *word == me->rounds;
            *word = 1;
            _exit(right && *word == 1 ? 42 : 1);
        }
        int status;
        SHOULD(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 42);
        SHOULD(*word == me->rounds);
    }
}

/* Registers keep what they hold, for longer than a time slice and across a system call. */
__attribute__((target("avx512f,avx512bw"))) static void hold_avx512(const uint64_t *in, uint64_t *out) {
    asm volatile(".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n"
                 "vmovdqu64 64*\\i(%0), %%zmm\\i\n"
                 ".endr\n"
                 ".irp k,1,2,3,4,5,6,7\n"
                 "kmovq 2048+8*\\k(%0), %%k\\k\n"
                 ".endr\n"
                 "mov $4000000, %%edx\n"
                 "1: dec %%edx\n"
                 "jnz 1b\n"
                 "mov %2, %%eax\n"
                 "syscall\n"
                 ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n"
                 "vmovdqu64 %%zmm\\i, 64*\\i(%1)\n"
                 ".endr\n"
                 ".irp k,1,2,3,4,5,6,7\n"
                 "kmovq %%k\\k, 2048+8*\\k(%1)\n"
                 ".endr\n"
                 "vzeroupper\n"
                 :
                 : "r"(in), "r"(out), "i"(SYS_sched_yield)
                 : "rax", "rcx", "rdx", "r11", "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7",
                   "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19",
                   "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30",
                   "xmm31", "k1", "k2", "k3", "k4", "k5", "k6", "k7");
}

static void vectors(void) {
    uint64_t in[264], out[264];
    for (;; me->rounds++) {
        for (size_t i = 0; i < 264; i++) in[i] = (me->rounds + 1) * 0x9e3779b97f4a7c15ull ^ (uint64_t)&told ^ i << 40;
        memset(out, 0, sizeof out);
        in[256] = 0; /* k0 is not used */
        hold_avx512(in, out);
        SHOULD(!memcmp(in, out, sizeof in));
    }
}

static const struct {
    const char *name;
    void (*run)(void);
} kinds[] = {{"calls", calls},   {"faults", faults},       {"signals", signals},
             {"timers", timers}, {"processes", processes}, {"vectors", vectors}};
#define KINDS (sizeof kinds / sizeof *kinds)
/* Of each kind. */
#define COPIES 2

static struct load *load;

static void *work(void *argument) {
    size_t index = (size_t)argument;
    me = load->worker + index;
    kinds[index / COPIES].run();
    return NULL;
}

static int start(void) {
    __builtin_cpu_init();
    /* The last kind is for CPUs that have it. */
    const size_t usable = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") ? KINDS : KINDS - 1;
    struct sigaction action = {.sa_sigaction = tell, .sa_flags = SA_SIGINFO};
    sigaction(SIGRTMIN, &action, NULL);
    for (size_t i = 0; i < usable * COPIES; i++) snprintf(load->worker[i].kind, 16, "%s", kinds[i / COPIES].name);
    into_background(&load->workers);
    for (size_t i = 0; i < usable * COPIES; i++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, work, (void *)i)) _exit(1);
    }
    load->workers = usable * COPIES;
    for (;;) pause();
}

int load_main(int argc, char **argv) {
    if (argc < 2) wrong("load start FILE, or load check FILE ROUNDS");
    load = share(argv[1], sizeof *load);
    if (!strcmp(argv[0], "start")) return start();
    if (argc < 3) wrong("how many rounds?");
    uint64_t more = number(argv[2]), first[32], begin = now_ms(), all = 0;
    for (size_t i = 0; i < load->workers; i++) first[i] = load->worker[i].rounds;
    for (size_t i = 0; i < load->workers; i++) {
        struct worker *worker = load->worker + i;
        while (worker->rounds < first[i] + more && !worker->failed)
            if (now_ms() - begin > 60000) wrong("%s %lu stands still at round %lu", worker->kind, i, worker->rounds);
            else pause_ms();
        if (worker->failed) wrong("%s %lu, round %lu: %s", worker->kind, i, worker->rounds, worker->why);
        all += worker->rounds;
    }
    printf("%lu\n", all);
    return 0;
}
