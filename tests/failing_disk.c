/* A disk that fails on purpose: preloaded (LD_PRELOAD), it lets system calls on chosen paths fail with a chosen error.

   Rules are lines "PATTERN CALLS ERRNO FROM COUNT RANK": a glob of the whole path, names of calls with a comma between
   them, the number of the error, which matching call is the first to fail (from 1 on), how many fail (0: all that follow),
   and the LOCAL_RANK in which the rule holds (-1: in every process).  They come from the environment variable
   FAILING_DISK when the first call is made, and from failing_disk_rules(), which replaces them.

   A call that fails writes nothing.  Reads are left alone, but for flock and opening for reading. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define MOST_RULES 16
#define LONGEST 4096

struct rule { char pattern[512]; char calls[128]; int error; long from; long count; int rank; long seen; };
static struct rule rules[MOST_RULES];
static int num_rules = -1;
static long failures = 0;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name, type) static __typeof__(type) real = NULL; if (!real) real = (__typeof__(type))dlsym(RTLD_NEXT, name)

static void parse(const char *text) {
    char *copy = strdup(text ? text : ""), *place = NULL;
    num_rules = 0;
    for (char *line = strtok_r(copy, "\n", &place); line && num_rules < MOST_RULES; line = strtok_r(NULL, "\n", &place)) {
        struct rule *r = &rules[num_rules];
        r->seen = 0;
        if (sscanf(line, "%511s %127s %d %ld %ld %d", r->pattern, r->calls, &r->error, &r->from, &r->count, &r->rank) == 6)
            num_rules++;
    }
    free(copy);
}

void failing_disk_rules(const char *text) {
    pthread_mutex_lock(&lock);
    parse(text);
    failures = 0;
    pthread_mutex_unlock(&lock);
}

/* How many calls have failed since the rules were set: a test that caused nothing proves nothing. */
long failing_disk_failures(void) { return failures; }

static int has_word(const char *words, const char *word) {
    size_t length = strlen(word);
    for (const char *at = words; (at = strstr(at, word)); at += length)
        if ((at == words || at[-1] == ',') && (at[length] == ',' || at[length] == 0)) return 1;
    return 0;
}

/* The error of a call on a path; 0 if it is to be made. */
static int fault(const char *call, const char *path) {
    int error = 0;
    if (num_rules == 0 || !path) return 0;
    pthread_mutex_lock(&lock);
    if (num_rules < 0) parse(getenv("FAILING_DISK"));
    for (int i = 0; i < num_rules && !error; i++) {
        struct rule *r = &rules[i];
        if (!has_word(r->calls, call) || fnmatch(r->pattern, path, 0)) continue;
        const char *rank = getenv("LOCAL_RANK");
        if (r->rank >= 0 && r->rank != (rank ? atoi(rank) : 0)) continue;
        r->seen++;
        if (r->seen >= r->from && (!r->count || r->seen < r->from + r->count)) { error = r->error; failures++; }
    }
    pthread_mutex_unlock(&lock);
    return error;
}

static const char *absolute(int dir, const char *path, char *buffer) {
    if (!path || path[0] == '/') return path;
    char base[LONGEST / 2], link[64];
    ssize_t n;
    if (dir == AT_FDCWD) strcpy(link, "/proc/self/cwd"); else snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
    if ((n = readlink(link, base, sizeof base - 1)) < 0) return path;
    base[n] = 0;
    snprintf(buffer, LONGEST, "%s/%s", base, path);
    return buffer;
}

static int path_fault(const char *call, int dir, const char *path) {
    char buffer[LONGEST];
    if (num_rules == 0) return 0;
    int kept = errno, error = fault(call, absolute(dir, path, buffer));
    errno = error ? error : kept;
    return error;
}

static int fd_fault(const char *call, int fd) {
    char link[64], path[LONGEST];
    if (num_rules == 0 || fd < 0) return 0;
    int kept = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    int error = 0;
    if (n > 0 && path[0] == '/') { path[n] = 0; error = fault(call, path); }
    errno = error ? error : kept;
    return error;
}

ssize_t write(int fd, const void *data, size_t size) {
    REAL("write", ssize_t (*)(int, const void *, size_t));
    return fd_fault("write", fd) ? -1 : real(fd, data, size);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL("writev", ssize_t (*)(int, const struct iovec *, int));
    return fd_fault("write", fd) ? -1 : real(fd, parts, count);
}
#define PWRITE(name, offset_t) \
    ssize_t name(int fd, const void *data, size_t size, offset_t at) { \
        REAL(#name, ssize_t (*)(int, const void *, size_t, offset_t)); \
        return fd_fault("write", fd) ? -1 : real(fd, data, size, at); }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)
#define SENDFILE(name, offset_t) \
    ssize_t name(int to, int from, offset_t *at, size_t size) { \
        REAL(#name, ssize_t (*)(int, int, offset_t *, size_t)); \
        return fd_fault("write", to) ? -1 : real(to, from, at, size); }
SENDFILE(sendfile, off_t)
SENDFILE(sendfile64, off64_t)
ssize_t copy_file_range(int from, off64_t *a, int to, off64_t *b, size_t size, unsigned flags) {
    REAL("copy_file_range", ssize_t (*)(int, off64_t *, int, off64_t *, size_t, unsigned));
    return fd_fault("write", to) ? -1 : real(from, a, to, b, size, flags);
}
size_t fwrite(const void *data, size_t size, size_t count, FILE *stream) {
    REAL("fwrite", size_t (*)(const void *, size_t, size_t, FILE *));
    return fd_fault("write", fileno(stream)) ? 0 : real(data, size, count, stream);
}
static int is_directory(int fd) {
    struct stat s;
    return fstat(fd, &s) == 0 && S_ISDIR(s.st_mode);
}
int fsync(int fd) {
    REAL("fsync", int (*)(int));
    if (num_rules == 0) return real(fd);
    return fd_fault(is_directory(fd) ? "fsyncdir" : "fsync", fd) ? -1 : real(fd);
}
int fdatasync(int fd) {
    REAL("fdatasync", int (*)(int));
    return fd_fault("fsync", fd) ? -1 : real(fd);
}
/* As the kernel does on a network file system: the descriptor is closed, and the error is that of an earlier write. */
int close(int fd) {
    REAL("close", int (*)(int));
    int error = fd_fault("close", fd), result = real(fd);
    if (error) { errno = error; return -1; }
    return result;
}
#define TRUNCATE(name, offset_t) \
    int name(int fd, offset_t size) { \
        REAL(#name, int (*)(int, offset_t)); \
        return fd_fault("truncate", fd) ? -1 : real(fd, size); }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)
int truncate64(const char *path, off64_t size) {
    REAL("truncate64", int (*)(const char *, off64_t));
    return path_fault("truncate", AT_FDCWD, path) ? -1 : real(path, size);
}
int truncate(const char *path, off_t size) {
    REAL("truncate", int (*)(const char *, off_t));
    return path_fault("truncate", AT_FDCWD, path) ? -1 : real(path, size);
}

static const char *opening(int flags) { return (flags & O_ACCMODE) == O_RDONLY && !(flags & O_CREAT) ? "read" : "open"; }
#define MODE va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest)
#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        MODE; REAL(#name, int (*)(const char *, int, ...)); \
        return path_fault(opening(flags), AT_FDCWD, path) ? -1 : real(path, flags, mode); }
OPEN(open)
OPEN(open64)
#define OPENAT(name) \
    int name(int dir, const char *path, int flags, ...) { \
        MODE; REAL(#name, int (*)(int, const char *, int, ...)); \
        return path_fault(opening(flags), dir, path) ? -1 : real(dir, path, flags, mode); }
OPENAT(openat)
OPENAT(openat64)
#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) { \
        REAL(#name, FILE *(*)(const char *, const char *)); \
        return path_fault(strpbrk(mode, "wa+") ? "open" : "read", AT_FDCWD, path) ? NULL : real(path, mode); }
FOPEN(fopen)
FOPEN(fopen64)

/* Of the two paths, a rule is about the one that is made. */
int rename(const char *from, const char *to) {
    REAL("rename", int (*)(const char *, const char *));
    return path_fault("rename", AT_FDCWD, to) ? -1 : real(from, to);
}
int renameat(int a, const char *from, int b, const char *to) {
    REAL("renameat", int (*)(int, const char *, int, const char *));
    return path_fault("rename", b, to) ? -1 : real(a, from, b, to);
}
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    REAL("renameat2", int (*)(int, const char *, int, const char *, unsigned));
    return path_fault("renameat2", b, to) ? -1 : real(a, from, b, to, flags);
}
int mkdir(const char *path, mode_t mode) {
    REAL("mkdir", int (*)(const char *, mode_t));
    return path_fault("mkdir", AT_FDCWD, path) ? -1 : real(path, mode);
}
int unlink(const char *path) {
    REAL("unlink", int (*)(const char *));
    return path_fault("unlink", AT_FDCWD, path) ? -1 : real(path);
}
int unlinkat(int dir, const char *path, int flags) {
    REAL("unlinkat", int (*)(int, const char *, int));
    return path_fault("unlink", dir, path) ? -1 : real(dir, path, flags);
}
int flock(int fd, int operation) {
    REAL("flock", int (*)(int, int));
    return fd_fault("flock", fd) ? -1 : real(fd, operation);
}
