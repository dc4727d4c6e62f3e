/* Experiments that reproduce, on this machine, what papers claim about their mechanisms and what needs no trained model.
 *
 * An experiment prints what it measures and ends in verdicts: a claim, the numbers, and whether it holds here.
 */
#ifndef ATTN_LAB_H
#define ATTN_LAB_H

#include <attn/status.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct attn_lab_info {
    const char *name;  /* of the mechanism that it is about: "based" */
    const char *title; /* one line */
    const char *paper;
} attn_lab_info;

ATTN_API int attn_lab_count(void);
/* In alphabetical order; NULL when out of range. Static memory. */
ATTN_API const attn_lab_info *attn_lab_at(int index);

/* Zero-initialise for the defaults. */
typedef struct attn_lab_settings {
    int small;   /* sizes that take a second instead of up to a minute; speed is then reported, not judged */
    int threads; /* 0: as many as OpenMP would use */
    void (*print)(void *user, const char *line); /* gets the report line by line; NULL: nobody does */
    void *user;
} attn_lab_settings;

typedef struct attn_lab_result {
    int claims; /* judged */
    int held;
} attn_lab_result;

/* settings may be NULL. ATTN_ERR_ARGUMENT names the experiments when there is none of this name. */
ATTN_API attn_status attn_lab_run(const char *name, const attn_lab_settings *settings, attn_lab_result *result);

#ifdef __cplusplus
}
#endif
#endif
