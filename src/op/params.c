/* Parameters: from a SPEC's text or a JSON object into a mechanism's own struct, checked against its table. */
#include "op/class.h"

#include <cjson/cJSON.h>
#include <stdio.h>
#include <string.h>

#define LIST_LIMIT 65536
#define MOST_WHOLE 9007199254740992.0 /* whole numbers up to here are exact in JSON */

static const char *type_text(const attn_param_info *param)
{
    switch (param->type) {
    case ATTN_PARAM_BOOL: return "true or false";
    case ATTN_PARAM_INT: return "a whole number";
    case ATTN_PARAM_FLOAT: return "a number";
    case ATTN_PARAM_CHOICE: return param->choices;
    case ATTN_PARAM_INTS: return "a list of whole numbers";
    case ATTN_PARAM_FLOATS: return "a list of numbers";
    case ATTN_PARAM_BOOLS: return "a list of true or false";
    }
    return "?";
}

/* "a whole number >= 1": what the message says was expected. most: the largest value, where that needs saying. */
static void expected(const attn_param_info *param, double most, char *text, size_t bytes)
{
    int used = snprintf(text, bytes, "%s", type_text(param));
    int numeric = param->type != ATTN_PARAM_BOOL && param->type != ATTN_PARAM_CHOICE && param->type != ATTN_PARAM_BOOLS;
    if (numeric && isfinite(param->min)) {
        used += snprintf(text + used, bytes - (size_t)used, " %s %.10g", param->min_open ? ">" : ">=", param->min);
    }
    if (numeric && isfinite(most)) {
        used += snprintf(text + used, bytes - (size_t)used, "%s %s %.16g", isfinite(param->min) ? " and" : "",
                         param->max_open ? "<" : "<=", most);
    }
    if (param->min_items > 1 || param->max_items > 0) {
        if (param->max_items == param->min_items) {
            used += snprintf(text + used, bytes - (size_t)used, ", %d items", param->min_items);
        } else if (param->max_items > 0) {
            used += snprintf(text + used, bytes - (size_t)used, ", %d to %d items", param->min_items, param->max_items);
        } else {
            used += snprintf(text + used, bytes - (size_t)used, ", at least %d items", param->min_items);
        }
    }
    if (param->standard != NULL && strcmp(param->standard, "null") == 0) {
        snprintf(text + used, bytes - (size_t)used, ", or null%s%s", param->standard_text ? " for " : "",
                 param->standard_text ? param->standard_text : "");
    }
}

static attn_status wrong_value(const attn_op_class *cls, const attn_param_info *param, const cJSON *value)
{
    char want[512];
    int huge = param->type == ATTN_PARAM_INT && cJSON_IsNumber(value) && value->valuedouble > MOST_WHOLE;
    expected(param, huge ? fmin(param->max, MOST_WHOLE) : param->max, want, sizeof want);
    char *got = cJSON_PrintUnformatted(value);
    attn_status status = attn_fail(ATTN_ERR_ARGUMENT, "%s: parameter %s = %.100s: expected %s", cls->info.name,
                                   param->name, got != NULL ? got : "?", want);
    cJSON_free(got);
    return status;
}

static int in_range(const attn_param_info *param, double x)
{
    return (param->min_open ? x > param->min : x >= param->min) && (param->max_open ? x < param->max : x <= param->max);
}

static int to_int(const attn_param_info *param, const cJSON *value, int64_t *out)
{
    if (!cJSON_IsNumber(value)) {
        return 0;
    }
    double x = value->valuedouble;
    if (!(fabs(x) <= MOST_WHOLE) || x != floor(x) || !in_range(param, x)) {
        return 0;
    }
    *out = (int64_t)x;
    return 1;
}

static int to_float(const attn_param_info *param, const cJSON *value, double *out)
{
    if (!cJSON_IsNumber(value) || !isfinite(value->valuedouble) || !in_range(param, value->valuedouble)) {
        return 0;
    }
    *out = value->valuedouble;
    return 1;
}

static int to_bool(const cJSON *value, int64_t *out)
{
    if (cJSON_IsNumber(value) && (value->valuedouble == 0 || value->valuedouble == 1)) {
        *out = value->valuedouble == 1;
        return 1;
    }
    *out = cJSON_IsTrue(value);
    return cJSON_IsBool(value);
}

static int to_choice(const attn_param_info *param, const cJSON *value, int64_t *out)
{
    if (!cJSON_IsString(value) || value->valuestring[0] == '\0') {
        return 0;
    }
    size_t length = strlen(value->valuestring);
    int64_t index = 0;
    for (const char *choice = param->choices;; index++) {
        size_t choice_length = strcspn(choice, "|");
        if (choice_length == length && memcmp(choice, value->valuestring, length) == 0) {
            *out = index;
            return 1;
        }
        if (choice[choice_length] == '\0') {
            return 0;
        }
        choice += choice_length + 1;
    }
}

static attn_status set_list(const attn_op_class *cls, const attn_param_info *param, const cJSON *value, char *field)
{
    int count = cJSON_IsArray(value) ? cJSON_GetArraySize(value) : 1;
    if (count > LIST_LIMIT || count < param->min_items || (param->max_items > 0 && count > param->max_items)) {
        return wrong_value(cls, param, value);
    }
    int floats = param->type == ATTN_PARAM_FLOATS;
    void *items = attn_calloc_array((size_t)count + 1, sizeof(int64_t));
    if (items == NULL) {
        return attn_fail_memory((size_t)count * sizeof(int64_t));
    }
    const cJSON *item = cJSON_IsArray(value) ? value->child : value;
    int ok = 1;
    for (int i = 0; i < count && ok; i++, item = item->next) {
        ok = floats                            ? to_float(param, item, (double *)items + i)
             : param->type == ATTN_PARAM_BOOLS ? to_bool(item, (int64_t *)items + i)
                                               : to_int(param, item, (int64_t *)items + i);
    }
    if (!ok) {
        attn_free(items);
        return wrong_value(cls, param, value);
    }
    if (floats) {
        attn_floats *list = (attn_floats *)(void *)field;
        attn_free(list->items);
        *list = (attn_floats){count, items};
    } else {
        attn_ints *list = (attn_ints *)(void *)field;
        attn_free(list->items);
        *list = (attn_ints){count, items};
    }
    return ATTN_OK;
}

static attn_status set_value(const attn_op_class *cls, const attn_param_info *param, const cJSON *value, char *params)
{
    char *field = params + param->offset;
    int64_t whole = ATTN_UNSET;
    double real = NAN;
    int is_null = cJSON_IsNull(value) && param->standard != NULL && strcmp(param->standard, "null") == 0;
    switch (param->type) {
    case ATTN_PARAM_BOOL:
        if (!is_null && !to_bool(value, &whole)) {
            return wrong_value(cls, param, value);
        }
        memcpy(field, &whole, sizeof whole);
        return ATTN_OK;
    case ATTN_PARAM_INT:
        if (!is_null && !to_int(param, value, &whole)) {
            return wrong_value(cls, param, value);
        }
        memcpy(field, &whole, sizeof whole);
        return ATTN_OK;
    case ATTN_PARAM_CHOICE:
        if (!is_null && !to_choice(param, value, &whole)) {
            return wrong_value(cls, param, value);
        }
        memcpy(field, &whole, sizeof whole);
        return ATTN_OK;
    case ATTN_PARAM_FLOAT:
        if (!is_null && !to_float(param, value, &real)) {
            return wrong_value(cls, param, value);
        }
        memcpy(field, &real, sizeof real);
        return ATTN_OK;
    case ATTN_PARAM_INTS:
    case ATTN_PARAM_FLOATS:
    case ATTN_PARAM_BOOLS:
        return is_null ? ATTN_OK : set_list(cls, param, value, field);
    }
    return ATTN_OK;
}

/* A value as written in a SPEC: JSON where it is JSON, a name otherwise. */
static cJSON *parse_value(const char *text)
{
    cJSON *value = cJSON_ParseWithOpts(text, NULL, 1);
    return value != NULL ? value : cJSON_CreateString(text);
}

static attn_status fill(const attn_op_class *cls, const cJSON *given, char *params)
{
    const attn_op_info *info = &cls->info;
    for (int i = 0; i < info->param_count; i++) {
        const attn_param_info *param = &info->params[i];
        const cJSON *value = cJSON_GetObjectItemCaseSensitive(given, param->name);
        if (value != NULL) {
            ATTN_TRY(set_value(cls, param, value, params));
        } else if (param->standard == NULL) {
            char want[512];
            expected(param, param->max, want, sizeof want);
            return attn_fail(ATTN_ERR_ARGUMENT, "%s: parameter %s is required (%s)", info->name, param->name, want);
        } else {
            cJSON *standard = parse_value(param->standard);
            if (standard == NULL) {
                return attn_fail(ATTN_ERR_MEMORY, "out of memory (parameters)");
            }
            attn_status status = set_value(cls, param, standard, params);
            cJSON_Delete(standard);
            ATTN_TRY(status);
        }
    }
    const cJSON *item;
    cJSON_ArrayForEach(item, given)
    {
        int known = 0;
        for (int i = 0; i < info->param_count; i++) {
            known |= strcmp(info->params[i].name, item->string) == 0;
        }
        if (!known) {
            char names[600] = "";
            size_t used = 0;
            for (int i = 0; i < info->param_count && used + 64 < sizeof names; i++) {
                used += (size_t)snprintf(names + used, sizeof names - used, "%s%s", i > 0 ? ", " : "",
                                         info->params[i].name);
            }
            return attn_fail(ATTN_ERR_ARGUMENT, "%s has no parameter '%.60s' (%s%s)", info->name, item->string,
                             info->param_count > 0 ? "it has " : "it has none", names);
        }
    }
    return ATTN_OK;
}

static attn_status create(void **params, const attn_op_class *cls, const cJSON *given)
{
    *params = NULL;
    void *made = attn_calloc_array(1, cls->params_size + 1);
    if (made == NULL) {
        return attn_fail_memory(cls->params_size);
    }
    attn_status status = fill(cls, given, made);
    if (status != ATTN_OK) {
        attn_params_destroy(made, cls);
        return status;
    }
    *params = made;
    return ATTN_OK;
}

attn_status attn_params_create_json(void **params, const attn_op_class *cls, const char *json)
{
    *params = NULL;
    cJSON *given = cJSON_ParseWithOpts(json, NULL, 1);
    attn_status status = cJSON_IsObject(given) ? create(params, cls, given)
                                               : attn_fail(ATTN_ERR_ARGUMENT, "%s: the parameters are not a JSON object: %.80s",
                                                           cls->info.name, json);
    cJSON_Delete(given);
    return status;
}

/* Length of the text up to the next comma that is not inside brackets. */
static size_t item_length(const char *text)
{
    int depth = 0;
    size_t i = 0;
    for (; text[i] != '\0' && (text[i] != ',' || depth > 0); i++) {
        depth += (text[i] == '[') - (text[i] == ']');
    }
    return i;
}

static attn_status add_item(const attn_op_class *cls, cJSON *given, char *item)
{
    char *equals = strchr(item, '=');
    if (equals == NULL || equals == item) {
        return attn_fail(ATTN_ERR_ARGUMENT, "%s: '%.80s': expected key=value", cls->info.name, item);
    }
    *equals = '\0';
    if (cJSON_GetObjectItemCaseSensitive(given, item) != NULL) {
        return attn_fail(ATTN_ERR_ARGUMENT, "%s: parameter '%.60s' is given twice", cls->info.name, item);
    }
    cJSON *value = parse_value(equals + 1);
    if (value == NULL || !cJSON_AddItemToObject(given, item, value)) {
        cJSON_Delete(value);
        return attn_fail(ATTN_ERR_MEMORY, "out of memory (parameters)");
    }
    return ATTN_OK;
}

attn_status attn_params_create(void **params, const attn_op_class *cls, const char *spec_params)
{
    *params = NULL;
    char *text = attn_strdup(spec_params);
    cJSON *given = cJSON_CreateObject();
    attn_status status = text != NULL && given != NULL ? ATTN_OK : attn_fail(ATTN_ERR_MEMORY, "out of memory (parameters)");
    char *rest = text;
    while (status == ATTN_OK && *rest != '\0') {
        size_t length = item_length(rest);
        char *next = rest[length] == ',' ? rest + length + 1 : rest + length;
        rest[length] = '\0';
        status = add_item(cls, given, rest);
        rest = next;
    }
    if (status == ATTN_OK) {
        status = create(params, cls, given);
    }
    cJSON_Delete(given);
    attn_free(text);
    return status;
}

void attn_params_destroy(void *params, const attn_op_class *cls)
{
    if (params == NULL) {
        return;
    }
    for (int i = 0; i < cls->info.param_count; i++) {
        const attn_param_info *param = &cls->info.params[i];
        void *field = (char *)params + param->offset;
        if (param->type == ATTN_PARAM_FLOATS) {
            attn_free(((attn_floats *)field)->items);
        } else if (param->type == ATTN_PARAM_INTS || param->type == ATTN_PARAM_BOOLS) {
            attn_free(((attn_ints *)field)->items);
        }
    }
    attn_free(params);
}
