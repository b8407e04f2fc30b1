// A compiler for Kbuild that spares it most of the work on headers.
//
//   CC_HEADERS=DIR cc ARGUMENT...         what gcc would do with these arguments
//   CC_HEADERS=DIR CC_PRECOMPILE=1 cc ... besides, precompiles DIR/{core,net}.h with these arguments
//
// Half of the time that gcc takes for the files of the kernel goes into the same headers, again and again. Here a
// file starts with a precompiled header that has them. That is the same program as without if no header can tell that
// it was included sooner, so files that define a macro before their last #include are left alone. gcc itself checks
// that the options and macros are those that the header was precompiled with; if it refuses, or if anything at all
// fails, gcc runs with the arguments as they came, and its word is the last. README.md says how that was checked, and
// the one thing that differs.
//
// Warnings and lists of dependencies are left out: they are for who edits the kernel, and take time.
#define _GNU_SOURCE
#include <ctype.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MAX_ARGUMENTS = 1024, MAX_PATH = 4096 };

static bool starts(const char *text, const char *with) { return strncmp(text, with, strlen(with)) == 0; }

static bool ends(const char *text, const char *with) {
    size_t length = strlen(text), tail = strlen(with);
    return length >= tail && strcmp(text + length - tail, with) == 0;
}

// Runs gcc and returns its status. Nothing that it says is shown.
static int run(char **arguments) {
    pid_t child = fork();
    if (child == 0) {
        int null = open("/dev/null", O_WRONLY);
        if (null < 0 || dup2(null, STDERR_FILENO) < 0) _exit(127);
        execvp(arguments[0], arguments);
        _exit(127);
    }
    int status;
    if (child < 0 || waitpid(child, &status, 0) < 0) return 127;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 127;
}

// Whether a header beside the file sets the prefix of messages only if nobody has yet: a precompiled header has.
static bool asks_for_prefix(const char *file, const char *include) {
    char path[MAX_PATH], line[256];
    const char *slash = strrchr(file, '/'), *end = strchr(include, '"');
    if (!slash || !end) return false;
    snprintf(path, sizeof path, "%.*s%.*s", (int)(slash + 1 - file), file, (int)(end - include), include);
    FILE *header = fopen(path, "r");
    if (!header) return false;
    bool asks = false;
    while (!asks && fgets(line, sizeof line, header)) asks = starts(line, "#ifndef pr_fmt");
    fclose(header);
    return asks;
}

// Whether no macro but the prefix of messages is defined or undefined before the file's last #include, so that the
// headers come out the same wherever they are included.
static bool headers_come_first(const char *path) {
    FILE *file = fopen(path, "r");
    if (!file) return false;
    char *line = NULL;
    size_t size = 0;
    bool macro = false, first = true;
    while (first && getline(&line, &size, file) >= 0) {
        const char *at = line;
        while (isspace((unsigned char)*at)) at++;
        if (*at++ != '#') continue;
        while (isspace((unsigned char)*at)) at++;
        if (starts(at, "include")) {
            const char *quote = strchr(at, '"');
            first = !macro && !(quote && asks_for_prefix(path, quote + 1));
        }
        else if (starts(at, "undef")) macro = true;
        else if (starts(at, "define")) {
            at += strlen("define");
            while (isspace((unsigned char)*at)) at++;
            if (!starts(at, "pr_fmt(") && !starts(at, "dev_fmt(")) macro = true;
        }
    }
    free(line);
    fclose(file);
    return first;
}

// Writes what a -D of each of the file's own KBUILD macros says: they may not be there before the precompiled header.
static bool write_macros(const char *path, char **macros, int count) {
    FILE *file = fopen(path, "w");
    if (!file) return false;
    for (int i = 0; i < count; i++) {
        const char *text = macros[i] + 2, *value = strchr(text, '=');
        if (value) fprintf(file, "#define %.*s %s\n", (int)(value - text), text, value + 1);
        else fprintf(file, "#define %s 1\n", text);
    }
    return fclose(file) == 0;
}

// Kbuild reads the list of dependencies and deletes it. Each build is of a new tree, so a list of one is enough.
static bool write_dependencies(const char *path, const char *object, const char *source) {
    FILE *file = fopen(path, "w");
    if (!file) return false;
    fprintf(file, "%s: %s\n", object, source);
    return fclose(file) == 0;
}

static bool precompiled(int count, char **given, const char *headers) {
    char *arguments[MAX_ARGUMENTS] = {"gcc"}, *macros[16];
    char prefix[MAX_PATH], own[MAX_PATH], output[MAX_PATH + 4];
    const char *source = NULL, *object = NULL, *dependencies = NULL;
    int n = 1, macro_count = 0;
    bool compile = false, kernel = false;
    if (count > MAX_ARGUMENTS - 16) return false;

    int include_at = n;
    n += 4; // for two -include
    for (int i = 1; i < count; i++) {
        char *argument = given[i];
        if (strcmp(argument, "-include") == 0) {
            // The three that each file starts with are in the precompiled header.
            argument = i + 1 < count ? given[++i] : "";
            if (!ends(argument, "/compiler-version.h") && !ends(argument, "/kconfig.h") &&
                !ends(argument, "/compiler_types.h"))
                return false;
        }
        else if (strcmp(argument, "-o") == 0 && i + 1 < count) object = given[++i];
        else if (strcmp(argument, "-c") == 0) compile = true;
        else if (starts(argument, "-Wp,-MMD,")) dependencies = argument + strlen("-Wp,-MMD,");
        else if (starts(argument, "-W") && !starts(argument, "-Wa,") && !starts(argument, "-Wp,")) continue;
        else if (starts(argument, "-DKBUILD_") || starts(argument, "-D__KBUILD_")) {
            if (macro_count == 16) return false;
            macros[macro_count++] = argument;
        } else if (argument[0] != '-' && ends(argument, ".c")) source = argument;
        else {
            kernel = kernel || strcmp(argument, "-D__KERNEL__") == 0;
            arguments[n++] = argument;
        }
    }
    if (!compile || !kernel || !source || !object || !dependencies || !ends(object, ".o")) return false;

    bool net = starts(object, "net/") || starts(object, "drivers/net/");
    snprintf(prefix, sizeof prefix, "%s/%s.h", headers, net ? "net" : "core");
    arguments[include_at] = "-include";
    arguments[include_at + 1] = prefix;
    arguments[n++] = "-w";
    if (getenv("CC_PRECOMPILE")) {
        // Without the macros of one file, and without a second header.
        arguments[include_at + 2] = arguments[include_at + 3] = "-Winvalid-pch";
        for (int i = 0; i < 2; i++) {
            static const char *const NAMES[] = {"core", "net"};
            snprintf(prefix, sizeof prefix, "%s/%s.h", headers, NAMES[i]);
            snprintf(output, sizeof output, "%s.gch", prefix);
            arguments[include_at] = "-x", arguments[include_at + 1] = "c-header";
            arguments[n] = "-o", arguments[n + 1] = output, arguments[n + 2] = prefix, arguments[n + 3] = NULL;
            if (run(arguments) != 0) fprintf(stderr, "cc: cannot precompile %s\n", prefix);
        }
        return false;
    }
    if (!headers_come_first(source)) return false;
    snprintf(own, sizeof own, "%s.macros.h", object);
    arguments[include_at + 2] = "-include";
    arguments[include_at + 3] = own;
    static char *const LAST[] = {"-Winvalid-pch", "-Werror=invalid-pch", "-c", "-o"};
    for (int i = 0; i < 4; i++) arguments[n++] = LAST[i];
    arguments[n++] = (char *)object;
    arguments[n++] = (char *)source;
    arguments[n] = NULL;
    bool done = write_macros(own, macros, macro_count) && run(arguments) == 0 &&
                write_dependencies(dependencies, object, source);
    unlink(own);
    return done;
}

int main(int count, char **arguments) {
    const char *headers = getenv("CC_HEADERS");
    if (headers && precompiled(count, arguments, headers)) return 0;
    arguments[0] = "gcc";
    execvp("gcc", arguments);
    perror("gcc");
    return 127;
}
