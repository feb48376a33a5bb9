/* Frames, fields, growing buffers. */
#include "agent.h"

#include <time.h>

void *grow(void *old, size_t size) {
  void *fresh = realloc(old, size ? size : 1);
  if (!fresh) {
    /* Without memory nothing can be promised any more; the host sees the sandbox as lost. */
    _exit(70);
  }
  return fresh;
}

void add(Buffer *b, const void *data, size_t len) {
  if (b->len + len > b->room) {
    b->room = (b->len + len) * 2 + 256;
    b->data = grow(b->data, b->room);
  }
  if (len) memcpy(b->data + b->len, data, len);
  b->len += len;
}

void drop(Buffer *b, size_t len) {
  b->len -= len;
  if (b->len) {
    memmove(b->data, b->data + len, b->len);
  } else if (b->room > 65536) {
    /* An idle agent shall be small. */
    free(b->data);
    *b = (Buffer){0};
  }
}

void put(Buffer *b, uint8_t tag, const void *data, size_t len) {
  uint8_t head[5] = {tag, len & 255, len >> 8 & 255, len >> 16 & 255, len >> 24 & 255};
  add(b, head, sizeof head);
  add(b, data, len);
}

void put_text(Buffer *b, uint8_t tag, const char *text) { put(b, tag, text, strlen(text)); }

void put_number(Buffer *b, uint8_t tag, uint64_t value) {
  uint8_t bytes[8];
  for (int i = 0; i < 8; i++) bytes[i] = value >> (8 * i) & 255;
  put(b, tag, bytes, sizeof bytes);
}

bool next_field(Fields *f, Field *out) {
  if (f->end - f->at < 5) return false;
  uint32_t len = f->at[1] | f->at[2] << 8 | f->at[3] << 16 | (uint32_t)f->at[4] << 24;
  if (len > (size_t)(f->end - f->at - 5)) return false;
  *out = (Field){f->at[0], f->at + 5, len};
  f->at += 5 + len;
  return true;
}

uint64_t number_of(const Field *f) {
  uint64_t value = 0;
  for (uint32_t i = 0; i < f->len && i < 8; i++) value |= (uint64_t)f->data[i] << (8 * i);
  return value;
}

char *text_of(const Field *f) {
  char *text = grow(NULL, f->len + 1);
  memcpy(text, f->data, f->len);
  text[f->len] = 0;
  return text;
}

uint32_t crc32_of(const void *data, size_t len) {
  const uint8_t *at = data;
  uint32_t crc = ~0u;
  while (len--) {
    crc ^= *at++;
    for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (0xEDB88320u & -(crc & 1));
  }
  return ~crc;
}

int64_t now_us(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

void send_frame(Conn *c, uint32_t id, uint8_t type, const void *data, size_t len) {
  if (!c || c->closing) return;
  uint8_t head[HEADER] = {len & 255, len >> 8 & 255, len >> 16 & 255, len >> 24 & 255,
                          id & 255,  id >> 8 & 255,  id >> 16 & 255,  id >> 24 & 255,
                          type,      PROTOCOL,       MAGIC & 255,     MAGIC >> 8};
  add(&c->out, head, sizeof head);
  add(&c->out, data, len);
}

void send_error(Conn *c, uint32_t id, const char *code, int number, const char *message) {
  Buffer b = {0};
  put_text(&b, T_CODE, code);
  put_number(&b, T_ERRNO, number);
  put_text(&b, T_MESSAGE, message);
  send_frame(c, id, M_ERROR, b.data, b.len);
  free(b.data);
}
