/* The guest's test program: `guest VERB ...`. Each verb is one file, or a few lines here. */
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

void die(const char *format, ...) {
    int error = errno;
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fprintf(stderr, ": %s\n", strerror(error));
    exit(1);
}

void wrong(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    exit(1);
}

void *share(const char *path, size_t size) {
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0) die("open %s", path);
    off_t end = lseek(fd, 0, SEEK_END);
    if (end < (off_t)size && ftruncate(fd, size)) die("grow %s", path);
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED) die("map %s", path);
    close(fd);
    return at;
}

uint64_t now_ms(void) {
    struct timespec now;
    if (clock_gettime(CLOCK_MONOTONIC, &now)) die("clock_gettime");
    return now.tv_sec * 1000ull + now.tv_nsec / 1000000;
}

void pause_ms(void) {
    struct timespec wait = {0, 1000000};
    nanosleep(&wait, NULL);
}

void into_background(volatile uint64_t *ready) {
    pid_t pid = fork();
    if (pid < 0) die("fork");
    if (pid > 0) {
        uint64_t begin = now_ms();
        while (!*ready)
            if (now_ms() - begin > 30000) wrong("the background process does not begin");
            else pause_ms();
        printf("%d\n", pid);
        exit(0);
    }
    if (setsid() < 0) die("setsid");
    int null = open("/dev/null", O_RDWR);
    if (null < 0) die("open /dev/null");
    for (int fd = 0; fd < 3; fd++)
        if (dup2(null, fd) < 0) die("dup2");
    if (null > 2) close(null);
}

uint64_t number(const char *text) {
    char *end;
    errno = 0;
    uint64_t value = strtoull(text, &end, 10);
    if (errno || *end || end == text) wrong("%s is not a number", text);
    return value;
}

int main(int argc, char **argv) {
    static const struct {
        const char *name;
        int (*run)(int, char **);
    } verbs[] = {
        {"ring", ring_main},       {"count", count_main},     {"simd", simd_main},
        {"clock", clock_main},     {"fill", fill_main},       {"barrier", barrier_main},
        {"orphans", orphans_main}, {"crash-init", crash_init_main}, {"freeze-init", freeze_init_main},
        {"sum", sum_main},         {"clocks", clocks_main},   {"sleep", sleep_main},   {"now", now_main},
        {"load", load_main},
    };
    if (argc < 2) wrong("which verb?");
    for (size_t i = 0; i < sizeof verbs / sizeof *verbs; i++)
        if (!strcmp(argv[1], verbs[i].name)) return verbs[i].run(argc - 2, argv + 2);
    wrong("no verb %s", argv[1]);
}
