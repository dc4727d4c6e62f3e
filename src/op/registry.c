/* The list of all mechanisms, and attn_op objects. A new mechanism is one line here. */
#include "op/class.h"

#include <string.h>

/* In alphabetical order of the names; '.' comes before letters and '_' (tests/test_op.c checks). */
#define MECHANISMS(X)              \
    X(agent)                       \
    X(agent_bias)                  \
    X(agent_layer)                 \
    X(agent_merge)                 \
    X(bam)                         \
    X(bam_ffn)                     \
    X(bam_moa)                     \
    X(bam_upcycle)                 \
    X(based)                       \
    X(based_conv)                  \
    X(based_decode)                \
    X(based_layer)                 \
    X(based_window)                \
    X(davit_block)                 \
    X(davit_channel)               \
    X(davit_channel_block)         \
    X(davit_channel_layer)         \
    X(davit_embed)                 \
    X(davit_spatial_block)         \
    X(davit_window)                \
    X(davit_window_layer)          \
    X(dense)                       \
    X(disendiff)                   \
    X(disendiff_attention)         \
    X(disendiff_embed)             \
    X(disendiff_recon)             \
    X(disendiff_train)             \
    X(dsf)                         \
    X(dsf_attention)               \
    X(dsf_matrices)                \
    X(dsf_mqar)                    \
    X(dsf_qlstm)                   \
    X(dsf_qlstm_layer)             \
    X(dsf_rglru)                   \
    X(dsf_s6)                      \
    X(dsf_s6_layer)                \
    X(dsf_scan)                    \
    X(flexprefill)                 \
    X(flow)                        \
    X(flow_decode)                 \
    X(flow_layer)                  \
    X(halo)                        \
    X(halo_layer)                  \
    X(halo_rel_logits)             \
    X(lightning)                   \
    X(lightning_decode)            \
    X(lightning_slopes)            \
    X(moh)                         \
    X(moh_gates)                   \
    X(moh_norm_gates)              \
    X(moh_tuned)                   \
    X(mrsa)                        \
    X(mrsa_cfg)                    \
    X(mrsa_mask)                   \
    X(mrsa_noise)                  \
    X(neighborhood)                \
    X(neighborhood_av)             \
    X(neighborhood_mask)           \
    X(neighborhood_merge)          \
    X(neighborhood_permute)        \
    X(neighborhood_qk)             \
    X(neighborhood_simulate)       \
    X(rat)                         \
    X(rat_decode)                  \
    X(rat_hybrid)                  \
    X(rat_layer)                   \
    X(rat_local)                   \
    X(rat_scan)                    \
    X(rcmha)                       \
    X(rcmha_core)                  \
    X(rcmha_dconv)                 \
    X(retrieval_head)              \
    X(retrieval_head_insert)       \
    X(retrieval_head_locate)       \
    X(retrieval_head_mask)         \
    X(retrieval_head_rank)         \
    X(retrieval_head_recall)       \
    X(softpag)                     \
    X(softpag_guide)               \
    X(softpag_hunt)                \
    X(softpag_select)              \
    X(streaming)                   \
    X(tnl)                         \
    X(tnl_attention)               \
    X(tnl_decode)                  \
    X(tnl_lrpe)                    \
    X(tnl_model)                   \
    X(tnl_sglu)                    \
    X(tnl_srmsnorm)                \
    X(topk)                        \
    X(topk_blocks)

#define DECLARE(name) extern const attn_op_class attn_op_##name;
MECHANISMS(DECLARE)

#define REFER(name) &attn_op_##name,
static const attn_op_class *const classes[] = {MECHANISMS(REFER) NULL};

#define CLASS_COUNT ((int)(sizeof classes / sizeof classes[0]) - 1)

struct attn_op {
    const attn_op_class *cls;
    void *params;
};

int attn_op_count(void) { return CLASS_COUNT; }

const attn_op_info *attn_op_at(int index)
{
    return index >= 0 && index < CLASS_COUNT ? &classes[index]->info : NULL;
}

const attn_op_class *attn_op_class_find(const char *name)
{
    int low = 0, high = CLASS_COUNT - 1;
    while (low <= high) {
        int middle = (low + high) / 2;
        int order = strcmp(name, classes[middle]->info.name);
        if (order == 0) {
            return classes[middle];
        }
        if (order < 0) {
            high = middle - 1;
        } else {
            low = middle + 1;
        }
    }
    return NULL;
}

const attn_op_info *attn_op_find(const char *name)
{
    const attn_op_class *cls = attn_op_class_find(name);
    return cls != NULL ? &cls->info : NULL;
}

/* The name that shares the longest beginning with the wrong one, as a suggestion. */
static const char *nearest(const char *name)
{
    const char *best = NULL;
    size_t best_length = 0;
    for (int i = 0; i < CLASS_COUNT; i++) {
        size_t length = 0;
        while (name[length] != '\0' && name[length] == classes[i]->info.name[length]) {
            length++;
        }
        if (length > best_length) {
            best = classes[i]->info.name;
            best_length = length;
        }
    }
    return best;
}

static attn_status op_create(attn_op **op, const char *name, const char *text, int is_json)
{
    *op = NULL;
    const attn_op_class *cls = attn_op_class_find(name);
    if (cls == NULL) {
        const char *near = nearest(name);
        return attn_fail(ATTN_ERR_ARGUMENT, "there is no mechanism '%.80s'%s%s%s", name, near ? " (did you mean '" : "",
                         near ? near : "", near ? "'?)" : "");
    }
    attn_op *made = attn_alloc(sizeof *made);
    if (made == NULL) {
        return attn_fail_memory(sizeof *made);
    }
    made->cls = cls;
    attn_status status =
        is_json ? attn_params_create_json(&made->params, cls, text) : attn_params_create(&made->params, cls, text);
    if (status != ATTN_OK) {
        attn_free(made);
        return status;
    }
    *op = made;
    return ATTN_OK;
}

attn_status attn_op_create(attn_op **op, const char *spec)
{
    *op = NULL;
    char name[128];
    size_t length = strcspn(spec, ":");
    if (length == 0 || length >= sizeof name) {
        return attn_fail(ATTN_ERR_ARGUMENT, "mechanism '%.80s': expected name or name:key=value,key=value", spec);
    }
    memcpy(name, spec, length);
    name[length] = '\0';
    return op_create(op, name, spec[length] == ':' ? spec + length + 1 : "", 0);
}

attn_status attn_op_create_json(attn_op **op, const char *name, const char *json)
{
    return op_create(op, name, json != NULL ? json : "{}", 1);
}

void attn_op_destroy(attn_op *op)
{
    if (op != NULL) {
        attn_params_destroy(op->params, op->cls);
        attn_free(op);
    }
}

const attn_op_info *attn_op_get_info(const attn_op *op) { return &op->cls->info; }

const attn_op_class *attn_op_class_of(const attn_op *op) { return op->cls; }

const void *attn_op_params(const attn_op *op) { return op->params; }
