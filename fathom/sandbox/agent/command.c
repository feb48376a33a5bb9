/* Commands: a monitor process that adopts all that a command starts, and the command below it.
 *
 * The monitor is a subreaper, so a process that detaches itself from its parents still has the
 * monitor as an ancestor: a timeout finds it there. The monitor ends when the agent closes its
 * socket; what is left then lives on below the agent, until the sandbox stops.
 */
#include "agent.h"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/fsuid.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>

#define NO_PROCESS "no process can be started (%s): raise pids or memory"

enum { PIECE = 65536, MOST_DRAINS = 128, ROUNDS = 400, RETRY_US = 2000 };
/* After its cap an endless output is read slowly: it shall not cost a processor. */
enum { PAUSE_US = 2000, PATIENCE_US = 2000000, CREDIT_STEP = 65536 };

/* What a monitor says: that there is no process for its command yet, which one it is, its end. */
typedef struct {
  int pid, error, status;
  bool waits;
  struct rusage usage;
} Report;

struct Cmd {
  Conn *conn;
  uint32_t id;
  Op *op;
  pid_t monitor, child;
  int status, problem, in, out[2];
  int lacking; /* why there is no process for it, while its monitor waits for one */
  bool pty, eof, detach, held, timed_out, cancelled, killed_all, ended, draining, dead;
  bool gap[2]; /* the line that follows lacks what came before: it gets no more of this stream */
  uint64_t cap, kept[2], total[2], given, credited, mode;
  /* Of standard input: bytes that came so far, and how many of them come once more. */
  uint64_t came, again;
  int64_t began, deadline, patience, grace, grace_us, wait[2];
  uint64_t ooms;
  Buffer input;
  Report report;
  Tag tags[4];
  Cmd *next;
};

static Cmd *commands, *graveyard;

/* Whether nobody takes its output now: the line is full, the host asked for a stop, or what it
 * wrote before is not yet sent again. */
static bool blocked(const Cmd *m) {
  return m->conn && (m->held || m->conn->out.len > OUT_HIGH || (m->op && journal_replaying(m->op)));
}

Cmd *command_find(Conn *c, uint32_t id) {
  for (Cmd *m = commands; m; m = m->next)
    if (m->conn == c && m->id == id && !m->draining) return m;
  return NULL;
}

static void shut(int *fd) {
  if (*fd < 0) return;
  unwatch(*fd);
  close(*fd);
  *fd = -1;
}

/* Let the monitor go. By its own call, not by closing alone: another one that is just beginning may
 * have this end as well. */
static void release(Cmd *m) {
  if (m->status >= 0) shutdown(m->status, SHUT_RDWR);
  shut(&m->status);
}

static void bury(Cmd *m) {
  m->dead = true;
  release(m);
  if (m->problem >= 0) close(m->problem);
  m->problem = -1;
  if (m->pty) m->in = -1;
  shut(&m->in);
  shut(&m->out[0]);
  shut(&m->out[1]);
  for (Cmd **at = &commands; *at; at = &(*at)->next)
    if (*at == m) {
      *at = m->next;
      break;
    }
  m->next = graveyard;
  graveyard = m;
}

void commands_bury(void) {
  while (graveyard) {
    Cmd *m = graveyard;
    graveyard = m->next;
    free(m->input.data);
    free(m);
  }
}

/* Ending everything below a monitor ------------------------------------------------------------ */

typedef struct {
  pid_t pid, parent;
  bool alive, below;
} Seen;

static size_t look(Seen **list) {
  static size_t room;
  size_t count = 0;
  DIR *proc = opendir("/proc");
  struct dirent *entry;
  while (proc && (entry = readdir(proc))) {
    char path[64], text[512];
    if (*entry->d_name < '0' || *entry->d_name > '9') continue;
    snprintf(path, sizeof path, "/proc/%.20s/stat", entry->d_name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) continue;
    ssize_t len = read(fd, text, sizeof text - 1);
    close(fd);
    if (len <= 0) continue;
    text[len] = 0;
    /* The state follows the name, which may itself hold spaces and brackets. */
    char *rest = strrchr(text, ')'), state;
    int parent;
    if (!rest || sscanf(rest + 1, " %c %d", &state, &parent) != 2) continue;
    if (count == room) *list = grow(*list, (room = room * 2 + 64) * sizeof **list);
    (*list)[count++] = (Seen){atoi(entry->d_name), parent, state != 'Z' && state != 'X', false};
  }
  if (proc) closedir(proc);
  return count;
}

/* Kill what lives below `monitor`; how many there were. `below`: and how many with the dead ones. */
static size_t kill_round(pid_t monitor, size_t *below) {
  static Seen *list;
  size_t count = look(&list), found = 0;
  for (bool more = true; more;) {
    more = false;
    for (size_t i = 0; i < count; i++) {
      if (list[i].below) continue;
      bool under = list[i].parent == monitor;
      for (size_t j = 0; !under && j < count; j++)
        under = list[j].below && list[j].pid == list[i].parent;
      if (!under) continue;
      list[i].below = more = true;
      ++*below;
      if (list[i].alive && !kill(list[i].pid, SIGKILL)) found++;
    }
  }
  return found;
}

static void kill_all(void) {
  if (getpid() == 1) {
    /* One call for all processes: the kernel lets none fork its way out. */
    kill(-1, SIGKILL);
    return;
  }
  static Seen *list;
  for (int round = 0; round < ROUNDS; round++) {
    bool found = false;
    size_t count = look(&list);
    for (size_t i = 0; i < count; i++) {
      char path[64];
      struct stat_uid {
        unsigned real;
      } who = {0};
      snprintf(path, sizeof path, "/proc/%d/status", list[i].pid);
      FILE *f = fopen(path, "re");
      char line[256];
      while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "Uid: %u", &who.real) == 1) break;
      if (f) fclose(f);
      if (f && who.real == settings.uid && settings.drops && list[i].alive)
        found |= !kill(list[i].pid, SIGKILL);
    }
    if (!found) return;
    usleep(500);
  }
}

/* False where there never was anything below the monitor. */
static bool end_tree(Cmd *m) {
  size_t below = 0;
  for (int round = 0; round < ROUNDS; round++) {
    if (!kill_round(m->monitor, &below)) return below;
    usleep(500);
  }
  m->killed_all = true;
  kill_all();
  return true;
}

/* Starting ------------------------------------------------------------------------------------- */

typedef struct {
  char **args, **env, *cwd, *builtin;
  size_t argc, envc;
  uint64_t flags, rows, cols;
} Wanted;

static void run_program(const Wanted *w) {
  static const char *shells[] = {"/usr/bin/bash", "/bin/bash", "/usr/bin/sh", "/bin/sh", NULL};
  if (w->flags & X_SHELL) {
    for (const char **shell = shells; *shell; shell++)
      execve(*shell, (char *[]){(char *)*shell, "-c", w->args[0], NULL}, w->env);
    dprintf(2, "%s: no shell in this image\n", shells[0]);
    _exit(127);
  }
  const char *name = w->args[0], *path = "/usr/local/bin:/usr/bin:/bin";
  for (char **e = w->env; *e; e++)
    if (!strncmp(*e, "PATH=", 5)) path = *e + 5;
  int problem = ENOENT;
  char file[4096];
  for (const char *at = path; at; at = strchr(at, ':') ? strchr(at, ':') + 1 : NULL) {
    int len = strcspn(at, ":");
    if (strchr(name, '/'))
      snprintf(file, sizeof file, "%s", name);
    else
      snprintf(file, sizeof file, "%.*s/%s", len, at, name);
    execve(file, w->args, w->env);
    if (errno == ENOEXEC) {
      char **args = grow(NULL, (w->argc + 2) * sizeof(char *));
      args[0] = "/bin/sh";
      args[1] = file;
      memcpy(args + 2, w->args + 1, w->argc * sizeof(char *));
      execve(args[0], args, w->env);
    }
    if (errno != ENOENT && errno != ENOTDIR) problem = errno;
    if (strchr(name, '/')) break;
  }
  dprintf(2, "%.1000s: %s\n", name, problem == ENOENT ? "command not found" : strerror(problem));
  _exit(problem == ENOENT ? 127 : 126);
}

static void be_command(const Wanted *w, int in, int out, int err, int problem, uint64_t mode) {
  setsid();
  if (w->flags & X_PTY) ioctl(in, TIOCSCTTY, 0);
  if (dup2(in, 0) < 0 || dup2(out, 1) < 0 || dup2(err, 2) < 0) _exit(126);
  /* Higher than any other, so that one call closes all the rest. */
  int kept = fcntl(problem, F_DUPFD_CLOEXEC, 3);
  if (kept > 3) syscall(SYS_close_range, 3, kept - 1, 0);
  syscall(SYS_close_range, kept + 1, ~0u, 0);
  if (w->builtin && settings.guest && !strcmp(w->builtin, "archive")) {
    /* Not as the tenant: what was written also holds files that only root can read. */
    int failed = write_archive(GUEST_FOLDER "/writes/upper", strtoull(*w->args, NULL, 10));
    if (failed) dprintf(kept, "E%d", failed);
    _exit(failed ? 125 : 0);
  }
  become_tenant(kept, w->cwd);
  if (w->builtin) _exit(run_builtin(w->builtin, w->args, kept, mode));
  run_program(w);
}

/* Whether it may work later: a limit was hit, and what counts under it comes and goes. */
static bool lacks_room(int failed) {
  return failed == EAGAIN || failed == ENOMEM || failed == EMFILE || failed == ENFILE;
}

static void be_monitor(const Wanted *w, int status, int in, int out, int err, int problem,
                       uint64_t mode) {
  Report report = {0};
  prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
  signal(SIGCHLD, SIG_DFL);
  limit_processes();
  int64_t patience = now_us() + START_PATIENCE_US;
  bool told = true;
  while ((report.pid = fork()) < 0 && lacks_room(errno) && now_us() < patience) {
    report.error = errno;
    if (!report.waits) report.waits = true, told = write(status, &report, sizeof report) > 0;
    if (!told) _exit(1);
    usleep(RETRY_US);
  }
  report.waits = false;
  if (report.pid == 0) be_command(w, in, out, err, problem, mode);
  report.error = report.pid < 0 ? errno : 0;
  int kept = fcntl(status, F_DUPFD_CLOEXEC, 3);
  if (kept > 3) syscall(SYS_close_range, 3, kept - 1, 0);
  syscall(SYS_close_range, kept + 1, ~0u, 0);
  close(0), close(1), close(2);
  if (write(kept, &report, sizeof report) != sizeof report || report.error) _exit(1);
  pid_t seen;
  while ((seen = wait4(-1, &report.status, 0, &report.usage)) != report.pid)
    if (seen < 0 && errno != EINTR) _exit(1);
  if (write(kept, &report, sizeof report) != sizeof report) _exit(1);
  /* What is below us stays ours until the agent has decided about it. */
  char byte;
  while (read(kept, &byte, 1) < 0 && errno == EINTR) {
  }
  _exit(0);
}

static void free_list(char **list, size_t count) {
  for (size_t i = 0; i < count; i++) free(list[i]);
  free(list);
}

static void push(char ***list, size_t *count, char *text) {
  *list = grow(*list, (*count + 2) * sizeof(char *));
  (*list)[(*count)++] = text;
  (*list)[*count] = NULL;
}

static int open_streams(Cmd *m, const Wanted *w, int ends[3]) {
  int pair[2];
  ends[0] = ends[1] = ends[2] = -1;
  if (w->flags & X_LINE) {
    ends[0] = ends[1] = fcntl(m->conn->fd, F_DUPFD_CLOEXEC, 3);
    if (ends[0] < 0 || fcntl(ends[0], F_SETFL, 0)) return errno;
    ends[2] = open("/dev/null", O_WRONLY | O_CLOEXEC);
    return ends[2] < 0 ? errno : 0;
  }
  if (m->pty) {
    int master = open("/dev/ptmx", O_RDWR | O_CLOEXEC | O_NOCTTY | O_NONBLOCK), zero = 0;
    if (master < 0 || ioctl(master, TIOCSPTLCK, &zero)) return errno;
    m->in = m->out[0] = master;
    struct winsize size = {w->rows ? w->rows : 24, w->cols ? w->cols : 80, 0, 0};
    ioctl(master, TIOCSWINSZ, &size);
    ends[0] = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (ends[0] < 0) return errno;
    ends[1] = ends[2] = ends[0];
    return 0;
  }
  if (w->flags & X_STDIN) {
    if (pipe2(pair, O_CLOEXEC)) return errno;
    ends[0] = pair[0];
    m->in = pair[1];
    fcntl(m->in, F_SETFL, O_NONBLOCK);
  } else if ((ends[0] = open("/dev/null", O_RDONLY | O_CLOEXEC)) < 0) {
    return errno;
  }
  for (int i = 0; i < (w->flags & X_MERGE ? 1 : 2); i++) {
    if (pipe2(pair, O_CLOEXEC)) return errno;
    m->out[i] = pair[0];
    ends[1 + i] = pair[1];
    fcntl(pair[0], F_SETFL, O_NONBLOCK);
  }
  if (w->flags & X_MERGE) ends[2] = ends[1];
  return 0;
}

static int launch(Cmd *m, const Wanted *w) {
  int ends[3], pair[2] = {-1, -1}, problem[2] = {-1, -1}, failed = 0;
  /* The pipes belong to the tenant, so that it can open /dev/stdin and /dev/stdout. */
  setfsuid(settings.uid);
  setfsgid(settings.gid);
  failed = open_streams(m, w, ends);
  setfsuid(getuid());
  setfsgid(getgid());
  end_with_parent();
  if (!failed && pipe2(problem, O_CLOEXEC)) failed = errno;
  if (!failed && socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair)) failed = errno;
  if (!failed) {
    m->monitor = fork();
    if (m->monitor == 0) be_monitor(w, pair[1], ends[0], ends[1], ends[2], problem[1], m->mode);
    if (m->monitor < 0) failed = errno;
  }
  if (pair[1] >= 0) close(pair[1]);
  if (problem[1] >= 0) close(problem[1]);
  if (ends[0] >= 0) close(ends[0]);
  if (ends[1] >= 0 && ends[1] != ends[0]) close(ends[1]);
  if (ends[2] >= 0 && ends[2] != ends[1]) close(ends[2]);
  m->status = pair[0];
  m->problem = problem[0];
  return failed;
}

static void register_streams(Cmd *m) {
  for (int i = 0; i < 4; i++) m->tags[i] = (Tag){K_STATUS + i, m};
  fcntl(m->status, F_SETFL, O_NONBLOCK);
  fcntl(m->problem, F_SETFL, O_NONBLOCK);
  watch(m->status, &m->tags[0], EPOLLIN);
  for (int i = 0; i < 2; i++)
    if (m->out[i] >= 0) watch(m->out[i], &m->tags[2 + i], EPOLLIN);
}

static void grant(Cmd *m) {
  Buffer b = {0};
  put_number(&b, T_CAP, m->given);
  send_frame(m->conn, m->id, M_CREDIT, b.data, b.len);
  free(b.data);
  m->credited = m->given;
}

/* Let another line have the rest of a command. It sends the input from its beginning again. */
static void follow(Cmd *m, Conn *c, uint32_t id) {
  if (m->conn) journal_quit(m->conn, m->op);
  if (m->conn) send_error(m->conn, m->id, "op_moved", 0, "another line follows this operation now");
  m->conn = c;
  m->id = id;
  m->held = false;
  m->again = m->came;
  for (int i = 0; i < 2; i++) m->gap[i] = m->op->kept[i] < m->kept[i];
  if (m->given) grant(m);
}

/* Take up an operation that was asked for before. True when it is known. */
static bool resume_op(Conn *c, uint32_t id, const char *key, const char *digest) {
  Op *op = journal_find(key);
  if (!op) return false;
  if (strcmp(op->digest, digest)) {
    send_error(c, id, "op_conflict", 0, "this operation key belongs to another request");
  } else if (op->state == OP_LOST) {
    send_error(c, id, "op_lost", 0, "the agent ended while this operation ran");
  } else {
    for (Cmd *m = commands; m; m = m->next)
      if (m->op == op && !m->draining) follow(m, c, id);
    journal_replay(op, c, id);
  }
  return true;
}

int64_t timeout_of(const uint8_t *data, size_t len) {
  Fields fields = {data, data + len};
  Field f;
  int64_t timeout = 0;
  while (next_field(&fields, &f))
    if (f.tag == T_TIMEOUT_US) timeout = number_of(&f);
  return timeout;
}

void command_refuse(Conn *c, uint32_t id, int failed) {
  char text[256];
  snprintf(text, sizeof text, NO_PROCESS, strerror(failed));
  send_error(c, id, "no_process", failed, text);
}

/* Whether there is one whose monitor has not said yet that it runs. */
bool command_beginning(void) {
  for (Cmd *m = commands; m; m = m->next)
    if (m->status >= 0 && !m->child) return true;
  return false;
}

/* Why there is no process for the one that is beginning; 0 where nothing hinders it. */
int command_lacking(void) {
  for (Cmd *m = commands; m; m = m->next)
    if (m->status >= 0 && !m->child) return m->lacking;
  return 0;
}

/* Start a command, or answer why not. Where there is no room for it nothing is done, and the reason
 * returned; it is not even tried without `turn`, which -1 says. */
int command_start(Conn *c, uint32_t id, const uint8_t *data, size_t len, int64_t deadline, bool turn) {
  Wanted w = {0};
  char *key = NULL, *digest = NULL;
  Cmd *m = grow(NULL, sizeof *m);
  *m = (Cmd){.conn = c, .id = id, .status = -1, .problem = -1, .in = -1, .out = {-1, -1}};
  m->cap = 1 << 20;
  m->grace_us = 50000;
  Fields fields = {data, data + len};
  Field f;
  while (next_field(&fields, &f)) {
    switch (f.tag) {
      case T_ARG: push(&w.args, &w.argc, text_of(&f)); break;
      case T_ENV: push(&w.env, &w.envc, text_of(&f)); break;
      case T_CWD: free(w.cwd), w.cwd = text_of(&f); break;
      case T_BUILTIN: free(w.builtin), w.builtin = text_of(&f); break;
      case T_OP: free(key), key = text_of(&f); break;
      case T_DIGEST: free(digest), digest = text_of(&f); break;
      case T_CAP: m->cap = number_of(&f); break;
      case T_GRACE_US: m->grace_us = number_of(&f); break;
      case T_FLAGS: w.flags = number_of(&f); break;
      case T_ROWS: w.rows = number_of(&f); break;
      case T_COLS: w.cols = number_of(&f); break;
      case T_WRITE_MODE: m->mode = number_of(&f); break;
    }
  }
  if (!w.env) w.env = grow(NULL, sizeof(char *)), w.env[0] = NULL;
  const char *problem = NULL, *full = NULL;
  int failed = 0;
  bool resumed = false, waits = false;
  if (command_find(c, id))
    problem = "this number is in use";
  else if (!w.argc || timeout_of(data, len) <= 0)
    problem = "a command needs arguments and a timeout";
  else if (!settings.done)
    problem = "the agent is not configured";
  else if (w.flags & X_LINE && (c->serial || key || w.flags & X_PTY))
    problem = "this line cannot become the command's own";
  else if (key && resume_op(c, id, key, digest ? digest : ""))
    resumed = true;
  else if (!turn)
    waits = true, failed = -1;
  if (!problem && !resumed && !waits) {
    m->pty = w.flags & X_PTY;
    m->detach = key || w.flags & X_DETACH;
    m->began = now_us();
    m->deadline = deadline;
    m->ooms = memory_kills();
    if (w.flags & X_LINE) {
      /* The last frame on this line: whatever follows it is the command's. */
      Buffer none = {0};
      put_number(&none, T_PID, 0);
      send_frame(c, id, M_STARTED, none.data, none.len);
      free(none.data);
      if (!send_rest(c)) failed = EAGAIN;
    }
    /* First the word that it begins: what has no receipt must not have an effect. */
    if (key && !(m->op = journal_start(key, digest ? digest : "")))
      full = "no room is left for this operation's receipt: acknowledge those whose results are safe";
    else if (!failed)
      failed = launch(m, &w);
    if (w.flags & X_LINE) {
      m->conn = NULL;
      m->detach = true;
      let_go(c);
    }
    if (failed && m->op) journal_forget(m->op), m->op = NULL;
    waits = lacks_room(failed);
  }
  if (full) send_error(c, id, "journal_full", ENOSPC, full);
  if (problem) send_error(c, id, "bad_request", 0, problem);
  if (failed && !waits) command_refuse(c, id, failed);
  m->next = commands;
  commands = m;
  if (problem || failed || resumed || full) {
    bury(m);
  } else {
    register_streams(m);
    queue_progress();
  }
  free_list(w.args, w.argc);
  free_list(w.env, w.envc);
  free(w.cwd);
  free(w.builtin);
  free(key);
  free(digest);
  return waits ? failed : 0;
}

/* While it runs -------------------------------------------------------------------------------- */

static void feed(Cmd *m) {
  while (m->in >= 0 && m->input.len) {
    ssize_t done = write(m->in, m->input.data, m->input.len);
    if (done < 0) {
      if (errno == EAGAIN) {
        if (!m->pty) watch(m->in, &m->tags[1], EPOLLOUT);
        return;
      }
      /* Nobody reads any more; what else arrives is counted as taken. */
      m->given += m->input.len;
      m->input.len = 0;
      if (!m->pty) shut(&m->in);
      break;
    }
    m->given += done;
    drop(&m->input, done);
  }
  if (m->conn && (m->given - m->credited >= CREDIT_STEP || (!m->input.len && m->given > m->credited)))
    grant(m);
  if (m->in >= 0 && !m->pty) {
    if (m->eof && !m->input.len) shut(&m->in);
    else unwatch(m->in);
  }
}

void command_stdin(Cmd *m, const uint8_t *data, size_t len) {
  size_t known = m->again < len ? (size_t)m->again : len;
  m->again -= known;
  data += known;
  len -= known;
  if (!len) return;
  m->came += len;
  if (m->eof || m->input.len + len > STDIN_LIMIT) return command_cancel(m);
  if (m->in < 0) m->given += len;
  else add(&m->input, data, len);
  feed(m);
}

void command_eof(Cmd *m) {
  if (m->pty && !m->eof) {
    uint8_t end_of_input = 4;
    add(&m->input, &end_of_input, 1);
  }
  m->eof = true;
  feed(m);
}

int command_signal(Cmd *m, int number) {
  if (!m->child || m->ended) return ESRCH;
  return kill(-m->child, number) && kill(m->child, number) ? errno : 0;
}

int command_resize(Cmd *m, unsigned rows, unsigned cols) {
  struct winsize size = {rows, cols, 0, 0};
  return m->pty && m->out[0] >= 0 ? (ioctl(m->out[0], TIOCSWINSZ, &size) ? errno : 0) : ENOTTY;
}

static bool take_report(Cmd *m);
static void settle(Cmd *m);

/* End one whose monitor has not said yet that it runs. Stopped, the monitor starts nothing any more:
 * what it has said and what is below it tell whether the command ever began. */
static void stop_monitor(Cmd *m) {
  kill(m->monitor, SIGSTOP);
  while (m->status >= 0 && !m->child && take_report(m)) {
  }
  if (m->status < 0) return;
  if (m->child) {
    kill(m->monitor, SIGCONT);
    return;
  }
  if (!end_tree(m)) m->report.error = m->lacking;
  kill(m->monitor, SIGKILL);
  release(m);
  settle(m);
}

static void stop_command(Cmd *m) {
  if (m->patience || m->ended) return;
  m->patience = now_us() + PATIENCE_US;
  if (m->child) end_tree(m);
  else stop_monitor(m);
}

void command_cancel(Cmd *m) {
  m->cancelled = true;
  stop_command(m);
}

void command_hold(Cmd *m, bool on) { m->held = on; }

/* Nobody waits for it any more: it ends, unless it was to outlive its line. */
void command_leave(Cmd *m) {
  m->conn = NULL;
  m->held = false;
  if (!m->detach && !m->draining) command_cancel(m);
}

void command_orphan(Conn *c) {
  for (Cmd *m = commands, *next; m; m = next) {
    next = m->next;
    if (m->conn == c) command_leave(m);
  }
}

/* Nobody is told of them any more; they run on, with their timeouts. */
void command_disown(Conn *c) {
  for (Cmd *m = commands; m; m = m->next)
    if (m->conn == c) m->conn = NULL, m->held = false;
}

static void finish(Cmd *m) {
  Buffer b = {0};
  int status = m->report.status;
  bool lost = !m->ended || !m->report.pid;
  char problem[512];
  ssize_t said = m->problem >= 0 ? read(m->problem, problem, sizeof problem) : 0;
  put_number(&b, T_EXIT, lost ? 137 : WIFEXITED(status) ? WEXITSTATUS(status)
                                                        : 128 + WTERMSIG(status));
  if (m->report.error) {
    said = snprintf(problem, sizeof problem, NO_PROCESS, strerror(m->report.error));
  }
  if (said > 0) put(&b, T_PROBLEM, problem, said);
  put_number(&b, T_TIMED_OUT, m->timed_out);
  put_number(&b, T_CANCELLED, m->cancelled);
  put_number(&b, T_KILLED_ALL, m->killed_all);
  put_number(&b, T_DURATION_US, now_us() - m->began);
  put_number(&b, T_STDOUT_TOTAL, m->total[0]);
  put_number(&b, T_STDERR_TOTAL, m->total[1]);
  put_number(&b, T_STDOUT_KEPT, m->kept[0]);
  put_number(&b, T_STDERR_KEPT, m->kept[1]);
  put_number(&b, T_USER_US,
             m->report.usage.ru_utime.tv_sec * 1000000ll + m->report.usage.ru_utime.tv_usec);
  put_number(&b, T_SYSTEM_US,
             m->report.usage.ru_stime.tv_sec * 1000000ll + m->report.usage.ru_stime.tv_usec);
  put_number(&b, T_MAX_RSS_KB, m->report.usage.ru_maxrss);
  put_number(&b, T_OOM_KILLED, memory_kills() > m->ooms);
  /* A line that is still told what came before is told the end by the journal, after that. */
  if (m->op && m->report.error) {
    /* It never began: it may be asked for again. */
    if (m->conn) journal_quit(m->conn, m->op);
    journal_forget(m->op);
    m->op = NULL;
  }
  bool told = m->op && m->conn && journal_replaying(m->op);
  if (m->op) journal_finish(m->op, &b);
  if (!told) send_frame(m->conn, m->id, M_EXIT, b.data, b.len);
  free(b.data);
  if (!m->report.error) queue_progress();
  m->conn = NULL;
  m->op = NULL;
  m->draining = true;
  release(m);
  if (m->pty) shut(&m->out[0]), m->in = -1;
  shut(&m->in);
  if (m->out[0] < 0 && m->out[1] < 0) {
    bury(m);
    return;
  }
  /* Background processes still write to these; beyond a number the oldest are closed. */
  size_t drains = 0;
  for (Cmd *at = commands, *next; at; at = next) {
    next = at->next;
    if (at->draining && ++drains > MOST_DRAINS) bury(at);
  }
}

/* Read one piece of output; false when there is nothing now. */
static bool take_output(Cmd *m, int i) {
  static uint8_t piece[PIECE];
  ssize_t len = read(m->out[i], piece, sizeof piece);
  if (len < 0 && (errno == EAGAIN || errno == EINTR)) return false;
  if (len <= 0) {
    if (m->pty) m->in = -1;
    shut(&m->out[i]);
    return false;
  }
  m->total[i] += len;
  uint64_t room = m->draining ? 0 : m->cap - m->kept[i];
  size_t kept = (uint64_t)len < room ? (size_t)len : room;
  if (kept) {
    m->kept[i] += kept;
    uint8_t type = i ? M_STDERR : M_STDOUT;
    if (m->op) journal_output(m->op, type, piece, kept);
    if (!m->gap[i]) send_frame(m->conn, m->id, type, piece, kept);
  }
  if ((size_t)len > kept) m->wait[i] = now_us() + PAUSE_US;
  else if (blocked(m)) m->wait[i] = INT64_MAX;
  if (m->wait[i]) unwatch(m->out[i]);
  return true;
}

static void settle(Cmd *m) {
  if (!m->grace) m->grace = now_us() + m->grace_us;
  if (m->out[0] < 0 && m->out[1] < 0) finish(m);
}

/* False where the monitor has not said anything new. */
static bool take_report(Cmd *m) {
  Report report;
  ssize_t len = read(m->status, &report, sizeof report);
  if (len < 0 && (errno == EAGAIN || errno == EINTR)) return false;
  if (len == sizeof report && report.waits) {
    m->lacking = report.error;
    return true;
  }
  if (len == sizeof report && !m->child && !report.error) {
    m->child = report.pid;
    Buffer b = {0};
    put_number(&b, T_PID, m->child);
    send_frame(m->conn, m->id, M_STARTED, b.data, b.len);
    free(b.data);
    if (m->patience) end_tree(m); /* it was told to end before it began */
    return true;
  }
  if (len == sizeof report) {
    m->report = report;
    m->ended = true;
    if (m->patience) end_tree(m);
  } else if (!m->ended) {
    /* The monitor is gone, and with it the knowledge of what is below it. */
    m->killed_all = true;
    kill_all();
  }
  release(m);
  settle(m);
  return true;
}

void command_event(Tag *tag) {
  Cmd *m = tag->owner;
  if (m->dead) return;
  if (tag->kind == K_STATUS && m->status >= 0) return (void)take_report(m);
  if (tag->kind == K_STDIN) return feed(m);
  int i = tag->kind - K_STDOUT;
  if (m->out[i] < 0 || m->wait[i]) return;
  if (m->op && journal_replaying(m->op)) {
    m->wait[i] = INT64_MAX;
    return unwatch(m->out[i]);
  }
  take_output(m, i);
  if (m->out[0] < 0 && m->out[1] < 0) {
    if (m->draining) bury(m);
    else if (m->grace) finish(m);
  }
}

/* Time ----------------------------------------------------------------------------------------- */

void commands_shift(int64_t micros) {
  for (Cmd *m = commands; m; m = m->next) {
    m->deadline += micros;
    m->began += micros;
    if (m->grace) m->grace += micros;
    if (m->patience) m->patience += micros;
  }
}

static int64_t next_time(const Cmd *m) {
  int64_t when = INT64_MAX;
  if (!m->draining) when = m->grace ? m->grace : m->patience ? m->patience : m->deadline;
  for (int i = 0; i < 2; i++)
    if (m->wait[i] && m->wait[i] < when) when = m->wait[i];
  return when;
}

int64_t commands_wait(int64_t now) {
  int64_t soonest = INT64_MAX;
  for (Cmd *m = commands; m; m = m->next) {
    int64_t when = next_time(m);
    if (when < soonest) soonest = when;
  }
  return soonest == INT64_MAX ? -1 : soonest > now ? soonest - now : 0;
}

static void tick(Cmd *m, int64_t now) {
  bool stuck = blocked(m);
  for (int i = 0; i < 2; i++) {
    if (m->out[i] < 0 || !m->wait[i]) continue;
    if (m->wait[i] == INT64_MAX ? stuck : m->wait[i] > now) continue;
    m->wait[i] = 0;
    watch(m->out[i], &m->tags[2 + i], EPOLLIN);
  }
  if (m->draining) return;
  if (m->grace) {
    /* A host that is slow to read shall not lose output to the grace period. */
    if (stuck) m->grace = now + m->grace_us;
    if (m->grace > now) return;
    for (int i = 0; i < 2; i++)
      for (int n = 0; n < 32 && m->out[i] >= 0 && take_output(m, i); n++) {
      }
    finish(m);
  } else if (m->patience) {
    if (m->patience > now) return;
    kill(m->monitor, SIGKILL);
    release(m);
    settle(m);
  } else if (m->deadline <= now) {
    m->timed_out = true;
    stop_command(m);
  }
}

void commands_tick(int64_t now) {
  for (Cmd *m = commands, *next; m; m = next) {
    next = m->next;
    tick(m, now);
  }
}
