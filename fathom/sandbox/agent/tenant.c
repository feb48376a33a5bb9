/* Turning a process into the tenant: every privilege goes, then the tenant's own limits come. */
#include "agent.h"

#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/landlock.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#ifndef LANDLOCK_ACCESS_FS_TRUNCATE
#define LANDLOCK_ACCESS_FS_TRUNCATE (1ull << 14)
#endif
#ifndef LANDLOCK_ACCESS_FS_REFER
#define LANDLOCK_ACCESS_FS_REFER (1ull << 13)
#endif

Settings settings = {.files = 1024, .oom_score = 500};

void say(int fd, const char *step, int number) {
  char text[512];
  int len = snprintf(text, sizeof text, "%s: %s", step, strerror(number));
  if (write(fd, text, len < (int)sizeof text ? len : (int)sizeof text - 1) < 0) _exit(126);
}

static int confine_paths(void) {
  /* Every right of the first version, and those of later ones that change files. */
  uint64_t all = (1ull << 13) - 1;
  uint64_t reading =
      LANDLOCK_ACCESS_FS_EXECUTE | LANDLOCK_ACCESS_FS_READ_FILE | LANDLOCK_ACCESS_FS_READ_DIR;
  int version = syscall(SYS_landlock_create_ruleset, NULL, 0, LANDLOCK_CREATE_RULESET_VERSION);
  if (version < 1) return -1;
  if (version >= 2) all |= LANDLOCK_ACCESS_FS_REFER;
  if (version >= 3) all |= LANDLOCK_ACCESS_FS_TRUNCATE;
  struct landlock_ruleset_attr attr = {.handled_access_fs = all};
  int rules = syscall(SYS_landlock_create_ruleset, &attr, sizeof attr.handled_access_fs, 0);
  if (rules < 0) return -1;
  for (size_t i = 0; i <= settings.writables; i++) {
    const char *path = i ? settings.writable[i - 1] : "/";
    struct landlock_path_beneath_attr rule = {.allowed_access = i ? all : reading};
    rule.parent_fd = open(path, O_PATH | O_CLOEXEC);
    if (rule.parent_fd < 0) continue; /* what is not there cannot be written to either */
    struct stat s;
    if (!fstat(rule.parent_fd, &s) && !S_ISDIR(s.st_mode))
      rule.allowed_access &= LANDLOCK_ACCESS_FS_EXECUTE | LANDLOCK_ACCESS_FS_READ_FILE |
                             LANDLOCK_ACCESS_FS_WRITE_FILE | LANDLOCK_ACCESS_FS_TRUNCATE;
    rule.allowed_access &= all;
    int failed = syscall(SYS_landlock_add_rule, rules, LANDLOCK_RULE_PATH_BENEATH, &rule, 0);
    close(rule.parent_fd);
    if (failed) return -1;
  }
  int result = syscall(SYS_landlock_restrict_self, rules, 0);
  close(rules);
  return result;
}

/* Whoever made the sandbox takes it along, however it ends. A change of identity clears this. */
int end_with_parent(void) {
  return settings.mortal ? prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) : 0;
}

static void spill(const char *path, const char *text) {
  int fd = open(path, O_WRONLY | O_CLOEXEC);
  if (fd >= 0 && write(fd, text, strlen(text)) < 0) errno = 0;
  if (fd >= 0) close(fd);
}

/* Take the settings of this sandbox, once. Returns what failed, or NULL. */
const char *configure(const uint8_t *data, size_t len, int *number) {
  Fields fields = {data, data + len};
  Field f, filter = {0};
  *number = EINVAL;
  if (settings.done) return "the agent was configured before";
  settings.uid = getuid();
  settings.gid = getgid();
  while (next_field(&fields, &f)) {
    switch (f.tag) {
      case T_UID: settings.uid = number_of(&f); break;
      case T_GID: settings.gid = number_of(&f); break;
      case T_ADDRESS_SPACE: settings.address_space = number_of(&f); break;
      case T_PROCESSES: settings.processes = number_of(&f); break;
      case T_FILES: settings.files = number_of(&f); break;
      case T_CPUS: settings.cpus = number_of(&f); break;
      case T_OOM_SCORE: settings.oom_score = number_of(&f); break;
      case T_GUEST: settings.guest = number_of(&f); break;
      case T_LANDLOCK: settings.landlock = number_of(&f); break;
      case T_FILTER: filter = f; break;
      case T_JOURNAL: journal_limit(number_of(&f)); break;
      case T_MORTAL:
        settings.mortal = number_of(&f);
        if (end_with_parent()) return *number = errno, "to end with the parent";
        break;
      case T_WRITABLE:
        settings.writable = grow(settings.writable, (settings.writables + 1) * sizeof(char *));
        settings.writable[settings.writables++] = text_of(&f);
        break;
    }
  }
  settings.drops = settings.uid != getuid();
  if (settings.guest && settings.processes) {
    char text[32];
    snprintf(text, sizeof text, "%llu", (unsigned long long)settings.processes);
    spill(guest_group("pids.max"), text);
  }
  settings.done = true;
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) return *number = errno, "no_new_privs";
  /* Both hold for the agent as well: whoever took it over would gain nothing. In a guest the agent
   * is root of a machine that is itself the boundary, and the filter is for commands alone. */
  if (settings.landlock && confine_paths()) return *number = errno, "landlock";
  if (filter.len) {
    struct sock_fprog program = {filter.len / 8, (struct sock_filter *)text_of(&filter)};
    if (settings.guest) {
      settings.filter = grow(NULL, sizeof program);
      *settings.filter = program;
      return NULL;
    }
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0))
      return *number = errno, "the system call filter";
    free(program.filter);
  }
  return NULL;
}

static void bound(int kind, uint64_t value) {
  struct rlimit limit = {value, value};
  if (value) setrlimit(kind, &limit);
}

/* Where no control group counts processes, the kernel counts those of the user. */
void limit_processes(void) { bound(RLIMIT_NPROC, settings.processes); }

void restore_signals(void) {
  struct {
    void *handler;
    unsigned long flags;
    void *restorer;
    unsigned long mask;
  } normal = {0};
  /* By the system call itself: the C library refuses to touch the signals that it uses. */
  for (int i = 1; i < 65; i++)
    if (i != SIGKILL && i != SIGSTOP) syscall(SYS_rt_sigaction, i, &normal, NULL, 8);
  uint64_t none = 0;
  syscall(SYS_rt_sigprocmask, SIG_SETMASK, &none, NULL, 8);
}

/* Become the tenant in this process. On failure says why on `error` and ends. */
void become_tenant(int error, const char *cwd) {
  restore_signals();
  umask(022);
  /* In a small guest; elsewhere the host has the groups, and there is no such file. */
  if (settings.guest) spill(guest_group("cgroup.procs"), "0");
  bound(RLIMIT_NOFILE, settings.files);
  bound(RLIMIT_AS, settings.address_space);
  limit_processes();
  /* One byte, not none: with none the kernel still hands the core to a helper of the host. */
  bound(RLIMIT_CORE, 1);
  int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
  if (fd >= 0) {
    /* When memory is short a command shall go, not the agent. */
    dprintf(fd, "%lld", (long long)settings.oom_score);
    close(fd);
  }
  if (settings.cpus) {
    cpu_set_t here, few;
    CPU_ZERO(&few);
    if (!sched_getaffinity(0, sizeof here, &here)) {
      int count = CPU_COUNT(&here), skip = getpid() % (count ? count : 1), left = settings.cpus;
      for (int round = 0; round < 2 && left; round++)
        for (int cpu = 0, seen = 0; cpu < CPU_SETSIZE && left; cpu++)
          if (CPU_ISSET(cpu, &here) && (seen++ >= skip) != round && !CPU_ISSET(cpu, &few))
            CPU_SET(cpu, &few), left--;
      sched_setaffinity(0, sizeof few, &few);
    }
  }
  if (settings.drops) {
    for (int cap = 0; cap < 64 && prctl(PR_CAPBSET_DROP, cap, 0, 0, 0) >= 0; cap++) {
    }
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
    if ((setgroups(0, NULL) && errno != EPERM) ||
        setresgid(settings.gid, settings.gid, settings.gid) ||
        setresuid(settings.uid, settings.uid, settings.uid)) {
      say(error, "become the tenant", errno);
      _exit(126);
    }
    struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct none[2] = {0};
    if (syscall(SYS_capset, &head, none)) {
      say(error, "drop the capabilities", errno);
      _exit(126);
    }
  }
  if (settings.filter && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, settings.filter, 0, 0)) {
    say(error, "install the system call filter", errno);
    _exit(126);
  }
  if (cwd && chdir(cwd)) {
    char step[400];
    snprintf(step, sizeof step, "enter the folder %.300s", cwd);
    say(error, step, errno);
    _exit(126);
  }
}
