/* The agent's own receipts: which operations began, what they wrote and how they ended.
 *
 * The journal is an open file that was made outside of the sandbox (or, in a virtual machine, in a
 * folder of root alone), so no path of the tenant leads to it. A record is a length, a checksum, a
 * kind and fields. What a dead agent left is read at the start; an operation that began and has no
 * end there is lost, and is never run again.
 *
 * It has a bound. No operation begins without room for its receipt; output that finds none is not
 * kept, from its first missing byte on, and the receipt counts it. The first record says where the
 * others begin: a shorter copy of what still matters is written behind them, that record is turned
 * to it, and what lies before is given back. A death in between leaves either the one or the other.
 */
#include "agent.h"

#include <fcntl.h>
#include <sys/stat.h>

enum {
  R_START = 1, R_OUTPUT = 2, R_FINISH = 3, R_ACK = 4, R_BASE = 5, R_DONE = 6, R_FORGET = 7,
  RECORD_HEAD = 9, BASE_SIZE = RECORD_HEAD + 8, PAGE = 4096, BUCKETS = 512,
  COMPACT = 1 << 20, ALLOCATED_AHEAD = 128 << 10,
  /* A start and a finish with the longest key and problem, and the least output that is kept. */
  RECEIPT = 4096, FLOOR = 64 << 10
};

static int file = -1;
static off_t base = BASE_SIZE, end = BASE_SIZE, allocated;
/* Bytes of records that still matter; bytes that running operations' receipts will take. */
static off_t live, owed;
static bool punches = true;
static uint64_t most = 64 << 20;
static Op *ops[BUCKETS];
static Replay *replays;

void journal_limit(uint64_t bytes) {
  if (bytes) most = bytes;
}

/* Writing -------------------------------------------------------------------------------------- */

static off_t used(void) { return punches ? end - base : end; }

/* Whether so many bytes more fit beside what is owed: by the bound, and on the disk. */
static bool has_room(size_t len) {
  if (file < 0 || (uint64_t)(used() + owed) + len > most) return false;
  off_t wanted = end + owed + (off_t)len;
  if (wanted <= allocated) return true;
  /* A file system that cannot promise room shows that there is none as it is written to. */
  if (fallocate(file, FALLOC_FL_KEEP_SIZE, end, wanted - end + ALLOCATED_AHEAD) == 0)
    allocated = wanted + ALLOCATED_AHEAD;
  else if (fallocate(file, FALLOC_FL_KEEP_SIZE, end, wanted - end) == 0)
    allocated = wanted;
  else if (errno != EOPNOTSUPP && errno != ENOSYS)
    return false;
  return true;
}

static bool write_at(off_t at, uint8_t kind, const void *body, size_t size) {
  uint8_t head[RECORD_HEAD];
  uint32_t len = size, crc = crc32_of(body, size);
  for (int i = 0; i < 4; i++) {
    head[i] = len >> (8 * i) & 255;
    head[4 + i] = crc >> (8 * i) & 255;
  }
  head[8] = kind;
  Buffer whole = {0};
  add(&whole, head, sizeof head);
  add(&whole, body, size);
  /* No sync: the file outlives every process here, and a machine that stops ends the sandbox. */
  bool done = pwrite(file, whole.data, whole.len, at) == (ssize_t)whole.len;
  free(whole.data);
  return done;
}

static bool append(uint8_t kind, const Buffer *body) {
  if (file < 0 || !write_at(end, kind, body->data, body->len)) return false;
  end += RECORD_HEAD + body->len;
  return true;
}

static bool write_base(off_t at) {
  uint8_t body[8];
  for (int i = 0; i < 8; i++) body[i] = (uint64_t)at >> (8 * i) & 255;
  return write_at(0, R_BASE, body, sizeof body);
}

static void count(Op *op, off_t bytes) {
  op->bytes += bytes;
  live += bytes;
}

/* Operations ----------------------------------------------------------------------------------- */

static Op **bucket(const char *key) {
  uint32_t hash = 2166136261u;
  for (const char *at = key; *at; at++) hash = (hash ^ (uint8_t)*at) * 16777619u;
  return &ops[hash % BUCKETS];
}

Op *journal_find(const char *key) {
  for (Op *op = *bucket(key); op; op = op->next)
    if (!strcmp(op->key, key)) return op;
  return NULL;
}

static Op *make_op(const char *key, const char *digest) {
  Op *op = grow(NULL, sizeof *op);
  *op = (Op){.key = strdup(key), .digest = strdup(digest), .first = end, .next = *bucket(key)};
  *bucket(key) = op;
  return op;
}

static void remove_op(Op *op) {
  for (Op **at = bucket(op->key); *at; at = &(*at)->next)
    if (*at == op) {
      *at = op->next;
      break;
    }
  count(op, -op->bytes);
  free(op->key);
  free(op->digest);
  free(op->exit.data);
  free(op);
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
  /* Room that was allocated and never written to reads as zeros: no kind is one. */
  if (!*kind || at + RECORD_HEAD + (off_t)len > s.st_size) return false;
  body->data = grow(NULL, len);
  body->len = body->room = len;
  if (pread(file, body->data, len, at + RECORD_HEAD) == (ssize_t)len &&
      crc32_of(body->data, len) == crc)
    return true;
  free(body->data);
  return false;
}

/* The operation that a record is about; `rest` is left at its next field. */
static Op *op_of(const Buffer *body, Fields *rest) {
  Field name;
  *rest = (Fields){body->data, body->data + body->len};
  if (!next_field(rest, &name)) return NULL;
  char *key = text_of(&name);
  Op *op = journal_find(key);
  free(key);
  return op;
}

static void put_done(Buffer *b, const Op *op) {
  put_text(b, T_OP, op->key);
  put_text(b, T_DIGEST, op->digest);
  put(b, T_EXIT, op->exit.data, op->exit.len);
}

/* Write behind the records those that still matter, and give back the room of all before. */
static bool compact(void) {
  if (file < 0 || !punches || replays || used() <= live) return false;
  off_t old_base = base, old_end = end, at = base;
  off_t fresh = (end + PAGE - 1) / PAGE * PAGE;
  bool whole = true;
  end = fresh;
  uint8_t kind;
  Buffer body;
  while (whole && at < old_end && read_record(at, &kind, &body)) {
    Fields rest;
    Op *op = op_of(&body, &rest);
    at += RECORD_HEAD + body.len;
    off_t here = end;
    bool begins = kind == R_START || kind == R_DONE;
    if (op && op->state == OP_ACKED && begins) {
      Buffer done = {0};
      put_done(&done, op);
      whole = append(R_DONE, &done);
      free(done.data);
    } else if (op && op->state == OP_LOST && begins) {
      whole = append(kind, &body);
    } else if (op && op->state <= OP_FINISHED && kind <= R_FINISH) {
      whole = append(kind, &body);
    }
    if (begins && op) op->moved = here;
    free(body.data);
  }
  whole = whole && at == old_end && write_base(fresh);
  if (!whole) {
    /* No room for both at a time: it stays as it was. */
    end = old_end;
    if (ftruncate(file, old_end)) errno = 0;
    allocated = old_end;
    has_room(0); /* what is owed */
    return false;
  }
  for (int i = 0; i < BUCKETS; i++)
    for (Op *op = ops[i]; op; op = op->next) op->first = op->moved;
  base = fresh;
  live = end - base;
  off_t hole = old_base < PAGE ? PAGE : old_base / PAGE * PAGE;
  if (fresh > hole && fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, hole, fresh - hole))
    punches = false;
  return true;
}

/* A copy is worth its work where it gives back a good part. */
static bool make_room(size_t len) {
  off_t dead = used() - live;
  return has_room(len) ||
         (dead >= (off_t)len && dead >= used() / 8 && compact() && has_room(len));
}

/* Take note that an operation is about to begin; NULL where no receipt of it could be kept. */
Op *journal_start(const char *key, const char *digest) {
  if (!make_room(RECEIPT + FLOOR)) return NULL;
  Buffer b = {0};
  put_text(&b, T_OP, key);
  put_text(&b, T_DIGEST, digest);
  Op *op = make_op(key, digest);
  bool written = append(R_START, &b);
  if (written) {
    count(op, RECORD_HEAD + b.len);
    owed += RECEIPT;
  } else {
    remove_op(op);
  }
  free(b.data);
  return written ? op : NULL;
}

/* It did not begin after all. */
void journal_forget(Op *op) {
  Buffer b = {0};
  put_text(&b, T_OP, op->key);
  append(R_FORGET, &b);
  free(b.data);
  owed -= RECEIPT;
  remove_op(op);
}

void journal_output(Op *op, uint8_t stream, const void *data, size_t len) {
  int i = stream == M_STDERR;
  if (op->cut[i]) return;
  Buffer b = {0};
  put_text(&b, T_OP, op->key);
  put(&b, stream, data, len);
  if (make_room(RECORD_HEAD + b.len) && append(R_OUTPUT, &b)) {
    op->kept[i] += len;
    count(op, RECORD_HEAD + b.len);
  } else {
    /* What comes back must be a beginning: nothing after a gap is of use. */
    op->cut[i] = true;
  }
  free(b.data);
}

void journal_finish(Op *op, const Buffer *exit) {
  op->state = OP_FINISHED;
  add(&op->exit, exit->data, exit->len);
  Buffer b = {0};
  put_text(&b, T_OP, op->key);
  put(&b, T_EXIT, exit->data, exit->len);
  owed -= RECEIPT;
  if (append(R_FINISH, &b)) count(op, RECORD_HEAD + b.len);
  free(b.data);
}

void journal_ack(Op *op) {
  if (op->state != OP_FINISHED) return;
  op->state = OP_ACKED;
  op->kept[0] = op->kept[1] = 0;
  Buffer b = {0};
  put_text(&b, T_OP, op->key);
  append(R_ACK, &b);
  b.len = 0;
  put_done(&b, op);
  count(op, RECORD_HEAD + (off_t)b.len - op->bytes);
  free(b.data);
  if (used() - live > COMPACT && used() - live > live / 2) compact();
}

const char *journal_state(const Op *op) {
  static const char *names[] = {"running", "finished", "acked", "lost"};
  return op ? names[op->state] : "never";
}

/* Replaying ------------------------------------------------------------------------------------ */

/* Send again what an operation wrote, as fast as it is taken, and its end where it has one. */
void journal_replay(Op *op, Conn *c, uint32_t id) {
  Replay *r = grow(NULL, sizeof *r);
  *r = (Replay){.op = op, .conn = c, .id = id, .at = op->first, .left = op->kept[0] + op->kept[1]};
  Replay **at = &replays;
  while (*at) at = &(*at)->next;
  *at = r;
}

bool journal_replaying(const Op *op) {
  for (Replay *r = replays; r; r = r->next)
    if (r->op == op && op->state == OP_RUNNING) return true;
  return false;
}

static void send_end(const Replay *r) {
  const Op *op = r->op;
  if (op->state != OP_FINISHED && op->state != OP_ACKED) return;
  Buffer b = {0};
  Fields fields = {op->exit.data, op->exit.data + op->exit.len};
  Field f;
  uint64_t sent = 0;
  while (next_field(&fields, &f))
    if (f.tag == T_STDOUT_KEPT || f.tag == T_STDERR_KEPT) sent += number_of(&f);
  add(&b, op->exit.data, op->exit.len);
  put_number(&b, T_REPLAYED, 1);
  put_number(&b, T_LOST, sent - op->kept[0] - op->kept[1]);
  send_frame(r->conn, r->id, M_EXIT, b.data, b.len);
  free(b.data);
}

/* Send the next record of a replay; false after the last. */
static bool step(Replay *r) {
  uint8_t kind;
  Buffer body;
  if (!r->left || r->at >= end || !read_record(r->at, &kind, &body)) return false;
  Fields rest;
  Field data;
  if (kind == R_OUTPUT && op_of(&body, &rest) == r->op && next_field(&rest, &data)) {
    send_frame(r->conn, r->id, data.tag, data.data, data.len);
    r->left -= data.len < r->left ? data.len : r->left;
  }
  r->at += RECORD_HEAD + body.len;
  free(body.data);
  return true;
}

/* Go on with every replay whose line takes more; whether anything was sent. */
bool journal_pump(void) {
  bool sent = false;
  for (Replay **at = &replays; *at;) {
    Replay *r = *at;
    bool more = true;
    while (more && r->conn->out.len <= OUT_HIGH) more = step(r), sent = true;
    if (more) {
      at = &r->next;
      continue;
    }
    send_end(r);
    *at = r->next;
    free(r);
  }
  return sent;
}

/* Nobody is there any more for the replays to a line, or to one number of it. */
void journal_quit(const Conn *c, const Op *op) {
  for (Replay **at = &replays; *at;) {
    Replay *r = *at;
    if (r->conn != c || (op && r->op != op)) {
      at = &r->next;
      continue;
    }
    *at = r->next;
    free(r);
  }
}

/* The start ------------------------------------------------------------------------------------ */

static void take(uint8_t kind, const Buffer *body) {
  Fields rest;
  Field more;
  Op *op = op_of(body, &rest);
  off_t size = RECORD_HEAD + (off_t)body->len;
  if ((kind == R_START || kind == R_DONE) && !op && next_field(&rest, &more)) {
    Fields again = {body->data, body->data + body->len};
    Field name;
    next_field(&again, &name);
    char *key = text_of(&name), *digest = text_of(&more);
    op = make_op(key, digest);
    op->state = OP_LOST;
    if (kind == R_DONE && next_field(&rest, &more)) {
      op->state = OP_ACKED;
      add(&op->exit, more.data, more.len);
    }
    count(op, size);
    free(key);
    free(digest);
  } else if (kind == R_OUTPUT && op && next_field(&rest, &more)) {
    op->kept[more.tag == M_STDERR] += more.len;
    count(op, size);
  } else if (kind == R_FINISH && op && next_field(&rest, &more)) {
    op->state = OP_FINISHED;
    add(&op->exit, more.data, more.len);
    count(op, size);
  } else if (kind == R_ACK && op && op->state == OP_FINISHED) {
    op->state = OP_ACKED;
    op->kept[0] = op->kept[1] = 0;
    count(op, 2 * RECORD_HEAD - op->bytes);
  } else if (kind == R_FORGET && op) {
    remove_op(op);
  }
}

void journal_open(int fd) {
  file = fd;
  uint8_t kind;
  Buffer body;
  if (read_record(0, &kind, &body)) {
    if (kind == R_BASE && body.len == 8)
      for (int i = 7; i >= 0; i--) base = i == 7 ? body.data[i] : base << 8 | body.data[i];
    free(body.data);
  } else if (!write_base(base)) {
    file = -1;
    return;
  }
  end = base;
  while (read_record(end, &kind, &body)) {
    take(kind, &body);
    end += RECORD_HEAD + body.len;
    free(body.data);
  }
  /* What follows the last whole record was being written when an agent died. */
  if (ftruncate(file, end)) file = -1;
  allocated = end;
}
