/* The framework of mechanisms: SPECs, tables, messages, conversion of types and layouts. */
#include <attn/op.h>

#include "opcheck.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

static void spec_fails(const char *spec, const char *words)
{
    attn_op *op;
    attn_status status = attn_op_create(&op, spec);
    if (status != ATTN_ERR_ARGUMENT || op != NULL || strstr(attn_last_error(), words) == NULL) {
        fail_msg("'%s': got '%s' (%s), expected an argument error with '%s'", spec, attn_status_name(status), attn_last_error(),
                 words);
    }
}

static void test_spec_errors_name_the_culprit(void **state)
{
    (void)state;
    spec_fails("", "name or name:key=value");
    spec_fails("densee", "did you mean 'dense");
    spec_fails("dense:caus=1", "no parameter 'caus' (it has causal, window, scale, softcap)");
    spec_fails("dense:causal", "expected key=value");
    spec_fails("dense:causal=2", "causal = 2: expected true or false");
    spec_fails("dense:causal=true,causal=false", "given twice");
    spec_fails("dense:window=[1]", "2 items");
    spec_fails("dense:window=[1,-2]", "window = [1,-2]: expected a list of whole numbers >= -1");
    spec_fails("dense:window=[1,2.5]", "whole numbers");
    spec_fails("lightning:block=1e20", "block = 1e+20: expected a whole number >= 1 and <= 9007199254740992");
    spec_fails("dsf.rglru:c=-1", "c = -1: expected a number >= 0");
    spec_fails("dense:softcap=-1", "softcap = -1: expected a number >= 0");
    spec_fails("dense:scale=abc", "scale = \"abc\"");
    spec_fails("dense:scale=1e999", "scale");
    spec_fails("disendiff:kernel=3", "parameter grid is required");
    spec_fails("softpag:target=nothing", "identity|uniform|query_mean|max|temperature");
    spec_fails("softpag:tau=0", "tau = 0: expected a number > 0");
    attn_op *op;
    assert_int_equal(attn_op_create_json(&op, "dense", "[1]"), ATTN_ERR_ARGUMENT);
    assert_int_equal(attn_op_create_json(&op, "dense", "{\"causal\": tru"), ATTN_ERR_ARGUMENT);
    assert_int_equal(attn_op_create_json(&op, "nothing", "{}"), ATTN_ERR_ARGUMENT);
}

static void test_good_specs(void **state)
{
    (void)state;
    const char *const specs[] = {"dense", "dense:", "dense:causal=true,window=[15,-1],softcap=2.5e1", "dense:scale=null",
                                 "softpag:target=query_mean,tokens=[0,4]", "disendiff:grid=[4,5]"};
    for (size_t i = 0; i < sizeof specs / sizeof specs[0]; i++) {
        attn_op *op;
        if (attn_op_create(&op, specs[i]) != ATTN_OK) {
            fail_msg("%s: %s", specs[i], attn_last_error());
        }
        attn_op_destroy(op);
    }
}

static void test_tables_are_sound(void **state)
{
    (void)state;
    assert_true(attn_op_count() > 0);
    assert_null(attn_op_at(-1));
    assert_null(attn_op_at(attn_op_count()));
    for (int i = 0; i < attn_op_count(); i++) {
        const attn_op_info *info = attn_op_at(i);
        if (i > 0 && strcmp(attn_op_at(i - 1)->name, info->name) >= 0) {
            fail_msg("'%s' comes before '%s' in the registry, but not in the alphabet", attn_op_at(i - 1)->name, info->name);
        }
        assert_ptr_equal(attn_op_find(info->name), info);
        if (info->title == NULL || info->summary == NULL || info->paper == NULL || info->title[0] == '\0' ||
            strlen(info->summary) < 20 || strchr(info->title, '\n') != NULL) {
            fail_msg("%s lacks a title, a summary or a paper", info->name);
        }
        int outputs = 0, differentiable = 0;
        for (int p = 0; p < info->port_count; p++) {
            const attn_port_info *port = &info->ports[p];
            if (port->help == NULL || port->help[0] == '\0') {
                fail_msg("%s: port %s has no help", info->name, port->name);
            }
            if (outputs > 0 && port->direction == ATTN_PORT_IN) {
                fail_msg("%s: input %s comes after an output", info->name, port->name);
            }
            for (int q = 0; q < p; q++) {
                if (info->ports[q].direction == port->direction && strcmp(info->ports[q].name, port->name) == 0) {
                    fail_msg("%s has two ports %s", info->name, port->name);
                }
            }
            outputs += port->direction == ATTN_PORT_OUT;
            differentiable |= port->direction == ATTN_PORT_OUT && (port->flags & ATTN_PORT_DIFF) != 0;
        }
        if (outputs == 0 || (info->differentiable && !differentiable)) {
            fail_msg("%s: %d outputs, differentiable %d but its ports say %d", info->name, outputs, info->differentiable,
                     differentiable);
        }
        for (int p = 0; p < info->param_count; p++) {
            if (info->params[p].help == NULL || info->params[p].help[0] == '\0') {
                fail_msg("%s: parameter %s has no help", info->name, info->params[p].name);
            }
        }
    }
}

#define SHAPE(...) (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), (int64_t[]){__VA_ARGS__}

static void test_call_errors(void **state)
{
    (void)state;
    opcheck_case missing = {.spec = "dense"};
    opcheck_input(&missing, "q", SHAPE(1, 2, 3, 4));
    opcheck_input(&missing, "k", SHAPE(1, 2, 3, 4));
    opcheck_fails(&missing, ATTN_ERR_ARGUMENT, "input v [B,Hkv,M,Dv] is missing");
    opcheck_case strange = {.spec = "dense"};
    opcheck_input(&strange, "q", SHAPE(1, 2, 3, 4));
    opcheck_input(&strange, "w", SHAPE(1, 2, 3, 4));
    opcheck_fails(&strange, ATTN_ERR_ARGUMENT, "dense has no input 'w' (it has q, k, v,");
    opcheck_case twice = {.spec = "dense"};
    opcheck_input(&twice, "q", SHAPE(1, 2, 3, 4));
    opcheck_input(&twice, "q", SHAPE(1, 2, 3, 4));
    opcheck_fails(&twice, ATTN_ERR_ARGUMENT, "given twice");
    opcheck_case shape = {.spec = "dense"};
    opcheck_input(&shape, "q", SHAPE(1, 2, 3, 4));
    opcheck_input(&shape, "k", SHAPE(1, 2, 5, 3));
    opcheck_input(&shape, "v", SHAPE(1, 2, 5, 4));
    opcheck_fails(&shape, ATTN_ERR_SHAPE, "k has shape [1, 2, 5, 3], expected [B,Hkv,M,D] with D = 4");
    opcheck_case rank = {.spec = "dense"};
    opcheck_input(&rank, "q", SHAPE(2, 3, 4));
    opcheck_input(&rank, "k", SHAPE(1, 2, 5, 4));
    opcheck_input(&rank, "v", SHAPE(1, 2, 5, 4));
    opcheck_fails(&rank, ATTN_ERR_SHAPE, "q has shape [2, 3, 4], expected [B,H,N,D]");
    opcheck_case heads = {.spec = "dense"};
    opcheck_input(&heads, "q", SHAPE(1, 3, 3, 4));
    opcheck_input(&heads, "k", SHAPE(1, 2, 5, 4));
    opcheck_input(&heads, "v", SHAPE(1, 2, 5, 4));
    opcheck_fails(&heads, ATTN_ERR_SHAPE, "3 query heads are not a multiple of 2 key/value heads");
    opcheck_case type = {.spec = "dense"};
    opcheck_whole(&type, "q", SHAPE(1, 2, 3, 4), 0, 1);
    opcheck_fails(&type, ATTN_ERR_DTYPE, "q has data type i64, expected f32, f16 or bf16");
}

static void test_outputs_without_data(void **state)
{
    (void)state;
    attn_op *op;
    assert_int_equal(attn_op_create(&op, "dense"), ATTN_OK);
    attn_named_tensor in[] = {{"q", attn_tensor_make(NULL, ATTN_F16, SHAPE(2, 4, 7, 8))},
                              {"k", attn_tensor_make(NULL, ATTN_F16, SHAPE(2, 2, 9, 8))},
                              {"v", attn_tensor_make(NULL, ATTN_F16, SHAPE(2, 2, 9, 5))}};
    attn_named_tensor out[4];
    int count = 4;
    assert_int_equal(attn_op_outputs(op, in, 3, out, &count), ATTN_OK);
    assert_int_equal(count, 2);
    assert_string_equal(out[0].name, "o");
    assert_int_equal(out[0].tensor.shape[3], 5);
    assert_int_equal(out[1].tensor.ndim, 3);
    count = 1;
    assert_int_equal(attn_op_outputs(op, in, 3, out, &count), ATTN_ERR_ARGUMENT);
    attn_cost cost;
    assert_int_equal(attn_op_cost(op, in, 3, &cost), ATTN_OK);
    assert_true(cost.pairs == 2.0 * 4 * 7 * 9);
    attn_op_destroy(op);
}

/* A mechanism that computes in contiguous f32 gives the same through other types and layouts. */
static void test_types_and_layouts_are_converted(void **state)
{
    (void)state;
    float cond[12], perturbed[12], plain[12], strided[24];
    uint16_t half[12];
    for (int i = 0; i < 12; i++) {
        cond[i] = (float)i / 4;
        perturbed[i] = (float)(i * i) / 8;
    }
    attn_tensor perturbed_view = {perturbed + 11, ATTN_F32, 2, {4, 3}, {-3, -1}}, cond_t = {cond, ATTN_F32, 2, {4, 3}, {1, 4}};
    float turned[12], reversed[12];
    for (int i = 0; i < 12; i++) {
        turned[i] = cond[i / 3 + i % 3 * 4];
        reversed[i] = perturbed[11 - i];
    }
    attn_op *op;
    assert_int_equal(attn_op_create(&op, "softpag.guide"), ATTN_OK);
    attn_named_tensor in[] = {{"cond", attn_tensor_make(turned, ATTN_F32, SHAPE(4, 3))},
                              {"perturbed", attn_tensor_make(reversed, ATTN_F32, SHAPE(4, 3))}};
    attn_named_tensor other[] = {{"cond", cond_t}, {"perturbed", perturbed_view}};
    attn_named_tensor to[] = {{"o", attn_tensor_make(plain, ATTN_F32, SHAPE(4, 3))}};
    attn_named_tensor wide[] = {{"o", {strided, ATTN_F32, 2, {4, 3}, {6, 2}}}};
    attn_named_tensor small[] = {{"o", attn_tensor_make(half, ATTN_F16, SHAPE(4, 3))}};
    assert_int_equal(attn_op_forward(op, in, 2, to, 1, NULL), ATTN_OK);
    assert_int_equal(attn_op_forward(op, other, 2, wide, 1, NULL), ATTN_OK);
    assert_int_equal(attn_op_forward(op, other, 2, small, 1, NULL), ATTN_OK);
    for (int i = 0; i < 12; i++) {
        assert_true(plain[i] == strided[2 * i]);
    }
    small[0].tensor.dtype = ATTN_I64;
    assert_int_equal(attn_op_forward(op, other, 2, small, 1, NULL), ATTN_ERR_DTYPE);
    small[0].tensor = attn_tensor_make(half, ATTN_F16, SHAPE(3, 4));
    assert_int_equal(attn_op_forward(op, other, 2, small, 1, NULL), ATTN_ERR_SHAPE);
    assert_int_equal(attn_op_backward(op, in, 2, NULL, 0, to, 1, NULL, 0, NULL), ATTN_ERR_UNSUPPORTED);
    attn_op_destroy(op);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_spec_errors_name_the_culprit),
        cmocka_unit_test(test_good_specs),
        cmocka_unit_test(test_tables_are_sound),
        cmocka_unit_test(test_call_errors),
        cmocka_unit_test(test_outputs_without_data),
        cmocka_unit_test(test_types_and_layouts_are_converted),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
