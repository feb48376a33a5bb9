/* The first process of a sandbox: it answers the host, runs commands as the tenant, keeps receipts.
 *
 *   fathom-agent --listen-fd 0 --journal-fd 1      a container: both were opened outside of it
 *   fathom-agent --serial /dev/virtio-ports/agent --journal /run/fathom/journal
 *   fathom-agent --vsock 5005 --journal PATH       a virtual machine
 *   /init                                          the same, as the initramfs's first process
 *   fathom-agent --port 1                          as a service of a full system
 *
 * The first HELLO sets the secret of the session; nothing of the tenant runs before it.
 */
#include "agent.h"

#include <fcntl.h>
#include <linux/random.h>
#include <poll.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <linux/vm_sockets.h>

enum { MOST_STRANGERS = 32, EVENTS = 64, SERIAL_RETRY_US = 50000 };

static int poller = -1;
static uint8_t secret[SECRET_LIMIT], epoch[EPOCH_SIZE];
static size_t secret_len;
static Conn *conns;

void watch(int fd, Tag *tag, uint32_t events) {
  struct epoll_event e = {.events = events, .data.ptr = tag};
  if (epoll_ctl(poller, EPOLL_CTL_ADD, fd, &e) && errno == EEXIST)
    epoll_ctl(poller, EPOLL_CTL_MOD, fd, &e);
}

void unwatch(int fd) { epoll_ctl(poller, EPOLL_CTL_DEL, fd, NULL); }

static Conn *add_conn(int fd, bool serial) {
  Conn *c = grow(NULL, sizeof *c);
  *c = (Conn){.tag = {K_CONN, c}, .fd = fd, .serial = serial, .given = {-1, -1}, .next = conns};
  conns = c;
  watch(fd, &c->tag, EPOLLIN);
  return c;
}

static void drop_given(Conn *c) {
  for (int i = 0; i < MOST_GIVEN; i++) {
    if (c->given[i] >= 0) close(c->given[i]);
    c->given[i] = -1;
  }
}

/* A line that is gone; the port of a virtual machine stays and waits for the next host. */
static void lose(Conn *c) {
  command_orphan(c);
  queue_quit(c);
  journal_quit(c, NULL);
  drop_given(c);
  c->known = false;
  free(c->in.data);
  free(c->out.data);
  c->in = c->out = (Buffer){0};
  unwatch(c->fd);
  if (!c->serial) c->closing = true;
}

static void sweep(void) {
  for (Conn **at = &conns; *at;) {
    Conn *c = *at;
    if (!c->closing) {
      at = &c->next;
      continue;
    }
    *at = c->next;
    close(c->fd);
    free(c);
  }
}

static void flush(Conn *c) {
  while (c->out.len && !c->closing) {
    ssize_t done = write(c->fd, c->out.data, c->out.len);
    if (done < 0 && errno == EAGAIN) break;
    if (done < 0 && errno == EINTR) continue;
    if (done <= 0) return lose(c);
    drop(&c->out, done);
  }
  if (!c->closing && (!c->serial || c->known))
    watch(c->fd, &c->tag, c->out.len ? EPOLLIN | EPOLLOUT : EPOLLIN);
}

/* Send what waits now; false where the line does not take all of it. */
bool send_rest(Conn *c) {
  if (c->out.len) flush(c);
  return !c->closing && !c->out.len;
}

/* Somebody else has this line from here on. */
void let_go(Conn *c) {
  unwatch(c->fd);
  c->closing = true;
}

/* Requests ------------------------------------------------------------------------------------- */

static bool same(const uint8_t *a, const uint8_t *b, size_t len) {
  uint8_t difference = 0;
  for (size_t i = 0; i < len; i++) difference |= a[i] ^ b[i];
  return !difference;
}

/* What may come along is kept open and never used here. The folder of this sandbox's writes is for the
 * next node, which finds it in /proc; its mount has nothing above it, so that it leads nowhere else.
 * The locked file keeps the image for as long as this process lives, whatever nodes there are; it can
 * only be read. Commands inherit neither. */
static void keep_given(Conn *c) {
  for (int i = 0; i < MOST_GIVEN; i++)
    if (c->given[i] >= 0) dup3(c->given[i], KEPT_FILE + i, O_CLOEXEC);
  drop_given(c);
}

static void hello(Conn *c, uint32_t id, const uint8_t *data, size_t len) {
  Fields fields = {data, data + len};
  Field f, given = {0};
  uint64_t version = 0;
  while (next_field(&fields, &f)) {
    if (f.tag == T_SECRET) given = f;
    if (f.tag == T_VERSION) version = number_of(&f);
  }
  if (version != PROTOCOL)
    return send_error(c, id, "version", 0, "this agent speaks another version of the protocol");
  if (given.len < 16 || given.len > SECRET_LIMIT)
    return send_error(c, id, "auth", 0, "the secret must have 16 to 64 bytes");
  if (!secret_len) {
    memcpy(secret, given.data, given.len);
    secret_len = given.len;
  } else if (given.len != secret_len || !same(given.data, secret, secret_len)) {
    return send_error(c, id, "auth", 0, "wrong secret");
  }
  /* On a port that nobody closed: this machine is a copy, whose commands' owners are with its
   * origin. The commands go on. */
  if (c->serial && c->known) command_disown(c), queue_quit(c), journal_quit(c, NULL);
  c->known = true;
  if (!settings.done) keep_given(c);
  Buffer b = {0};
  put_number(&b, T_VERSION, PROTOCOL);
  put(&b, T_EPOCH, epoch, sizeof epoch);
  put_number(&b, T_PID, getpid());
  put_number(&b, T_STATE, settings.done);
  send_frame(c, id, M_OK, b.data, b.len);
  free(b.data);
}

/* In a container the clock is the host's. */
static int set_clock(uint64_t us) {
  struct timespec t = {us / 1000000, us % 1000000 * 1000};
  return settings.guest ? clock_settime(CLOCK_REALTIME, &t) : 0;
}

/* A copy of a sandbox must not share its origin's secrets, randomness, name or clock. */
static void rekey(Conn *c, uint32_t id, const uint8_t *data, size_t len) {
  Fields fields = {data, data + len};
  Field f;
  int failed = 0;
  while (next_field(&fields, &f)) {
    if (f.tag == T_SECRET && f.len >= 16 && f.len <= SECRET_LIMIT) {
      memcpy(secret, f.data, f.len);
      secret_len = f.len;
    } else if (f.tag == T_ENTROPY) {
      struct {
        struct rand_pool_info info;
        uint8_t bytes[256];
      } pool = {0};
      size_t size = f.len < sizeof pool.bytes ? f.len : sizeof pool.bytes;
      int fd = open("/dev/random", O_RDWR | O_CLOEXEC);
      pool.info.entropy_count = size * 8;
      pool.info.buf_size = size;
      memcpy(pool.info.buf, f.data, size);
      /* In a container the kernel's pool is the host's: nothing to do, and no right to do it. */
      if (settings.guest && (fd < 0 || ioctl(fd, RNDADDENTROPY, &pool))) failed = errno;
      if (settings.guest && fd >= 0) ioctl(fd, RNDRESEEDCRNG, 0);
      if (fd >= 0) close(fd);
    } else if (f.tag == T_HOSTNAME && settings.guest) {
      if (sethostname((const char *)f.data, f.len)) failed = errno;
    } else if (f.tag == T_CLOCK_US) {
      if (set_clock(number_of(&f))) failed = errno;
    }
  }
  if (getrandom(epoch, sizeof epoch, 0) != sizeof epoch) failed = errno;
  if (failed) return send_error(c, id, "rekey", failed, strerror(failed));
  Buffer b = {0};
  put(&b, T_EPOCH, epoch, sizeof epoch);
  send_frame(c, id, M_OK, b.data, b.len);
  free(b.data);
}

static void receipt(Conn *c, uint32_t id, uint8_t type, const uint8_t *data, size_t len) {
  Fields fields = {data, data + len};
  Field f;
  if (!next_field(&fields, &f) || f.tag != T_OP)
    return send_error(c, id, "bad_request", 0, "name an operation");
  char *key = text_of(&f);
  Op *op = journal_find(key);
  free(key);
  if (type == M_ACK && op) journal_ack(op);
  Buffer b = {0};
  put_text(&b, T_STATE, journal_state(op));
  put(&b, T_EPOCH, epoch, sizeof epoch);
  if (op) put_text(&b, T_DIGEST, op->digest);
  send_frame(c, id, M_OK, b.data, b.len);
  free(b.data);
}

static void answer(Conn *c, uint32_t id, int failed) {
  if (failed) send_error(c, id, "failed", failed, strerror(failed));
}

void request(Conn *c, uint32_t id, uint8_t type, const uint8_t *data, size_t len) {
  Fields fields = {data, data + len};
  Field f, second;
  Cmd *cmd = command_find(c, id);
  int number = 0;
  const char *problem;
  switch (type) {
    case M_HELLO: return hello(c, id, data, len);
    case M_EXEC: return queue_exec(c, id, data, len);
    case M_QUERY:
    case M_ACK: return receipt(c, id, type, data, len);
    case M_REKEY: return rekey(c, id, data, len);
    case M_PING: return send_frame(c, id, M_OK, data, len);
    case M_CONFIGURE:
      problem = configure(data, len, &number);
      if (problem) return send_error(c, id, "configure", number, problem);
      if (settings.guest) memory_watch();
      if (c->given[0] >= 0) memory_count_in(c->given[0]), c->given[0] = -1;
      drop_given(c);
      return send_frame(c, id, M_OK, NULL, 0);
    case M_SHIFT:
      while (next_field(&fields, &f)) {
        if (f.tag == T_MICROS) commands_shift(number_of(&f)), queue_shift(number_of(&f));
        if (f.tag == T_CLOCK_US && set_clock(number_of(&f))) return answer(c, id, errno);
      }
      return send_frame(c, id, M_OK, NULL, 0);
    case M_NETWORK:
      if (!settings.guest) return answer(c, id, ENOTSUP);
      number = guest_network(next_field(&fields, &f) && number_of(&f));
      return number ? answer(c, id, number) : send_frame(c, id, M_OK, NULL, 0);
  }
  /* The rest is about a command. */
  if (!cmd) return queue_frame(c, id, type, data, len);
  switch (type) {
    case M_STDIN: return command_stdin(cmd, data, len);
    case M_EOF: return command_eof(cmd);
    case M_CANCEL: return command_cancel(cmd);
    case M_LEAVE: return command_leave(cmd);
    case M_HOLD: return command_hold(cmd, next_field(&fields, &f) && number_of(&f));
    case M_SIGNAL:
      if (next_field(&fields, &f)) answer(c, id, command_signal(cmd, number_of(&f)));
      return;
    case M_RESIZE:
      if (next_field(&fields, &f) && next_field(&fields, &second))
        answer(c, id, command_resize(cmd, number_of(&f), number_of(&second)));
      return;
  }
}

/* Take whole frames out of what arrived. False when the line carries something else. */
static bool parse(Conn *c) {
  size_t at = 0;
  while (c->in.len - at >= HEADER && !c->closing) {
    const uint8_t *h = c->in.data + at;
    uint32_t len = h[0] | h[1] << 8 | h[2] << 16 | (uint32_t)h[3] << 24;
    uint32_t id = h[4] | h[5] << 8 | h[6] << 16 | (uint32_t)h[7] << 24;
    bool sound = (h[10] | h[11] << 8) == MAGIC && h[9] == PROTOCOL;
    if (!c->known && sound) sound = h[8] == M_HELLO && len <= STRANGER_LIMIT;
    if (!sound || len > FRAME_LIMIT) {
      /* On a port, what a former host had half sent comes first: look for the next HELLO. */
      if (!c->serial || c->known) return false;
      at++;
      continue;
    }
    if (c->in.len - at < HEADER + len) break;
    request(c, id, h[8], h + HEADER, len);
    at += HEADER + len;
    if (!c->in.data) return true;
  }
  drop(&c->in, at);
  return true;
}

static void take_given(Conn *c, int fd) {
  for (int i = 0; i < MOST_GIVEN; i++)
    if (c->given[i] < 0) {
      c->given[i] = fd;
      return;
    }
  close(fd);
}

/* Read from a line; the first open files that come along are kept. */
static ssize_t read_line(Conn *c, void *piece, size_t size) {
  if (c->serial) return read(c->fd, piece, size);
  union {
    char data[CMSG_SPACE(4 * sizeof(int))];
    struct cmsghdr head;
  } along;
  struct iovec part = {piece, size};
  struct msghdr m = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &along,
                     .msg_controllen = sizeof along};
  ssize_t len = recvmsg(c->fd, &m, MSG_CMSG_CLOEXEC);
  for (struct cmsghdr *h = len < 0 ? NULL : CMSG_FIRSTHDR(&m); h; h = CMSG_NXTHDR(&m, h)) {
    if (h->cmsg_level != SOL_SOCKET || h->cmsg_type != SCM_RIGHTS) continue;
    for (size_t i = 0; i < (h->cmsg_len - CMSG_LEN(0)) / sizeof(int); i++) {
      int fd;
      memcpy(&fd, CMSG_DATA(h) + i * sizeof fd, sizeof fd);
      take_given(c, fd);
    }
  }
  return len;
}

static void receive(Conn *c) {
  static uint8_t piece[65536];
  ssize_t len = read_line(c, piece, sizeof piece);
  if (len < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (len <= 0) return lose(c);
  add(&c->in, piece, len);
  if (!parse(c)) lose(c);
}

/* Lines ---------------------------------------------------------------------------------------- */

static void welcome(int listener) {
  int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
  if (fd < 0) return;
  /* The request is usually there already: one round of waiting less. */
  receive(add_conn(fd, false));
  /* Of too many that say nothing the oldest goes, which had the most time. Those that have gone
   * already do not count: a crowd that is served ends its lines together. */
  int strangers = 0;
  Conn *oldest = NULL;
  for (Conn *c = conns; c; c = c->next)
    if (!c->known && !c->serial && !c->closing) strangers++, oldest = c;
  if (strangers > MOST_STRANGERS) lose(oldest);
}

/* A port without a host reports a hang-up all the time: look again now and then. */
static void revive_ports(void) {
  for (Conn *c = conns; c; c = c->next) {
    if (!c->serial || c->known) continue;
    struct pollfd p = {c->fd, POLLIN, 0};
    if (poll(&p, 1, 0) >= 0 && !(p.revents & POLLHUP)) watch(c->fd, &c->tag, EPOLLIN);
  }
}

static bool has_port(void) {
  for (Conn *c = conns; c; c = c->next)
    if (c->serial && !c->known) return true;
  return false;
}

static void serve(void) {
  struct epoll_event events[EVENTS];
  for (;;) {
    bool more = journal_pump();
    for (Conn *c = conns; c; c = c->next)
      if (c->out.len) flush(c);
    commands_bury();
    sweep();
    int64_t wait = more ? 0 : commands_wait(now_us());
    if (queue_wait() >= 0 && (wait < 0 || wait > queue_wait())) wait = queue_wait();
    if (has_port() && (wait < 0 || wait > SERIAL_RETRY_US)) wait = SERIAL_RETRY_US;
    int count = epoll_wait(poller, events, EVENTS, wait < 0 ? -1 : (int)((wait + 999) / 1000));
    for (int i = 0; i < count; i++) {
      Tag *tag = events[i].data.ptr;
      if (tag->kind == K_LISTEN) {
        welcome(*(int *)tag->owner);
      } else if (tag->kind == K_MEMORY) {
        memory_event();
      } else if (tag->kind == K_CONN) {
        Conn *c = tag->owner;
        if (c->closing) continue;
        if (events[i].events & EPOLLOUT) flush(c);
        if (events[i].events & (EPOLLIN | EPOLLERR)) receive(c);
        else if (events[i].events & EPOLLHUP) lose(c);
      } else {
        command_event(tag);
      }
    }
    revive_ports();
    /* Frames that wait come before the clock: after a pause, one says how long it was. */
    static int skipped;
    struct pollfd p = {poller, POLLIN, 0};
    if (poll(&p, 1, 0) == 0 || ++skipped % 64 == 0) {
      commands_tick(now_us());
      queue_tick(now_us());
    }
  }
}

static int open_vsock(unsigned port) {
  struct sockaddr_vm a = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = port};
  int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0 || bind(fd, (struct sockaddr *)&a, sizeof a) || listen(fd, 64)) return -1;
  return fd;
}

static int refuse(const char *what) {
  dprintf(2, "fathom-agent: %s: %s\n", what, strerror(errno));
  return 71;
}

int main(int argc, char **argv) {
  static int listener = -1;
  static Tag listening = {K_LISTEN, &listener};
  int journal = -1, serial = -1;
  if (argc > 1 && !strcmp(argv[1], "--enter")) return enter_main(argc - 2, argv + 2);
  if (argc > 1 && !strcmp(argv[1], "--copy")) return copy_main(argc - 2, argv + 2);
  prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
  prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
  /* The kernel takes note of every child's end, so that no orphan stays. */
  signal(SIGCHLD, SIG_IGN);
  signal(SIGPIPE, SIG_IGN);
  bool first = argc > 0 && getpid() == 1 && !strcmp(argv[0], "/init");
  if (first) serial = guest_start(&journal);
  for (int i = 1; i + 1 < argc && !first; i += 2) {
    const char *value = argv[i + 1];
    if (!strcmp(argv[i], "--listen-fd")) listener = atoi(value);
    else if (!strcmp(argv[i], "--journal-fd")) journal = atoi(value);
    else if (!strcmp(argv[i], "--journal")) journal = open(value, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    else if (!strcmp(argv[i], "--port")) {
      journal = open(GUEST_FOLDER "/journal", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
      guest_serve();
      if ((serial = guest_port()) < 0) return refuse("the port");
    }
    else if (!strcmp(argv[i], "--vsock")) listener = open_vsock(atoi(value));
    else if (!strcmp(argv[i], "--serial")) {
      serial = open(value, O_RDWR | O_NONBLOCK | O_CLOEXEC | O_NOCTTY);
      if (serial < 0) return refuse(value);
    } else {
      errno = EINVAL;
      return refuse(argv[i]);
    }
  }
  if (listener < 0 && serial < 0) return refuse("nothing to listen on");
  if (getrandom(epoch, sizeof epoch, 0) != sizeof epoch) return refuse("getrandom");
  /* Each command and each line takes some; commands get a limit of their own. */
  struct rlimit files;
  if (!getrlimit(RLIMIT_NOFILE, &files)) {
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
  }
  /* Kept away from 0, 1 and 2, which become a command's own. */
  if (listener >= 0) {
    listener = fcntl(listener, F_DUPFD_CLOEXEC, 10);
    fcntl(listener, F_SETFL, O_NONBLOCK);
  }
  if (journal >= 0) journal_open(fcntl(journal, F_DUPFD_CLOEXEC, 10));
  int null = open("/dev/null", O_RDWR);
  for (int i = 0; i < 3 && null >= 0; i++) dup2(null, i);
  if (null > 2) close(null);
  poller = epoll_create1(EPOLL_CLOEXEC);
  if (listener >= 0) watch(listener, &listening, EPOLLIN);
  if (serial >= 0) add_conn(serial, true);
  serve();
}
