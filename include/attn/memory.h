/* Memory: the replaceable allocator, and arenas for scratch memory.
 *
 * Callers own tensors; the library owns only what it returns as an object (freed by that object's own function)
 * and scratch memory, which comes from an arena that the caller can size, reuse and reset.
 */
#ifndef ATTN_MEMORY_H
#define ATTN_MEMORY_H

#include <attn/status.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* All functions get `user`. alloc returns NULL on failure, memory aligned for any scalar type otherwise. */
typedef struct attn_allocator {
    void *(*alloc)(void *user, size_t bytes);
    void (*free)(void *user, void *memory);
    void *user;
} attn_allocator;

/* Replace the allocator of the whole process (NULL: back to malloc and free). Call it before any other
 * function of the library and not while objects of the library are alive; it is not thread-safe. */
ATTN_API void attn_set_allocator(const attn_allocator *allocator);

/* Scratch memory that grows in blocks and is released as a whole. One arena serves one call at a time. */
typedef struct attn_arena attn_arena;

/* bytes: size of the first block, 0 for a default. *arena is set to NULL on failure (ATTN_ERR_MEMORY). */
ATTN_API attn_status attn_arena_create(attn_arena **arena, size_t bytes);
ATTN_API void attn_arena_destroy(attn_arena *arena); /* NULL is ignored */
/* Forget all contents, keep the memory. Blocks are merged into one, so that a steady state does not allocate. */
ATTN_API void attn_arena_reset(attn_arena *arena);
/* 64-byte aligned memory, not zeroed, valid until reset, release or destroy; NULL on failure. */
ATTN_API void *attn_arena_alloc(attn_arena *arena, size_t bytes);
/* Bytes that the arena holds from the allocator. */
ATTN_API size_t attn_arena_capacity(const attn_arena *arena);

/* How a call runs. Zero-initialise for the defaults. */
typedef struct attn_exec {
    int threads;       /* OpenMP threads; 0: as many as OpenMP would use. Results do not depend on it. */
    attn_arena *arena; /* scratch memory to reuse; NULL: the call makes and frees its own */
} attn_exec;

#ifdef __cplusplus
}
#endif
#endif
