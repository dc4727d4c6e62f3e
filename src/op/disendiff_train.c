/* The rest of DisenDiff's training (arXiv:2403.18551): masked reconstruction loss, and an embedding whose gradient reaches modifiers only. */
#include "op/class.h"

#include <string.h>

/* ---- disendiff.recon ---- */

enum { RECON_PRED, RECON_TARGET, RECON_MASK, RECON_LOSS };

static const attn_port_info recon_ports[] = {
    ATTN_IN("pred", "B,Ch,h,w", FLOAT, ATTN_PORT_DIFF, "prediction"),
    ATTN_IN("target", "B,Ch,h,w", FLOAT, 0, "what it should be"),
    ATTN_IN("mask", "B,1,h,w", FLOAT, 0, "weight of each position"),
    ATTN_OUT("loss", "1", FLOAT, ATTN_PORT_DIFF | ATTN_PORT_NO_BACKWARD, "masked squared error"),
};

static double mask_area(const attn_call *call, int64_t b, int64_t cells)
{
    double area = 0;
    for (int64_t i = 0; i < cells; i++) {
        area += (double)attn_f32(call->t[RECON_MASK])[b * cells + i];
    }
    return area;
}

/* backward: the gradient instead of the loss. */
static attn_status recon_run(attn_call *call, int backward)
{
    int64_t batch = attn_dim(call, "B"), channels = attn_dim(call, "Ch"), cells = attn_dim(call, "h") * attn_dim(call, "w");
    const float *pred = attn_f32(call->t[RECON_PRED]), *target = attn_f32(call->t[RECON_TARGET]);
    const float *mask = attn_f32(call->t[RECON_MASK]);
    float *grad = backward ? attn_f32(call->grad[RECON_PRED]) : NULL;
    double loss = 0;
    for (int64_t b = 0; b < batch; b++) {
        double area = mask_area(call, b, cells);
        if (!(area > 0)) {
            return attn_fail(ATTN_ERR_ARGUMENT, "mask of sample %lld has no area", (long long)b);
        }
        double sum = 0, share = 1 / (area * (double)batch);
        for (int64_t i = 0; i < channels * cells; i++) {
            int64_t at = b * channels * cells + i;
            double error = (double)pred[at] - (double)target[at], weight = (double)mask[b * cells + i % cells];
            sum += error * error * weight;
            if (grad != NULL) {
                grad[at] = (float)((double)attn_f32(call->grad[RECON_LOSS])[0] * 2 * error * weight * share);
            }
        }
        loss += sum * share;
    }
    if (!backward) {
        attn_f32(call->t[RECON_LOSS])[0] = (float)loss;
    }
    return ATTN_OK;
}

static attn_status recon_forward(attn_call *call) { return recon_run(call, 0); }

static attn_status recon_backward(attn_call *call) { return recon_run(call, 1); }

const attn_op_class attn_op_disendiff_recon = {
    .info = {.name = "disendiff.recon",
             .title = "Masked reconstruction loss",
             .summary = "Per sample the masked squared error, summed over channels, divided by the mask's area; averaged over the batch.",
             .paper = "arXiv:2403.18551",
             .differentiable = 1,
             ATTN_TABLE_NO_PARAMS(recon_ports)},
    .forward = recon_forward,
    .backward = recon_backward,
};

/* ---- disendiff.embed ---- */

enum { EMBED_TABLE, EMBED_IDS, EMBED_MODIFIERS, EMBED_O };

static const attn_port_info embed_ports[] = {
    ATTN_IN("table", "V,C", FLOAT, ATTN_PORT_DIFF, "embedding rows"),
    ATTN_IN("ids", "B,T", INT, 0, "token ids"),
    ATTN_IN("modifiers", "n", INT, 0, "ids whose rows get a gradient"),
    ATTN_OUT("o", "B,T,C", FLOAT, ATTN_PORT_DIFF | ATTN_PORT_NO_BACKWARD, "the rows of the ids"),
};

static attn_status check_ids(const attn_tensor *ids, const char *name, int64_t rows)
{
    for (int64_t i = 0; i < attn_tensor_count(ids); i++) {
        if (attn_i64(ids)[i] < 0 || attn_i64(ids)[i] >= rows) {
            return attn_fail(ATTN_ERR_ARGUMENT, "%s[%lld] = %lld: expected an id in 0 ... %lld", name, (long long)i,
                             (long long)attn_i64(ids)[i], (long long)(rows - 1));
        }
    }
    return ATTN_OK;
}

static attn_status check_all_ids(const attn_call *call)
{
    ATTN_TRY(check_ids(call->t[EMBED_IDS], "ids", attn_dim(call, "V")));
    return check_ids(call->t[EMBED_MODIFIERS], "modifiers", attn_dim(call, "V"));
}

static attn_status embed_forward(attn_call *call)
{
    int64_t width = attn_dim(call, "C");
    ATTN_TRY(check_all_ids(call));
    for (int64_t i = 0; i < attn_tensor_count(call->t[EMBED_IDS]); i++) {
        memcpy(attn_f32(call->t[EMBED_O]) + i * width, attn_f32(call->t[EMBED_TABLE]) + attn_i64(call->t[EMBED_IDS])[i] * width,
               (size_t)width * sizeof(float));
    }
    return ATTN_OK;
}

static attn_status embed_backward(attn_call *call)
{
    int64_t width = attn_dim(call, "C"), count = attn_tensor_count(call->t[EMBED_MODIFIERS]);
    float *grad = attn_f32(call->grad[EMBED_TABLE]);
    ATTN_TRY(check_all_ids(call));
    for (int64_t i = 0; i < attn_tensor_count(call->t[EMBED_IDS]) && grad != NULL; i++) {
        int64_t id = attn_i64(call->t[EMBED_IDS])[i];
        int moves = 0;
        for (int64_t j = 0; j < count; j++) {
            moves |= attn_i64(call->t[EMBED_MODIFIERS])[j] == id;
        }
        for (int64_t c = 0; c < width && moves; c++) {
            grad[id * width + c] += attn_f32(call->grad[EMBED_O])[i * width + c];
        }
    }
    return ATTN_OK;
}

const attn_op_class attn_op_disendiff_embed = {
    .info = {.name = "disendiff.embed",
             .title = "Embedding whose gradient reaches modifiers only",
             .summary = "Looks up rows of a table; in backward only the modifiers' rows get a gradient.",
             .paper = "arXiv:2403.18551",
             .differentiable = 1,
             ATTN_TABLE_NO_PARAMS(embed_ports)},
    .forward = embed_forward,
    .backward = embed_backward,
};
