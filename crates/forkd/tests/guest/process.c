/* Verbs about processes.
 *
 *   barrier FILE N   waits until N processes have come here
 *   orphans N        leaves N orphans that have ended, then waits until PID 1 has reaped them all
 *   crash-init       overwrites the code of PID 1: the kernel panics
 *   freeze-init      in the background, once the caller has got its answer: freezes PID 1 in a cgroup, and says so on the
 *                    console */
#define _GNU_SOURCE
#include "guest.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

int barrier_main(int argc, char **argv) {
    if (argc < 2) wrong("barrier FILE N");
    volatile uint64_t *arrived = share(argv[0], 8);
    uint64_t all = number(argv[1]), begin = now_ms();
    __atomic_add_fetch(arrived, 1, __ATOMIC_SEQ_CST);
    while (*arrived < all)
        if (now_ms() - begin > 60000) wrong("only %lu of %lu came", *arrived, all);
        else pause_ms();
    return 0;
}

static unsigned zombies(void) {
    DIR *proc = opendir("/proc");
    if (!proc) die("open /proc");
    unsigned count = 0;
    for (struct dirent *entry; (entry = readdir(proc));) {
        char path[300], text[512], *end;
        snprintf(path, sizeof path, "/proc/%s/stat", entry->d_name);
        int fd = entry->d_name[0] >= '1' && entry->d_name[0] <= '9' ? open(path, O_RDONLY) : -1;
        if (fd < 0) continue;
        ssize_t size = read(fd, text, sizeof text - 1);
        close(fd);
        text[size > 0 ? size : 0] = 0;
        end = strrchr(text, ')');
        if (end && end[1] == ' ' && end[2] == 'Z') count++;
    }
    closedir(proc);
    return count;
}

int orphans_main(int argc, char **argv) {
    if (argc < 1) wrong("orphans N");
    uint64_t count = number(argv[0]), begin = now_ms();
    pid_t middle = fork();
    if (middle < 0) die("fork");
    if (middle == 0) {
        for (uint64_t i = 0; i < count; i++) {
            pid_t orphan = fork();
            if (orphan < 0) die("fork");
            if (orphan == 0) _exit(0);
        }
        /* Its children are zombies of its own until it ends; then they are PID 1's. */
        _exit(0);
    }
    if (waitpid(middle, NULL, 0) != middle) die("waitpid");
    while (zombies())
        if (now_ms() - begin > 30000) wrong("%u zombies stay", zombies());
        else pause_ms();
    printf("%lu\n", count);
    return 0;
}

int crash_init_main(int argc, char **argv) {
    (void)argc, (void)argv;
    FILE *maps = fopen("/proc/1/maps", "r");
    int memory = open("/proc/1/mem", O_RDWR);
    if (!maps || memory < 0) die("open /proc/1/maps and mem");
    char line[512];
    static char garbage[4096]; /* add %al,(%rax): not code that anyone wrote */
    while (fgets(line, sizeof line, maps)) {
        unsigned long from, to;
        char rights[5];
        if (sscanf(line, "%lx-%lx %4s", &from, &to, rights) != 3 || rights[2] != 'x' || strstr(line, "[v")) continue;
        for (; from < to; from += sizeof garbage)
            if (pwrite(memory, garbage, sizeof garbage, from) < 0) die("write to /proc/1/mem at %#lx", from);
    }
    return 0;
}

static void put(const char *path, const char *text) {
    int fd = open(path, O_WRONLY);
    if (fd < 0 || write(fd, text, strlen(text)) < 0) die("write to %s", path);
    close(fd);
}

int freeze_init_main(int argc, char **argv) {
    (void)argc, (void)argv;
    mkdir("/tmp/cgroup", 0700);
    if (mount("none", "/tmp/cgroup", "cgroup2", 0, NULL)) die("mount cgroup2");
    if (mkdir("/tmp/cgroup/ice", 0700)) die("make a cgroup");
    pid_t pid = fork();
    if (pid < 0) die("fork");
    if (pid > 0) return 0;
    setsid();
    int console = open("/dev/ttyS0", O_WRONLY | O_NOCTTY);
    if (console < 0) die("open /dev/ttyS0");
    for (int fd = 0; fd < 3; fd++) close(fd);
    /* Until our parent is reaped, its caller may still wait for the answer that PID 1 has to give. */
    while (getppid() != 1) pause_ms();
    sleep(2);
    put("/tmp/cgroup/ice/cgroup.procs", "1");
    put("/tmp/cgroup/ice/cgroup.freeze", "1");
    for (;;) {
        char text[256] = "";
        int fd = open("/tmp/cgroup/ice/cgroup.events", O_RDONLY);
        if (fd >= 0 && read(fd, text, sizeof text - 1) > 0 && strstr(text, "frozen 1")) break;
        if (fd >= 0) close(fd);
        pause_ms();
    }
    static const char said[] = "PID 1 IS FROZEN\n";
    if (write(console, said, sizeof said - 1) < 0) _exit(1);
    for (;;) pause();
}
