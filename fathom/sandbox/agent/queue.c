/* Commands that wait for their turn and for room.
 *
 * Many may be asked for at once, after a pause say, and each takes two processes: what the sandbox's
 * limits do not let in now is let in as others end. Nothing of such a command has run, and its frames
 * are kept as they came. It is refused where nothing begins or ends for long, or at its own deadline.
 *
 * One begins at a time: many monitors together could take all the processes that their commands need.
 */
#include "agent.h"

enum { MOST_KEPT = 2 * FRAME_LIMIT, RETRY_US = 10000 };

typedef struct Waiting Waiting;
struct Waiting {
  Conn *conn;
  uint32_t id;
  int64_t since, deadline;
  Buffer frames; /* of which the first is the EXEC */
  Waiting *next;
};

static Waiting *queue, **last = &queue;
static int64_t progress; /* when a command last began or ended */
static int lacking; /* why the first one could not begin */

void queue_progress(void) { progress = now_us(); }

static void keep(Waiting *w, uint8_t type, const void *data, uint32_t len) {
  add(&w->frames, &type, sizeof type);
  add(&w->frames, &len, sizeof len);
  add(&w->frames, data, len);
}

static void leave(Waiting **at) {
  Waiting *w = *at;
  *at = w->next;
  if (last == &w->next) last = at;
  free(w->frames.data);
  free(w);
}

static Waiting **find(const Conn *c, uint32_t id) {
  Waiting **at = &queue;
  while (*at && ((*at)->conn != c || (*at)->id != id)) at = &(*at)->next;
  return at;
}

/* Answer for one that never began. */
static void end(const Waiting *w, uint8_t why) {
  Buffer b = {0};
  put_number(&b, T_EXIT, 137);
  put_number(&b, why, 1);
  send_frame(w->conn, w->id, M_EXIT, b.data, b.len);
  free(b.data);
}

/* Start a command, now or as soon as there is room. */
void queue_exec(Conn *c, uint32_t id, const uint8_t *data, size_t len) {
  if (*find(c, id)) return send_error(c, id, "bad_request", 0, "this number is in use");
  int64_t now = now_us(), deadline = now + timeout_of(data, len);
  int failed = command_start(c, id, data, len, deadline, !queue && !command_beginning());
  if (!failed) return;
  if (!queue) lacking = failed > 0 ? failed : 0;
  Waiting *w = grow(NULL, sizeof *w);
  *w = (Waiting){.conn = c, .id = id, .since = now, .deadline = deadline};
  keep(w, M_EXEC, data, len);
  *last = w;
  last = &w->next;
}

/* Take a frame about a command that waits. One about a command that ended meanwhile is no mistake. */
void queue_frame(Conn *c, uint32_t id, uint8_t type, const uint8_t *data, size_t len) {
  Waiting **at = find(c, id);
  if (!*at) return;
  if (type == M_LEAVE) return leave(at);
  if (type != M_CANCEL && (*at)->frames.len + len <= MOST_KEPT) return keep(*at, type, data, len);
  end(*at, T_CANCELLED);
  leave(at);
}

/* Nobody waits on this line any more: what has not begun never will. */
void queue_quit(const Conn *c) {
  for (Waiting **at = &queue; *at;)
    if ((*at)->conn == c) leave(at);
    else at = &(*at)->next;
}

void queue_shift(int64_t micros) {
  progress += micros;
  for (Waiting *w = queue; w; w = w->next) w->since += micros, w->deadline += micros;
}

/* How long until the next one is tried again; -1 where none waits. */
int64_t queue_wait(void) { return queue ? RETRY_US : -1; }

/* Try the first one. False where there is still no room. */
static bool begin_first(void) {
  Waiting *w = queue;
  uint8_t type;
  uint32_t len;
  size_t head = sizeof type + sizeof len, at = 0;
  Buffer frames = w->frames;
  Conn *c = w->conn;
  uint32_t id = w->id;
  memcpy(&len, frames.data + sizeof type, sizeof len);
  int failed = command_start(c, id, frames.data + head, len, w->deadline, true);
  if (failed) return lacking = failed, false;
  lacking = 0;
  w->frames = (Buffer){0};
  leave(&queue);
  for (at += head + len; at < frames.len; at += head + len) {
    type = frames.data[at];
    memcpy(&len, frames.data + at + sizeof type, sizeof len);
    request(c, id, type, frames.data + at + head, len);
  }
  free(frames.data);
  return true;
}

/* Start what there is room for, and refuse what has waited in vain. */
void queue_tick(int64_t now) {
  while (queue && !command_beginning() && begin_first()) {
  }
  int why = lacking ? lacking : command_lacking();
  for (Waiting **at = &queue; *at;) {
    Waiting *w = *at;
    int64_t since = w->since > progress ? w->since : progress;
    if (w->deadline > now && (!why || since + START_PATIENCE_US > now)) {
      at = &w->next;
      continue;
    }
    if (why) command_refuse(w->conn, w->id, why);
    else end(w, T_TIMED_OUT);
    leave(at);
  }
}
