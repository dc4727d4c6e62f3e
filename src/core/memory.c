/* The replaceable allocator and arenas. */
#include "core/internal.h"

#include <omp.h>
#include <stdlib.h>
#include <string.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#define ALIGNMENT 64
#define HUGE_PAGE ((size_t)2 << 20)

static void *default_alloc(void *user, size_t bytes)
{
    (void)user;
    void *memory = malloc(bytes);
#if defined(MADV_HUGEPAGE)
    /* Caches, weights and scratch are read in long runs or row by row anywhere: with 4 KiB pages looking up addresses costs more than
     * half of the time of the second kind. Only advice, so that a refusal changes nothing. */
    if (memory != NULL && bytes >= 4 * HUGE_PAGE) {
        uintptr_t first = ((uintptr_t)memory + HUGE_PAGE - 1) & ~(uintptr_t)(HUGE_PAGE - 1);
        uintptr_t end = ((uintptr_t)memory + bytes) & ~(uintptr_t)(HUGE_PAGE - 1);
        (void)madvise((void *)first, end - first, MADV_HUGEPAGE);
    }
#endif
    return memory;
}

static void default_free(void *user, void *memory)
{
    (void)user;
    free(memory);
}

static attn_allocator current = {default_alloc, default_free, NULL};

void attn_set_allocator(const attn_allocator *allocator)
{
    if (allocator != NULL) {
        current = *allocator;
    } else {
        current = (attn_allocator){default_alloc, default_free, NULL};
    }
}

/* The start of the underlying block is kept just below the aligned address. */
void *attn_alloc(size_t bytes)
{
    if (bytes > SIZE_MAX - ALIGNMENT - sizeof(void *)) {
        return NULL;
    }
    void *block = current.alloc(current.user, bytes + ALIGNMENT + sizeof(void *));
    if (block == NULL) {
        return NULL;
    }
    uintptr_t address = ((uintptr_t)block + sizeof(void *) + ALIGNMENT - 1) & ~(uintptr_t)(ALIGNMENT - 1);
    memcpy((char *)address - sizeof(void *), &block, sizeof block);
    return (void *)address;
}

void attn_free(void *memory)
{
    if (memory != NULL) {
        void *block;
        memcpy(&block, (char *)memory - sizeof(void *), sizeof block);
        current.free(current.user, block);
    }
}

static int product_overflows(size_t count, size_t size)
{
    return size != 0 && count > SIZE_MAX / size;
}

void *attn_alloc_array(size_t count, size_t size)
{
    return product_overflows(count, size) ? NULL : attn_alloc(count * size);
}

void *attn_calloc_array(size_t count, size_t size)
{
    void *memory = attn_alloc_array(count, size);
    if (memory != NULL) {
        memset(memory, 0, count * size);
    }
    return memory;
}

void *attn_realloc(void *memory, size_t old_bytes, size_t new_bytes)
{
    void *moved = attn_alloc(new_bytes);
    if (moved != NULL && memory != NULL) {
        memcpy(moved, memory, old_bytes < new_bytes ? old_bytes : new_bytes);
        attn_free(memory);
    }
    return moved;
}

char *attn_strdup(const char *text)
{
    size_t bytes = strlen(text) + 1;
    char *copy = attn_alloc(bytes);
    if (copy != NULL) {
        memcpy(copy, text, bytes);
    }
    return copy;
}

#define MOST_GROWTH ((size_t)16 << 20)

typedef struct block {
    struct block *previous;
    size_t capacity; /* bytes after the header, which takes ALIGNMENT bytes */
    size_t used;
} block;

struct attn_arena {
    block *top;
    block *spare; /* the largest one that a release has emptied, or NULL */
    size_t capacity;
    size_t peak; /* the most that was in use at a time, as far as releases and resets have seen */
    int calls; /* that use it at the moment, one inside the other */
};

_Static_assert(sizeof(block) <= ALIGNMENT, "the header must fit in one alignment unit");

static block *block_create(size_t capacity)
{
    if (capacity > SIZE_MAX - ALIGNMENT) {
        return NULL;
    }
    block *made = attn_alloc(capacity + ALIGNMENT);
    if (made != NULL) {
        *made = (block){NULL, capacity, 0};
    }
    return made;
}

attn_status attn_arena_create(attn_arena **arena, size_t bytes)
{
    *arena = NULL;
    size_t first = bytes > 0 ? bytes : (size_t)1 << 16;
    attn_arena *made = attn_alloc(sizeof *made);
    if (made == NULL) {
        return attn_fail_memory(sizeof *made);
    }
    made->top = block_create(first);
    if (made->top == NULL) {
        attn_free(made);
        return attn_fail_memory(first);
    }
    made->spare = NULL;
    made->peak = 0;
    made->capacity = first;
    made->calls = 0;
    *arena = made;
    return ATTN_OK;
}

static void blocks_free(block *top)
{
    while (top != NULL) {
        block *previous = top->previous;
        attn_free(top);
        top = previous;
    }
}

void attn_arena_destroy(attn_arena *arena)
{
    if (arena != NULL) {
        blocks_free(arena->top);
        attn_free(arena->spare);
        attn_free(arena);
    }
}

static void note_peak(attn_arena *arena)
{
    size_t used = 0;
    for (const block *b = arena->top; b != NULL; b = b->previous) {
        used += b->used;
    }
    arena->peak = used > arena->peak ? used : arena->peak;
}

void attn_arena_reset(attn_arena *arena)
{
    note_peak(arena);
    if (arena->top->previous != NULL || arena->spare != NULL) {
        /* Merge; when that is refused the smallest block alone remains. The others go first, so that they do not add up with the new one. */
        block *least = arena->top;
        attn_free(arena->spare);
        for (block *b = least->previous, *previous; b != NULL; b = previous) {
            block *larger = b->capacity < least->capacity ? least : b;
            previous = b->previous;
            least = larger == b ? least : b;
            attn_free(larger);
        }
        arena->spare = NULL;
        arena->top = least;
        least->previous = NULL;
        block *merged = block_create(arena->peak);
        if (merged != NULL) {
            attn_free(arena->top);
            arena->top = merged;
        }
        arena->capacity = arena->top->capacity;
    }
    arena->top->used = 0;
}

void *attn_arena_alloc(attn_arena *arena, size_t bytes)
{
    if (bytes > SIZE_MAX / 2) {
        return NULL;
    }
    size_t rounded = (bytes + ALIGNMENT - 1) & ~(size_t)(ALIGNMENT - 1);
    block *top = arena->top;
    if (rounded > top->capacity - top->used && arena->spare != NULL && rounded <= arena->spare->capacity) {
        arena->spare->previous = top;
        arena->top = top = arena->spare;
        arena->spare = NULL;
    } else if (rounded > top->capacity - top->used) {
        /* Twice the last block, so that there are few of them; not above a size whose waste would count. */
        size_t twice = 2 * top->capacity < MOST_GROWTH ? 2 * top->capacity : MOST_GROWTH;
        size_t capacity = rounded > twice ? rounded : twice;
        block *made = block_create(capacity);
        if (made == NULL && capacity > rounded) {
            capacity = rounded;
            made = block_create(capacity);
        }
        if (made == NULL) {
            return NULL;
        }
        made->previous = top;
        arena->top = top = made;
        arena->capacity += capacity;
    }
    void *memory = (char *)top + ALIGNMENT + top->used;
    top->used += rounded;
    return memory;
}

void *attn_arena_array(attn_arena *arena, size_t count, size_t size)
{
    return product_overflows(count, size) ? NULL : attn_arena_alloc(arena, count * size);
}

size_t attn_arena_capacity(const attn_arena *arena) { return arena->capacity; }

attn_arena_mark attn_arena_get_mark(attn_arena *arena)
{
    return (attn_arena_mark){arena->top, arena->top->used};
}

void attn_arena_release(attn_arena *arena, attn_arena_mark mark)
{
    note_peak(arena);
    while (arena->top != mark.block) {
        block *emptied = arena->top, *smaller = arena->spare;
        arena->top = emptied->previous;
        if (smaller == NULL || emptied->capacity > smaller->capacity) {
            emptied->used = 0;
            arena->spare = emptied;
        } else {
            smaller = emptied;
        }
        if (smaller != NULL) {
            arena->capacity -= smaller->capacity;
            attn_free(smaller);
        }
    }
    arena->top->used = mark.used;
}

#define CACHE_LINE 64
#define NEAR_BYTES 16384 /* more than this is asked for to the second-level cache only: it would push out what is worked on */

/* Without the empty statement GCC takes these functions for ones without effect, and drops each call of them that it can see through. */
#define PREFETCH(name, level)                                                                                          \
    void name(const void *row, ptrdiff_t stride, int64_t rows, size_t bytes)                                           \
    {                                                                                                                  \
        const char *at = row;                                                                                          \
        for (int64_t r = 0; r < rows; r++, at += stride) {                                                             \
            for (size_t i = 0; i < bytes; i += CACHE_LINE) {                                                           \
                __builtin_prefetch(at + i, 0, level);                                                                  \
            }                                                                                                          \
        }                                                                                                              \
        __asm__ volatile("");                                                                                          \
    }
PREFETCH(attn_prefetch, 3)
PREFETCH(attn_prefetch_ahead, 2)

void attn_ahead_share(attn_ahead *ahead)
{
    size_t share = (size_t)ahead->share, shares = (size_t)ahead->shares, all = 0;
    for (int i = 0; i < ahead->count; i++) {
        all += ahead->ranges[i].bytes;
    }
    for (int i = 0; i < ahead->count && share < shares; i++) {
        size_t lines = (ahead->ranges[i].bytes + CACHE_LINE - 1) / CACHE_LINE, end = lines * (share + 1) / shares;
        for (size_t line = lines * share / shares; line < end; line++) {
            const char *at = (const char *)ahead->ranges[i].at + line * CACHE_LINE;
            if (all > NEAR_BYTES) {
                __builtin_prefetch(at, 0, 2);
            } else {
                __builtin_prefetch(at, 0, 3);
            }
        }
    }
    ahead->share++;
}

int attn_exec_threads(const attn_exec *exec)
{
    return exec != NULL && exec->threads > 0 ? exec->threads : omp_get_max_threads();
}

attn_status attn_scratch_begin(attn_scratch *scratch, const attn_exec *exec)
{
    scratch->owned = exec == NULL || exec->arena == NULL;
    if (scratch->owned) {
        ATTN_TRY(attn_arena_create(&scratch->arena, 0));
    } else {
        scratch->arena = exec->arena;
    }
    scratch->mark = attn_arena_get_mark(scratch->arena);
    scratch->arena->calls++;
    return ATTN_OK;
}

void attn_scratch_end(attn_scratch *scratch)
{
    int outermost = --scratch->arena->calls == 0;
    if (scratch->owned) {
        attn_arena_destroy(scratch->arena);
    } else if (outermost && ((block *)scratch->mark.block)->previous == NULL && scratch->mark.used == 0) {
        /* Keeps the memory for the next call. Only the outermost one may: the others' marks are in the same block. */
        attn_arena_reset(scratch->arena);
    } else {
        attn_arena_release(scratch->arena, scratch->mark);
    }
}
