/* Any bytes as a saved plan: loading must fail cleanly or give a plan that can be measured and drawn. */
#include <attn/plan.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    attn_plan *plan;
    if (attn_plan_load_memory(&plan, data, size) != ATTN_OK) {
        return 0;
    }
    attn_plan_measures measures;
    attn_plan_measure(plan, 64, 64, &measures);
    char *text;
    if (attn_plan_draw_text(plan, 0, 0, 32, &text) == ATTN_OK) {
        attn_plan_free_text(text);
    }
    attn_plan_destroy(plan);
    return 0;
}
