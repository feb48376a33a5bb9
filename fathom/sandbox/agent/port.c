/* A connection to a port of the sandbox's own loopback, made by a process that already is the
 * tenant: what comes on standard input goes there, what comes from there goes to standard output. */
#include "agent.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>

typedef struct {
  int from, to;
  bool open;
  size_t at, len;
  uint8_t data[1 << 14];
} Flow;

static int dial(int port) {
  struct sockaddr_in four = {.sin_family = AF_INET, .sin_port = htons(port)};
  struct sockaddr_in6 six = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
  four.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  six.sin6_addr = in6addr_loopback;
  int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd >= 0 && !connect(fd, (struct sockaddr *)&four, sizeof four)) return fd;
  int problem = errno;
  if (fd >= 0) close(fd);
  fd = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd >= 0 && !connect(fd, (struct sockaddr *)&six, sizeof six)) return fd;
  if (fd >= 0) close(fd);
  errno = problem;
  return -1;
}

/* Move what can be moved now. False when the flow has ended and all of it has arrived. */
static bool move(Flow *f, short ready_from, short ready_to) {
  if (f->at < f->len) {
    if (!ready_to) return true;
    ssize_t done = write(f->to, f->data + f->at, f->len - f->at);
    if (done < 0 && errno != EAGAIN && errno != EINTR) return f->open = false;
    if (done > 0) f->at += done;
    return true;
  }
  if (!f->open) return false;
  if (!ready_from) return true;
  ssize_t got = read(f->from, f->data, sizeof f->data);
  if (got < 0 && (errno == EAGAIN || errno == EINTR)) return true;
  f->open = got > 0;
  f->at = 0;
  f->len = got > 0 ? got : 0;
  return f->open;
}

int carry_port(const char *text) {
  int port = atoi(text);
  if (port < 1 || port > 65535) return EINVAL;
  int fd = dial(port);
  if (fd < 0) return errno;
  static Flow in, out;
  in = (Flow){.from = 0, .to = fd, .open = true};
  out = (Flow){.from = fd, .to = 1, .open = true};
  fcntl(fd, F_SETFL, O_NONBLOCK);
  fcntl(0, F_SETFL, O_NONBLOCK);
  fcntl(1, F_SETFL, O_WRONLY | O_NONBLOCK);
  bool sending = true;
  for (;;) {
    bool held = in.at < in.len, owed = out.at < out.len;
    short at_socket = (held ? POLLOUT : 0) | (owed ? 0 : POLLIN);
    struct pollfd p[] = {{sending && !held ? 0 : -1, POLLIN, 0},
                         {at_socket ? fd : -1, at_socket, 0},
                         {owed ? 1 : -1, POLLOUT, 0}};
    if (poll(p, 3, -1) < 0 && errno != EINTR) return errno;
    short broken = p[1].revents & (POLLHUP | POLLERR);
    if (sending && !move(&in, p[0].revents, p[1].revents & POLLOUT | broken)) {
      sending = false;
      shutdown(fd, SHUT_WR);
    }
    if (!move(&out, p[1].revents & POLLIN | broken, p[2].revents)) return 0;
  }
}
