/* The agent's own receipts: which operations began, what they wrote and how they ended.
 *
 * The journal is an open file that was made outside of the sandbox (or, in a virtual machine, in a
 * folder of root alone), so no path of the tenant leads to it. A record is a length, a checksum, a
 * kind and fields. What a dead agent left is read at the start; an operation that began and has no
 * end there is lost, and is never run again.
 */
#include "agent.h"

#include <fcntl.h>
#include <sys/stat.h>

enum { R_START = 1, R_OUTPUT = 2, R_FINISH = 3, R_ACK = 4, RECORD_HEAD = 9, COMPACT = 4 << 20 };

static int file = -1;
static off_t end;
static size_t unacked;
static Op *ops;

static void write_record(uint8_t kind, const Buffer *body) {
  if (file < 0) return;
  uint8_t head[RECORD_HEAD];
  uint32_t len = body->len, crc = crc32_of(body->data, body->len);
  for (int i = 0; i < 4; i++) {
    head[i] = len >> (8 * i) & 255;
    head[4 + i] = crc >> (8 * i) & 255;
  }
  head[8] = kind;
  Buffer whole = {0};
  add(&whole, head, sizeof head);
  add(&whole, body->data, body->len);
  /* No sync: the file outlives every process here, and a machine that stops ends the sandbox. */
  if (pwrite(file, whole.data, whole.len, end) == (ssize_t)whole.len) end += whole.len;
  free(whole.data);
}

static Op *make_op(const char *key, const char *digest) {
  Op *op = grow(NULL, sizeof *op);
  *op = (Op){.key = strdup(key), .digest = strdup(digest), .first = end, .next = ops};
  ops = op;
  return op;
}

Op *journal_find(const char *key) {
  for (Op *op = ops; op; op = op->next)
    if (!strcmp(op->key, key)) return op;
  return NULL;
}

Op *journal_start(const char *key, const char *digest) {
  Op *op = make_op(key, digest);
  Buffer b = {0};
  put_text(&b, T_OP, key);
  put_text(&b, T_DIGEST, digest);
  write_record(R_START, &b);
  free(b.data);
  unacked++;
  return op;
}

void journal_output(Op *op, uint8_t stream, const void *data, size_t len) {
  Buffer b = {0};
  put_text(&b, T_OP, op->key);
  put(&b, stream, data, len);
  write_record(R_OUTPUT, &b);
  free(b.data);
}

void journal_finish(Op *op, const Buffer *exit) {
  op->state = OP_FINISHED;
  add(&op->exit, exit->data, exit->len);
  Buffer b = {0};
  put_text(&b, T_OP, op->key);
  put(&b, T_EXIT, exit->data, exit->len);
  write_record(R_FINISH, &b);
  free(b.data);
}

/* Rewrite the journal as one start, finish and ack per operation, once nothing is owed. */
static void compact(void) {
  if (unacked || end < COMPACT || file < 0 || ftruncate(file, 0)) return;
  end = 0;
  for (Op *op = ops; op; op = op->next) {
    op->first = end;
    Buffer b = {0};
    put_text(&b, T_OP, op->key);
    put_text(&b, T_DIGEST, op->digest);
    write_record(R_START, &b);
    b.len = 0;
    put_text(&b, T_OP, op->key);
    put(&b, T_EXIT, op->exit.data, op->exit.len);
    write_record(R_FINISH, &b);
    b.len = 0;
    put_text(&b, T_OP, op->key);
    write_record(R_ACK, &b);
    free(b.data);
  }
}

void journal_ack(Op *op) {
  if (op->state != OP_FINISHED) return;
  op->state = OP_ACKED;
  unacked--;
  Buffer b = {0};
  put_text(&b, T_OP, op->key);
  write_record(R_ACK, &b);
  free(b.data);
  compact();
}

const char *journal_state(const Op *op) {
  static const char *names[] = {"running", "finished", "acked", "lost"};
  return op ? names[op->state] : "never";
}

/* Read the record at `at`; its body is the caller's to free. False at the end or at damage. */
static bool read_record(off_t at, uint8_t *kind, Buffer *body) {
  uint8_t head[RECORD_HEAD];
  struct stat s;
  if (fstat(file, &s) || pread(file, head, sizeof head, at) != sizeof head) return false;
  uint32_t len = 0, crc = 0;
  for (int i = 0; i < 4; i++) {
    len |= (uint32_t)head[i] << (8 * i);
    crc |= (uint32_t)head[4 + i] << (8 * i);
  }
  *kind = head[8];
  *body = (Buffer){0};
  if (at + RECORD_HEAD + (off_t)len > s.st_size) return false;
  body->data = grow(NULL, len);
  body->len = body->room = len;
  if (pread(file, body->data, len, at + RECORD_HEAD) == (ssize_t)len &&
      crc32_of(body->data, len) == crc)
    return true;
  free(body->data);
  return false;
}

/* Send again what an operation wrote, and its end where it has one. */
void journal_replay(Op *op, Conn *c, uint32_t id) {
  off_t at = op->first;
  uint8_t kind;
  Buffer body;
  while (file >= 0 && at < end && read_record(at, &kind, &body)) {
    Fields fields = {body.data, body.data + body.len};
    Field name, data;
    if (next_field(&fields, &name) && name.len == strlen(op->key) &&
        !memcmp(name.data, op->key, name.len) && kind == R_OUTPUT && next_field(&fields, &data))
      send_frame(c, id, data.tag, data.data, data.len);
    at += RECORD_HEAD + body.len;
    free(body.data);
  }
  if (op->state != OP_FINISHED && op->state != OP_ACKED) return;
  Buffer b = {0};
  add(&b, op->exit.data, op->exit.len);
  put_number(&b, T_REPLAYED, 1);
  send_frame(c, id, M_EXIT, b.data, b.len);
  free(b.data);
}

static void take(uint8_t kind, const Buffer *body) {
  Fields fields = {body->data, body->data + body->len};
  Field name, more;
  if (!next_field(&fields, &name)) return;
  char *key = text_of(&name);
  Op *op = journal_find(key);
  if (kind == R_START && !op && next_field(&fields, &more)) {
    char *digest = text_of(&more);
    op = make_op(key, digest);
    op->state = OP_LOST;
    free(digest);
  } else if (kind == R_FINISH && op && next_field(&fields, &more)) {
    op->state = OP_FINISHED;
    add(&op->exit, more.data, more.len);
    unacked++;
  } else if (kind == R_ACK && op && op->state == OP_FINISHED) {
    op->state = OP_ACKED;
    unacked--;
  }
  free(key);
}

void journal_open(int fd) {
  file = fd;
  uint8_t kind;
  Buffer body;
  while (read_record(end, &kind, &body)) {
    take(kind, &body);
    end += RECORD_HEAD + body.len;
    free(body.data);
  }
  /* What follows the last whole record was being written when an agent died. */
  if (ftruncate(file, end)) file = -1;
}
