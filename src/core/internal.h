/* What the rest of the library uses of core: messages, allocation, small helpers. */
#ifndef ATTN_CORE_INTERNAL_H
#define ATTN_CORE_INTERNAL_H

#include <attn/memory.h>
#include <attn/status.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define ATTN_PRINTF(format_index, first) __attribute__((format(printf, format_index, first)))
#else
#define ATTN_PRINTF(format_index, first)
#endif

/* Record the message for attn_last_error() and return `status`. */
attn_status attn_fail(attn_status status, const char *format, ...) ATTN_PRINTF(2, 3);
attn_status attn_fail_memory(size_t bytes);

/* Return early on failure. */
#define ATTN_TRY(expression)                              \
    do {                                                  \
        attn_status attn_try_status_ = (expression);      \
        if (attn_try_status_ != ATTN_OK) {                \
            return attn_try_status_;                      \
        }                                                 \
    } while (0)

/* 64-byte aligned, through the replaceable allocator; NULL on failure and for 0 bytes of overflowed products. */
void *attn_alloc(size_t bytes);
void *attn_alloc_array(size_t count, size_t size);  /* checks the product */
void *attn_calloc_array(size_t count, size_t size); /* zeroed */
/* Grow or shrink; old contents kept up to the smaller size. On failure the old block stays valid. */
void *attn_realloc(void *memory, size_t old_bytes, size_t new_bytes);
void attn_free(void *memory);
char *attn_strdup(const char *text);

/* Ask for `rows` rows of `bytes` each, `stride` bytes apart, to be brought near: for soon, or for later, into the second-level cache, which
 * leaves what is being worked on in the first. */
void attn_prefetch(const void *row, ptrdiff_t stride, int64_t rows, size_t bytes);
void attn_prefetch_ahead(const void *row, ptrdiff_t stride, int64_t rows, size_t bytes);

/* What will be read next, asked for in small shares while something else is computed: memory has nothing to do meanwhile, and more
 * requests than it takes at a time would stop the work. */
typedef struct attn_ahead {
    int count, share, shares;
    struct {
        const void *at;
        size_t bytes;
    } ranges[8];
} attn_ahead;
/* `count` numbers from at on; none when count < 1. At most 8 ranges. */
static inline void attn_ahead_add(attn_ahead *ahead, const float *at, int64_t count)
{
    if (count > 0) {
        ahead->ranges[ahead->count].at = at;
        ahead->ranges[ahead->count++].bytes = (size_t)count * sizeof *at;
    }
}
void attn_ahead_share(attn_ahead *ahead); /* the next share of each range, if there is one */

/* Map a regular file of at least `least` bytes for reading; `kind` names the format in messages. */
attn_status attn_map_file(const char *path, const char *kind, size_t least, void **map, size_t *bytes);
void attn_unmap_file(void *map, size_t bytes); /* NULL is ignored */

/* A position in an arena; release frees everything allocated after the mark. */
typedef struct attn_arena_mark {
    void *block;
    size_t used;
} attn_arena_mark;
attn_arena_mark attn_arena_get_mark(attn_arena *arena);
void attn_arena_release(attn_arena *arena, attn_arena_mark mark);
/* count*size with overflow check; NULL on failure. */
void *attn_arena_array(attn_arena *arena, size_t count, size_t size);

/* Number of OpenMP threads of a call. */
int attn_exec_threads(const attn_exec *exec);
/* The call's arena: exec->arena, or a new one that attn_exec_arena_end() destroys. */
typedef struct attn_scratch {
    attn_arena *arena;
    attn_arena_mark mark;
    int owned;
} attn_scratch;
attn_status attn_scratch_begin(attn_scratch *scratch, const attn_exec *exec);
void attn_scratch_end(attn_scratch *scratch);

static inline int64_t attn_min_i64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t attn_max_i64(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t attn_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#endif
