/* What was written, as a tar archive on standard output. The host reads it like any archive that a
 * stranger made. A deleted file is an empty one named .wh.NAME, a replaced folder holds .wh..wh..opq,
 * as in the layers of container images. Sockets are left out.
 */
#include "agent.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>

enum { BLOCK = 512, DEPTH = 200 /* known to the host's message */ };

static bool put_out(const void *data, size_t len) {
  const char *at = data;
  while (len) {
    ssize_t done = write(1, at, len);
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) return false;
    at += done;
    len -= done;
  }
  return true;
}

static bool pad(uint64_t size) {
  static const char zeros[BLOCK];
  return !(size % BLOCK) || put_out(zeros, BLOCK - size % BLOCK);
}

static void octal(char *field, size_t len, uint64_t value) {
  if (value >> (3 * (len - 1))) {
    /* Too large for digits: the base-256 form. */
    for (size_t i = 0; i < len; i++) field[len - 1 - i] = i < 8 ? value >> (8 * i) & 255 : 0;
    field[0] |= 0x80;
    return;
  }
  for (size_t i = 0; i + 1 < len; i++) field[len - 2 - i] = '0' + (value >> (3 * i) & 7);
}

static bool header(char kind, const char *name, const char *target, const struct stat *s,
                   uint64_t size) {
  char h[BLOCK] = {0};
  /* Too long for its field: an entry before this one carries it. */
  if (strlen(name) > 100 && (!header('L', "././@LongLink", "", s, strlen(name) + 1) ||
                             !put_out(name, strlen(name) + 1) || !pad(strlen(name) + 1)))
    return false;
  if (strlen(target) > 100 && (!header('K', "././@LongLink", "", s, strlen(target) + 1) ||
                               !put_out(target, strlen(target) + 1) || !pad(strlen(target) + 1)))
    return false;
  memcpy(h, name, strnlen(name, 100));
  octal(h + 100, 8, s->st_mode & 07777);
  octal(h + 108, 8, s->st_uid);
  octal(h + 116, 8, s->st_gid);
  octal(h + 124, 12, size);
  octal(h + 136, 12, s->st_mtim.tv_sec < 0 ? 0 : s->st_mtim.tv_sec);
  memset(h + 148, ' ', 8);
  h[156] = kind;
  memcpy(h + 157, target, strnlen(target, 100));
  memcpy(h + 257, "ustar  ", 8);
  unsigned sum = 0;
  for (int i = 0; i < BLOCK; i++) sum += (unsigned char)h[i];
  octal(h + 148, 7, sum);
  return put_out(h, BLOCK);
}

/* Bytes of files that may still be sent. A file of nothing but a hole takes no room on the disk, and
 * would be sent as zeros without end. */
static uint64_t room;

static bool file_content(int folder, const char *leaf, const char *name, const struct stat *s) {
  static char data[65536];
  int fd = openat(folder, leaf, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
  if (fd < 0) return errno == ENOENT;
  uint64_t left = s->st_size;
  bool sound = left <= room;
  if (!sound) errno = EFBIG;
  if (sound) {
    room -= left;
    sound = header('0', name, "", s, s->st_size);
  }
  while (sound && left) {
    ssize_t len = read(fd, data, left < sizeof data ? left : sizeof data);
    if (len < 0 && errno == EINTR) continue;
    /* A file that shrank meanwhile keeps its announced length. */
    if (len <= 0) memset(data, 0, len = left < sizeof data ? left : sizeof data);
    sound = put_out(data, len);
    left -= len;
  }
  int problem = errno;
  close(fd);
  errno = problem;
  return sound && pad(s->st_size);
}

static bool tree(int folder, const char *prefix, int depth) {
  DIR *dir = fdopendir(folder);
  struct dirent *entry;
  bool sound = dir && depth < DEPTH;
  if (depth == DEPTH) errno = ELOOP;
  char value[4];
  if (sound && *prefix && fgetxattr(folder, "trusted.overlay.opaque", value, sizeof value) == 1 &&
      *value == 'y') {
    struct stat s = {.st_mode = 0};
    char name[4200];
    snprintf(name, sizeof name, "%s.wh..wh..opq", prefix);
    sound = header('0', name, "", &s, 0);
  }
  while (sound && (entry = readdir(dir))) {
    char name[4200], target[4097] = "";
    struct stat s;
    if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
    if (snprintf(name, sizeof name, "%s%s", prefix, entry->d_name) > 4100) {
      errno = ENAMETOOLONG;
      sound = false;
      break;
    }
    if (fstatat(folder, entry->d_name, &s, AT_SYMLINK_NOFOLLOW)) continue;
    if (S_ISDIR(s.st_mode)) {
      strcat(name, "/");
      int below = openat(folder, entry->d_name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
      sound = below >= 0 && header('5', name, "", &s, 0) && tree(below, name, depth + 1);
    } else if (S_ISREG(s.st_mode)) {
      sound = file_content(folder, entry->d_name, name, &s);
    } else if (S_ISLNK(s.st_mode)) {
      ssize_t len = readlinkat(folder, entry->d_name, target, sizeof target - 1);
      target[len > 0 ? len : 0] = 0;
      sound = header('2', name, target, &s, 0);
    } else if (S_ISCHR(s.st_mode) && s.st_rdev == makedev(0, 0)) {
      snprintf(name, sizeof name, "%s.wh.%s", prefix, entry->d_name);
      s.st_mode = 0;
      sound = header('0', name, "", &s, 0);
    } else if (S_ISFIFO(s.st_mode)) {
      sound = header('6', name, "", &s, 0);
    }
  }
  int problem = errno;
  if (dir) closedir(dir);
  errno = problem;
  return sound;
}

/* Write the tree below `path`, of files with at most `limit` bytes together. Returns an error
 * number. */
int write_archive(const char *path, uint64_t limit) {
  static const char end[2 * BLOCK];
  int folder = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW);
  if (folder < 0) return errno;
  errno = 0;
  room = limit;
  if (tree(folder, "", 0) && put_out(end, sizeof end)) return 0;
  return errno ? errno : EIO;
}
