/* Running a mechanism on the tensors of a safetensors file: in.NAME (or plain NAME) are inputs, in.grad_NAME (grad_NAME)
 * are gradients of outputs, out.NAME are expected outputs and no input. */
#include "cli.h"

#include <stdlib.h>
#include <string.h>

static int has_port(const attn_op_info *info, attn_port_direction direction, const char *name)
{
    for (int i = 0; i < info->port_count; i++) {
        if (info->ports[i].direction == direction && strcmp(info->ports[i].name, name) == 0) {
            return 1;
        }
    }
    return 0;
}

attn_status cli_call_inputs(cli_call *call, const attn_safetensors *file)
{
    const attn_op_info *info = attn_op_get_info(call->op);
    for (int i = 0; i < attn_safetensors_count(file); i++) {
        const char *name = attn_safetensors_name(file, i);
        if (strncmp(name, "out.", 4) == 0) {
            continue;
        }
        if (strncmp(name, "in.", 3) == 0) {
            name += 3;
            call->prefixed = 1;
        }
        int is_grad = !has_port(info, ATTN_PORT_IN, name) && strncmp(name, "grad_", 5) == 0 &&
                      has_port(info, ATTN_PORT_OUT, name + 5);
        attn_named_tensor *to = is_grad ? call->grad_out : call->in;
        int *count = is_grad ? &call->grad_out_count : &call->in_count;
        if (*count == 80) {
            break; /* more than any mechanism has: attn_op_forward will name the stranger */
        }
        to[*count].name = is_grad ? name + 5 : name;
        attn_status status = attn_safetensors_get(file, i, &to[*count].tensor);
        if (status != ATTN_OK) {
            return status;
        }
        ++*count;
    }
    return ATTN_OK;
}

static attn_status add_memory(cli_call *call, attn_tensor *tensor)
{
    size_t bytes = (size_t)attn_tensor_count(tensor) * attn_dtype_size(tensor->dtype);
    tensor->data = calloc(bytes + 1, 1);
    call->memory[call->memory_count++] = tensor->data;
    return tensor->data != NULL ? ATTN_OK : ATTN_ERR_MEMORY;
}

static int wanted(const char *name, int count, const char *const *names)
{
    for (int i = 0; i < count; i++) {
        if (strcmp(name, names[i]) == 0) {
            return 1;
        }
    }
    return names == NULL;
}

attn_status cli_call_run(cli_call *call, const attn_exec *exec, int want_only_count, const char *const *want_only)
{
    const attn_op_info *info = attn_op_get_info(call->op);
    attn_named_tensor all[80];
    int count = 80;
    attn_status status = attn_op_outputs(call->op, call->in, call->in_count, all, &count);
    for (int i = 0; i < count && status == ATTN_OK; i++) {
        if (wanted(all[i].name, want_only_count, want_only)) {
            call->out[call->out_count] = all[i];
            status = add_memory(call, &call->out[call->out_count++].tensor);
        }
    }
    if (status == ATTN_OK) {
        status = attn_op_forward(call->op, call->in, call->in_count, call->out, call->out_count, exec);
    }
    if (status != ATTN_OK || call->grad_out_count == 0) {
        return status;
    }
    for (int i = 0; i < call->in_count && status == ATTN_OK; i++) {
        for (int port = 0; port < info->port_count; port++) {
            if (info->ports[port].direction == ATTN_PORT_IN && (info->ports[port].flags & ATTN_PORT_DIFF) != 0 &&
                strcmp(info->ports[port].name, call->in[i].name) == 0) {
                attn_named_tensor *grad = &call->grad_in[call->grad_in_count++];
                grad->name = call->in[i].name;
                grad->tensor = attn_tensor_make(NULL, ATTN_F32, call->in[i].tensor.ndim, call->in[i].tensor.shape);
                status = add_memory(call, &grad->tensor);
            }
        }
    }
    if (status == ATTN_OK) {
        status = attn_op_backward(call->op, call->in, call->in_count, call->out, call->out_count, call->grad_out,
                                  call->grad_out_count, call->grad_in, call->grad_in_count, exec);
    }
    return status;
}

void cli_call_free(cli_call *call)
{
    for (int i = 0; i < call->memory_count; i++) {
        free(call->memory[i]);
    }
    attn_op_destroy(call->op);
}
