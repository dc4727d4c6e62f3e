/* What the mechanisms of DisenDiff share (arXiv:2403.18551): parameters, and the calibration of watched columns of attention maps. */
#ifndef ATTN_OP_DISENDIFF_H
#define ATTN_OP_DISENDIFF_H

#include "op/class.h"

typedef struct disendiff_params {
    attn_ints grid;
    int64_t kernel, power, freeze;
    double sigma, smooth, eps, scale;
} disendiff_params;

#define CALIBRATION_PARAMS                                                                                             \
    ATTN_P_LIST(INTS, "grid", disendiff_params, grid, NULL, 1, ATTN_MOST_EXTENT, 2, 2, "picture grid, gh*gw = N"),      \
        ATTN_P_INT("kernel", disendiff_params, kernel, "3", 1, INFINITY, "odd width of the smoothing window; 1 = off"),     \
        ATTN_P_FLOAT_OPEN("sigma", disendiff_params, sigma, "0.5", 0, 1, INFINITY, 0,                                   \
                          "weights are exp(-(d/(2*sigma))^2)"),                                                        \
        ATTN_P_INT("power", disendiff_params, power, "2", 1, INFINITY, "exponent on class maps; 1 = off"),                    \
        ATTN_P_FLOAT_OPEN("smooth", disendiff_params, smooth, "1.0", 0, 1, INFINITY, 0, "added to intersection and union"), \
        ATTN_P_FLOAT("eps", disendiff_params, eps, "1e-8", -INFINITY, INFINITY, "in the min-max division")
#define ATTENTION_PARAMS                                                                                               \
    ATTN_P_INT("freeze", disendiff_params, freeze, "1", 0, INFINITY, "keys and values of the first tokens get no gradient"), \
        ATTN_P_SCALE(disendiff_params, scale)
#define LOSS_PORTS                                                                                                     \
    ATTN_OUT("loss", "1", FLOAT, ATTN_PORT_DIFF | ATTN_PORT_NO_BACKWARD, "bind + separate"),                           \
        ATTN_OUT("bind", "1", FLOAT, ATTN_PORT_NO_BACKWARD, "how far modifiers look from their classes"),              \
        ATTN_OUT("separate", "1", FLOAT, ATTN_PORT_NO_BACKWARD, "overlap of different classes"),                       \
        ATTN_OUT("maps", "B,maps,gh,gw", FLOAT, ATTN_PORT_NO_BACKWARD, "C modifier maps, then C class maps, as compared")

/* The watched columns X [B, 2C, N]: the C modifiers, then their classes. */
typedef struct calibration {
    const disendiff_params *p;
    int64_t batch, concepts, gh, gw, active;
    const int64_t *modifier;
    double *weights; /* kernel */
    double *scratch; /* 2 N */
    double *columns, *grad_columns; /* [B, 2C, N], zeros at first */
} calibration;

/* In bind: checks grid and kernel, and sets the extents of `maps`. */
attn_status attn_disendiff_bind(attn_call *call);
/* Checks the positions; columns begin as zeros. */
attn_status attn_disendiff_begin(attn_call *call, const attn_tensor *modifier, calibration *c);
int attn_disendiff_is_active(const calibration *c, int64_t b);
/* Text position of watched column m (0 ... 2C-1) of sample b. */
int64_t attn_disendiff_column(const calibration *c, int64_t b, int64_t m);
/* Losses and maps from the columns, to the outputs from `first_port` on (loss, bind, separate, maps). */
attn_status attn_disendiff_loss(attn_call *call, calibration *c, int first_port);
/* grad_columns from the gradient of the loss. */
attn_status attn_disendiff_loss_backward(attn_call *call, calibration *c, double grad_loss);

#endif
