/* Inside of tokenizers. */
#ifndef ATTN_LLM_TOKENIZER_H
#define ATTN_LLM_TOKENIZER_H

#include "core/internal.h"
#include <attn/tokenizer.h>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

/* Bytes to ids, open addressing. Keys point into the tokenizer's own texts. */
typedef struct token_map {
    int32_t *slots; /* id + 1, 0 empty */
    uint64_t mask;
} token_map;

typedef struct merge_entry {
    int32_t left, right, rank, merged; /* rank -1: empty */
} merge_entry;

typedef enum token_model { MODEL_BPE, MODEL_SPM, MODEL_UNIGRAM } token_model;

#define PATTERN_LIMIT 3

struct attn_tokenizer {
    token_model model;
    int64_t count;
    char *bytes;                 /* all texts, as bytes that they stand for */
    uint32_t *offsets;           /* [count + 1] into bytes */
    char *names;                 /* all texts, as the file spells them */
    uint32_t *name_offsets;
    float *scores;
    uint8_t *types;
    token_map map;               /* of what tokens stand for: normal, user-defined and byte tokens */
    token_map name_map;
    merge_entry *merges;
    uint64_t merge_mask;
    int32_t byte_tokens[256];    /* -1 where there is none */
    int32_t bos, eos, eot, unknown;
    int add_bos, add_eos, add_space_prefix;
    int whole_words;             /* of byte-level BPE: a word that is a token is not merged from its bytes */
    int32_t *specials;           /* control and user-defined tokens, longest first within a first byte */
    int32_t special_first[257];
    float lowest_score;
    size_t longest;              /* bytes of the longest token */
    pcre2_code *patterns[PATTERN_LIMIT];
    int pattern_count;
    char *chat_template;
};

static inline const char *token_bytes(const attn_tokenizer *t, int32_t id) { return t->bytes + t->offsets[id]; }
static inline size_t token_length(const attn_tokenizer *t, int32_t id) { return t->offsets[id + 1] - t->offsets[id]; }

/* Id of the token that stands for these bytes, -1 when there is none. */
int32_t attn_token_map_find(const attn_tokenizer *t, const token_map *map, const char *text, size_t length);

/* Growing list of tokens. */
typedef struct token_list {
    int32_t *items;
    int64_t count, room;
} token_list;
attn_status attn_token_list_add(token_list *list, int32_t token);

/* Text without special tokens. tokenizer_bpe.c and tokenizer_spm.c. */
attn_status attn_bpe_patterns(attn_tokenizer *t, const char *pre);
/* Whether texts start with the begin token where the model file does not say. */
int attn_bpe_begins_texts(const char *pre);
attn_status attn_bpe_encode(const attn_tokenizer *t, const char *text, size_t length, token_list *out);
/* begin: the text begins a sentence (for the space prefix). */
attn_status attn_spm_encode(const attn_tokenizer *t, const char *text, size_t length, int begin, token_list *out);
const merge_entry *attn_find_merge(const attn_tokenizer *t, int32_t left, int32_t right);

/* A heap of merges that may be done, best first: lowest key, then leftmost. */
typedef struct merge_candidate {
    double key;
    int32_t left, right;         /* symbol numbers */
    int32_t merged;              /* the token that results */
    uint32_t left_size, right_size; /* to notice that a symbol has changed since */
} merge_candidate;
typedef struct merge_heap {
    merge_candidate *items;
    int64_t count, room;
} merge_heap;
attn_status attn_merge_heap_push(merge_heap *heap, merge_candidate candidate);
merge_candidate attn_merge_heap_pop(merge_heap *heap);

/* A symbol of a text that is being merged: a linked list over the text. */
typedef struct text_symbol {
    uint32_t start, size; /* bytes; size 0: merged away */
    int32_t previous, next, token;
} text_symbol;

/* Length of the UTF-8 character at the beginning of a text, 0 when it is not valid. */
int attn_utf8_length(const char *text, size_t length);

#endif
