/* A disk that fails: loaded before the C library (LD_PRELOAD), it counts what a process does to files below one folder,
 * and refuses operations by their number. It sees every writer: Python's, Rust's (safetensors, tokenizers), C++'s (torch,
 * Arrow). What maps files into memory and writes there, it does not see; what is mapped here is only read. */
#define _GNU_SOURCE
#undef _FORTIFY_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;
static char folder[PATH_MAX];
static long count, first, last;
static int number;
static int listing = -1;

/* From here on operations below `path` are counted from 1, and those from `from` to `to` refused with `code`; each is
 * written to the file descriptor `list`, unless that is negative. An empty path ends it. */
void disk_refuse(const char *path, long from, long to, int code, int list)
{
    pthread_mutex_lock(&guard);
    snprintf(folder, sizeof folder, "%s", path);
    count = 0, first = from, last = to, number = code, listing = list;
    pthread_mutex_unlock(&guard);
}

long disk_count(void) { return count; }

static int is_refused(const char *what, const char *path)
{
    int refused = 0;
    pthread_mutex_lock(&guard);
    size_t length = strlen(folder);
    if (length && !strncmp(path, folder, length) && (path[length] == '/' || !path[length])) {
        count++;
        /* A disk that is full lets go of what it has. */
        refused = count >= first && count <= last && !(number == ENOSPC && !strcmp(what, "unlink"));
        if (listing >= 0)
            dprintf(listing, "%ld %s %s%s\n", count, what, path, refused ? " REFUSED" : "");
    }
    pthread_mutex_unlock(&guard);
    if (refused)
        errno = number;
    return refused;
}

static const char *of_descriptor(int descriptor, char *path)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    int before = errno;
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    errno = before;
    path[length < 0 ? 0 : length] = 0;
    return path;
}

static const char *of_name(int at, const char *name, char *path)
{
    if (name[0] == '/')
        return name;
    char start[PATH_MAX];
    if (at == AT_FDCWD) {
        if (!getcwd(start, sizeof start))
            start[0] = 0;
    } else
        of_descriptor(at, start);
    snprintf(path, PATH_MAX, "%.2000s/%.2000s", start, name);
    return path;
}

static int refused_name(const char *what, int at, const char *name)
{
    char path[PATH_MAX];
    return folder[0] && name && is_refused(what, of_name(at, name, path));
}

static int refused_descriptor(const char *what, int descriptor)
{
    char path[PATH_MAX];
    if (!folder[0] || descriptor < 3 || descriptor == listing)
        return 0;
    return is_refused(what, of_descriptor(descriptor, path));
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define CHANGES(flags) (((flags) & O_ACCMODE) != O_RDONLY || ((flags) & (O_CREAT | O_TRUNC)))

#define OPENED(name)                                                                                                   \
    int name(const char *path, int flags, ...)                                                                         \
    {                                                                                                                  \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        mode_t mode = va_arg(more, mode_t);                                                                            \
        va_end(more);                                                                                                  \
        return CHANGES(flags) && refused_name("open", AT_FDCWD, path) ? -1 : NEXT(name)(path, flags, mode);            \
    }
OPENED(open)
OPENED(open64)
#define OPENED_AT(name)                                                                                                \
    int name(int at, const char *path, int flags, ...)                                                                 \
    {                                                                                                                  \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        mode_t mode = va_arg(more, mode_t);                                                                            \
        va_end(more);                                                                                                  \
        return CHANGES(flags) && refused_name("open", at, path) ? -1 : NEXT(name)(at, path, flags, mode);              \
    }
OPENED_AT(openat)
OPENED_AT(openat64)
int creat(const char *path, mode_t mode)
{
    return refused_name("open", AT_FDCWD, path) ? -1 : NEXT(creat)(path, mode);
}
#define STREAM(name)                                                                                                   \
    FILE *name(const char *path, const char *mode)                                                                     \
    {                                                                                                                  \
        return strpbrk(mode, "wa+") && refused_name("open", AT_FDCWD, path) ? NULL : NEXT(name)(path, mode);           \
    }
STREAM(fopen)
STREAM(fopen64)

ssize_t write(int descriptor, const void *bytes, size_t size)
{
    return refused_descriptor("write", descriptor) ? -1 : NEXT(write)(descriptor, bytes, size);
}
ssize_t writev(int descriptor, const struct iovec *parts, int size)
{
    return refused_descriptor("write", descriptor) ? -1 : NEXT(writev)(descriptor, parts, size);
}
ssize_t pwrite(int descriptor, const void *bytes, size_t size, off_t at)
{
    return refused_descriptor("write", descriptor) ? -1 : NEXT(pwrite)(descriptor, bytes, size, at);
}
ssize_t pwrite64(int descriptor, const void *bytes, size_t size, off64_t at)
{
    return refused_descriptor("write", descriptor) ? -1 : NEXT(pwrite64)(descriptor, bytes, size, at);
}
ssize_t sendfile(int to, int from, off_t *at, size_t size);
ssize_t sendfile(int to, int from, off_t *at, size_t size)
{
    return refused_descriptor("write", to) ? -1 : NEXT(sendfile)(to, from, at, size);
}
ssize_t sendfile64(int to, int from, off64_t *at, size_t size);
ssize_t sendfile64(int to, int from, off64_t *at, size_t size)
{
    return refused_descriptor("write", to) ? -1 : NEXT(sendfile64)(to, from, at, size);
}
ssize_t copy_file_range(int from, off64_t *at, int to, off64_t *there, size_t size, unsigned flags)
{
    return refused_descriptor("write", to) ? -1 : NEXT(copy_file_range)(from, at, to, there, size, flags);
}
int fsync(int descriptor) { return refused_descriptor("fsync", descriptor) ? -1 : NEXT(fsync)(descriptor); }
int fdatasync(int descriptor) { return refused_descriptor("fsync", descriptor) ? -1 : NEXT(fdatasync)(descriptor); }
int ftruncate(int descriptor, off_t size)
{
    return refused_descriptor("truncate", descriptor) ? -1 : NEXT(ftruncate)(descriptor, size);
}
int ftruncate64(int descriptor, off64_t size)
{
    return refused_descriptor("truncate", descriptor) ? -1 : NEXT(ftruncate64)(descriptor, size);
}
int rename(const char *from, const char *to)
{
    return refused_name("rename", AT_FDCWD, from) ? -1 : NEXT(rename)(from, to);
}
int renameat(int a, const char *from, int b, const char *to)
{
    return refused_name("rename", a, from) ? -1 : NEXT(renameat)(a, from, b, to);
}
int renameat2(int a, const char *from, int b, const char *to, unsigned flags)
{
    return refused_name("rename", a, from) ? -1 : NEXT(renameat2)(a, from, b, to, flags);
}
int mkdir(const char *path, mode_t mode)
{
    return refused_name("mkdir", AT_FDCWD, path) ? -1 : NEXT(mkdir)(path, mode);
}
int mkdirat(int at, const char *path, mode_t mode)
{
    return refused_name("mkdir", at, path) ? -1 : NEXT(mkdirat)(at, path, mode);
}
int link(const char *from, const char *to)
{
    return refused_name("link", AT_FDCWD, to) ? -1 : NEXT(link)(from, to);
}
int symlink(const char *from, const char *to)
{
    return refused_name("link", AT_FDCWD, to) ? -1 : NEXT(symlink)(from, to);
}
int unlink(const char *path) { return refused_name("unlink", AT_FDCWD, path) ? -1 : NEXT(unlink)(path); }
int unlinkat(int at, const char *path, int flags)
{
    return refused_name("unlink", at, path) ? -1 : NEXT(unlinkat)(at, path, flags);
}
int rmdir(const char *path) { return refused_name("unlink", AT_FDCWD, path) ? -1 : NEXT(rmdir)(path); }
