/* Memory in a small guest: end a command that uses all of its group's, before the kernel gets to it.
 *
 * At a group's limit the kernel first tries to take back pages, and under emulation it is busy with
 * that for minutes while nothing in the group makes a step. The agent is outside of the group and is
 * told of every time that the limit is met; where what fills it cannot be given back, it ends the
 * largest process. Pages of files do not count: those the kernel can give back.
 */
#include "agent.h"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/epoll.h>

enum { FULL_PERCENT = 90 };

static int events = -1;
static uint64_t kills;
static Tag tag = {K_MEMORY, NULL};

static uint64_t number_in(const char *path, const char *name) {
  char line[256];
  uint64_t found = 0, value;
  FILE *f = fopen(path, "re");
  while (f && fgets(line, sizeof line, f)) {
    size_t len = strlen(name);
    if (!len && sscanf(line, "%lu", &value) == 1) found = value;
    else if (len && !strncmp(line, name, len) && sscanf(line + len, " %lu", &value) == 1)
      found = value;
  }
  if (f) fclose(f);
  return found;
}

static bool is_full(void) {
  static const char *fixed[] = {"anon", "shmem", "kernel_stack", "pagetables", "slab_unreclaimable"};
  uint64_t limit = number_in(guest_group("memory.max"), ""), used = 0;
  for (size_t i = 0; i < sizeof fixed / sizeof *fixed; i++)
    used += number_in(guest_group("memory.stat"), fixed[i]);
  return limit && used / (limit / 100 + 1) >= FULL_PERCENT;
}

static pid_t largest(void) {
  char line[32], path[64];
  pid_t found = 0;
  uint64_t most = 0;
  FILE *f = fopen(guest_group("cgroup.procs"), "re");
  while (f && fgets(line, sizeof line, f)) {
    snprintf(path, sizeof path, "/proc/%.20s", line);
    path[strcspn(path, "\n")] = 0;
    strcat(path, "/status");
    uint64_t size = number_in(path, "RssAnon:");
    if (size > most) most = size, found = atoi(line);
  }
  if (f) fclose(f);
  return found;
}

static void rearm(void) {
  char text[512];
  if (pread(events, text, sizeof text, 0) < 0) errno = 0;
}

/* The limit was met. */
void memory_event(void) {
  rearm();
  if (!is_full()) return;
  pid_t victim = largest();
  if (victim && !kill(victim, SIGKILL)) kills++;
}

void memory_watch(void) {
  events = open(guest_group("memory.events.local"), O_RDONLY | O_CLOEXEC);
  if (events < 0) return;
  rearm();
  watch(events, &tag, EPOLLPRI);
}

/* In a container the group's own counter, opened outside, where no path of the tenant leads. */
static int counter = -1;

void memory_count_in(int fd) {
  if (counter >= 0) close(counter);
  counter = fd;
}

static uint64_t oom_kills(int fd) {
  char text[16384];
  ssize_t len = pread(fd, text, sizeof text - 1, 0);
  text[len > 0 ? len : 0] = 0;
  for (char *line = text; line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : NULL)
    if (!strncmp(line, "oom_kill ", 9)) return strtoull(line + 9, NULL, 10);
  return 0;
}

/* How many processes of this sandbox were ended for memory so far. */
uint64_t memory_kills(void) {
  if (!settings.guest) return counter >= 0 ? oom_kills(counter) : 0;
  int fd = open("/proc/vmstat", O_RDONLY | O_CLOEXEC);
  if (fd < 0) return kills;
  uint64_t found = oom_kills(fd);
  close(fd);
  return kills + found;
}
