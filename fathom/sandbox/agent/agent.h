/* The agent inside a sandbox: what its parts share. The protocol is described in docs/sandbox.md. */
#ifndef FATHOM_AGENT_H
#define FATHOM_AGENT_H

#define _GNU_SOURCE
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

enum { PROTOCOL = 1, MAGIC = 0xF47A, HEADER = 12 };
enum { FRAME_LIMIT = 1 << 20, STRANGER_LIMIT = 4096, OUT_HIGH = 1 << 19, STDIN_LIMIT = 1 << 20 };
enum { SECRET_LIMIT = 64, EPOCH_SIZE = 16 };
/* Where what came along is kept: from here on, the folder of the writes first (_UPPER_FD of box.py). */
enum { KEPT_FILE = 100, MOST_GIVEN = 2 };
/* In a virtual machine: where what is the agent's own lies, a folder of root alone. */
#define GUEST_FOLDER "/run/fathom"

/* Frames from the host. */
enum {
  M_HELLO = 1, M_CONFIGURE = 2, M_EXEC = 3, M_STDIN = 4, M_EOF = 5, M_SIGNAL = 6, M_RESIZE = 7,
  M_CANCEL = 8, M_QUERY = 9, M_ACK = 10, M_PING = 11, M_SHIFT = 12, M_REKEY = 13,
  M_HOLD = 14, M_LEAVE = 15, M_NETWORK = 16
};
/* Frames to the host. */
enum {
  M_OK = 64, M_ERROR = 65, M_STARTED = 66, M_STDOUT = 67, M_STDERR = 68, M_EXIT = 69, M_CREDIT = 70
};

/* Fields: a tag byte, a 32-bit length, the bytes. Numbers are 64-bit little-endian. */
enum {
  T_VERSION = 1, T_SECRET = 2, T_EPOCH = 3, T_PID = 4, T_CODE = 5, T_MESSAGE = 6, T_ERRNO = 7,
  T_UID = 16, T_GID = 17, T_FILTER = 18, T_WRITABLE = 19, T_ADDRESS_SPACE = 20, T_PROCESSES = 21,
  T_FILES = 22, T_CPUS = 23, T_OOM_SCORE = 24, T_GUEST = 25, T_LANDLOCK = 26,
  T_MORTAL = 27, T_JOURNAL = 28,
  T_ARG = 32, T_ENV = 33, T_CWD = 34, T_TIMEOUT_US = 35, T_CAP = 36, T_FLAGS = 37, T_ROWS = 38,
  T_COLS = 39, T_OP = 40, T_DIGEST = 41, T_BUILTIN = 42, T_GRACE_US = 43, T_SIGNAL = 44,
  T_MICROS = 45, T_WRITE_MODE = 46,
  T_EXIT = 64, T_TIMED_OUT = 65, T_PROBLEM = 66, T_DURATION_US = 67, T_STDOUT_TOTAL = 68,
  T_STDERR_TOTAL = 69, T_USER_US = 70, T_SYSTEM_US = 71, T_MAX_RSS_KB = 72, T_KILLED_ALL = 73,
  T_OOM_KILLED = 74, T_REPLAYED = 75, T_STATE = 76, T_CANCELLED = 77,
  T_STDOUT_KEPT = 78, T_STDERR_KEPT = 79, T_LOST = 80,
  T_ENTROPY = 96, T_HOSTNAME = 97, T_CLOCK_US = 98
};

enum { X_MERGE = 1, X_PTY = 2, X_STDIN = 4, X_SHELL = 8, X_DETACH = 16, X_LINE = 32 };

typedef struct {
  uint8_t *data;
  size_t len, room;
} Buffer;

typedef struct {
  const uint8_t *at, *end;
} Fields;

typedef struct {
  uint8_t tag;
  const uint8_t *data;
  uint32_t len;
} Field;

/* wire.c */
void *grow(void *old, size_t size);
void add(Buffer *b, const void *data, size_t len);
void drop(Buffer *b, size_t len);
void put(Buffer *b, uint8_t tag, const void *data, size_t len);
void put_text(Buffer *b, uint8_t tag, const char *text);
void put_number(Buffer *b, uint8_t tag, uint64_t value);
bool next_field(Fields *f, Field *out);
uint64_t number_of(const Field *f);
char *text_of(const Field *f);
uint32_t crc32_of(const void *data, size_t len);
int64_t now_us(void);

/* What an open file belongs to; the owner lives until the end of a round of events. */
enum { K_LISTEN, K_CONN, K_STATUS, K_STDIN, K_STDOUT, K_STDERR, K_MEMORY };
typedef struct {
  int kind;
  void *owner;
} Tag;

struct sock_fprog;
typedef struct Conn Conn;
struct Conn {
  Tag tag;
  int fd;
  bool known, serial, closing;
  int given[MOST_GIVEN]; /* open files that came along, or -1 */
  Buffer in, out;
  Conn *next;
};
void send_frame(Conn *c, uint32_t id, uint8_t type, const void *data, size_t len);
void send_error(Conn *c, uint32_t id, const char *code, int number, const char *message);
bool send_rest(Conn *c);
void let_go(Conn *c);

/* journal.c */
enum { OP_RUNNING, OP_FINISHED, OP_ACKED, OP_LOST };
typedef struct Op Op;
struct Op {
  char *key, *digest;
  int state;
  Buffer exit; /* the fields of its EXIT frame */
  off_t first, moved; /* where its records begin, and begin in a copy */
  off_t bytes; /* of its records, those that still matter */
  uint64_t kept[2]; /* bytes of its output in the journal: from the beginning on, without a gap */
  bool cut[2];
  Op *next;
};
typedef struct Replay Replay;
struct Replay {
  Op *op;
  Conn *conn;
  uint32_t id;
  off_t at;
  uint64_t left;
  Replay *next;
};
void journal_open(int fd);
void journal_limit(uint64_t bytes);
Op *journal_find(const char *key);
Op *journal_start(const char *key, const char *digest);
void journal_forget(Op *op);
void journal_output(Op *op, uint8_t stream, const void *data, size_t len);
void journal_finish(Op *op, const Buffer *exit);
void journal_ack(Op *op);
void journal_replay(Op *op, Conn *c, uint32_t id);
bool journal_replaying(const Op *op);
bool journal_pump(void);
void journal_quit(const Conn *c, const Op *op);
const char *journal_state(const Op *op);

/* tenant.c */
typedef struct {
  bool done, drops, landlock, guest, mortal;
  uid_t uid;
  gid_t gid;
  uint64_t address_space, processes, files, cpus;
  int64_t oom_score;
  char **writable;
  size_t writables;
  struct sock_fprog *filter; /* for commands alone: in a guest the agent must do what it denies */
} Settings;
extern Settings settings;
const char *configure(const uint8_t *data, size_t len, int *number);
int end_with_parent(void);
void limit_processes(void);
void become_tenant(int error, const char *cwd);
void restore_signals(void);
void say(int fd, const char *step, int number);

/* files.c: file operations, run by a process that already is the tenant. */
int run_builtin(const char *name, char **args, int error, uint64_t mode);

/* memory.c */
void memory_count_in(int fd);
void memory_watch(void);
void memory_event(void);
uint64_t memory_kills(void);

/* archive.c */
int write_archive(const char *path, uint64_t limit);

/* guest.c */
int guest_start(int *journal);
int guest_port(void);
void guest_serve(void);
const char *guest_group(const char *file);
int guest_network(bool on);

/* port.c: the same, for connections. Returns an errno. */
int carry_port(const char *text);

/* outside.c: programs of their own, on the host. */
int enter_group(const char *file);
int enter_main(int argc, char **argv);
int copy_main(int argc, char **argv);

/* command.c */
enum { START_PATIENCE_US = 5000000 }; /* so long is there no room before a start is given up */
typedef struct Cmd Cmd;
int command_start(Conn *c, uint32_t id, const uint8_t *data, size_t len, int64_t deadline, bool turn);
void command_refuse(Conn *c, uint32_t id, int failed);
int64_t timeout_of(const uint8_t *data, size_t len);
bool command_beginning(void);
int command_lacking(void);
Cmd *command_find(Conn *c, uint32_t id);
void command_stdin(Cmd *cmd, const uint8_t *data, size_t len);
void command_eof(Cmd *cmd);
int command_signal(Cmd *cmd, int number);
int command_resize(Cmd *cmd, unsigned rows, unsigned cols);
void command_cancel(Cmd *cmd);
void command_hold(Cmd *cmd, bool on);
void command_leave(Cmd *cmd);
void command_orphan(Conn *c);
void command_disown(Conn *c);
void commands_shift(int64_t micros);
int64_t commands_wait(int64_t now);
void commands_tick(int64_t now);
void command_event(Tag *tag);
void commands_bury(void);

/* queue.c */
void queue_exec(Conn *c, uint32_t id, const uint8_t *data, size_t len);
void queue_frame(Conn *c, uint32_t id, uint8_t type, const uint8_t *data, size_t len);
void queue_quit(const Conn *c);
void queue_shift(int64_t micros);
void queue_progress(void);
int64_t queue_wait(void);
void queue_tick(int64_t now);

/* agent.c */
void request(Conn *c, uint32_t id, uint8_t type, const uint8_t *data, size_t len);
void watch(int fd, Tag *tag, uint32_t events);
void unwatch(int fd);

#endif
