/* Tokenizers of language models: text to token ids and back.
 *
 * Kinds: byte-level BPE ("gpt2" in GGUF files) with the pre-tokenizers that models name, and SentencePiece-style vocabularies
 * ("llama": pairs merged by score; "t5": unigram by Viterbi) with byte fallback.
 */
#ifndef ATTN_TOKENIZER_H
#define ATTN_TOKENIZER_H

#include <attn/gguf.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct attn_tokenizer attn_tokenizer;

typedef enum attn_token_type {
    ATTN_TOKEN_NORMAL = 1,
    ATTN_TOKEN_UNKNOWN = 2,
    ATTN_TOKEN_CONTROL = 3,      /* <|im_end|>: found in text only when asked for, gives no text */
    ATTN_TOKEN_USER_DEFINED = 4, /* always found in text, before anything else */
    ATTN_TOKEN_UNUSED = 5,
    ATTN_TOKEN_BYTE = 6          /* <0x0A> */
} attn_token_type;

/* A vocabulary as plain arrays; everything is copied. Missing ids are -1. */
typedef struct attn_tokenizer_data {
    const char *model;             /* "gpt2", "llama" or "t5" */
    const char *pre;               /* pre-tokenizer of "gpt2": "default", "gpt-2", "smollm", "llama-bpe", "qwen2" ...; NULL: default */
    int64_t count;                 /* tokens, 1 ... 2^24 */
    const attn_gguf_string *texts; /* [count], as the model file spells them */
    const float *scores;           /* [count], for "llama" and "t5" */
    const int32_t *types;          /* [count] attn_token_type; NULL: all normal */
    const attn_gguf_string *merges; /* [merge_count] "left right", best first, for "gpt2" */
    int64_t merge_count;
    int64_t bos, eos, eot, unknown;
    int add_bos, add_eos, add_space_prefix;
    attn_gguf_string chat_template; /* text NULL: none */
} attn_tokenizer_data;

/* ATTN_ERR_FORMAT says what is wrong with the vocabulary, ATTN_ERR_UNSUPPORTED names an unknown model or pre-tokenizer. */
ATTN_API attn_status attn_tokenizer_create(attn_tokenizer **tokenizer, const attn_tokenizer_data *data);
ATTN_API attn_status attn_tokenizer_from_gguf(attn_tokenizer **tokenizer, const attn_gguf *file);
ATTN_API void attn_tokenizer_destroy(attn_tokenizer *tokenizer); /* NULL is ignored */

ATTN_API int64_t attn_tokenizer_count(const attn_tokenizer *tokenizer);
ATTN_API int32_t attn_tokenizer_bos(const attn_tokenizer *tokenizer); /* -1 when there is none */
ATTN_API int32_t attn_tokenizer_eos(const attn_tokenizer *tokenizer);
/* Whether generation ends with this token (end of text, end of turn). */
ATTN_API int attn_tokenizer_is_end(const attn_tokenizer *tokenizer, int32_t token);
/* Id of the token with exactly this text as the model file spells it; -1 when there is none. */
ATTN_API int32_t attn_tokenizer_find(const attn_tokenizer *tokenizer, const char *text);

enum {
    ATTN_TOKENIZE_SPECIAL = 1, /* add the begin (and end) token that the model asks for */
    ATTN_TOKENIZE_PARSE = 2    /* text like "<|im_start|>" becomes that control token; a text that begins with the begin
                                * token gets no second one */
};

/* Tokens of a text into memory that attn_tokens_free() frees. Any bytes are accepted: what is not UTF-8 goes through the
 * vocabulary's bytes. One tokenizer serves any number of threads. */
ATTN_API attn_status attn_tokenize(const attn_tokenizer *tokenizer, const char *text, size_t bytes, int flags, int32_t **tokens,
                                   int64_t *count);
ATTN_API void attn_tokens_free(int32_t *tokens);

/* The bytes that a token stands for, valid as long as the tokenizer; *bytes is 0 for control tokens and ids out of range, unless
 * `special` asks for their names. They need not be whole UTF-8 characters. */
ATTN_API const char *attn_token_text(const attn_tokenizer *tokenizer, int32_t token, int special, size_t *bytes);

/* A template of chats: who says what, as the model was trained. */
typedef struct attn_chat_message {
    const char *role; /* "system", "user" or "assistant" */
    const char *text;
} attn_chat_message;

/* The messages as the model's chat template renders them, ready to be tokenized with ATTN_TOKENIZE_PARSE; with `reply` followed by the
 * beginning of the assistant's answer. *text is freed with attn_text_free(). Known are the templates of the ChatML, Gemma and Llama 3
 * families; ATTN_ERR_UNSUPPORTED says so for others, and when the model has none. */
ATTN_API attn_status attn_chat_render(const attn_tokenizer *tokenizer, const attn_chat_message *messages, int count, int reply,
                                      char **text);
ATTN_API void attn_text_free(char *text);

#ifdef __cplusplus
}
#endif
#endif
