/* What the node has done by programs of their own, because the process itself must be in a
 * sandbox's control groups. A process that enters by itself does so at once; one that is put there
 * by another makes the kernel wait for all processors, 13 ms on an idle machine.
 *
 *   fathom-agent --enter FILE ... -- PROGRAM ARGUMENTS ...
 *
 * enters the groups whose list of members is FILE, and becomes PROGRAM.
 *
 *   fathom-agent --copy SOURCE TARGET --group FILE NAME ...
 *
 * makes the folder TARGET and copies the trees NAME of SOURCE into it: owners, modes, times, links,
 * extended attributes and an overlay's marks of deletion included. The copy is charged to the group
 * of FILE, and how many bytes its files have is printed. Nothing is followed: the tenant, which
 * stands still meanwhile, chose every name in there. Where the target has no room left it ends with
 * NO_ROOM.
 */
#include "agent.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/xattr.h>

enum { PIECE = 1 << 16, MOST_DEEP = 512 /* as in layers */, WORTH_SHARING = 1 << 16 };
enum { NO_ROOM = 73 };

typedef struct {
  DIR *from;
  int to;
  struct stat s;
  size_t named; /* length of the path before this folder's own name */
} Level;

/* A file that has several names: where its first copy lies. */
typedef struct Known {
  ino_t inode;
  dev_t device;
  struct Known *next;
  char path[];
} Known;

static char piece[PIECE];
static char *where;
static size_t where_room;
static int root = -1;
static uint64_t total; /* bytes of files, each with all its names counted once */
static Known *known[1024];

static _Noreturn void fail(const char *what) {
  int code = errno == ENOSPC || errno == EDQUOT ? NO_ROOM : 1;
  dprintf(2, "%s: %s: %s\n", where, what, strerror(errno));
  exit(code);
}

static size_t enter(const char *name) {
  size_t before = strlen(where), more = strlen(name) + 2;
  if (before + more > where_room) where = grow(where, where_room = (before + more) * 2);
  snprintf(where + before, more, "%s%s", before ? "/" : "", name);
  return before;
}

static void copy_attributes(int from, int to) {
  static char names[1 << 16]; /* the kernel has no longer list */
  ssize_t size = flistxattr(from, names, sizeof names);
  if (size < 0 && errno != EOPNOTSUPP) fail("read its attributes");
  for (char *at = names; at < names + size; at += strlen(at) + 1) {
    ssize_t length = fgetxattr(from, at, piece, sizeof piece);
    if (length < 0 || fsetxattr(to, at, piece, length, 0)) fail(at);
  }
}

/* Times last: all else changes them. Modes after owners, whose change takes some of them away. */
static void finish(int from, int to, const struct stat *s) {
  if (fchown(to, s->st_uid, s->st_gid)) fail("set the owner");
  copy_attributes(from, to);
  if (fchmod(to, s->st_mode & 07777)) fail("set the mode");
  if (futimens(to, (struct timespec[]){s->st_atim, s->st_mtim})) fail("set the time");
}

static void copy_bytes(int from, int to, off_t size) {
  if (size >= WORTH_SHARING && !ioctl(to, FICLONE, from)) return;
  off_t at = 0;
  while (at < size) {
    /* Holes stay holes: they are no room that the copy would be charged for. */
    off_t data = size > PIECE ? lseek(from, at, SEEK_DATA) : at;
    if (data < 0 && errno == ENXIO) break;
    off_t end = data < 0 || size <= PIECE ? size : lseek(from, data, SEEK_HOLE);
    if (data > at) at = data;
    while (at < end) {
      ssize_t got = pread(from, piece, end - at < PIECE ? end - at : PIECE, at);
      if (got < 0) fail("read");
      if (!got) return;
      ssize_t put = pwrite(to, piece, got, at);
      if (put < 0) fail("write");
      at += put;
    }
  }
  if (size > PIECE && ftruncate(to, size)) fail("set the size");
}

/* Whether a first copy was found and linked; else this one is noted as the first. */
static bool linked(const struct stat *s, int to, const char *name) {
  Known **slot = &known[s->st_ino % (sizeof known / sizeof *known)];
  for (Known *k = *slot; k; k = k->next)
    if (k->inode == s->st_ino && k->device == s->st_dev) {
      if (linkat(root, k->path, to, name, 0)) fail("link");
      return true;
    }
  Known *k = grow(NULL, sizeof *k + strlen(where) + 1);
  *k = (Known){.inode = s->st_ino, .device = s->st_dev, .next = *slot};
  strcpy(k->path, where);
  *slot = k;
  return false;
}

static void copy_file(int from, int to, const char *name, const struct stat *s) {
  int in = openat(from, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK);
  if (in < 0) fail("open");
  int out = openat(to, name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (out < 0) fail("create");
  copy_bytes(in, out, s->st_size);
  total += s->st_size;
  finish(in, out, s);
  close(in);
  close(out);
}

static void copy_other(int from, int to, const char *name, const struct stat *s) {
  if (S_ISLNK(s->st_mode)) {
    ssize_t size = readlinkat(from, name, piece, sizeof piece - 1);
    if (size < 0) fail("read the link");
    piece[size] = 0;
    if (symlinkat(piece, to, name)) fail("create");
  } else if (mknodat(to, name, s->st_mode, s->st_rdev)) {
    fail("create");
  }
  if (fchownat(to, name, s->st_uid, s->st_gid, AT_SYMLINK_NOFOLLOW)) fail("set the owner");
  if (!S_ISLNK(s->st_mode) && fchmodat(to, name, s->st_mode & 07777, 0)) fail("set the mode");
  if (utimensat(to, name, (struct timespec[]){s->st_atim, s->st_mtim}, AT_SYMLINK_NOFOLLOW))
    fail("set the time");
}

static Level descend(int from, int to, const char *name, const struct stat *s, size_t named) {
  if (mkdirat(to, name, 0700)) fail("create");
  int in = openat(from, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  if (in < 0) fail("open");
  int out = openat(to, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  if (out < 0) fail("open the copy");
  DIR *list = fdopendir(in);
  if (!list) fail("list");
  return (Level){list, out, *s, named};
}

static void copy_tree(int from, const char *name) {
  static Level levels[MOST_DEEP];
  struct stat s;
  size_t depth = 0, named = enter(name);
  if (fstatat(from, name, &s, AT_SYMLINK_NOFOLLOW)) fail("look at it");
  if (!S_ISDIR(s.st_mode)) return errno = ENOTDIR, fail("copy");
  levels[depth++] = descend(from, root, name, &s, named);
  while (depth) {
    Level *l = &levels[depth - 1];
    errno = 0;
    struct dirent *entry = readdir(l->from);
    if (!entry) {
      if (errno) fail("list");
      finish(dirfd(l->from), l->to, &l->s);
      closedir(l->from);
      close(l->to);
      where[l->named] = 0;
      depth--;
      continue;
    }
    name = entry->d_name;
    if (!strcmp(name, ".") || !strcmp(name, "..")) continue;
    named = enter(name);
    if (fstatat(dirfd(l->from), name, &s, AT_SYMLINK_NOFOLLOW)) fail("look at it");
    if (S_ISDIR(s.st_mode)) {
      if (depth == MOST_DEEP) {
        dprintf(2, "/%.200s...: folders are nested more than %d deep\n", where, MOST_DEEP);
        exit(1);
      }
      levels[depth++] = descend(dirfd(l->from), l->to, name, &s, named);
      continue;
    }
    if (s.st_nlink == 1 || !linked(&s, l->to, name)) {
      if (S_ISREG(s.st_mode)) copy_file(dirfd(l->from), l->to, name, &s);
      else copy_other(dirfd(l->from), l->to, name, &s);
    }
    where[named] = 0;
  }
}

int enter_group(const char *file) {
  int fd = open(file, O_WRONLY | O_CLOEXEC);
  if (fd < 0) return -1;
  int failed = write(fd, "0", 1) != 1;
  close(fd);
  return failed ? -1 : 0;
}

int enter_main(int argc, char **argv) {
  int at = 0;
  for (; at < argc && strcmp(argv[at], "--"); at++)
    if (enter_group(argv[at])) return dprintf(2, "%s: %s\n", argv[at], strerror(errno)), 71;
  if (argc - at < 3) return dprintf(2, "name a program and its arguments\n"), 64;
  execv(argv[at + 1], argv + at + 2);
  return dprintf(2, "%s: %s\n", argv[at + 1], strerror(errno)), 71;
}

int copy_main(int argc, char **argv) {
  where = grow(NULL, where_room = 256);
  *where = 0;
  if (argc < 4 || strcmp(argv[2], "--group")) return errno = EINVAL, fail("arguments"), 1;
  enter(argv[3]);
  if (enter_group(argv[3])) fail("enter the control group");
  struct rlimit files = {3 * MOST_DEEP, 3 * MOST_DEEP};
  setrlimit(RLIMIT_NOFILE, &files);
  umask(0);
  strcpy(where, "");
  struct stat s;
  enter(argv[0]);
  int from = open(argv[0], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (from < 0 || fstat(from, &s)) fail("open");
  strcpy(where, "");
  enter(argv[1]);
  if (mkdir(argv[1], 0755)) fail("create");
  root = open(argv[1], O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  if (root < 0) fail("open");
  strcpy(where, "");
  for (int i = 4; i < argc; i++) {
    copy_tree(from, argv[i]);
    strcpy(where, "");
  }
  if (futimens(root, (struct timespec[]){s.st_atim, s.st_mtim})) fail("set the time");
  dprintf(1, "%llu\n", (unsigned long long)total);
  return 0;
}
