/* Preloaded into the command: every transfer moves at most half of what was asked (SHIM_SHORT), or every fsync takes
 * its time (SHIM_SLOW, in microseconds), so that runs which race overlap. The number of shortened transfers is
 * appended to the file SHIM_LOG when the process ends. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static long shortened[6];

static size_t half(size_t size, int kind) {
    if (size < 2 || !getenv("SHIM_SHORT")) return size;
    shortened[kind]++;
    return size / 2;
}

#define NEXT(name, type, ...) ((type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name))

ssize_t read(int fd, void *data, size_t size) {
    return NEXT("read", ssize_t, int, void *, size_t)(fd, data, half(size, 0));
}

ssize_t write(int fd, const void *data, size_t size) {
    return NEXT("write", ssize_t, int, const void *, size_t)(fd, data, half(size, 1));
}

ssize_t pread64(int fd, void *data, size_t size, off64_t at) {
    return NEXT("pread64", ssize_t, int, void *, size_t, off64_t)(fd, data, half(size, 2), at);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    return NEXT("pwrite64", ssize_t, int, const void *, size_t, off64_t)(fd, data, half(size, 3), at);
}

/* One buffer is all that is ever passed here. */
ssize_t preadv64v2(int fd, const struct iovec *parts, int count, off64_t at, int flags) {
    struct iovec part = parts[0];
    part.iov_len = half(part.iov_len, 4);
    return NEXT("preadv64v2", ssize_t, int, const struct iovec *, int, off64_t, int)(
        fd, count == 1 ? &part : parts, count, at, flags);
}

ssize_t copy_file_range(int from, off64_t *at, int to, off64_t *there, size_t size, unsigned flags) {
    return NEXT("copy_file_range", ssize_t, int, off64_t *, int, off64_t *, size_t, unsigned)(
        from, at, to, there, half(size, 5), flags);
}

int fsync(int fd) {
    const char *slow = getenv("SHIM_SLOW");
    if (slow) usleep((useconds_t)atoi(slow));
    return NEXT("fsync", int, int)(fd);
}

__attribute__((destructor)) static void report(void) {
    static const char *const names[] = {"read", "write", "pread", "pwrite", "preadv", "copy_file_range"};
    const char *path = getenv("SHIM_LOG");
    FILE *log = path ? fopen(path, "a") : NULL;
    if (!log) return;
    for (int kind = 0; kind < 6; kind++) fprintf(log, "%s %ld\n", names[kind], shortened[kind]);
    fclose(log);
}
