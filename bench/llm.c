/* Speed of a language model: prompt processing and generation, by length of the context.
 *
 *     bench_llm MODEL.gguf [--threads N] [--cache f32|f16|bf16|i8] [--chunk N] [--lengths 512,2048,8000]
 *
 * The tokens are arbitrary (speed does not depend on which). Best of three for prompts, of runs of 16 tokens for
 * generation. */
#include "bench.h"
#include <attn/model.h>

#define LENGTHS 8
#define RUN 16 /* tokens generated per measurement */

static void measure(attn_context *context, const int32_t *tokens, int64_t length)
{
    double prompt = 1e30, generation = 1e30;
    attn_context_stats stats = {0};
    for (int repeat = 0; repeat < 3; repeat++) {
        bench_must(attn_context_truncate(context, 0, 0));
        attn_context_reset_stats(context);
        attn_context_batch batch = {0, tokens, length};
        double start = bench_now(0);
        bench_must(attn_context_eval(context, &batch, 1, NULL, NULL));
        double seconds = bench_now(0) - start;
        if (seconds < prompt) {
            prompt = seconds;
            stats = attn_context_get_stats(context);
        }
    }
    for (int repeat = 0; repeat < 5; repeat++) {
        double start = bench_now(0);
        for (int i = 0; i < RUN; i++) {
            attn_context_batch batch = {0, tokens + i, 1};
            bench_must(attn_context_eval(context, &batch, 1, NULL, NULL));
        }
        double seconds = (bench_now(0) - start) / RUN;
        generation = seconds < generation ? seconds : generation;
    }
    printf("%8lld %10.0f %10.1f %12.0f%% %9.0f%% %12.1f %10.2f\n", (long long)length, (double)length / prompt,
           1 / generation, 100 * stats.attention_seconds / stats.seconds, 100 * stats.linear_seconds / stats.seconds,
           stats.attention_flops / stats.attention_seconds / 1e9, (double)stats.cache_bytes / 1048576);
    fflush(stdout);
}

int main(int count, char **arguments)
{
    attn_context_settings settings = {.cache = ATTN_F16};
    int64_t lengths[LENGTHS] = {128, 512, 2048, 8000}, most = 0, threads = 0, chunk = 0;
    int length_count = 4;
    const char *cache = NULL, *wanted = NULL, *usage = "bench_llm MODEL.gguf [--threads N] [--cache TYPE] [--chunk N] [--lengths A,B,...]";
    const bench_option options[] = {BENCH_THREADS(threads), {.name = "--chunk", .number = &chunk, .most = INT32_MAX},
                                    {.name = "--cache", .word = &cache}, {.name = "--lengths", .word = &wanted}};
    if (bench_options(count, arguments, usage, 1, options, 4) == 0) {
        fprintf(stderr, "usage: %s\n", usage);
        return 2;
    }
    settings.threads = (int)threads;
    settings.chunk = chunk;
    if (cache != NULL) {
        bench_must(attn_dtype_parse(cache, &settings.cache));
    }
    if (wanted != NULL) {
        length_count = 0;
        for (const char *at = wanted; at != NULL && length_count < LENGTHS; at = strchr(at, ','), at += at != NULL) {
            lengths[length_count++] = atoll(at);
        }
    }
    for (int i = 0; i < length_count; i++) {
        if (lengths[i] < 1) {
            fprintf(stderr, "--lengths: expected numbers from 1 on, not '%s'\n", wanted);
            return 2;
        }
        most = lengths[i] > most ? lengths[i] : most;
    }
    double start = bench_now(0);
    attn_model *model;
    bench_must(attn_model_open(&model, arguments[0], NULL));
    const attn_model_info *info = attn_model_get_info(model);
    printf("%s: %lld layers, weights %.1f MiB, opened in %.2f s\n", info->architecture, (long long)info->layers,
           (double)info->weight_bytes / 1048576, bench_now(0) - start);
    settings.length = most + 5 * RUN;
    attn_context *context;
    bench_must(attn_context_create(&context, model, &settings));
    int32_t *tokens = malloc((size_t)(most + RUN) * sizeof *tokens);
    if (tokens == NULL) {
        return 1;
    }
    for (int64_t i = 0; i < most + RUN; i++) {
        tokens[i] = (int32_t)((i * 7919 + 13) % info->vocabulary);
    }
    printf("  length   prompt/s generate/s attention time   linear attn GFLOP/s  cache MiB\n");
    for (int i = 0; i < length_count; i++) {
        measure(context, tokens, lengths[i]);
    }
    free(tokens);
    attn_context_destroy(context);
    attn_model_close(model);
    return 0;
}
