/* File operations. They run in a process that already is the tenant, so whatever links, pipes or
 * devices were planted on a path, they lead to what the tenant may reach anyway.
 *
 * A result is written to standard output, an error as "E<errno>" to the problem pipe.
 */
#include "agent.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>

enum { CHUNK = 65536 };

static int fail(int error, int number) {
  dprintf(error, "E%d", number);
  return 125;
}

static bool write_all(int fd, const char *data, size_t len) {
  while (len) {
    ssize_t done = write(fd, data, len);
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) return false;
    data += done;
    len -= done;
  }
  return true;
}

static int copy(int from, int to) {
  char data[CHUNK];
  for (;;) {
    ssize_t len = read(from, data, sizeof data);
    if (len < 0 && errno == EINTR) continue;
    if (len <= 0) return len ? errno : 0;
    if (!write_all(to, data, len)) return errno;
  }
}

/* One entry: kind, mode, size, time of change, number of links, name, each ended by NUL. */
static int describe(const char *name, const struct stat *s) {
  int kind = S_ISREG(s->st_mode)   ? 'f'
             : S_ISDIR(s->st_mode) ? 'd'
             : S_ISLNK(s->st_mode) ? 'l'
                                   : 'o';
  return dprintf(1, "%c%c%o%c%lld%c%lld%c%lu%c%s%c", kind, 0, s->st_mode & 07777, 0,
                 (long long)s->st_size, 0,
                 (long long)s->st_mtim.tv_sec * 1000000000 + s->st_mtim.tv_nsec, 0,
                 (unsigned long)s->st_nlink, 0, name, 0);
}

static int read_file(const char *path, const char *offset, int error) {
  /* Not blocking, so that a pipe without a writer is told and not waited for. */
  int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  struct stat s;
  if (fd < 0 || fstat(fd, &s)) return fail(error, errno);
  if (S_ISDIR(s.st_mode)) return fail(error, EISDIR);
  if (!S_ISREG(s.st_mode)) return fail(error, ENOTSUP);
  if (offset && lseek(fd, strtoll(offset, NULL, 10), SEEK_SET) < 0) return fail(error, errno);
  int problem = copy(fd, 1);
  return problem && problem != EPIPE ? fail(error, problem) : 0;
}

static int make_parents(const char *path) {
  char *part = strdup(path);
  for (char *at = part + 1; (at = strchr(at, '/')); at++) {
    *at = 0;
    if (mkdir(part, 0777) && errno != EEXIST) return errno;
    *at = '/';
  }
  free(part);
  return 0;
}

static int write_file(const char *path, uint64_t mode, int error) {
  int flags = O_WRONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY;
  struct stat s;
  int fd = open(path, flags);
  bool fresh = fd < 0 && errno == ENOENT;
  if (fresh) {
    int problem = make_parents(path);
    if (problem) return fail(error, problem);
    fd = open(path, flags | O_CREAT, mode ? mode : 0644);
  }
  if (fd < 0 && errno == ENXIO) return fail(error, ENOTSUP);
  if (fd < 0 || fstat(fd, &s)) return fail(error, errno);
  if (!S_ISREG(s.st_mode)) return fail(error, ENOTSUP);
  if (ftruncate(fd, 0)) return fail(error, errno);
  int problem = copy(0, fd);
  if (!problem && mode && !fresh && fchmod(fd, mode)) problem = errno;
  if (close(fd) && !problem) problem = errno;
  if (!problem) return 0;
  /* What could not be written whole shall not look like a file, nor keep a full disk full. */
  if (fresh) unlink(path);
  return fail(error, problem);
}

static int stat_file(const char *path, int error) {
  struct stat s;
  if (lstat(path, &s)) return fail(error, errno);
  return describe(path, &s) < 0 ? fail(error, errno) : 0;
}

static int list_folder(const char *path, int error) {
  int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  DIR *folder = fd < 0 ? NULL : fdopendir(fd);
  if (!folder) return fail(error, errno);
  struct dirent *entry;
  while ((entry = readdir(folder))) {
    struct stat s;
    if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
    if (fstatat(fd, entry->d_name, &s, AT_SYMLINK_NOFOLLOW)) continue; /* gone meanwhile */
    if (describe(entry->d_name, &s) < 0) return fail(error, errno);
  }
  return 0;
}

static int remove_tree(int at, const char *name) {
  if (!unlinkat(at, name, 0)) return 0;
  if (errno != EISDIR && errno != EPERM) return errno;
  /* Never through a link: a folder swapped for one is refused here. */
  int fd = openat(at, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  DIR *folder = fd < 0 ? NULL : fdopendir(fd);
  if (!folder) return errno;
  struct dirent *entry;
  int problem = 0;
  while (!problem && (entry = readdir(folder)))
    if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, ".."))
      problem = remove_tree(fd, entry->d_name);
  closedir(folder);
  if (!problem && unlinkat(at, name, AT_REMOVEDIR)) problem = errno;
  return problem;
}

int run_builtin(const char *name, char **args, int error, uint64_t mode) {
  int problem = EINVAL;
  if (!args[0] || !*args[0]) return fail(error, ENOENT);
  if (!strcmp(name, "read")) return read_file(args[0], args[1], error);
  if (!strcmp(name, "write")) return write_file(args[0], mode, error);
  if (!strcmp(name, "stat")) return stat_file(args[0], error);
  if (!strcmp(name, "list")) return list_folder(args[0], error);
  if (!strcmp(name, "mkdir")) {
    struct stat s;
    problem = make_parents(args[0]);
    if (!problem && mkdir(args[0], mode ? mode : 0755) &&
        (errno != EEXIST || stat(args[0], &s) || !S_ISDIR(s.st_mode)))
      problem = errno;
  } else if (!strcmp(name, "remove")) {
    problem = remove_tree(AT_FDCWD, args[0]);
  } else if (!strcmp(name, "connect")) {
    problem = carry_port(args[0]);
  } else if (!strcmp(name, "rename") && args[1]) {
    problem = rename(args[0], args[1]) ? errno : 0;
  }
  return problem ? fail(error, problem) : 0;
}
